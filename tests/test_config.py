"""Tests of configs: keys, values, overrides, errors and docs/config.md."""

import copy
import json
import pickle
import re

import mini_runs
import pytest
from mini_runs import check_message

from hivit_jax import config as configs
from hivit_jax import tasks
from hivit_jax.errors import ConfigError
from hivit_jax.main import main

MINI = mini_runs.arguments()  # flags of a valid recipe


# (overrides, fragments of the error message: key, found and expected values)
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
    (["mask_ratio=0.95"], ["mask_ratio=0.95", "none of 16 units", "0.93"]),
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
    (["model.num_heads=3"], ["num_heads=3", "embed_dim, which is 64", "divisor"]),
    (
        ["model.decoder_num_heads=3"],
        ["decoder_num_heads=3", "decoder_embed_dim, which is 32"],
    ),
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
        ["task='mae'", "'hivit_base'", "expected a MaskedModel"],
    ),
    (["data.name=digit"], ["data.name 'digit'", "'digits'?"]),
    (["data.train_examples=-1"], ["data.train_examples=-1", "at least 0"]),
    (["data.mean=(0.5,0.5)"], ["data.mean=(0.5, 0.5)", "model.in_channels=3"]),
    (["model.in_channels=4"], ["data.mean=", "tools.check_data with the same flags"]),
]


@pytest.mark.parametrize(("overrides", "fragments"), BAD_OVERRIDES)
def test_bad_override_exits_with_code_2(overrides, fragments, tmp_path, capsys):
    flags = [f"--config.{override}" for override in overrides]
    assert main([*MINI, *flags, f"--workdir={tmp_path / 'run'}"]) == 2
    check_message(capsys.readouterr().err, fragments)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("overrides", "microbatch"),
    [
        ("batch_size=25 mixup=0.8", 25),
        ("batch_size=25 cutmix=1.0", 25),
        ("batch_size=24 mixup=0.8 cutmix=1.0 optimizer.accumulate_steps=8", 3),
        ("batch_size=24 mixup=0.8 optimizer.accumulate_steps=4", None),
        ("batch_size=25", None),
    ],
)
def test_mixing_requires_even_microbatches(overrides, microbatch):
    """`microbatch` is the odd size in the error; None: the overrides are valid."""
    recipe = str(mini_runs.ROOT / "configs" / "digits_finetune.py")
    flags = [f"--config.{override}" for override in overrides.split()]
    if microbatch is None:
        assert configs.load(recipe, flags).batch_size in (24, 25)
        return
    with pytest.raises(
        ConfigError, match=f"an even number for .*_steps, found {microbatch}"
    ):
        configs.load(recipe, flags)


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
def test_bad_recipe_exits_with_code_2(text, fragment, capsys, tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text(text)
    assert main([f"--config={path}", f"--workdir={tmp_path}"]) == 2
    check_message(capsys.readouterr().err, [str(path), fragment])


@pytest.mark.slow
def test_suffix_selects_a_variant_of_a_recipe(capsys):
    arguments = ["--mode=describe", "--config.data.randaugment=false"]
    path = mini_runs.ROOT / "configs" / "finetune.py"
    for recipe in ("finetune:large", f"{path}:large"):
        assert main([f"--config={recipe}", *arguments]) == 0
        out = capsys.readouterr().out
        assert re.search("  model.name +'hivit_large'\n", out)
        changes = "data.randaugment: True -> False"
        assert f"differences from {recipe}: \n  {changes}\n" in out
    assert main(["--config=supervised:huge", *arguments]) == 2
    check_message(capsys.readouterr().err, ["supervised:huge", "'huge'"])
    assert main(["--config=mae_base:384", *arguments]) == 2
    check_message(capsys.readouterr().err, ["mae_base:384", "has no variants"])


def test_values_of_a_recipe_are_checked(tmp_path, capsys):
    """Values of a recipe are checked and converted like overrides."""
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


def test_config_page_lists_all_keys():
    """docs/config.md is up to date and lists each key of each task with a comment."""
    text = (mini_runs.ROOT / "docs" / "config.md").read_text()
    assert text == configs.to_markdown()
    for task in tasks.TASKS.values():
        keys = configs.all_keys(task) | configs.all_keys(task, "vit_base")
        for name, key in keys.items():
            leaf = name.rpartition(".")[2]
            assert key.comment
            assert f"| {key.comment} |\n" in text
            assert f"| `{leaf}` | " in text or f"| `{name}` | " in text


@pytest.mark.parametrize(
    ("recipe", "key"),
    [
        ("mae_vit", "model.stem_mlp_ratio"),
        ("finetune_vit", "model.fc_norm"),
        ("mae_base", "model.pooling"),
    ],
)
def test_key_of_another_model_family_is_unknown(recipe, key):
    with pytest.raises(ConfigError, match=f"unknown config key '{key}'"):
        configs.load(recipe, [f"--config.{key}=1"])


def test_model_name_override_selects_the_model_keys():
    overrides = ["--config.model.name=vit_tiny", "--config.model.pooling=token"]
    config = configs.load("supervised", overrides)
    assert config.model.pooling == "token"
    assert "fc_norm" not in config.model


@pytest.mark.parametrize(
    ("section", "name", "suggestion"),
    [
        ("", "optimiser", "'optimizer'"),
        ("", "lr", "'optimizer.base_learning_rate'"),
        ("", "epochs", "'total_epochs'"),
        ("optimizer", "lr", "'base_learning_rate'"),
        ("data", "path", "'dir'"),
        ("model", "depth", "'depths'"),
    ],
)
def test_unknown_attribute_suggests_a_key(section, name, suggestion):
    """Reading or setting an unknown attribute is an error that suggests a key."""
    config = mini_runs.mae()
    for any_config in (config, config.copy_and_resolve_references()):
        part = any_config[section] if section else any_config
        assert not hasattr(part, name)
        for access in (getattr, lambda *args: setattr(*args, 1)):
            match = f"{name}'; did you mean {suggestion}"
            with pytest.raises(ConfigError, match=match):
                access(part, name)


def test_copied_configs_equal_the_original():
    config = mini_runs.mae()
    for copied in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert copied == config
        assert configs.to_json(copied) == configs.to_json(config)


def test_recorded_paths_are_absolute(tmp_path, monkeypatch):
    """Addresses, paths with a leading ~ and missing paths stay as they are."""
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "mae", "list.txt"):
        (tmp_path / name).touch()
    keys = dict(data__dir="photos", init_from="mae", data__exclude="list.txt")
    config = mini_runs.mae(**keys, data__cache="~/cache", compilation_cache="none")
    recorded = json.loads(configs.record_text(config))
    assert recorded["data"]["dir"] == f"{tmp_path}/photos"
    assert recorded["data"]["exclude"] == f"{tmp_path}/list.txt"
    assert recorded["init_from"] == f"{tmp_path}/mae"
    assert recorded["data"]["cache"] == "~/cache"
    assert recorded["compilation_cache"] == "none"
    assert config.data.dir == "photos"
    monkeypatch.chdir("/")
    (tmp_path / "config.json").write_text(json.dumps(recorded))
    loaded = configs.load(str(tmp_path / "config.json"))
    assert json.loads(configs.record_text(loaded)) == recorded
    bucket = mini_runs.mae(data__dir="gs://b/x")
    assert configs.record_text(bucket) == configs.to_json(bucket)
