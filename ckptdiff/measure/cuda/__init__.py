"""Measure on a GPU: kernels in ``cuda/``, CuPy to reach it, and a pipeline that keeps its bus busy."""
