"""Convergence diagnostics of chains, and conversion of chains to ArviZ's containers and files."""
