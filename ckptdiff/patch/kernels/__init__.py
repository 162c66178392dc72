"""Compiled loops of weight deltas."""
