"""Run the command line of `hivit_jax.main` as ``python -m hivit_jax``."""

import sys

from hivit_jax.main import command

sys.exit(command())
