"""Commands, run as ``python -m hivit_jax.tools.NAME``; ``--help`` shows the usage."""
