"""Numba kernels. Importing a module here declares its kernels; each is compiled, or loaded, on its first call."""
