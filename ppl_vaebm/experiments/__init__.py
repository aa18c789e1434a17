"""Recipes, one YAML file each, the studies that compare settings, and their results."""
