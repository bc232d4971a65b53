"""Conversion of parquet files, such as files from the Hugging Face hub."""

import glob
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hivit_jax.data.sources.base import KNOWN_DATASETS
from hivit_jax.errors import ConfigError, DataError, first_line, require
from hivit_jax.paths import expand
from hivit_jax.tools.record_shards import Splits, is_complete, write_dataset

# Word -> split. A file's name is searched for these words before its directory's name.
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "category")
VERSION = "1.0.0"  # TFDS reads datasets from NAME/VERSION
MAX_LISTED = 20  # skipped rows that are printed
ROWS_PER_READ = 64


class Columns(NamedTuple):
    """Columns of images and labels.

    Attributes:
      image: name of the column of image files, or of structs with a field "bytes".
      label: name of the column of labels: numbers, texts, or lists of either.
      class_names: class names in the metadata; None: there are none.
      several_labels: True if the labels are lists.
    """

    image: str
    label: str
    class_names: list[str] | None
    several_labels: bool


def convert(
    pattern: str, out: str, label_column: str, short_side: int, shard_size: int
) -> None:
    """Write the rows of parquet files to OUT/1.0.0, or resume writing them.

    The names of the files and directories determine the splits. Class names come from
    the Hugging Face metadata. Without metadata, they are the sorted texts in the label
    column or, if the column contains integers, the numbers from 0 to the largest. Rows
    without image or valid label are left out.

    Args:
      pattern: a file, a directory that is searched recursively, or a glob pattern.
      out: directory; its name becomes `data.name`.
      label_column: name; "": one of `LABEL_COLUMNS`, or a column with class names.
      short_side, shard_size: see `record_shards.write_dataset`.

    Raises:
      ConfigError: no file is found, `out` is not usable, or no column has labels.
      DataError: a file is damaged, or the files do not have the same columns.
      MissingPackage: pyarrow or tensorflow-datasets is not installed.
    """
    require("pyarrow.parquet", "hivit-jax[parquet]")
    tfds = require("tensorflow_datasets", "tensorflow-datasets")
    directory = Path(expand(out)).absolute()
    name = directory.name
    if not re.fullmatch(r"[A-Za-z]\w*", name) or name in KNOWN_DATASETS:
        raise ConfigError(
            f"--out={out}: expected a directory such as data/birds, whose name becomes "
            "data.name; it must begin with a letter, contain only letters, digits and "
            f"_, and not be one of {', '.join(KNOWN_DATASETS)}"
        )
    files = _find_files(pattern)
    columns = _columns(files, label_column)
    class_names = columns.class_names or _class_names(files, columns)
    features = tfds.features
    label = features.ClassLabel(names=class_names)
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=name, version=VERSION, data_dir=str(directory / VERSION), module_name=""
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        features=features.FeaturesDict(
            {
                "image": features.Image(),
                "label": features.Sequence(label) if columns.several_labels else label,
                "file_name": features.Text(),
            }
        ),
        supervised_keys=("image", "label"),
    )
    info.set_file_format("array_record", override=True)
    target = directory / VERSION
    if is_complete(target):
        info.read_from_directory(target)
    index_of = {class_name: k for k, class_name in enumerate(class_names)}
    write_dataset(
        info, target, short_side, shard_size, lambda: _splits(files, columns, index_of)
    )
    print(f"to train on it: {' '.join(_flags(directory, info, columns))}")


def _flags(directory: Path, info: Any, columns: Columns) -> list[str]:
    """Return the flags that select the converted dataset."""
    flags = [f"name={directory.name}", f"dir={directory.parent}"]
    if columns.several_labels:
        flags.append("multi_label=True")
    if "validation" not in info.splits:
        flags.append(f"eval_split={'test' if 'test' in info.splits else 'none'}")
    return [f"--config.data.{flag}" for flag in flags]


def _find_files(pattern: str) -> dict[str, list[Path]]:
    """Return the sorted files of each split."""
    path = Path(expand(pattern))
    found = [*path.rglob("*.parquet")] if path.is_dir() else [path]
    if not path.exists():
        found = [Path(file) for file in glob.glob(str(path), recursive=True)]
    if not found:
        raise ConfigError(f"--from={pattern}: expected parquet files, found none")
    files: dict[str, list[Path]] = {}
    for file in sorted(found):
        texts = file.stem.lower(), file.absolute().parent.name.lower()
        words = [word for text in texts for word in re.findall("[a-z]+", text)]
        splits = (SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES)
        files.setdefault(next(splits, "train"), []).append(file)
    return dict(sorted(files.items()))


def _call_pyarrow(file: Path, function: str, *arguments: Any, **options: Any) -> Any:
    """Call a function of pyarrow.parquet; raise DataError for a damaged file."""
    import pyarrow.parquet

    try:
        return getattr(pyarrow.parquet, function)(file, *arguments, **options)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{file} is not a valid parquet file (truncated?): {first_line(error)}"
        ) from error


