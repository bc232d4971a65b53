"""Tests of reading files of ``torch.save`` without PyTorch and without running code.

Every class and function that a file names is replaced by an inert stand-in. Dense
tensors and NumPy arrays of numbers are read. Sparse, quantized, conjugated and
big-endian tensors are refused, and so are inconsistent files.
"""

import copyreg
import os
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch_files
from torch_files import Global, tensor

from hivit_jax.errors import CheckpointError
from hivit_jax.weights.torch_format import StandIn, TorchFile, is_array

BOTH_FORMATS = pytest.mark.parametrize("legacy", [False, True])
NUMBERS = np.arange(24.0, dtype=np.float32).reshape(2, 3, 4)


def read(path, name="a"):
    """Return an array of a PyTorch file."""
    file = TorchFile(path)
    return file.array(name, file.content[name])


@BOTH_FORMATS
@pytest.mark.parametrize(
    "array",
    [
        *(NUMBERS.astype(dtype) for dtype in (*torch_files.STORAGES, "uint16")),
        NUMBERS.astype(ml_dtypes.float8_e4m3fn),
        NUMBERS.astype(ml_dtypes.float8_e5m2),
        NUMBERS.T,
        NUMBERS.swapaxes(0, 1),
        NUMBERS[:, ::2, ::3],
        np.broadcast_to(NUMBERS[0, 0, 0], (2, 2)),
        np.zeros((0, 3), np.float32),
        np.array(3.0, np.float32),
    ],
    ids=lambda array: f"{array.dtype}{array.strides}",
)
def test_tensors_of_every_dtype_and_view_are_read(array, legacy, tmp_path):
    loaded = read(torch_files.save({"a": tensor(array)}, tmp_path / "x.pth", legacy))
    assert loaded.dtype == array.dtype
    np.testing.assert_array_equal(loaded, array)


@BOTH_FORMATS
def test_objects_of_unknown_classes_are_read(legacy, tmp_path):
    """Configs and other objects are read, although their classes are not installed."""
    history = Global("mmengine.logging.history_buffer", "HistoryBuffer")
    dtype = Global("numpy", "dtype")("f8", False, True, state=(3, "<", None))
    content = {
        "config": Global("yacs.config", "CfgNode")(state={"frozen": 1}, items={"A": 1}),
        "message_hub": {"log": history(state={"_log_history": [1.0]})},
        "best": Global("numpy._core.multiarray", "scalar")(dtype, b"\0" * 8),
        Global("pathlib", "PosixPath")("a"): Global("builtins", "getattr")("a", "b"),
        "a": tensor(NUMBERS),
    }
    file = TorchFile(torch_files.save(content, tmp_path / "x.pth", legacy))
    assert file.content["config"] == file.content["config"]
    assert file.content["config"]["A"] == 1
    assert file.content["config"].source == "yacs.config.CfgNode"
    assert not is_array(file.content["best"])
    np.testing.assert_array_equal(file.array("a", file.content["a"]), NUMBERS)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("dtype", [">f4", "<i8", "float16", "bool"])
def test_numpy_arrays_in_a_plain_pickle_are_read(protocol, dtype, tmp_path):
    """Byte order and axis order are arbitrary; arrays of objects are refused."""
    array = (np.arange(6).reshape(2, 3) % 2).astype(dtype)
    content = {"a": array, "f": np.asfortranarray(array)}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content, protocol))
    file = TorchFile(tmp_path / "x.pkl")
    for name, record in file.content.items():
        loaded = file.array(name, record)
        np.testing.assert_array_equal(loaded, array)
        assert loaded.dtype.isnative
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"a": array.astype(object)}, 2))
    with pytest.raises(CheckpointError, match="'a' has dtype 'O8'; expected numbers"):
        read(tmp_path / "x.pkl")


def test_parameters_and_subclasses_are_read_as_arrays(tmp_path):
    inner = tensor(NUMBERS)
    function, args, *_ = inner.parts
    parameter, older_tensor = (
        Global("torch._utils", f"_rebuild_{name}") for name in ("parameter", "tensor")
    )
    subclass = Global("torch._tensor", "_rebuild_from_type_v2")
    content = {
        "a": parameter(inner, True, {}),
        "b": subclass(function, Global("my", "Tensor"), args, {}),
        "c": older_tensor(*args[:4]),
    }
    path = torch_files.save(content, tmp_path / "x.pth")
    for name in content:
        np.testing.assert_array_equal(read(path, name), NUMBERS)


def planted_programs(marker):
    """Return {case: pickle that names a function or class and tries to use it}.

    With `pickle.loads`, some of the pickles would run a command.
    """
    command = f"touch {marker}".encode()
    text = b"X" + struct.pack("<I", len(command)) + command  # BINUNICODE
    system = b"cos\nsystem\n"
    code = b"X" + struct.pack("<I", 4) + b"eval"
    return {
        "REDUCE": b"\x80\x02" + system + text + b"\x85R.",
        "INST": b"\x80\x02(" + text + b"ios\nsystem\n.",
        "OBJ": b"\x80\x02(" + system + text + b"o.",
        "NEWOBJ": b"\x80\x02" + system + text + b"\x85\x81.",
        "NEWOBJ_EX": b"\x80\x04" + system + text + b"\x85}\x92.",
        "STACK_GLOBAL": b"\x80\x04X\x02\0\0\0osX\x06\0\0\0system\x93"
        + text
        + b"\x85R.",
        "result of a call": b"\x80\x02cbuiltins\ngetattr\ncos\nsystem\n"
        + code
        + b"\x86R"
        + text
        + b"\x85R.",
        "BUILD": b"\x80\x02cos\nsystem\n)R" + text + b"b" + text + b"\x85R.",
        "BUILD of a slot": b"\x80\x02cmy\nClass\n)RN}X\4\0\0\0args"
        + system
        + b"s\x86b.",
        "a dotted name": b"\x80\x04X\x02\0\0\0osX\x0b\0\0\0path.os.sys\x93"
        + text
        + b"\x85R.",
        "PERSID": b"\x80\x02(X\x06\0\0\0module" + system + b"tQ" + text + b"\x85R.",
    }


