"""Tests of the sources that read tar and zip files."""

import io
import json
import tarfile
import zipfile

import numpy as np
import pytest
from buckets import serve
from datasets import assert_batches_equal, encode, folder_config, noise_image
from numpy.testing import assert_array_equal

from hivit_jax import inputs
from hivit_jax.data import records, tar
from hivit_jax.data.sources import archives, registry
from hivit_jax.errors import DataError

pytestmark = pytest.mark.usefixtures("cache_directory")
LABELS = {"train": (3, 0, 2, 1, 3), "val": (1, 2)}


def images(split):
    """Return the encoded images of a split."""
    return [
        encode(noise_image(30, 40 + i, 3), "JPEG") for i in range(len(LABELS[split]))
    ]


def write_tar(path, members, **options):
    """Write a tar file of (name, content) members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


@pytest.fixture(params=["webdataset", "zip"])
def dataset(request, tmp_path):
    """Return (data.name, data.dir): two tar files or a zip file per split."""
    root = tmp_path / request.param
    root.mkdir()
    for split, labels in LABELS.items():
        examples = [*zip(images(split), labels, strict=True)]
        if request.param == "zip":
            with zipfile.ZipFile(root / f"{split}.zip", "w") as archive:
                for i, (image, _) in enumerate(examples[::-1]):
                    archive.writestr(f"c/{len(labels) - 1 - i}.jpg", image)
            lines = [f"c/{i}.jpg\t{label}" for i, label in enumerate(labels)]
            (root / f"{split}_map.txt").write_text("\n".join(lines) + "\n")
            continue
        for shard in range(2):
            members = []
            for i, (image, label) in enumerate(examples):
                if i % 2 == shard:
                    sample = [(f"{i:03}.jpg", image), (f"{i:03}.cls", b"%d" % label)]
                    members += [*sample, (f"{i:03}.json", b"{}" * 4000)]
            write_tar(root / f"x-{split}-{shard}.tar", members)
    return request.param, root


def data_config(dataset, directory=None, **overrides):
    """Return the config of a dataset; `directory` replaces the dataset's directory."""
    name, root = dataset
    return folder_config(directory or root, data__name=name, **overrides)


def order(name, split):
    """Return the indices of the images in the order in which the source lists them."""
    n = len(LABELS[split])
    return [*range(0, n, 2), *range(1, n, 2)] if name == "webdataset" else [*range(n)]


@pytest.mark.parametrize("split", ["train", "test"])
def test_archives_contain_images_labels_names_and_sizes(
    dataset, split, cache_directory
):
    source = registry.open_source(data_config(dataset).data, split)
    stored_split = "train" if split == "train" else "val"
    expected = images(stored_split)
    assert source.classes == ["0", "1", "2", "3"]
    assert len(source) == len(expected)
    for i, k in enumerate(order(dataset[0], stored_split)):
        label = LABELS[stored_split][k]
        assert source.sample(i) == {"image": expected[k], "label": label}
        assert source.name(i).endswith(f"{k}.jpg")
        assert source.size(i) == (30, 40 + k)
    assert len(list(cache_directory.glob("hivit_jax/hivit_jax_index_*"))) >= 1


def test_archive_index_is_rebuilt_after_a_change(dataset):
    cfg = data_config(dataset)
    assert len(registry.open_source(cfg.data, "test")) == 2
    name, root = dataset
    for path in (*root.glob("*val*.tar"), *root.glob("val.zip")):
        path.write_bytes(b"damaged")
    registry._open.cache_clear()
    with pytest.raises(
        DataError, match=f"not a valid {name[:3].replace('web', 'tar')}"
    ):
        registry.open_source(cfg.data, "test")


