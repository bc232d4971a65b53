"""The command line: what a user can get wrong, and what they are told."""

import configparser
import os
import re
import shutil
import signal

import numpy as np
import pytest
import recipes
from flax import nnx
from matplotlib.axes import Axes
from PIL import Image

from hivit_jax import config as configs
from hivit_jax import inputs, tasks
from hivit_jax import recipes as recipes_by_name
from hivit_jax.data.order import permutation
from hivit_jax.data.sources import digits
from hivit_jax.errors import ConfigError
from hivit_jax.main import MODES, main

MINI = recipes.arguments()  # --config and overrides of a recipe that works


@pytest.fixture(autouse=True)
def restored_signals():
    handlers = {number: signal.getsignal(number) for number in (2, 15)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def check_message(err, fragments):
    assert 1 <= len(err.splitlines()) <= 3
    assert err.startswith("error: ")
    for fragment in fragments:
        assert fragment in err


# Override -> what the message must contain: the culprit, and what was expected.
BAD_OVERRIDES = [
    (["optimizer.warmup_epoch=3"], ["'optimizer.warmup_epoch'", "warmup_epochs'?"]),
    (["model.embed_dims=64"], ["'model.embed_dims'", "'model.embed_dim'?"]),
    (["optimizer=3"], ["unknown config key 'optimizer'"]),
    (["xyz.abc=3"], ["unknown config key 'xyz.abc'", "known: ", "batch_size"]),
    (["batch_size=abc"], ["config.batch_size='abc'", "an integer"]),
    (["batch_size=1.5"], ["config.batch_size='1.5'", "an integer"]),
    (["mask_ratio=high"], ["config.mask_ratio='high'", "a number"]),
    (["data.flip=maybe"], ["config.data.flip='maybe'", "true or false"]),
    (["model.depths=3"], ["config.model.depths='3'", "a tuple"]),
    (["model.drop_path_rate=(1,"], ["config.model.drop_path_rate", "a number"]),
    (["model.image_size=60"], ["image_size=60", "patch_size=16"]),
    (["model.image_size=0"], ["image_size=0", "patch_size=16"]),
    (["model.patch_size=0"], ["patch_size=0"]),
    (["model.inner_patches=8"], ["inner_patches=8", "depths=(1, 1, 2)"]),
    (["model.embed_dim=0"], ["embed_dim=0"]),
    (["model.dtype=float8"], ["dtype='float8'", "bfloat16"]),
    (["model.drop_path_rate=1.0"], ["drop_path_rate=1.0"]),
    (["mask_ratio=0"], ["mask_ratio=0.0", "0 < mask_ratio < 1"]),
    (["mask_ratio=1"], ["mask_ratio=1.0", "0 < mask_ratio < 1"]),
    (["mask_ratio=1.5"], ["mask_ratio=1.5", "0 < mask_ratio < 1"]),
    (["mask_ratio=0.95"], ["mask_ratio=0.95", "none of 16 units", "0.9375"]),
    (["batch_size=12"], ["batch_size=12", "8 devices"]),
    (["batch_size=0"], ["batch_size=0", "at least 1"]),
    (["optimizer.accumulate_steps=4"], ["batch_size=16", "accumulate_steps=4"]),
    (["optimizer.accumulate_steps=0"], ["accumulate_steps=0", "at least 1"]),
    (["optimizer.betas=(0.9,)"], ["optimizer.betas=(0.9,)", "2 numbers"]),
    (["log_every=0"], ["log_every=0", "at least 1"]),
    (["eval_every=0"], ["eval_every=0", "at least 1"]),
    (["checkpoint_every=-5"], ["checkpoint_every=-5", "at least 1"]),
    (["keep_checkpoints=0"], ["keep_checkpoints=0", "at least 1"]),
    (["seed=-1"], ["seed=-1", "at least 0"]),
    (["total_steps=0", "total_epochs=0"], ["total_steps=0", "total_epochs=0"]),
    (["mesh.data=3"], ["mesh=", "'data': 3", "8 devices"]),
    (["mesh.tensor=16"], ["mesh=", "'tensor': 16", "8 devices"]),
    (["mesh.fsdp=-1"], ["mesh=", "'fsdp': -1", "at most one of them -1"]),
    (["model.num_heads=3"], ["num_heads=3", "embed_dim=64", "multiple"]),
    (["model.decoder_num_heads=3"], ["decoder_num_heads=3", "decoder_embed_dim=32"]),
    (["model.name=mae_hivit_bse"], ["'mae_hivit_bse'", "'mae_hivit_base'?"]),
    (["task=classification"], ["'classification'", "'classify'?"]),
    (["task=classify"], ["task='classify'", "expected a Classifier"]),
    (["label_smoothing=0.1"], ["unknown config key 'label_smoothing'"]),
    (["optimizer.gamma=0.5"], ["gamma=0.5", "optimizer.schedule='cosine'", "0.1"]),
    (["optimizer.schedule=cosin"], ["schedule='cosin'", "'cosine'", "'multistep'"]),
    (["optimizer.first_epoch=2"], ["first_epoch=2", "0 or 1"]),
    (["optimizer.lr_batch=100"], ["lr_batch=100", "256 or 512 or 0"]),
    (["optimizer.clip_norm=-1"], ["clip_norm=-1.0", "at least 0"]),
    (
        ["model.name=hivit_base"],
        ["task='mae'", "'hivit_base'", "expected a MaskedAutoencoder"],
    ),
    (["data.name=digit"], ["data.name 'digit'", "'digits'?"]),
    (["data.train_examples=-1"], ["data.train_examples=-1", "at least 0"]),
    (["data.mean=(0.5,0.5)"], ["data.mean=(0.5, 0.5)", "model.in_channels=3"]),
]


@pytest.mark.parametrize(("overrides", "fragments"), BAD_OVERRIDES)
def test_bad_override(overrides, fragments, tmp_path, capsys):
    flags = [f"--config.{override}" for override in overrides]
    assert main([*MINI, *flags, f"--workdir={tmp_path / 'run'}"]) == 2
    check_message(capsys.readouterr().err, fragments)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("overrides", "micro"),
    [
        ("batch_size=25 mixup=0.8", 25),
        ("batch_size=25 cutmix=1.0", 25),
        ("batch_size=24 mixup=0.8 cutmix=1.0 optimizer.accumulate_steps=8", 3),
        ("batch_size=24 mixup=0.8 optimizer.accumulate_steps=4", None),
        ("batch_size=25", None),
    ],
)
def test_pairs_are_mixed_in_even_batches_alone(overrides, micro):
    recipe = str(recipes.ROOT / "configs" / "digits_finetune.py")
    flags = [f"--config.{override}" for override in overrides.split()]
    if micro is None:
        assert configs.load(recipe, flags).batch_size in (24, 25)
        return
    with pytest.raises(ConfigError, match=f"steps is {micro}, expected an even number"):
        configs.load(recipe, flags)


