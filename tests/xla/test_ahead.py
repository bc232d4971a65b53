"""Tests of train steps compiled for chips that are not attached."""

import mini_runs
import pytest
from flax import nnx
from networks import training_macs
from numpy.testing import assert_allclose

from hivit_jax import inputs
from hivit_jax.data.shapes import batch_shapes
from hivit_jax.distributed import sharding
from hivit_jax.tools import compile_ahead
from hivit_jax.xla import cost
from hivit_jax.xla.compile import compile_step

pytestmark = pytest.mark.usefixtures("minimal_output")

HALF = "(0.5,0.5,0.5)"
COLOR = dict(model__in_channels=3, data__mean=HALF, data__std=HALF)


@pytest.mark.parametrize(
    ("source", "overrides"),
    [
        ("synthetic", {}),
        ("digits", dict(data__canvas=0)),
        ("digits", dict(data__canvas=96)),
        ("digits", dict(data__randaugment=True) | COLOR),
    ],
)
def test_batches_have_the_compiled_shapes(source, overrides):
    if source == "digits":
        pytest.importorskip("sklearn")
    config = mini_runs.mae(source, **overrides)
    batch = next(inputs.train_batches(config, 0, 1))
    [structs] = batch_shapes(inputs.make_task(config).transform(train=True))
    actual = {name: (array.shape, array.dtype) for name, array in batch.items()}
    assert actual == {
        name: (struct.shape, struct.dtype) for name, struct in structs.items()
    }


@pytest.mark.extras
@pytest.mark.slow
@pytest.mark.parametrize(("fsdp", "accumulate_steps"), [(8, 1), (4, 2)])
def test_fsdp_communicates_only_parameters_and_gradients(fsdp, accumulate_steps):
    """The collectives do not depend on the batch size, unlike those of activations."""
    collectives = []
    for size in (64, 256):
        config = mini_runs.mae(batch_size=size, model__depths="(1,1,1)")
        config.mesh.data, config.mesh.fsdp = 8 // fsdp, fsdp
        config.optimizer.accumulate_steps = accumulate_steps
        mesh = sharding.make_mesh(config.mesh, size, accumulate_steps)
        training = compile_ahead.prepare_training(config, mesh)
        hlo = compile_step(training).as_text()
        collectives.append(cost.collectives(hlo))
    assert collectives[0] == collectives[1]
    kinds = [collective["kind"] for collective in collectives[0]]
    assert kinds == ["all-reduce", "all-gather"]  # the CPU has no reduce-scatter


@pytest.mark.extras
def test_report_of_a_tpu_step_follows_the_config(tmp_path):
    """FLOPs depend on the mask ratio; gradients are reduced once per step."""
    pytest.importorskip("libtpu")
    report = mini_runs.compile_report(tmp_path)
    assert report["fits"]
    assert report["devices"] == report["batch_per_device"] == 8
    memory = report["hbm_bytes_per_device"]
    assert memory["limit"] == 15.75 * 2**30
    assert 0 < memory["aliased"] <= memory["arguments"] < memory["total"]
    assert report["roofline"]["limited_by"] == "memory"

    config = mini_runs.mae()
    model = nnx.eval_shape(inputs.task_of_recipe(config).build_model)
    [reduction] = report["collectives"]
    assert reduction["kind"] == "all-reduce"
    untrained = 16 * 32  # the decoder's position table
    gradient_bytes = 4 * (model.parameter_count() - untrained)
    assert_allclose(reduction["bytes_per_step"], gradient_bytes, rtol=0.02)

    accumulated = mini_runs.compile_report(
        tmp_path, optimizer__accumulate_steps=4, batch_size=256
    )
    [accumulated_reduction] = accumulated["collectives"]
    assert_allclose(
        accumulated_reduction["bytes_per_step"], reduction["bytes_per_step"], rtol=0.02
    )
    assert_allclose(accumulated["flops_per_image"], report["flops_per_image"], rtol=0.1)

    less_masked = mini_runs.compile_report(tmp_path, mask_ratio=0.25)
    expected = 6 * (training_macs(model, 0.25) - training_macs(model, 0.75))
    # `units_to_cells` multiplies the 768 values of a unit by a permutation matrix. Of
    # 16 units, 12 instead of 4 are visible.
    expected += 2 * 768**2 * (12 - 4)
    # In a network this narrow, other operations cost almost as much as matrix products.
    added = less_masked["flops_per_image"] - report["flops_per_image"]
    assert expected < added < 1.7 * expected
