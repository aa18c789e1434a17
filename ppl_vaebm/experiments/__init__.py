"""With which numbers: the built-in recipes, one YAML file each."""
