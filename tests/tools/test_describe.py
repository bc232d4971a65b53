"""Tests of `--mode describe`: model, diff against the recipe, figures."""

import re

import mini_runs
import numpy as np
import pytest
from flax import nnx
from matplotlib.axes import Axes
from mini_runs import check_message
from PIL import Image

from hivit_jax import inputs
from hivit_jax.data.order import permutation
from hivit_jax.data.sources import digits
from hivit_jax.main import main
from hivit_jax.tools.describe import hours_table


def describe(*overrides):
    """Run ``--mode describe`` on mae_base; return the exit code."""
    config = f"--config={mini_runs.ROOT / 'configs' / 'mae_base.py'}"
    return main([config, "--mode=describe", *overrides])


@pytest.mark.slow
def test_describe_counts_the_parameters_of_overrides(capsys):
    assert describe("--config.model.decoder_depth=8") == 0
    assert "93.3459 M" in capsys.readouterr().out
    trained = []  # millions of parameters
    for prefix in ("", "decoder_embed"):
        assert describe(f"--config.model.freeze={prefix}") == 0
        number = re.search(r"\(([\d.]+) M trained\)", capsys.readouterr().out)[1]
        trained.append(float(number))
    # Kernel and bias of `decoder_embed`
    assert trained[0] - trained[1] == pytest.approx((3584 * 512 + 512) / 1e6, abs=2e-4)
    assert describe("--config.model.freeze=decode") == 2
    check_message(
        capsys.readouterr().err, ["'decode'", "decoder_blocks, decoder_embed"]
    )
    assert describe("--config.model.depths=[2,2,24]", "--config.mask_ratio=1") == 2
    check_message(capsys.readouterr().err, ["mask_ratio=1.0"])


@pytest.mark.slow
def test_hours_count_forward_and_backward_passes():
    """A training image costs three forward passes, or one if the encoder is frozen.

    The table contains hours and chip-hours, at a chip's peak and at its utilization.
    """
    for config, passes in (
        (mini_runs.recipe("digits_mae"), 3),
        (mini_runs.recipe("digits_linear"), 1),
    ):
        task = inputs.task_of_recipe(config)
        model = nnx.eval_shape(task.build_model)
        lines = hours_table(config, task, model).splitlines()
        assert lines[0].endswith("; less than 0.01 chip-hours on every chip")
        config.total_steps *= 10**5
        lines = hours_table(config, task, model).splitlines()
        images = config.total_steps * config.batch_size
        for name, peak, utilization, cells in (
            ("h100", 989e12, 0.2453, ["24.5%", "measured"]),
            ("v5e", 197e12, 0.4, ["40.0%", "assumed"]),
        ):
            row = next(line for line in lines if line.startswith(name))
            speed = peak / (2 * passes * task.macs(model))  # two FLOP per multiply-add
            chip_hours = images / speed / 3600
            at_peak = [f"{x:,.2f}" for x in (chip_hours / 8, chip_hours)]
            chip_hours /= utilization
            at_utilization = [f"{x:,.2f}" for x in (chip_hours / 8, chip_hours)]
            expected = [name, "8", f"{speed:,.0f}", *at_peak, *cells, *at_utilization]
            assert row.split() == expected
        assert any("measured on h100: HiViT-B" in line for line in lines)


@pytest.mark.processes
@pytest.mark.slow
def test_describe_process_imports_no_tensorflow():
    program = (
        "import sys\n"
        "from hivit_jax.main import main\n"
        "code = main(sys.argv[1:])\n"
        "assert 'tensorflow' not in sys.modules\n"
        "sys.exit(code)"
    )
    flags = [f"--config={mini_runs.ROOT}/configs/mae_base.py", "--mode=describe"]
    code, out, err = mini_runs.run_process("-c", program, *flags)
    assert (code, err) == (0, "")
    assert "= 87.04" in out
    assert re.search("  optimizer.base_learning_rate +0.0001\n", out)
    assert "mask_ratio" not in out  # because its value is the default


@pytest.mark.slow
def test_describe_draws_schedule_and_images(tmp_path, capsys, monkeypatch):
    """Figures show every learning rate and the first 16 training images.

    This test's config neither crops nor flips images.
    """
    lines, images = [], []
    plot, imshow = Axes.plot, Axes.imshow

    def record_plot(axes, *arrays, **options):
        lines.append(arrays)
        return plot(axes, *arrays, **options)

    def record_imshow(axes, image, **options):
        images.append((image, options))
        return imshow(axes, image, **options)

    monkeypatch.setattr(Axes, "plot", record_plot)
    monkeypatch.setattr(Axes, "imshow", record_imshow)
    recipe = mini_runs.ROOT / "configs" / "digits_finetune.py"
    overrides = [
        "--config.batch_size=24",
        "--config.model.image_size=8",
        "--config.model.patch_size=4",
        "--config.data.crop_scale=(1.0,1.0)",
        "--config.optimizer.warmup_epochs=30",
    ]
    command = [f"--config={recipe}", "--mode=describe", *overrides]
    assert main([*command, f"--workdir={tmp_path}"]) == 0
    assert f"drawn: {tmp_path}/figures/schedule.png, " in capsys.readouterr().out
    for name in ("schedule", "augmented"):
        Image.open(tmp_path / "figures" / f"{name}.png").verify()
    [(steps, learning_rates)] = lines
    np.testing.assert_array_equal(steps, np.arange(361))
    peak = 1e-2 * 24 / 256
    warmup = 30 * 100 / 24  # steps: 30 epochs of 100 images
    cosine = 0.5 + 0.5 * np.cos(np.pi * (steps - warmup) / (360 - warmup))
    expected = peak * np.where(steps < warmup, steps / warmup, cosine)
    np.testing.assert_allclose(learning_rates, expected, rtol=1e-4, atol=1e-8)
    pixels = digits.Digits("train", 100).pixels()[permutation(0, 0, 100)[:16]]
    [(grid, options)] = images
    tiles = grid.reshape(4, 10, 4, 10).swapaxes(1, 2).reshape(16, 10, 10)
    inner = tiles[:, 1:-1, 1:-1]  # without the white gaps
    np.testing.assert_allclose(inner, pixels / 255, rtol=0, atol=1e-5)
    assert (options["vmin"], options["vmax"]) == (0, 1)

    missing = ["--config.data.name=folder", f"--config.data.dir={tmp_path / 'none'}"]
    command += [*missing, "--config.data.train_examples=0"]
    assert main([*command, f"--workdir={tmp_path / 'x'}"]) == 2
    assert "none' does not exist" in capsys.readouterr().err
