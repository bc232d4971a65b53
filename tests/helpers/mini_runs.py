"""Mini runs: recipes of models that train in seconds, and functions to run them."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest
from flags import fast_compile_flag, virtual_devices_flag
from jax.sharding import Mesh
from ml_collections import ConfigDict

from hivit_jax import config as configs
from hivit_jax import evaluate, inputs, train
from hivit_jax.checkpoints import read
from hivit_jax.distributed import sharding
from hivit_jax.distributed.sharding import make_mesh
from hivit_jax.kernels import target
from hivit_jax.main import main
from hivit_jax.paths import PATH_KEYS
from hivit_jax.reporting import figures, metrics
from hivit_jax.tasks import Task
from hivit_jax.training.schedule import make_schedule
from hivit_jax.training.step import Training, prepare
from hivit_jax.tree import named_leaves

ROOT = Path(__file__).parents[2]
MINIMAL_MAIN = Path(__file__).with_name("minimal_main.py")

# An image has 16 units. On synthetic images and digits, the warmup takes two steps.
MINI = {
    "batch_size": 16,
    "total_steps": 8,
    "log_every": 1,
    "eval_every": 1000,
    "checkpoint_every": 1000,
    "model.embed_dim": 64,
    "model.depths": "(1,1,2)",
    "model.num_heads": 2,
    "model.decoder_embed_dim": 32,
    "model.decoder_depth": 1,
    "model.decoder_num_heads": 2,
    "model.dtype": "float32",
    "optimizer.base_learning_rate": 0.016,  # a peak of 1e-3 with 16 images
}
SOURCES = {
    "synthetic": MINI
    | {
        "data.name": "synthetic",
        "data.train_examples": 64,
        "model.image_size": 64,
        "optimizer.warmup_epochs": 0.5,
    },
    "digits": MINI | {"optimizer.warmup_epochs": 0.022},
    "photographs": MINI | {"model.image_size": 64, "optimizer.warmup_epochs": 0.1},
}
FILES = {
    "synthetic": "configs/mae_base.py",
    "digits": "configs/digits_mae.py",
    "photographs": "configs/mae_base.py",
}
CLASSIFIER = {
    "task": "classify",
    "label_smoothing": 0.1,
    "mixup": 0.8,
    "cutmix": 1.0,
    "random_erasing": 0.25,
    "model__name": "hivit_base",
    "model__num_classes": 10,
    "model__drop_path_rate": 0.3,
}
PRETRAINING_ONLY = ("model.decoder_", "model.multi_scale", "model.norm_pix_loss")


def arguments(source: str = "synthetic", **overrides) -> list[str]:
    """Return the command line of the mini masked autoencoder on a source.

    Args:
      source: key of `SOURCES`.
      overrides: config values; two underscores stand for a dot.
    """
    values = SOURCES[source] | {k.replace("__", "."): v for k, v in overrides.items()}
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    return [f"--config={ROOT / FILES[source]}", *flags]


def mae(source: str = "synthetic", **overrides) -> ConfigDict:
    """Return the mini masked autoencoder's config."""
    path, *flags = arguments(source, **overrides)
    return configs.load(path.removeprefix("--config="), flags)


def recipe(name: str) -> ConfigDict:
    """Return the config of an installed recipe without overrides."""
    return configs.load(name)


def without_decoder(source: str, **overrides) -> ConfigDict:
    """Return the config of the mini classifier or linear probe."""
    values = SOURCES[source] | {k.replace("__", "."): v for k, v in overrides.items()}
    path = ROOT / "configs" / "mae_base.py"
    if source == "digits":
        path = ROOT / "configs" / "digits_finetune.py"
        digits_only = {"data.train_examples": 0, "data.crop_scale": "(1.0,1.0)"}
        if values["task"] == "linear_probe":
            path = ROOT / "configs" / "digits_linear.py"
        values = digits_only | values
    keys = [k for k in values if not k.startswith(PRETRAINING_ONLY)]
    return configs.load(str(path), [f"--config.{key}={values[key]}" for key in keys])


def classifier(source: str = "synthetic", **overrides) -> ConfigDict:
    """Return the mini classifier's config, with drop path and label smoothing."""
    return without_decoder(source, **CLASSIFIER | overrides)


