"""Scores that need more than activations: gradients of refusals, and training."""
