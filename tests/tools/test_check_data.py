"""Tests of check_data on healthy and damaged datasets."""

import os
import shutil
from importlib.util import find_spec

import mini_runs
import numpy as np
import pytest
from datasets import encode
from PIL import Image
from prepared import prepare

from benchmarks.photographs import photographs, write
from hivit_jax.data.sources import digits, folder
from hivit_jax.data.sources.base import Source, multi_hot
from hivit_jax.tools import check_data, dataset_content, dataset_split
from hivit_jax.xla import chips

NAMES = sorted(photographs())


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """Return a directory of 35 training and 14 validation photographs, 64x48."""
    root = tmp_path_factory.mktemp("healthy")
    write(root, {"train": 35, "val": 14}, (64, 48))
    return root


def photo(root, index, split="train"):
    """Return the path of a photograph."""
    return root / split / NAMES[index % len(NAMES)] / f"{index:05}.JPEG"


def exif(orientation):
    """Return EXIF data with an orientation."""
    tags = Image.Exif()
    tags[274] = orientation
    return tags


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """Return a copy of `healthy` with defects in 13 of the first 14 training images."""
    root = tmp_path_factory.mktemp("damaged")
    write(root, {"train": 35, "val": 14}, (64, 48))
    image = Image.open(photo(root, 20))
    levels = np.arange(48 * 64, dtype=np.uint16).reshape(48, 64) * 21
    contents = [
        encode(image, "JPEG")[:-300],
        b"",
        b"no image at all",
        encode(image, "PNG"),
        encode(image.convert("CMYK"), "JPEG"),
        encode(image.convert("CMYK"), "JPEG"),
        encode(image.convert("L"), "JPEG"),
        encode(Image.fromarray(levels), "PNG"),
        encode(image.quantize(16), "PNG"),
        encode(image, "JPEG", exif=exif(6)),
        encode(image, "JPEG", exif=exif(1)),  # has no defect: not rotated
        encode(image, "GIF", save_all=True, append_images=[image.rotate(90)]),
        encode(image.resize((80, 60)), "JPEG"),
    ]
    for index, content in enumerate(contents):
        photo(root, index).write_bytes(content)
    photo(root, 13).unlink()
    photo(root, 13).symlink_to("nowhere")
    return root


@pytest.fixture(autouse=True)
def short_timing(monkeypatch, tmp_path):
    """Shorten the measurement of speed, and use an empty cache directory."""
    monkeypatch.setattr(check_data, "TIMING_SECONDS", 0.05)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def check(capsys):
    """Return a function that runs check_data on class folders.

    The function returns (exit code, stdout, stderr).
    """

    def run(root, *flags, **overrides):
        values = {"data__name": "folder", "data__dir": root, "data__canvas": 64}
        arguments = mini_runs.arguments("photographs", **values | overrides)
        code = check_data.main([*arguments, *flags])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def sections(out):
    """Return the lines about each split, with single spaces."""
    train, test = out.split("\nspeed")[0].split("\ntrain")[1].split("\ntest")
    return [
        [" ".join(line.split()) for line in part.splitlines() if line]
        for part in (f"train{train}", f"test{test}")
    ]


def test_healthy_dataset_passes_the_check(check, healthy):
    code, out, err = check(healthy)
    assert code == 0
    assert out.startswith(f"folder {healthy}\n")
    assert out.endswith("\nhealthy\n")
    assert "error" not in err
    assert "35/35" in err
    assert "14/14" in err
    train, test = sections(out)
    name = photo(healthy, 0)
    assert train == [
        "train: 35 images, 7 classes",
        "min median max",
        "images per class 5 5 5",
        "height 48 48 48",
        "width 64 64 64",
        "images share",
        f"under 64 x 64 35 100.000% e.g. {name}",
        "unreadable 0 0.000%",
        "with an invalid label 0 0.000%",
    ]
    assert test[:3] == [
        "test: 14 images, 7 classes",
        "min median max",
        "images per class 2 2 2",
    ]


