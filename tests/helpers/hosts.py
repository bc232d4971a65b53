"""Program of one host in a multi-process test.

    python tests/helpers/hosts.py ADDRESS COUNT INDEX OUT WORKDIR FLAG...

The first FLAG is --config=RECIPE. The program writes the host's examples of some
training batches and of all evaluation batches to OUT.npz. All hosts together evaluate
the checkpoint in WORKDIR, and each host writes the results to OUT.json.
"""

import json
import sys

import jax
import numpy as np

STEPS = (3, 9)  # first training step, and the step after the last training step


def main(address, count, index, out, workdir, config_flag, *overrides):
    jax.distributed.initialize(address, int(count), int(index))
    from hivit_jax import config as configs
    from hivit_jax import inputs
    from hivit_jax.evaluate import evaluate_checkpoint

    config = configs.load(config_flag.removeprefix("--config="), overrides)
    arrays = {}
    for batch_index, batch in enumerate(
        [*inputs.train_batches(config, *STEPS), *inputs.eval_batches(config)]
    ):
        arrays |= {f"{batch_index} {key}": value for key, value in batch.items()}
    np.savez(f"{out}.npz", **arrays)
    with open(f"{out}.json", "w") as file:
        json.dump(evaluate_checkpoint(config, workdir), file)


if __name__ == "__main__":
    main(*sys.argv[1:])
