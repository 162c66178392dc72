"""Read and write run files: their HDF5 schema, the one writer, the reader, and the masks in them."""