@pytest.mark.slow
def test_images_in_subdirectories_of_classes_are_noted(check, tmp_path):
    """Images in subdirectories of a class are noted, but do not fail the check."""
    write(tmp_path, {"train": 14, "val": 7}, (64, 48))
    for split in ("train", "val"):
        inner = tmp_path / split / NAMES[0]
        inner.rename(tmp_path / "moved")
        inner.mkdir()
        (tmp_path / "moved").rename(inner / "deeper")
    code, out, _ = check(tmp_path)
    assert code == 0
    last = out.splitlines()[-1]
    path = photo(tmp_path, 0).parent / "deeper" / "00000.JPEG"
    expected = f"train: 2 images in subdirectories of the classes, e.g. {path}; "
    assert last.startswith(expected + "data.class_level=leaf ")


@pytest.mark.slow
def test_image_with_several_labels_counts_in_each_class(check, healthy, tmp_path):
    """The table has a row for images of no class. A class without images is a fault."""
    rows = [f"{photo(healthy, k)},{'a;b' if k % 3 else ''},train" for k in range(12)]
    rows += [f"{photo(healthy, k, 'val')},a;c,val" for k in range(3)]
    (tmp_path / "all.csv").write_text("\n".join(["path,label,split", *rows]))
    keys = dict(data__name="csv", data__multi_label=True, data__eval_split="val")
    sheet = f"--sheet={tmp_path / 'sheet.png'}"
    code, out, err = check(tmp_path / "all.csv", sheet, **keys)
    table = [line.split()[-3:] for line in out.splitlines() if line.startswith("  ")]
    for row in (["a", "8", "3"], ["b", "8", "0"], ["c", "0", "3"]):
        assert row in table
    (row,) = (line for line in out.splitlines() if "of no class" in line)
    assert row.split()[-2:] == ["4", "0"]
    assert (tmp_path / "sheet.png").is_file()
    assert code == 4
    assert "1 class without an image" in err


def test_speed_estimate_lists_images_per_second_and_cores(check, healthy):
    """A chip's row contains its images per second and the cores that supply them."""
    _, out, _ = check(healthy, model__image_size=224, data__canvas=512)
    lines = [line.split() for line in out.splitlines()]
    header = next(i for i, line in enumerate(lines) if "estimate" in line)
    images_per_core = float(lines[header - 2][1].replace(",", ""))
    config = mini_runs.mae("photographs", model__image_size=224)
    model = check_data.nnx.eval_shape(
        check_data.inputs.task_of_recipe(config).build_model
    )
    # Two FLOP per multiply-add; forward and backward pass cost three forward passes.
    flops = 6 * model.macs(mask_ratio=0.75, layer_norm_cost=0)
    rows = {line[1]: line[2:] for line in lines[header + 1 :] if line[:1] == ["one"]}
    assert rows.keys() == chips.CHIPS.keys()
    expected = {
        "h100": (0.2453, 989, "at 24.5%, measured"),
        "v5e": (0.4, 197, "at 40.0%, assumed"),
        "v5p": (0.4, 459, "at 40.0%, assumed"),
    }
    assert "\n  measured on h100: HiViT-B, pretraining on one H100" in out
    for name, (utilization, peak, basis) in expected.items():
        assert " ".join(rows[name][:-2]) == basis
        per_chip, cores = (float(cell.replace(",", "")) for cell in rows[name][-2:])
        assert per_chip == pytest.approx(utilization * peak * 1e12 / flops, abs=1)
        assert cores == pytest.approx(per_chip / images_per_core, rel=0.01)


