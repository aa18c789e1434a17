"""MCMC kernels on any batched potential: a small library of its own, without Pyro and without models."""