def test_batches_of_archives_in_a_bucket_equal_local_ones(dataset, tmp_path):
    """The index is saved in the bucket. Batches are equal with data.cache too."""

    def batches(cfg):
        registry._open.cache_clear()
        return [*inputs.train_batches(cfg, 0, 3), *inputs.eval_batches(cfg)]

    name, root = dataset
    expected = batches(data_config(dataset))
    with serve(root) as bucket:
        assert_batches_equal(batches(data_config(dataset, "gs://bucket")), expected)
        assert len(bucket.keys("hivit_jax_index_")) == 2
        bucket.requests.clear()
        assert_batches_equal(batches(data_config(dataset, "gs://bucket")), expected)
        ending = ".tar" if name == "webdataset" else ".zip"
        assert bucket.reads(ending) <= 3 * 8 + 2  # one per image of the batches
        copied = data_config(dataset, "gs://bucket", data__cache=tmp_path / "copies")
        assert_batches_equal(batches(copied), expected)
        for split in ("train", "test"):
            registry.open_source(copied.data, split)._records._cache.stop()


def test_long_names_of_tar_members_are_read(tmp_path):
    """Long names in pax, GNU and ustar files are read; labels may precede images."""
    formats = (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT)
    for index, tar_format in enumerate(formats):
        name = "d" * 90 + "/" + "n" * 80
        members = [(f"{name}.cls", b"2\n"), (f"{name}.JPEG", b"image" * 300)]
        path = tmp_path / f"train{index}.tar"
        write_tar(path, members, format=tar_format)
        content = [(member.name, read()) for member, read in tar.members(str(path))]
        assert content == members
    write_tar(tmp_path / "val.tar", members)
    data = folder_config(tmp_path, data__name="webdataset").data
    source = registry.open_source(data, "train")
    assert [source.sample(i)["label"] for i in range(3)] == [2, 2, 2]
    assert source.sample(1)["image"] == b"image" * 300
    two_files = folder_config(
        tmp_path, data__name="webdataset", data__train_split="train{1..2}.tar"
    ).data
    assert len(registry.open_source(two_files, "train")) == 2


def test_tar_files_without_labels_are_accepted(tmp_path):
    """Unlabeled images are accepted; a mixture with labeled images is an error."""
    write_tar(
        tmp_path / "train.tar", [("a.png", b"1"), ("b.png", b"2"), ("c.txt", b"")]
    )
    data = folder_config(tmp_path, data__name="webdataset").data
    source = registry.open_source(data, "train")
    assert source.classes == []
    assert not source.labeled
    assert source.sample(1) == {"image": b"2", "label": 0}
    assert source.ignored == {"without an image": 1}
    write_tar(
        tmp_path / "train.tar", [("a.png", b"1"), ("b.png", b"2"), ("b.cls", b"0")]
    )
    registry._open.cache_clear()
    with pytest.raises(DataError, match=r"train\.tar: a\.png has no label"):
        registry.open_source(data, "train")


def test_json_member_may_contain_the_label(tmp_path):
    """A .cls member takes precedence. JSON without an integer label has no effect.

    Only the members of samples without an image are counted as ignored.
    """
    members = [
        *[("a.jpg", b"0"), ("a.json", b'{"label": 2}')],
        *[("b.json", b'{"label": 1}'), ("b.jpg", b"1")],
        *[("c.json", b'{"label": 7}'), ("c.jpg", b"2"), ("c.cls", b"0")],
        *[("d.cls", b"3"), ("d.jpg", b"3"), ("d.json", b'{"label": 7}')],
        *[("d.txt", b""), ("e.cls", b"0"), ("e.json", b"{}")],
    ]
    write_tar(tmp_path / "train.tar", members)
    data = folder_config(tmp_path, data__name="webdataset").data
    source = registry.open_source(data, "train")
    assert source.labels.tolist() == [2, 1, 0, 3]
    assert source.ignored == {"without an image": 2}
    contents = (b"[]", b"{", b'{"label": "cat"}', b'{"label": true}', b"{}")
    json_members = [(f"{i}.json", text) for i, text in enumerate(contents)]
    image_members = [(f"{i}.jpg", b"") for i in range(len(contents))]
    write_tar(tmp_path / "train.tar", sorted([*json_members, *image_members]))
    registry._open.cache_clear()
    source = registry.open_source(data, "train")
    assert len(source) == len(contents)
    assert not source.labeled


