"""The page of results, from the saved numbers of studies and benchmarks."""
