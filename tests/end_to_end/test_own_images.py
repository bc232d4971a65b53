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
from hivit_jax.main import main
from hivit_jax.tools import convert, predict, prepare_data

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


FLAGS = dict(data__name="folder", model__image_size=32, batch_size=8, total_steps=2)


@pytest.mark.slow
def test_pretraining_without_labels_and_evaluation(tiles, tmp_path, capsys):
    """Without evaluation images, figures show training images."""
    flags = FLAGS | dict(data__dir=tiles, data__eval_split="none", eval_every=1)
    flags |= dict(data__class_level="none", checkpoint_every=1)
    arguments = mini_runs.arguments("photographs", **flags)
    workdir = tmp_path / "run"
    assert main([*arguments, f"--workdir={workdir}"]) == 0
    out = capsys.readouterr().out
    assert "eval" not in out
    assert not [key for line in lines_of(workdir) for key in line if "eval" in key]
    figures = {path.name for path in (workdir / "figures").iterdir()}
    assert figures == {
        "curves.png",
        "reconstruction_0000001.png",
        "reconstruction_0000002.png",
    }
    assert main([*arguments, f"--workdir={workdir}", "--mode=eval"]) == 2
    assert "the config has no evaluation images" in capsys.readouterr().err


def test_classification_needs_labels(tiles, tmp_path, capsys):
    flags = mini_runs.arguments("photographs", **FLAGS, data__dir=tiles)
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
CLASSIFIER = FLAGS | dict(
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


def colored(number, color):
    """Return an image of noise around a color, uint8 [40, 48, 3]."""
    noise = np.random.RandomState(number).randint(-25, 26, (40, 48, 3))
    return (np.array(color) + noise).clip(0, 255).astype(np.uint8)


def examples(count, first=0):
    """Return (encoded image, class name) of examples of the three colors in turn."""
    names = [[*COLORS][k % 3] for k in range(count)]
    images = [colored(first + k, COLORS[name]) for k, name in enumerate(names)]
    return [(encode(x, "PNG"), n) for x, n in zip(images, names, strict=True)]


SPLITS = {"train": examples(NUM_TRAIN), "val": examples(NUM_TEST, NUM_TRAIN)}


def write_csv(root):
    """Write a CSV file and images: one is damaged, one missing, one not listed."""
    lines = ["file,label,split", "damaged.png,red,train", "missing.png,red,train"]
    (root / "damaged.png").write_bytes(DAMAGED)
    (root / "stray.png").write_bytes(DAMAGED)
    for split, found in SPLITS.items():
        for k, (image, name) in enumerate(found):
            (root / f"{split}{k}.png").write_bytes(image)
            lines.append(f"{split}{k}.png,{name},{split}")
    (root / "all.csv").write_text("\n".join(lines))
    return dict(data__name="csv", data__dir=root / "all.csv")


def write_tars(root):
    """Write one tar file per split, with a damaged image and a stray file."""
    for split, found in SPLITS.items():
        with tarfile.open(root / f"own-{split}.tar", "w") as archive:
            pairs = [*found, (DAMAGED, "red")] if split == "train" else found
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
    for split, found in SPLITS.items():
        images, names = map(list, zip(*found, strict=True))
        if split == "train":
            images, names = [*images, DAMAGED, None], [*names, "red", "red"]
        structs = [{"bytes": image, "path": None} for image in images]
        table = pyarrow.table({"image": structs, "label": names})
        parquet.write_table(table, root / f"{split}-00000-of-00001.parquet")
    assert prepare_data.main([f"--from={root}", f"--out={root / 'own'}"]) == 0
    return dict(data__name="own", data__dir=root)


@pytest.mark.slow
@pytest.mark.usefixtures("minimal_output")
@pytest.mark.parametrize("write", [write_csv, write_tars, write_parquet])
def test_from_files_to_predictions(write, tmp_path, capsys):
    """Damaged images have weight 0 and are reported; all predictions are correct."""
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
    found = predicted(workdir, out, new)
    names = [*COLORS] if write is not write_tars else [*"012"]
    assert [row["predicted"] for row in found] == [*names * 2, ""]
    assert [bool(row["error"]) for row in found] == [False] * 6 + [True]


@pytest.mark.extras
@pytest.mark.slow
@pytest.mark.usefixtures("minimal_output")
def test_several_labels(tmp_path, capsys):
    """The upper half may be red, the lower half blue; some images have no label."""
    lines = ["file,label,split", "damaged.png,red;blue,train"]
    (tmp_path / "damaged.png").write_bytes(DAMAGED)
    for k in range(NUM_TRAIN + 8):
        labels = [n for n, has in (("red", k % 2), ("blue", k // 2 % 2)) if has]
        image = colored(k, (90, 90, 90))
        image[:20] = colored(k, COLORS["red"])[:20] if "red" in labels else image[:20]
        image[20:] = colored(k, COLORS["blue"])[20:] if "blue" in labels else image[20:]
        (tmp_path / f"{k}.png").write_bytes(encode(image, "PNG"))
        split = "train" if k < NUM_TRAIN else "test"
        lines.append(f"{k}.png,{';'.join(labels)},{split}")
    (tmp_path / "all.csv").write_text("\n".join(lines))
    workdir = tmp_path / "run"
    flags = dict(data__name="csv", data__dir=tmp_path / "all.csv", total_steps=32)
    flags |= dict(eval_every=32, checkpoint_every=32, log_every=32)
    train(workdir, **flags, data__multi_label=True, label_smoothing=0.1, mixup=0.2)
    assert "6 of 25 images of the train split have no label" in capsys.readouterr().out
    (line,) = (x for x in lines_of(workdir) if "eval/loss" in x)
    assert line["eval/mAP"] > 0.9
    assert "eval/top1" not in line

    # Predict the test split, whose labels are known.
    found = predicted(workdir, tmp_path / "test.csv")
    columns = ["predicted", "probability_blue", "probability_red"]
    assert [*found[0]] == ["file", *columns, "label", "error"]
    truth = [row.split(",")[1].split(";") for row in lines[NUM_TRAIN + 2 :]]
    assert [row["label"].split(";") for row in found] == [x[::-1] for x in truth]
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
    (row,) = predicted(tmp_path / "saved", tmp_path / "one.csv", tmp_path / "31.png")
    assert [*row] == ["file", *columns, "error"]
    assert [row[name] for name in columns] == [found[-1][name] for name in columns]
    flags = arguments(**flags, data__multi_label=True, init_from=workdir)
    assert main([*flags, "--mode=knn", f"--workdir={tmp_path / 'knn'}"]) == 2
    assert "expect one label per image" in capsys.readouterr().err


@pytest.mark.extras
@pytest.mark.slow
@pytest.mark.usefixtures("minimal_output")
def test_tiles_of_16_bits_and_4_bands(tmp_path, capsys):
    """A trained model classifies held-out tiles, and reports a damaged tile."""
    for k in range(24):
        bands = np.random.RandomState(k).randint(0, 3000, (34, 36, 4))
        bands[..., k % 2] += 6000
        path = tmp_path / "tiles" / f"c{k % 2}" / f"{k}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        options = dict(photometric="minisblack", planarconfig="contig")
        tifffile.imwrite(path, bands.astype(np.uint16), **options)
    (tmp_path / "tiles" / "c0" / "damaged.tif").write_bytes(DAMAGED)
    (tmp_path / "tiles" / "c0" / "stray.txt").touch()
    flags = dict(data__dir=tmp_path / "tiles", data__eval_fraction=0.3)
    flags |= dict(data__dtype="uint16", data__scale=10000, model__in_channels=4)
    flags |= dict(data__mean=(0.3,) * 4, data__std=(0.3,) * 4)
    train(tmp_path / "run", **flags)
    (line,) = (x for x in lines_of(tmp_path / "run") if "eval/loss" in x)
    assert 0 < line["eval/count"] < 12
    assert line["eval/top1"] == 1
    assert "16 bits" not in capsys.readouterr().out
    found = predicted(tmp_path / "run", tmp_path / "all.csv", tmp_path / "tiles")
    assert [bool(row["error"]) for row in found].count(True) == 1
    assert all(row["predicted"] == row["label"] for row in found if not row["error"])


def arguments(**overrides):
    """Return the command line of a small classifier."""
    flags = mini_runs.arguments("photographs", **CLASSIFIER | overrides)
    return [flag for flag in flags if "decoder" not in flag]


def train(workdir, **overrides):
    assert main([*arguments(**overrides), f"--workdir={workdir}"]) == 0


def predicted(checkpoint, out, *paths):
    """Return the rows of the predictions."""
    flags = [f"--checkpoint={checkpoint}", f"--out={out}", *map(str, paths)]
    assert predict.main(flags) == 0
    with open(out, newline="") as file:
        return [*csv.DictReader(file)]