def write_labels(root, label_format, split, labels):
    """Write an archive of images with labels such as "0;3".

    Args:
      label_format: "cls" or "json" members of a tar file, or "zip".
    """
    if label_format == "zip":
        with zipfile.ZipFile(root / f"{split}.zip", "w") as archive:
            for i in range(len(labels)):
                archive.writestr(f"{i}.jpg", b"image")
        lines = [f"{i}.jpg\t{label}" for i, label in enumerate(labels)]
        (root / f"{split}_map.txt").write_text("\n".join(lines))
        return
    members = []
    for i, label in enumerate(labels):
        members.append((f"{i}.jpg", b"image"))
        if label_format == "cls":
            members.append((f"{i}.cls", label.encode()))
        else:
            numbers = [int(number) for number in label.split(";") if number]
            text = json.dumps({"label": numbers})
            members.append((f"{i}.json", text.encode()))
    write_tar(root / f"{split}.tar", members)


def open_labels(root, label_format, split="train", **keys):
    """Open a split that `write_labels` wrote, bypassing the cache of open sources."""
    registry._open.cache_clear()
    name = "zip" if label_format == "zip" else "webdataset"
    return registry.open_source(
        folder_config(root, data__name=name, **keys).data, split
    )


@pytest.mark.parametrize("label_format", ["cls", "json", "zip"])
def test_archives_may_have_several_labels_per_image(tmp_path, label_format):
    """Labels are separated by ";" or are a JSON list; ";" and [] stand for no class."""
    write_labels(tmp_path, label_format, "train", ["0;3", ";", "2"])
    write_labels(tmp_path, label_format, "val", ["1;0"])
    train = open_labels(tmp_path, label_format, data__multi_label=True)
    assert (train.classes, train.labeled) == ([*"0123"], True)
    expected = [[1, 0, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0]]
    assert_array_equal(train.labels, expected)
    for index, vector in enumerate(expected):
        label = train.sample(index)["label"]
        assert (label.dtype, label.tolist()) == (np.uint8, vector)
    val = open_labels(tmp_path, label_format, "test", data__multi_label=True)
    assert val.labels.tolist() == [[1, 1, 0, 0]]
    # Without data.multi_label, several labels are an error.
    message = r"0\.jpg has the label '0;3'; set data\.multi_label=True"
    with pytest.raises(DataError, match=message):
        open_labels(tmp_path, label_format)
    write_labels(tmp_path, label_format, "val", ["4"])
    with pytest.raises(DataError, match=r"expected labels from 0 to 3, found \[4\]"):
        open_labels(tmp_path, label_format, "test", data__multi_label=True)


@pytest.mark.parametrize("text", [b'{"label": ["cat", "dog"]}', b"{}"])
def test_json_without_class_indices_is_not_a_label(tmp_path, text):
    """With data.multi_label, missing class indices are an error."""
    write_tar(tmp_path / "train.tar", [("a.jpg", b"image"), ("a.json", text)])
    with pytest.raises(DataError, match=r"train\.tar, found none\n.*data\.name=csv"):
        open_labels(tmp_path, "json", data__multi_label=True)
    assert not open_labels(tmp_path, "json").labeled


def test_slices_of_images_with_several_labels_are_disjoint(tmp_path):
    """Each image is in one of two slices, even if it has several labels or none."""
    labels = [("0;1", "1;2", "0", ";")[i % 4] for i in range(40)]
    write_labels(tmp_path, "zip", "train", labels)
    slices = dict(data__train_split="train[:75%]", data__eval_split="train[75%:]")
    parts = [
        open_labels(tmp_path, "zip", split, data__multi_label=True, **slices)
        for split in ("train", "test")
    ]
    names = [{part.name(i) for i in range(len(part))} for part in parts]
    assert [*map(len, names)] == [30, 10]
    assert len(names[0] | names[1]) == 40


def test_missing_zip_file_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"train\.zip does not exist"):
        open_labels(tmp_path, "zip")


def test_archive_index_of_an_earlier_version_is_rebuilt(tmp_path):
    """An index without labels, saved before labels were read from JSON, is rebuilt."""
    members = [("a.jpg", b"0"), ("a.json", b'{"label": 2}')]
    write_tar(tmp_path / "train.tar", members)
    data = folder_config(tmp_path, data__name="webdataset").data
    file = str(tmp_path / "train.tar")

    def merge_without_labels(parts):
        arrays = {"labels": np.array([-1]), "files": np.array([0]), "ignored": [1]}
        return parts[0] | arrays

    records.load_index(str(tmp_path), [file], archives._tar_index, merge_without_labels)
    assert registry.open_source(data, "train").labels.tolist() == [2]


