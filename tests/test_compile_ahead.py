"""The train step for chips that are not here: what is read out of compiled programs."""

import importlib.util
import json
import math
import re
from functools import cache
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recipes
from flax import nnx
from jax.experimental import pallas as pl
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from numpy.testing import assert_allclose

import hivit_jax
from hivit_jax import config as configs
from hivit_jax import inputs
from hivit_jax.data.shapes import batch_shapes
from hivit_jax.distributed import sharding
from hivit_jax.errors import ConfigError
from hivit_jax.kernels import dispatch
from hivit_jax.main import main
from hivit_jax.models.flops import row_cost
from hivit_jax.models.masking import visible_units
from hivit_jax.tools import compile_ahead
from hivit_jax.tree import named_leaves, split
from hivit_jax.xla import ahead, cost, roofline
from hivit_jax.xla.compile import compile_step

MIB = 2**20


@pytest.fixture(scope="module", autouse=True)
def quick():
    with recipes.quick():
        yield
    jax.config.update("jax_enable_compilation_cache", True)


def mesh(*sizes, names=("data",)):
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(names))


def compiled(function, mesh, *shapes, out=()):
    """HLO text of a program of float32 arrays of (shape, spec)."""
    arguments = [
        jax.ShapeDtypeStruct(
            shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec))
        )
        for shape, spec in shapes
    ]
    jitted = jax.jit(function, out_shardings=NamedSharding(mesh, PartitionSpec(*out)))
    return jitted.lower(*arguments).compile().as_text()


ROWS = ((1024, 512), ("data",))  # 2 MiB, a row of devices each 1/8
WHOLE = ((512, 512), ())  # 1 MiB


def test_bytes_of_an_all_reduce():
    hlo = compiled(lambda x, y: x.T @ y, mesh(8), ROWS, ROWS)
    assert cost.collectives(hlo) == [
        {"kind": "all-reduce", "count": 1, "bytes_per_step": MIB}
    ]


def test_bytes_of_an_all_gather_are_those_of_what_is_gathered():
    hlo = compiled(lambda x: x + 1, mesh(8), ROWS)
    assert cost.collectives(hlo) == [
        {"kind": "all-gather", "count": 1, "bytes_per_step": 2 * MIB}
    ]


@pytest.mark.parametrize(
    ("operation", "kind", "size"),
    [
        (lambda x: jax.lax.psum_scatter(x, "data", tiled=True), "reduce-scatter", 2),
        (lambda x: jax.lax.ppermute(x, "data", [(0, 1)]), "collective-permute", 2),
        (
            lambda x: jax.lax.all_to_all(x, "data", 0, 0, tiled=True),
            "all-to-all",
            2,
        ),
    ],
)
def test_bytes_of_other_collectives(operation, kind, size):
    """Each device holds all 2 MiB; `psum_scatter` leaves an eighth of them."""
    devices = mesh(8)
    function = jax.shard_map(
        operation,
        mesh=devices,
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec("data"),
        check_vma=False,
    )
    hlo = compiled(function, devices, ((1024, 512), ()), out=("data",))
    [found] = cost.collectives(hlo)
    assert found == {"kind": kind, "count": 1, "bytes_per_step": size * MIB}


def test_what_a_loop_exchanges_counts_every_time():
    def loop(x, w):
        return jax.lax.scan(lambda w, _: (jnp.tanh((x @ w).T @ x), None), w, length=5)[
            0
        ]

    hlo = compiled(loop, mesh(8), ROWS, WHOLE)
    assert cost.collectives(hlo) == [
        {"kind": "all-reduce", "count": 5, "bytes_per_step": 5 * MIB}
    ]


