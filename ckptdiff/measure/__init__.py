"""From the bytes of a tensor pair to one row of figures, on a processor or a GPU."""
