"""Tests of averaged weights (EMA), and of flipped bits in checkpoints.

All tests share one linear probe, whose train step compiles quickly. The encoder is
frozen, so that numpy can compute any evaluation from the features of the test split.
"""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import mini_runs
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from networks import jit_model, mini
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import load_file

import hivit_jax
from hivit_jax import config as configs
from hivit_jax import inputs
from hivit_jax.checkpoints import read
from hivit_jax.errors import CheckpointError, Interrupted
from hivit_jax.main import main
from hivit_jax.reporting import metrics
from hivit_jax.tools import convert, export, reconstruct
from hivit_jax.train import train
from hivit_jax.tree import named_leaves, split

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("minimal_output", "single_device"),
]


STEPS, DECAY = 4, 0.9


# Sizes of the network, which override those of the recipe `linear`
SIZES = dict(
    image_size=(32, 64), embed_dim=32, depths=(1, 1), inner_patches=2, num_heads=2
)


# All arguments of the network except num_classes; the last two are as in the recipe
# `linear`
NETWORK = SIZES | dict(relative_position=False, running_norm=True)


def flags(**overrides):
    """Return the command line of the probe.

    The 64 test images do not fill the last batch of 24 images.
    """
    values = {
        k: v
        for k, v in mini_runs.SOURCES["synthetic"].items()
        if not k.startswith(("model.decoder", "optimizer."))
    }
    values |= {f"model.{key}": value for key, value in SIZES.items()}
    values |= {
        "model.num_classes": 10,
        "batch_size": 24,
        "total_steps": STEPS,
        "checkpoint_every": 1,
        "eval_every": 2,
        "keep_checkpoints": 9,
        "optimizer.base_learning_rate": 2000.0,
        "optimizer.warmup_epochs": 0.0,
        "optimizer.ema_decay": DECAY,
        "init_from": "",
        "seed": 8,  # top-1 falls from step 2 to step 4
    }
    values |= {key.replace("__", "."): value for key, value in overrides.items()}
    return ["--config=linear", *(f"--config.{k}={v}" for k, v in values.items())]


def probe(**overrides):
    """Return the config of the probe."""
    path, *rest = flags(**overrides)
    return configs.load(path.removeprefix("--config="), rest)


@pytest.fixture(scope="module")
def pretrained_directory(tmp_path_factory):
    """Return the directory of a saved model with a head and running statistics."""
    directory = tmp_path_factory.mktemp("shared")
    hivit_jax.save_pretrained(mini("hivit_base", **NETWORK), directory)
    return directory


@pytest.fixture(scope="module")
def interrupted(pretrained_directory, tmp_path_factory):
    """Return the workdir of a probe that was interrupted before the first step."""
    workdir, config = (
        tmp_path_factory.mktemp("interrupted"),
        probe(init_from=pretrained_directory),
    )
    with pytest.raises(Interrupted):
        train(config, workdir, lambda step: "stop")
    return workdir


@pytest.fixture(scope="module")
def run(interrupted, tmp_path_factory):
    """Return the workdir of the finished probe.

    The first checkpoint has no averages, as if averaging had been enabled later.
    """
    workdir = tmp_path_factory.mktemp("run")
    shutil.copytree(interrupted, workdir, dirs_exist_ok=True)
    shutil.rmtree(workdir / "checkpoints" / "0" / "ema")
    train(probe(), workdir)
    return workdir


@pytest.fixture(scope="module")
def checkpoints(run):
    """Return {step: {item: {name: array}}} of all checkpoints."""
    return {step: mini_runs.saved_arrays(run, step) for step in range(STEPS + 1)}


def averaged_variables(items):
    """Return {name: averaged parameter or statistic} of a checkpoint."""
    return items["ema"] | items["model_state"]


@pytest.fixture(scope="module")
def evaluate_in_numpy(checkpoints):
    """Return a function that computes (loss, top-1, top-5) of the test split.

    Its argument is {name: parameter or statistic}. The function computes the head in
    numpy, from the features of the frozen encoder.
    """
    batches = list(inputs.eval_batches(probe()))
    pixels, labels, weight = (
        np.concatenate([batch[name] for batch in batches])
        for name in ("image", "label", "weight")
    )
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    network = hivit_jax.create_model("hivit_base", num_classes=10, **NETWORK)
    graphdef, params = split(network)
    initial = checkpoints[0]["params"] | checkpoints[0]["model_state"]
    params = jax.tree_util.tree_map_with_path(
        lambda path, _: jnp.asarray(
            initial[jax.tree_util.keystr(path, simple=True, separator="/")]
        ),
        params,
    )
    encode = jit_model(nnx.merge(graphdef, params), lambda m, x: m.encoder(x)[-1])
    images = (pixels[weight > 0] / np.float32(255) - mean) / std
    features = np.asarray(encode(images), np.float64).mean(1)
    labels = labels[weight > 0]
    assert len(features) == 64

    def evaluate(variables):
        normalized = features - variables["fc_norm/mean"]
        normalized /= np.sqrt(variables["fc_norm/var"] + 1e-6)
        logits = normalized @ variables["head/kernel"] + variables["head/bias"]
        true_logits = logits[np.arange(64), labels]
        loss = np.log(np.exp(logits - true_logits[:, None]).sum(1)).mean()
        rank = (logits > true_logits[:, None]).sum(1)
        return loss, (rank < 1).mean(), (rank < 5).mean()

    return evaluate


