"""How the values, and only they, reach DeepSpeed ZeRO."""
