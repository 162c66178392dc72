"""Measure a tensor pair: from its bytes to one row of figures, on a processor or a GPU."""
