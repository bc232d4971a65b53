"""Tests of loading pretrained models of every format."""

import re
import sys
from types import SimpleNamespace

import jax.numpy as jnp
import mini_runs
import numpy as np
import pytest
import reference
import state_files
from networks import abstract_model, jit_model, mini, params_by_name
from numpy.testing import assert_allclose, assert_array_equal

import hivit_jax
from hivit_jax.errors import CheckpointError, ConfigError
from hivit_jax.evaluate import evaluate_checkpoint
from hivit_jax.models import arguments_of, configure, merge_arguments
from hivit_jax.models.mae import MaskedAutoencoder
from hivit_jax.tools import convert
from hivit_jax.train import train
from hivit_jax.weights.load import read

CONTENTS_BY_FORMAT = state_files.contents_by_format()


def official_state(name="mae_hivit_base", **overrides):
    """Return a random official state dict of a small network."""
    return state_files.random_state_dict(name, **overrides)[1]


# Official name -> our name, for depths (1, 1, 2). The official code numbers blocks and
# merges consecutively. A stem stage of depth 1 has two residual blocks, both MLPs.
OUR_NAMES = {
    "blocks.0": "encoder/stages/0/0",
    "blocks.1": "encoder/stages/0/1",
    "blocks.2": "encoder/merges/0",
    "blocks.3": "encoder/stages/1/0",
    "blocks.4": "encoder/stages/1/1",
    "blocks.5": "encoder/merges/1",
    "blocks.6": "encoder/stages/2/0",
    "blocks.7": "encoder/stages/2/1",
    "patch_embed": "encoder/patch_embed",
    "absolute_pos_embed": "encoder/absolute_pos_embed",
}


# In stage s, a unit has 4x4, 2x2 or 1 cells, numbered row by row. MERGED[s] lists their
# numbers in the order in which the merges concatenate them.
MERGED = [0, 4, 1, 5, 8, 12, 9, 13, 2, 6, 3, 7, 10, 14, 11, 15], [0, 2, 1, 3], [0]


def convert_state(state, width=16):
    """Convert a state dict with one attention head to our names and layout."""
    starts = np.cumsum([0, 4 * width, 2 * width])
    latent_order = np.concatenate(
        [
            start + np.add.outer(np.array(cells) * size, np.arange(size)).reshape(-1)
            for start, cells, size in zip(starts, MERGED, (4, 8, 16), strict=True)
        ]
    )
    converted = {}
    for name, array in state.items():
        name = name.removeprefix("backbone.").replace("head.fc.", "head.")
        name = "absolute_pos_embed" if name == "pos_embed" else name
        if name.endswith("relative_position_index"):
            continue
        if name == "patch_embed.proj.weight":
            array = array.transpose(2, 3, 1, 0).reshape(-1, len(array))
        elif name.endswith("pos_embed") or name == "mask_token":
            array = array.reshape(array.shape[1:] if "pos" in name else -1)
        elif name in ("norm.weight", "norm.bias"):
            array = array[latent_order]
        elif name == "decoder_embed.weight":
            array = array[:, latent_order].T
        elif name.endswith("qkv.weight"):
            array = array.T.reshape(-1, 3, 1, len(array) // 3)
        elif name.endswith("qkv.bias"):
            array = array.reshape(3, 1, -1)
        elif array.ndim == 2 and name.endswith(".weight"):
            array = array.T
        root = ".".join(name.split(".")[: 1 + name.startswith("blocks.")])
        path = OUR_NAMES.get(root, root) + name.removeprefix(root).replace(".", "/")
        ending = "kernel" if array.ndim > 1 else "scale"
        converted[re.sub("weight$", ending, path)] = array
    return converted


# Formats


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONTENTS_BY_FORMAT)
def test_files_written_by_pytorch_load_exactly(kind):
    """The files are part of the golden data; PyTorch wrote them."""
    _, content = CONTENTS_BY_FORMAT[kind]
    overrides = state_files.NOT_IN_STATE_DICT if kind == "official_mae" else {}
    loaded = hivit_jax.load_pretrained(reference.GOLDEN / f"{kind}.pth", **overrides)
    state = content.get("model_ema") or content.get("model") or content["state_dict"]
    mini_runs.assert_identical(params_by_name(loaded), convert_state(state))
    assert loaded.config.num_heads == 1
    epsilon = loaded.encoder.patch_embed.norm.epsilon
    assert epsilon == (1e-5 if kind == "mmpretrain" else 1e-6)
    if "model_ema" in content:
        unaveraged = hivit_jax.load_pretrained(
            reference.GOLDEN / f"{kind}.pth", averaged=False
        )
        mini_runs.assert_identical(
            params_by_name(unaveraged), convert_state(content["model"])
        )


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONTENTS_BY_FORMAT)
def test_state_dicts_in_safetensors_load_exactly(kind, tmp_path):
    _, content = CONTENTS_BY_FORMAT[kind]
    state = content.get("model") or content["state_dict"]
    path = state_files.save_safetensors(tmp_path / "x.safetensors", state)
    overrides = state_files.NOT_IN_STATE_DICT if kind == "official_mae" else {}
    loaded = hivit_jax.load_pretrained(path, **overrides)
    mini_runs.assert_identical(params_by_name(loaded), convert_state(state))
    epsilon = loaded.encoder.patch_embed.norm.epsilon
    assert epsilon == (1e-5 if kind == "mmpretrain" else 1e-6)