def test_archives_are_split_by_fraction_or_slice(dataset):
    """One set of archives can be split into training and evaluation images."""
    name, root = dataset
    whole = "*train*.tar" if name == "webdataset" else "train"
    held_out = dict(data__train_split=whole, data__eval_fraction=0.4)
    slices = dict(data__train_split=f"{whole}[:50%]", data__eval_split=f"{whole}[50%:]")
    everything = registry.open_source(data_config(dataset).data, "train")
    names = sorted(everything.name(i) for i in range(len(everything)))
    for options in (held_out, slices):
        data = data_config(dataset, **options).data
        parts = [registry.open_source(data, split) for split in ("train", "test")]
        found = [part.name(i) for part in parts for i in range(len(part))]
        assert sorted(found) == names
        assert all(map(len, parts))
        for part in parts:
            k = int(part.name(0)[-5])
            assert part.sample(0)["label"] == part.labels[0] == LABELS["train"][k]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            [("a.png", b"1"), ("a.cls", b"cat")],
            "a.cls: expected a class index, .*'cat'",
        ),
        (
            [("a.png", b"1"), ("a.cls", b"0 2")],
            "a.cls: .* several separated by ';', found '0 2'",
        ),
        ([("a.txt", b"1")], "contains no images"),
    ],
)
def test_tar_file_with_bad_labels_or_no_images_is_an_error(tmp_path, members, message):
    write_tar(tmp_path / "train.tar", members)
    with pytest.raises(DataError, match=message):
        registry.open_source(
            folder_config(tmp_path, data__name="webdataset").data, "train"
        )


def test_truncated_or_missing_tar_file_is_an_error(tmp_path):
    data = folder_config(tmp_path, data__name="webdataset").data
    with pytest.raises(
        DataError, match="no tar file 'train'; data.dir=.* contains nothing"
    ):
        registry.open_source(data, "train")
    path = tmp_path / "train.tar"
    write_tar(path, [("a.png", bytes(5000))])
    named = folder_config(
        tmp_path, data__name="webdataset", data__train_split=path.name
    )
    assert len(registry.open_source(named.data, "train")) == 1
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match="truncated"):
        registry.open_source(data, "train")


def test_compressed_zip_file_or_bad_map_is_an_error(tmp_path):
    with zipfile.ZipFile(tmp_path / "train.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jpg", bytes(np.zeros(1000)))
    (tmp_path / "train_map.txt").write_text("a.jpg\t0\n")
    data = folder_config(tmp_path, data__name="zip").data
    with pytest.raises(DataError, match=r"a\.jpg is compressed .*zip -0"):
        registry.open_source(data, "train")
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        archive.writestr("a.jpg", b"image")
    (tmp_path / "train_map.txt").write_text("b.jpg\t0\n")
    with pytest.raises(DataError, match=r"train_map\.txt, line 1: .*found 'b\.jpg"):
        registry.open_source(data, "train")
    (tmp_path / "train_map.txt").unlink()
    with pytest.raises(DataError, match=r"train_map\.txt does not exist"):
        registry.open_source(data, "train")


def test_zip64_fields_are_read(tmp_path):
    """Offsets and sizes in zip64 fields are read, because large zip files need them."""
    path = tmp_path / "train.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("a.jpg", "b.jpg"):
            with archive.open(name, "w", force_zip64=True) as file:
                file.write(name.encode() * 3)
    (tmp_path / "train_map.txt").write_text("b.jpg\t1\ntrain.zip@/a.jpg\t0\n")
    data = folder_config(tmp_path, data__name="zip").data
    source = registry.open_source(data, "train")
    assert [source.sample(i)["image"] for i in range(2)] == [b"b.jpg" * 3, b"a.jpg" * 3]
    assert source.labels.tolist() == [1, 0]