def test_damaged_dataset_lists_its_findings_and_fails(check, damaged):
    code, out, err = check(damaged)
    assert code == 4
    train, test = sections(out)
    names = [photo(damaged, index) for index in range(14)]
    assert train[:6] == [
        "train: 35 images, 7 classes",
        "min median max",
        "images per class 4 4 5",
        "height 48 48 60",
        "width 64 64 80",
        "images share",
    ]
    assert sorted(train[6:16]) == sorted(
        [
            f"PNG named .jpeg 3 8.571% e.g. {names[7]}",
            f"GIF named .jpeg 1 2.857% e.g. {names[11]}",
            f"CMYK 2 5.714% e.g. {names[4]}",
            f"grayscale 1 2.857% e.g. {names[6]}",
            f"uint16, reduced to 8 bits 1 2.857% e.g. {names[7]}",
            f"palette 2 5.714% e.g. {names[8]}",
            f"EXIF rotation, not applied 1 2.857% e.g. {names[9]}",
            f"several frames, one is read 1 2.857% e.g. {names[11]}",
            f"over 64, may be slower 1 2.857% e.g. {names[12]}",
            f"under 64 x 64 31 88.571% e.g. {names[7]}",
        ]
    )
    broken = [
        f"{names[0]}: OSError: image file is truncated (6 bytes not processed)",
        f"{names[1]}: OSError: unknown image format (0 bytes)",
        f"{names[2]}: OSError: unknown image format (15 bytes)",
        f"{names[13]}: FileNotFoundError: [Errno 2] No such file or directory: "
        f"'{names[13]}'",
    ]
    assert train[16:] == [
        f"unreadable 4 11.429% e.g. {names[0]}",
        "with an invalid label 0 0.000%",
        "4 unreadable",
        *broken,
    ]
    assert test[-1] == "with an invalid label 0 0.000%"
    assert out.endswith("\ntrain: 4 unreadable\n")
    failure = "train: 4 unreadable, data.max_unreadable=0.001 allows 0 of 35"
    remedy = (
        "leave the unreadable images out with data.exclude=FILE (--list FILE writes "
        "their names), or set a larger data.max_unreadable"
    )
    error = f"error: folder failed the dataset check\n{failure}\n{remedy}\n"
    assert err.endswith(error)


def test_damage_within_max_unreadable_passes_the_check(check, damaged):
    code, out, _ = check(damaged, data__max_unreadable=4 / 35)
    assert code == 0
    assert "\n  4 unreadable\n" in out
    assert out.endswith("\nhealthy\n")


def test_list_flags_write_all_unreadable_files(check, damaged, tmp_path, monkeypatch):
    """The lists are complete, although the report truncates its own list.

    Each line of --list is a path. --list_reasons adds a tab and the reason.
    """
    monkeypatch.setattr(check_data, "MAX_LISTED", 3)
    path, reasons = tmp_path / "broken.txt", tmp_path / "reasons.txt"
    code, out, err = check(damaged, f"--list={path}", f"--list_reasons={reasons}")
    assert code == 4
    written = f"written: {path} (names of 4 unreadable images)\n"
    written += f"written: {reasons} (reasons of 4 unreadable images)\n"
    assert out.endswith(f"\n\n{written}\ntrain: 4 unreadable\n")
    assert f"\nleave the unreadable images out with data.exclude={path}, or" in err
    listed = path.read_text().splitlines()
    assert listed == sorted(str(photo(damaged, i)) for i in (0, 1, 2, 13))
    lines = [line.split("\t") for line in reasons.read_text().splitlines()]
    assert [name for name, _ in lines] == listed
    shown = out.split("4 unreadable\n")[1].split("\n\n")[0]
    assert [line.strip() for line in shown.splitlines()] == [
        *(": ".join(line) for line in lines[:3]),
        "... and 1 more",
    ]


def write_folder(root, *contents):
    """Write class folders whose first training images have these contents."""
    write(root, {"train": 14, "val": 14}, (64, 48))
    for index, content in enumerate(contents):
        photo(root, index).write_bytes(content)


RAMP = np.arange(48 * 64).reshape(48, 64)
FLOAT_RAMP = np.float32(RAMP / RAMP.max())  # from 0 to 1


def test_lost_values_count_as_unreadable(check, tmp_path):
    """12-bit values in a 16-bit file decode to few levels, all nearly black."""
    write_folder(tmp_path, encode(Image.fromarray(RAMP.astype(np.uint16)), "PNG"))
    code, out, err = check(tmp_path)
    assert code == 4
    assert f"{photo(tmp_path, 0)}: 13 of 3072 levels remain; values are 0 to" in out
    assert "healthy" not in out
    failure = "train: 1 with lost values, data.max_unreadable=0.001 allows 0 of 14"
    assert f"\n{failure}\nset data.value_range to " in err
    code, out, _ = check(tmp_path, data__max_unreadable=0.1)
    assert code == 0
    assert out.endswith("\ntrain: 1 with lost values\n")


def test_clipped_values_are_reported_but_pass_the_check(check, tmp_path):
    """Clipping may be intended, as with CT windows."""
    contents = [encode(Image.fromarray(FLOAT_RAMP * scale), "TIFF") for scale in (1, 2)]
    write_folder(tmp_path, *contents)
    code, out, _ = check(tmp_path, data__value_range=(0, 1))
    assert code == 0
    assert f"    {photo(tmp_path, 1)}: 50.00% of the values\n" in out
    assert out.endswith("\ntrain: 1 clipped to data.value_range\n")
    assert " float32, reduced to 8 bits             2" in out


