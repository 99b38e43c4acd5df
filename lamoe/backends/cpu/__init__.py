"""The compiled CPU kernels (csrc/): packed weights and their folders."""
