"""Prepare a dataset: ``python -m hivit_jax.tools.prepare_data --manual_dir DIR``.

Writes array_record shards, which TFDS reads without tensorflow. The shards contain the
examples of a TFDS dataset, in TFDS's order, or with ``--from FILES --out DIR`` the rows
of parquet files.
After an interruption, this command resumes after the last complete shard, whereas
TFDS's own preparation starts over.
"""

import argparse
import os
import re
import signal
import sys
import tarfile
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from http.client import HTTPException
from pathlib import Path
from ssl import SSLError
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from hivit_jax.data.sources.tfds import (
    FEATURES,
    SEVERAL_LABELS,
    supervised_feature_types,
)
from hivit_jax.errors import (
    ConfigError,
    DataError,
    HivitError,
    Interrupted,
    Parser,
    run_command,
    unknown,
)
from hivit_jax.progress import listed
from hivit_jax.tools import parquet
from hivit_jax.tools.record_shards import Splits, is_complete, write_dataset

# Without these variables, tensorflow logs messages when it is imported.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
TRAIN, VALIDATION = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
CONNECT_SECONDS = 20.0  # longest wait for a server's answer
# Flag -> (default, help).
FLAGS = {
    "manual_dir": ("", f"directory of manual downloads: {TRAIN}, {VALIDATION}"),
    "data_dir": (
        "",
        "directory to write to; default: $TFDS_DATA_DIR or ~/tensorflow_datasets",
    ),
    "name": ("", "classification dataset of TFDS to prepare; default: imagenet2012"),
    "from": (
        "",
        "convert parquet files instead: a file, a directory, or a pattern in quotes",
    ),
    "out": ("", "directory for the converted files; its name becomes data.name"),
    "label_column": (
        "",
        "column of the labels in parquet files; default: found by its name or metadata",
    ),
    "short_side": (
        0,
        "shrink larger training images so that their short side has this many pixels, "
        "except images of more than 8 bits; 0: never",
    ),
    "shard_size": (1024, argparse.SUPPRESS),
}


def prepare(
    name: str, manual_dir: str, data_dir: str, short_side: int, shard_size: int
) -> None:
    """Write a dataset of TFDS to data_dir/NAME/VERSION, or resume writing it.

    Args:
      manual_dir: directory of files that TFDS cannot download.
      data_dir: TFDS's data directory; "": TFDS's default.
      short_side, shard_size: see `record_shards.write_dataset`.
    """
    manual_dir, data_dir = map(os.path.expanduser, (manual_dir, data_dir))
    builder = _open_builder(name, data_dir)
    directory = Path(builder.data_dir)
    totals = {} if is_complete(directory) else _check_manual_files(builder, manual_dir)

    def make_splits() -> Splits:
        generators = _generators(builder, manual_dir)
        return {split: (each, totals.get(split)) for split, each in generators.items()}

    write_dataset(builder.info, directory, short_side, shard_size, make_splits)
    root = builder.data_dir_root
    multi_label = supervised_feature_types(builder.info)[1] == SEVERAL_LABELS
    flag = " --config.data.multi_label=True" * multi_label
    print(f"to train on it: --config.data.name={name} --config.data.dir={root}{flag}")


def _open_builder(name: str, data_dir: str) -> Any:
    """Return the TFDS builder of a classification dataset."""
    import tensorflow_datasets as tfds

    known = tfds.list_builders(with_community_datasets=False)
    base = re.split("[:/]", name)[0]
    if base not in known:
        raise unknown("dataset", name, get_close_matches(base, known, n=5, cutoff=0))
    try:
        builder = tfds.builder(name, data_dir=data_dir or None)
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"--name={name}: {_one_line(error)}") from error
    info = builder.info
    types = supervised_feature_types(info)
    if types not in FEATURES:
        raise ConfigError(
            f"--name={name} is not a classification dataset: expected supervised "
            "features (Image, ClassLabel) or (Image, Sequence of ClassLabel), found "
            f"({', '.join(types)})"
        )
    if not info.initialized:
        info.set_file_format("array_record", override=True)
    return builder


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


