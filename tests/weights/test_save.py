"""Tests of saved models: round trips, and models that cannot be saved."""

import copy
import json
import os
import re
from dataclasses import replace
from email.message import Message
from functools import cache
from importlib import metadata

import jax.numpy as jnp
import mini_runs
import numpy as np
import pytest
import reference
import state_files
from flax import nnx
from networks import abstract_model, mini, params_by_name
from PIL import Image

import hivit_jax
from hivit_jax.errors import ConfigError
from hivit_jax.tools import convert
from hivit_jax.tree import split
from hivit_jax.weights import files, to_state_dict
from hivit_jax.weights.card import model_card
from hivit_jax.weights.save import shareable

CONTENTS_BY_FORMAT = state_files.contents_by_format()


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["official", "supervised", "mmpretrain"])
@pytest.mark.parametrize(
    "suffix", ["safetensors", pytest.param("pth", marks=pytest.mark.torch)]
)
def test_arrays_survive_a_round_trip(layout, suffix, tmp_path):
    """A file is converted to a directory and back to a file in `layout`."""
    if suffix == "pth":
        pytest.importorskip("torch")
    kind = "mmpretrain" if layout == "mmpretrain" else "official_finetuned"
    state = (
        CONTENTS_BY_FORMAT[kind][1].get("model")
        or CONTENTS_BY_FORMAT[kind][1]["state_dict"]
    )
    first = state_files.save_safetensors(tmp_path / "first.safetensors", state)
    directory, last = tmp_path / "directory", tmp_path / f"last.{suffix}"
    assert convert.main([str(first), str(directory)]) == 0
    assert convert.main([str(directory), str(last), "--format", layout]) == 0
    back = files.read(last).state
    for name, array in state.items():
        if not name.endswith("relative_position_index"):
            assert back[name].tobytes() == array.tobytes(), name
    extra = {name.rsplit(".")[-1] for name in back.keys() - state.keys()}
    assert extra <= {"relative_position_index"}
    mini_runs.assert_identical(
        params_by_name(hivit_jax.load_pretrained(last)),
        params_by_name(hivit_jax.load_pretrained(first)),
    )


@pytest.mark.slow
def test_converted_file_has_the_official_names_and_shapes(tmp_path):
    """A converted file has exactly the official names and shapes.

    Therefore the official classifier can load it with strict=True.
    """
    model, _ = reference.build_fixture("features_mini_rpe")
    hivit_jax.save_pretrained(model, tmp_path / "d")
    convert.convert(tmp_path / "d", tmp_path / "x.safetensors")
    written = files.read(tmp_path / "x.safetensors").state
    expected = reference.FIXTURES["features_mini_rpe"]["state_dict"]
    assert {n: list(a.shape) for n, a in written.items()} == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hivit_base", "mae_hivit_base"])
def test_saved_model_loads_with_equal_arguments_and_values(name, tmp_path):
    """The model card contains the results."""
    overrides = dict(drop_path_rate=0.1) if name == "hivit_base" else {}
    model = mini(name, dtype="bfloat16", image_size=(64, 32), **overrides)
    hivit_jax.save_pretrained(model, tmp_path, {"task": "x"}, {"eval/top1": 0.5})
    loaded = hivit_jax.load_pretrained(tmp_path)
    mini_runs.assert_identical(params_by_name(loaded), params_by_name(model))
    assert split(loaded)[0] == split(model)[0]  # all settings are equal
    card = (tmp_path / "README.md").read_text()
    for text in (f"# {name}", "eval/top1: 50.00 %", "training: x\n", "64x32"):
        assert text in card
    assert len(card.splitlines()) < 60
    saved_config = json.loads((tmp_path / "config.json").read_text())
    assert saved_config["arguments"]["image_size"] == [64, 32]


