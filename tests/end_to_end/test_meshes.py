"""Tests of training on several meshes: losses, shardings, accumulation, divergence."""

import math
from functools import cache

import jax
import mini_runs
import numpy as np
import pytest
from jax.sharding import AxisType
from numpy.testing import assert_allclose

import hivit_jax
from hivit_jax import evaluate, inputs
from hivit_jax import train as train_module
from hivit_jax.checkpoints.manager import Checkpoints
from hivit_jax.distributed import sharding
from hivit_jax.errors import ConfigError, DataError, DivergedError, Interrupted
from hivit_jax.training.schedule import make_schedule
from hivit_jax.tree import named_leaves, split, split_params
from hivit_jax.xla.compile import compile_step

OPTIONAL = ("tensorflow", "tensorflow_datasets", "tensorboardX", "sklearn", "torch")


FSDP = dict(mesh__replica=2, mesh__data=1, mesh__fsdp=4)


TENSOR = dict(mesh__data=1, mesh__fsdp=4, mesh__tensor=2)


EVERY_STEP = dict(checkpoint_every=1, keep_checkpoints=10)


AVERAGED = dict(
    optimizer__ema_decay=0.9, optimizer__warmup_epochs=0.0, total_steps=3, **EVERY_STEP
)


pytestmark = [pytest.mark.usefixtures("minimal_output"), pytest.mark.slow]


class Run:
    """Run of `train`.

    initial: {name: host array} of the initial state.
    shards: [{name: shape of the shard on device 0}] of the initial state and of each
      saved state.
    results: metrics of the last evaluation, as `train` returns them.
    """

    def __init__(self, config, workdir):
        self.workdir, self.initial, self.shards = workdir, {}, []

        def record(state):
            leaves = named_leaves(state)
            self.shards.append(
                {k: v.addressable_shards[0].data.shape for k, v in leaves.items()}
            )
            self.initial = self.initial or jax.device_get(leaves)

        def compile_steps(prepared):
            step = original_compile(prepared)

            def run(state, *rest):
                if not self.shards:
                    record(state)
                return step(state, *rest)

            return run

        def save(checkpoints, state, *rest):
            record(state)
            original_save(checkpoints, state, *rest)

        original_compile, original_save = train_module.compile_steps, Checkpoints.save
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_module, "compile_steps", compile_steps)
            patch.setattr(Checkpoints, "save", save)
            self.results = train_module.train(config, workdir)

    def initial_params(self):
        """Return {name: array} of the initial parameters."""
        return {
            name.removeprefix("params/"): array
            for name, array in self.initial.items()
            if name.startswith("params/")
        }


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a cached function from (recipe, overrides) to a `Run`."""

    @cache
    def train(recipe, **overrides):
        config = recipe(**overrides)
        return Run(config, tmp_path_factory.mktemp(recipe.__name__))

    return train


ONE_DEVICE_SCRIPT = f"""
import sys
from pathlib import Path
import hivit_jax
loaded = {{name.split(".")[0] for name in sys.modules}}
assert not loaded & {{*{OPTIONAL!r}, "orbax"}}, sorted(loaded)
recipe, workdir, *flags = sys.argv[1:]
if recipe == "mae":
    from hivit_jax.main import main
    assert main([*flags, f"--workdir={{workdir}}"]) == 0
else:
    import mini_runs
    from hivit_jax.train import train
    train(mini_runs.classifier(), workdir)
