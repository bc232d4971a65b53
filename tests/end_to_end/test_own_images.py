"""Tests of the command line with users' own images."""

import csv
import io
import json
import tarfile

import mini_runs
import numpy as np
import pytest
import tifffile
from datasets import encode, noise_image
from PIL import Image

import hivit_jax
from hivit_jax import config as configs
from hivit_jax import inputs
from hivit_jax.data.sources.registry import open_source
from hivit_jax.main import main, parse
from hivit_jax.tools import convert, predict, prepare_data
from tests.test_documentation import blocks, commands

pytestmark = pytest.mark.usefixtures("cache_directory")


def lines_of(workdir):
    """Return the lines of metrics.jsonl."""
    return [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def tiles(tmp_path):
    """Return a directory of twenty nested unlabeled images and a stray file."""
    root = tmp_path / "tiles"
    for k in range(20):
        path = root / f"scene{k % 3}" / "deeper" / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.roll(noise_image(40, 36, 3), k, 0)).save(path)
    (root / "notes.txt").touch()
    return root


OVERRIDES = dict(data__name="folder", model__image_size=32, batch_size=8, total_steps=2)


@pytest.mark.extras
@pytest.mark.slow
def test_pretraining_needs_no_labels_and_no_evaluation(tiles, tmp_path, capsys):
    """Without evaluation images, figures show training images.

    The slow initialization is announced, and the last line names the last checkpoint.
    """
    overrides = OVERRIDES | dict(data__dir=tiles, data__eval_split="none")
    overrides |= dict(data__class_level="none", eval_every=1, checkpoint_every=1)
    flags = mini_runs.arguments("photographs", **overrides)
    workdir = tmp_path / "run"
    assert main([*flags, f"--workdir={workdir}"]) == 0
    out = capsys.readouterr().out
    *lines, last = out.splitlines()
    assert last == (
        "last checkpoint  step 2  not evaluated, because data.eval_split='none'  "
        f"{workdir}/checkpoints/2"
    )
    assert (workdir / "checkpoints" / "2").is_dir()
    assert not [line for line in lines if "eval" in line]
    programs = [line.split(",")[0] for line in lines if line.startswith("compiling")]
    assert programs == [
        "compiling the initialization of the parameters",
        "compiling the train step",
        "compiling the figures",
    ]
    assert not [key for line in lines_of(workdir) for key in line if "eval" in key]
    figures = {path.name for path in (workdir / "figures").iterdir()}
    assert figures == {
        "curves.png",
        "reconstruction_0000001.png",
        "reconstruction_0000002.png",
    }
    assert main([*flags, f"--workdir={workdir}", "--mode=eval"]) == 2
    assert "the config has no evaluation images" in capsys.readouterr().err


def test_classification_requires_labels(tiles, tmp_path, capsys):
    flags = mini_runs.arguments("photographs", **OVERRIDES, data__dir=tiles)
    flags = [f for f in flags if "decoder" not in f] + [
        "--config.task=classify",
        "--config.model.name=hivit_tiny",
        "--config.data.eval_fraction=0.2",
        "--config.data.class_level=none",
    ]
    assert main([*flags, f"--workdir={tmp_path / 'run'}"]) == 2
    assert "the images have no labels; expected" in capsys.readouterr().err


# From files to a trained model to predictions

COLORS = {"blue": (30, 40, 200), "green": (40, 190, 50), "red": (210, 40, 30)}
NUM_TRAIN, NUM_TEST = 24, 9
CLASSIFIER = OVERRIDES | dict(
    task="classify",
    total_steps=16,
    eval_every=16,
    checkpoint_every=16,
    log_every=16,
    data__canvas=64,
    data__max_unreadable=0.2,
    data__mean=(0.4, 0.4, 0.4),
    data__std=(0.3, 0.3, 0.3),
    model__name="hivit_base",
    model__num_classes=0,
    model__depths=(1, 1, 1),
    optimizer__base_learning_rate=0.1,
)
DAMAGED = b"no image"


def colored(seed, color):
    """Return an image of noise around a color, uint8 [40, 48, 3]."""
    noise = np.random.RandomState(seed).randint(-25, 26, (40, 48, 3))
    return (np.array(color) + noise).clip(0, 255).astype(np.uint8)


def examples(count, first_seed=0):
    """Return [(encoded image, class name)] of the three colors in turn."""
    names = [[*COLORS][k % 3] for k in range(count)]
    images = [colored(first_seed + k, COLORS[name]) for k, name in enumerate(names)]
    return [(encode(x, "PNG"), n) for x, n in zip(images, names, strict=True)]


SPLITS = {"train": examples(NUM_TRAIN), "val": examples(NUM_TEST, NUM_TRAIN)}


