"""Codes of numbers, as every compiled loop needs them: their bits, their values, and how they are read from a file."""