"""


def assert_close_losses(actual, expected, steps=8):
    """Check that two runs logged the same steps and close losses."""
    assert list(actual) == list(expected) == list(range(1, steps + 1))
    np.testing.assert_allclose([*actual.values()], [*expected.values()], rtol=1e-5)


@pytest.mark.processes
@pytest.mark.parametrize(
    "name", ["mae", pytest.param("classifier", marks=pytest.mark.extras)]
)
def test_trains_on_one_device_without_optional_packages(name, tmp_path, trained):
    """Losses on one device, without `OPTIONAL` packages, equal those of a mesh."""
    missing = mini_runs.block_imports(tmp_path / "missing", *OPTIONAL)
    workdir = tmp_path / "run"
    code, _, err = mini_runs.run_process(
        *("-c", ONE_DEVICE_SCRIPT, name, workdir, *mini_runs.arguments()),
        PYTHONPATH=f"{missing}:{mini_runs.ROOT / 'tests' / 'helpers'}",
    )
    assert code == 0, err
    run = trained(getattr(mini_runs, name), **EVERY_STEP if name == "mae" else {})
    assert_close_losses(mini_runs.logged(workdir), mini_runs.logged(run.workdir))
    assert not list(workdir.glob("events.*"))


@pytest.mark.extras
@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("mae", FSDP),
        ("mae", TENSOR),
        ("classifier", FSDP | dict(mesh__zero=1)),
    ],
    ids=["mae-fsdp", "mae-tensor", "classifier-zero1"],
)
def test_losses_do_not_depend_on_the_mesh(name, mesh, trained):
    """FSDP, ZeRO-1 and tensor parallelism have the losses of data parallelism."""
    recipe = getattr(mini_runs, name)
    reference_run = trained(recipe, **EVERY_STEP if name == "mae" else {})
    run = trained(recipe, **mesh)
    assert_close_losses(
        mini_runs.logged(run.workdir), mini_runs.logged(reference_run.workdir)
    )
    assert run.results == pytest.approx(reference_run.results, rel=1e-5)


@pytest.mark.extras
def test_accumulation_does_not_change_losses(trained):
    reference_run = trained(mini_runs.classifier)
    run = trained(mini_runs.classifier, optimizer__accumulate_steps=4, **TENSOR)
    assert_close_losses(
        mini_runs.logged(run.workdir), mini_runs.logged(reference_run.workdir)
    )


@pytest.mark.extras
def test_accumulation_all_reduces_gradients_once_per_step():
    """With accumulation, no loop of the compiled step contains an all-reduce."""
    config = mini_runs.classifier(optimizer__accumulate_steps=2, batch_size=32)
    mesh = sharding.make_mesh(config.mesh, 32, 2)
    schedule = make_schedule(config.optimizer, config.batch_size, 2, 8)
    program = compile_step(mini_runs.make_training(config, mesh, schedule))
    computations, name = set(), ""
    for line in program.as_text().splitlines():
        if line.endswith("{") and not line.startswith(" "):
            name = line.split()[0]
        if " all-reduce(" in line:
            computations.add(name)
    assert computations == {"ENTRY"}


@pytest.mark.extras
def test_losses_change_from_step_to_step(trained):
    """The losses that the tests above compare change from step to step."""
    for recipe, options in ((mini_runs.mae, EVERY_STEP), (mini_runs.classifier, {})):
        losses = list(mini_runs.logged(trained(recipe, **options).workdir).values())
        assert len(set(losses)) == 8
        assert max(losses) - min(losses) > 1e-2


def test_state_is_sharded_from_the_first_step(trained):
    run = trained(mini_runs.mae, **FSDP)
    for shards in run.shards:
        for name, leaf in run.initial.items():
            pieces = leaf.size // math.prod(shards[name])
            is_divisible = any(side % 4 == 0 for side in leaf.shape)
            assert pieces == (4 if leaf.size >= 2**13 and is_divisible else 1), name
    kernel = "encoder/stages/2/0/mlp/fc1/kernel"  # [64, 256]
    first, last = run.shards[0], run.shards[-1]
    for prefix in ("params", "opt_state/0/mu", "opt_state/0/nu"):
        # fsdp splits dimension 0 by 4. Dimension 1 belongs to tensor, which has size 1.
        assert first[f"{prefix}/{kernel}"] == last[f"{prefix}/{kernel}"] == (16, 256)


@pytest.mark.extras
def test_zero_1_shards_only_the_moments(trained):
    shards = trained(mini_runs.classifier, **FSDP, mesh__zero=1).shards[-1]
    kernel = "encoder/stages/2/0/mlp/fc1/kernel"  # [64, 256]
    assert shards[f"params/{kernel}"] == (64, 256)
    for moment in ("mu", "nu"):
        assert shards[f"opt_state/0/{moment}/{kernel}"] == (16, 256)


@pytest.mark.extras
def test_tensor_axis_splits_heads_and_hidden_units(trained):
    shards = trained(mini_runs.mae, **TENSOR).shards[-1]
    block = "params/encoder/stages/2/0"
    assert shards[f"{block}/attn/qkv/kernel"] == (16, 3, 1, 32)  # of [64, 3, 2, 32]
    assert shards[f"{block}/attn/qkv/bias"] == (3, 1, 32)
    # [64, 64] is too small for the fsdp axis.
    assert shards[f"{block}/attn/proj/kernel"] == (32, 64)
    assert shards[f"{block}/mlp/fc1/kernel"] == (16, 128)  # of [64, 256]
    assert shards[f"{block}/mlp/fc2/kernel"] == (128, 16)  # of [256, 64]


# Checkpoints


def test_load_pretrained_reads_workdirs_and_checkpoints(trained):
    workdir = trained(mini_runs.mae, **EVERY_STEP).workdir
    model = hivit_jax.load_pretrained(workdir)
    assert (model.config.embed_dim, model.config.norm_pix_loss) == (64, True)
    loaded = jax.device_get(named_leaves(split(model)[1]))
    mini_runs.assert_identical(loaded, mini_runs.saved_variables(workdir, 8))
    model = hivit_jax.load_pretrained(workdir / "checkpoints" / "3")
    loaded = jax.device_get(named_leaves(split(model)[1]))
    mini_runs.assert_identical(loaded, mini_runs.saved_variables(workdir, 3))


def test_divergence_saves_the_state_before_it(trained, tmp_path, monkeypatch):
    """The loss of step 5 is NaN; step 6 raises the error; step 4 is saved."""

    def poisoned(config, first, last):
        for index, batch in enumerate(train_batches(config, first, last), first):
            # Index 4 is the batch of step 5.
            weight = batch["weight"] * (np.nan if index == 4 else 1)
            yield batch | {"weight": weight.astype(np.float32)}

    train_batches = inputs.train_batches
    monkeypatch.setattr(inputs, "train_batches", poisoned)
    config = mini_runs.mae(log_every=6, checkpoint_every=3)
    with pytest.raises(DivergedError, match="^step 5: loss nan.*\n.*of step 4, is sav"):
        train_module.train(config, tmp_path)
    steps = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
    assert steps == {3, 4}
    reference_run = trained(mini_runs.mae, **EVERY_STEP)
    for step in steps:
        items = mini_runs.saved_arrays(tmp_path, step)
        mini_runs.assert_identical(
            items, mini_runs.saved_arrays(reference_run.workdir, step)
        )
        assert all(np.isfinite(a).all() for a in jax.tree.leaves(items))


def test_computed_steps_are_saved_before_a_data_error(tmp_path, monkeypatch):
    """All computed steps are logged; the last one is also evaluated and saved."""

    def failing(config, first, last):
        for index, batch in enumerate(original_batches(config, first, last)):
            if index == 5:  # steps 1 to 3 are computed; two more batches are prefetched
                raise DataError("no answer")
            yield batch

    original_batches = inputs.train_batches
    monkeypatch.setattr(inputs, "train_batches", failing)
    with pytest.raises(DataError, match="no answer"):
        train_module.train(mini_runs.mae(eval_every=3, checkpoint_every=3), tmp_path)
    assert list(mini_runs.logged(tmp_path)) == [1, 2, 3]
    assert list(mini_runs.logged(tmp_path, "eval/loss")) == [3]
    assert mini_runs.saved_steps(tmp_path) == [3]


def test_unreadable_images_do_not_affect_training(tmp_path, monkeypatch):
    """Runs with different pixels in unreadable images have equal losses and states.

    Unreadable images are counted, and too many of them stop the run.
    """

    def spoiled(config, first, last):
        for batch in train_batches(config, first, last):
            is_unreadable = np.isin(np.arange(16), (3, 12))
            batch["image"][is_unreadable] = fill
            weight = batch["weight"] * ~is_unreadable
            yield batch | {
                "weight": weight,
                "unreadable": is_unreadable.astype(np.float32),
            }

    train_batches = inputs.train_batches
    monkeypatch.setattr(inputs, "train_batches", spoiled)
    for fill in (0, 200):
        config = mini_runs.mae(data__max_unreadable=0.1)
        with pytest.raises(DataError, match="8 images .* 12.50% of .* allows 10.00%"):
            train_module.train(config, tmp_path / str(fill))
    black, bright = tmp_path / "0", tmp_path / "200"
    # The count includes prefetched batches, so that the run may end before step 4.
    last = mini_runs.saved_steps(black)[-1]
    assert 1 <= last <= 4
    assert mini_runs.logged(black, "unreadable") == dict.fromkeys(range(1, last + 1), 2)
    assert mini_runs.logged(black) == mini_runs.logged(bright)
    mini_runs.assert_identical(
        mini_runs.saved_arrays(black, last), mini_runs.saved_arrays(bright, last)
    )


@pytest.mark.extras
def test_classifier_starts_from_the_pretrained_encoder(trained):
    pretrained = trained(mini_runs.mae, **EVERY_STEP).workdir
    run = trained(mini_runs.classifier, init_from=str(pretrained))
    initial = run.initial_params()
    fresh = trained(mini_runs.classifier).initial_params()
    expected = mini_runs.saved_arrays(pretrained, 8)["params"]
    for name, array in initial.items():
        if name.endswith("relative_position_bias_table"):
            assert not array.any()
        elif name.startswith("encoder/"):
            np.testing.assert_array_equal(array, expected[name])
            assert (array != fresh[name]).any(), name
    assert {k for k in expected if k.startswith("encoder/")} <= initial.keys()
    assert initial["head/kernel"].std() == pytest.approx(2e-5, rel=0.15)
    assert fresh["head/kernel"].std() == pytest.approx(0.02, rel=0.15)
    assert not initial["head/bias"].any()
    assert (initial["fc_norm/scale"] == 1).all()


@pytest.mark.extras
def test_pretraining_starts_from_a_pretrained_run(trained):
    """With init_from, all parameters and averages start at the pretrained parameters.

    The step count starts at 0.
    """
    pretrained = trained(mini_runs.mae, **EVERY_STEP).workdir
    run = trained(mini_runs.mae, init_from=str(pretrained), **AVERAGED)
    expected = mini_runs.saved_arrays(pretrained, 8)["params"]
    mini_runs.assert_identical(run.initial_params(), expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(run.initial[f"ema/{name}"], array)
    assert run.initial["step"] == 0


@pytest.mark.parametrize("recipe", [mini_runs.mae, mini_runs.classifier])
def test_pretrained_model_of_another_width_is_refused(recipe, trained, tmp_path):
    pretrained = trained(mini_runs.mae, **EVERY_STEP).workdir
    config = recipe(init_from=str(pretrained), model__embed_dim=32)
    with pytest.raises(ConfigError, match=r"different model: .* shape .*; expected"):
        train_module.train(config, tmp_path)


# Evaluation


def mesh_of(devices):
    """Return a mesh of these devices along the data axis."""
    shape = (1, len(devices), 1, 1)
    types = (AxisType.Auto,) * 4
    return jax.make_mesh(shape, sharding.AXES, axis_types=types, devices=devices)


@pytest.mark.parametrize("recipe", [mini_runs.mae, mini_runs.classifier])
def test_evaluation_counts_every_image_once(recipe):
    """Evaluating 360 images in batches of 128 gives the results of batches of 72.

    The last batch of 128 is padded.
    """
    config = recipe("digits")
    graphdef, params, model_state = split_params(
        inputs.task_of_recipe(config).build_model()
    )
    variables = {"params": params, "model_state": model_state, "frozen": {}}
    results = []
    for batch_size, devices in ((128, 8), (72, 1)):
        config.batch_size = batch_size
        task = inputs.make_task(config)
        mesh = mesh_of(jax.devices()[:devices])
        eval_step = evaluate.make_eval_step(config, task, graphdef, mesh)
        shardings = sharding.state_shardings(mesh, variables)
        sharded = jax.device_put(variables, shardings)
        results.append(evaluate.evaluate(config, task, eval_step, sharded, mesh))
    assert results[0]["eval/count"] == 360
    assert results[1] == pytest.approx(results[0], rel=1e-6)


@pytest.mark.extras
def test_resuming_with_first_epoch_1_skips_an_epoch(tmp_path):
    """A run resumed after 2 steps skips an epoch of 4 steps."""
    config = mini_runs.mae(optimizer__first_epoch=1)
    requests = iter([None, None, "stop"])
    with pytest.raises(Interrupted, match="step 2 of 8"):
        train_module.train(config, tmp_path, lambda step: next(requests))
    train_module.train(config, tmp_path)
    logged = mini_runs.logged(tmp_path, "learning_rate")
    assert list(logged) == [1, 2, 7, 8]
    schedule = make_schedule(config.optimizer, config.batch_size, 4.0, 8)
    assert_allclose([logged[7], logged[8]], [schedule(6), schedule(7)], rtol=1e-6)
    state = mini_runs.saved_arrays(tmp_path, 8)["optimizer"]
    counts = {int(v) for name, v in state.items() if name.endswith("count")}
    assert counts == {4, 8}  # Adam's bias correction counts 4 steps, the schedule 8
