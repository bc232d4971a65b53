"""Restore checkpoints with one flipped bit, with and without this library's digests.

    python -m benchmarks.bit_flips [--flips 150]

The benchmark saves two checkpoints of a small train state. It then flips one random bit
of the newer checkpoint and restores. The result is one of three: the saved arrays, the
arrays of the older checkpoint, or wrong arrays without an error.
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


def make_state(step: int) -> dict:
    """Return a small train state."""
    model = create_model("hivit_tiny", embed_dim=32, depths=(1, 1, 1), num_heads=2)
    params = jax.tree.map(lambda x: x + step, split(model)[1])
    return {"step": np.int32(step), "params": params, "opt_state": {"mu": params}}


def outcome(workdir: Path, expected: dict[int, dict], abstract: dict) -> str:
    """Restore the newest checkpoint of a workdir and classify the result.

    Args:
      expected: step -> saved arrays by name.
      abstract: shapes, dtypes and shardings of the state.

    Returns:
      "saved arrays", "older checkpoint" or "wrong arrays, no error".
    """
    with contextlib.redirect_stdout(io.StringIO()):
        step, restored = Checkpoints(workdir, 9).restore_newest(abstract)
    pairs = zip(named_leaves(restored).values(), expected[step].values(), strict=True)
    if not all(np.array_equal(a, b, equal_nan=True) for a, b in pairs):
        return "wrong arrays, no error"
    return "saved arrays" if step == 2 else "older checkpoint"


def main() -> None:
    """Run the benchmark and write results/bit_flips.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    text = "number of damaged checkpoints to restore, each with one flipped bit"
    parser.add_argument("--flips", type=int, default=150, help=text)
    flips = parser.parse_args().flips
    logging.disable(logging.CRITICAL)
    states = {
        step: jax.tree.map(jax.numpy.asarray, make_state(step)) for step in (1, 2)
    }
    expected = {step: jax.device_get(named_leaves(s)) for step, s in states.items()}
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), states[1]
    )
    results = {}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        checkpoints = Checkpoints(root / "run", 9)
        for state in states.values():
            checkpoints.save(state, json.dumps({"model": {}}))
        checkpoints.close()
        files = {
            path.relative_to(root / "run"): path.read_bytes()
            for path in sorted((root / "run").rglob("*"))
            if path.is_file()
        }
        newer = [p for p in files if p.parts[:2] == ("checkpoints", "2")]
        sizes = [len(files[path]) for path in newer]
        for verified in (False, True):
            counts, rng = Counter(), random.Random(0)
            no_digests = mock.patch.object(manager, "verify_digests")
            with contextlib.nullcontext() if verified else no_digests:
                for flip in range(flips):
                    damaged = rng.choices(newer, sizes)[0]
                    content = bytearray(files[damaged])
                    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
                    workdir = root / f"{verified}{flip}"
                    for path, original in files.items():
                        (workdir / path).parent.mkdir(parents=True, exist_ok=True)
                        (workdir / path).write_bytes(
                            content if path == damaged else original
                        )
                    counts[outcome(workdir, expected, abstract)] += 1
            title = "with digests" if verified else "orbax alone"
            results[title] = dict(counts)
            print(f"{title}: {dict(counts)}")
    RESULTS.write_text(json.dumps({"flips": flips, **results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