# Checkpoints of a run


def test_linear_probe_starts_with_a_new_head(pretrained_directory, interrupted):
    """Only the encoder is loaded. Head and statistics are newly initialized.

    The standard deviation of the new kernel is 0.01, as in MAE.
    """
    state = mini_runs.saved_arrays(interrupted, 0)
    mini_runs.assert_identical(state["ema"], state["params"])
    params = state["params"] | state["model_state"]
    saved = load_file(pretrained_directory / "model.safetensors")
    assert_array_equal(
        params["encoder/absolute_pos_embed"], saved["absolute_pos_embed"][0]
    )
    kernel = "blocks.3.mlp.fc1.weight"
    assert_array_equal(params["encoder/stages/1/0/mlp/fc1/kernel"], saved[kernel].T)
    assert params["head/kernel"].std() == pytest.approx(0.01, rel=0.1)
    correlation = np.corrcoef(params["head/kernel"].flat, saved["head.weight"].T.flat)
    assert abs(correlation[0, 1]) < 0.3
    assert saved["head.bias"].any()
    assert not params["head/bias"].any()
    assert saved["fc_norm.mean"].any()
    assert not params["fc_norm/mean"].any()
    assert (params["fc_norm/var"] == 1).all()


def test_each_step_updates_the_average(checkpoints):
    """From step 1 on, the average is updated with a tenth of each step's parameters."""
    assert "ema" not in checkpoints[0]
    average = checkpoints[0]["params"]
    for step in range(1, STEPS + 1):
        params = checkpoints[step]["params"]
        average = {k: DECAY * average[k] + (1 - DECAY) * params[k] for k in params}
        assert checkpoints[step]["ema"].keys() == params.keys()
        for name, array in checkpoints[step]["ema"].items():
            assert_allclose(array, average[name], rtol=2e-6, atol=1e-7, err_msg=name)
    distance = np.abs(
        checkpoints[STEPS]["params"]["head/kernel"] - average["head/kernel"]
    )
    # For at least one weight, the difference exceeds half the initial standard
    # deviation of the head's kernel, 0.01.
    assert distance.max() > 0.005


def test_training_evaluates_the_average(run, checkpoints, evaluate_in_numpy):
    lines = [
        line for line in metrics.read(run / "metrics.jsonl") if "eval/loss" in line
    ]
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        items = checkpoints[line["step"]]
        with_average = evaluate_in_numpy(averaged_variables(items))
        with_params = evaluate_in_numpy(items["params"] | items["model_state"])
        logged = [line[f"eval/{name}"] for name in ("loss", "top1", "top5")]
        assert_allclose(logged, with_average, rtol=1e-4)
        assert abs(with_params[0] - with_average[0]) > 0.02


def test_best_evaluated_checkpoint_is_kept(interrupted, checkpoints, tmp_path, capsys):
    """With keep_checkpoints=1, a run keeps its newest and its best checkpoint.

    Step 3 was not evaluated and does not inherit the score of step 2. The last
    checkpoint equals that of the fixture `run`, which restored step 0 without averages.
    """
    shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
    train(probe(keep_checkpoints=1), tmp_path)
    top1 = mini_runs.logged(tmp_path, "eval/top1")
    assert list(top1) == [2, 4]
    # Top-1 must fall by at least two of 64 images. If this fails, choose another seed.
    assert top1[2] > top1[4] + 1.5 / 64
    assert mini_runs.saved_steps(tmp_path) == [2, 4]
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("best checkpoint  step 2 ")
    assert f"top1 {100 * top1[2]:.2f} %" in last
    mini_runs.assert_identical(mini_runs.saved_arrays(tmp_path, 4), checkpoints[4])


# Commands that read a checkpoint


@pytest.mark.parametrize(("subdirectory", "step"), [("", 4), ("checkpoints/2", 2)])
def test_eval_mode_evaluates_the_average(
    subdirectory, step, run, checkpoints, evaluate_in_numpy, tmp_path, capsys
):
    """``--mode eval`` reads --checkpoint, by default the newest in the workdir."""
    arguments = [*flags(), "--mode=eval", f"--workdir={run}"]
    if subdirectory:
        arguments[-1] = f"--workdir={tmp_path}"
        arguments += [f"--checkpoint={run / subdirectory}"]
    capsys.readouterr()
    assert main(arguments) == 0
    out = capsys.readouterr().out
    loss, top1, top5 = evaluate_in_numpy(averaged_variables(checkpoints[step]))
    match = re.search(
        rf"^step {step}  eval  loss (\S+)  top1 (\S+) %  top5 (\S+) %  \(64 im",
        out,
        re.M,
    )
    assert float(match[1]) == pytest.approx(loss, abs=2e-4)
    assert float(match[2]) == pytest.approx(100 * top1, abs=0.01)
    assert float(match[3]) == pytest.approx(100 * top5, abs=0.01)