@pytest.mark.parametrize(("scale", "divisor"), [(1 / 255, "255"), (1 / 65535, "65535")])
def test_card_contains_the_divisor_of_pixels(scale, divisor):
    """The divisor is 255 for 8 bits and 65535 for 16 bits."""
    model = abstract_model("hivit_base", num_classes=2)
    model.info = replace(model.info, scale=scale, multi_label=True)
    card = model_card(model, {}, {})
    assert f"divides by {divisor}, subtracts the mean" in card
    assert "import jax\n" not in card  # without class names, no sigmoid


@pytest.mark.parametrize(
    ("overrides", "unit"), [({}, " G"), ({"image_size": 32, "depths": (1, 1, 2)}, " M")]
)
def test_card_states_multiply_adds_in_a_suitable_unit(overrides, unit):
    """A small model does not have 0.00 G of multiply-adds."""
    model = abstract_model("hivit_base", num_classes=2)
    if overrides:
        model = abstract_model("hivit_tiny", num_classes=2, **overrides)
    (text,) = re.findall("multiply-adds per image: (.*)", model_card(model, {}, {}))
    number, factor = float(text.removesuffix(unit)), 1e9 if unit == " G" else 1e6
    assert number * factor == pytest.approx(model.macs(layer_norm_cost=0), rel=0.01)
    assert number > 1


@pytest.mark.parametrize(
    ("urls", "line"),
    [
        ([], "- code: hivit_jax {}\n"),
        (["Source, https://x.org/a", "Docs, https://x.org/b"],
         "- code: hivit_jax {}, https://x.org/a\n"),
        (None, "- code: hivit_jax {}\n"),
    ],
)  # fmt: skip
def test_card_contains_version_and_address_of_the_project(urls, line, monkeypatch):
    """The card contains the version and, if the metadata has one, the first address."""

    def read(name):
        if urls is None:
            raise metadata.PackageNotFoundError(name)
        message = Message()
        for url in urls:
            message["Project-URL"] = url
        return message

    monkeypatch.setattr(metadata, "metadata", read)
    model = abstract_model("hivit_base", num_classes=2)
    expected = line.format(hivit_jax.__version__)
    assert expected in model_card(model, {}, {})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hivit_base", "mae_hivit_base"])
