"""What is measured: the catalogue of figures, and how figures of tensors become figures of groups."""
