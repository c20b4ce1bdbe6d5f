"""The memory of a job as a sum of named terms, from shapes alone; start at ``forecast.py``."""
