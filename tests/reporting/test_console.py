"""Tests of lines on the terminal."""

import pytest

from hivit_jax.reporting import console


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (0.4, "0:00"),
        (59.6, "1:00"),
        (83, "1:23"),
        (599, "9:59"),
        (3599.4, "59:59"),
        (3599.6, "1:00:00"),
        (3725, "1:02:05"),
        (360_000, "100:00:00"),
    ],
)
def test_duration_is_rounded_to_seconds(seconds, text):
    assert console.duration(seconds) == text


def test_step_line_shows_progress_speed_and_warnings():
    """The line mentions waiting for images if more than 10% of the steps waited.

    With several chips, the line shows the throughput per chip.
    """
    values = dict(
        loss=0.54321,
        learning_rate=1.2e-3,
        epoch=1.23,
        images_per_second=3210.4,
        images_per_second_per_chip=3210.4,
        seconds_left=83,
        gradient_norm=0.8714,
        input_bound=0.1,
        unreadable=0,
    )
    line = console.step_line(120, 1000, values)
    start = "step 120/1000  epoch 1.2  loss 0.5432  grad 0.871  lr 1.20e-03  "
    expected = f"{start}3,210 images/s  1:23 left"
    assert line == expected
    line = console.step_line(
        120, 1000, values | {"input_bound": 0.5, "unreadable": 1234}
    )
    assert line == (
        f"{expected}  (waiting for images in 50% of steps)  (1,234 unreadable images)"
    )
    line = console.step_line(120, 1000, values | {"unreadable": 1})
    assert line == f"{expected}  (1 unreadable image)"
    pod = dict(images_per_second_per_chip=802.6, mfu=0.412, device_memory=12.34 * 2**30)
    line = console.step_line(120, 1000, values | pod)
    assert line == f"{start}803 images/s/chip  MFU 41%  12.3 GiB  1:23 left"
    assert len(line) <= 112


def test_eval_line_shows_all_metrics_and_counts():
    values = {"eval/loss": 0.54, "eval/count": 50_000, "eval/unreadable": 0}
    assert console.eval_line("step 120", values) == (
        "step 120  eval  loss 0.5400  (50,000 images)"
    )
    values |= {"eval/top1": 0.875, "eval/top5": 0.99999, "eval/count": 360}
    assert console.eval_line("step 120", values) == (
        "step 120  eval  loss 0.5400  top1 87.50 %  top5 100.00 %  (360 images)"
    )
    values["eval/unreadable"] = 2
    assert console.eval_line("step 120", values).endswith("(360 images, 2 unreadable)")
    values["eval/count"] = 1
    assert console.eval_line("step 120", values).endswith("(1 image, 2 unreadable)")


def test_only_process_0_logs(monkeypatch, capsys):
    for index in range(2):
        monkeypatch.setattr(console.jax, "process_index", lambda index=index: index)
        console.log(f"process {index}")
    assert capsys.readouterr().out == "process 0\n"
