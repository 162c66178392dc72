"""Handle codes of numbers in compiled loops: their bits, their values, and how they are read from a file."""
