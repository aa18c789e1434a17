"""Pyro's, NumPyro's and BlackJAX's samplers on our potentials, and our kernels inside Pyro's MCMC."""
