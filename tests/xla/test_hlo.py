"""Tests of the analysis of HLO text: collectives, regions, loops."""

import re

import jax
import jax.numpy as jnp
import pytest

from hivit_jax.xla import cost

pytestmark = pytest.mark.usefixtures("minimal_output")


# Text of the TPU compiler: tiles, memory spaces, loops without a trip count.
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
    """Write elements of tuples as newer versions of XLA do: %name#2."""
    element = r"  (%\S+) = \S+ get-tuple-element\((%\S+)\), index=(\d+)\n"
    for name, tuple_name, index in re.findall(element, hlo):
        hlo = re.sub(rf"{name}\b(?! =)", f"{tuple_name}#{index}", hlo)
    return re.sub(element, "", hlo)


@pytest.mark.parametrize("newer", [False, True])
def test_asynchronous_collectives_count_once_and_loops_by_their_bound(newer):
    hlo = with_tuple_indices(ASYNCHRONOUS) if newer else ASYNCHRONOUS
    assert ("#" in hlo) == newer
    kinds = {
        collective["kind"]: (collective["count"], collective["bytes_per_step"])
        for collective in cost.collectives(hlo)
    }
    assert kinds == {
        "all-reduce": (1, 2 * 64 * 128 + 4),
        "all-gather": (3, 3 * 4 * 2048),
        "reduce-scatter": (3, 3 * 4 * 2048),
        "collective-permute": (1, 4 * 256),
    }
    # A fusion is one kernel. Reads from VMEM are free, and %cut reads only VMEM. A
    # scalar occupies a tile of 512 bytes: %c is read, and %d returns one.
    reduced = 2 * (2 * 64 * 128 + 512)
    moved = cost.bytes_by_region(hlo).total()
    assert moved == reduced + (3 + 1) * 2 * 4 * 256


# Text of the TPU compiler, with shortened names.
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
    """Tiles pad 49 rows to 56. Operations without a region belong to their consumer."""
    row = 2 * 64 * 512
    assert cost.bytes_by_region(REGIONS) == {
        "main mlp": 56 * row + 4 * 8 * 128 + 56 * row,  # %in, a slice of %b, %out
        "decoder attention": 56 * row + 56 * row + 4 * (8 * 1024 + 128 * 256),
        "exchange": 2 * 4 * 8 * 1024,
        "input": 4 + 3 * 4,  # in place: one scalar written, it and two indices read
        "stem2": 56 * row + 50 * row + 50 * row,  # %flat without padding, and %end
    }


def test_regions_of_a_compiled_program():
    """A region counts its forward and backward pass; XLA:CPU pads no array."""

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
    product = 4 * (256 * 128 + 512 * 256 + 512 * 128)
    assert bytes_by_region["main attention"] >= 2 * product
    assert bytes_by_region["loss"] >= 3 * product
    assert bytes_by_region.total() < 10 * product

    jaxpr = jax.make_jaxpr(program)(w, x).jaxpr
    product_flops = 2 * 512 * 256 * 128
    flops = cost.matmul_flops_by_region(jaxpr, loops=True)
    assert flops == {
        "main attention": 2 * product_flops,
        "loss": 3 * product_flops,
    }  # x has no gradient