# As the TPU compiler writes it: tiles, memory spaces, loops without a trip count.
ASYNCHRONOUS = """\
HloModule step, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%body (p: (s32[], f32[256])) -> (s32[], f32[256]) {
  %p = (s32[]{:T(128)}, f32[256]{0:T(256)}) parameter(0)
  %n = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[256]{0:T(256)} get-tuple-element(%p), index=1
  %ag = (f32[256]{0:T(256)}, f32[2048]{0:T(256)S(1)}) all-gather-start(%x), channel_id=1
  %done = f32[2048]{0:T(256)S(1)} all-gather-done(%ag), metadata={op_name="x"}
  %cut = f32[256]{0:T(256)} fusion(%done), kind=kLoop, calls=%fused
  ROOT %out = (s32[]{:T(128)}, f32[256]{0:T(256)}) tuple(%n, %cut)
}

%condition (q: (s32[], f32[256])) -> pred[] {
  %limit = s32[]{:T(128)} constant(3)
  %q = (s32[]{:T(128)}, f32[256]{0:T(256)}) parameter(0)
  %m = s32[]{:T(128)} get-tuple-element(%q), index=0
  ROOT %less = pred[]{:T(512)} compare(%m, %limit), direction=LT
}

%add (i: f32[], j: f32[]) -> f32[] {
  %i = f32[] parameter(0)
  %j = f32[] parameter(1)
  ROOT %sum = f32[] add(%i, %j)
}

%fused (f: f32[2048]) -> f32[256] {
  %f = f32[2048]{0:T(256)} parameter(0)
  ROOT %rs = f32[256]{0:T(256)} reduce-scatter(%f), dimensions={0}, to_apply=%add
}

ENTRY %main (a: (s32[], f32[256]), b: bf16[64,128]) -> f32[] {
  %a = (s32[]{:T(128)}, f32[256]{0:T(256)}) parameter(0)
  %b = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(1)
  %w = (s32[]{:T(128)}, f32[256]{0:T(256)}) while(%a), condition=%condition, body=%body
  %c = f32[]{:T(128)} constant(0)
  %y = f32[256]{0:T(256)} get-tuple-element(%w), index=1
  %cp = f32[256]{0:T(256)} collective-permute(%y), channel_id=2
  %s = (bf16[64,128]{1,0:T(8,128)(2,1)S(1)}, f32[]{:T(128)}) all-reduce-start(%b, %c)
  %d = (bf16[64,128]{1,0:T(8,128)(2,1)}, f32[]{:T(128)}) all-reduce-done(%s)
  ROOT %e = f32[]{:T(128)} get-tuple-element(%d), index=1
}
"""


def written_in_place(hlo):
    """Elements of tuples as newer versions write them: %name#2."""
    taken = r"  (%\S+) = \S+ get-tuple-element\((%\S+)\), index=(\d+)\n"
    for name, whole, index in re.findall(taken, hlo):
        hlo = re.sub(rf"{name}\b(?! =)", f"{whole}#{index}", hlo)
    return re.sub(taken, "", hlo)


@pytest.mark.parametrize("newer", [False, True])
def test_asynchronous_collectives_count_once_and_loops_by_their_bound(newer):
    hlo = written_in_place(ASYNCHRONOUS) if newer else ASYNCHRONOUS
    assert ("#" in hlo) == newer
    kinds = {
        each["kind"]: (each["count"], each["bytes_per_step"])
        for each in cost.collectives(hlo)
    }
    assert kinds == {
        "all-reduce": (1, 2 * 64 * 128 + 4),
        "all-gather": (3, 3 * 4 * 2048),
        "reduce-scatter": (3, 3 * 4 * 2048),
        "collective-permute": (1, 4 * 256),
    }
    # Fusions as one kernel. What is in VMEM, and so all that %cut reads, is free.
    # A number takes a tile of 512 bytes: %c is read, and given by %d.
    reduced = 2 * (2 * 64 * 128 + 512)
    moved = cost.bytes_by_region(hlo).total()
    assert moved == reduced + (3 + 1) * 2 * 4 * 256


