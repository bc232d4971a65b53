"""Damaged, malicious and foreign weight files: a clear error, and no code execution."""

import argparse
import copy
import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import reference
import state_files

from hivit_jax.errors import CheckpointError, ConfigError
from hivit_jax.tools import convert
from hivit_jax.weights.load import load_pretrained, read

_, STATE = state_files.random_state_dict("mae_hivit_base")


def contents(state, dtype="F32", about=None, shift=0):
    """Return the bytes of a safetensors file, with errors as requested."""
    header, start = {}, 0
    if about is not None:
        header["__metadata__"] = {"hivit_jax": about}
    blob = b""
    for name, array in state.items():
        data = array.tobytes()
        offsets = [start - shift if header else start, start + len(data)]
        header[name] = dict(dtype=dtype, shape=array.shape, data_offsets=offsets)
        blob, start = blob + data, start + len(data)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + blob


def with_array(name, array):
    return STATE | {name: array}


def without(*prefixes):
    return {n: a for n, a in STATE.items() if not n.startswith(prefixes)}


def with_nan(name):
    array = STATE[name].copy()
    array.flat[3] = np.nan
    return with_array(name, array)


WHOLE = contents(STATE)


DOUBLE = {name: array.astype(np.float64) for name, array in STATE.items()}


VIT = {"cls_token": np.zeros((1, 1, 16), np.float32)} | without("blocks.")


ODD_STAGE = {n: a for n, a in STATE.items() if not n.startswith("blocks.0.")}


ODD_STAGE = {n.replace("blocks.1.", "blocks.0."): a for n, a in ODD_STAGE.items()}


NOT_SQUARE = with_array("absolute_pos_embed", np.zeros((1, 3, 16), np.float32))


SAFETENSORS = {
    "empty": (b"", "damaged or not a safetensors"),
    "garbage": (b"\x80\x04garbage" * 99, "damaged or not a safetensors"),
    "truncated": (WHOLE[:-100], "damaged or not a safetensors"),
    "cut in its header": (WHOLE[:60], "damaged or not a safetensors"),
    "longer than it says": (WHOLE + b"x" * 9, "damaged or not a safetensors"),
    "header beyond the file": (struct.pack("<Q", 2**60) + WHOLE[8:], "damaged"),
    "header is no JSON": (struct.pack("<Q", 9) + b"[not json" + WHOLE, "damaged"),
    "overlapping arrays": (contents(STATE, shift=4), "damaged or not a safetensors"),
    "shape larger than data": (WHOLE.replace(b"[1, 4, 16]", b"[9, 4, 16]"), "damaged"),
    "unknown dtype": (contents(STATE, dtype="F99"), "damaged or not a safetensors"),
    "double precision": (contents(DOUBLE, dtype="F64"), "is float64; expected float32"),
    "integers": (contents(STATE, dtype="I32"), "is int32; expected float32"),
    "not finite": (contents(with_nan("mask_token")), "'mask_token' has values"),
    "a block is missing": (contents(without("blocks.6.")), "not a HiViT"),
    "an extra array": (
        contents(with_array("cls", np.zeros(3, np.float32))),
        "unexpected entries in the state dict: 'cls'",
    ),
    "a wrong shape": (
        contents(with_array("mask_token", np.zeros((1, 2, 8), np.float32))),
        r"'mask_token' has shape \[1, 2, 8\]; expected \[1, 1, 8\]",
    ),
    "a vision transformer": (contents(VIT), "not a HiViT"),
    "no position table": (contents(without("absolute")), "not a HiViT: 'absolute_pos_"),
    "half a stage": (contents(ODD_STAGE), "not a HiViT: .* expected an even number"),
    "units that are no square": (
        contents(NOT_SQUARE),
        "grid of 3 units is not square",
    ),
    "says no JSON of itself": (
        contents(STATE, about="{"),
        "metadata is not a JSON",
    ),
    "says a list of itself": (contents(STATE, about="[1]"), "metadata is not a JSON"),
    "says an unknown network": (
        contents(STATE, about='{"arguments": {"name": "vit_base"}}'),
        "invalid model arguments: unknown model name 'vit_base'",
    ),
    "says an unknown setting": (
        contents(STATE, about='{"arguments": {"name": "hivit_base", "width": 3}}'),
        "invalid model arguments: unknown override",
    ),
    "says another size of itself": (
        contents(STATE, about='{"arguments": {"name": "mae_hivit_base"}}'),
        r"'decoder_blocks.0.attn.proj.bias' has shape \[8\]; expected \[512\]",
    ),
}


