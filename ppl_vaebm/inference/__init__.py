"""How to draw from a density, fit it, and check the draws."""