@pytest.mark.slow
def test_classifier_loads_the_encoder_of_an_mmpretrain_file(tmp_path, capsys):
    """The decoder of the file is ignored.

    MMPretrain's decoder is not supported, because MMPretrain treats the first visible
    unit as a class token.
    """
    state = CONTENTS_BY_FORMAT["official_mae"][1]["model"]
    named = {}
    for name, array in state.items():
        in_encoder = name.startswith(("absolute_pos", "patch_embed.", "blocks."))
        new_name = "pos_embed" if name == "absolute_pos_embed" else name
        named[f"{'backbone' if in_encoder else 'neck'}.{new_name}"] = array
    path = state_files.save_safetensors(tmp_path / "x.safetensors", named)
    options = dict(num_heads=1, num_classes=7)
    arrays = params_by_name(hivit_jax.load_pretrained(path, **options))
    expected = convert_state(state)
    for name, array in arrays.items():
        if name.startswith("encoder/"):
            assert_array_equal(array, expected[name], name)
    encoder_names = {name for name in expected if name.startswith("encoder/")}
    assert encoder_names <= arrays.keys()
    assert arrays["head/kernel"].shape == (16, 7)
    decoder_names = [name for name in named if name.startswith("neck.")]
    text = convert.inspect(path, num_heads=1)
    assert f"unused entries: {len(decoder_names)}, neck." in text
    named["neck_too"] = named.pop("neck.mask_token")
    state_files.save_safetensors(path, named)
    with pytest.raises(CheckpointError, match="unexpected entries .*'neck_too'"):
        hivit_jax.load_pretrained(path, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fixture", ["mae_mini", "mae_mini_nohifeat_rpe", "features_mini_rpe"]
)
def test_official_file_gives_the_official_outputs(fixture, tmp_path):
    """All arguments except the numbers of heads are inferred from the file."""
    path = state_files.save_safetensors(
        tmp_path / "x.safetensors", reference.state_dict(fixture)
    )
    overrides = {} if fixture == "features_mini_rpe" else dict(decoder_num_heads=2)
    model = hivit_jax.load_pretrained(path, num_heads=2, **overrides)
    images = jnp.asarray(reference.images("mini64", 3, 64))
    arrays = reference.golden(fixture)
    if isinstance(model, MaskedAutoencoder):
        noise = jnp.asarray(reference.noise("mini64", 3, 16))
        out = jit_model(model, lambda m, *args: m(args[0], noise=args[1]))(
            images, noise
        )
        assert_allclose(out.loss, arrays["loss"], atol=2e-6)
        assert_allclose(out.pred, arrays["pred"], atol=2e-5)
    else:
        ids_keep = jnp.asarray(arrays["ids_keep"])
        run = jit_model(
            model, lambda m, *args: m.encoder(args[0], ids_keep=args[1])[-1]
        )
        feat = run(images, ids_keep)
        assert_allclose(feat, arrays["feat"], atol=2e-5)


