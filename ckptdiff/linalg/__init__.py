"""Spectra of matrices that are read panel by panel: randomized and exact, written once for all libraries of arrays."""
