"""Second implementation of training and evaluation, from encoded files to parameters.

This implementation uses numpy and plain JAX in float64, and shares no wiring with the
package. It follows the rules of the official code (raster maps; all units are embedded,
then gathered). The order of samples and the PRNG keys, which the official code does not
define, follow the rules of this library. `test_every_key.py` compares real runs with
this implementation.
"""

import io
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from hivit_jax.data import randaugment

# Order and random numbers: functions of (seed, epoch, index) and of (seed, position)


def permutation(seed, epoch, n):
    """Return the order of the images in an epoch."""
    bits = np.random.MT19937(np.random.SeedSequence([seed, epoch]))
    return np.random.RandomState(bits).permutation(n)


def samples_of_step(seed, step, batch_size, n):
    """Return [(image index, epoch)] of the samples of a step."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [(permutation(seed, p // n, n)[p % n], p // n) for p in positions]


def uniforms(seed, epoch, index, count):
    """Return uniform numbers in [0, 1) for an image in an epoch."""
    words = np.random.Philox(key=seed, counter=[0, 0, index, epoch]).random_raw(count)
    return (words >> 11) * 2.0**-53


def fold(key, word):
    return jax.random.fold_in(key, zlib.crc32(word.encode()))


def sample_keys(seed, purpose, first, count):
    base = fold(jax.random.key(seed), purpose)
    return [jax.random.fold_in(base, first + i) for i in range(count)]


# One image on the host


def random_box(height, width, draws, scale):
    """Return (top, left, height, width) of torchvision's RandomResizedCrop."""
    for size, shape in zip(draws[:10], draws[10:20], strict=True):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * size)
        aspect = math.exp(math.log(3 / 4) + math.log(16 / 9) * shape)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(draws[20] * (height - h + 1))
            return top, int(draws[21] * (width - w + 1)), h, w
    h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def center_box(height, width, size, crop_pct):
    """Return (top, left, height, width), in pixels, of timm's center crop."""
    target = [math.floor(side / crop_pct) for side in size]
    ratio = max(target[0] / height, target[1] / width)
    full = [int(height * ratio + 1e-9), int(width * ratio + 1e-9)]
    corner = [round((f - s) / 2) for f, s in zip(full, size, strict=True)]
    unit = height / full[0], width / full[1]
    return (
        *(c * u for c, u in zip(corner, unit, strict=True)),
        *(s * u for s, u in zip(size, unit, strict=True)),
    )


def resize_matrix(start, length, size, extent, interpolation, antialias):
    """Return weights [size, extent]: PIL's, or without antialias those of tf.image."""
    scale = length / size
    stretch = max(scale, 1.0) if antialias else 1.0
    centers = start + (np.arange(size) + 0.5) * scale
    x = np.abs(np.arange(extent) + 0.5 - centers[:, None]) / stretch
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    cubic = np.where(x < 1, near, np.where(x < 2, far, 0))
    weights = cubic if interpolation == "bicubic" else np.maximum(1 - x, 0)
    return weights / weights.sum(1, keepdims=True)


def resize(pixels, box, size, data, on_device):
    """Resize a box of [h, w, C] to [*size, C] integers: columns first, then rows."""
    top, left, height, width = box
    if data.antialias and not on_device:
        filters = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR
        chosen = filters[data.interpolation == "bilinear"]
        edges = left, top, left + width, top + height
        return np.asarray(Image.fromarray(pixels).resize(size[::-1], chosen, edges))
    options = data.interpolation, data.antialias
    columns = resize_matrix(left, width, size[1], pixels.shape[1], *options)
    pixels = np.rint(np.einsum("ow,hwc->hoc", columns, pixels)).clip(0, 255)
    rows = resize_matrix(top, height, size[0], pixels.shape[0], *options)
    return np.rint(np.einsum("oh,hwc->owc", rows, pixels)).clip(0, 255)


def apply_randaugment(pixels, draws):
    """Apply rand-m9-mstd0.5-inc1; another test compares the operations with timm's."""
    from statistics import NormalDist

    image, names = Image.fromarray(np.uint8(pixels)), list(randaugment.OPERATIONS)
    for choice, apply, normal, side in np.reshape(draws, (2, 4)):
        if apply < 0.5:
            magnitude = min(max(9 + 0.5 * NormalDist().inv_cdf(normal), 0), 10)
            name, sign = names[int(choice * 15)], -1 if side < 0.5 else 1
            image = randaugment.apply(name, image, magnitude, sign)
    return np.asarray(image)