@BOTH_FORMATS
@pytest.mark.parametrize("case", planted_programs(""))
def test_no_opcode_runs_a_command(case, legacy, tmp_path):
    path, marker = tmp_path / "x.pth", tmp_path / "marker"
    program = planted_programs(marker)[case]
    before = dict(vars(StandIn))
    if legacy:
        path.write_bytes(program)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x/data.pkl", program)
    assert isinstance(TorchFile(path).content, StandIn)
    assert not marker.exists()
    assert dict(vars(StandIn)) == before


def test_unsafe_opcodes_are_refused(tmp_path):
    """Files must not set the state of a class, use extensions or need a huge memo."""
    path = tmp_path / "x.pth"
    copyreg.add_extension("os", "system", 0x7E)
    try:
        for program in (
            b"\x80\x02cmy\nClass\n}X\4\0\0\0argsK\1sb.",  # BUILD on a class
            b"\x80\x02ccollections\nOrderedDict\nN}X\5\0\0\0itemsNs\x86b.",
            b"\x80\x02\x82\x7e)R.",  # EXT1
            b"\x80\x02X\2\0\0\0osr\xff\xff\xff\x7f.",  # a memo of 2**31 entries
        ):
            path.write_bytes(program)
            with pytest.raises(CheckpointError, match="is damaged or truncated"):
                TorchFile(path)
    finally:
        copyreg.remove_extension("os", "system", 0x7E)
    assert os.system.__name__ == "system"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(offset=9), "incompatible with .* size of buffer"),
        (dict(offset=-1), "negative offset, size or stride"),
        (dict(shape=(3, 9), strides=(9, 1)), "incompatible with .* size of buffer"),
        (dict(shape=(10**6, 10**6), strides=(0, 0)), "is larger than the file"),
        (dict(shape=(4,), strides=(-1,)), "negative offset, size or stride"),
        (dict(shape=(4,), strides=(1, 1)), "strides"),
    ],
)
@BOTH_FORMATS
def test_tensors_outside_their_storage_are_refused(change, message, legacy, tmp_path):
    change = dict(shape=(2, 12), strides=(12, 1)) | change
    path = torch_files.save(
        {"a": tensor(NUMBERS, **change)}, tmp_path / "x.pth", legacy
    )
    with pytest.raises(CheckpointError, match=f"'a' .*{message}"):
        read(path)


@pytest.mark.parametrize("name", ["sparse_tensor", "qtensor", "meta_tensor_no_storage"])
def test_tensors_that_are_not_dense_are_refused(name, tmp_path):
    other = Global("torch._utils", f"_rebuild_{name}")("cpu", (3,))
    path = torch_files.save({"a": other, "b": tensor(NUMBERS)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="'a' is not a dense tensor"):
        read(path)
    np.testing.assert_array_equal(read(path, "b"), NUMBERS)


@pytest.mark.parametrize("flag", ["conj", "neg"])
def test_conjugated_and_negated_tensors_are_refused(flag, tmp_path):
    """The storage of such a tensor contains other numbers than the tensor."""
    function, args, *_ = tensor(NUMBERS).parts
    flagged = function(*args, {flag: True})
    path = torch_files.save({"a": flagged}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="'a' is lazily conjugated or negated"):
        read(path)


@BOTH_FORMATS
def test_damaged_files_are_refused(legacy, tmp_path):
    """Truncated files are refused, and so are changed numbers in zip archives."""
    path = torch_files.save({"a": tensor(NUMBERS)}, tmp_path / "x.pth", legacy)
    content = path.read_bytes()
    for length in (*range(0, len(content) - 1, 97), len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"x.pth"):
            read(path)
    if not legacy:
        start = content.index(NUMBERS.tobytes())
        path.write_bytes(content[:start] + b"\1" + content[start + 1 :])
        with pytest.raises(CheckpointError, match="'a' Bad CRC-32"):
            read(path)


def test_unsupported_zip_archives_are_refused(tmp_path):
    """NumPy archives, TorchScript programs and big-endian files are refused.

    Archives whose checksums are all 0 are supported.
    """
    path = torch_files.save({"a": tensor(NUMBERS)}, tmp_path / "x.pth")
    content = bytearray(path.read_bytes())
    for header, offset in ((b"PK\3\4", 14), (b"PK\1\2", 16)):
        start = -1
        while (start := content.find(header, start + 1)) >= 0:
            content[start + offset : start + offset + 4] = bytes(4)
    path.write_bytes(content)
    np.testing.assert_array_equal(read(path), NUMBERS)
    np.savez(tmp_path / "x.npz", a=NUMBERS)
    with pytest.raises(CheckpointError, match=r"is a zip file of .*, with a\.npy"):
        TorchFile(tmp_path / "x.npz")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("x/constants.pkl", b"")
    with pytest.raises(CheckpointError, match="is a TorchScript program"):
        TorchFile(path)
    little_endian = torch_files.save({}, tmp_path / "little.pth").read_bytes()
    path.write_bytes(little_endian.replace(b"little", b"bigbig"))
    with pytest.raises(CheckpointError):
        TorchFile(path)
