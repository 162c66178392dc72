"""An update as a low-rank adapter: found by the randomized spectra, written as PEFT reads it."""
