"""Test that training from a failing bucket equals training from local files."""

import mini_runs
import pytest
from buckets import serve
from prepared import prepare

pytestmark = [pytest.mark.slow, pytest.mark.processes]


def test_refused_and_resumed_run(tmp_path):
    """A run exits with code 4, resumes bit-identically and needs no tensorflow."""
    root = tmp_path / "objects"
    prepare(root, "tfrecord")
    options = dict(batch_size=8, total_steps=4, checkpoint_every=2, eval_every=2)
    options |= dict(model__image_size=64, data__canvas=96, data__name="stripes")
    missing = ("tensorflow", "gcsfs", "tensorboardX")
    environment = {
        "XDG_CACHE_HOME": tmp_path / "cache",
        "PYTHONPATH": mini_runs.block_imports(tmp_path / "environment", *missing),
    }

    def run(name, directory):
        flags = mini_runs.arguments("photographs", data__dir=directory, **options)
        command = ["-m", "hivit_jax.main", *flags, f"--workdir={tmp_path / name}"]
        return mini_runs.run_process(*command, **environment)

    assert run("local", root)[0] == 0
    with serve(root) as bucket:
        bucket.failures = [0] * 70 + [403] * 1000
        code, _, err = run("remote", "gs://bucket")
        assert code == 4, err
        lines = err.splitlines()
        assert lines[-2].startswith("error: cannot access gs://bucket/stripes/1.0.0/")
        assert "HTTP status 403" in lines[-2]
        assert "gcloud auth application-default login" in lines[-1]
        bucket.failures = [503, 429]
        code, out, err = run("remote", "gs://bucket")
        assert code == 0, err
    for name in ("loss", "eval/loss"):
        values = mini_runs.logged(tmp_path / "remote", name)
        assert values == mini_runs.logged(tmp_path / "local", name)
    mini_runs.assert_identical(
        mini_runs.saved_arrays(tmp_path / "remote", 4),
        mini_runs.saved_arrays(tmp_path / "local", 4),
    )
