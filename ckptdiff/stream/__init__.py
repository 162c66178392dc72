"""How bytes reach the kernels: a pure plan, and the reader that carries it out in bounded memory."""
