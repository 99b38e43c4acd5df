"""The backend that runs the compiled CPU kernels (csrc/), and its folders of packed weights."""
