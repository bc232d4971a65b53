"""Tests of selecting images of a folder by fraction, group, slice or exclusion."""

from collections import Counter

import mini_runs
import numpy as np
import pytest

from hivit_jax.data.sources import registry, splits
from hivit_jax.errors import ConfigError, DataError

pytestmark = pytest.mark.usefixtures("cache_directory")
DATA = {
    "name": "folder",
    "train_split": "",
    "eval_split": "",
    "train_examples": 0,
    "subset": 0,
}


@pytest.fixture
def root(tmp_path):
    """Return a directory with classes of 40, 2 and 1 images and without splits."""
    root = tmp_path / "data"
    for name, count in (("brick", 40), ("cat", 2), ("lone", 1)):
        (root / name).mkdir(parents=True)
        for k in range(count):
            (root / name / f"s{k // 4}_{k:02}.png").write_text(f"{name}{k}")
    return root


def open_split(root, split, **keys):
    """Open a split, bypassing the cache of open sources."""
    registry._open.cache_clear()
    return registry.open_source(DATA | {"dir": str(root)} | keys, split)


def paths(root, split, **keys):
    """Return the relative paths of a split, and check contents and labels."""
    source = open_split(root, split, **keys)
    names = [source.name(i) for i in range(len(source))]
    for i, name in enumerate(names):
        encoded, label = mini_runs.sample(source, i)
        with open(name) as file:
            assert encoded.decode() == file.read()
        if source.labeled:
            class_name = name.removeprefix(f"{source._source.root}/").rpartition("/")[0]
            assert source.classes[label] == class_name
            assert source.labels[i] == label
    return [name.removeprefix(f"{root}/") for name in names]


def test_eval_fraction_puts_every_image_on_one_side(root):
    """The path of an image determines its side."""
    train = paths(root, "train", eval_fraction=0.25)
    held_out = paths(root, "test", eval_fraction=0.25)
    assert sorted(train + held_out) == sorted(
        p.relative_to(root).as_posix() for p in root.glob("*/*")
    )
    assert train == sorted(train)
    counts = Counter(path.split("/")[0] for path in held_out)
    assert counts == {"brick": 13, "cat": 1}
    source = open_split(root, "test", eval_fraction=0.25)
    assert source.classes == ["brick", "cat", "lone"]
    assert held_out[:3] == FIRST_HELD_OUT


# These names must not change, because saved runs depend on them.
FIRST_HELD_OUT = [f"brick/{name}.png" for name in ("s0_00", "s0_03", "s1_04")]


def test_held_out_images_do_not_depend_on_other_files(root):
    """Adding or removing a file leaves the other files of its class on their side."""
    before = set(paths(root, "test", eval_fraction=0.25))
    (root / "brick" / "zz.png").write_text("new")
    (root / "brick" / "s0_00.png").unlink()
    after = set(paths(root, "test", eval_fraction=0.25))
    assert before - after <= {"brick/s0_00.png"}
    assert after - before <= {"brick/zz.png"}
    more = set(paths(root, "test", eval_fraction=0.5))
    assert after < more


@pytest.mark.parametrize("fraction", [1e-6, 0.3, 0.999])
def test_classes_of_several_images_are_on_both_sides(root, fraction):
    train = paths(root, "train", eval_fraction=fraction)
    held_out = paths(root, "test", eval_fraction=fraction)
    assert {path.split("/")[0] for path in train} == {"brick", "cat", "lone"}
    assert {path.split("/")[0] for path in held_out} == {"brick", "cat"}


@pytest.mark.parametrize("fraction", [1e-6, 0.3, 0.999])
def test_groups_stay_together(root, fraction):
    """All images of a scene (s0, s1, ...) are on one side, whatever their class."""
    options = dict(eval_fraction=fraction, eval_group=r"/(s\d+)_")
    train, held_out = (paths(root, split, **options) for split in ("train", "test"))
    scenes = [{p.split("/")[1][:2] for p in side} for side in (train, held_out)]
    assert not scenes[0] & scenes[1]
    assert len(train) + len(held_out) == 43
    assert {path.split("/")[0] for path in train} == {"brick", "cat", "lone"}
    assert {path.split("/")[0] for path in held_out} == {"brick"}


def test_group_is_held_out_only_if_its_classes_have_other_groups():
    """Groups stay whole, and every class keeps a group for training."""
    groups = [*"aabbcc"]
    for fraction in (1e-9, 1 - 1e-9):
        mask = splits.hold_out(groups, np.array([0, 1, 0, 1, 0, 1]), fraction)
        assert 0 < mask.sum() < 6
        assert (mask[::2] == mask[1::2]).all()
    assert not splits.hold_out([*"aab"], np.array([0, 1, 1]), 1e-9)[:2].any()
    assert splits.hold_out([], np.zeros(0, np.int64), 0.5).shape == (0,)


def test_slices_of_each_class_are_disjoint(root):
    """The slices do not follow the order of the names."""
    pieces = [
        paths(root, "train", train_split=f"[{text}]", eval_split=".")
        for text in (":50%", "50%:75%", "-25%:")
    ]
    assert [len(piece) for piece in pieces] == [21, 12, 10]
    assert len(set().union(*pieces)) == 43
    assert pieces[0] != sorted(p for piece in pieces for p in piece)[:21]
    evaluated = paths(root, "test", train_split="[:50%]", eval_split=".[75%:]")
    assert evaluated == pieces[2]


