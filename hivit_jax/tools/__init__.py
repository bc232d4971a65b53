"""Commands such as ``python -m hivit_jax.tools.predict --help``, and their helpers."""
