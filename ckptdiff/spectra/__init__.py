"""Spectra of the matrices of a checkpoint pair: streamed from the shards, after the coordinate pass."""
