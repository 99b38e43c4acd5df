"""The backend of compiled CPU kernels (csrc/), and its folders of packed weights."""
