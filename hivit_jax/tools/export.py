"""A model as one file: ``python -m hivit_jax.tools.export --checkpoint A --out B``.

It holds the program and the parameters, for any batch size: StableHLO as `jax.export`
serialises it, which needs nothing of this library, or ONNX where FILE ends in .onnx.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import export as stablehlo

from hivit_jax import errors
from hivit_jax.errors import CheckpointError, ConfigError, HivitError
from hivit_jax.models import Model
from hivit_jax.models.classifier import Classifier
from hivit_jax.reporting.console import log

WHAT = ("classifier", "features")
PLATFORMS = ("cpu", "cuda", "tpu")


def export(
    model: Model, what: str = "classifier", platforms: Sequence[str] = PLATFORMS
) -> bytes:
    """The model as `jax.export` serialises it, its parameters once for all platforms.

    Args:
      what: "classifier", images -> logits [b, num_classes] float32; or "features",
        images -> tuple of the maps of `HiViT.features`, in compute dtype. Images are
        [b, H, W, C] float32, normalised, and b is any number from 1.
      platforms: what it shall run on.

    Raises:
      ConfigError: an unknown choice, the classifier of a masked autoencoder, or
        flatbuffers is not installed.
    """
    for platform in platforms:
        if platform not in PLATFORMS:
            raise errors.unknown("platform", platform, PLATFORMS)
    function = jax.jit(_function(model, what))
    _package("flatbuffers", "export")
    exported = stablehlo.export(function, platforms=tuple(platforms))(_images(model))
    return bytes(exported.serialize())


def export_onnx(model: Model, what: str = "classifier") -> bytes:
    """The model as ONNX: "images" -> "logits", or "stride4", "stride8", "stride16".

    Args:
      what: as in `export`.

    Raises:
      ConfigError: a compute dtype of bfloat16 (onnxruntime loads no Gemm of bfloat16
        and float32), or as in `export`, with jax2onnx.
    """
    function, dtype = _function(model, what), model.run_options.dtype
    if dtype != "float32":
        raise ConfigError(f"ONNX: dtype={dtype}; expected float32")
    jax2onnx = _package("jax2onnx", "onnx")
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # narrates every shape
    cell, stages = model.config.cell_size, len(model.config.depths)
    strides = [f"stride{cell << level}" for level in range(stages)]
    onnx = jax2onnx.to_onnx(
        function,
        inputs=[("b", *_images(model).shape[1:])],
        input_names=["images"],
        output_names=["logits"] if what == "classifier" else strides,
        model_name="hivit",
    )
    return onnx.SerializeToString()


def load_exported(path: str | Path) -> Callable[[Any], Any]:
    """A file of `export`, or of `export_onnx` if called .onnx, as a function of images.

    The function raises what jax (ValueError) or onnxruntime have to say on images of
    another shape or dtype, jax also on another platform.

    Raises:
      CheckpointError: no such file, or not all of one.
      ConfigError: flatbuffers or onnxruntime is not installed.
    """
    path = Path(path)
    onnx = path.suffix == ".onnx"
    name, extra = ("onnxruntime", "onnx") if onnx else ("flatbuffers", "export")
    package = _package(name, extra)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    try:
        if not onnx:
            return jax.jit(stablehlo.deserialize(bytearray(content)).call)
        options = package.SessionOptions()
        options.log_severity_level = 3  # not every constant that it optimises away
        session = package.InferenceSession(content, options)
    except Exception as error:  # of whatever kind foreign bytes provoke
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise CheckpointError(
            f"{path} is not an exported model, or not all of it\n{reason}"
        ) from error

    def run(images):
        outputs = session.run(None, {"images": np.asarray(images)})
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    return run


def compare(model: Model, what: str, path: Path) -> float:
    """Runs model and file on two random images -> largest difference of any number.

    Raises:
      HivitError: it is more than rounding explains.
    """
    images = jax.random.normal(jax.random.key(0), (2, *_images(model).shape[1:]))
    found = _numbers(load_exported(path)(images))
    # onnxruntime multiplies in float32; a GPU or TPU does so when told to.
    onnx = path.suffix == ".onnx"
    with jax.default_matmul_precision("highest") if onnx else nullcontext():
        expected = _numbers(jax.jit(_function(model, what))(images))
    difference, largest = np.abs(found - expected).max(), np.abs(expected).max()
    limit = 1e-4 if model.run_options.dtype == "float32" else 3e-2
    if not difference <= limit * largest:  # nor is NaN
        raise HivitError(
            f"the exported {what} differs from the model by {difference:.1e}\n"
            f"expected at most {limit:.0e} of the largest output, {largest:.1e}; "
            "nothing was written"
        )
    return float(difference)


def _function(model: Model, what: str) -> Callable[[jax.Array], Any]:
    if what not in WHAT:
        raise errors.unknown("export", what, WHAT)
    model = nnx.merge(*nnx.split(model))  # the same arrays, another module
    # Fused kernels are for the devices of this process only.
    model.encoder.run_options = replace(model.run_options, kernels="plain")
    if what == "features":
        return lambda images: tuple(model.encoder.features(images))
    if not isinstance(model, Classifier):
        raise ConfigError("a masked autoencoder has no classifier; export its features")
    return lambda images: model(images)


def _images(model: Model) -> jax.ShapeDtypeStruct:
    shape = (*stablehlo.symbolic_shape("b"), *model.config.image_shape)
    return jax.ShapeDtypeStruct(shape, np.float32)


def _package(name: str, extra: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"{name} is not installed; pip install 'hivit-jax[{extra}]'"
        ) from error


def _numbers(outputs: Any) -> np.ndarray:
    leaves = jax.tree.leaves(outputs)
    return np.concatenate([np.asarray(x, np.float32).reshape(-1) for x in leaves])


def _types(model: Model, what: str) -> str:
    outputs = jax.eval_shape(_function(model, what), _images(model))
    arrays = [_images(model), *jax.tree.leaves(outputs)]
    first, *rest = [f"{x.dtype}{list(x.shape)}" for x in arrays]
    return f"{first} -> {', '.join(rest)}"


def run(argv: Sequence[str]) -> None:
    """Exports what the command line asks for; compares first where it can run."""
    parser = errors.Parser("python -m hivit_jax.tools.export", allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True, help="as for load_pretrained")
    parser.add_argument("--out", required=True, help="file; NAME.onnx is ONNX")
    parser.add_argument("--what", default=WHAT[0], choices=WHAT)
    parser.add_argument("--platforms", help=f"default {','.join(PLATFORMS)}; not ONNX")
    flags = parser.parse_args(argv)
    out = Path(flags.out)
    onnx = out.suffix == ".onnx"
    if onnx and flags.platforms:
        raise ConfigError(f"--platforms={flags.platforms}: an ONNX file has none")
    from hivit_jax.weights.load import load_pretrained

    model = load_pretrained(flags.checkpoint, **{"dtype": "float32"} if onnx else {})
    if onnx:
        content, where = export_onnx(model, flags.what), ["ONNX"]
    else:
        where = flags.platforms.split(",") if flags.platforms else PLATFORMS
        content = export(model, flags.what, where)
    part = out.parent / f"{out.stem}.incomplete{out.suffix}"
    try:
        part.write_bytes(content)
        compared = "not compared, it does not run here"
        if onnx or stablehlo.default_export_platform() in where:
            difference = compare(model, flags.what, part)
            compared = f"largest difference to the model {difference:.1e}"
        part.replace(out)
    except OSError as error:
        raise ConfigError(f"--out={out}: {error.strerror}") from error
    finally:
        with suppress(OSError):
            part.unlink()
    log(f"{flags.what}: {_types(model, flags.what)}")
    log(f"{out}: {len(content) / 1e6:.1f} MB, {', '.join(where)}; {compared}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return errors.exit_code(lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
