"""Tests of weight files.

Damaged and foreign files raise a clear error, and reading never runs code from a file.
Valid files of every format and dtype are read.
"""

import argparse
import bz2
import copy
import gzip
import json
import lzma
import os
import pickle
import stat
import struct
import sys
import zipfile

import numpy as np
import pytest
import reference
import state_files
import torch_files

from hivit_jax.errors import CheckpointError, ConfigError
from hivit_jax.tools import convert
from hivit_jax.weights import files
from hivit_jax.weights.load import load_pretrained, read

_, STATE = state_files.random_state_dict("mae_hivit_base")


def to_bytes(state, dtype="F32", metadata=None, shift=0):
    """Return the bytes of a safetensors file.

    Args:
      metadata: text of the metadata entry "hivit_jax"; None: no metadata.
      shift: number of bytes by which each array except the first starts too early.
    """
    header, start = {}, 0
    if metadata is not None:
        header["__metadata__"] = {"hivit_jax": metadata}
    blob = b""
    for name, array in state.items():
        data = array.tobytes()
        offsets = [start - shift if header else start, start + len(data)]
        header[name] = dict(dtype=dtype, shape=array.shape, data_offsets=offsets)
        blob, start = blob + data, start + len(data)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + blob


def with_array(name, array):
    """Return the state dict with one array added or replaced."""
    return STATE | {name: array}


def without(*prefixes):
    """Return the state dict without the names that start with one of the prefixes."""
    return {n: a for n, a in STATE.items() if not n.startswith(prefixes)}


def with_nan(name):
    """Return the state dict with a NaN in one array."""
    array = STATE[name].copy()
    array.flat[3] = np.nan
    return with_array(name, array)


VALID = to_bytes(STATE)
DOUBLE = {name: array.astype(np.float64) for name, array in STATE.items()}
VIT = {"cls_token": np.zeros((1, 1, 16), np.float32)} | without("blocks.")
# The first stage has one residual block instead of two.
ODD_STAGE = {
    n.replace("blocks.1.", "blocks.0."): a for n, a in without("blocks.0.").items()
}
NOT_SQUARE = with_array("absolute_pos_embed", np.zeros((1, 3, 16), np.float32))


SAFETENSORS = {
    "empty": (b"", "x.safetensors is empty"),
    "garbage": (b"\x81\x04garbage" * 99, "damaged or not a safetensors"),
    "truncated": (VALID[:-100], "damaged or not a safetensors"),
    "cut in its header": (VALID[:60], "damaged or not a safetensors"),
    "longer than its header states": (VALID + b"x" * 9, "damaged or not a safetensors"),
    "header beyond the file": (struct.pack("<Q", 2**60) + VALID[8:], "damaged"),
    "header is not JSON": (struct.pack("<Q", 9) + b"[not json" + VALID, "damaged"),
    "overlapping arrays": (
        to_bytes(STATE, shift=4),
        "damaged or not a safetensors",
    ),
    "shape larger than data": (VALID.replace(b"[1, 4, 16]", b"[9, 4, 16]"), "damaged"),
    "unknown dtype": (
        to_bytes(STATE, dtype="F99"),
        "damaged or not a safetensors",
    ),
    "double precision": (
        to_bytes(DOUBLE, dtype="F64"),
        "is float64; expected float32",
    ),
    "integers": (to_bytes(STATE, dtype="I32"), "is int32; expected float32"),
    "not finite": (
        to_bytes(with_nan("mask_token")),
        "'mask_token' has values",
    ),
    "a block is missing": (
        to_bytes(without("blocks.6.")),
        "not a HiViT",
    ),
    "an extra array": (
        to_bytes(with_array("cls", np.zeros(3, np.float32))),
        "unexpected entries in the state dict: 'cls'",
    ),
    "a wrong shape": (
        to_bytes(with_array("mask_token", np.zeros((1, 2, 8), np.float32))),
        r"'mask_token' has shape \[1, 2, 8\]; expected \[1, 1, 8\]",
    ),
    "a vision transformer": (to_bytes(VIT), "not a HiViT"),
    "no position table": (
        to_bytes(without("absolute")),
        "not a HiViT: 'absolute_pos_",
    ),
    "half a stage": (
        to_bytes(ODD_STAGE),
        "not a HiViT: .* expected an even number",
    ),
    "a grid that is not square": (
        to_bytes(NOT_SQUARE),
        "grid of 3 units is not square",
    ),
    "metadata is not JSON": (
        to_bytes(STATE, metadata="{"),
        "expected a JSON object as metadata",
    ),
    "metadata is a list": (
        to_bytes(STATE, metadata="[1]"),
        "expected a JSON object as metadata",
    ),
    "metadata has an unknown network": (
        to_bytes(STATE, metadata='{"arguments": {"name": "resnet50"}}'),
        "invalid model arguments: unknown model name 'resnet50'",
    ),
    "metadata has an unknown setting": (
        to_bytes(STATE, metadata='{"arguments": {"name": "hivit_base", "width": 3}}'),
        "invalid model arguments: unknown override",
    ),
    "metadata has another size": (
        to_bytes(STATE, metadata='{"arguments": {"name": "mae_hivit_base"}}'),
        r"'decoder_blocks.0.attn.proj.bias' has shape \[8\]; expected \[512\]",
    ),
}


