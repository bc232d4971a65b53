"""Parameter names of other programs, one module per family."""