@pytest.fixture(scope="module")
def damaged(run, tmp_path_factory):
    """Return {item: workdir with only step 4, in which one bit of the item is flipped}.

    Orbax itself saved the flipped bit, so that only digests can detect it.
    """
    workdirs = {}
    for item in ("params", "model_state", "ema", "optimizer"):
        workdirs[item] = tmp_path_factory.mktemp(item)
        shutil.copytree(run / "checkpoints" / "4", workdirs[item] / "checkpoints" / "4")
        path = read.absolute(workdirs[item]) / "checkpoints" / "4" / item
        tree = read.load_item(path)
        leaves, structure = jax.tree.flatten(tree)
        leaves = [np.array(leaf) for leaf in leaves]
        largest = max(leaves, key=lambda leaf: leaf.nbytes)
        largest.reshape(-1).view(np.uint32)[-1] ^= 1
        with ocp.StandardCheckpointer() as writer:
            writer.save(path, jax.tree.unflatten(structure, leaves), force=True)
    return workdirs


def commands(workdir, tmp_path):
    """Return {name: function that runs a command and returns its exit code}."""
    workdir_flags = ["--workdir", str(tmp_path / "new")]
    step = workdir / "checkpoints" / "4"
    out = ["--out", str(tmp_path / "out")]
    return {
        "eval": lambda: main([*flags(), "--mode=eval", f"--workdir={workdir}"]),
        "eval of a checkpoint": lambda: main(
            [*flags(), f"--checkpoint={step}", "--mode=eval", *workdir_flags]
        ),
        "knn": lambda: main([*flags(init_from=workdir), "--mode=knn"]),
        "init_from": lambda: main([*flags(init_from=step), *workdir_flags]),
        "convert": lambda: convert.main([str(step), str(tmp_path / "x.safetensors")]),
        "inspect": lambda: convert.main(["--inspect", str(workdir)]),
        "export": lambda: export.main(["--checkpoint", str(workdir), *out]),
        "reconstruct": lambda: reconstruct.main(
            ["--checkpoint", str(workdir), str(tmp_path / "x.png")]
        ),
    }


COMMANDS = list(commands(mini_runs.ROOT, mini_runs.ROOT))


@pytest.mark.parametrize("command", COMMANDS)
def test_command_detects_a_flipped_bit_of_the_average(
    command, damaged, tmp_path, capsys
):
    assert commands(damaged["ema"], tmp_path)[command]() == 5
    err = capsys.readouterr().err
    assert re.search(r"checkpoints/4 is damaged: 1 of \d+ arrays of ema do not", err)
    assert len(err.splitlines()) <= 3


@pytest.mark.parametrize("item", ["params", "model_state", "ema", "optimizer"])
def test_resuming_detects_a_flipped_bit_of_any_item(item, damaged):
    with pytest.raises(CheckpointError, match=f"1 of .* arrays of {item} do not"):
        train(probe(), damaged[item])
    assert mini_runs.saved_steps(damaged[item]) == [4]


@pytest.mark.parametrize(
    ("item", "other", "step", "options"),
    [("ema", "params", 2, []), ("params", "ema", 3, ["--plain"])],
)
def test_only_the_requested_weights_are_read(
    item, other, step, options, run, damaged, checkpoints, tmp_path
):
    """`load_pretrained` and `convert` verify only the weights that they read."""
    averaged = item == "ema"
    with pytest.raises(CheckpointError, match=f"1 of .* arrays of {item} do not"):
        hivit_jax.load_pretrained(damaged[item], averaged=averaged)
    loaded = hivit_jax.load_pretrained(damaged[other], averaged=averaged)
    arrays = jax.device_get(named_leaves(split(loaded)[1]))
    expected = checkpoints[4][item] | checkpoints[4]["model_state"]
    mini_runs.assert_identical(arrays, {name: expected[name] for name in arrays})

    target = tmp_path / "converted"
    assert convert.main([str(damaged[item]), str(target), *options]) == 5
    source = run / "checkpoints" / str(step)
    assert convert.main([str(source), str(target), *options]) == 0
    head = load_file(target / "model.safetensors")["head.weight"]
    assert_array_equal(head, checkpoints[step][item]["head/kernel"].T)
    saved_config = json.loads((target / "config.json").read_text())
    assert saved_config["recipe"]["optimizer"]["ema_decay"] == DECAY
    assert saved_config["results"].get("eval/loss") == mini_runs.logged(
        run, "eval/loss"
    ).get(step)
    text = convert.inspect(source, averaged=averaged)
    assert f"checkpoint of hivit_jax, {item}\n" in text
