"""The run file: its HDF5 schema, its one writer, its reader, and the masks in it."""
