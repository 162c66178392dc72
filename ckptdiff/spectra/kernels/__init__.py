"""The compiled loops of `spectra`."""
