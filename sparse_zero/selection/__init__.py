"""Which entries of which weights are trained: configuration, scores, budget, and the selection as data."""
