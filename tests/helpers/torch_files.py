"""Write files like ``torch.save``, without PyTorch."""

import pickle
import zipfile
from collections import OrderedDict

import numpy as np

STORAGES = {
    "float32": "Float",
    "float16": "Half",
    "bfloat16": "BFloat16",
    "float64": "Double",
    "int64": "Long",
    "uint8": "Byte",
    "bool": "Bool",
    "complex64": "ComplexFloat",
}
MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001


class Global:
    """Name of a class or function in a pickle. Calling a `Global` returns a `Call`."""

    def __init__(self, module, name):
        self.module, self.name = module, name

    def __call__(self, *args, state=None, items=None):
        return Call(self, args, state, items)


class Call:
    """Object that a pickle creates by a call and then fills with state and items."""

    def __init__(self, *parts):
        self.parts = parts

    def __reduce__(self):
        function, args, state, items = self.parts
        return function, args, state, None, iter((items or {}).items())


class Storage:
    """Storage of a tensor: a flat array, and the name of its type, such as "Float"."""

    def __init__(self, array, kind):
        self.array, self.kind = np.ascontiguousarray(array).reshape(-1), kind


class Writer(pickle._Pickler):
    """Pickler that writes `Global` objects as names, `Storage` objects as IDs."""

    def __init__(self, file, legacy):
        super().__init__(file, 2)
        self.storages, self.legacy = [], legacy

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Global):
            self.write(f"c{obj.module}\n{obj.name}\n".encode())
        else:
            super().save(obj, save_persistent_id)

    def persistent_id(self, obj):
        if not isinstance(obj, Storage):
            return None
        self.storages.append(obj)
        storage_type = Global("torch", f"{obj.kind}Storage")
        key = str(len(self.storages) - 1)
        view = (None,) if self.legacy else ()
        return ("storage", storage_type, key, "cpu", obj.array.size, *view)


def tensor(array, offset=0, shape=None, strides=None):
    """Return an object that `Writer` pickles as a tensor on the storage of an array.

    Without `shape`, the tensor has the offset, shape and strides of the array. With
    `shape`, pass `strides` too.
    """
    base = array if array.base is None else array.base
    if shape is None:
        shape, strides = array.shape, [s // array.itemsize for s in array.strides]
        start, base_start = (x.__array_interface__["data"][0] for x in (array, base))
        offset = (start - base_start) // array.itemsize
    if name := STORAGES.get(array.dtype.name):
        storage, function, extra = Storage(base, name), "_rebuild_tensor_v2", ()
    else:  # Newer dtypes have no storage type of their own.
        storage = Storage(base.reshape(-1).view(np.uint8), "Untyped")
        function, extra = "_rebuild_tensor_v3", (Global("torch", array.dtype.name),)
    return Global("torch._utils", function)(
        storage, offset, tuple(shape), tuple(strides), False, OrderedDict(), *extra
    )


def with_tensors(content):
    """Replace arrays in nested dicts by objects that `Writer` pickles as tensors."""
    if isinstance(content, dict):
        return {key: with_tensors(value) for key, value in content.items()}
    return tensor(content) if isinstance(content, np.ndarray) else content


def save(content, path, legacy=False):
    """Write a file like ``torch.save``; return its path.

    Args:
      legacy: write the format of versions before PyTorch 1.6.
    """
    if not legacy:
        with zipfile.ZipFile(path, "w") as archive:
            with archive.open("x/data.pkl", "w") as file:
                writer = Writer(file, legacy)
                writer.dump(content)
            archive.writestr("x/byteorder", "little")
            for key, storage in enumerate(writer.storages):
                archive.writestr(f"x/data/{key}", storage.array.tobytes())
        return path
    with open(path, "wb") as file:
        for header in (MAGIC, VERSION, {"little_endian": True}):
            pickle.dump(header, file, 2)
        writer = Writer(file, legacy)
        writer.dump(content)
        pickle.dump([str(key) for key in range(len(writer.storages))], file, 2)
        for storage in writer.storages:
            file.write(storage.array.size.to_bytes(8, "little"))
            file.write(storage.array.tobytes())
    return path