# As the TPU compiler writes it, the names shortened.
REGIONS = """\
HloModule step

%fused (f: bf16[64,49,512], g: f32[8,1024]) -> bf16[64,49,512] {
  %f = bf16[64,49,512]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %g = f32[8,1024]{1,0:T(8,128)} parameter(1)
  %cut = f32[8,128]{1,0} slice(%g), slice={[0:8], [0:128]}, metadata={op_name="jit(step)/jvp(main)/mlp/slice"}
  %more = f32[8,128]{1,0} negate(%cut), metadata={op_name="jit(step)/jvp(main)/mlp/neg"}
  ROOT %k = bf16[64,49,512]{2,1,0} add(%f, %more), metadata={op_name="jit(step)/optimizer/add"}
}

%cutting (p: f32[512,256]) -> f32[128,256] {
  %p = f32[512,256]{1,0:T(8,128)} parameter(0)
  ROOT %part = f32[128,256]{1,0:T(8,128)S(1)} slice(%p), slice={[0:128], [0:256]}
}

ENTRY %main (a: bf16[64,49,512], b: f32[8,1024], c: f32[512,256]) -> f32[] {
  %a = bf16[64,49,512]{2,1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="state['main']"}
  %b = f32[8,1024]{1,0:T(8,128)} parameter(1)
  %c = f32[512,256]{1,0:T(8,128)} parameter(2)
  %in = (bf16[64,49,512]{2,1,0:T(8,128)(2,1)S(1)}, bf16[64,49,512]{2,1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%a)
  %here = bf16[64,49,512]{2,1,0:T(8,128)(2,1)S(1)} copy-done(%in)
  %made = bf16[64,49,512]{2,1,0:T(8,128)(2,1)S(1)} fusion(%here, %b), kind=kLoop, calls=%fused
  %out = (bf16[64,49,512]{2,1,0:T(8,128)(2,1)}, bf16[64,49,512]{2,1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}) copy-start(%made)
  %saved = bf16[64,49,512]{2,1,0:T(8,128)(2,1)} copy-done(%out)
  %first = ((f32[512,256]{1,0:T(8,128)}), f32[128,256]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) async-start(%c), calls=%cutting
  %quarter = f32[128,256]{1,0:T(8,128)S(1)} async-done(%first)
  %whole = f32[128,256]{1,0:T(8,128)S(1)} custom-call(%quarter), custom_call_target="ConcatBitcast"
  %mosaic = bf16[64,50,512]{2,1,0:T(8,128)(2,1)} custom-call(%saved, %whole, %b), custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/transpose(jvp(latent))/decoder/attention/shard_map/pallas_call"}
  %sum = f32[8,1024]{1,0:T(8,128)} all-reduce(%b), to_apply=%add, metadata={op_name="jit(step)/jvp(loss)/psum"}
  %n = s32[] constant(0)
  %put = f32[8,1024]{1,0:T(8,128)} dynamic-update-slice(%sum, %n, %n, %n), metadata={op_name="jit(step)/input/update"}
  %flat = bf16[3200,1,512]{2,0,1:T(8,128)(2,1)} copy(%mosaic), metadata={op_name="jit(step)/copy"}
  ROOT %end = f32[]{:T(128)S(6)} fusion(%flat), kind=kLoop, calls=%fused, metadata={op_name="jit(step)/jvp(embedding)/stem2/mlp/add;x"}
}
"""  # noqa: E501


def test_bytes_of_regions():
    """Tiles pad 49 rows to 56. What names no region goes with what it is copied for."""
    row = 2 * 64 * 512
    assert cost.bytes_by_region(REGIONS) == {
        "main mlp": 56 * row + 4 * 8 * 128 + 56 * row,  # %in, a slice of %b, %out
        "decoder attention": 56 * row + 56 * row + 4 * (8 * 1024 + 128 * 256),
        "exchange": 2 * 4 * 8 * 1024,
        "input": 4 + 3 * 4,  # in place: a number written; it and two places read
        "stem2": 56 * row + 50 * row + 50 * row,  # %flat, padded no longer, and %end
    }


def test_regions_of_a_compiled_program():
    """Forward and backward; on a CPU nothing is padded, and nothing free."""

    @jax.jit
    @jax.grad
    def program(w, x):
        with jax.named_scope("main"), jax.named_scope("attention"):
            x = jnp.sin(x @ w)
        with jax.named_scope("loss"):
            return jnp.square(x @ w.T).sum()

    w, x = jnp.ones((256, 128)), jnp.ones((512, 256))
    hlo = program.lower(w, x).compile().as_text()
    moved = cost.bytes_by_region(hlo)
    assert moved.keys() - {"other"} == {"main attention", "loss"}
    product = 4 * (256 * 128 + 512 * 256 + 512 * 128)
    assert moved["main attention"] >= 2 * product
    assert moved["loss"] >= 3 * product
    assert moved.total() < 10 * product

    jaxpr = jax.make_jaxpr(program)(w, x).jaxpr
    one = 2 * 512 * 256 * 128
    found = cost.matmul_flops_by_region(jaxpr, loops=True)
    assert found == {"main attention": 2 * one, "loss": 3 * one}  # x has no gradient


