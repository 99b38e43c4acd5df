"""Running a model: sampling parameters and token-by-token generation from a latent cache."""
