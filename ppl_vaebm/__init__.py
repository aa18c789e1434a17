"""VAEBM, ``p_theta(x, z) * exp(-E_psi(x)) / Z``, as one probabilistic program, and inference on it.

Importing the package imports nothing else, so that ``--help`` of a command does not wait for torch.
"""

# A plain literal, so that the build reads it without importing anything.
__version__ = "0.1.0.dev0"
