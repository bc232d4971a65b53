"""Tests of dataset preparation: files, resuming and errors."""

import http.server
import io
import os
import resource
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mini_runs
import numpy as np
import pytest
import tensorflow_datasets as tfds
import tifffile
from datasets import encode
from imagenet_tars import LABELS, VALIDATION_LABELS, WNIDS, pack_tar, write_tars
from mini_runs import check_message
from PIL import Image

from hivit_jax.data.sources.tfds import OPENERS, Tfds
from hivit_jax.errors import DataError
from hivit_jax.tools import prepare_data, record_shards
from hivit_jax.tools.prepare_data import main

pytestmark = pytest.mark.slow  # importing tensorflow takes seconds

VERSION = Path("imagenet2012") / "5.1.0"


def read_examples(directory: Path, split: str) -> list[dict]:
    """Return the examples of a split as TFDS reads them, with encoded images."""
    builder = tfds.builder_from_directory(directory)
    decoders = {"image": tfds.decode.SkipDecoding()}
    return list(builder.as_data_source(split, decoders=decoders))


def contents(directory: Path) -> dict[str, bytes]:
    """Return {name: content} of the files in a directory."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def size_of(jpeg: bytes) -> tuple[int, int]:
    """Return (width, height) of an image."""
    return Image.open(io.BytesIO(jpeg)).size


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """Return an empty directory, into which `originals` writes ImageNet's tar files."""
    return tmp_path_factory.mktemp("tars")


@pytest.fixture(scope="module")
def originals(tars):
    """Write ImageNet's tar files; return their images."""
    return write_tars(tars)


@pytest.fixture(scope="module")
def flags(tars, originals):
    """Return flags for shards of two images; --data_dir must be added."""
    return [f"--manual_dir={tars}", "--shard_size=2"]


@pytest.fixture(scope="module")
def complete(flags, tmp_path_factory):
    """Return the data directory of an uninterrupted preparation."""
    out = tmp_path_factory.mktemp("whole")
    assert main([*flags, f"--data_dir={out}"]) == 0
    return out


@pytest.fixture(scope="module")
def small(flags, tmp_path_factory):
    """Return the data directory of a preparation that shrinks the training images."""
    out = tmp_path_factory.mktemp("small")
    assert main([*flags, f"--data_dir={out}", "--short_side=32"]) == 0
    return out


def test_records_contain_images_and_labels_of_the_tars(complete, originals):
    train = read_examples(complete / VERSION, "train")
    assert [e["file_name"].decode() for e in train] == list(originals["train"])
    assert [e["image"] for e in train] == list(originals["train"].values())
    assert [e["label"] for e in train] == [LABELS[w] for w in WNIDS for _ in range(5)]
    validation = read_examples(complete / VERSION, "validation")
    assert [e["image"] for e in validation] == list(originals["validation"].values())
    assert [e["label"] for e in validation] == VALIDATION_LABELS


def test_dataset_consists_of_shards_and_descriptions(complete):
    files = set(contents(complete / VERSION))
    shards = {
        f"imagenet2012-{split}.array_record-{i:05d}-of-{n:05d}"
        for split, n in (("train", 8), ("validation", 3))
        for i in range(n)
    }
    descriptions = {"dataset_info.json", "features.json", "label.labels.txt"}
    assert files == shards | descriptions | {"short_side=0"}
    assert os.listdir(complete / VERSION.parent) == [VERSION.name]
    splits = tfds.builder("imagenet2012", data_dir=complete).info.splits
    assert splits["train"].shard_lengths == [2] * 7 + [1]
    assert splits["validation"].num_examples == 6


def test_only_training_images_are_shrunk(complete, small):
    """Shrinking keeps the aspect ratio."""
    reduced = [e["image"] for e in read_examples(small / VERSION, "train")]
    assert {size_of(jpeg) for jpeg in reduced} == {(43, 32)}
    assert read_examples(small / VERSION, "validation") == read_examples(
        complete / VERSION, "validation"
    )