@contextmanager
def minimal_output() -> Iterator[None]:
    """Context manager in which runs draw no figures and write no TensorBoard events.

    Runs of equal configs, datasets and meshes in this process share their programs.
    Otherwise, most of a repeated run's time is tracing and lowering.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "prepare", memoize(train.prepare))
        patch.setattr(evaluate, "make_eval_step", memoize(evaluate.make_eval_step))
        patch.setitem(sys.modules, "tensorboardX", None)
        patch.setattr(figures, "draw_run", lambda *_: None)
        patch.setattr(evaluate, "make_panels", lambda *_: lambda params: {})
        yield


@contextmanager
def visible_devices(count: int) -> Iterator[None]:
    """Context manager in which `jax.devices` returns the first `count` devices."""
    devices = jax.devices()[:count]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: devices)
        yield


def memoize(build: Callable) -> Callable:
    """Return a wrapper of a function that builds programs from a task and a mesh.

    The wrapper calls the function once for each config, dataset and mesh. Configs that
    differ only in paths count as one.
    """
    results = {}

    def call(*arguments, **options):
        task = next(x for x in arguments if isinstance(x, Task))
        mesh = next(x for x in arguments if isinstance(x, Mesh))
        settings = target.platform(), sharding.MIN_SHARDED_SIZE
        config = ConfigDict(task.config).copy_and_resolve_references()
        config.update_from_flattened_dict(dict.fromkeys(PATH_KEYS, None))
        key = configs.to_json(config), repr(task.data), mesh, *settings
        if key not in results:
            results[key] = build(*arguments, **options)
        return results[key]

    return call


def traced_step(config: ConfigDict) -> str:
    """Return the jaxpr of a config's train step as text."""
    mesh = make_mesh(config.mesh, config.batch_size, config.optimizer.accumulate_steps)
    training = make_training(config, mesh, lambda step: 0.1)
    with jax.set_mesh(mesh):
        return str(jax.make_jaxpr(training.step)(*training.arguments()))


def make_training(config: ConfigDict, mesh, schedule) -> Training:
    """Return the prepared train step of a config."""
    task = inputs.make_task(config, "train")
    return prepare(task, mesh, schedule, **configs.step_options(config))


def compile_report(workdir, *more, topology="v5e:2x4", **overrides):
    """Run ``--mode compile``; return the content of compile.json."""
    flags = arguments(**{"batch_size": 64} | overrides)
    flags += [f"--topology={topology}", f"--workdir={workdir}", *more]
    assert main([*flags, "--mode=compile"]) == 0
    return json.loads((workdir / "compile.json").read_text())


def jit_schedule(config: ConfigDict, steps_per_epoch: float, total_steps: int):
    """Return the jitted learning-rate schedule of a config."""
    optimizer, batch_size = config.optimizer, config.batch_size
    return jax.jit(make_schedule(optimizer, batch_size, steps_per_epoch, total_steps))


def start_process(
    *command: str | Path, devices: int = 1, log: Path | None = None, **environment
) -> subprocess.Popen:
    """Start ``python COMMAND`` with `devices` CPU devices.

    Args:
      log: file for stdout; None: `communicate` returns stdout.
      environment: variables in addition to those of this process.
    """
    variables = dict(
        JAX_PLATFORMS="cpu",
        XLA_FLAGS=f"{virtual_devices_flag(devices)} {fast_compile_flag()}",
        **environment,
    )
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=log.open("w") if log else subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {k: str(v) for k, v in variables.items()},
    )


def run_process(*command: str | Path, **options) -> tuple[int, str, str]:
    """Run ``python COMMAND`` to its end; return (exit code, stdout, stderr)."""
    process = start_process(*command, **options)
    out, err = process.communicate()
    return process.returncode, out, err


def free_address():
    """Return HOST:PORT with a port that no other process uses."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def block_imports(directory: Path, *names: str) -> Path:
    """Return a directory for PYTHONPATH, in which imports of these packages fail."""
    directory.mkdir(exist_ok=True)
    for name in names:
        message = f"{name} is not installed"
        (directory / f"{name}.py").write_text(f"raise ImportError({message!r})\n")
    return directory


def logged(workdir: Path, name: str = "loss") -> dict[int, float]:
    """Return {step: value} of a metric, and check that steps increase."""
    lines = [line for line in metrics.read(workdir / "metrics.jsonl") if name in line]
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps))
    return {line["step"]: line[name] for line in lines}


def saved_steps(workdir: Path) -> list[int]:
    """Return the steps with a complete checkpoint, in a local workdir."""
    paths = (workdir / "checkpoints").glob("*")
    return sorted(int(path.name) for path in paths if path.name.isdigit())


def sample(source, index: int) -> tuple[bytes, int]:
    """Return the encoded image and the label of an example."""
    example = source.sample(index)
    return example["image"], example["label"]


def saved_arrays(workdir: Path, step: int) -> dict[str, dict[str, np.ndarray]]:
    """Return {item: {name: array}} of the checkpoint of a step."""
    items = {}
    for item in ("params", "model_state", "optimizer", "ema"):
        path = read.absolute(workdir) / "checkpoints" / str(step) / item
        if path.is_dir():
            items[item] = named_leaves(read.load_item(path))
    return items


def saved_variables(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Return {name: parameter or model state} of a checkpoint, sorted by name."""
    items = saved_arrays(workdir, step)
    return dict(sorted((items["params"] | items.get("model_state", {})).items()))


def assert_identical(actual, expected) -> None:
    """Check that two pytrees of arrays are bit-identical."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def check_message(err: str, fragments: Iterable[str]) -> None:
    """Check that an error has one to three lines and contains all fragments."""
    assert 1 <= len(err.splitlines()) <= 3
    assert err.startswith("error: ")
    for fragment in fragments:
        assert fragment in err
