"""What ``scripts/verify_memory.py`` and ``scripts/memory_study.py`` are made of."""
