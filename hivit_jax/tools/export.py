"""Export a model: ``python -m hivit_jax.tools.export --checkpoint A --out B``.

The file contains the program and the parameters, for any batch size. It is serialized
StableHLO, which `jax.export` runs without this package, or ONNX if B ends in ``.onnx``.
An ONNX file contains class names and preprocessing (`info_of`) as metadata. StableHLO
files have no metadata, so these facts are written to B.json.
"""

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import export as jax_export

from hivit_jax import errors
from hivit_jax.errors import CheckpointError, ConfigError, HivitError
from hivit_jax.models import Model
from hivit_jax.models.classifier import Classifier
from hivit_jax.paths import expand
from hivit_jax.platforms import start as start_platforms
from hivit_jax.reporting.console import log
from hivit_jax.tools.outputs import output_path

OUTPUTS = ("classifier", "features")
PLATFORMS = ("cpu", "cuda", "tpu")


def export(
    model: Model, what: str = "classifier", platforms: Sequence[str] = PLATFORMS
) -> bytes:
    """Serialize a model with `jax.export`; all platforms share one copy of the weights.

    Args:
      what: "classifier", images -> logits [b, num_classes] float32; or "features",
        images -> tuple of the maps of `Model.features`, in compute dtype. Images are
        [b, H, W, C] float32, normalized, with any b >= 1.
      platforms: platforms that the program is lowered for, from `PLATFORMS`.

    Raises:
      ConfigError: the output or a platform is unknown, a masked autoencoder is to be
        exported as a classifier, or flatbuffers is not installed.
    """
    for platform in platforms:
        if platform not in PLATFORMS:
            raise errors.unknown("platform", platform, PLATFORMS)
    function = jax.jit(_inference_function(model, what))
    errors.require("flatbuffers", "hivit-jax[export]")
    with _without_source_directories():
        exported = jax_export.export(function, platforms=tuple(platforms))(
            _input_spec(model)
        )
    return bytes(exported.serialize())


def export_onnx(model: Model, what: str = "classifier") -> bytes:
    """Serialize a model as ONNX.

    The input is named "images". The output is named "logits"; feature maps are named by
    their strides, such as "stride4".

    Args:
      what: as in `export`.

    Raises:
      ConfigError: the output is unknown, a masked autoencoder is to be exported as a
        classifier, jax2onnx is not installed, or the compute dtype is not float32.
    """
    function, dtype = _inference_function(model, what), model.run_options.dtype
    # onnxruntime does not load Gemm nodes that mix bfloat16 and float32.
    if dtype != "float32":
        raise ConfigError(f"ONNX export: dtype={dtype}; expected float32")
    jax2onnx = errors.require("jax2onnx", "hivit-jax[onnx]")
    # Without this setting, onnx_ir logs every shape.
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)
    cell_size, num_stages = model.config.cell_size, len(model.config.depths)
    strides = [f"stride{cell_size << stage}" for stage in range(num_stages)]
    onnx = jax2onnx.to_onnx(
        function,
        inputs=[("b", *_input_spec(model).shape[1:])],
        input_names=["images"],
        output_names=["logits"] if what == "classifier" else strides,
        model_name="hivit",
    )
    for key, value in info_of(model).items():
        onnx.metadata_props.add(key=key, value=json.dumps(value))
    return onnx.SerializeToString()


def info_of(model: Model) -> dict[str, Any]:
    """Return `model.info`, such as class names, mean and std, as JSON values."""
    return json.loads(json.dumps(asdict(model.info)))


def load_exported(path: str | Path) -> Callable[[Any], Any]:
    """Load a file written by `export`, or by `export_onnx` if its suffix is ``.onnx``.

    Returns:
      A function from images to outputs. For images of the wrong shape or dtype, it
      raises JAX's ValueError or onnxruntime's error. It raises JAX's ValueError on a
      platform that the model was not exported for.

    Raises:
      CheckpointError: the file does not exist or is not a valid exported model.
      ConfigError: flatbuffers or onnxruntime is not installed.
    """
    path = Path(expand(str(path)))
    is_onnx = path.suffix == ".onnx"
    name, extra = ("onnxruntime", "onnx") if is_onnx else ("flatbuffers", "export")
    package = errors.require(name, f"hivit-jax[{extra}]")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    try:
        if not is_onnx:
            return jax.jit(jax_export.deserialize(bytearray(content)).call)
        options = package.SessionOptions()
        # Without this setting, onnxruntime logs each constant that it optimizes away.
        options.log_severity_level = 3
        session = package.InferenceSession(content, options)
    except Exception as error:  # invalid files cause exceptions of many types
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise CheckpointError(
            f"{path} is not a valid exported model (truncated?)\n{reason}"
        ) from error

    def call(images):
        outputs = session.run(None, {"images": np.asarray(images)})
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    return call