def test_code_in_the_card_runs(name, tmp_path, monkeypatch, capsys):
    """The model card's code runs in the saved directory.

    A classifier's code prints the name of the predicted class.
    """
    is_classifier = name == "hivit_base"
    model = mini(name, **dict(num_classes=2) if is_classifier else {})
    names = ("a cat", "a dog") * is_classifier
    model.info = replace(model.info, class_names=names)
    hivit_jax.save_pretrained(model, tmp_path)
    Image.new("RGB", (80, 70)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    card = (tmp_path / "README.md").read_text()
    [code] = re.findall(r"(?s)```python\n(.*?)```", card)
    namespace = {}
    exec(code, namespace)
    assert namespace["images"].shape == (1, *model.config.image_shape)
    if is_classifier:
        assert "classes: 2: a cat, a dog\n" in card
        assert capsys.readouterr().out.splitlines()[-1] in names


@pytest.mark.slow
@pytest.mark.parametrize("file", ["", "model.safetensors", "other.safetensors"])
def test_info_is_saved_in_every_file(file, tmp_path):
    """A model that is loaded with another number of classes has no class names.

    Without config.json, a weight file loads with the same info, because the file
    contains the info too.
    """
    model = mini("hivit_base", num_classes=2)
    facts = dict(class_names=("cat", "dog"), crop=0.9, mean=(0.1, 0.2, 0.3))
    model.info = replace(model.info, std=(0.2,) * 3, scale=0.5, **facts)
    hivit_jax.save_pretrained(model, tmp_path)
    convert.convert(tmp_path, tmp_path / "other.safetensors")
    if file:
        (tmp_path / "config.json").unlink()
    assert hivit_jax.load_pretrained(tmp_path / file).info == model.info
    changed = dict(image_size=(64, 32), in_channels=1, num_classes=3)
    info = hivit_jax.load_pretrained(tmp_path / file, **changed).info
    assert (info.class_names, info.image_size, info.channels) == ((), (64, 32), 1)
    assert info.mean == pytest.approx([0.2])
    assert (info.crop, info.scale) == (0.9, 0.5)


def other_head(model):
    model.head = nnx.Linear(16, 3, rngs=nnx.Rngs(0))


def deeper_head(model):
    model.head = nnx.Sequential(nnx.Linear(16, 8, rngs=nnx.Rngs(0)), model.head)


def no_head(model):
    model.head = None


def with_lora(model):
    model.lora = nnx.Linear(16, 4, rngs=nnx.Rngs(0))


def narrower_qkv(model):
    qkv = model.encoder.stages[2][0].attn.qkv
    qkv.kernel = nnx.Param(qkv.kernel[..., :4])


def nan_bias(model):
    model.head.bias[...] = jnp.full_like(model.head.bias[...], jnp.nan)


def integer_bias(model):
    model.head.bias = nnx.Param(jnp.zeros(2, jnp.int32))


@cache
def small_model():
    """Return a small classifier."""
    return mini("hivit_base", depths=(1, 1, 1), num_classes=2)


CHANGES = [
    other_head,
    deeper_head,
    no_head,
    with_lora,
    narrower_qkv,
    nan_bias,
    integer_bias,
]


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_model_that_would_not_load_is_not_saved(change, tmp_path):
    """If saving is refused, no file changes.

    A model is saved if and only if its arrays have the names and shapes of
    `model.config`, a float dtype and finite values.
    """
    model = copy.deepcopy(small_model())
    (tmp_path / "README.md").write_text("")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    change(model)
    with pytest.raises(ConfigError, match="cannot be saved, because it would not load"):
        hivit_jax.save_pretrained(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.slow
def test_changed_values_and_narrower_dtypes_are_saved(tmp_path):
    model = copy.deepcopy(small_model())
    model.head.kernel = nnx.Param(model.head.kernel[...].astype(jnp.bfloat16) + 1)
    hivit_jax.save_pretrained(model, tmp_path, results={"eval/top1": np.float32(0.5)})
    loaded = hivit_jax.load_pretrained(tmp_path)
    expected = np.float32(model.head.kernel[...])
    np.testing.assert_array_equal(loaded.head.kernel[...], expected)
    saved_config = json.loads((tmp_path / "config.json").read_text())
    assert saved_config["results"] == {"eval/top1": 0.5}


@pytest.mark.slow
def test_edited_model_card_is_kept(tmp_path, capsys):
    """Saving again replaces the model card only if nobody has edited it."""
    card, model = tmp_path / "README.md", small_model()
    hivit_jax.save_pretrained(model, tmp_path)
    hivit_jax.save_pretrained(model, tmp_path, results={"eval/top1": 0.5})
    assert "eval/top1: 50.00 %" in card.read_text()
    assert "kept" not in capsys.readouterr().out
    for text in ("my own words", "my own words", card.read_text() + "\n", ""):
        card.write_text(text)
        hivit_jax.save_pretrained(model, tmp_path)
        assert card.read_text() == text
        assert "README.md was edited and is kept" in capsys.readouterr().out
    card.unlink()
    hivit_jax.save_pretrained(model, tmp_path)
    assert card.read_text().startswith("---")
    # A directory saved by a version without card digests keeps its card.
    saved_config = json.loads((tmp_path / "config.json").read_text())
    del saved_config["card"]
    (tmp_path / "config.json").write_text(json.dumps(saved_config))
    hivit_jax.save_pretrained(model, tmp_path)
    assert "is kept" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b'{"task": "mae", "seed": 3}'),  # of a run
        ("config.json", b'{"model_type": "vit"}'),
        ("config.json", b"[1]"),
        ("config.json", b"not JSON"),
        ("model.safetensors", b"\2\0\0\0\0\0\0\0{}"),
        ("model.safetensors", b"anything"),
    ],
)
def test_files_of_other_programs_are_not_overwritten(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{name} is not a file of save_pretrained"):
        hivit_jax.save_pretrained(small_model(), tmp_path)
    assert os.listdir(tmp_path) == [name]
    assert (tmp_path / name).read_bytes() == content
    with pytest.raises(ConfigError, match="cannot be written"):
        hivit_jax.save_pretrained(small_model(), tmp_path / name)


@pytest.mark.slow
def test_tilde_is_expanded_in_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    hivit_jax.save_pretrained(small_model(), "~/shared")
    hivit_jax.load_pretrained("~/shared")
    assert convert.main(["~/shared", "~/x.safetensors"]) == 0
    hivit_jax.load_pretrained("~/x.safetensors")
    assert sorted(os.listdir("home")) == ["shared", "x.safetensors"]
    assert os.listdir(tmp_path) == ["home"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["official", "supervised", "mmpretrain"])
def test_arrays_of_a_state_dict_are_writable_copies(layout):
    """Programs may modify the arrays of `to_state_dict`."""
    fc_norm = layout != "mmpretrain"
    model = mini("hivit_base", num_classes=2, fc_norm=fc_norm, relative_position=True)
    state = to_state_dict(split(model)[1], model, layout)
    arrays = [*state.values()]
    for array in arrays:
        assert array.flags.c_contiguous
        assert array.flags.writeable
    memory = {array.__array_interface__["data"][0] for array in arrays if array.size}
    assert len(memory) == len(arrays)


def test_saved_files_contain_no_paths_of_the_machine(tmp_path):
    """Saved cards, configs and weights contain no paths of this machine.

    Absolute paths are shortened to their last component, and the values of directory
    keys are removed. Dataset names with a slash and hub addresses are unchanged.
    """
    secret = "/home/user/secret"
    recipe = {
        "task": "x",
        "init_from": f"{secret}/mae_base",
        "data": {"dir": "secret/imagenet", "name": "imagenet_v2/topimages"},
        "compilation_cache": "gs://secret/cache",
        "teacher": {"paths": ["~/secret/t1", "C:\\secret\\t2", "../secret/t3/"]},
        "model": {"name": "hivit_base", "depths": (1, 2)},
    }
    hivit_jax.save_pretrained(small_model(), tmp_path, recipe)
    for path in tmp_path.iterdir():
        content = path.read_bytes()
        assert b"secret" not in content
        assert b"imagenet_v2/topimages" in content
    assert shareable(recipe) == {
        "task": "x",
        "init_from": "mae_base",
        "data": {"dir": "", "name": "imagenet_v2/topimages"},
        "compilation_cache": "",
        "teacher": {"paths": ["t1", "t2", "t3"]},
        "model": {"name": "hivit_base", "depths": [1, 2]},
    }
    unchanged = {
        "init_from": "hf://group/hivit",
        "augment": "rand-m9-mstd0.5-inc1",
        "a": 0.5,
    }
    assert shareable(unchanged) == unchanged
    assert shareable({"init_from": "runs/secret/last"}) == {"init_from": "last"}


def test_conversion_does_not_overwrite_its_source(tmp_path, capsys):
    """The directory and its weight file are two names of the same source."""
    hivit_jax.save_pretrained(small_model(), tmp_path / "d")
    source = tmp_path / "d/model.safetensors"
    before = source.read_bytes()
    for pair in ((source, source), ("d", "d"), (source, "d"), ("d", source)):
        pair = [str(tmp_path / path) for path in pair]
        assert convert.main([*pair, "--set", "num_classes=3"]) == 2
        assert "is an input of this command" in capsys.readouterr().err
    assert source.read_bytes() == before
