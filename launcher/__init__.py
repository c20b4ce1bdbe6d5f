"""What is a run, where do its ranks start, and what is shown of it: config, worker and command line."""
