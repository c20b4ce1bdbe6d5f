"""What ``scripts/bench_*.py`` are made of: methods, ratios of paired times, tables and plots."""
