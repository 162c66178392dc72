"""The compiled loops of `track`."""