def check_refused(path, message, capsys):
    """Check that the command exits with 5 and a short error, and that the library
    raises.
    """
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(path, **state_files.NOT_IN_STATE_DICT)
    flags = ["--set", "num_heads=1", "--set", "decoder_num_heads=1"]
    target = path.parent / "target.safetensors"
    assert convert.main([str(path), str(target), *flags]) == 5
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert 1 <= len(err.splitlines()) <= 3
    assert not target.exists()


@pytest.mark.slow
@pytest.mark.parametrize("case", SAFETENSORS)
def test_malformed_safetensors(case, tmp_path, capsys):
    content, message = SAFETENSORS[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    check_refused(path, message, capsys)


def test_an_array_is_missing(tmp_path):
    """A single missing array is an error; it is not initialized randomly."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(contents(without("blocks.6.mlp.fc1.bias")))
    message = "1 array is missing, .* is encoder/stages/2/0/mlp/fc1/bias. Refusing"
    with pytest.raises(ConfigError, match=message):
        load_pretrained(path, **state_files.NOT_IN_STATE_DICT)


def archive(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members.items():
            file.writestr(name, content)


def test_foreign_archives(tmp_path, capsys):
    """Foreign archives are refused before PyTorch, installed or not, reads them."""
    path = tmp_path / "x.pth"
    for content in (b"", b"no archive", pickle.dumps({"model": {}})):
        path.write_bytes(content)
        check_refused(path, "is truncated, or not written by PyTorch", capsys)
    whole = (reference.GOLDEN / "official_mae.pth").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    check_refused(path, "is truncated, or not written by PyTorch", capsys)
    zeros = {"x/data.pkl": b"\x80\x02}.", "x/data/0": bytes(10**7)}
    archive(path, zeros, zipfile.ZIP_DEFLATED)
    check_refused(path, "'x/data.pkl' is compressed, which PyTorch never does", capsys)
    archive(path, {"x/../../data.pkl": b"\x80\x02}."})
    check_refused(path, r"'x/../../data.pkl' leaves the archive", capsys)
    archive(path, {"/x/data.pkl": b"\x80\x02}."})
    check_refused(path, "leaves the archive", capsys)


def test_archives_with_overlapping_members(tmp_path, capsys):
    """Two entries share the bytes of a member; a small file could unpack into a large
    one.
    """
    path = tmp_path / "x.pth"
    members = {"x/data.pkl": b"\x80\x02}.", "x/data/0": bytes(10**4)}
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
        double = copy.copy(file.getinfo("x/data/0"))
        double.filename = "x/data/1"
        file.filelist.append(double)
    with zipfile.ZipFile(path) as file:
        assert len(file.infolist()) == 3
    check_refused(path, "its members overlap", capsys)


def test_pytorch_is_missing(tmp_path, monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "torch", None)
    path = reference.GOLDEN / "official_mae.pth"
    message = r"which is not installed.\nRun pip install 'hivit-jax\[torch\]'"
    with pytest.raises(CheckpointError, match=message):
        read(path)


class Planted:
    """Pickled object that calls a function when unpickled."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


class Custom:
    """A custom class in a file."""


def malicious(torch, marker):
    """Return case -> (saved object, expected message)."""
    tensor = torch.zeros(3)
    write = f"open({str(marker)!r}, 'w').write('x')"
    sparse = torch.eye(3).to_sparse()
    quantized = torch.quantize_per_tensor(tensor, 0.1, 0, torch.quint8)
    unsafe = "contains more than tensors and plain values"
    return {
        "os.system": (Planted(os.system, f"touch {marker}"), unsafe),
        "eval": ({"model": Planted(eval, write)}, unsafe),
        "exec": ({"model": {"a": Planted(exec, write)}}, unsafe),
        "a planted class": ({"model": {"a": Custom()}}, unsafe),
        "a function": ({"model": {"a": os.listdir}}, unsafe),
        "a namespace with a class": (
            {"model": {"a": tensor}, "args": argparse.Namespace(x=Custom())},
            unsafe,
        ),
        "a list": ([tensor], "contains a list; expected dict"),
        "a tensor": (tensor, "contains a Tensor; expected dict"),
        "a number for a tensor": ({"model": {"a": 3}}, "'a' is of type int"),
        "a list of tensors": ({"model": {"a": [tensor]}}, "'a' is of type list"),
        "a number for a name": (
            {"model": {3: tensor}},
            "3 is of type Tensor",
        ),
        "sparse": ({"model": {"a": sparse}}, "'a' is not a dense tensor"),
        "quantized": ({"model": {"a": quantized}}, "not a dense tensor|damaged"),
        "on no device": ({"model": {"a": tensor.to("meta")}}, "not a dense|damaged"),
        "one number, repeated": (
            {"model": {"a": torch.zeros(1).expand(10**6, 10**6)}},
            r"'a', \[1000000, 1000000\], is larger than the file",
        ),
        "nothing": ({}, "not a HiViT"),
        "an empty state dict": ({"model": {}}, "'model' is of type dict|not a HiViT"),
        "another network": ({"state_dict": {"conv1.weight": tensor}}, "not a HiViT"),
        "complex numbers": (
            state_files.with_tensors(STATE)
            | {"mask_token": torch.zeros(1, 1, 8, dtype=torch.complex64)},
            "'mask_token' is complex64; expected float32",
        ),
        "double precision": (
            {"model": state_files.with_tensors(DOUBLE)},
            "is float64; expected float32",
        ),
    }


@pytest.mark.torch
def test_malicious_and_foreign_pytorch_files(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    marker, path = tmp_path / "marker", tmp_path / "x.pth"
    cases = malicious(torch, marker)
    assert len(cases) == 20
    for content, message in cases.values():
        torch.save(content, path)
        check_refused(path, message, capsys)
        assert not marker.exists()
    # Without the check PyTorch runs the planted code, so the test is effective.
    torch.save(cases["os.system"][0], path)
    torch.load(path, weights_only=False)
    assert marker.exists()


@pytest.mark.torch
def test_half_precision_is_widened(tmp_path):
    """Half precision is exact in float32."""
    torch = pytest.importorskip("torch")
    for dtype in (torch.float16, torch.bfloat16):
        half = OrderedDict((n, torch.tensor(a).to(dtype)) for n, a in STATE.items())
        torch.save(half, tmp_path / "x.pth")
        params = read(tmp_path / "x.pth", **state_files.NOT_IN_STATE_DICT).params
        expected = half["mask_token"].float().numpy().reshape(-1)
        np.testing.assert_array_equal(params["mask_token"], expected)


def test_directory_with_an_invalid_config(tmp_path, capsys):
    (tmp_path / "model.safetensors").write_bytes(WHOLE)
    for text in ("{", "[]", '{"arguments": 3}', '{"arguments": {}}'):
        (tmp_path / "config.json").write_text(text)
        check_refused(
            tmp_path, "config.json cannot be read|invalid model arguments", capsys
        )
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        read(tmp_path / "nowhere")
    (tmp_path / "x.npz").write_bytes(b"")
    with pytest.raises(CheckpointError, match="unknown suffix; expected one of .safe"):
        read(tmp_path / "x.npz")
