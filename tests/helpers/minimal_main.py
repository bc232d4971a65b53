"""The main command without figures and TensorBoard events, which take seconds."""

import sys

import mini_runs

from hivit_jax.main import command

if __name__ == "__main__":
    with mini_runs.minimal_output():
        sys.exit(command())
