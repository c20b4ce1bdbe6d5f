"""Where do other trainers call this library? One module for each of them, imported by those who use it."""
