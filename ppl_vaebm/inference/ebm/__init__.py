"""Stage ebm: learn the energy on top of a frozen VAE."""
