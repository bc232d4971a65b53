"""Test oracle: a second implementation of training and evaluation, in float64.

The oracle computes everything from encoded files to parameters with NumPy and basic
JAX. PIL decodes images, and does the antialiased resizing that the package does on the
host. The only functions of the package that the oracle calls are the operations of
RandAugment.
As in the official code, feature maps are stored row by row, and all units are embedded
before the visible units are gathered. The official code defines no order of samples and
no PRNG keys; both follow the documentation of this library.
`test_every_key.py` compares runs with the oracle.
"""

import io
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from hivit_jax.data import randaugment

# The order of samples is a function of (seed, epoch). Random numbers are functions of
# (seed, epoch, image index) or of (seed, position). Positions count the samples of all
# epochs.


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


def fold(key, purpose):
    """Return the key for a purpose such as "mask"."""
    return jax.random.fold_in(key, zlib.crc32(purpose.encode()))


def keys_per_sample(seed, purpose, first, count):
    """Return the keys of `count` samples from position `first` on."""
    base = fold(jax.random.key(seed), purpose)
    return [jax.random.fold_in(base, first + i) for i in range(count)]


# One image on the host


def random_box(height, width, draws, scale):
    """Return (top, left, height, width) of torchvision's RandomResizedCrop."""
    for area_draw, aspect_draw in zip(draws[:10], draws[10:20], strict=True):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * area_draw)
        aspect = math.exp(math.log(3 / 4) + math.log(16 / 9) * aspect_draw)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(draws[20] * (height - h + 1))
            return top, int(draws[21] * (width - w + 1)), h, w
    h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def center_box(height, width, size, crop_pct):
    """Return (top, left, height, width) of timm's center crop.

    The values are fractional pixels of the original image.
    """
    target = [math.floor(side / crop_pct) for side in size]
    ratio = max(target[0] / height, target[1] / width)
    resized = [int(height * ratio + 1e-9), int(width * ratio + 1e-9)]
    corner = [round((r - s) / 2) for r, s in zip(resized, size, strict=True)]
    scale = height / resized[0], width / resized[1]
    return (
        *(c * x for c, x in zip(corner, scale, strict=True)),
        *(s * x for s, x in zip(size, scale, strict=True)),
    )


def resize_matrix(start, length, size, extent, interpolation, antialias):
    """Return weights [size, extent] of PIL, or of tf.image if `antialias` is false."""
    scale = length / size
    stretch = max(scale, 1.0) if antialias else 1.0
    centers = start + (np.arange(size) + 0.5) * scale
    x = np.abs(np.arange(extent) + 0.5 - centers[:, None]) / stretch
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    cubic = np.where(x < 1, near, np.where(x < 2, far, 0))
    weights = cubic if interpolation == "bicubic" else np.maximum(1 - x, 0)
    return weights / weights.sum(1, keepdims=True)


def resize(pixels, box, size, data, imitate_device):
    """Resize a box of pixels [h, w, C] to integers [*size, C]: width, then height.

    imitate_device: resize with weight matrices like the device, even with antialias.
    """
    top, left, height, width = box
    if data.antialias and not imitate_device:
        filters = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR
        pil_filter = filters[data.interpolation == "bilinear"]
        edges = left, top, left + width, top + height
        return np.asarray(Image.fromarray(pixels).resize(size[::-1], pil_filter, edges))
    options = data.interpolation, data.antialias
    columns = resize_matrix(left, width, size[1], pixels.shape[1], *options)
    pixels = np.rint(np.einsum("ow,hwc->hoc", columns, pixels)).clip(0, 255)
    rows = resize_matrix(top, height, size[0], pixels.shape[0], *options)
    return np.rint(np.einsum("oh,hwc->owc", rows, pixels)).clip(0, 255)


def apply_randaugment(pixels, draws):
    """Apply rand-m9-mstd0.5-inc1 with the operations of the package.

    test_randaugment.py compares these operations with timm's.
    """
    from statistics import NormalDist

    image, names = Image.fromarray(np.uint8(pixels)), list(randaugment.OPERATIONS)
    for name_draw, apply_draw, magnitude_draw, sign_draw in np.reshape(draws, (2, 4)):
        if apply_draw < 0.5:
            normal = NormalDist().inv_cdf(magnitude_draw)
            magnitude = min(max(9 + 0.5 * normal, 0), 10)
            name, sign = names[int(name_draw * 15)], -1 if sign_draw < 0.5 else 1
            image = randaugment.apply(name, image, magnitude, sign)
    return np.asarray(image)