def check_refused(path, message, capsys):
    """Check that `load_pretrained` raises, and that `convert` exits with code 5."""
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
def test_malformed_safetensors_are_refused(case, tmp_path, capsys):
    content, message = SAFETENSORS[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    check_refused(path, message, capsys)


def test_file_without_one_array_is_refused(tmp_path):
    """The missing array is not initialized randomly."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(to_bytes(without("blocks.6.mlp.fc1.bias")))
    message = "1 array is missing, .* is encoder/stages/2/0/mlp/fc1/bias. Refusing"
    with pytest.raises(ConfigError, match=message):
        load_pretrained(path, **state_files.NOT_IN_STATE_DICT)


def write_archive(path, members, compression=zipfile.ZIP_STORED):
    """Write a zip archive of {name: content}."""
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members.items():
            file.writestr(name, content)


def test_damaged_and_foreign_pth_files_are_refused(tmp_path, capsys):
    path = tmp_path / "x.pth"
    path.write_bytes(pickle.dumps({"model": {}}))
    check_refused(path, "contains no named tensors, only {'model': dict}", capsys)
    content = (reference.GOLDEN / "official_mae.pth").read_bytes()
    path.write_bytes(content[: len(content) // 2])
    check_refused(path, "is damaged or truncated", capsys)
    zeros = {"x/data.pkl": b"\x80\x02}.", "x/data/0": bytes(10**7)}
    write_archive(path, zeros, zipfile.ZIP_DEFLATED)
    check_refused(path, "'x/data.pkl' is compressed, which PyTorch never does", capsys)
    write_archive(path, {"x/../../data.pkl": b"\x80\x02}."})
    check_refused(path, "contains no named tensors", capsys)
    assert sorted(os.listdir(tmp_path)) == ["x.pth"]


OTHER_KINDS = {
    "an HTML page": b"<!DOCTYPE html><html>Google Drive - Quota exceeded</html>",
    "HTML page": b"\n\n <HTML><head><title>404</title></head></HTML>",
    "an XML document": b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
    "git lfs pull": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n",
    "a gzip archive; unpack it first": gzip.compress(b"weights"),
    "a bzip2 archive": bz2.compress(b"weights"),
    "an xz archive": lzma.compress(b"weights"),
    "a tar archive": b"model.pth".ljust(257, b"\0") + b"ustar\x0000" + bytes(2000),
    "an HDF5 file": b"\x89HDF\r\n\x1a\n" + bytes(99),
    "a NumPy array": b"\x93NUMPY\1\0v\0{'descr': '<f4'}",
    "a JSON file": b'{"message": "Not Found", "status": "404"}',
    "a file of zeros": bytes(4096),
    "a text file": b"Repository not found\n",
    "empty": b"",
    r"of an unknown kind, its first bytes are b'\\x01\\x02": b"\1\2\3\xff" * 99,
}


@pytest.mark.parametrize("suffix", ["pth", "safetensors", "pth.tar"])
@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_error_names_the_kind_of_another_file(kind, suffix, tmp_path):
    """The suffix matters only for a file of an unknown kind.

    For such a file, the error contains the first bytes, or, with the suffix
    safetensors, states that the file is damaged.
    """
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(OTHER_KINDS[kind])
    message = f"x.{suffix} is .*{kind}"
    if kind.startswith("of an unknown") and suffix == "safetensors":
        message = "damaged or not a safetensors"
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(path)


@pytest.mark.parametrize("suffix", ["pth", "pth.tar", "pyth", "pkl", "bin", "weights"])
def test_format_does_not_depend_on_the_suffix(suffix, tmp_path):
    """Safetensors and the two formats of PyTorch are recognized by their content."""
    content = {"state_dict": torch_files.with_tensors(STATE), "epoch": 3}
    for number, legacy in enumerate((False, True)):
        path = torch_files.save(content, tmp_path / f"{number}.{suffix}", legacy)
        file = files.read(path)
        assert (file.key, file.other_keys) == ("state_dict", ["epoch"])
        np.testing.assert_array_equal(file.state["mask_token"], STATE["mask_token"])
    path.write_bytes(VALID)
    assert files.read(path).state.keys() == STATE.keys()


def test_directory_must_contain_one_file_of_weights(tmp_path):
    """Without model.safetensors, a second file of weights is an error."""
    torch_files.save(torch_files.with_tensors(STATE), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text("{}")
    loaded = read(tmp_path, **state_files.NOT_IN_STATE_DICT)
    assert loaded.path.endswith("pytorch_model.bin")
    (tmp_path / "optimizer.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="one file of: optimizer.bin, pytorch_m"):
        read(tmp_path)


def test_archives_with_overlapping_members_are_refused(tmp_path, capsys):
    """Archives whose entries share bytes are refused.

    Otherwise a small archive could unpack into a large file.
    """
    path = tmp_path / "x.pth"
    members = {"x/data.pkl": b"\x80\x02}.", "x/data/0": bytes(10**4)}
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
        duplicate = copy.copy(file.getinfo("x/data/0"))
        duplicate.filename = "x/data/1"
        file.filelist.append(duplicate)
    with zipfile.ZipFile(path) as file:
        assert len(file.infolist()) == 3
    check_refused(path, "members of the archive overlap", capsys)


def test_pth_files_are_read_but_not_written_without_pytorch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert read(
        reference.GOLDEN / "official_mae.pth", **state_files.NOT_IN_STATE_DICT
    ).params
    message = r"which is not installed.\nRun pip install 'hivit-jax\[torch\]'"
    with pytest.raises(ConfigError, match=message):
        files.write(tmp_path / "x.pth", STATE, "{}")


class Planted:
    """Pickled object that calls a function when unpickled."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def malicious_and_foreign_cases(marker):
    """Return {case: (saved object, expected message)}."""
    tensor = torch_files.tensor(np.zeros(3, np.float32))
    code = f"open({str(marker)!r}, 'w').write('x')"
    sparse = torch_files.Global("torch._utils", "_rebuild_sparse_tensor")("coo", ())
    repeated = torch_files.tensor(np.zeros(1, np.float32), 0, (10**6, 10**6), (0, 0))
    no_tensors = "contains no named tensors"
    return {
        "os.system": (Planted(os.system, f"touch {marker}"), no_tensors),
        "eval": ({"model": Planted(eval, code)}, r"'model': __builtin__\.eval"),
        "exec": ({"model": {"a": Planted(exec, code)}}, no_tensors),
        "a function": ({"model": {"a": os.listdir}}, no_tensors),
        "a namespace that calls eval": (
            {
                "model": {"a": tensor},
                "args": argparse.Namespace(x=Planted(eval, code)),
            },
            "not a HiViT: .*\nFound the entries a$",
        ),
        "a list": ([tensor], "contains a list; expected a dict"),
        "a number for a tensor": ({"model": {"a": 3}}, no_tensors),
        "a number for a name": ({"model": {3: tensor}}, no_tensors),
        "sparse": ({"model": {"a": sparse}}, "'a' is not a dense tensor"),
        "one number, repeated": (
            {"model": {"a": repeated}},
            r"'a' has shape \[1000000, 1000000\] and is larger than the file",
        ),
        "nothing": ({}, no_tensors),
        "an empty state dict": ({"model": {}}, no_tensors),
        "another network": ({"state_dict": {"conv1.weight": tensor}}, "not a HiViT"),
        "two networks": (
            {name: torch_files.with_tensors(STATE) for name in ("student", "teacher")},
            "contains several state dicts, student, teacher; expected one",
        ),
        "complex numbers": (
            torch_files.with_tensors(
                with_array("mask_token", np.zeros(8, np.complex64))
            ),
            "mask_token",
        ),
        "double precision": (
            {"model": torch_files.with_tensors(DOUBLE)},
            "x.pth: .* is float64; expected float32",
        ),
    }


@pytest.mark.slow
@pytest.mark.parametrize("case", malicious_and_foreign_cases(""))
def test_malicious_and_foreign_pytorch_files_are_refused(case, tmp_path, capsys):
    marker, path = tmp_path / "marker", tmp_path / "x.pth"
    content, message = malicious_and_foreign_cases(marker)[case]
    for legacy in (False, True):
        check_refused(torch_files.save(content, path, legacy), message, capsys)
    assert not marker.exists()


def test_planted_code_runs_in_pickle(tmp_path):
    """The malicious files of these tests are effective: `pickle.loads` runs them."""
    marker = tmp_path / "marker"
    for case in ("os.system", "eval", "exec"):
        content, _ = malicious_and_foreign_cases(marker)[case]
        pickle.loads(pickle.dumps(content))
        assert marker.exists()
        marker.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize(
    "dtype", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
)
def test_narrower_numbers_are_widened(dtype, suffix, tmp_path):
    """Narrower floats are widened to float32 and keep their values.

    Other dtypes are refused, as in the cases "integers" and "double precision" above.
    """
    state = {n: a.astype(dtype) for n, a in STATE.items()}
    path = tmp_path / f"x.{suffix}"
    if suffix == "pth":
        torch_files.save(torch_files.with_tensors(state), path)
    else:
        codes = {"float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3"}
        path.write_bytes(to_bytes(state, codes.get(dtype, "F8_E5M2")))
    params = read(path, **state_files.NOT_IN_STATE_DICT).params
    expected = state["mask_token"].astype(np.float32).reshape(-1)
    np.testing.assert_array_equal(params["mask_token"], expected)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_umask_determines_the_modes_of_files(mask, tmp_path):
    """A file of weights gets the same mode as any other file."""
    old_mask = os.umask(mask)
    try:
        files.write(tmp_path / "x.safetensors", STATE, "{}")
        (tmp_path / "other").write_text("")
    finally:
        os.umask(old_mask)
    modes = [stat.S_IMODE(os.stat(path).st_mode) for path in tmp_path.iterdir()]
    assert modes == [0o666 & ~mask] * 2


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "x.safetensors"
    files.write(path, STATE, "{}")
    before = path.read_bytes()
    # Makes the next write raise an OSError, as a full disk would.
    (tmp_path / "x.safetensors.incomplete").mkdir()
    with pytest.raises(ConfigError, match="x.safetensors cannot be written: "):
        files.write(path, {"a": STATE["mask_token"]}, "{}")
    assert path.read_bytes() == before
    with pytest.raises(ConfigError, match="cannot be written: No such file"):
        files.write(tmp_path / "nowhere/x.safetensors", STATE, "{}")


def test_invalid_configs_and_absent_paths_are_refused(tmp_path, capsys):
    (tmp_path / "model.safetensors").write_bytes(VALID)
    for text in ("{", "[]", '{"arguments": 3}', '{"arguments": {}}'):
        (tmp_path / "config.json").write_text(text)
        check_refused(
            tmp_path, "config.json cannot be read|invalid model arguments", capsys
        )
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        read(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="nowhere.pth cannot be read"):
        read(tmp_path / "nowhere.pth")
