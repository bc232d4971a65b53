"""Test that training from a failing bucket equals training from local files."""

import mini_runs
import pytest
from buckets import serve
from prepared import prepare

pytestmark = [pytest.mark.slow, pytest.mark.processes, pytest.mark.extras]

OPTIONS = dict(batch_size=8, total_steps=12, checkpoint_every=6, eval_every=6)
OPTIONS |= dict(model__image_size=64, data__canvas=96, data__name="noise_images")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Return the directory of a small tfrecord dataset, prepared by TFDS."""
    root = tmp_path_factory.mktemp("bucket") / "objects"
    prepare(root, "tfrecord")
    return root


@pytest.fixture(scope="module")
def run_training(tmp_path_factory):
    """Return a function (workdir, directory, reader) that trains in a subprocess.

    The function returns (exit code, stdout, stderr). The subprocess can import neither
    gcsfs nor tensorboardX, and with the reader "threads" no tensorflow either.
    """
    root = tmp_path_factory.mktemp("runs")

    def run(workdir, directory, reader="threads"):
        missing = ["gcsfs", "tensorboardX"] + ["tensorflow"] * (reader == "threads")
        environment = {
            "XDG_CACHE_HOME": root / f"cache {reader}",
            "PYTHONPATH": mini_runs.block_imports(root / f"without {reader}", *missing),
        }
        options = OPTIONS | dict(data__dir=directory, data__reader=reader)
        flags = mini_runs.arguments("photographs", **options)
        command = [mini_runs.MINIMAL_MAIN, *flags, f"--workdir={workdir}"]
        return mini_runs.run_process(*command, **environment)

    return run


@pytest.fixture(scope="module")
def local(tmp_path_factory, dataset, run_training):
    """Return the workdir of an uninterrupted run that reads local files."""
    workdir = tmp_path_factory.mktemp("local")
    code, _, err = run_training(workdir, dataset)
    assert code == 0, err
    return workdir


@pytest.mark.parametrize("reader", ["threads", "tf.data"])
def test_run_that_loses_access_resumes_bit_identically(
    dataset, run_training, local, tmp_path, reader
):
    """A run that loses access to its bucket exits with code 4."""
    workdir = tmp_path / "remote"
    with serve(dataset) as bucket:

        def refuse(_):
            """Refuse all requests after nine of twelve batches were read.

            Ranges over 500 bytes are images; shorter ranges are record headers.
            `inputs.check_splits` reads eight more images before the first step.
            """
            ranges = (header for _, key, header in bucket.requests if "-train." in key)
            if sum(range_length(header) > 500 for header in ranges) > 9 * 8 + 8:
                bucket.statuses = {"noise_images": 403}

        bucket.on_answer = refuse
        code, _, err = run_training(workdir, "gs://bucket", reader)
        assert code == 4, err
        error, remedy = err.splitlines()[-2:]
        assert error.startswith("error: cannot access gs://bucket/noise_images/1.0.0/")
        assert "HTTP status 403" in error
        assert "gcloud auth application-default login" in remedy
        resumed_at = mini_runs.saved_steps(workdir)[-1]
        assert 6 <= resumed_at < 12
        bucket.on_answer, bucket.statuses = lambda _: None, {}
        bucket.failures, bucket.delay, bucket.truncations_left = [503, 429], 0.02, 3
        code, out, err = run_training(workdir, "gs://bucket", reader)
        assert code == 0, err
        assert f"resuming at step {resumed_at} " in out
        assert bucket.truncations_left == 0
        assert bucket.failures == []
    assert mini_runs.logged(workdir) == mini_runs.logged(local)
    for name in ("eval/loss", "eval/count"):
        assert mini_runs.logged(workdir, name) == mini_runs.logged(local, name)
    assert set(mini_runs.logged(workdir, "eval/count").values()) == {6}
    mini_runs.assert_identical(
        mini_runs.saved_arrays(workdir, 12), mini_runs.saved_arrays(local, 12)
    )


def range_length(header):
    """Return the length of a Range header; 0 if it has no start or no end."""
    first, _, last = header.removeprefix("bytes=").partition("-")
    return int(last) + 1 - int(first) if first and last else 0
