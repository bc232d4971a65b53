"""Names of parameters in other programs, one module a family."""