def test_values_without_a_range_fail_the_check(check, tmp_path):
    """The check fails even with max_unreadable=1, because training fails too."""
    write_folder(tmp_path, encode(Image.fromarray(RAMP.astype(np.int32)), "TIFF"))
    code, out, err = check(tmp_path, data__max_unreadable=1.0)
    assert code == 4
    assert "healthy" not in out
    detail = "expected 8 or 16 bits, found int32 values from 0 to 3071; set "
    assert f"{photo(tmp_path, 0)}: {detail}data.value_range=" in out
    assert err.endswith(
        "\ntrain: 1 with values that data.dtype and data.value_range do not cover\n"
        "set data.dtype and data.value_range as described in the report\n"
    )


@pytest.mark.skipif(
    find_spec("imagecodecs") is not None, reason="imagecodecs is installed"
)
def test_missing_codec_has_its_own_remedy(check, tmp_path):
    """LZW pages require imagecodecs. Pillow would read only the first page."""
    pages = [Image.fromarray(RAMP.astype(np.uint8) + k) for k in range(2)]
    options = dict(compression="tiff_lzw", save_all=True, append_images=pages[1:])
    path = tmp_path / "tiles" / "c0" / "a.tif"
    path.parent.mkdir(parents=True)
    path.write_bytes(encode(pages[0], "TIFF", **options))
    keys = dict(data__eval_split="none", model__in_channels=2)
    code, out, err = check(
        path.parents[1], **keys, data__mean=(0.5,) * 2, data__std=(0.5,) * 2
    )
    assert code == 4
    assert f"{path}: OSError: TIFF file with LZW compression, 8 bits, 2 pages: " in out
    assert err.endswith(
        "\nrun pip install imagecodecs to read the compressed TIFF files\n"
    )


def test_check_data_prints_ignored_files_by_ending(check, tmp_path):
    write_folder(tmp_path)
    for name in ("x.heic", "y.HEIC", ".DS_Store", "Thumbs.db", "notes.txt"):
        (photo(tmp_path, 0).parent / name).touch()
    (tmp_path / "train" / "stray.png").touch()
    code, out, _ = check(tmp_path)
    assert code == 0
    text = "2 .heic, 2 hidden or system, 1 .txt, 1 outside the class directories"
    assert f"\n  ignored files: {text}\n" in out
    assert out.count("ignored files") == 1


def lines_after_speed(out):
    """Return the lines after the speed estimate, with single spaces."""
    return [" ".join(x.split()) for x in out.split("\nspeed")[1].splitlines()]


@pytest.mark.slow
def test_report_lists_classes_kinds_of_files_and_settings(check, healthy, tmp_path):
    """The settings are overrides to copy. --sheet draws example images."""
    sheet = tmp_path / "sheet.png"
    code, out, _ = check(healthy, f"--sheet={sheet}")
    assert code == 0
    content = "the first images of up to 20 classes"
    assert f"\nwritten: {sheet} ({content})\n\nhealthy\n" in out
    lines = lines_after_speed(out)
    assert lines[lines.index("class train test") + 1] == f"{NAMES[0]} 5 2"
    assert "imbalance, largest class / smallest class: 1.0" in lines
    assert any(
        line.startswith("train: channels x dtype of files: 3 x uint8: 35; ")
        for line in lines
    )
    assert lines[lines.index("settings:") + 1].startswith("'--config.data.mean=(")
    pixels = np.concatenate(
        [np.asarray(Image.open(p)).reshape(-1, 3) for p in healthy.glob("train/*/*")]
    )
    for name, values in (("mean", pixels.mean(0)), ("std", pixels.std(0))):
        text = ",".join(str(round(value / 255, 4)) for value in values)
        assert f"'--config.data.{name}=({text})'" in lines
    sheet_pixels = np.asarray(Image.open(sheet))
    assert sheet_pixels.shape[2] == 3
    assert (sheet_pixels != 255).any()


