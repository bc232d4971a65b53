"""Tests that a model is found among the other contents of a training program's file.

A HiViT is found below up to three keys. One common prefix and the wrappers of PyTorch
are removed from its names. A file with two HiViTs is an error that names both, unless
one HiViT is an average or has one of the usual keys.
"""

import numpy as np
import pytest
import state_files
import torch_files
from torch_files import Global

from hivit_jax.errors import CheckpointError
from hivit_jax.weights import files
from hivit_jax.weights.load import read
from hivit_jax.weights.nesting import remove_prefixes

STATE = state_files.random_state_dict("hivit_base", num_classes=3)[1]
AVERAGE = {name: array * 2 for name, array in STATE.items()}
OTHER = {"conv1.weight": np.ones((3, 3), np.float32)}


def add_prefix(prefix, state=STATE):
    """Return a state dict with a prefix before every name."""
    return {prefix + name: array for name, array in state.items()}


def pickled_module(state):
    """Return an object that is pickled as a module with the names of a state dict."""
    parameters, submodules = {}, {}
    for name, array in state.items():
        first, _, suffix = name.partition(".")
        if suffix:
            submodules.setdefault(first, {})[suffix] = array
        else:
            parameters[first] = array
    attributes = {
        "training": True,
        "_parameters": torch_files.with_tensors(parameters),
        "_buffers": {"unset": None},
        "_modules": {name: pickled_module(sub) for name, sub in submodules.items()},
    }
    return Global("models.hivit", "HiViT")(state=attributes)


NESTINGS = {
    "": STATE,
    "module": {"module": STATE, "global_steps": 3},
    "net": {"net": STATE, "epoch": 1},
    "model_state_dict": {"epoch": 1, "model_state_dict": STATE},
    "checkpoint/model": {"checkpoint": {"model": STATE, "lr": 0.1}},
    "model": {"model": STATE, "loss": OTHER, "teacher": AVERAGE},
    "encoder": {"encoder": STATE, "decoder": OTHER, "optimizer": {"state": {0: OTHER}}},
    "network": {"network": pickled_module(STATE)},
    "state_dict": {
        "state_dict": Global("addict", "Dict")(items=torch_files.with_tensors(STATE))
    },
}


@pytest.mark.parametrize("key", NESTINGS)
@pytest.mark.parametrize("legacy", [False, True])
def test_state_dict_is_found_below_any_keys(key, legacy, tmp_path):
    """The file may contain other objects."""
    content = torch_files.with_tensors(NESTINGS[key])
    file = files.read(torch_files.save(content, tmp_path / "x.pth", legacy))
    assert file.key == key
    assert file.state.keys() == STATE.keys()
    for name, array in STATE.items():
        np.testing.assert_array_equal(file.state[name], array)


@pytest.mark.parametrize(
    "content",
    [
        {"model": STATE, "model_ema": AVERAGE},
        {"state_dict": STATE, "ema_state_dict": AVERAGE},
        {"module": STATE, "ema": {"module": AVERAGE}},
    ],
)
def test_averaged_weights_are_preferred(content, tmp_path):
    """With averaged=False, the plain weights are read."""
    path = torch_files.save(torch_files.with_tensors(content), tmp_path / "x.pth")
    for averaged, expected in ((True, AVERAGE), (False, STATE)):
        state = files.read(path, averaged).state
        np.testing.assert_array_equal(state["head.bias"], expected["head.bias"])


@pytest.mark.parametrize(
    ("state", "removed", "unused"),
    [
        (add_prefix("model."), ["model."], []),
        (add_prefix("model.encoder."), ["model.encoder."], []),
        (add_prefix("module.model."), ["module.model."], []),
        (add_prefix("_orig_mod.module."), ["module.", "_orig_mod."], []),
        (
            {
                n.replace("blocks.0.", "blocks.0._orig_mod."): a
                for n, a in STATE.items()
            },
            ["_orig_mod."],
            [],
        ),
        (
            add_prefix("_fsdp_wrapped_module.") | {"n_averaged": np.int64(3)},
            ["_fsdp_wrapped_module."],
            ["n_averaged"],
        ),
        (
            add_prefix("net.") | {"loss.weight": np.ones(3, np.float32)},
            ["net."],
            ["loss.weight"],
        ),
        (STATE, [], []),
    ],
)
def test_prefixes_of_names_are_removed(state, removed, unused):
    """The prefixes come from a model's attribute or wrappers such as torch.compile."""
    result = remove_prefixes(state)
    assert result.removed == removed
    assert result.unused == unused
    assert result.state.keys() == STATE.keys()


def test_prefixes_of_several_models_are_refused_unless_one_is_an_average():
    state = add_prefix("model.") | add_prefix("ema.", AVERAGE)
    for averaged, expected in ((True, AVERAGE), (False, STATE)):
        result = remove_prefixes(state, averaged)
        assert result.state["head.bias"] is expected["head.bias"]
        assert len(result.unused) == len(STATE)
    message = "several models, 'student.', 'teacher.'; expected one"
    with pytest.raises(CheckpointError, match=message):
        remove_prefixes(add_prefix("student.") | add_prefix("teacher."))
    with pytest.raises(CheckpointError, match="several models"):
        remove_prefixes(STATE | add_prefix("module."))


def test_removed_keys_and_prefixes_are_reported(tmp_path, capsys):
    content = {"net": add_prefix("model.") | OTHER}
    path = torch_files.save(torch_files.with_tensors(content), tmp_path / "x.pth")
    pretrained = read(path, num_heads=1)
    assert pretrained.unused == ["conv1.weight"]
    assert "removed from the names: model." in pretrained.notes
    out = capsys.readouterr().out
    for text in ("entry 'net'", "names: model.", "unused entries: conv1.weight"):
        assert text in out


@pytest.mark.parametrize(
    "leftovers", [("norm.",), ("mask_token", "norm.bias"), ("decoder_pos",)]
)
def test_encoder_loads_without_its_decoder(leftovers, tmp_path, capsys):
    """An encoder loads as a model without a head; the log lists the decoder's entries.

    The norm of the decoder's input, which is wider than the encoder, is such an entry.
    Without entries of a decoder, a norm of the encoder's width is an error, because it
    may belong to a classifier.
    """
    autoencoder = state_files.random_state_dict("mae_hivit_base")[1]
    prefixes = ("absolute_pos_embed", "patch_embed.", "blocks.", *leftovers)
    state = {n: a for n, a in autoencoder.items() if n.startswith(prefixes)}
    path = torch_files.save(torch_files.with_tensors(state), tmp_path / "x.pth")
    pretrained = read(path, num_heads=1)
    unused = [name for name in state if name.startswith(leftovers)]
    assert pretrained.unused == unused
    assert f"unused entries: {', '.join(unused)}\n" in capsys.readouterr().out
    assert {n.partition("/")[0] for n in pretrained.params} == {"encoder"}
    state = {n: a for n, a in state.items() if not n.startswith(leftovers)}
    state["norm.weight"] = np.ones(16, np.float32)
    torch_files.save(torch_files.with_tensors(state), path)
    with pytest.raises(
        CheckpointError, match="x.pth: unexpected entries .*'norm.weight'"
    ):
        read(path, num_heads=1)
