"""Estimates of log Z on any batched potential, and their errors."""
