"""Saved models: round trips."""

import json
from dataclasses import replace

import pytest
import recipes
import reference
import state_files
from networks import mini, params_by_name

import hivit_jax
from hivit_jax.tools import convert
from hivit_jax.tree import split
from hivit_jax.weights import files

KINDS = state_files.kinds()


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["official", "supervised", "mmpretrain"])
@pytest.mark.parametrize(
    "suffix", ["safetensors", pytest.param("pth", marks=pytest.mark.torch)]
)
def test_round_trip(layout, suffix, tmp_path):
    """A file, our directory and a file again are byte-identical."""
    if suffix == "pth":
        pytest.importorskip("torch")
    kind = "mmpretrain" if layout == "mmpretrain" else "official_finetuned"
    state = KINDS[kind][1].get("model") or KINDS[kind][1]["state_dict"]
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
    recipes.assert_identical(
        params_by_name(hivit_jax.load_pretrained(last)),
        params_by_name(hivit_jax.load_pretrained(first)),
    )


@pytest.mark.slow
def test_official_program_can_load_every_entry(tmp_path):
    """A strict load_state_dict of the official mini classifier would succeed."""
    model, _ = reference.build_fixture("features_mini_rpe")
    hivit_jax.save_pretrained(model, tmp_path / "d")
    convert.convert(tmp_path / "d", tmp_path / "x.safetensors")
    written = files.read(tmp_path / "x.safetensors").state
    expected = reference.FIXTURES["features_mini_rpe"]["state_dict"]
    assert {n: list(a.shape) for n, a in written.items()} == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hivit_base", "mae_hivit_base"])
def test_save_pretrained(name, tmp_path):
    """The loaded model has the same arguments and values."""
    overrides = dict(drop_path_rate=0.1) if name == "hivit_base" else {}
    model = mini(name, dtype="bfloat16", image_size=(64, 32), **overrides)
    hivit_jax.save_pretrained(model, tmp_path, {"task": "x"}, {"eval/top1": 0.5})
    loaded = hivit_jax.load_pretrained(tmp_path)
    recipes.assert_identical(params_by_name(loaded), params_by_name(model))
    assert split(loaded)[0] == split(model)[0]  # structure: every setting
    card = (tmp_path / "README.md").read_text()
    for text in (f"# {name}", "0.1", "eval/top1: 0.5", '"task": "x"', "64x32"):
        assert text in card
    about = json.loads((tmp_path / "config.json").read_text())
    assert about["arguments"]["image_size"] == [64, 32]


@pytest.mark.slow
@pytest.mark.parametrize("file", ["", "model.safetensors", "other.safetensors"])
def test_facts_about_images_are_saved(file, tmp_path):
    """Image facts are saved, also without config.json; class names of other heads are
    dropped.
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
