"""Tests of predictions and features of image files, by a briefly trained model."""

import csv
import itertools
import json
from pathlib import Path

import mini_runs
import numpy as np
import pytest
from datasets import noise_image
from PIL import Image

import hivit_jax
from hivit_jax import progress
from hivit_jax.tools import convert, features, predict
from hivit_jax.train import train

COLORS = {"blue": (30, 40, 200), "green": (40, 190, 50), "red": (210, 40, 30)}
MEAN = (0.4, 0.4, 0.4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Return class folders. The images of a class are noise around its color."""
    root, random = tmp_path_factory.mktemp("data"), np.random.RandomState(0)
    for split, count in (("train", 8), ("val", 5)):
        for name, color in COLORS.items():
            directory = root / split / name
            directory.mkdir(parents=True)
            for index in range(count):
                pixels = color + random.randint(-25, 26, (40, 48, 3))
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                image.save(directory / f"{index}.png")
    return root


def train_classifier(data, workdir, **overrides):
    """Train on class folders; return the workdir, which also contains the cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(workdir))
        options = dict(
            data__name="folder",
            data__dir=data,
            data__canvas=64,
            data__mean=MEAN,
            data__std=(0.3, 0.3, 0.3),
            data__randaugment=False,
            model__image_size=32,
            model__in_channels=3,
            model__patch_size=16,
            model__depths=(1, 1, 1),
            model__num_classes=0,
            model__drop_path_rate=0.0,
            mixup=0.0,
            cutmix=0.0,
            random_erasing=0.0,
            batch_size=16,
            total_steps=24,
            log_every=24,
            optimizer__base_learning_rate=0.05,
        )
        train(mini_runs.classifier("digits", **options | overrides), workdir)
    return workdir


