"""What becomes of checkpoints with a flipped bit: here, and with orbax alone.

    python -m benchmarks.bit_flips [--flips 150]

Flips single bits, drawn evenly over all bytes of the newer of two checkpoints of a
small train state, and restores: each time its very numbers, the older checkpoint's, or,
worst, other numbers and no word of it.
"""

import argparse
import contextlib
import io
import json
import logging
import random
import tempfile
from collections import Counter
from pathlib import Path
from unittest import mock

import jax
import numpy as np

from hivit_jax.checkpoints import manager
from hivit_jax.checkpoints.manager import Checkpoints
from hivit_jax.models import create_model
from hivit_jax.tree import named_leaves, split

RESULTS = Path(__file__).resolve().parent / "results" / "bit_flips.json"


def state(step: int) -> dict:
    """A small train state."""
    model = create_model("hivit_tiny", embed_dim=32, depths=(1, 1, 1), num_heads=2)
    params = jax.tree.map(lambda x: x + step, split(model)[1])
    return {"step": np.int32(step), "params": params, "opt_state": {"mu": params}}


def fate(workdir: Path, expected: dict[int, dict], wanted: dict) -> str:
    """What restoring from a workdir gives."""
    with contextlib.redirect_stdout(io.StringIO()):
        step, found = Checkpoints(workdir, 9).restore_newest(wanted)
    pairs = zip(named_leaves(found).values(), expected[step].values(), strict=True)
    if not all(np.array_equal(a, b, equal_nan=True) for a, b in pairs):
        return "wrong, silently"
    return "harmless" if step == 2 else "noticed, the older one taken"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--flips", type=int, default=150)
    flips = parser.parse_args().flips
    logging.disable(logging.CRITICAL)
    states = {step: jax.tree.map(jax.numpy.asarray, state(step)) for step in (1, 2)}
    expected = {step: jax.device_get(named_leaves(s)) for step, s in states.items()}
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), states[1]
    )
    results = {}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        checkpoints = Checkpoints(root / "run", 9)
        for each in states.values():
            checkpoints.save(each, json.dumps({"model": {}}))
        checkpoints.close()
        files = {
            path.relative_to(root / "run"): path.read_bytes()
            for path in sorted((root / "run").rglob("*"))
            if path.is_file()
        }
        newer = [p for p in files if p.parts[:2] == ("checkpoints", "2")]
        sizes = [len(files[path]) for path in newer]
        for verified in (False, True):
            counts, draw = Counter(), random.Random(0)
            silence = mock.patch.object(manager, "_verify")
            with contextlib.nullcontext() if verified else silence:
                for number in range(flips):
                    spoilt = draw.choices(newer, sizes)[0]
                    content = bytearray(files[spoilt])
                    place = draw.randrange(len(content))
                    content[place] ^= 1 << draw.randrange(8)
                    workdir = root / f"{verified}{number}"
                    for path, whole in files.items():
                        (workdir / path).parent.mkdir(parents=True, exist_ok=True)
                        (workdir / path).write_bytes(
                            content if path == spoilt else whole
                        )
                    counts[fate(workdir, expected, wanted)] += 1
            results["with digests" if verified else "orbax alone"] = dict(counts)
            print(f"{'with digests' if verified else 'orbax alone'}: {dict(counts)}")
    RESULTS.write_text(json.dumps({"flips": flips, **results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