def test_images_of_more_than_8_bits_are_not_shrunk():
    """Shrunk images are JPEGs, which have 8 bits. Small images are unchanged too."""
    gray = np.arange(40 * 30, dtype=np.uint16).reshape(40, 30) * 50
    color = np.repeat(gray[..., None], 3, -1)
    tiff = io.BytesIO()
    tifffile.imwrite(tiff, color, photometric="rgb")
    for values in (gray, gray.astype(np.int32), gray.astype(np.float32)):
        encoded = encode(Image.fromarray(values), "TIFF")
        assert record_shards.shrink(encoded, 15) == encoded
    assert record_shards.shrink(tiff.getvalue(), 15) == tiff.getvalue()
    encoded = encode(Image.fromarray((color // 256).astype(np.uint8)), "TIFF")
    assert size_of(record_shards.shrink(encoded, 15)) == (15, 20)
    assert record_shards.shrink(encoded, 30) == encoded


def test_source_reads_every_example(complete, originals):
    """The source also reads slices of splits. Many threads may read concurrently."""
    source = Tfds("imagenet2012", str(complete), "train")
    jpegs = list(originals["train"].values())
    expected = [(jpegs[i], LABELS[WNIDS[i // 5]]) for i in range(15)]
    assert len(source) == 15
    assert [mini_runs.sample(source, i) for i in range(15)] == expected
    assert len(source.classes) == 1000
    assert source.name(7) == "train[7] n01440764_2.JPEG"
    part = Tfds("imagenet2012", str(complete), "train[3:9]")
    assert [mini_runs.sample(part, i) for i in range(6)] == expected[3:9]
    validation = Tfds("imagenet2012", str(complete), "validation")
    assert [mini_runs.sample(validation, i)[1] for i in range(6)] == VALIDATION_LABELS
    with pytest.raises(
        DataError, match="no split 'test'; available: train, validation"
    ):
        Tfds("imagenet2012", str(complete), "test")

    def reads_in_random_order(seed):
        order = np.random.RandomState(seed).randint(0, 15, 300)
        return [mini_runs.sample(source, i) for i in order] == [
            expected[i] for i in order
        ]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(reads_in_random_order, range(16)))


def test_opening_a_split_raises_the_limit_of_open_files(complete):
    """The limit rises by one per shard; the training split has eight."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (500, before[1]))
        Tfds("imagenet2012", str(complete), "train")
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (508, before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.processes
def test_reading_needs_no_tensorflow(complete, originals, tmp_path):
    program = (
        "import sys, tensorflow_datasets as tfds\n"
        "source = tfds.builder_from_directory(sys.argv[1]).as_data_source(\n"
        "    'train', decoders={'image': tfds.decode.SkipDecoding()})\n"
        "print(len(source), source[7]['label'], source[7]['image'].hex())\n"
    )
    missing = mini_runs.block_imports(tmp_path / "nothing", "tensorflow")
    command = ["-c", program, complete / VERSION]
    code, out, err = mini_runs.run_process(*command, PYTHONPATH=missing)
    assert code == 0, err
    expected = list(originals["train"].values())[7]
    assert out.split() == ["15", "0", expected.hex()]


@pytest.mark.processes
def test_complete_dataset_is_kept(complete, flags):
    """A process reports that the dataset is complete, and writes nothing."""
    before = contents(complete / VERSION)
    command = ["-m", "hivit_jax.tools.prepare_data", *flags, f"--data_dir={complete}"]
    code, out, err = mini_runs.run_process(*command)
    assert (code, err) == (0, "")
    assert "train: 15 images\nvalidation: 6 images\n" in out
    assert f"{complete / VERSION} is complete; nothing to do" in out
    assert f"--config.data.dir={complete}" in out
    assert contents(complete / VERSION) == before


@pytest.mark.processes
def test_killed_process_resumes(small, flags, tmp_path):
    """After SIGKILL in the fourth shard, at the eighth image, three shards remain."""
    program = (
        "import os, signal, sys\n"
        "from hivit_jax.tools import prepare_data, record_shards\n"
        "shrink, calls = record_shards.shrink, []\n"
        "def deadly(*arguments):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 8:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return shrink(*arguments)\n"
        "record_shards.shrink = deadly\n"
        "prepare_data.main(sys.argv[1:])\n"
    )
    command = [*flags, f"--data_dir={tmp_path}", "--short_side=32"]
    code, _, _ = mini_runs.run_process("-c", program, *command)
    assert code == -signal.SIGKILL
    unfinished = tmp_path / f"{VERSION}.incomplete"
    finished = sorted(unfinished.glob("*.array_record-*"))
    assert len(finished) == 3
    before = [(os.stat(p).st_ino, os.stat(p).st_mtime_ns) for p in finished]

    assert main(command) == 0
    assert contents(tmp_path / VERSION) == contents(small / VERSION)
    assert os.listdir(tmp_path / VERSION.parent) == [VERSION.name]
    shards = sorted((tmp_path / VERSION).glob("*train.array_record-*"))[:3]
    after = [(os.stat(p).st_ino, os.stat(p).st_mtime_ns) for p in shards]
    assert after == before


def test_preparation_resumes_after_sigterm_at_any_rename(
    tars, originals, tmp_path, monkeypatch, capsys
):
    """Resuming gives identical files. SIGTERM arrives before or after a rename."""
    replace = Path.replace
    renames, interrupted_rename = [], None

    def interrupting_replace(path, target):
        renames.append(target)
        if len(renames) - 1 == interrupted_rename:
            if interrupted_rename % 2:
                replace(path, target)
            os.kill(os.getpid(), signal.SIGTERM)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", interrupting_replace)
    command = [f"--manual_dir={tars}", "--shard_size=4"]
    assert main([*command, f"--data_dir={tmp_path / 'whole'}"]) == 0
    expected = contents(tmp_path / "whole" / VERSION)
    # Each of the 4 + 2 shards is renamed twice, the directory once.
    assert len(renames) == 2 * (4 + 2) + 1
    for interrupted_rename in range(len(renames)):
        renames.clear()
        out = tmp_path / str(interrupted_rename)
        assert main([*command, f"--data_dir={out}"]) == 75
        assert "same command to resume" in capsys.readouterr().err.splitlines()[-1]
        assert main([*command, f"--data_dir={out}"]) == 0
        assert contents(out / VERSION) == expected


def test_resuming_with_another_short_side_is_an_error(
    complete, flags, tmp_path, capsys
):
    """The error occurs for finished and unfinished datasets."""
    unfinished = tmp_path / f"{VERSION}.incomplete"
    unfinished.mkdir(parents=True)
    (unfinished / "short_side=320").touch()
    for out, short_side, earlier in ((complete, 320, 0), (tmp_path, 0, 320)):
        command = [*flags, f"--data_dir={out}", f"--short_side={short_side}"]
        assert main(command) == 2
        fragments = [
            f"--short_side={short_side}",
            f"started with --short_side={earlier}",
        ]
        check_message(capsys.readouterr().err, [str(out / VERSION), *fragments])


def test_resuming_with_other_images_is_an_error(tmp_path, capsys):
    command = [f"--manual_dir={tmp_path}", f"--data_dir={tmp_path}"]
    write_tars(tmp_path, validation=[])
    assert main(command) == 4
    assert "no image in split validation" in capsys.readouterr().err
    write_tars(tmp_path, wnids=sorted(WNIDS))
    assert main(command) == 4
    assert f"{VERSION}.incomplete was started with other" in capsys.readouterr().err


class Rings(tfds.core.GeneratorBasedBuilder):
    """TFDS dataset of three generated grayscale images."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        image = tfds.features.Image(shape=(None, None, 1))
        features = {"image": image, "label": tfds.features.ClassLabel(num_classes=2)}
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(3):
            yield i, {"image": np.full((8, 8 + i, 1), i, np.uint8), "label": i % 2}


def test_dataset_without_manual_files_is_prepared(tmp_path):
    assert main(["--name=rings", f"--data_dir={tmp_path}", "--short_side=4"]) == 0
    train = read_examples(tmp_path / "rings" / "1.0.0", "train")
    assert [e["label"] for e in train] == [0, 1, 0]
    assert [size_of(e["image"]) for e in train] == [(4, 4), (4, 4), (5, 4)]
    assert Image.open(io.BytesIO(train[0]["image"])).mode == "L"


class Knots(Rings):
    """TFDS dataset like `Rings`, whose images have zero to two labels."""

    def _info(self):
        info = super()._info()
        label = tfds.features.Sequence(info.features["label"])
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(dict(info.features) | {"label": label}),
            supervised_keys=("image", "label"),
        )

    def _generate_examples(self):
        for i, example in super()._generate_examples():
            yield i, example | {"label": [0, 1][:i]}


def test_dataset_with_several_labels_is_prepared(tmp_path, capsys):
    assert main(["--name=knots", f"--data_dir={tmp_path}"]) == 0
    assert capsys.readouterr().out.endswith(" --config.data.multi_label=True\n")
    source = Tfds("knots", str(tmp_path), "train", multi_label=True)
    labels = [source.sample(i)["label"].tolist() for i in range(3)]
    assert labels == [[0, 0], [1, 0], [1, 1]]


class Ropes(Rings):
    """TFDS dataset like `Rings` that downloads a file first."""

    url = ""

    def _split_generators(self, manager):
        manager.download_and_extract({"file": self.url})
        return super()._split_generators(manager)


def test_unreachable_server_is_an_immediate_error(tmp_path, monkeypatch, capsys):
    """The error is immediate and names the server; TFDS alone retries for minutes."""
    address = mini_runs.free_address()
    monkeypatch.setattr(Ropes, "url", f"http://{address}/ropes.tar")
    monkeypatch.setenv("no_proxy", "*")
    assert main(["--name=ropes", f"--data_dir={tmp_path}"]) == 4
    error = capsys.readouterr().err.partition("error: ")[2]
    check_message(f"error: {error}", [f"{address} cannot be reached", "--manual_dir"])


@pytest.mark.parametrize("status", [404, 200])
def test_answers_of_a_server_are_handled_by_tfds(status, tmp_path, monkeypatch, capsys):
    """If the server answers the first request at all, TFDS requests the file itself."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"ropes" * (self.command == "GET"))

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/ropes.txt"
        monkeypatch.setattr(Ropes, "url", url)
        code = main(["--name=ropes", f"--data_dir={tmp_path}"])
        server.shutdown()
    assert code == (0 if status == 200 else 4)
    expected = "to train on it: " if status == 200 else "HTTP code: 404"
    captured = capsys.readouterr()
    assert expected in captured.out + captured.err


def test_tfrecords_of_tfds_are_read(tmp_path):
    """The records contain PNG images. A truncated file is an error."""
    Rings(data_dir=tmp_path, file_format="tfrecord").download_and_prepare()
    source = Tfds("rings", str(tmp_path), "train")
    examples = [mini_runs.sample(source, i) for i in range(3)]
    widths_and_labels = [(size_of(png)[0], label) for png, label in examples]
    assert sorted(widths_and_labels) == [(8, 0), (9, 1), (10, 0)]
    part = Tfds("rings", str(tmp_path), "train[1:]")
    assert [mini_runs.sample(part, 0), mini_runs.sample(part, 1)] == examples[1:]
    (shard,) = tmp_path.glob("rings/1.0.0/*tfrecord*")
    assert source.name(1) == "train[1]"
    shard.write_bytes(shard.read_bytes()[:-3])
    OPENERS["tfrecord"].cache_clear()
    with pytest.raises(OSError, match="ends inside a record"):
        mini_runs.sample(source, 0)
    assert source.name(1) == f"train[1] in {shard}"


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["--name=imagenet2013"], ["'imagenet2013'", "'imagenet2012'?"]),
        (["--name=imagenet2012:9.9.9"], ["imagenet2012:9.9.9", "5.1.0"]),
        (["--name=imagenet2012/x"], ["imagenet2012/x", "not found"]),
        (["--name=coco"], ["coco", "(Image, ClassLabel)", "found ()"]),
        (["--manual_dir="], ["--manual_dir=''", "not a directory", prepare_data.TRAIN]),
        (["--manual_dir=/x/y"], ["--manual_dir='/x/y'", "not a directory"]),
        (["--data_dir=/dev/null"], ["/dev/null", "cannot be written"]),
        (["--label_column=x"], ["--label_column=x", "--from and --out"]),
        (["--short_side=-1"], ["short_side=-1", "at least 0"]),
        (["--short_side=abc"], ["--short_side", "'abc'"]),
        (["--short_sid=3"], ["--short_sid=3"]),
    ],
)
def test_bad_flag_of_prepare_data_exits_with_code_2(
    options, fragments, flags, tmp_path, capsys
):
    assert main([*flags, f"--data_dir={tmp_path}", *options]) == 2
    check_message(capsys.readouterr().err, fragments)
    assert not os.listdir(tmp_path)


def check_refused(tars, exit_code, fragments, capsys):
    """Check that the command fails before it writes anything."""
    out = tars / "out"
    assert main([f"--manual_dir={tars}", f"--data_dir={out}"]) == exit_code
    check_message(capsys.readouterr().err, [str(tars), *fragments])
    assert not out.exists()


def test_missing_or_misnamed_tar_is_an_error(tmp_path, capsys):
    check_refused(
        tmp_path, 2, [prepare_data.TRAIN, prepare_data.VALIDATION, "nothing"], capsys
    )
    write_tars(tmp_path)
    (tmp_path / prepare_data.VALIDATION).rename(tmp_path / "ILSVRC2012_val.tar")
    missing = f"has no {prepare_data.VALIDATION}"
    existing = f"found: {prepare_data.TRAIN}, ILSVRC2012_val.tar"
    check_refused(tmp_path, 2, [missing, existing], capsys)


def test_gap_in_the_validation_images_is_an_error(tmp_path, capsys):
    write_tars(tmp_path, validation=[1, 2, 4, 5])
    expected = "ILSVRC2012_val_00000003.JPEG, found ILSVRC2012_val_00000004.JPEG"
    check_refused(tmp_path, 4, [expected], capsys)


def test_unknown_class_is_an_error(tmp_path, capsys):
    write_tars(tmp_path, wnids=["n01440764", "n00000001"])
    check_refused(tmp_path, 4, ["found n00000001.tar"], capsys)


@pytest.mark.parametrize("tar", [prepare_data.TRAIN, prepare_data.VALIDATION])
def test_truncated_tar_is_an_error(tar, tmp_path, capsys):
    write_tars(tmp_path)
    os.truncate(tmp_path / tar, 9000)
    check_refused(tmp_path, 4, [tar, "not a valid tar file"], capsys)


def test_unreadable_image_cannot_be_shrunk(tmp_path, capsys):
    write_tars(tmp_path)
    classes = {"n01440764.tar": pack_tar({"n01440764_7.JPEG": b"nothing"})}
    (tmp_path / prepare_data.TRAIN).write_bytes(pack_tar(classes))
    command = [f"--manual_dir={tmp_path}", f"--data_dir={tmp_path}", "--short_side=9"]
    assert main(command) == 4
    err = capsys.readouterr().err
    assert "error: image 'n01440764_7.JPEG' cannot be read" in err


def test_truncated_tar_of_a_class_is_an_error(tmp_path, capsys):
    """TFDS's own reader detects a truncated tar file inside the tar file."""
    write_tars(tmp_path)
    class_tar = pack_tar({"n01440764_7.JPEG": b"nothing" * 1000})
    classes = {"n01440764.tar": class_tar[:3000]}
    (tmp_path / prepare_data.TRAIN).write_bytes(pack_tar(classes))
    assert main([f"--manual_dir={tmp_path}", f"--data_dir={tmp_path}"]) == 4
    assert (
        "error: imagenet2012 cannot be prepared: ReadError" in capsys.readouterr().err
    )