@pytest.mark.slow
def test_another_name_inherits_values_that_are_not_class_defaults():
    """A model of another name inherits values that differ from the class defaults.

    It inherits embed_dim, depths and num_heads only if the two names have the same
    defaults for all three. Run options are always inherited.
    """
    saved = arguments_of(
        abstract_model("hivit_base_24", image_size=64, dtype="bfloat16")
    )

    def merged_config(**overrides):
        return configure(**merge_arguments(saved, overrides))[1:]

    config, run_options = merged_config(name="hivit_base")
    assert (config.depths, config.fc_norm, config.layer_norm_eps) == (
        (2, 2, 20),
        False,
        1e-5,
    )
    assert (config.image_size, run_options.dtype) == ((64, 64), "bfloat16")
    config, _ = merged_config(name="mae_hivit_base_24", decoder_depth=2)
    assert (config.depths, config.decoder_depth) == ((2, 2, 24), 2)
    assert not config.relative_position
    saved = arguments_of(abstract_model("hivit_base", embed_dim=64, num_heads=2))
    assert merged_config(name="hivit_base_24")[0].fc_norm is False
    assert merged_config(name="mae_hivit_base")[0].embed_dim == 64
    assert merged_config(name="hivit_small")[0].embed_dim == 384


@pytest.mark.extras
@pytest.mark.slow
def test_shared_model_evaluates_like_its_run(tmp_path, capsys):
    """A converted finetuned model has the evaluation results of the end of its run.

    Finetuning with another image size resizes the pretrained tables. The model card
    lists results and recipe.
    """
    pretrained, run, shared = (
        tmp_path / name for name in ("pretrained", "run", "shared")
    )
    with mini_runs.minimal_output():
        train(mini_runs.mae(total_steps=1, model__image_size="(64,32)"), pretrained)
        settings = dict(total_steps=1, model__image_size="(32,96)")
        capsys.readouterr()
        config = mini_runs.classifier(init_from=str(pretrained), **settings)
        results = train(config, run)
        assert "encoder/absolute_pos_embed 1" in capsys.readouterr().out
        convert.convert(run, shared)
        card = (shared / "README.md").read_text()
        assert f"eval/loss: {results['eval/loss']:.4f}" in card
        assert "- training: classify, on synthetic, " in card
        for path in (run, shared):
            info = hivit_jax.load_pretrained(path).info
            data = mini_runs.classifier().data
            assert (info.mean, info.std) == (data.mean, data.std)
            assert (info.crop, info.image_size) == (data.crop_pct, (32, 96))
        config = mini_runs.classifier(**settings)
        assert evaluate_checkpoint(config, "", str(shared)) == results
        config.model.num_classes = 12
        with pytest.raises(ConfigError, match="has no head/bias that fits"):
            evaluate_checkpoint(config, "", str(shared))


@pytest.mark.extras
@pytest.mark.slow
def test_pretraining_continues_from_an_official_file(tmp_path):
    """`init_from` with an official file loads encoder and decoder exactly."""
    state = reference.state_dict("mae_mini")
    path = state_files.save_safetensors(tmp_path / "x.safetensors", state)
    config = mini_runs.mae(
        init_from=str(path), total_steps=1, optimizer__base_learning_rate=0.0
    )
    with mini_runs.minimal_output():
        train(config, tmp_path / "run")
    model, _ = reference.build_fixture("mae_mini")
    stored = mini_runs.saved_variables(tmp_path / "run", 1)
    mini_runs.assert_identical(stored, params_by_name(model))


# Overrides


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            dict(embed_dim=32, image_size=96, depths=(1, 1, 3)),
            "different model: encoder/absolute_pos_embed has .*\n.* its flags are "
            "--config.model.image_size=64 '--config.model.depths=\\(1,1,2\\)' "
            "--config.model.embed_dim=64$",
        ),
        (dict(name="hivit_small"), "different model"),
        (
            dict(depths=(1, 1, 3)),
            r"the first is encoder/stages/2/2/.*\. Refusing(.|\n)*depths=\(1,1,2\)'$",
        ),
        (dict(name="mae_hivit_base"), "missing, the first is decoder_"),
        (dict(nmu_heads=2), "unknown override .*did you mean 'num_heads'"),
    ],
)
def test_overrides_that_do_not_fit_are_refused(overrides, message, tmp_path):
    hivit_jax.save_pretrained(mini("hivit_base"), tmp_path)
    with pytest.raises(ConfigError, match=message):
        hivit_jax.load_pretrained(tmp_path, **overrides)