def test_operations_of_kernels_on_every_device():
    """A kernel counts for each point of its grid and each device that it is on, with
    the loops in it, although others are to count once.
    """
    devices = mesh(8)

    def kernel(x, y):
        y[...] = jax.lax.fori_loop(0, 3, lambda _, y: y @ x[...], x[...])

    def each(x):
        block = pl.BlockSpec((16, 16), lambda i: (i, 0))
        call = pl.pallas_call(kernel, x, grid=4, in_specs=[block], out_specs=block)
        with jax.named_scope("stem1"):
            return call(x)

    spec = PartitionSpec("data")
    run = jax.shard_map(
        each, mesh=devices, in_specs=spec, out_specs=spec, check_vma=False
    )
    jaxpr = jax.make_jaxpr(run)(jnp.ones((8 * 64, 16))).jaxpr
    found = cost.matmul_flops_by_region(jaxpr, loops=False)
    assert found == {"stem1": 8 * 4 * 3 * 2 * 16**3}


def test_a_collective_in_several_kernels_counts_once():
    hlo = """\
%a (p: f32[32]) -> f32[256] {
  %p = f32[32]{0} parameter(0)
  ROOT %ag = f32[256]{0} all-gather(%p), channel_id=1, dimensions={0}
}

%b (q: f32[32]) -> f32[256] {
  %q = f32[32]{0} parameter(0)
  ROOT %ag.2 = f32[256]{0} all-gather(%q), channel_id=1, dimensions={0}
}

ENTRY %main (x: f32[32]) -> f32[256] {
  %x = f32[32]{0} parameter(0)
  %start = f32[256]{0} fusion(%x), kind=kCustom, calls=%a
  ROOT %done = f32[256]{0} fusion(%x), kind=kCustom, calls=%b
}
"""
    assert cost.collectives(hlo) == [
        {"kind": "all-gather", "count": 1, "bytes_per_step": 1024}
    ]


def test_operations_of_matrix_products_in_loops():
    def program(x, w):
        step = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
        return jax.lax.scan(step, x, w)[0].sum()

    x, w = jnp.ones((8, 16)), jnp.ones((5, 16, 16))
    one = 2 * 8 * 16 * 16
    forward = jax.make_jaxpr(program)(x, w).jaxpr
    assert cost.matmul_flops(forward, loops=True) == 5 * one
    assert cost.matmul_flops(forward, loops=False) == one
    # Forward, again for the gradient, and a product for each of x and w.
    both = jax.make_jaxpr(jax.grad(program, (0, 1)))(x, w).jaxpr
    assert cost.matmul_flops(both, loops=True) == 5 * 4 * one


GREY = "(0.5,0.5,0.5)"
COLOURED = dict(model__in_channels=3, data__mean=GREY, data__std=GREY)


@pytest.mark.parametrize(
    ("source", "overrides"),
    [
        ("synthetic", {}),
        ("digits", dict(data__canvas=0)),
        ("digits", dict(data__canvas=96)),
        ("digits", dict(data__randaugment=True) | COLOURED),
    ],
)
def test_batches_are_of_the_shapes_that_are_compiled_for(source, overrides):
    if source == "digits":
        pytest.importorskip("sklearn")
    config = recipes.mae(source, **overrides)
    batch = next(inputs.train_batches(config, 0, 1))
    [shapes] = batch_shapes(inputs.make_task(config).transform(train=True))
    found = {name: (array.shape, array.dtype) for name, array in batch.items()}
    assert found == {name: (each.shape, each.dtype) for name, each in shapes.items()}


def test_roofline_is_bound_by_what_is_slowest():
    chip = ahead.CHIPS["v5e"]
    exchanged = [{"kind": "all-reduce", "count": 1, "bytes_per_step": 100e9}]

    def bound(flops, moved, exchanged=()):
        found = roofline.roofline(chip, 10, flops, moved, exchanged)
        return found["bound"], found["images_per_second_per_chip"]

    assert bound(197e12, 0) == ("arithmetic", 1)
    assert bound(1, 819e9 / 2) == ("memory", 2)
    assert bound(1, 1, exchanged) == ("network", 10)  # 2 x 100 GB at 200 GB/s


def test_memory_by_kind_as_counted_by_hand():
    """Outputs that take the place of arguments count once."""
    sizes = SimpleNamespace(
        argument_size_in_bytes=1000,
        output_size_in_bytes=700,
        temp_size_in_bytes=30,
        generated_code_size_in_bytes=5,
        alias_size_in_bytes=600,
    )
    program = SimpleNamespace(memory_analysis=lambda: sizes)
    assert ahead.memory_of(program, ahead.CHIPS["v6e"]) == {
        "arguments": 1000,
        "outputs": 700,
        "temporaries": 30,
        "program": 5,
        "aliased": 600,
        "total": 1000 + (700 - 600) + 30 + 5,
        "limit": int(31.24 * 2**30),
    }