def prepare_image(encoded, config, draws=None):
    """Decode and crop an image to [H, W, C], 0 to 255; return None if unreadable.

    With draws, the crop is the random crop of training, else the center crop of
    evaluation.
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
    """Return normalized images [B, H, W, C] and weights [B].

    images: list of [H, W, C], 0 to 255; None: unreadable image, which gets weight 0.
    """
    blank = np.zeros((*config.model.image_size, 3))
    weight = np.array([image is not None for image in images], np.float64)
    pixels = np.stack([blank if image is None else image for image in images])
    return (pixels / 255 - config.data.mean) / config.data.std, weight


def flip(images, keys):
    """Flip each image left to right with probability 1/2."""
    flips = [bool(jax.random.bernoulli(fold(key, "flip"))) for key in keys]
    return np.stack(
        [x[:, ::-1] if f else x for x, f in zip(images, flips, strict=True)]
    )


def erase(image, key, probability):
    """Apply timm's RandomErasing in pixel mode."""
    height, width, _ = image.shape
    erase_key, size_key, corner_key, noise_key = jax.random.split(fold(key, "erase"), 4)
    if not jax.random.bernoulli(erase_key, probability):
        return image
    draws = np.float64(jax.random.uniform(size_key, (2, 10)))
    for area_draw, aspect_draw in draws.T:
        area = (0.02 + (1 / 3 - 0.02) * area_draw) * height * width
        aspect = math.exp((2 * aspect_draw - 1) * math.log(1 / 0.3))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < height and w < width:
            y, x = np.float64(jax.random.uniform(corner_key, (2,)))
            top, left = int(y * (height - h + 1)), int(x * (width - w + 1))
            noise = np.float64(jax.random.normal(noise_key, image.shape))
            rectangle = slice(top, top + h), slice(left, left + w)
            image = image.copy()
            image[rectangle] = noise[rectangle]
            return image
    return image


def mix(images, targets, weight, key, mixup_alpha, cutmix_alpha):
    """Apply Mixup or CutMix to pairs of neighbors, with one ratio for the batch.

    A pair with an unreadable image is not mixed.

    mixup_alpha, cutmix_alpha: alphas of the beta distributions; 0: disabled.
    """
    size = np.array(images.shape[1:3])
    kind_key, ratio_key, area_key, center_key = jax.random.split(key, 4)
    own_weight = np.ones((*size, 1))
    if mixup_alpha and (not cutmix_alpha or not jax.random.bernoulli(kind_key)):
        fraction = float(jax.random.beta(ratio_key, mixup_alpha, mixup_alpha))
        own_weight *= fraction
    else:
        side = np.sqrt(
            np.float32(1) - jax.random.beta(area_key, cutmix_alpha, cutmix_alpha)
        )
        half = np.floor(np.float32(size) * side) // 2
        center = np.floor(np.asarray(jax.random.uniform(center_key, (2,))) * size)
        low, high = np.maximum(center - half, 0), np.minimum(center + half, size)
        (top, left), (bottom, right) = low.astype(int), high.astype(int)
        own_weight[top:bottom, left:right] = 0
        fraction = own_weight.mean()
    mixed_images, mixed_targets = images.copy(), targets.copy()
    for i in range(len(images)):
        other = i + 1 - 2 * (i % 2)
        if weight[i] and weight[other]:
            other_image = (1 - own_weight) * images[other]
            mixed_images[i] = own_weight * images[i] + other_image
            mixed_targets[i] = fraction * targets[i] + (1 - fraction) * targets[other]
    return mixed_images, mixed_targets


# Networks. `p` is {name: parameter}, and p["eps"] is the epsilon of every LayerNorm.


def norm(p, name, x):
    """Compute LayerNorm."""
    x = x - x.mean(-1, keepdims=True)
    x = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + p["eps"])
    return x * p[f"{name}/scale"] + p[f"{name}/bias"]


def linear(p, name, x):
    """Compute a linear layer, with or without a bias."""
    return x @ p[f"{name}/kernel"] + p.get(f"{name}/bias", 0)


def mlp_branch(p, name, x):
    """Compute the MLP branch of a residual block."""
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
    """Return the number of residual blocks of a stage."""
    return sum(f"encoder/stages/{stage}/{i}/norm2/scale" in p for i in range(99))


