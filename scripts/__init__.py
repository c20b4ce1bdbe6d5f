"""Commands of the repository: installation, tests, quickstart, benchmarks and studies. Not part of the package."""