def test_memory_of_a_program_that_updates_in_place():
    """4,096 bytes are updated in place, of 2,048 others a new array is made."""
    update = jax.jit(lambda x, y: (x + 1, 2 * y), donate_argnums=0)
    program = update.lower(jnp.zeros(1024), jnp.zeros(512)).compile()
    found = ahead.memory_of(program, ahead.CHIPS["v5e"])
    assert found["arguments"] == 4096 + 2048
    assert found["aliased"] == 4096
    table = found["outputs"] - (4096 + 2048)  # XLA for CPUs: addresses of the two
    assert 0 <= table <= 16
    beside = found["temporaries"] + found["program"]
    assert found["total"] == 4096 + 2048 + 2048 + table + beside


def test_command_that_searches_the_largest_batch(monkeypatch, tmp_path, capsys):
    """Only where it is asked for; with what the search found in file and text."""

    def examine(config, devices, topology):
        size = config.batch_size // 8
        memory = dict(total=linear(size), limit=5000, arguments=1000, temporaries=1)
        return REPORT | {
            "batch_size": config.batch_size,
            "batch_per_device": size,
            "fits": size <= 40,
            "hbm_bytes_per_device": memory,
        }

    monkeypatch.setattr(compile_ahead, "devices_of", lambda topology: jax.devices())
    monkeypatch.setattr(compile_ahead, "step_report", examine)
    for search in (False, True):
        found = report(tmp_path, *["--search_batch"] * search)
        assert ("largest_batch_per_device" in found) == search
        out = capsys.readouterr().out
        assert "fits: 0.00 GiB of 0.00 GiB per device (arguments 0.00, " in out
        assert "all-reduce x 2: 3.0 MB per step and device\n" in out
        assert "at most 123 images/s per chip, bound by memory\n" in out
        assert "2.5 GFLOP and 7 MB of HBM traffic per image\n" in out
        assert (f"written: {tmp_path}/compile.json") in out
    assert found["largest_batch_per_device"] <= 40 < found["smallest_that_does_not_fit"]
    assert f"per device: {found['largest_batch_per_device']} (" in out


REPORT = {
    "model": "mae_hivit_base",
    "topology": "v5e:2x4",
    "devices": 8,
    "flops_per_image": 2.5e9,
    "hbm_bytes_per_image": 7e6,
    "collectives": [{"kind": "all-reduce", "count": 2, "bytes_per_step": 3e6}],
    "roofline": {"images_per_second_per_chip": 123.4, "bound": "memory"},
}


# --- Ways to run blocks --------------------------------------------------------------

SMALL = dict(image_size=64, embed_dim=64, depths=(1, 1, 2), num_heads=2)
MODELS = {
    "hivit_base": dict(num_classes=10, drop_path_rate=0.5),
    "mae_hivit_base": dict(
        drop_path_rate=0.5, decoder_embed_dim=32, decoder_depth=2, decoder_num_heads=2
    ),
}


@cache
def loss_and_gradients(name, **options):
    """Of a small model with drop path in float32; and its parameters."""
    model = hivit_jax.create_model(name, **SMALL, **MODELS[name], **options)
    graphdef, params = split(model)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(8, 64, 64, 3)).astype(np.float32)
    noise, keys = rng.random((8, 16)), jax.random.split(jax.random.key(1), 8)

    def loss(params):
        model = nnx.merge(graphdef, params)
        if name == "hivit_base":
            return jnp.square(model(images, drop_path_keys=keys)).sum()
        out = model(images, noise=noise, mask_ratio=0.75, drop_path_keys=keys)
        return out.loss

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    return value, named_leaves(gradients), params


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(remat=True),
        dict(scan_blocks=True),
        dict(remat=True, scan_blocks=True),
    ],
)
def test_ways_to_run_blocks_change_nothing(monkeypatch, name, options):
    """Nor which branches are dropped: another draw would change the loss by far.

    On a CPU every block is called; elsewhere they are one program, where nothing else
    is asked for.
    """
    value, found, same = loss_and_gradients(name, **options)
    monkeypatch.setattr(dispatch, "platform", lambda: "tpu")
    # The default, said, so that it is kept apart from what a CPU makes of it.
    loss, gradients, params = loss_and_gradients(name, remat=False)
    recipes.assert_identical(same, params)  # names, shapes and numbers
    assert_allclose(value, loss, rtol=1e-6)
    assert found.keys() == gradients.keys()
    for key, gradient in gradients.items():
        scale = max(np.abs(gradient).max(), 1e-6)
        assert_allclose(found[key] / scale, gradient / scale, atol=2e-6, err_msg=key)


