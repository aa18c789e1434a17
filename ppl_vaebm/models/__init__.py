"""What the distribution is: the VAE, the energy network, and their product as a Pyro program."""

import pyro

# Parameters belong to their module, not to Pyro's global store. Without this a deep copy of a model (an average of
# weights, a teacher) silently gets the original's PyroParams back. It must be set before any PyroModule is built.
pyro.settings.set(module_local_params=True)
