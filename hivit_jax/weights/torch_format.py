"""Read PyTorch files without PyTorch, and without running any code from the files.

``torch.save`` writes a pickle and the bytes of the tensors. A pickle is a program that
calls functions by name. Here every name becomes a `StandIn`, which records the
arguments of a call and calls nothing. Arrays are built from these records on request.
"""

import io
import math
import pickle
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from hivit_jax.errors import CheckpointError, first_line
from hivit_jax.progress import listed

# First object in files of the format before PyTorch 1.6.
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
# Functions of PyTorch and NumPy whose records describe an array.
ARRAY_SOURCES = re.compile(
    r"torch\._?(utils|tensor)\._rebuild_\w+"
    r"|numpy\._?core\.(multiarray\._reconstruct|numeric\._frombuffer)"
)
STORAGE_DTYPES = {
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Float": "float32",
    "Double": "float64",
    "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
    "Char": "int8",
    "Short": "int16",
    "Int": "int32",
    "Long": "int64",
    "Byte": "uint8",
    "Untyped": "uint8",
    "Bool": "bool",
    "QInt8": "int8",  # only for the size, because quantized tensors are refused
    "QUInt8": "uint8",
    "QInt32": "int32",
}


class StandIn(dict):
    """Inert substitute for a class or function that a pickle names, or for its result.

    A stand-in calls nothing, but keeps the items that the file sets, so that objects of
    subclasses of dict can be read.

    source: ``module.name`` in the file.
    args: arguments of the recorded call.
    state: attributes that the file sets, or None.
    """

    source = ""
    # Without these, a stand-in could not be a key of a dict.
    __hash__, __eq__ = object.__hash__, object.__eq__

    def __new__(cls, /, *args: Any, **kwargs: Any):
        self = super().__new__(cls)
        self.args, self.state = args, None
        return self

    def __init__(self, *args: Any, **kwargs: Any):
        if self.source == "collections.OrderedDict":  # pickled by Python 2
            self.update(*args)

    def __call__(self, *args: Any, **kwargs: Any) -> "StandIn":
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, item: Any) -> None:
        """Ignore an item of a list or set; no model needs these items."""

    add = extend = append


class _Unpickler(pickle.Unpickler):
    """Unpickler that replaces every class and function by a stand-in.

    pids: {key of a storage: its persistent id}, filled while the file is read.
    """

    def __init__(self, file: BinaryIO, pids: dict[str, tuple]):
        super().__init__(file, encoding="latin1")
        self._pids, self._classes = pids, {}

    def find_class(self, module: str, name: str) -> type[StandIn]:
        source = f"{module}.{name}"
        if source not in self._classes:
            self._classes[source] = type("StandIn", (StandIn,), {"source": source})
        return self._classes[source]

    def persistent_load(self, pid: Any) -> Any:
        if pid[0] == "module":  # a class with its source code, which is not needed
            return pid[1]
        # pid: "storage", type, key, device, number of elements, perhaps a view
        self._pids[pid[2]] = pid
        return pid


def _unpickle(file: BinaryIO, pids: dict[str, tuple]) -> Any:
    """Return the next object of a file, and advance the file to the object's end."""
    start = file.tell()
    for opcode, arg, position in pickletools.genops(file):
        # Refused, because registered extensions bypass `find_class`, and PUT with a
        # large index would allocate a memo of that size.
        extension = opcode.name.startswith("EXT")
        if extension or (opcode.name.endswith("PUT") and arg > position):
            raise ValueError(f"unexpected opcode {opcode.name}")
    end = file.tell()
    file.seek(start)
    content = _Unpickler(file, pids).load()
    file.seek(end)
    return content


def is_array(value: Any) -> bool:
    """Return True if an object of a file is a tensor or a NumPy array."""
    return isinstance(value, StandIn) and bool(ARRAY_SOURCES.fullmatch(value.source))


