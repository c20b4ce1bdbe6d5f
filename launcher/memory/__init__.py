"""How much memory does a run take: measured, forecast and simulated side by side, and explained where it runs out?"""
