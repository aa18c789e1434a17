"""Stage svi: fit the VAE by stochastic variational inference."""
