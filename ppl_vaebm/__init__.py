"""VAEBM, ``p_theta(x, z) * exp(-E_psi(x)) / Z``, as one probabilistic program, and inference on it.

Nothing is imported here but the version, so that ``--help`` of an entry point does not wait for torch.
"""

from ppl_vaebm.version import __version__

__all__ = ["__version__"]
