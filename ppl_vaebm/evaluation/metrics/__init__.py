"""Sample metrics: from images to features, and from features, logits or scores to numbers."""