def encoder(p, images, drop_path_scale, ids=None):
    """Return the maps of the stem stages and the tokens [B, K, E] of the main stage.

    drop_path_scale: [B, branches], factors of the branches; in residual block n,
      branch 2n is the MLP, branch 2n + 1 the attention.
    ids: [B, K], visible units in the main stage; None: all units.
    """
    b, h, w, c = images.shape
    cells = images.reshape(b, h // 4, 4, w // 4, 4, c).transpose(0, 1, 3, 2, 4, 5)
    x = linear(p, "encoder/patch_embed/proj", cells.reshape(b, h // 4, w // 4, -1))
    x, maps, block_index = norm(p, "encoder/patch_embed/norm", x), [], 0
    for stage in (0, 1):
        for i in range(count_blocks(p, stage)):
            branch = mlp_branch(p, f"encoder/stages/{stage}/{i}", x)
            x = x + branch * drop_path_scale[:, 2 * block_index, None, None, None]
            block_index += 1
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
        x = x + branch * drop_path_scale[:, 2 * block_index + 1, None, None]
        x = x + mlp_branch(p, name, x) * drop_path_scale[:, 2 * block_index, None, None]
        block_index += 1
    return [*maps, x]


def split_units(x, side):
    """Split maps into units, row-major: [B, H, W, C] -> [B, N, side, side, C]."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // side, side, w // side, side, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, side, side, c)


# (row, column) of the cells in the order of `concatenate_neighbors`
NEIGHBORS = [(0, 0), (1, 0), (0, 1), (1, 1)]


def masked_loss(
    num_visible, p, images, drop_path_scale, ids_shuffle, use_raw_pixel_targets
):
    """Return (mean squared error over the masked units of each image [B], prediction).

    ids_shuffle: [B, N], unit indices sorted by noise; the first `num_visible` units are
      visible.
    use_raw_pixel_targets: traced bool scalar; False: targets are normalized per unit.
    """
    ids_keep = ids_shuffle[:, :num_visible]
    first, second, x = encoder(p, images, drop_path_scale, ids_keep)
    cells = [(2 * a + c, 2 * b + d) for a, b in NEIGHBORS for c, d in NEIGHBORS]
    first, second = split_units(first, 4), split_units(second, 2)
    stem = [first[:, :, i, j] for i, j in cells]
    stem += [second[:, :, i, j] for i, j in NEIGHBORS]
    stem = jnp.concatenate(stem, -1)  # [B, N, C], all units
    visible = jnp.take_along_axis(stem, ids_keep[:, :, None], 1)
    latent = norm(p, "norm", jnp.concatenate([visible, x], -1))
    x = linear(p, "decoder_embed", latent)
    b, n = ids_shuffle.shape
    mask_tokens = jnp.broadcast_to(p["mask_token"], (b, n - num_visible, x.shape[-1]))
    restore = jnp.argsort(ids_shuffle, 1)[:, :, None]
    x = jnp.take_along_axis(jnp.concatenate([x, mask_tokens], 1), restore, 1)
    x = x + jax.lax.stop_gradient(p["decoder_pos_embed"])
    for i in range(sum(f"decoder_blocks/{i}/norm1/scale" in p for i in range(99))):
        x = x + attention_branch(p, f"decoder_blocks/{i}", x)
        x = x + mlp_branch(p, f"decoder_blocks/{i}", x)
    predicted = linear(p, "decoder_pred", norm(p, "decoder_norm", x))
    target = split_units(images, 16).reshape(b, n, -1)
    mean, variance = target.mean(-1, keepdims=True), target.var(-1, ddof=1)[..., None]
    normalized = (target - mean) / jnp.sqrt(variance + 1e-6)
    target = jnp.where(use_raw_pixel_targets, target, normalized)
    loss = ((predicted - target) ** 2).mean(-1)  # [B, N]
    return jnp.take_along_axis(loss, ids_shuffle[:, num_visible:], 1).mean(1), predicted


def classifier_logits(p, images, drop_path_scale):
    """Return logits [B, classes]."""
    features = encoder(p, images, drop_path_scale)[-1].mean(1)
    return linear(p, "head", norm(p, "fc_norm", features))


def cross_entropy(logits, targets):
    """Return the cross-entropy of each example [B]."""
    return -(targets * jax.nn.log_softmax(logits)).sum(-1)


def to_float64(x):
    """Cast float32 to float64."""
    x = np.asarray(x)
    return jnp.asarray(x, np.float64 if x.dtype == np.float32 else x.dtype)


def in_float64(function):
    """Return `function` of pytrees of arrays, jitted to compute in float64."""
    run = jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})

    def call(*arguments):
        with jax.enable_x64(True):
            return jax.tree.map(np.asarray, run(*jax.tree.map(to_float64, arguments)))

    return call


def weighted_value_and_grad(losses_of):
    """Return a function that computes a weighted mean of losses and its gradients.

    losses_of: function of (parameters, *inputs) to (losses [B], outputs).

    The returned function returns ((weighted mean, (losses [B], outputs)), gradients).
    """

    def mean(params, eps, weight, *inputs):
        # eps is an argument, so that one compiled function serves every value of eps.
        losses, outputs = losses_of(params | {"eps": eps}, *inputs)
        return (losses * weight).sum() / weight.sum(), (losses, outputs)

    return in_float64(jax.value_and_grad(mean, has_aux=True))


@jax.jit
def kept_branches(keys, keep_prob):
    """Return bool [B, branches]: True for the branches that drop path keeps.

    keep_prob: [residual blocks], the probability to keep a branch of a block.
    """

    def draw(key, branch):
        probability = keep_prob[branch // 2]
        return jax.random.bernoulli(jax.random.fold_in(key, branch), probability)

    by_branch = jax.vmap(draw, (None, 0))
    return jax.vmap(by_branch, (0, None))(keys, jnp.arange(2 * len(keep_prob)))


def drop_path_scales(keys, drop_path_rates):
    """Return drop-path factors [B, branches] from one rate per block."""
    keep_prob = 1 - np.float32(drop_path_rates)
    drop_path_keys = jnp.stack([fold(key, "drop_path") for key in keys])
    kept = np.asarray(kept_branches(drop_path_keys, keep_prob))
    return kept / np.repeat(np.float64(keep_prob), 2)


# The update


def learning_rate(step, config, num_images):
    """Return the learning rate: linear warmup, then half a cosine to the minimum.

    first_epoch=1: the learning rate is one epoch ahead, as in official ``lr_sched.py``.
    """
    o = config.optimizer
    steps_per_epoch = num_images / config.batch_size
    total = config.total_steps or round(config.total_epochs * steps_per_epoch)
    peak = o.base_learning_rate * config.batch_size / 256
    warmup = o.warmup_epochs * steps_per_epoch
    step = step + o.first_epoch * steps_per_epoch
    if step < warmup:
        start = o.warmup_learning_rate
        return start + (peak - start) * step / warmup
    progress = (step - warmup) / (total - warmup)
    minimum = o.min_learning_rate
    return minimum + (peak - minimum) * (1 + math.cos(math.pi * progress)) / 2


def clip_by_global_norm(gradients, limit):
    """Return the clipped gradients, and the global norm before clipping.

    limit: the largest norm; 0: gradients are not clipped.
    """
    norm = math.sqrt(sum((g**2).sum() for g in gradients.values()))
    factor = min(1.0, limit / norm) if limit else 1.0
    return {name: g * factor for name, g in gradients.items()}, norm


def is_decayed(name, task):
    """Return True for parameters with weight decay."""
    leaf = name.rsplit("/", 1)[-1]
    if leaf in ("bias", "scale", "decoder_pos_embed"):
        return False
    return task == "mae" or leaf == "kernel"


def layer_decay_factor(name, layer_decay, blocks_per_stage):
    """Return the factor of layer-wise learning rate decay for a parameter."""
    parts, last = name.split("/"), sum(blocks_per_stage) + 1
    layer = last
    if parts[:2] == ["encoder", "stages"]:
        layer = sum(blocks_per_stage[: int(parts[2])]) + int(parts[3]) + 1
    elif parts[:2] == ["encoder", "merges"]:
        layer = sum(blocks_per_stage[: int(parts[2]) + 1])
    elif parts[0] == "encoder":
        layer = 0
    return layer_decay ** (last - layer)


def adam_direction(mu, nu, count, betas):
    """Return Adam's direction from the moments mu and nu after `count` gradients."""
    mean_square = nu / (1 - betas[1] ** count)
    return mu / (1 - betas[0] ** count) / (np.sqrt(mean_square) + 1e-8)