def test_slice_of_the_training_images_does_not_change_the_held_out_images(root):
    options, sliced = dict(eval_fraction=0.25), {}
    for split in ("train", "test"):
        sliced[split] = paths(root, split, train_split="[:50%]", **options)
    assert sliced["test"] == paths(root, "test", **options)
    train = paths(root, "train", **options)
    assert set(sliced["train"]) < set(train)
    assert len(sliced["train"]) == pytest.approx(len(train) / 2, abs=1)


def test_slices_may_refer_to_a_directory(root):
    (root / "photos").mkdir()
    for name in ("brick", "cat", "lone"):
        (root / name).rename(root / "photos" / name)
    train = paths(root, "train", train_split="photos[:80%]")
    assert len(train) == 32 + 2 + 1
    assert (
        len(paths(root, "test", eval_split="photos[80%:]", train_split="photos")) == 8
    )
    assert len(paths(root, "test", eval_fraction=0.25, train_split="photos")) == 14


@pytest.mark.parametrize("text", ["train[:10]", "[50%:20%]", "x[:200%]", "x[a]"])
def test_invalid_slice_is_an_error(root, text):
    with pytest.raises(DataError, match=r"expected NAME or NAME\[A%:B%\]"):
        open_split(root, "train", train_split=text)


def test_excluded_paths_may_be_absolute_or_relative(
    root, tmp_path_factory, monkeypatch
):
    """Excluded paths may be absolute, as check_data writes them, or relative."""
    file = tmp_path_factory.mktemp("lists") / "bad.txt"
    strange = root / "brick" / "a\nb.png"
    strange.write_text("brick")
    monkeypatch.chdir(root)
    lines = ["brick/s0_00.png", f"{root}/cat/s0_01.png", "./cat/s0_00.png", ""]
    file.write_text("\n".join([*lines, f"{root}/brick/a\\nb.png", "elsewhere.png"]))
    source = open_split(root, "train", train_split=".", exclude=str(file))
    assert len(source) == 40
    assert source.ignored_text() == "4 excluded by data.exclude"
    assert source.unmatched == ["elsewhere.png"]
    options = dict(eval_fraction=0.3, exclude=str(file))
    both = [open_split(root, split, **options) for split in ("train", "test")]
    assert sum(map(len, both)) == 40
    with pytest.raises(ConfigError, match="data.exclude=nowhere: No such file"):
        open_split(root, "train", train_split=".", exclude="nowhere")


def test_leaf_directories_are_classes(root):
    """class_level="leaf" makes a class of each directory that contains images."""
    nested = root / "nested"
    for name in ("train/animals/cat", "train/things/flower", "val/animals/cat"):
        (nested / name).mkdir(parents=True)
        (nested / name / "0.png").write_text("x")
    (nested / "train" / "loose.png").touch()
    (nested / "train" / "animals" / "wild.png").touch()
    assert open_split(nested, "train").classes == ["animals", "things"]
    source = open_split(nested, "train", class_level="leaf")
    assert source.classes == ["animals", "animals/cat", "things/flower"]
    assert source.labels.tolist() == [0, 1, 2]
    assert source.loose == ["loose.png"]
    assert source.ignored_text() == "1 outside the class directories"
    test = open_split(nested, "test", class_level="leaf")
    assert (test.classes, test.labels.tolist()) == (source.classes, [1])


def test_images_outside_class_folders_have_no_labels(root):
    """Images have no labels outside class folders or with class_level="none"."""
    source = open_split(root / "brick", "train", eval_split="none")
    assert (len(source), source.classes, source.labeled) == (40, (), False)
    assert mini_runs.sample(source, 3) == (b"brick3", 0)
    assert source.name(0) == f"{root}/brick/s0_00.png"
    (root / "brick" / "below" / "deeper").mkdir(parents=True)
    (root / "brick" / "below" / "deeper" / "x.png").touch()
    source = open_split(root, "train", eval_split="none", class_level="none")
    assert (len(source), source.labeled) == (44, False)
    assert source.labels.tolist() == [0] * 44
    assert len(paths(root, "test", eval_fraction=0.25, class_level="none")) == 14
    (root / "train").mkdir()
    (root / "train" / "x.png").touch()
    assert len(open_split(root, "train", eval_split="none")) == 1
    with pytest.raises(ConfigError, match="the config has no evaluation images"):
        open_split(root, "test", eval_split="none")


def test_npy_files_are_images_only_without_other_images(root):
    (root / "brick" / "features.npy").touch()
    assert len(open_split(root, "train", eval_split="none")) == 43
    for path in root.glob("*/*.png"):
        path.rename(path.with_suffix(".npy"))
    assert len(open_split(root, "train", eval_split="none")) == 44


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"eval_fraction": 0.1, "eval_split": "val"}, "expected only one of the two"),
        ({"eval_group": "(a)"}, "no effect with data.eval_fraction=0"),
        ({"eval_group": "a", "eval_fraction": 0.1}, "expected a group in parentheses"),
        ({"eval_group": "(", "eval_fraction": 0.1}, "expected a regular expression"),
        ({"name": "digits", "eval_fraction": 0.1}, "no effect with data.name='digits'"),
        ({"name": "mnist", "class_level": "leaf"}, "class_level='leaf' has no effect"),
    ],
)
def test_contradictory_or_invalid_selection_is_an_error(root, keys, message):
    with pytest.raises(ConfigError, match=message):
        open_split(root, "train", **keys)


def test_group_pattern_that_matches_no_path_is_an_error(root):
    with pytest.raises(DataError, match="none of 43 paths, such as brick/s0"):
        open_split(root, "train", eval_fraction=0.1, eval_group="(patient)")
