"""The compiled loops of `linalg`."""
