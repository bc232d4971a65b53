"""Test of a run whose workdir is in a bucket: kill, resume, damage and evaluation."""

import mini_runs
import pytest
from buckets import serve

pytestmark = [pytest.mark.extras, pytest.mark.processes]
pytest.importorskip("gcsfs")

WORKDIR = "--workdir=gs://bucket/run"
COMMIT = "run/checkpoints/4/commit_success.txt"


def test_run_in_a_bucket_equals_a_local_run(tmp_path):
    """After a kill and after damage, the run resumes and equals the local run exactly.

    Evaluation works, and a bucket without permission to write is an error.
    """
    options = dict(total_steps=4, checkpoint_every=2, eval_every=2)
    flags = mini_runs.arguments(**options)
    local, root = tmp_path / "local", tmp_path / "objects"
    root.mkdir()
    command = ["-m", "hivit_jax.main", *flags]
    assert mini_runs.run_process(*command, f"--workdir={local}")[0] == 0
    with serve(root) as bucket:

        def kill(_):
            """Kill the process while it completes its second checkpoint."""
            if ("POST", COMMIT, "") in bucket.requests[-1:]:
                process.kill()

        bucket.on_answer = kill
        process = mini_runs.start_process(*command, WORKDIR)
        process.communicate()
        bucket.on_answer = lambda _: None
        (root / COMMIT).unlink(missing_ok=True)  # the server may have written the file
        code, out, err = mini_runs.run_process(*command, WORKDIR)
        assert code == 0, err
        assert "checkpoint 4 was not finished; removed" in out
        assert "resuming at step 2 from gs://bucket/run/checkpoints/2" in out
        assert "took over gs://bucket/run" in out
        check_same(local, root / "run")

        largest = max(
            root.glob("run/checkpoints/4/params/ocdbt.process_0/d/*"),
            key=lambda path: path.stat().st_size,
        )
        data = bytearray(largest.read_bytes())
        data[len(data) // 2] ^= 1
        largest.write_bytes(data)
        code, out, err = mini_runs.run_process(*command, WORKDIR)
        assert code == 0, err
        assert "checkpoint 4 was moved to gs://bucket/run/damaged/4" in out
        assert (root / "run/damaged/4/params/_METADATA").is_file()
        check_same(local, root / "run")

        _, out, _ = mini_runs.run_process(*command[:2], WORKDIR, "--mode=eval")
        expected = mini_runs.logged(local, "eval/loss")[4]
        assert f"eval  loss {expected:.4f}  (64 images)" in out
        assert not [*root.glob("run/*.lock"), *root.glob("run/.writable*")]
        bucket.read_only = True
        code, _, err = mini_runs.run_process(*command, "--workdir=gs://bucket/other")
        assert code == 2
        mini_runs.check_message(err, ["workdir gs://bucket/other cannot be written"])


def check_same(local, remote):
    """Check that the losses and the last checkpoints of two runs are identical.

    The remote workdir must also contain the figure of the curves and the config.
    """
    assert mini_runs.logged(local) == mini_runs.logged(remote)
    assert mini_runs.logged(local, "eval/loss") == mini_runs.logged(remote, "eval/loss")
    mini_runs.assert_identical(
        *(mini_runs.saved_arrays(workdir, 4) for workdir in (local, remote))
    )
    assert [*remote.glob("figures/curves.png")]
    assert [*remote.glob("config*.json")]