def compare(model: Model, what: str, path: Path) -> float:
    """Run the model and the exported file on two random images.

    Returns:
      The largest absolute difference between the outputs.

    Raises:
      HivitError: the difference is larger than rounding errors explain.
    """
    images = jax.random.normal(jax.random.key(0), (2, *_input_spec(model).shape[1:]))
    exported = _flat(load_exported(path)(images))
    # onnxruntime multiplies in float32. JAX on GPUs and TPUs by default does not.
    is_onnx = path.suffix == ".onnx"
    with jax.default_matmul_precision("highest") if is_onnx else nullcontext():
        expected = _flat(jax.jit(_inference_function(model, what))(images))
    difference, largest = np.abs(exported - expected).max(), np.abs(expected).max()
    tolerance = 1e-4 if model.run_options.dtype == "float32" else 3e-2
    if not difference <= tolerance * largest:  # also true for NaN
        raise HivitError(
            f"the exported {what} differs from the model by {difference:.1e}; expected "
            f"at most {tolerance * largest:.1e}, which is {tolerance:.0e} times the "
            "largest output.\n"
            "No file was written"
        )
    return float(difference)


def _inference_function(model: Model, what: str) -> Callable[[jax.Array], Any]:
    if what not in OUTPUTS:
        raise errors.unknown("output", what, OUTPUTS)
    model = nnx.merge(*nnx.split(model))  # a copy of the module that shares its arrays
    # Fused kernels would run only on this process's kind of device.
    model.encoder.run_options = replace(model.run_options, kernels="plain")
    if what == "features":
        return lambda images: tuple(model.encoder.features(images))
    if not isinstance(model, Classifier):
        raise ConfigError("a masked autoencoder has no classifier; export its features")
    return lambda images: model(images)


def _input_spec(model: Model) -> jax.ShapeDtypeStruct:
    shape = (*jax_export.symbolic_shape("b"), *model.config.image_shape)
    return jax.ShapeDtypeStruct(shape, np.float32)


@contextmanager
def _without_source_directories() -> Iterator[None]:
    """Context in which lowered programs contain no directories of source files."""
    key = "jax_hlo_source_file_canonicalization_regex"
    previous = getattr(jax.config, key)
    jax.config.update(key, r".*[/\\]")
    try:
        yield
    finally:
        jax.config.update(key, previous)


def _flat(outputs: Any) -> np.ndarray:
    leaves = jax.tree.leaves(outputs)
    return np.concatenate([np.asarray(x, np.float32).reshape(-1) for x in leaves])


def _signature(model: Model, what: str) -> str:
    outputs = jax.eval_shape(_inference_function(model, what), _input_spec(model))
    arrays = [_input_spec(model), *jax.tree.leaves(outputs)]
    first, *rest = [f"{x.dtype}{list(x.shape)}" for x in arrays]
    return f"{first} -> {', '.join(rest)}"


def make_parser() -> errors.Parser:
    """Return the parser of the command line."""
    parser = errors.Parser(
        "python -m hivit_jax.tools.export",
        description="Export a model as one StableHLO or ONNX file with program "
        "and parameters.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="workdir, checkpoint, weight file or directory written by save_pretrained",
    )
    parser.add_argument(
        "--out", required=True, help="file to write; in ONNX format if it ends in .onnx"
    )
    parser.add_argument(
        "--what", default=OUTPUTS[0], choices=OUTPUTS, help="output of the program"
    )
    parser.add_argument(
        "--platforms",
        help="comma-separated platforms to compile for, except with ONNX; default: "
        f"{','.join(PLATFORMS)}",
    )
    return parser


def run(argv: Sequence[str] | None) -> None:
    """Parse the arguments and export the model.

    If the exported program can run here, its outputs are compared with the model's
    before `--out` is replaced.
    """
    flags = make_parser().parse_args(argv)
    out = output_path("--out", flags.out, [flags.checkpoint])
    is_onnx = out.suffix == ".onnx"
    if is_onnx and flags.platforms:
        raise ConfigError(
            f"--platforms={flags.platforms} does not apply to ONNX; remove it"
        )
    start_platforms()
    from hivit_jax.tools.loading import read_model
    from hivit_jax.weights.load import build

    overrides = {"dtype": "float32"} if is_onnx else {}
    model = build(read_model(flags.checkpoint, **overrides), **overrides)
    start = time.perf_counter()
    log(f"exporting {flags.what} of {model.name}, which may take a minute ...")
    if is_onnx:
        content, targets = export_onnx(model, flags.what), ["ONNX"]
    else:
        targets = flags.platforms.split(",") if flags.platforms else PLATFORMS
        content = export(model, flags.what, targets)
    part = out.parent / f"{out.stem}.incomplete{out.suffix}"
    try:
        part.write_bytes(content)
        comparison = "not compared with the model, because the file cannot run here"
        if is_onnx or jax_export.default_export_platform() in targets:
            difference = compare(model, flags.what, part)
            comparison = f"largest difference from the model {difference:.1e}"
        part.replace(out)
        if not is_onnx:
            text = json.dumps(info_of(model), indent=2) + "\n"
            out.with_name(f"{out.name}.json").write_text(text)
    except OSError as error:
        raise ConfigError(f"--out={out}: {error.strerror}") from error
    finally:
        with suppress(OSError):  # the file was renamed, or never written
            part.unlink()
    log(f"{flags.what}: {_signature(model, flags.what)}")
    log(f"{out}: {len(content) / 1e6:.1f} MB, {', '.join(targets)}; {comparison}")
    log(f"exported in {time.perf_counter() - start:.1f} s")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return errors.run_command(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