def _check_manual_files(builder: Any, manual_dir: str) -> dict[str, int]:
    """Check the directory of manual downloads, and ImageNet's tar files in it.

    The tar files are checked for faults that make TFDS omit or mislabel images. Other
    files are not checked.

    Returns:
      {split: number of images} of the splits of which the number is known.

    Raises:
      ConfigError: `manual_dir` is needed but missing, or lacks a tar file.
      DataError: a tar file is damaged or has unexpected entries.
    """
    instructions = " ".join((builder.MANUAL_DOWNLOAD_INSTRUCTIONS or "").split())
    if instructions and not os.path.isdir(manual_dir):
        raise ConfigError(
            f"--manual_dir={manual_dir!r} is not a directory; {instructions}"
        )
    tars = [Path(manual_dir, tar) for tar in (TRAIN, VALIDATION) if tar in instructions]
    missing = [tar.name for tar in tars if not tar.is_file()]
    if missing:
        found = listed(sorted(os.listdir(manual_dir)), 8)
        raise ConfigError(
            f"--manual_dir={manual_dir} has no {' and no '.join(missing)}\n"
            f"found: {found}"
        )
    totals = {}
    for tar in tars:
        try:
            with tarfile.open(tar, "r:") as archive:
                names = sorted(archive.getnames())
        except (tarfile.TarError, OSError) as error:
            reason = f"not a valid tar file (truncated?): {error}"
            raise DataError(f"{tar} is {reason}") from error
        if tar.name == TRAIN:
            wnids = builder.info.features["label"].names
            class_tars = {f"{wnid}.tar" for wnid in wnids}
            if unexpected := sorted(set(names) - class_tars):
                raise DataError(
                    f"{tar}: expected WNID.tar of known classes, found {unexpected[0]}"
                )
            if builder.name == "imagenet2012" and len(names) == len(class_tars):
                totals["train"] = 1_281_167
        else:
            for i, name in enumerate(names, 1):
                if name != (expected := f"ILSVRC2012_val_{i:08d}.JPEG"):
                    raise DataError(
                        f"{tar}: expected {expected}, found {name}; all labels after a "
                        "gap would be wrong"
                    )
            totals["validation"] = len(names)
    return totals


def _generators(builder: Any, manual_dir: str) -> dict[str, Iterable]:
    """Return {split: TFDS's iterable of (key, example)}."""
    import tensorflow as tf
    import tensorflow_datasets as tfds
    from absl import logging

    # Only errors, because TFDS warns that ImageNet's unlabeled test split is missing.
    logging.set_verbosity(logging.ERROR)
    tf.config.set_visible_devices([], "GPU")
    config = tfds.download.DownloadConfig(manual_dir=manual_dir or None)
    manager = builder._make_download_manager(download_dir=None, download_config=config)
    # Check each server first, because TFDS retries for minutes if it is unreachable.
    download = manager._download
    manager._download = lambda resource: download(_check_reachable(resource))
    generators = builder._split_generators(manager)
    if isinstance(generators, list):  # older datasets return SplitGenerators
        generators = {
            str(split.name): builder._generate_examples(**split.gen_kwargs)
            for split in generators
        }
    if builder.name == "imagenet2012":
        generators.pop("test", None)  # this split has no labels
    return generators


def _check_reachable(resource: Any) -> Any:
    """Check that the server of a TFDS resource can be reached; return the resource.

    Other errors, such as those of HTTP and of certificates, are left to TFDS.

    Raises:
      DataError: the server cannot be reached.
    """
    url = resource.url
    if not url.startswith("http"):
        return resource
    try:
        urlopen(Request(url, method="HEAD"), timeout=CONNECT_SECONDS).close()
    except HTTPError:
        pass
    except URLError as error:
        if not isinstance(error.reason, SSLError):  # TFDS uses its own certificates
            raise DataError(
                f"{urlsplit(url).netloc} cannot be reached: {error.reason}\n"
                f"Check the network or the proxy settings, or download {url} elsewhere "
                "into --manual_dir=DIR; then run the same command again"
            ) from error
    except (OSError, HTTPException):
        pass  # the server was reached, but did not answer this request
    return resource


def run(argv: Sequence[str] | None) -> None:
    """Parse the arguments and prepare the dataset. SIGTERM interrupts like Ctrl-C."""
    parser = Parser(
        "python -m hivit_jax.tools.prepare_data",
        description="Write a dataset of TFDS, or parquet files, as array_record "
        "shards that training reads. The same command resumes.",
        allow_abbrev=False,
    )
    for name, (default, text) in FLAGS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
    flags = vars(parser.parse_args(argv))
    source, out, column = (flags.pop(name) for name in ("from", "out", "label_column"))
    if bool(source) != bool(out):
        raise ConfigError("expected both --from=FILES and --out=DIR, or neither")
    if column and not source:
        raise ConfigError(f"--label_column={column} requires --from and --out")
    if source and (flags["manual_dir"] or flags["data_dir"] or flags["name"]):
        raise ConfigError(
            "--from: expected neither --manual_dir nor --data_dir nor --name"
        )
    flags["name"] = flags["name"] or "imagenet2012"
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if source:
            sizes = flags["short_side"], flags["shard_size"]
            parquet.convert(source, out, column, *sizes)
        else:
            prepare(**flags)
    except HivitError:
        raise
    except KeyboardInterrupt:
        raise Interrupted("interrupted; run the same command to resume") from None
    except Exception as error:  # TFDS datasets raise exceptions of many types
        reason = f"{type(error).__name__}: {_one_line(error)}"
        name = source or flags["name"]
        raise DataError(f"{name} cannot be prepared: {reason}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