def gradient_program(**options):
    """The gradient of a small classifier, lowered."""
    model = hivit_jax.create_model("hivit_base", **SMALL | options)
    graphdef, params = split(model)
    images = jnp.zeros((2, 64, 64, 3))
    loss = jax.grad(lambda p, x: nnx.merge(graphdef, p)(x).sum())
    return jax.jit(loss).lower(params, images)


def lines(**options):
    return len(gradient_program(**options).as_text().splitlines())


@pytest.mark.parametrize(
    ("platform", "options"), [("tpu", dict(scan_blocks=True)), ("cpu", {})]
)
def test_blocks_are_compiled_once(monkeypatch, platform, options):
    monkeypatch.setattr(dispatch, "platform", lambda: "tpu")
    one_by_one = lines(depths=(1, 1, 9)) - lines()
    monkeypatch.setattr(dispatch, "platform", lambda: platform)
    more = lines(depths=(1, 1, 9), **options) - lines(**options)
    assert more < one_by_one / 3  # stacking parameters remains


def test_cpus_add_up_residual_branches_once():
    """No kernel takes more operands for there being more blocks."""
    found = []
    for depth in (3, 9):
        hlo = gradient_program(depths=(1, 1, depth)).compile().as_text()
        operands = re.findall(r"^%fused_computation\S* \((.*)\) ->", hlo, re.M)
        found.append(max(each.count(":") for each in operands))
    assert found[0] == found[1]


def test_blocks_that_differ():
    """Are not scanned, and not taken for each other."""
    windows = dict(window_size=2)
    images = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
    with pytest.raises(ConfigError, match="scan_blocks=True with global_blocks"):
        hivit_jax.create_model(
            "hivit_base", **SMALL, **windows, global_blocks=(1,), scan_blocks=True
        )
    model = hivit_jax.create_model("hivit_base", **SMALL, **windows, scan_blocks=True)
    plain = hivit_jax.create_model("hivit_base", **SMALL, **windows)
    assert_allclose(model(images), plain(images), atol=1e-6)
    mixed = hivit_jax.create_model("hivit_base", **SMALL, **windows, global_blocks=(1,))
    layers = [x.tokens for x in mixed.layers(images)]
    assert_allclose(mixed.encoder(images)[-1], layers[-1], atol=1e-6)
    assert np.abs(model(images) - mixed(images)).max() > 1e-4


# --- Errors --------------------------------------------------------------------------


def fails(capsys, topology, tmp_path, *more):
    flags = [f"--topology={topology}", f"--workdir={tmp_path}", *more]
    assert main([*recipes.arguments(), "--mode=compile", *flags]) == 2
    message = capsys.readouterr().err
    assert 1 <= len(message.splitlines()) <= 3
    assert not (tmp_path / "compile.json").exists()
    return message


@pytest.mark.parametrize("topology", ["", "v9:2x2", "tpu", "h100x8"])
def test_unknown_topology(capsys, tmp_path, topology):
    message = fails(capsys, topology, tmp_path)
    assert f"unknown topology {topology!r}" in message
    assert "v5e:16x16" in message


@pytest.mark.parametrize(
    ("topology", "plugin", "extra"),
    [("v5e:2x4", "libtpu", "tpu"), ("h100:8", "jax-cuda13-plugin", "cuda")],
)
def test_compiler_that_is_not_installed(
    capsys, monkeypatch, tmp_path, topology, plugin, extra
):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: (
            None if name == plugin.replace("-", "_") else find(name, *rest)
        ),
    )
    message = fails(capsys, topology, tmp_path)
    assert plugin in message
    assert f"hivit-jax[{extra}]" in message


def test_gpus_of_more_than_a_node(capsys, tmp_path):
    assert "expected h100:1 to h100:8" in fails(capsys, "h100:16", tmp_path)


