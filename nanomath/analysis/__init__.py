"""Reading what was trained: evaluation of a model on held-out problems."""