def write_csv(root):
    """Write a CSV file and images: one is damaged, one missing, one not listed.

    This and the two following functions return overrides that name the dataset.
    """
    lines = ["file,label,split", "damaged.png,red,train", "missing.png,red,train"]
    (root / "damaged.png").write_bytes(DAMAGED)
    (root / "stray.png").write_bytes(DAMAGED)
    for split, pairs in SPLITS.items():
        for k, (image, name) in enumerate(pairs):
            (root / f"{split}{k}.png").write_bytes(image)
            lines.append(f"{split}{k}.png,{name},{split}")
    (root / "all.csv").write_text("\n".join(lines))
    return dict(data__name="csv", data__dir=root / "all.csv")


def write_tars(root):
    """Write one tar file per split, with a damaged image and a stray file."""
    for split, pairs in SPLITS.items():
        with tarfile.open(root / f"own-{split}.tar", "w") as archive:
            pairs = [*pairs, (DAMAGED, "red")] if split == "train" else pairs
            members = {"notes.md": b"stray"}
            for k, (image, name) in enumerate(pairs):
                members[f"{k}.png"] = image
                members[f"{k}.cls"] = str([*COLORS].index(name)).encode()
            for name, content in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return dict(data__name="webdataset", data__dir=root)


def write_parquet(root):
    """Write and convert Parquet files; one image is damaged, one is missing."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for split, pairs in SPLITS.items():
        images, names = map(list, zip(*pairs, strict=True))
        if split == "train":
            images, names = [*images, DAMAGED, None], [*names, "red", "red"]
        structs = [{"bytes": image, "path": None} for image in images]
        table = pyarrow.table({"image": structs, "label": names})
        parquet.write_table(table, root / f"{split}-00000-of-00001.parquet")
    assert prepare_data.main([f"--from={root}", f"--out={root / 'own'}"]) == 0
    return dict(data__name="own", data__dir=root)


@pytest.mark.slow
@pytest.mark.usefixtures("minimal_output", "single_device")
@pytest.mark.parametrize("write", [write_csv, write_tars, write_parquet])
def test_classifier_of_own_files_predicts_new_images(write, tmp_path, capsys):
    """Damaged images are reported. All predictions are correct."""
    (tmp_path / "data").mkdir()
    workdir, new, out = (tmp_path / name for name in ("run", "new", "new.csv"))
    train(workdir, **write(tmp_path / "data"))
    (line,) = (x for x in lines_of(workdir) if "eval/loss" in x)
    assert (line["eval/count"], line["eval/unreadable"]) == (NUM_TEST, 0)
    assert line["eval/top1"] == 1
    assert "cannot read" in capsys.readouterr().err
    new.mkdir()
    for k, (image, _) in enumerate(examples(6, 50)):
        (new / f"{k}.png").write_bytes(image)
    (new / "a.png").write_bytes(DAMAGED)
    (new / "b.txt").write_text("stray")
    rows = predict_rows(workdir, out, new)
    # Tar files contain the indices of classes, not their names.
    names = [*COLORS] if write is not write_tars else [*"012"]
    assert [row["predicted"] for row in rows] == [*names * 2, ""]
    assert [bool(row["error"]) for row in rows] == [False] * 6 + [True]


@pytest.mark.extras
@pytest.mark.slow
@pytest.mark.usefixtures("minimal_output", "single_device")
def test_images_with_several_labels_are_trained_and_predicted(tmp_path, capsys):
    """The upper half of an image may be red, the lower half blue.

    Images with neither have no label.
    """
    lines = ["file,label,split", "damaged.png,red;blue,train"]
    (tmp_path / "damaged.png").write_bytes(DAMAGED)
    for k in range(NUM_TRAIN + 8):
        labels = ["red"] * (k % 2) + ["blue"] * (k // 2 % 2)
        image = colored(k, (90, 90, 90))
        image[:20] = colored(k, COLORS["red"])[:20] if "red" in labels else image[:20]
        image[20:] = colored(k, COLORS["blue"])[20:] if "blue" in labels else image[20:]
        (tmp_path / f"{k}.png").write_bytes(encode(image, "PNG"))
        split = "train" if k < NUM_TRAIN else "test"
        lines.append(f"{k}.png,{';'.join(labels)},{split}")
    (tmp_path / "all.csv").write_text("\n".join(lines))
    workdir = tmp_path / "run"
    overrides = dict(data__name="csv", data__dir=tmp_path / "all.csv", total_steps=32)
    overrides |= dict(eval_every=32, checkpoint_every=32, log_every=32)
    overrides |= dict(data__multi_label=True)
    train(workdir, **overrides, label_smoothing=0.1, mixup=0.2)
    assert "6 of 25 images of the train split have no label" in capsys.readouterr().out
    (line,) = (x for x in lines_of(workdir) if "eval/loss" in x)
    assert line["eval/mAP"] > 0.9
    assert "eval/top1" not in line

    # Predict the test split, whose labels are known.
    rows = predict_rows(workdir, tmp_path / "test.csv")
    columns = ["predicted", "probability_blue", "probability_red"]
    assert [*rows[0]] == ["file", *columns, "label", "error"]
    # The test split begins after the header, the damaged image and the training images.
    true_labels = [line.split(",")[1].split(";") for line in lines[NUM_TRAIN + 2 :]]
    # Predictions list the classes in alphabetical order.
    assert [row["label"].split(";") for row in rows] == [*map(sorted, true_labels)]
    metrics = json.loads((tmp_path / "test_metrics.json").read_text())
    assert metrics["mAP"] == pytest.approx(line["eval/mAP"], abs=1e-6)
    assert (metrics["images"], metrics["images_of_no_class"]) == (8, 2)
    with open(tmp_path / "test_classes.csv", newline="") as file:
        table = [*csv.DictReader(file)]
    assert [(row["class"], row["images"]) for row in table] == [
        ("blue", "4"),
        ("red", "4"),
    ]
    mean = np.mean([float(row["average_precision"]) for row in table])
    assert mean == pytest.approx(line["eval/mAP"], abs=1e-5)

    # Predict a file without labels, with the saved model.
    convert.convert(str(workdir), tmp_path / "saved")
    info = hivit_jax.load_pretrained(tmp_path / "saved").info
    assert (info.multi_label, info.class_names) == (True, ("blue", "red"))
    (row,) = predict_rows(tmp_path / "saved", tmp_path / "one.csv", tmp_path / "31.png")
    assert [*row] == ["file", *columns, "error"]
    assert [row[name] for name in columns] == [rows[-1][name] for name in columns]
    flags = arguments(**overrides, init_from=workdir)
    assert main([*flags, "--mode=knn", f"--workdir={tmp_path / 'knn'}"]) == 2
    assert "expect one label per image" in capsys.readouterr().err


def test_documented_program_writes_tar_files(tmp_path, monkeypatch):
    """docs/own_images.md contains the program and a command that reads the files."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    contents = {}
    for k in range(24):
        path = tmp_path / "photos" / ("dog", "cat")[k % 2] / f"{k}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(np.roll(noise_image(40, 36, 3), k, 0), "JPEG"))
        contents[path.read_bytes()] = 1 - k % 2  # index in the sorted classes
    page = mini_runs.ROOT / "docs" / "own_images.md"
    [program] = blocks(page, "python")
    exec(compile(program, page.name, "exec"), {})
    [words] = [words for words in commands(page) if "shards" in words[-1]]
    flags, overrides = parse(words[3:])
    config = configs.load(flags.config, overrides)
    sources = [open_source(config.data, split) for split in ("train", "test")]
    samples = [source.sample(k) for source in sources for k in range(len(source))]
    assert {sample["image"]: sample["label"] for sample in samples} == contents
    assert len(samples) == 24
    assert all(len(source) >= 2 for source in sources)
    assert inputs.make_task(config).config.model.num_classes == 2