def _columns(files: dict[str, list[Path]], label_column: str) -> Columns:
    """Return the columns of the files.

    Raises:
      ConfigError: the column of the labels is unknown.
      DataError: there is no column of images, or the files differ.
    """
    paths = [path for group in files.values() for path in group]
    schemas = [_call_pyarrow(path, "read_schema") for path in paths]
    schema, features = schemas[0], _features(schemas[0])
    image_columns = [field.name for field in schema if _is_image_type(field.type)]
    candidates = [label_column] if label_column else []
    candidates += [name for name in LABEL_COLUMNS if name in schema.names]
    candidates += [name for name, feature in features.items() if _names_of(feature)[0]]
    if not image_columns:
        raise DataError(f"{paths[0]}: no column of images in {', '.join(schema.names)}")
    if not candidates or candidates[0] not in schema.names:
        raise ConfigError(
            f"--label_column={label_column!r}: expected one of the columns of "
            f"{paths[0]}: {', '.join(schema.names)}"
        )
    image, label = image_columns[0], candidates[0]
    for path, other in zip(paths, schemas, strict=True):
        for name in (image, label):
            if (
                name not in other.names
                or other.field(name).type != schema.field(name).type
            ):
                raise DataError(f"{path}: expected column {name!r} as in {paths[0]}")
    class_names, several_labels = _names_of(features.get(label))
    several_labels |= hasattr(schema.field(label).type, "value_field")
    return Columns(image, label, class_names, several_labels)


def _features(schema: Any) -> dict[str, Any]:
    """Return the features that Hugging Face's metadata describe; {} without them."""
    text = (schema.metadata or {}).get(b"huggingface", b"{}")
    return json.loads(text).get("info", {}).get("features", {})


def _is_image_type(arrow_type: Any) -> bool:
    if hasattr(arrow_type, "get_field_index"):  # a struct
        return arrow_type.get_field_index("bytes") >= 0
    return str(arrow_type) in ("binary", "large_binary")


def _names_of(feature: Any) -> tuple[list[str] | None, bool]:
    """Return a feature's class names or None, and True for a sequence of labels."""
    if isinstance(feature, list) and feature:
        return _names_of(feature[0])[0], True
    if isinstance(feature, dict):
        if isinstance(feature.get("feature"), dict):
            return _names_of(feature["feature"])[0], True
        return feature.get("names"), False
    return None, False


def _labels(file: Path, columns: Columns) -> list[list[int | str] | None]:
    """Return the labels of each row of a file, or None where they are unknown."""
    table = _call_pyarrow(file, "read_table", columns=[columns.label])
    return [*map(_as_list, table.column(0).to_pylist())]


def _as_list(value: Any) -> list[int | str] | None:
    return value if value is None or isinstance(value, list) else [value]


def _class_names(files: dict[str, list[Path]], columns: Columns) -> list[str]:
    """Return class names that are derived from the labels in the files."""
    paths = [path for group in files.values() for path in group]
    rows = [labels for path in paths for labels in _labels(path, columns) if labels]
    found = {label for labels in rows for label in labels if label is not None}
    if found and all(type(label) is int for label in found):
        return [*map(str, range(max(found) + 1))]
    if not found or not all(isinstance(label, str) for label in found):
        raise DataError(
            f"{paths[0]}: expected integers or texts in column {columns.label!r}, "
            f"found {next(iter(found), 'nothing')!r}"
        )
    return sorted(found)


def _class_indices(labels: list | None, index_of: dict[str, int]) -> list[int] | None:
    """Return the class indices of an image; None if a label is missing or unknown."""
    if labels is None:
        return None
    indices = [index_of.get(x, -1) if isinstance(x, str) else x for x in labels]
    valid = all(k is not None and 0 <= k < len(index_of) for k in indices)
    return [int(k) for k in indices] if valid else None


def _splits(
    files: dict[str, list[Path]], columns: Columns, index_of: dict[str, int]
) -> Splits:
    """Return the examples of each split and the number of its rows.

    Splits in which no row has a valid label are left out.
    """
    splits = {}
    for split, paths in files.items():
        rows = [labels for path in paths for labels in _labels(path, columns)]
        if all(_class_indices(labels, index_of) is None for labels in rows):
            print(f"split {split} is left out: no valid label in {len(rows):,} rows")
            continue
        splits[split] = _examples(paths, columns, index_of), len(rows)
    if not splits:
        raise DataError(f"no row of column {columns.label!r} has a valid label")
    return splits


def _examples(
    files: Sequence[Path], columns: Columns, index_of: dict[str, int]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (key, example) of each row with image and valid label; print the others."""
    skipped = 0
    for file in files:
        for row, (image, label) in enumerate(_rows(file, columns)):
            content = image.get("bytes") if isinstance(image, dict) else image
            path = image.get("path") if isinstance(image, dict) else None
            indices = _class_indices(_as_list(label), index_of)
            key = f"{file.name}[{row}]"
            if not content or indices is None:
                reason = "no valid label" if content else "no image"
                skipped += 1
                if skipped <= MAX_LISTED:
                    print(f"skipped {key}: {reason}")
                continue
            name = f"{key} {path}" if path else key
            yield (
                key,
                {
                    "image": io.BytesIO(content),
                    "label": indices if columns.several_labels else indices[0],
                    "file_name": name,
                },
            )
    if skipped > MAX_LISTED:
        print(f"skipped {skipped:,} rows in total")


def _rows(file: Path, columns: Columns) -> Iterator[tuple[Any, Any]]:
    """Yield the image and the label of each row.

    Raises:
      DataError: the file is damaged.
    """
    import pyarrow

    opened = _call_pyarrow(file, "ParquetFile")
    names = [columns.image, columns.label]
    try:
        for batch in opened.iter_batches(ROWS_PER_READ, columns=names):
            parts = [batch.column(name).to_pylist() for name in names]
            yield from zip(*parts, strict=True)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file} is damaged: {first_line(error)}") from error
