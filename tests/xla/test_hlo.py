"""Tests of the analysis of HLO text and of jaxprs: collectives, regions, loops."""

import re

import jax
import jax.numpy as jnp
import pytest

from hivit_jax.xla import cost

# HLO text in the form of the TPU compiler, with tiles, memory spaces and a loop without
# a trip count.
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


def with_tuple_indices(hlo):
    """Replace get-tuple-element by %name#index, as newer versions of XLA print it."""
    element = r"  (%\S+) = \S+ get-tuple-element\((%\S+)\), index=(\d+)\n"
    for name, tuple_name, index in re.findall(element, hlo):
        hlo = re.sub(rf"{name}\b(?! =)", f"{tuple_name}#{index}", hlo)
    return re.sub(element, "", hlo)


@pytest.mark.parametrize("newer", [False, True])
def test_start_and_done_count_once_per_loop_iteration(newer):
    hlo = with_tuple_indices(ASYNCHRONOUS) if newer else ASYNCHRONOUS
    assert ("#" in hlo) == newer
    count_and_bytes = {
        collective["kind"]: (collective["count"], collective["bytes_per_step"])
        for collective in cost.collectives(hlo)
    }
    assert count_and_bytes == {
        "all-reduce": (1, 2 * 64 * 128 + 4),
        "all-gather": (3, 3 * 4 * 2048),
        "reduce-scatter": (3, 3 * 4 * 2048),
        "collective-permute": (1, 4 * 256),
    }
    # The all-reduce reads and writes an array and a scalar, which is padded to a tile
    # of 512 bytes. In each of three iterations, the all-gather reads %x and the fusion
    # %cut writes its result. The gathered array is free, because it is in VMEM. The
    # collective-permute reads and writes one array.
    all_reduce_bytes = 2 * (2 * 64 * 128 + 512)
    total_bytes = cost.bytes_by_region(hlo).total()
    assert total_bytes == all_reduce_bytes + (3 + 1) * 2 * 4 * 256


# HLO text of the TPU compiler with shortened names.
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


def test_bytes_of_regions_include_padding_and_copies():
    """Tiles pad 49 rows to 56.

    An operation without a region belongs to its consumer, a copy out of VMEM to its
    producer.
    """
    row_bytes = 2 * 64 * 512  # of one row of all 64 images
    assert cost.bytes_by_region(REGIONS) == {
        # %in and %out are copies of 56 rows; %made reads a slice of %b.
        "main mlp": 56 * row_bytes + 4 * 8 * 128 + 56 * row_bytes,
        # %mosaic reads %saved, %b and a slice of %c, and writes 50 padded rows.
        "decoder attention": 2 * 56 * row_bytes + 4 * (8 * 1024 + 128 * 256),
        # %sum reads and writes [8, 1024].
        "exchange": 2 * 4 * 8 * 1024,
        # %put works in place. %put reads the update and two indices, and writes the
        # update. All are scalars of 4 bytes.
        "input": 4 + 3 * 4,
        # %flat reads 56 rows and writes 50 rows without padding; %end reads these.
        "stem2": 56 * row_bytes + 50 * row_bytes + 50 * row_bytes,
    }


@pytest.mark.parametrize(
    ("name", "region"),
    [
        ("jit(train_step)/transpose(jvp(main))/mlp/dot_general", "main mlp"),
        ("jit(train_step)/jvp(stage3)/attention/add", "stage3 attention"),
        ("jit(train_step)/jvp(stage3)/merge/dot_general", "merge"),
        ("jit(train_step)/jvp(embedding)/stem1/mlp/add", "stem1"),
        ("jit(train_step)/optimizer/mul", "optimizer"),
        ("jit(train_step)/add", ""),
    ],
)
def test_region_is_the_innermost_scope_and_the_branch_of_its_block(name, region):
    assert cost.region_of(name) == region


def test_counts_of_regions_include_both_passes():
    """The test compiles a program for XLA:CPU, which does not pad arrays."""

    @jax.jit
    @jax.grad
    def program(w, x):
        with jax.named_scope("main"), jax.named_scope("attention"):
            x = jnp.sin(x @ w)
        with jax.named_scope("loss"):
            return jnp.square(x @ w.T).sum()

    w, x = jnp.ones((256, 128)), jnp.ones((512, 256))
    hlo = program.lower(w, x).compile().as_text()
    bytes_by_region = cost.bytes_by_region(hlo)
    assert bytes_by_region.keys() - {"other"} == {"main attention", "loss"}
    product_bytes = 4 * (256 * 128 + 512 * 256 + 512 * 128)
    assert bytes_by_region["main attention"] >= 2 * product_bytes
    assert bytes_by_region["loss"] >= 3 * product_bytes
    assert bytes_by_region.total() < 10 * product_bytes

    jaxpr = jax.make_jaxpr(program)(w, x).jaxpr
    product_flops = 2 * 512 * 256 * 128
    flops = cost.matmul_flops_by_region(jaxpr, count_iterations=True)
    # Without a gradient for the argument x, main attention has two products.
    assert flops == {
        "main attention": 2 * product_flops,
        "loss": 3 * product_flops,
    }