def prepare_image(encoded, config, draws=None):
    """Decode and crop a file to [H, W, C], 0 to 255; return None for other files.

    With draws, the crop is the random crop of training. Without draws, the crop is the
    center crop of evaluation.
    """
    try:
        pixels = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
    except OSError:
        return None
    height, width, _ = pixels.shape
    size, data = tuple(config.model.image_size), config.data
    if draws is None:
        box = center_box(height, width, size, data.crop_pct)
    else:
        top, left, height, width = random_box(height, width, draws, data.crop_scale)
        # The filter of a random crop does not read pixels outside the crop.
        pixels = pixels[top : top + height, left : left + width]
        box = 0, 0, height, width
    augment = draws is not None and data.randaugment
    image = resize(pixels, box, size, data, data.canvas > 0 and not augment)
    return apply_randaugment(image, draws[22:30]) if augment else image


# One batch


def make_batch(images, config):
    """Return normalized images [B, H, W, C] and weights [B]; None has weight 0."""
    blank = np.zeros((*config.model.image_size, 3))
    weight = np.array([image is not None for image in images], np.float64)
    pixels = np.stack([blank if image is None else image for image in images])
    return (pixels / 255 - config.data.mean) / config.data.std, weight


def flip(images, keys):
    flips = [bool(jax.random.bernoulli(fold(key, "flip"))) for key in keys]
    return np.stack(
        [x[:, ::-1] if f else x for x, f in zip(images, flips, strict=True)]
    )


def erase(image, key, probability):
    """Apply timm's RandomErasing in pixel mode."""
    height, width, _ = image.shape
    chosen, sizes, corner, values = jax.random.split(fold(key, "erase"), 4)
    if not jax.random.bernoulli(chosen, probability):
        return image
    draws = np.float64(jax.random.uniform(sizes, (2, 10)))
    for size, shape in draws.T:
        area = (0.02 + (1 / 3 - 0.02) * size) * height * width
        aspect = math.exp((2 * shape - 1) * math.log(1 / 0.3))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < height and w < width:
            y, x = np.float64(jax.random.uniform(corner, (2,)))
            top, left = int(y * (height - h + 1)), int(x * (width - w + 1))
            noise = np.float64(jax.random.normal(values, image.shape))
            part = slice(top, top + h), slice(left, left + w)
            image = image.copy()
            image[part] = noise[part]
            return image
    return image


def mix(images, targets, weight, key, mixup, cutmix):
    """Apply Mixup or CutMix to neighbors, with one ratio for the batch."""
    size = np.array(images.shape[1:3])
    kind, ratio, area, position = jax.random.split(key, 4)
    own_weight = np.ones((*size, 1))
    if mixup and (not cutmix or not jax.random.bernoulli(kind)):
        fraction = float(jax.random.beta(ratio, mixup, mixup))
        own_weight *= fraction
    else:
        side = np.sqrt(np.float32(1) - jax.random.beta(area, cutmix, cutmix))
        half = np.floor(np.float32(size) * side) // 2
        center = np.floor(np.asarray(jax.random.uniform(position, (2,))) * size)
        low, high = np.maximum(center - half, 0), np.minimum(center + half, size)
        (top, left), (bottom, right) = low.astype(int), high.astype(int)
        own_weight[top:bottom, left:right] = 0
        fraction = own_weight.mean()
    mixed = images.copy(), targets.copy()
    for i in range(len(images)):
        other = i + 1 - 2 * (i % 2)
        if weight[i] and weight[other]:
            mixed[0][i] = own_weight * images[i] + (1 - own_weight) * images[other]
            mixed[1][i] = fraction * targets[i] + (1 - fraction) * targets[other]
    return mixed


# Networks. p contains the parameters by name, and "eps" of every LayerNorm.


def norm(p, name, x):
    x = x - x.mean(-1, keepdims=True)
    x = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + p["eps"])
    return x * p[f"{name}/scale"] + p[f"{name}/bias"]


def linear(p, name, x):
    return x @ p[f"{name}/kernel"] + p.get(f"{name}/bias", 0)


def mlp_branch(p, name, x):
    x = linear(p, f"{name}/mlp/fc1", norm(p, f"{name}/norm2", x))
    x = x * (1 + jax.lax.erf(x / math.sqrt(2))) / 2
    return linear(p, f"{name}/mlp/fc2", x)


def attention_branch(p, name, x, bias=0.0):
    """Compute the attention branch of x [B, N, C] with bias [heads, N, N]."""
    y = norm(p, f"{name}/norm1", x)
    qkv = jnp.einsum("bnc,cthd->tbhnd", y, p[f"{name}/attn/qkv/kernel"])
    q, k, v = qkv + p[f"{name}/attn/qkv/bias"][:, None, :, None]
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.shape[-1])
    heads = jnp.einsum("bhqk,bhkd->bqhd", jax.nn.softmax(scores + bias), v)
    return linear(p, f"{name}/attn/proj", heads.reshape(x.shape))


