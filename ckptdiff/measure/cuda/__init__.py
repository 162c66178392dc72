"""The CUDA backend: kernels in ``cuda/``, CuPy to reach a GPU, and a pipeline that keeps its bus busy."""