@pytest.mark.extras
@pytest.mark.slow
@pytest.mark.usefixtures("minimal_output", "single_device")
def test_tiles_of_16_bits_and_4_bands_are_classified(tmp_path, capsys):
    """The model classifies held-out tiles; `predict` reports a damaged tile."""
    for k in range(24):
        bands = np.random.RandomState(k).randint(0, 3000, (34, 36, 4))
        bands[..., k % 2] += 6000
        path = tmp_path / "tiles" / f"c{k % 2}" / f"{k}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        options = dict(photometric="minisblack", planarconfig="contig")
        tifffile.imwrite(path, bands.astype(np.uint16), **options)
    (tmp_path / "tiles" / "c0" / "damaged.tif").write_bytes(DAMAGED)
    (tmp_path / "tiles" / "c0" / "stray.txt").touch()
    overrides = dict(data__dir=tmp_path / "tiles", data__eval_fraction=0.3)
    overrides |= dict(data__dtype="uint16", data__scale=10000, model__in_channels=4)
    overrides |= dict(data__mean=(0.3,) * 4, data__std=(0.3,) * 4)
    train(tmp_path / "run", **overrides)
    (line,) = (x for x in lines_of(tmp_path / "run") if "eval/loss" in x)
    assert 0 < line["eval/count"] < 12
    assert line["eval/top1"] == 1
    assert "16 bits" not in capsys.readouterr().out
    rows = predict_rows(tmp_path / "run", tmp_path / "all.csv", tmp_path / "tiles")
    assert [bool(row["error"]) for row in rows].count(True) == 1
    assert all(row["predicted"] == row["label"] for row in rows if not row["error"])


def arguments(**overrides):
    """Return the command line of a small classifier."""
    flags = mini_runs.arguments("photographs", **CLASSIFIER | overrides)
    return [flag for flag in flags if "decoder" not in flag]


def train(workdir, **overrides):
    """Train the small classifier."""
    assert main([*arguments(**overrides), f"--workdir={workdir}"]) == 0


def predict_rows(checkpoint, out, *paths):
    """Run `predict`; return the rows of its CSV file.

    Args:
      paths: image files and directories; none: the test split.
    """
    flags = [f"--checkpoint={checkpoint}", f"--out={out}", *map(str, paths)]
    assert predict.main(flags) == 0
    with open(out, newline="") as file:
        return [*csv.DictReader(file)]
