"""Make what is printed of the rows that were measured."""