@pytest.fixture(scope="module")
def run(data, tmp_path_factory, minimal_output, single_device):
    """Return the workdir of a classifier that is trained on `data`."""
    return train_classifier(data, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def saved_model(run, tmp_path_factory):
    """Convert the run to a saved model; return its directory."""
    convert.convert(str(run), directory := tmp_path_factory.mktemp("saved"))
    return directory


def rows(path):
    """Return the rows of a CSV file as dicts."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_labeled_folder_is_predicted_and_scored(
    run, data, tmp_path, monkeypatch, capsys
):
    """Every image has a row, in sorted order; the table agrees with the metrics."""
    out = tmp_path / "p" / "all.csv"
    flags = [f"--checkpoint={run}", f"--out={out}"]
    monkeypatch.setattr(progress, "monotonic", itertools.count(0, 10).__next__)
    assert predict.main([*flags, str(data / "val")]) == 0
    table = rows(out)
    paths = sorted(str(path) for path in (data / "val").rglob("*.png"))
    assert [row["file"] for row in table] == paths
    assert [row["label"] for row in table] == [path.split("/")[-2] for path in paths]
    ranks = ["", "_2", "_3"]
    assert [*table[0]] == [
        "file", *(f"{n}{r}" for r in ranks for n in ("predicted", "probability")),
        "label", "error",
    ]  # fmt: skip
    for row in table:
        p = [float(row[f"probability{r}"]) for r in ranks]
        assert p == sorted(p, reverse=True)
        assert sum(p) == pytest.approx(1, abs=1e-5)
        assert {row[f"predicted{r}"] for r in ranks} == {*COLORS}
    is_correct = [row["predicted"] == row["label"] for row in table]
    accuracy = np.mean(is_correct)
    assert accuracy > 0.9
    metrics = json.loads((tmp_path / "p" / "all_metrics.json").read_text())
    assert metrics == {
        "images": 15, "accuracy": accuracy, "balanced_accuracy": pytest.approx(accuracy)
    }  # fmt: skip
    class_rows = rows(tmp_path / "p" / "all_classes.csv")
    assert [row["class"] for row in class_rows] == [*COLORS]
    assert sum(int(row["correct"]) for row in class_rows) == sum(is_correct)
    matrix = rows(tmp_path / "p" / "all_confusion.csv")
    assert [int(matrix[k][name]) for k, name in enumerate(COLORS)] == [
        int(row["correct"]) for row in class_rows
    ]
    assert (tmp_path / "p" / "all_confusion.png").is_file()
    printed = capsys.readouterr().out
    assert "predict  15/15 images  0:00 left" in printed
    assert "15 of 15 images predicted" in printed
    assert f"model: {run}/checkpoints/24 (step 24, the newest and best)\n" in printed


@pytest.mark.slow
def test_run_and_saved_model_predict_equal_rows(
    run, saved_model, data, tmp_path, monkeypatch
):
    """Some files are unlabeled, mislabeled, damaged, or contain floats."""
    monkeypatch.chdir(tmp_path)
    images = tmp_path / "tiles"
    (images / "deep" / "blue").mkdir(parents=True)
    (images / "b.png").write_bytes((data / "val/red/0.png").read_bytes())
    (images / "deep/blue/c.png").write_bytes((data / "val/green/0.png").read_bytes())
    (images / "a.png").write_bytes(b"no image")
    (images / "notes.txt").write_text("")
    Image.fromarray(np.float32(noise_image(8, 8))).save(images / "float.tiff")
    image_path = str(data / "val" / "green" / "1.png")
    weight_file = tmp_path / "model.safetensors"
    convert.convert(str(run), weight_file)
    for checkpoint, name in (
        (run, "a.csv"),
        (saved_model, "b.csv"),
        (weight_file, "f.csv"),
        (saved_model, "c.jsonl"),
    ):
        flags = ["--checkpoint", str(checkpoint), "--out", name, "--batch_size=2"]
        assert predict.main([*flags, "tiles", image_path]) == 0
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "f.csv").read_bytes()
    table = rows("a.csv")
    names = ["tiles/a.png", "tiles/b.png", "tiles/deep/blue/c.png", "tiles/float.tiff"]
    assert [row["file"] for row in table] == [*names, image_path]
    assert [row["label"] for row in table] == ["", "", "blue", "", "green"]
    assert [row["predicted"] for row in table] == ["", "red", "green", "", "green"]
    assert "unknown image format" in table[0]["error"]
    assert table[3]["error"].startswith("expected 8 or 16 bits, found float32 values")
    assert table[3]["error"].endswith("; convert the image to match the trained model")
    assert not any(table[k]["error"] for k in (1, 2, 4))
    lines = [json.loads(line) for line in Path("c.jsonl").read_text().splitlines()]
    assert lines[0].keys() == {"file", "error"}
    assert lines[1]["predicted"] == "red"
    assert lines[1]["probability"] == float(table[1]["probability"])
    assert json.loads((tmp_path / "a_metrics.json").read_text())["accuracy"] == 0.5
    with Image.open(tmp_path / "a_worst.png") as sheet:
        assert sheet.height > sheet.width > 200  # one image below its title


@pytest.mark.slow
def test_command_without_paths_predicts_the_test_split(run, data, tmp_path):
    """`load_pretrained` and `preprocess`, without a canvas, give similar results."""
    out = tmp_path / "split.csv"
    assert predict.main([f"--checkpoint={run}", f"--out={out}"]) == 0
    table = rows(out)
    assert {row["label"] for row in table} == {*COLORS}
    model = hivit_jax.load_pretrained(run)
    images = hivit_jax.preprocess(model)([row["file"] for row in table])
    for row, logits in zip(table, np.asarray(model(images)), strict=True):
        p = np.exp(logits - logits.max())
        best = p.argmax()
        assert model.info.class_names[best] == row["predicted"]
        assert p[best] / p.sum() == pytest.approx(float(row["probability"]), abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("paths", "out", "code", "message"),
    [
        (["damaged"], "a.csv", 4, "damaged: no image can be read"),
        (["damaged"], "new", 4, "damaged: no image can be read"),
        (["empty"], "a.csv", 4, "expected files that end in"),
        (["absent"], "a.csv", 2, "absent: no such file or directory"),
        (["damaged"], "a.xlsx", 2, "ends in .csv or .jsonl"),
    ],
)
def test_unusable_paths_and_outputs_are_errors(
    run, paths, out, code, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for name in ("damaged", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "damaged" / "x.png").write_bytes(b"x")
    assert predict.main([f"--checkpoint={run}", f"--out={out}", *paths]) == code
    found = capsys.readouterr()
    assert message in found.err
    if out == "new":
        last = found.out.splitlines()[-1]
        assert last == "0 of 1 image predicted; written to new/predictions.csv"


@pytest.mark.slow
def test_features_equal_the_pooled_features_of_the_model(
    saved_model, data, tmp_path, capsys
):
    """Damaged files are left out. With --pyramid, the output contains feature maps."""
    (tmp_path / "x.png").write_bytes(b"x")
    images = [str(tmp_path / "x.png"), str(data / "val")]
    out = tmp_path / "f.npz"
    flags = [f"--checkpoint={saved_model}", "--batch_size=4"]
    assert features.main([*flags, f"--out={out}", *images]) == 0
    arrays = np.load(out)
    paths = sorted(str(path) for path in (data / "val").rglob("*.png"))
    assert arrays["files"].tolist() == paths
    assert arrays["labels"].tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert arrays["class_names"].tolist() == [*COLORS]
    assert arrays["features"].dtype == np.float32
    model = hivit_jax.load_pretrained(saved_model)
    expected = model.pooled(hivit_jax.preprocess(model)(paths))
    np.testing.assert_allclose(arrays["features"], expected, atol=0.02)
    assert features.main([*flags, f"--out={out}", "--pyramid", paths[0]]) == 0
    maps = np.load(out)
    shapes = {name: maps[name].shape for name in maps if name.startswith("stride")}
    assert shapes == {
        "stride4": (1, 8, 8, 16), "stride8": (1, 4, 4, 32), "stride16": (1, 2, 2, 64)
    }  # fmt: skip
    # Without any readable image, the command fails.
    assert features.main([*flags, f"--out={out}", images[0]]) == 4
    np.save(tmp_path / "five.npy", np.zeros((40, 48, 5), np.uint8))
    capsys.readouterr()
    assert features.main([*flags, f"--out={out}", str(tmp_path / "five.npy")]) == 4
    err = capsys.readouterr().err
    assert "expected 3 channels, found 5; convert the image to match" in err
    assert "model.in_channels" not in err


@pytest.mark.extras
@pytest.mark.slow
def test_arrays_of_16_bits_and_4_bands_are_predicted(tmp_path, minimal_output):
    """A run and its saved model accept the arrays. A figure shows wrong predictions."""
    pixels = np.random.RandomState(0).randint(0, 10000, (8, 40, 48, 4), np.uint16)
    for k, array in enumerate(pixels):
        for split in ("train", "val"):
            path = tmp_path / "data" / split / ("field", "water")[k % 2] / f"{k}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, array)
    run = train_classifier(
        tmp_path / "data",
        tmp_path / "run",
        data__dtype="uint16",
        data__scale=10000.0,
        data__mean=(0.5,) * 4,
        data__std=(0.3,) * 4,
        model__in_channels=4,
        batch_size=8,
        total_steps=1,
    )
    convert.convert(str(run), saved := tmp_path / "saved")
    for name, model in (("run", run), ("saved", saved)):
        out = tmp_path / f"{name}.csv"
        flags = [f"--checkpoint={model}", f"--out={out}", str(tmp_path / "data/val")]
        assert predict.main(flags) == 0
        table = rows(out)
        assert [row["label"] for row in table] == 4 * ["field"] + 4 * ["water"]
        assert not any(row["error"] for row in table)
    # After one step on random pixels, some predictions are wrong.
    assert any(row["predicted"] != row["label"] for row in table)
    assert (tmp_path / "run_worst.png").exists()
    preprocess = hivit_jax.preprocess(hivit_jax.load_pretrained(saved))
    images = preprocess(np.full((40, 48, 4), 7500, np.uint16))
    assert images.shape == (1, 32, 32, 4)
    np.testing.assert_allclose(images, (0.75 - 0.5) / 0.3, rtol=1e-5)