def test_inspect_marks_guessed_arguments(tmp_path, capsys):
    """An argument of --set is not marked as guessed."""
    path = state_files.save_safetensors(tmp_path / "x.safetensors", official_state())
    assert convert.main(["--inspect", str(path), "--set", "num_heads=2"]) == 0
    text = capsys.readouterr().out
    assert "mae_hivit_base with non-standard sizes" in text
    assert "depths (1, 1, 2)" in text
    assert " num_heads 2" in text
    assert "guessed: num_heads" not in text
    assert "guessed: decoder_num_heads 1, assuming 32 channels per head" in text
    assert "guessed: layer_norm_eps 1e-06, as in the official code" in text
    assert "averaged weights (EMA): none" in text
    assert "matched" in text


@pytest.mark.slow
def test_inspect_prints_entries_names_and_report(tmp_path, capsys):
    """A pretraining file is also inspected as a classifier for larger images."""
    for kind, words in {
        "official_mae": ["mae_hivit_base", "entries: optimizer, epoch, scaler, args"],
        "official_finetuned": [
            "hivit_base",
            "model_ema",
            "unused entries: 1, relative_pos",
        ],
        "mmpretrain": ["hivit_base", "names: MMPretrain", "layer_norm_eps 1e-05"],
    }.items():
        path = str(reference.GOLDEN / f"{kind}.pth")
        assert convert.main(["--inspect", path, "--set", "num_heads=1", "--names"]) == 0
        out = capsys.readouterr().out
        for word in [
            *words,
            " encoder/patch_embed/proj/kernel [48, 4]",
        ]:
            assert word in out
    mae = str(reference.GOLDEN / "official_mae.pth")
    flags = ["--set", "name=hivit_base", "--set", "image_size=64"]
    assert convert.main(["--inspect", mae, *flags]) == 0
    out = capsys.readouterr().out
    assert "as hivit_base" in out
    for outcome in ("matched", "resized", "unused", "newly_initialized"):
        assert f"  {outcome} " in out


# The Hugging Face hub


@pytest.mark.slow
def test_hub_addresses_load_a_repository_or_a_file(tmp_path, monkeypatch):
    """The address may contain a revision."""
    model, downloads = mini("hivit_base"), []
    hivit_jax.save_pretrained(model, tmp_path)
    state_files.save_safetensors(
        tmp_path / "other.safetensors", official_state("hivit_base")
    )

    def snapshot_download(name, revision, allow_patterns):
        downloads.append((name, revision, allow_patterns))
        return str(tmp_path)

    fake = SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    loaded = hivit_jax.load_pretrained("hf://group/hivit@v1")
    mini_runs.assert_identical(params_by_name(loaded), params_by_name(model))
    other = hivit_jax.load_pretrained("hf://group/hivit/other.safetensors")
    assert other.config.embed_dim == 16
    files = ["model.safetensors", "config.json", "preprocessor_config.json"]
    assert downloads == [
        ("group/hivit", "v1", files),
        ("group/hivit", None, ["other.safetensors"]),
    ]
    with pytest.raises(CheckpointError, match=r"hf://group/hivit/x.pth has no x.pth"):
        read("hf://group/hivit/x.pth")
    with pytest.raises(CheckpointError, match="expected hf://ORGANIZATION/NAME"):
        read("hf://hivit")

    def offline(*_, **__):
        raise OSError("offline mode is on\nand more")

    fake.snapshot_download = offline
    message = r"hf://a/b cannot be downloaded, .* local copy: .*: offline mode is on$"
    with pytest.raises(CheckpointError, match=message):
        read("hf://a/b")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="huggingface_hub is not installed"):
        read("hf://a/b")


def test_model_name_instead_of_a_path_is_explained(tmp_path, monkeypatch):
    """If a directory has the name, the error does not mention `create_model`."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"create_model\('vit_base'\) init"):
        hivit_jax.load_pretrained("vit_base")
    (tmp_path / "vit_base").mkdir()
    with pytest.raises(CheckpointError) as error:
        hivit_jax.load_pretrained("vit_base")
    assert "create_model" not in str(error.value)
