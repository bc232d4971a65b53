"""Test that kernels do not change the evaluation of a trained model."""

import mini_runs
import pytest

from hivit_jax.main import main
from hivit_jax.train import train

pytestmark = [
    pytest.mark.usefixtures("minimal_output", "single_device"),
    pytest.mark.slow,
]


@pytest.mark.extras
def test_kernels_and_plain_jax_print_the_same_evaluation(tmp_path, capsys):
    """Loss (4 decimals) and top-1 of a classifier of digits are equal.

    The model is wide enough for kernels in the main stage. The kernels are interpreted.
    """
    no_regularization = dict(mixup=0.0, cutmix=0.0, random_erasing=0.0)
    no_regularization |= dict(model__drop_path_rate=0.0)
    sizes = dict(model__embed_dim=128, total_steps=300, log_every=100)
    config = mini_runs.classifier("digits", **no_regularization, **sizes)
    results = train(config, tmp_path)
    assert results["eval/top1"] > 0.3  # 0.1 is chance
    printed = {}
    for choice in ("plain", "fused"):
        flags = [f"--config.model.kernels={choice}", f"--workdir={tmp_path}"]
        assert main([*flags, "--mode=eval"]) == 0
        printed[choice] = capsys.readouterr().out.splitlines()[-1]
    assert printed["fused"] == printed["plain"]
    assert f"top1 {100 * results['eval/top1']:.2f} %" in printed["plain"]
