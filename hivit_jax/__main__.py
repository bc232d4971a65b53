"""``python -m hivit_jax`` is the command line of `hivit_jax.main`."""

import sys

from hivit_jax.main import command

sys.exit(command())
