"""The compiled loops of `checkpoint`."""