def test_masked_autoencoder_does_not_classify(tmp_path, capsys):
    config = f"--config={recipes.ROOT / 'configs' / 'digits_finetune.py'}"
    name = "--config.model.name=mae_hivit_tiny"
    assert main([config, name, f"--workdir={tmp_path}"]) == 2
    check_message(
        capsys.readouterr().err, ["'mae_hivit_tiny'", "expected a Classifier"]
    )


@pytest.mark.parametrize(
    ("argv", "fragments"),
    [
        (["--workdir=x"], ["--config"]),
        (["--config=configs/mae_bas.py", "--workdir=x"], ["mae_bas.py", "no such"]),
        (["--config=mae_bas", "--workdir=x"], ["'mae_bas'", "'mae_base'?"]),
        (["--config=./README.md", "--workdir=x"], ["README.md", "a Python file"]),
        ([*MINI, "--workdir=x", "--topology=v5e:2x4"], ["--topology", "=compile"]),
        ([*MINI, "--workdir=x", "--checkpoint=y"], ["--checkpoint", "--mode=eval"]),
        (
            [*MINI, "--workdir=x", "--mode=eval", "--search_batch"],
            ["--search_batch", "--mode=compile"],
        ),
        (MINI, ["--workdir"]),
        ([*MINI, "--mode=eval"], ["--mode=eval", "--workdir"]),
        ([*MINI, "--workdir=x", "--mode=tain"], ["--mode", "'tain'", "describe"]),
        ([*MINI, "--workdri=x"], ["--workdir"]),
        ([*MINI, "--workdir=x", "--modee=eval"], ["'--modee=eval'", "--config.KEY"]),
        ([*MINI, "--workdir=x", "batch_size=16"], ["'batch_size=16'", "--config.KEY"]),
        ([*MINI, "--workdir=x", "--config.batch_size"], ["--config.KEY=VALUE"]),
    ],
)
def test_bad_flag(argv, fragments, capsys, monkeypatch, tmp_path):
    (tmp_path / "README.md").write_text("# not a recipe\n")
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    check_message(capsys.readouterr().err, fragments)
    assert os.listdir(tmp_path) == ["README.md"]


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("raise RuntimeError('xyz')", "RuntimeError: xyz"),
        ("def get_config(:", "SyntaxError"),
        ("x = 1", "get_config"),
        ("def get_config():\n  return 1", "a dict or ConfigDict"),
        (
            "from ml_collections import ConfigDict\n"
            "def get_config():\n  return ConfigDict({'seed': 1})",
            "config.task is missing",
        ),
    ],
)
def test_bad_recipe(text, fragment, capsys, tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text(text)
    assert main([f"--config={path}", f"--workdir={tmp_path}"]) == 2
    check_message(capsys.readouterr().err, [str(path), fragment])


def test_workdir_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").touch()
    for workdir in (tmp_path / "file" / "sub", tmp_path / "file"):
        assert main([*MINI, f"--workdir={workdir}"]) == 2
        check_message(capsys.readouterr().err, [f"workdir {workdir}", "written"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Workdir of a run of one step."""
    workdir = tmp_path_factory.mktemp("finished")
    with recipes.quick():
        assert main([*MINI, f"--workdir={workdir}", "--config.total_steps=1"]) == 0
    return workdir


def test_checkpoint_of_another_model(finished, tmp_path, capsys):
    """In the workdir, as init_from, for evaluation."""
    before = (finished / "config.json").read_text()
    for flags in (
        [f"--workdir={finished}"],
        [f"--workdir={tmp_path}", f"--config.init_from={finished}"],
        [f"--workdir={finished}", "--mode=eval"],
        [f"--workdir={tmp_path}", f"--checkpoint={finished}", "--mode=eval"],
    ):
        assert main([*MINI, *flags, "--config.model.embed_dim=32"]) == 2
        err = capsys.readouterr().err
        check_message(err, [str(finished), "different model", "expect"])
    assert (finished / "config.json").read_text() == before


def test_no_checkpoint(finished, tmp_path, capsys):
    empty, nowhere = tmp_path / "empty", tmp_path / "nowhere"
    empty.mkdir()
    for flags, place in (
        ([f"--workdir={empty}", "--mode=eval"], empty),
        ([f"--workdir={nowhere}", "--mode=eval"], nowhere),
        (
            [f"--workdir={finished}", f"--checkpoint={nowhere}", "--mode=eval"],
            nowhere,
        ),
        ([f"--workdir={tmp_path / 'x'}", f"--config.init_from={nowhere}"], nowhere),
        ([f"--workdir={tmp_path / 'x'}", f"--config.init_from={empty}"], empty),
    ):
        assert main([*MINI, *flags]) == 5
        check_message(capsys.readouterr().err, ["no checkpoint", str(place)])
    assert not nowhere.exists()


def test_eval_mode(finished, capsys):
    """Gives what the run itself found, from the workdir or from a path."""
    step = finished / "checkpoints" / "1"
    for flags in ([], [f"--checkpoint={step}"]):
        assert main([*MINI, f"--workdir={finished}", "--mode=eval", *flags]) == 0
        loss = recipes.lines(finished, "eval/loss")[1]
        count = recipes.lines(finished, "eval/count")[1]
        out = capsys.readouterr().out
        assert f"step 1  eval  loss {loss:.4f}  ({count} images)" in out


def describe(*overrides):
    config = f"--config={recipes.ROOT / 'configs' / 'mae_base.py'}"
    return main([config, "--mode=describe", *overrides])


def test_describe_and_overrides(capsys):
    assert describe("--config.model.decoder_depth=8") == 0
    assert "93.3459 M" in capsys.readouterr().out
    assert describe("--config.model.depths=[2,2,24]", "--config.mask_ratio=1") == 2
    check_message(capsys.readouterr().err, ["mask_ratio=1.0"])


def test_real_process_describes_without_tensorflow():
    program = (
        "import sys\n"
        "from hivit_jax.main import main\n"
        "code = main(sys.argv[1:])\n"
        "assert 'tensorflow' not in sys.modules\n"
        "sys.exit(code)"
    )
    flags = [f"--config={recipes.ROOT}/configs/mae_base.py", "--mode=describe"]
    code, out, err = recipes.run("-c", program, *flags)
    assert (code, err) == (0, "")
    assert "= 87.04" in out
    assert " M" in out
    assert '"base_learning_rate": 0.0001' in out


@pytest.mark.parametrize(
    ("flags", "exit_code", "fragments"),
    [
        (["--config.batch_size=12"], 2, ["batch_size=12", "8 devices"]),
        (["--mode=eval"], 5, ["no checkpoint"]),
    ],
)
def test_errors_of_a_real_process(flags, exit_code, fragments, tmp_path):
    arguments = ["-m", "hivit_jax.main", *MINI, f"--workdir={tmp_path}", *flags]
    code, _, err = recipes.run(*arguments, devices=8)
    assert code == exit_code
    check_message(err, fragments)


def test_variant_of_a_recipe(capsys):
    arguments = ["--mode=describe", "--config.data.randaugment=false"]
    path = recipes.ROOT / "configs" / "finetune.py"
    for recipe in ("finetune:large", f"{path}:large"):
        assert main([f"--config={recipe}", *arguments]) == 0
        out = capsys.readouterr().out
        assert '"name": "hivit_large"' in out
        assert f"changes to {recipe}: \n  data.randaugment: True -> False\n" in out
    assert main(["--config=supervised:huge", *arguments]) == 2
    check_message(capsys.readouterr().err, ["supervised:huge", "'huge'"])
    assert main(["--config=mae_base:384", *arguments]) == 2
    check_message(capsys.readouterr().err, ["mae_base:384", "get_config()"])


def test_values_of_a_recipe_are_checked(tmp_path, capsys):
    """By the names of keys, as those of the command line are."""
    path = tmp_path / "own.py"
    for values, fragments in (
        ("model=dict(embed_dims=64)", ["'model.embed_dims'", "'model.embed_dim'?"]),
        ("optimizer=3", ["unknown config key 'optimizer'"]),
        ("batch_size=1.5", ["config.batch_size=1.5", "an integer"]),
        ("seed=True", ["config.seed=True", "an integer"]),
        ("data=dict(flip=1)", ["config.data.flip=1", "true or false"]),
    ):
        path.write_text(f"def get_config():\n  return dict(task='mae', {values})\n")
        assert main([f"--config={path}", "--mode=describe"]) == 2
        check_message(capsys.readouterr().err, [str(path), *fragments])
    path.write_text(
        "def get_config():\n  return dict(task='mae', total_epochs=3, "
        "model=dict(name='mae_hivit_tiny', depths=[1, 1, 2]))\n"
    )
    config = configs.load(path)
    assert (config.total_epochs, config.model.depths) == (3.0, (1, 1, 2))


def test_help(capsys):
    """Modes, examples, exit codes, and each recipe by name and first line."""
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    for mode in MODES:
        assert re.search(rf"^(modes:)? +{mode} ", out, re.M)
    assert "examples:\n  hivit_jax --config digits_mae --workdir runs/mae\n" in out
    assert "exit codes: 0 finished" in out
    line = "Masked autoencoder pretraining of HiViT-B on ImageNet-1k, 1600 epochs."
    assert re.search(rf"^  mae_base +{line}$", out, re.M)
    for name, line in recipes_by_name.names().items():
        assert re.search(rf"^  {name} +{line}$", out, re.M)


def test_page_of_all_keys():
    """Is the output of its command; has every key of every task, with a comment."""
    text = (recipes.ROOT / "docs" / "config.md").read_text()
    assert text == configs.to_markdown()
    for task in tasks.TASKS.values():
        for name, key in configs.task_keys(task).items():
            leaf = name.rpartition(".")[2]
            assert key.comment
            assert f"| {key.comment} |\n" in text
            assert f"| `{leaf}` | " in text or f"| `{name}` | " in text


def test_recipes_of_an_installed_package(tmp_path):
    """By name, from any directory, in an installation as in a clone."""
    site = tmp_path / "site" / "hivit_jax"
    shutil.copytree(recipes.ROOT / "hivit_jax", site)
    shutil.copytree(recipes.ROOT / "configs", site / "configs")
    program = "import sys; from hivit_jax.main import main; sys.exit(main())"
    flags = ["--config=mae_base", "--mode=describe"]
    for path in (site.parent, recipes.ROOT):
        command = ["-c", f"import os; os.chdir('/'); {program}", *flags]
        code, out, err = recipes.run(*command, PYTHONPATH=path)
        assert (code, err) == (0, "")
        assert "changes to mae_base: none" in out


def test_packages_are_listed():
    """setup.cfg lists each package, and the recipes as one."""
    setup = configparser.ConfigParser()
    setup.read(recipes.ROOT / "setup.cfg")
    root = recipes.ROOT / "hivit_jax"
    found = {".".join(p.parent.parts) for p in relative(root.rglob("__init__.py"))}
    listed = {*setup["options"]["packages"].split()}
    assert listed == found | {"hivit_jax.configs"}
    assert "hivit_jax.configs = configs" in setup["options"]["package_dir"]


def relative(paths):
    return [path.relative_to(recipes.ROOT) for path in paths]


def test_describe_draws_schedule_and_images(tmp_path, capsys, monkeypatch):
    """The learning rate of every step, and the first 16 training images as they are,
    which the recipe neither crops nor mirrors here.
    """
    lines, images = [], []
    plot, imshow = Axes.plot, Axes.imshow

    def plotted(axes, *arrays, **options):
        lines.append(arrays)
        return plot(axes, *arrays, **options)

    def shown(axes, image, **options):
        images.append((image, options))
        return imshow(axes, image, **options)

    monkeypatch.setattr(Axes, "plot", plotted)
    monkeypatch.setattr(Axes, "imshow", shown)
    recipe = recipes.ROOT / "configs" / "digits_finetune.py"
    overrides = [
        "--config.batch_size=24",
        "--config.model.image_size=8",
        "--config.model.patch_size=4",
        "--config.data.crop_scale=(1.0,1.0)",
        "--config.optimizer.warmup_epochs=30",
    ]
    command = [f"--config={recipe}", "--mode=describe", *overrides]
    assert main([*command, f"--workdir={tmp_path}"]) == 0
    assert f"drawn: {tmp_path}/figures/schedule.png, " in capsys.readouterr().out
    for name in ("schedule", "augmented"):
        Image.open(tmp_path / "figures" / f"{name}.png").verify()
    [(steps, rates)] = lines
    np.testing.assert_array_equal(steps, np.arange(361))
    peak, warmup = 1e-2 * 24 / 256, 125  # steps: 30 of 100 images
    fall = 0.5 + 0.5 * np.cos(np.pi * (steps - warmup) / (360 - warmup))
    expected = peak * np.where(steps < warmup, steps / warmup, fall)
    np.testing.assert_allclose(rates, expected, rtol=1e-4, atol=1e-8)
    pixels = digits.Digits("train", 100).pixels()[permutation(0, 0, 100)[:16]]
    assert len(images) == 16
    for (image, options), scan in zip(images, pixels, strict=True):
        np.testing.assert_allclose(image, scan / 255, rtol=0, atol=1e-5)
        assert (options["vmin"], options["vmax"]) == (0, 1)

    missing = ["--config.data.name=folder", f"--config.data.dir={tmp_path / 'none'}"]
    command += [*missing, "--config.data.train_examples=0"]
    assert main([*command, f"--workdir={tmp_path / 'x'}"]) == 4
    assert "no directory" in capsys.readouterr().err


VARIANTS = {
    "finetune": ("", ":tiny", ":small", ":base", ":large"),
    "linear": ("", ":tiny", ":small", ":base", ":large"),
    "supervised": ("", ":tiny", ":small", ":base"),
}


@pytest.mark.parametrize("name", recipes_by_name.names())
def test_every_recipe(name):
    """Builds its model; its docstring has command, hardware, result and cost."""
    text = (recipes.ROOT / "configs" / f"{name}.py").read_text()
    assert 10 <= len(text.splitlines()) <= 25
    assert f"\n    hivit_jax --config {name}" in text
    assert all(
        f"{word}: " in text for word in ("Values", "Expected", "Hardware", "Cost")
    )
    for variant in VARIANTS.get(name, ("",)):
        config = configs.load(f"{name}{variant}")
        model = nnx.eval_shape(inputs.task_of_recipe(config).build_model)
        assert model.parameter_count() > 10_000