def test_shape_that_no_slice_has(capsys, tmp_path):
    pytest.importorskip("libtpu")
    assert "topology='v5e:3x5'" in fails(capsys, "v5e:3x5", tmp_path)
    mesh = "--config.mesh.data=3"
    assert "does not fit 8 devices" in fails(capsys, "v5e:2x4", tmp_path, mesh)
    mesh, batch = "--config.mesh.fsdp=2", "--config.batch_size=64"
    assert "cannot be laid out" in fails(capsys, "v4:4x4x4", tmp_path, mesh, batch)
    message = fails(capsys, "v5e:4x8", tmp_path)
    assert "batch_size=16 is not divisible by 32 devices" in message


# --- The command ---------------------------------------------------------------------


def report(tmp_path, *more, topology="v5e:2x4", **overrides):
    flags = recipes.arguments(**{"batch_size": 64} | overrides)
    flags += [f"--topology={topology}", f"--workdir={tmp_path}", *more]
    assert main([*flags, "--mode=compile"]) == 0
    return json.loads((tmp_path / "compile.json").read_text())


BRANCHES = ("attention", "mlp")


def test_whole_report(tmp_path, monkeypatch):
    """Of these CPUs in place of the chips."""
    monkeypatch.setattr(compile_ahead, "devices_of", lambda topology: jax.devices())
    monkeypatch.setitem(ahead.PLUGINS, "v5e", "jaxlib")
    options = dict(data__name="imagenet2012", data__canvas=96)
    found = report(tmp_path, **options)
    assert found["fits"]
    assert found["devices"] == found["batch_per_device"] == 8
    memory = found["hbm_bytes_per_device"]
    assert memory["limit"] == 15.75 * 2**30
    assert 0 < memory["aliased"] <= memory["arguments"] < memory["total"]
    model = nnx.eval_shape(inputs.task_of_recipe(recipes.mae()).build_model)
    [reduced] = found["collectives"]
    assert reduced["kind"] == "all-reduce"
    assert_allclose(reduced["bytes_per_step"], 4 * model.parameter_count(), rtol=0.02)
    blocks = {f"{part} {branch}" for part in ("main", "decoder") for branch in BRANCHES}
    parts = {"input", "embedding", "stem1", "stem2", "merge", "latent", "loss"}
    regions = found["regions"]
    assert blocks | parts | {"optimizer", "exchange"} <= regions.keys()
    for name in blocks | parts:
        assert all(value > 0 for value in regions[name].values()), name
    assert regions["optimizer"]["flops_per_image"] == 0
    parts = report(tmp_path, optimizer__accumulate_steps=4, batch_size=256, **options)
    assert_allclose(
        parts["collectives"][0]["bytes_per_step"], reduced["bytes_per_step"], rtol=0.02
    )
    assert_allclose(parts["flops_per_image"], found["flops_per_image"], rtol=0.1)


@pytest.mark.parametrize(("fsdp", "parts"), [(8, 1), (4, 2)])
def test_fsdp_exchanges_parameters_and_gradients_alone(fsdp, parts):
    """As much for any batch: no activations."""
    found = []
    for size in (64, 256):
        config = recipes.mae(batch_size=size, model__depths="(1,1,1)")
        config.mesh.data, config.mesh.fsdp = 8 // fsdp, fsdp
        config.optimizer.accumulate_steps = parts
        devices = sharding.make_mesh(config.mesh, size, parts)
        training = compile_ahead.prepare_training(config, devices)
        hlo = compile_step(training).as_text()
        found.append(cost.collectives(hlo))
    assert found[0] == found[1]
    kinds = [each["kind"] for each in found[0]]
    assert kinds == ["all-reduce", "all-gather"]  # the CPU has no reduce-scatter


def linear(size):
    return 1000 + 100 * size