def test_images_in_both_splits_are_reported(check, tmp_path, monkeypatch):
    """One file and four groups occur in both splits. Three of the groups are listed.

    The pattern groups files by number. The numbers 10 to 13 occur in both splits.
    """
    monkeypatch.setattr(dataset_content, "MAX_PAIRS", 3)
    write_folder(tmp_path)
    content = photo(tmp_path, 0).read_bytes()
    photo(tmp_path, 14, "val").write_bytes(content)
    code, out, _ = check(tmp_path, r"--group=/0+(1\d)\.")
    assert code == 0
    assert f"    {photo(tmp_path, 0)} = {photo(tmp_path, 14, 'val')}\n" in out
    assert "1 file with equal content in both splits" in out.splitlines()[-1]
    assert "4 groups in both splits" in out.splitlines()[-1]
    assert "4 groups in both splits: 10, 11, 12, ... and 1 more\n" in out
    assert check(tmp_path, "--group=(")[0] == 2


def test_tiles_of_four_bands_require_channels_and_dtype(check, tmp_path):
    """A wrong number of bands is an error; 12-bit values lose levels in uint8."""
    root = tmp_path / "tiles"
    values = np.random.RandomState(0).randint(0, 4096, (6, 64, 64, 4)).astype(np.uint16)
    for k, tile in enumerate(values):
        path = root / f"c{k % 2}" / f"{k}.npy"
        path.parent.mkdir(exist_ok=True, parents=True)
        np.save(path, tile if k else tile[..., :3])
    keys = dict(data__eval_split="none", model__in_channels=4)
    code, out, err = check(root, **keys)
    assert code == 4
    assert f"{root}/c0/0.npy: expected 4 channels, found 3; set model.in_ch" in out
    assert "5 with lost values" in out
    assert "--config.data.dtype=uint16 keeps the 16 bits of 5 files" in out
    np.save(root / "c0" / "0.npy", values[0])
    code, out, err = check(root, data__dtype="uint16", data__scale=4095, **keys)
    assert code == 0, err
    assert out.endswith("\nhealthy\n")
    assert "train (none)" not in out
    mean = ",".join(str(round(x, 4)) for x in values.reshape(-1, 4).mean(0) / 4095)
    assert f"  '--config.data.mean=({mean})'\n" in out


def test_frequent_mismatch_has_one_line_and_no_advice_about_classes(check, tmp_path):
    """A frequent mismatch has one line with its number of images.

    A rare mismatch has one line per image.
    """
    channels = [4] * 6 + [2] * 2
    for k, count in enumerate(channels):
        path = tmp_path / f"c{k % 2}" / f"{k}.npy"
        path.parent.mkdir(exist_ok=True)
        np.save(path, np.zeros((9, 8, count), np.uint8))
    code, out, err = check(tmp_path, data__eval_split="none")
    assert code == 4
    found = [" ".join(x.split()) for x in out.splitlines() if ": expected 3 chan" in x]
    advice = "or leave the file out with data.exclude"
    assert found == [
        f"{tmp_path}/c0/0.npy: expected 3 channels, found 4; set model.in_channels=4, "
        f"{advice} (6 images)",
        f"{tmp_path}/c0/6.npy: expected 3 channels, found 2; set model.in_channels=2, "
        f"{advice}",
        f"{tmp_path}/c1/7.npy: expected 3 channels, found 2; set model.in_channels=2, "
        f"{advice}",
    ]
    assert err.endswith(
        "\ntrain: 8 with the wrong number of channels\n"
        "set model.in_channels to the number of channels of the files\n"
    )


def test_dataset_of_one_class_is_noted(check, tmp_path, capsys):
    """The note is the warning that a run logs. Pretraining has no such note.

    The settings contain the number of classes, except for pretraining.
    """
    write(tmp_path, {"train": 14}, (64, 48))
    for directory in (tmp_path / "train").iterdir():
        if directory.name != NAMES[0]:
            shutil.rmtree(directory)
    flags = ["--config=folder_finetune", f"--config.data.dir={tmp_path / 'train'}"]
    assert check_data.main(flags) == 0
    note = "model.num_classes=1: with one class the loss is always 0"
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == note
    assert "\nsettings:\n  --config.model.num_classes=1\n" in out
    _, out, _ = check(tmp_path / "train", data__eval_split="none")
    assert out.endswith("\nhealthy\n")
    assert "num_classes" not in out


