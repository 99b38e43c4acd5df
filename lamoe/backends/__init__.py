"""What runs a model: the torch ops on any device, or the compiled CPU kernels."""
