"""The compiled loops of `retrain`."""
