"""Tests that exported models equal the original and need only jax or onnxruntime."""

import json
import os
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import jax
import mini_runs
import numpy as np
import pytest
from networks import DEFAULTS, mini, random_array
from numpy.testing import assert_allclose, assert_array_equal

from hivit_jax.checkpoints.manager import Checkpoints
from hivit_jax.errors import CheckpointError, ConfigError
from hivit_jax.kernels import dispatch
from hivit_jax.tools import export
from hivit_jax.tree import split


@pytest.fixture(scope="module", autouse=True)
def _minimal_output():
    with mini_runs.minimal_output():
        yield


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return (file of an exported classifier, its logits for two images)."""
    path, model = tmp_path_factory.mktemp("exported") / "model", mini()
    path.write_bytes(export.export(model))
    return path, np.asarray(jax.jit(model)(random_array((2, 64, 64, 3))))


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    """Return a directory of two workdirs, each named after its bfloat16 model."""
    root = tmp_path_factory.mktemp("workdirs")
    for name, arguments in DEFAULTS.items():
        config = {"model": {"name": name, **arguments, "dtype": "bfloat16"}}
        checkpoints = Checkpoints(root / name, keep=1)
        state = {"params": split(mini(name))[1], "opt_state": {}, "step": np.int32(3)}
        checkpoints.save(state, json.dumps(config))
        checkpoints.close()
    return root


def outputs(model, what, images):
    """Return the outputs of a classifier, or the features of its encoder."""
    function = model if what == "classifier" else model.encoder.features
    return jax.tree.leaves(jax.jit(function)(images))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "dtype", "size"),
    [
        ("classifier", "float32", 64),
        ("classifier", "bfloat16", (32, 64)),
        ("features", "bfloat16", (32, 64)),
    ],
)
def test_export_equals_the_model_in_any_batch(what, dtype, size, tmp_path):
    model = mini(dtype=dtype, image_size=size)
    (tmp_path / "model").write_bytes(export.export(model, what))
    run = export.load_exported(tmp_path / "model")
    for batch in (1, 3):
        images = random_array((batch, *model.config.image_size, 3))
        actual, expected = run(images), outputs(model, what, images)
        assert isinstance(actual, tuple) == (what == "features")
        mini_runs.assert_identical(jax.tree.leaves(actual), expected)


@pytest.mark.slow
def test_parameters_are_stored_once(exported):
    size = 4 * mini().parameter_count()
    assert size < exported[0].stat().st_size < size + 2**16


@pytest.mark.slow
def test_exported_file_contains_no_directories(exported, monkeypatch):
    """The file contains names of source files. `load_exported` expands a leading ~."""
    content = exported[0].read_bytes()
    assert b"classifier.py" in content
    for path in (export.__file__, __file__, np.__file__, jax.__file__):
        assert os.path.dirname(path).encode() not in content
    assert jax.config.jax_hlo_source_file_canonicalization_regex is None
    monkeypatch.setenv("HOME", str(exported[0].parent))
    assert export.load_exported("~/model")


@pytest.mark.slow
def test_export_contains_no_kernels(monkeypatch):
    model, choices = mini(kernels="fused"), []
    monkeypatch.setattr(dispatch, "mlp", lambda *args: choices.append(args[-1]))
    export.export(model)
    assert set(choices) == {"plain"}
    assert model.run_options.kernels == "fused"


@pytest.mark.processes
@pytest.mark.slow
def test_exported_model_runs_with_jax_alone(exported, tmp_path):
    absent = ("hivit_jax", "flax", "orbax", "optax", "ml_collections")
    program = mini_runs.block_imports(tmp_path / "bare", *absent) / "serve.py"
    program.write_text(
        "import sys, jax, numpy as np\n"
        "path, images, logits = sys.argv[1:]\n"
        "with open(path, 'rb') as file:\n"
        "    model = jax.export.deserialize(bytearray(file.read()))\n"
        "np.save(logits, jax.jit(model.call)(np.load(images)))\n"
    )
    np.save(tmp_path / "images.npy", random_array((2, 64, 64, 3)))
    path, expected = exported
    code, _, err = mini_runs.run_process(
        program, path, tmp_path / "images.npy", tmp_path / "logits.npy"
    )
    assert code == 0, err
    assert_array_equal(np.load(tmp_path / "logits.npy"), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        (
            (2, 32, 32, 3),
            "float32",
            r"expected \(b, 64, 64, 3\) and .* \(2, 32, 32, 3\)",
        ),
        ((64, 64, 3), "float32", r"expected \(b, 64, 64, 3\) and .* \(64, 64, 3\)"),
        ((2, 64, 64, 3), "uint8", "expected float32 and called with uint8"),
    ],
)
def test_images_of_another_shape_or_dtype_are_an_error(exported, shape, dtype, message):
    with pytest.raises(ValueError, match=message):
        export.load_exported(exported[0])(np.zeros(shape, dtype))


@pytest.mark.slow
def test_model_of_another_platform_is_an_error(tmp_path):
    (tmp_path / "model").write_bytes(export.export(mini(), platforms=["tpu"]))
    with pytest.raises(
        ValueError, match="exported for platforms .*tpu.* used on .*cpu"
    ):
        export.load_exported(tmp_path / "model")(random_array((1, 64, 64, 3)))


@pytest.mark.slow
@pytest.mark.parametrize("content", ["half", b"", b"PK\3\4 and so on", bytes(1000)])
def test_damaged_or_foreign_file_is_an_error(exported, content, tmp_path):
    if content == "half":
        content = exported[0].read_bytes()[: exported[0].stat().st_size // 2]
    (tmp_path / "model").write_bytes(content)
    with pytest.raises(CheckpointError, match="model is not a valid exported model"):
        export.load_exported(tmp_path / "model")


def test_missing_file_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="model: No such file"):
        export.load_exported(tmp_path / "model")


@pytest.mark.parametrize("package", ["flatbuffers", "jax2onnx"])
def test_missing_package_is_an_error(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    function = export.export if package == "flatbuffers" else export.export_onnx
    with pytest.raises(ConfigError, match=rf"{package} is not .* 'hivit-jax\["):
        function(mini())


# Command


@pytest.mark.slow
def test_command_writes_the_model_and_its_info(workdirs, tmp_path, capsys):
    checkpoint, out = workdirs / "mae_hivit_base", tmp_path / "model"
    flags = [f"--checkpoint={checkpoint}", f"--out={out}", "--what=features"]
    assert export.main(flags) == 0
    model, note, start, types, written, end = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"model: {checkpoint}/\S+ \(step \d+, the newest.*\)", model)
    assert note.startswith("note: assumed, as not in the file: mean ")
    assert start.startswith("exporting features of mae_hivit_base, which may take")
    assert re.fullmatch(r"exported in \d+\.\d s", end)
    assert types == (
        "features: float32[b, 64, 64, 3] -> bfloat16[b, 16, 16, 16], "
        "bfloat16[b, 8, 8, 32], bfloat16[b, 4, 4, 64]"
    )
    assert written == (
        f"{out}: 0.5 MB, cpu, cuda, tpu; largest difference from the model 0.0e+00"
    )
    assert {file.name for file in tmp_path.iterdir()} == {"model", "model.json"}
    facts = json.loads((tmp_path / "model.json").read_text())
    assert (facts["class_names"], facts["image_size"]) == ([], [64, 64])


@pytest.mark.slow
def test_command_does_not_compare_on_another_platform(workdirs, tmp_path, capsys):
    flags = [f"--checkpoint={workdirs / 'hivit_base'}", f"--out={tmp_path / 'model'}"]
    assert export.main([*flags, "--platforms=cuda,tpu"]) == 0
    *_, types, written, _ = capsys.readouterr().out.splitlines()
    assert types == "classifier: float32[b, 64, 64, 3] -> float32[b, 10]"
    assert "MB, cuda, tpu; not compared with the model" in written
    assert written.endswith("because the file cannot run here")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "out", "flags", "code", "message"),
    [
        ("mae_hivit_base", "m", [], 2, "a masked autoencoder has no classifier"),
        ("hivit_base", "m", ["--platforms=gpu"], 2, "unknown platform 'gpu'"),
        ("hivit_base", "m", ["--what=logits"], 2, "invalid choice: 'logits'"),
        ("hivit_base", "m.onnx", ["--platforms=cpu"], 2, "does not apply to ONNX"),
        ("hivit_base", "absent/m", ["--platforms=tpu"], 2, "No such file or directory"),
        ("absent", "m", [], 5, "does not exist"),
    ],
)
def test_invalid_command_writes_nothing(
    name, out, flags, code, message, workdirs, tmp_path, capsys
):
    paths = [f"--checkpoint={workdirs / name}", f"--out={tmp_path / out}"]
    assert export.main([*paths, *flags]) == code
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) <= 3
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_differing_export_is_not_written(
    workdirs, exported, tmp_path, monkeypatch, capsys
):
    differing = export.export(mini(dtype="bfloat16", layer_norm_eps=1.0))
    monkeypatch.setattr(export, "export", lambda *_: differing)
    (tmp_path / "model").write_text("before")
    flags = [f"--checkpoint={workdirs / 'hivit_base'}", f"--out={tmp_path / 'model'}"]
    assert export.main(flags) == 1
    assert (
        "the exported classifier differs from the model by" in capsys.readouterr().err
    )
    assert [file.read_text() for file in tmp_path.iterdir()] == ["before"]


# ONNX


def test_onnx_contains_class_names_and_preprocessing(monkeypatch):
    class Proto(dict):
        metadata_props = property(lambda self: self)

        def add(self, key, value):
            self[key] = json.loads(value)

        def SerializeToString(self):
            return json.dumps(self).encode()

    stub = SimpleNamespace(to_onnx=lambda *_, **__: Proto())
    monkeypatch.setitem(sys.modules, "jax2onnx", stub)
    model = mini(num_classes=2)
    model.info = replace(model.info, class_names=("cat", "dog"))
    metadata = json.loads(export.export_onnx(model))
    assert metadata["class_names"] == ["cat", "dog"]
    assert metadata["image_size"] == [64, 64]
    assert (metadata["mean"], metadata["crop"]) == ([0.485, 0.456, 0.406], 0.875)


def test_onnx_of_a_bfloat16_model_is_an_error():
    with pytest.raises(ConfigError, match="dtype=bfloat16; expected float32"):
        export.export_onnx(mini(dtype="bfloat16"))


@pytest.mark.extras
@pytest.mark.parametrize("what", export.OUTPUTS)
def test_onnx_equals_the_model(what, tmp_path):
    pytest.importorskip("jax2onnx")
    model, path = mini(image_size=(32, 64)), tmp_path / "model.onnx"
    path.write_bytes(export.export_onnx(model, what))
    run = export.load_exported(path)
    for batch in (1, 3):
        images = random_array((batch, 32, 64, 3))
        actual = jax.tree.leaves(run(images))
        expected = outputs(model, what, images)
        for array, expected_array in zip(actual, expected, strict=True):
            assert_allclose(array, expected_array, rtol=0, atol=2e-5)


@pytest.mark.extras
def test_onnx_command_compares_with_the_model(workdirs, tmp_path, capsys):
    pytest.importorskip("jax2onnx")
    path = tmp_path / "model.onnx"
    assert (
        export.main([f"--checkpoint={workdirs / 'hivit_base'}", f"--out={path}"]) == 0
    )
    assert "0.6 MB, ONNX; largest difference from the model " in capsys.readouterr().out
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="not a valid exported model"):
        export.load_exported(path)