def relative_bias(p, name, grid):
    """Return the relative position bias [heads, N, N] of a block, or 0."""
    table = p.get(f"{name}/attn/relative_position_bias_table")
    if table is None:
        return 0.0
    position = np.stack(np.divmod(np.arange(grid[0] * grid[1]), grid[1]), 1)
    row, column = np.moveaxis(position[:, None] - position[None], -1, 0)
    index = (row + grid[0] - 1) * (2 * grid[1] - 1) + column + grid[1] - 1
    return jnp.moveaxis(table[index], -1, 0)


def concatenate_neighbors(x):
    """Concatenate 2x2 cells: [B, H, W, C] -> [B, H/2, W/2, 4C].

    Order: top left, bottom left, top right, bottom right.
    """
    parts = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
    return jnp.concatenate(parts, -1)


def count_blocks(p, stage):
    """Count the residual blocks of a stage."""
    return sum(f"encoder/stages/{stage}/{i}/norm2/scale" in p for i in range(99))


def encoder(p, images, keep_scale, ids=None):
    """Return the maps of the stem stages and the tokens [B, K, E] of the main stage.

    keep_scale: [B, branches], scales of drop path; branch 2n is the MLP of residual
    block n, branch 2n + 1 its attention.
    ids: [B, K], units of the main stage; None: all units.
    """
    b, h, w, c = images.shape
    cells = images.reshape(b, h // 4, 4, w // 4, 4, c).transpose(0, 1, 3, 2, 4, 5)
    x = linear(p, "encoder/patch_embed/proj", cells.reshape(b, h // 4, w // 4, -1))
    x, maps, number = norm(p, "encoder/patch_embed/norm", x), [], 0
    for stage in (0, 1):
        for i in range(count_blocks(p, stage)):
            branch = mlp_branch(p, f"encoder/stages/{stage}/{i}", x)
            x = x + branch * keep_scale[:, 2 * number, None, None, None]
            number += 1
        maps.append(x)
        x = norm(p, f"encoder/merges/{stage}/norm", concatenate_neighbors(x))
        x = linear(p, f"encoder/merges/{stage}/reduction", x)
    grid = x.shape[1:3]
    x = x.reshape(b, grid[0] * grid[1], -1) + p["encoder/absolute_pos_embed"]
    if ids is not None:
        x = jnp.take_along_axis(x, ids[:, :, None], 1)
    for i in range(count_blocks(p, 2)):
        name = f"encoder/stages/2/{i}"
        branch = attention_branch(p, name, x, relative_bias(p, name, grid))
        x = x + branch * keep_scale[:, 2 * number + 1, None, None]
        x = x + mlp_branch(p, name, x) * keep_scale[:, 2 * number, None, None]
        number += 1
    return [*maps, x]


def split_units(x, side):
    """Split into units: [B, H, W, C] -> [B, N, side, side, C], row-major."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // side, side, w // side, side, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, side, side, c)


ORDER = [(0, 0), (1, 0), (0, 1), (1, 1)]  # (row, column) in `concatenate_neighbors`


def masked_loss(kept, p, images, keep_scale, ids, pixels):
    """Return (mean squared error over the masked units of each image [B], prediction).

    ids: [B, N], units in the order of their noise; the first `kept` stay visible.
    pixels: 1: predict raw pixels; 0: predict pixels normalized by unit.
    """
    first, second, x = encoder(p, images, keep_scale, ids[:, :kept])
    cells = [(2 * a + c, 2 * b + d) for a, b in ORDER for c, d in ORDER]
    first, second = split_units(first, 4), split_units(second, 2)
    parts = [first[:, :, i, j] for i, j in cells]
    parts += [second[:, :, i, j] for i, j in ORDER]
    parts = jnp.concatenate(parts, -1)
    seen = jnp.take_along_axis(parts, ids[:, :kept, None], 1)
    latent = norm(p, "norm", jnp.concatenate([seen, x], -1))
    x = linear(p, "decoder_embed", latent)
    b, n = ids.shape
    tokens = jnp.broadcast_to(p["mask_token"], (b, n - kept, x.shape[-1]))
    back = jnp.argsort(ids, 1)[:, :, None]
    x = jnp.take_along_axis(jnp.concatenate([x, tokens], 1), back, 1)
    x = x + jax.lax.stop_gradient(p["decoder_pos_embed"])
    for i in range(sum(f"decoder_blocks/{i}/norm1/scale" in p for i in range(99))):
        x = x + attention_branch(p, f"decoder_blocks/{i}", x)
        x = x + mlp_branch(p, f"decoder_blocks/{i}", x)
    predicted = linear(p, "decoder_pred", norm(p, "decoder_norm", x))
    target = split_units(images, 16).reshape(b, n, -1)
    mean, variance = target.mean(-1, keepdims=True), target.var(-1, ddof=1)[..., None]
    normalized = (target - mean) / jnp.sqrt(variance + 1e-6)
    target = jnp.where(pixels, target, normalized)
    loss = ((predicted - target) ** 2).mean(-1)  # [B, N]
    return jnp.take_along_axis(loss, ids[:, kept:], 1).mean(1), predicted


def classifier_logits(p, images, keep_scale):
    features = encoder(p, images, keep_scale)[-1].mean(1)
    return linear(p, "head", norm(p, "fc_norm", features))


def cross_entropy(logits, targets):
    return -(targets * jax.nn.log_softmax(logits)).sum(-1)


def to_float64(x):
    """Cast float32 to float64."""
    x = np.asarray(x)
    return jnp.asarray(x, np.float64 if x.dtype == np.float32 else x.dtype)


def in_float64(function):
    """Jit `function` of pytrees of arrays to run in float64."""
    run = jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})

    def call(*arguments):
        with jax.enable_x64(True):
            return jax.tree.map(np.asarray, run(*jax.tree.map(to_float64, arguments)))

    return call


def weighted_value_and_grad(losses):
    """Return a function that computes a weighted mean of losses and its gradient.

    The function returns ((weighted mean, (losses [B], outputs)), gradient).
    """

    def mean(params, eps, weight, *inputs):
        found, outputs = losses(params | {"eps": eps}, *inputs)
        return (found * weight).sum() / weight.sum(), (found, outputs)

    return in_float64(jax.value_and_grad(mean, has_aux=True))


@jax.jit
def kept_branches(keys, keep):
    """Return [B, branches], True for each branch of a sample that is kept."""

    def draw(key, branch):
        return jax.random.bernoulli(jax.random.fold_in(key, branch), keep[branch // 2])

    by_branch = jax.vmap(draw, (None, 0))
    return jax.vmap(by_branch, (0, None))(keys, jnp.arange(2 * len(keep)))


def keep_scales(keys, rates):
    """Return scales of drop path [B, branches] from rates of residual blocks."""
    keep = 1 - np.float32(rates)
    drop_keys = jnp.stack([fold(key, "drop_path") for key in keys])
    kept = np.asarray(kept_branches(drop_keys, keep))
    return kept / np.repeat(np.float64(keep), 2)


# The update


def learning_rate(step, config, images):
    """Return the learning rate: linear warmup, then half a cosine to the minimum.

    first_epoch=1 skips the first epoch, as the official ``lr_sched.py`` does.
    """
    o = config.optimizer
    steps_per_epoch = images / config.batch_size
    total = config.total_steps or round(config.total_epochs * steps_per_epoch)
    peak = o.base_learning_rate * config.batch_size / 256
    warmup = o.warmup_epochs * steps_per_epoch
    step = step + o.first_epoch * steps_per_epoch
    if step < warmup:
        low = o.warmup_learning_rate
        return low + (peak - low) * step / warmup
    done = (step - warmup) / (total - warmup)
    low = o.min_learning_rate
    return low + (peak - low) * (1 + math.cos(math.pi * done)) / 2


def clip_by_global_norm(gradients, limit):
    """Return the gradients clipped by their global norm, and the norm."""
    length = math.sqrt(sum((g**2).sum() for g in gradients.values()))
    factor = min(1.0, limit / length) if limit else 1.0
    return {name: g * factor for name, g in gradients.items()}, length


def is_decayed(name, task):
    leaf = name.rsplit("/", 1)[-1]
    if leaf in ("bias", "scale", "decoder_pos_embed"):
        return False
    return task == "mae" or leaf == "kernel"


def layer_scale(name, decay, blocks):
    """Return the factor of layer-wise decay; `blocks`: residual blocks per stage."""
    parts, last = name.split("/"), sum(blocks) + 1
    layer = last
    if parts[:2] == ["encoder", "stages"]:
        layer = sum(blocks[: int(parts[2])]) + int(parts[3]) + 1
    elif parts[:2] == ["encoder", "merges"]:
        layer = sum(blocks[: int(parts[2]) + 1])
    elif parts[0] == "encoder":
        layer = 0
    return decay ** (last - layer)


def adam_direction(mu, nu, count, betas):
    """Return Adam's direction after `count` gradients."""
    scaled = nu / (1 - betas[1] ** count)
    return mu / (1 - betas[0] ** count) / (np.sqrt(scaled) + 1e-8)
