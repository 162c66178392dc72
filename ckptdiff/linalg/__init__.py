"""Spectra of matrices that are read panel by panel: randomized and exact, written once over NumPy and CuPy."""
