"""How a selection acts in a model: sparse linears, their gradients, write-back and merge."""
