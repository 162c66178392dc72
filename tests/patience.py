"""How long a test waits for what must come, before it says that it never came."""

PATIENCE = 3600.0
"""Seconds; far more than anything takes on the busiest machine, so that no test depends on how fast it is."""