@pytest.mark.parametrize("own", [8, 39, 64])
@pytest.mark.parametrize("most", [40, 100])
def test_search_for_the_largest_batch(monkeypatch, own, most):
    """To an eighth, by doubling and bisection."""
    tried = []

    def examine(config, devices, topology):
        tried.append(config.batch_size // 8)
        return {"fits": tried[-1] <= most}

    monkeypatch.setattr(compile_ahead, "step_report", examine)
    config = recipes.mae(batch_size=8 * own)
    start = {"batch_size": 8 * own, "batch_per_device": own, "fits": own <= most}
    start["topology"] = ""
    found = compile_ahead.largest_batch(config, [], start)
    low, high = (
        found[key] for key in ("largest_batch_per_device", "smallest_that_does_not_fit")
    )
    assert low <= most < high <= low + max(1, low // 8)
    assert found["compiles_of_the_search"] == len(tried) <= 7
    assert len({*tried, own}) == len(tried) + 1  # none twice
    assert config.batch_size == 8 * own


def test_sizes_of_the_search_divide(monkeypatch):
    """Into pairs that mix, in each of the parts of a step."""
    config = recipes.classifier(batch_size=96, optimizer__accumulate_steps=3)
    start = {"batch_size": 96, "batch_per_device": 12, "fits": False, "topology": ""}
    tried = []

    def examine(config, devices, topology):
        tried.append(config.batch_size // 8)
        return {"fits": False}

    monkeypatch.setattr(compile_ahead, "step_report", examine)
    compile_ahead.largest_batch(config, [], start)
    assert tried == [6]


def test_search_where_nothing_fits(monkeypatch):
    memory = {"total": None, "limit": 5000}
    report = {"fits": False, "hbm_bytes_per_device": memory}
    monkeypatch.setattr(compile_ahead, "step_report", lambda *_: report)
    start = {"batch_size": 32, "batch_per_device": 4, "topology": ""} | report
    found = compile_ahead.largest_batch(recipes.mae(batch_size=32), [], start)
    assert found["largest_batch_per_device"] == 0


def training_macs(model, mask_ratio):
    """Forward, matrix products alone; the decoder's end leaves visible units out."""
    kept = visible_units(math.prod(model.encoder.grid), mask_ratio)
    last = model.decoder_blocks[-1].mlp, model.decoder_pred
    spared = sum(row_cost(each, kept, 0) for each in last)
    return model.macs(mask_ratio=mask_ratio, layer_norm_cost=0) - spared


def test_operations_fall_with_the_mask_as_counted_by_hand():
    """Those of the matrix products of mae_tiny's step: forward, and twice backward."""
    found, counted = [], []
    for mask_ratio in (0.5, 0.75):
        flags = [f"--config.mask_ratio={mask_ratio}", "--config.batch_size=8"]
        config = configs.load("mae_tiny", flags)
        mesh = sharding.make_mesh(config.mesh, 8)
        training = compile_ahead.prepare_training(config, mesh)
        jaxpr = jax.make_jaxpr(training.step)(*training.arguments()).jaxpr
        found.append(cost.matmul_flops(jaxpr, loops=True) / 8)
        model = nnx.eval_shape(inputs.task_of_recipe(config).build_model)
        counted.append(6 * training_macs(model, mask_ratio))
    assert_allclose(found, counted, rtol=0.04)  # images are resized, too
    assert_allclose(found[0] - found[1], counted[0] - counted[1], rtol=0.01)


def test_tpu_step_does_what_it_should(tmp_path):
    """Operations follow the mask; gradients are exchanged once, parts or not."""
    pytest.importorskip("libtpu")
    whole = report(tmp_path)
    assert whole["fits"]
    assert whole["devices"] == whole["batch_per_device"] == 8
    memory = whole["hbm_bytes_per_device"]
    assert memory["limit"] == 15.75 * 2**30
    assert 0 < memory["aliased"] <= memory["arguments"] < memory["total"]
    assert whole["roofline"]["bound"] == "memory"

    config = recipes.mae()
    model = nnx.eval_shape(inputs.task_of_recipe(config).build_model)
    [reduced] = whole["collectives"]
    assert reduced["kind"] == "all-reduce"
    fixed = 16 * 32  # the decoder's table of positions
    parameters = 4 * (model.parameter_count() - fixed)
    assert_allclose(reduced["bytes_per_step"], parameters, rtol=0.02)

    parts = report(tmp_path, optimizer__accumulate_steps=4, batch_size=256)
    [again] = parts["collectives"]
    assert_allclose(again["bytes_per_step"], reduced["bytes_per_step"], rtol=0.02)
    assert_allclose(parts["flops_per_image"], whole["flops_per_image"], rtol=0.1)

    more = report(tmp_path, mask_ratio=0.25)
    dearer = 6 * (training_macs(model, 0.25) - training_macs(model, 0.75))
    # In a network this narrow what is no matrix product takes as much again.
    added = more["flops_per_image"] - whole["flops_per_image"]
    assert dearer < added < 1.7 * dearer
