"""Sweeps: many runs from one YAML, one after another, and a table of what they reached."""
