"""The memory of a job by running its real code without data; start at ``simulate_training``."""
