"""What is kept on disk: canonical checkpoints, adapters, and the identity of the base."""
