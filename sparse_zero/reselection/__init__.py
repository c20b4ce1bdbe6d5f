"""The selection is made anew during training: what is kept, what begins, and what is retired."""