class TorchFile:
    """Contents of a file of ``torch.save``, or of a plain pickle.

    content: the saved object, with stand-ins for everything except plain values.
    """

    content: Any

    def __init__(self, path: Path):
        """Read everything except the tensors of a file.

        Raises:
          CheckpointError: the file is damaged or has another format.
        """
        self._path, self._size = path, path.stat().st_size
        self._pids: dict[str, tuple] = {}
        self._data: dict[str, bytes] = {}
        self._members: dict[str, zipfile.ZipInfo] = {}
        self._offsets: dict[str, int] = {}
        try:
            with path.open("rb") as file:
                is_archive = file.read(2) == b"PK"
            self._read_archive() if is_archive else self._read_legacy()
        except CheckpointError:
            raise
        except Exception as error:  # damaged files cause exceptions of many types
            raise CheckpointError(
                f"{path} is damaged or truncated: {first_line(error)[:200]}"
            ) from error

    def array(self, name: str, record: StandIn) -> np.ndarray:
        """Return a tensor or NumPy array of `content`; errors contain `name`.

        Raises:
          CheckpointError: the array is not supported, or its data are missing or
            damaged.
        """
        try:
            return self._array(record)
        except Exception as error:  # damaged files cause exceptions of many types
            reason = first_line(error)[:200]
            raise CheckpointError(f"{self._path}: {name!r} {reason}") from error

    def _read_archive(self) -> None:
        with zipfile.ZipFile(self._path) as archive:
            members = archive.infolist()
            names = [member.filename for member in members]
            found = [name for name in names if name.rpartition("/")[2] == "data.pkl"]
            script = any(name.endswith("constants.pkl") for name in names)
            if script or len(found) != 1:
                kind = "TorchScript program" if script else "zip file of other software"
                raise CheckpointError(
                    f"{self._path} is a {kind}, with {listed(names, 3)}; expected a "
                    "state dict that torch.save wrote"
                )
            for member in members:
                if member.compress_type != zipfile.ZIP_STORED:
                    raise CheckpointError(
                        f"{self._path}: {member.filename!r} is compressed, which "
                        "PyTorch never does"
                    )
            if sum(member.file_size for member in members) > self._size:
                raise CheckpointError(f"{self._path}: members of the archive overlap")
            if not any(member.CRC for member in members):
                # torch.serialization.set_crc32_options(False) leaves all checksums 0.
                for member in members:
                    member.CRC = None
            root = found[0].removesuffix("data.pkl")
            self._members = {m.filename.removeprefix(root): m for m in members}
            if "byteorder" in self._members:
                self._check_byte_order(archive.read(f"{root}byteorder") == b"little")
            file = io.BytesIO(archive.read(found[0]))
        self.content = _unpickle(file, self._pids)

    def _check_byte_order(self, little_endian: bool) -> None:
        if not little_endian:
            raise CheckpointError(f"{self._path} is big-endian; expected little-endian")

    def _read_legacy(self) -> None:
        with self._path.open("rb") as file:
            self.content = _unpickle(file, self._pids)
            if self.content != LEGACY_MAGIC:
                return  # a plain pickle, for example of NumPy arrays
            _, system = (_unpickle(file, {}) for _ in range(2))  # version, system
            self._check_byte_order(system.get("little_endian", True))
            self.content = _unpickle(file, self._pids)
            for key in _unpickle(file, {}):
                count = int.from_bytes(file.read(8), "little")
                self._offsets[key] = file.tell()
                if count != self._pids[key][4]:
                    raise ValueError(f"storage {key} has {count} elements")
                file.seek(count * _storage_dtype(self._pids[key]).itemsize, 1)
            if file.tell() > self._size:
                raise ValueError(f"{self._size:,} bytes, expected {file.tell():,}")

    def _storage_bytes(self, pid: tuple) -> bytes:
        key = pid[2]
        size = pid[4] * _storage_dtype(pid).itemsize
        if key not in self._data:
            if self._members:
                with zipfile.ZipFile(self._path) as archive:
                    self._data[key] = archive.read(self._members[f"data/{key}"])
            else:
                with self._path.open("rb") as file:
                    file.seek(self._offsets[key])
                    self._data[key] = file.read(size)
        if len(self._data[key]) != size:
            raise ValueError(f"has {len(self._data[key])} bytes; expected {size}")
        return self._data[key]

    def _array(self, record: StandIn) -> np.ndarray:
        source, args = record.source, record.args
        function = source.rpartition(".")[2]
        if function.startswith("_rebuild_parameter"):
            return self._array(args[0])
        if function == "_rebuild_from_type_v2":  # a subclass of Tensor
            return self._array(args[0](*args[2]))
        if source.startswith("numpy"):
            return _numpy_array(record)
        if not re.fullmatch("_rebuild_tensor(_v2|_v3)?", function):
            raise ValueError("is not a dense tensor")
        pid, offset, shape, strides = args[:4]
        has_dtype = function.endswith("v3")  # in args[6], before the metadata
        metadata = args[7 if has_dtype else 6 :][:1]
        if any(metadata) and any(metadata[0].values()):
            raise ValueError("is lazily conjugated or negated; save its clone()")
        dtype = _dtype(args[6].source) if has_dtype else _storage_dtype(pid)
        offset *= dtype.itemsize
        if len(pid) > 5 and pid[5]:  # a view of a storage
            offset += pid[5][1] * dtype.itemsize
        if min((offset, *shape, *strides)) < 0:
            raise ValueError("has a negative offset, size or stride")
        if math.prod(shape) * dtype.itemsize > self._size:
            raise ValueError(f"has shape {list(shape)} and is larger than the file")
        strides = [stride * dtype.itemsize for stride in strides]
        # NumPy raises an error if the array would reach beyond the storage.
        return np.ndarray(shape, dtype, self._storage_bytes(pid), offset, strides)


def _storage_dtype(pid: tuple) -> np.dtype:
    kind = pid[1].source.rpartition(".")[2].removesuffix("Storage")
    if kind not in STORAGE_DTYPES:
        raise ValueError(f"has the unsupported type {kind}Storage")
    return _dtype(STORAGE_DTYPES[kind])


def _dtype(name: str) -> np.dtype:
    """Return a dtype from its name in NumPy or PyTorch, such as ``torch.float16``."""
    name = name.removeprefix("torch.")
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    if dtype.hasobject:
        raise ValueError(f"has dtype {name!r}; expected numbers")
    return dtype


def _numpy_array(record: StandIn) -> np.ndarray:
    if record.source.endswith("._frombuffer"):
        data, dtype, shape, order = record.args
    else:
        _, shape, dtype, fortran, data = record.state
        order = "F" if fortran else "C"
    if isinstance(data, StandIn):  # _codecs.encode(text, "latin1")
        data = data.args[0]
    if isinstance(data, str):
        data = data.encode("latin1")
    if not re.fullmatch("[biufc][0-9]+", dtype.args[0]):
        raise ValueError(f"has dtype {dtype.args[0]!r}; expected numbers")
    file_dtype = np.dtype(dtype.args[0]).newbyteorder(dtype.state[1].replace("|", "="))
    array = np.frombuffer(data, file_dtype).reshape(shape, order=order)
    return array.astype(file_dtype.newbyteorder("="), copy=False)
