"""Commands: ``python -m hivit_jax.tools.NAME --help``."""