def test_no_settings_are_printed_without_a_readable_image(check, tmp_path):
    """Mean and standard deviation of no pixels would be 0."""
    for name in ("c0", "c1"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        (tmp_path / "photos" / name / "a.png").write_text("no image")
    code, out, _ = check(tmp_path / "photos", data__eval_split="none")
    assert code == 4
    assert "settings:" not in out
    assert "data.mean" not in out
    assert "data.std" not in out


def test_wrong_paths_in_a_csv_file_have_their_own_remedy(check, healthy, tmp_path):
    """Leaving out most of the images would not help."""
    names = [photo(healthy, k) for k in range(6)]
    names += [f"{NAMES[k]}/{k}.jpg" for k in range(7)]
    (tmp_path / "all.csv").write_text("\n".join(["path", *map(str, names)]))
    keys = dict(data__name="csv", data__eval_split="none")
    code, _, err = check(tmp_path / "all.csv", **keys)
    assert code == 4
    first = tmp_path / NAMES[0] / "0.jpg"
    assert f"Most of the listed files do not exist, such as {first}; correct" in err
    assert "relative paths start at the directory of the file" in err
    assert "data.exclude" not in err
    (tmp_path / "half.csv").write_text("\n".join(["path", *map(str, names[:-1])]))
    _, _, err = check(tmp_path / "half.csv", **keys)
    assert "leave the unreadable images out with data.exclude" in err


def test_images_without_labels_pass_the_check(check, healthy):
    keys = dict(data__eval_split="none", data__class_level="none")
    code, out, _ = check(healthy, **keys)
    assert code == 0
    assert "\ntrain: 35 images, no classes\n" in out
    assert "\ntest" not in out
    assert "num_classes" not in out
    assert out.endswith("\nhealthy\n")


def test_multi_label_table_without_labels_passes_the_check(check, healthy, tmp_path):
    names = [str(photo(healthy, k)) for k in range(7)]
    (tmp_path / "all.csv").write_text("\n".join(["path", *names]))
    keys = dict(data__name="csv", data__multi_label=True, data__eval_split="none")
    sheet = tmp_path / "sheet.png"
    code, out, _ = check(tmp_path / "all.csv", f"--sheet={sheet}", **keys)
    assert code == 0
    assert "\ntrain: 7 images, no classes\n" in out
    assert sheet.is_file()


def test_unwritable_list_is_an_error(check, healthy, tmp_path):
    code, _, err = check(healthy, f"--list={tmp_path / 'none' / 'x'}")
    assert code == 2
    assert f"error: --list={tmp_path}/none/x: No such file or directory\n" in err


@pytest.mark.slow
def test_sample_checks_the_same_images_every_time(check, damaged, healthy):
    """With --sample, classes without a checked image are not reported."""
    code, out, err = check(healthy, "--sample=3")
    assert code == 0
    assert "train: 35 images, 7 classes; 3 images checked\n" in out
    assert "test: 14 images, 7 classes; 3 images checked\n" in out
    assert "3/3" in err
    assert "without an image" not in out
    first, second = (
        check(damaged, "--sample=12")[1].split("speed")[0] for _ in range(2)
    )
    assert first == second
    assert check(healthy, "--sample=1000")[1].count("images checked") == 0
    assert check(healthy, "--sample=-1")[0] == 2


def test_class_without_an_image_is_reported(check, tmp_path):
    """A class may lack a folder in one split, or have no readable image."""
    write(tmp_path, {"train": 7, "val": 5}, (64, 48))
    photo(tmp_path, 0).write_bytes(b"")
    code, out, err = check(tmp_path, data__max_unreadable=1.0)
    assert code == 4
    train, test = sections(out)
    assert train[-2:] == ["1 class without an image", "astronaut"]
    assert test[-3:] == ["2 classes without an image", *NAMES[5:]]
    problem = "train: 1 class without an image; test: 2 classes without an image"
    assert out.endswith(f"\n{problem}\n")
    # The error lists the failures of both splits, and one remedy.
    remedy = "add images of every class, or remove the classes without an image"
    assert err.endswith(f"\n{problem}\n{remedy}\n")


def test_class_without_held_out_images_is_noted(check, tmp_path):
    """The class has one image, for training. If it is unreadable, the check fails."""
    root = tmp_path / "own"
    write(root, {".": 21}, (64, 48))
    photo(root, 7, ".").unlink()
    photo(root, 14, ".").unlink()
    keys = dict(data__train_split=".", data__eval_fraction=0.3)
    code, out, err = check(root, **keys)
    assert code == 0, err
    assert out.endswith("\nthe evaluation has no image of 1 class: astronaut\n")
    photo(root, 0, ".").write_bytes(b"")
    code, out, err = check(root, data__max_unreadable=1.0, **keys)
    assert code == 4
    assert out.endswith("\ntrain (.): 1 class without an image\n")
    # An evaluation split that is a slice has the same note.
    slices = dict(data__train_split=".[:80%]", data__eval_split=".[80%:]")
    photo(root, 0, ".").write_bytes(photo(root, 1, ".").read_bytes())
    code, out, _ = check(root, **slices)
    assert "the evaluation has no image of 1 class: astronaut" in out


def test_unlabeled_images_with_held_out_images_pass_the_check(check, tmp_path):
    """The dataset has no classes, so no class lacks held-out images."""
    root = tmp_path / "own"
    write(root, {".": 12}, (64, 48))
    for path in sorted(root.rglob("*.JPEG")):
        path.rename(root / path.name)
        if not any(path.parent.iterdir()):
            path.parent.rmdir()
    code, out, err = check(root, data__train_split=".", data__eval_fraction=0.25)
    assert code == 0, err
    assert out.endswith("\nhealthy\n")
    assert "train (.): 9 images, no classes\n" in out


def test_entries_of_data_exclude_without_an_image_are_noted(check, healthy, tmp_path):
    """An entry may belong to either split."""
    lines = [photo(healthy, 0), photo(healthy, 0, "val"), "nowhere.png", "*.JPEG"]
    (tmp_path / "bad.txt").write_text("\n".join(map(str, lines)))
    code, out, _ = check(healthy, data__exclude=tmp_path / "bad.txt")
    assert code == 0
    note = "2 entries match no image, the first is 'nowhere.png'; expected paths as "
    assert f"\ndata.exclude={tmp_path}/bad.txt: {note}" in out


def test_unreadable_images_of_other_datasets_have_another_remedy(capsys, monkeypatch):
    """The digits do not support data.exclude."""
    monkeypatch.setattr(digits.Digits, "sample", lambda self, index: {})
    flags = mini_runs.arguments("digits", data__train_examples=100)
    assert check_data.main([*flags, "--sample=10"]) == 4
    remedy = "restore the unreadable images, or set a larger data.max_unreadable"
    assert capsys.readouterr().err.endswith(f"\n{remedy}\n")


def test_invalid_labels_fail_the_check(check, healthy, monkeypatch):
    sample = folder.Folder.sample
    wrong = {3: -1, 8: 7}  # index of an example -> invalid label

    def mislabeled(self, index):
        example = sample(self, index)
        return example | {"label": wrong.get(index, example["label"])}

    monkeypatch.setattr(folder.Folder, "sample", mislabeled)
    code, out, err = check(healthy)
    assert code == 4
    train, test = sections(out)
    labels = ["2 with an invalid label"]
    labels += [f"{healthy}/train/astronaut/00021.JPEG: -1"]
    labels += [f"{healthy}/train/cat/00022.JPEG: 7"]
    assert train[-3:] == labels
    assert "images per class 4 5 5" in train
    assert "\ntrain: 2 with an invalid label; test: 2 with an invalid label\n" in err
    assert err.endswith("\ncorrect the invalid labels\n")


def test_invalid_label_vectors_are_findings(healthy, monkeypatch):
    """A vector is invalid if training rejects it. Short vectors are padded with 0."""

    class Labeled(Source):
        classes = ("a", "b", "c")
        vectors = ([1, 0, 1], [1], [0, 2, 0], [0] * 4, 1, None)

        def __len__(self):
            return len(self.vectors)

        def sample(self, index):
            label = self.vectors[index]
            if label is None:
                label = multi_hot([0, -1], 3)  # raises LabelError
            return {"image": photo(healthy, index).read_bytes(), "label": label}

    monkeypatch.setattr(dataset_split, "open_source", lambda data, split: Labeled())
    config = mini_runs.mae("photographs", data__multi_label=True)
    split = dataset_split.Split(config, "train")
    split.read()
    assert split.labels.tolist() == [[1, 0, 1], [1, 0, 0], *[[-1] * 3] * 4]
    found = split.findings[dataset_split.BAD_LABEL]
    assert [*found] == [2, 3, 4, 5]
    assert "of length at most 3, found [0, 2, 0]" in found[2]
    assert found[5] == "expected labels from 0 to 2, found [0, -1]"
    assert dataset_split.OTHER_VALUES not in split.findings


def test_unusual_file_names_are_escaped(check, tmp_path):
    """One name is not valid UTF-8, another contains a newline."""
    write(tmp_path, {"train": 7, "val": 7}, (64, 48))
    not_utf_8 = os.fsencode(photo(tmp_path, 0).parent) + b"/\xff.JPEG"
    with open(not_utf_8, "wb"):
        pass
    two_lines = photo(tmp_path, 1).with_name("a\nb.png")
    two_lines.touch()
    files = [tmp_path / "broken.txt", tmp_path / "reasons.txt"]
    flags = f"--list={files[0]}", f"--list_reasons={files[1]}"
    code, out, _ = check(tmp_path, *flags)
    assert code == 4
    assert "/astronaut/\\udcff.JPEG: OSError: unknown image format (0 bytes)" in out
    listed = files[0].read_bytes().splitlines()
    assert sorted(listed) == sorted(
        [not_utf_8, os.fsencode(two_lines).replace(b"\n", b"\\n")]
    )
    reasons = files[1].read_text()
    assert "/astronaut/\\udcff.JPEG\tOSError: unknown" in reasons
    assert "/a\\nb.png\tOSError: unknown" in reasons


def test_missing_split_is_an_error(check, healthy):
    code, out, err = check(healthy, data__eval_split="validation")
    assert code == 4
    assert out == ""
    assert f"no directory {healthy}/validation" in err


def test_titles_contain_the_names_of_configured_splits(check, healthy):
    code, out, _ = check(healthy, data__train_split="train", data__eval_split="train")
    assert code == 0
    assert "\ntrain (train): 35 images" in out
    assert "\ntest (train): 35 images" in out


@pytest.mark.slow
def test_digits_pass_the_check(capsys):
    assert check_data.main(mini_runs.arguments("digits", data__train_examples=100)) == 0
    out = capsys.readouterr().out
    assert "\ntrain: 100 images, 10 classes\n" in out
    assert "\ntest: 360 images, 10 classes\n" in out
    assert "e.g. digit " in out
    assert out.endswith("\nhealthy\n")


@pytest.mark.parametrize(
    ("flags", "fragment"),
    [
        (["--config.data.name=synthetic"], "'synthetic'"),
        (["--config.model.depths=3"], "config.model.depths='3'"),
        (["--config.model.patch_size=0"], "patch_size=0"),
        (["--sample=many"], "--sample"),
    ],
)
def test_bad_flag_of_check_data_exits_with_code_2(flags, fragment, capsys):
    assert check_data.main([*mini_runs.arguments("digits"), *flags]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert fragment in err


@pytest.mark.processes
@pytest.mark.slow
def test_process_imports_no_tensorflow_and_starts_no_backend(healthy, tmp_path):
    program = (
        "import sys\n"
        "from hivit_jax.tools.check_data import main\n"
        "code = main(sys.argv[1:])\n"
        "from jax._src import xla_bridge\n"
        "assert 'tensorflow' not in sys.modules\n"
        "assert not xla_bridge._backends  # the initialized backends\n"
        "sys.exit(code)"
    )
    flags = mini_runs.arguments("photographs", data__name="folder", data__dir=healthy)
    flags.append("--sample=5")
    code, out, _ = mini_runs.run_process("-c", program, *flags, XDG_CACHE_HOME=tmp_path)
    assert code == 0
    assert out.endswith("\nhealthy\n")


@pytest.mark.slow
def test_wrong_checksum_of_a_tfrecord_is_reported(check, tmp_path):
    """A record with a wrong checksum is reported even if its image can be decoded."""
    path = prepare(tmp_path, "tfrecord")
    [shard] = path.glob("*validation*00001-of*")
    data = bytearray(shard.read_bytes())
    data[-2] ^= 1  # in the last record's checksum
    shard.write_bytes(data)
    code, out, err = check(tmp_path, data__name="noise_images")
    assert code == 4
    assert "1 with a wrong checksum" in out
    assert "the checksum of the record's data is wrong" in out
