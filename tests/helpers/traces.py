"""Runs of recipes that store every state, and the values that `plain.py` expects."""

import json
from functools import cache, partial

import jax
import numpy as np
import plain
import pytest
import recipes
from PIL import Image

from hivit_jax import config as configs
from hivit_jax.errors import Interrupted
from hivit_jax.train import train

CLASSES = ("ape", "bee", "cat", "dog", "eel", "fly", "gnu")
BROKEN = {"train": 9, "val": 4}  # index of an image that cannot be read
IMAGES, BATCH, STEPS = 22, 16, 3
COMMON = {
    "seed": 5,
    "batch_size": BATCH,
    "total_steps": STEPS,
    "log_every": 1,
    "checkpoint_every": 1,
    "eval_every": 2,
    "keep_checkpoints": 9,
    "mesh.data": 4,
    "mesh.fsdp": 2,
    "model.image_size": "(32,48)",
    "model.embed_dim": 32,
    "model.depths": "(1,1,2)",
    "model.num_heads": 2,
    "model.dtype": "float32",
    "data.name": "folder",
    "data.max_unreadable": 0.5,
    "optimizer.base_learning_rate": 0.02,
    "optimizer.warmup_learning_rate": 3e-4,
    "optimizer.min_learning_rate": 1e-4,
    "optimizer.warmup_epochs": 1.0,
}
OPTIMIZER = {
    "optimizer.betas": "(0.8,0.9)",
    "optimizer.weight_decay": 0.3,
    "optimizer.clip_norm": 0.05,
    "optimizer.ema_decay": 0.9,
}
AUTOENCODER = {
    "mask_ratio": 0.6,
    "model.decoder_embed_dim": 16,
    "model.decoder_depth": 2,
    "model.decoder_num_heads": 2,
    "model.drop_path_rate": 0.3,
    "model.layer_norm_eps": 1e-3,
    "model.norm_pix_loss": False,
    "data.antialias": False,
    "data.canvas": 0,
    "data.crop_pct": 0.95,
    "data.crop_scale": "(0.3,0.9)",
    "data.interpolation": "bilinear",
    "data.mean": "(0.3,0.4,0.5)",
    "data.randaugment": True,
    "data.std": "(0.3,0.2,0.4)",
}
CLASSIFIER = {"init_from": "", "model.num_classes": 8}
AUGMENTED = {
    "cutmix": 0.6,
    "label_smoothing": 0.2,
    "mixup": 0.7,
    "random_erasing": 0.6,
    "model.drop_path_rate": 0.4,
    "model.layer_norm_eps": 1e-3,
    "data.crop_pct": 0.8,
    "data.crop_scale": "(0.2,0.8)",
    "data.mean": "(0.3,0.4,0.5)",
    "data.std": "(0.3,0.2,0.4)",
    "optimizer.accumulate_steps": 2,
    "optimizer.layer_decay": 0.7,
}
PLAIN = {
    "cutmix": 0.0,
    "label_smoothing": 0.0,
    "mixup": 0.0,
    "random_erasing": 0.0,
    "model.drop_path_rate": 0.0,
    "data.antialias": False,
    "data.flip": False,
    "data.interpolation": "bilinear",
    "data.randaugment": False,
}
PROBE = {
    "model.layer_norm_eps": 0.01,
    "data.antialias": False,
    "data.crop_pct": 0.8,
    "data.crop_scale": "(0.2,0.8)",
    "data.mean": "(0.3,0.4,0.5)",
    "data.std": "(0.3,0.2,0.4)",
    "optimizer.base_learning_rate": 20.0,
    "optimizer.betas": "(0.8,0.0)",
    "optimizer.min_learning_rate": 0.1,
    "optimizer.warmup_learning_rate": 0.3,
    "optimizer.weight_decay": 5.0,
}
# name -> recipe, overrides, relative tolerance of a loss. Where the device resizes, one
# of some thousand pixels is rounded differently.
TRACES = {
    "mae": ("mae_base", OPTIMIZER | AUTOENCODER, 5e-6),
    "classify": ("finetune:base", OPTIMIZER | CLASSIFIER | AUGMENTED, 2e-6),
    "classify, plain": ("supervised:base", CLASSIFIER | PLAIN, 3e-5),
    "linear_probe": ("linear:base", CLASSIFIER | PROBE, 3e-5),
}


def write_folder(root):
    """Write class folders of 22 and 11 files of many sizes; some nested, some PNG."""
    random = np.random.RandomState(3)
    for split, count in (("train", IMAGES), ("val", 11)):
        for number in range(count):
            name = CLASSES[number % 7]
            size = (70 + 9 * (number % 7), 130 - 3 * number)
            low = random.randint(0, 256, (9, 7, 3), np.uint8)
            image = Image.fromarray(low).resize(size, Image.Resampling.BILINEAR)
            kind, nested = ("png", "deep/") if number % 5 == 1 else ("jpg", "")
            path = root / split / name / f"{nested}{number:02}.{kind}"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
        list_files(root, split)[BROKEN[split]][0].write_bytes(b"no image")


def list_files(root, split):
    """Return [(path, label)] by sorted class and sorted file."""
    return [
        (path, label)
        for label, name in enumerate(CLASSES)
        for path in sorted(p for p in (root / split / name).rglob("*") if p.is_file())
    ]


def trace_flags(name, **more):
    """Return the command line of a trace.

    more: config values; two underscores stand for a dot.
    """
    recipe, overrides, _ = TRACES[name]
    more = {key.replace("__", "."): value for key, value in more.items()}
    values = COMMON | overrides | more
    return [f"--config={recipe}"] + [f"--config.{k}={v}" for k, v in values.items()]


def trace_config(name, **more):
    """Return the config of a trace with config values `more`, as in `trace_flags`."""
    path, *overrides = trace_flags(name, **more)
    return configs.load(path.removeprefix("--config="), overrides)


class Trace:
    """A run of a recipe that stores every state, including the initial one."""

    def __init__(self, name, root, workdir, **more):
        self.name, self.root, self.workdir = name, root, workdir
        self.tolerance = TRACES[name][2]
        self.config = trace_config(name, data__dir=root, **more)
        with pytest.raises(Interrupted):
            train(self.config, workdir, lambda step: "stop" if step == 0 else None)
        self.results = train(self.config, workdir)
        self.states = [recipes.saved_arrays(workdir, step) for step in range(STEPS + 1)]
        text = (workdir / "metrics.jsonl").read_text().splitlines()
        self.lines = [json.loads(line) for line in text]
        self.sizes = [plain.count_blocks(self.states[0]["params"], s) for s in range(3)]

    def params(self, step, item="params"):
        """Return parameters (or their averages) and model state, by name."""
        state = self.states[step]
        arrays = state[item] | state.get("model_state", {})
        return {k: v.astype(np.float64) for k, v in arrays.items()}

    def moment(self, step, kind):
        """Return Adam's "mu" or "nu", or LARS's "trace", by parameter."""
        stored = self.states[step]["optimizer"]
        return {
            name.partition(f"/{kind}/")[2]: array.astype(np.float64)
            for name, array in stored.items()
            if f"/{kind}/" in name
        }

    def line(self, step, key="loss"):
        return next(x for x in self.lines if x["step"] == step and key in x)

    def batch(self, step, config):
        """Return (images, weight, labels, keys) of a training step, flipped."""
        files, images, labels = list_files(self.root, "train"), [], []
        size, seed = config.batch_size, config.seed
        for index, epoch in plain.samples_of_step(seed, step, size, len(files)):
            path, label = files[index]
            draws = plain.uniforms(seed, int(epoch), int(index), 30)
            images.append(plain.prepare_image(path.read_bytes(), config, draws))
            labels.append(label if images[-1] is not None else 0)
        keys = plain.sample_keys(seed, "train", step * size, size)
        images, weight = plain.make_batch(images, config)
        images = plain.flip(images, keys) if config.data.flip else images
        return images, weight, np.array(labels), keys

    def eval_batch(self, config):
        """Return (images, weight, labels, keys) of the held-out images, padded."""
        files = list_files(self.root, "val")
        images = [plain.prepare_image(p.read_bytes(), config) for p, _ in files]
        fill = BATCH - len(files)
        images, weight = plain.make_batch(images + [None] * fill, config)
        labels = np.array([label for _, label in files] + [0] * fill)
        return images, weight, labels, plain.sample_keys(config.seed, "eval", 0, BATCH)

    def keep_scales(self, keys, config):
        rates = np.linspace(0, config.model.get("drop_path_rate") or 0, sum(self.sizes))
        return plain.keep_scales(keys, rates)


def topk_correct(logits, labels, count):
    """Return 1 for each label among the `count` highest logits, else 0."""
    best = np.argsort(-logits, 1, kind="stable")[:, :count]
    return (best == labels[:, None]).any(1).astype(float)


def l2_norm(x):
    return np.sqrt((x**2).sum())


class Network:
    """Loss function with gradients.

    A call returns ((mean loss, (losses, outputs)), gradients).
    """

    def __init__(self, losses):
        self._run = plain.weighted_value_and_grad(losses)

    def __call__(self, config, params, weight, *inputs):
        eps = np.float64(config.model.layer_norm_eps or 1e-6)
        return self._run(params, eps, weight, *inputs)


@cache
def autoencoder(kept):
    return Network(partial(plain.masked_loss, kept))


def _classifier_losses(p, images, keep_scale, targets):
    logits = plain.classifier_logits(p, images, keep_scale)
    return plain.cross_entropy(logits, targets), logits


classifier = cache(lambda: Network(_classifier_losses))


def network_and_inputs(trace, config, batch, train):
    """Return (network, inputs, labels) of a task's batch."""
    images, weight, labels, keys = batch
    keep = np.ones((len(keys), 2 * sum(trace.sizes)))
    keep = trace.keep_scales(keys, config) if train else keep
    if config.task == "mae":
        units = images.shape[1] * images.shape[2] // 256
        noise = [jax.random.uniform(plain.fold(k, "mask"), (units,)) for k in keys]
        order = np.argsort(np.array(noise), 1, kind="stable")
        network = autoencoder(int(units * (1 - config.mask_ratio)))
        pixels = np.bool_(config.model.norm_pix_loss is False)
        return network, (images, keep, order, pixels), labels
    classes = config.model.num_classes
    smooth = config.label_smoothing if train else 0.0
    targets = (1 - smooth) * np.eye(classes)[labels] + smooth / classes
    if train and config.random_erasing:
        pairs = zip(images, keys, strict=True)
        images = np.stack(
            [plain.erase(image, key, config.random_erasing) for image, key in pairs]
        )
    if train and (config.mixup or config.cutmix):
        key, rates = plain.fold(keys[0], "step"), (config.mixup, config.cutmix)
        images, targets = plain.mix(images, targets, weight, key, *rates)
    return classifier(), (images, keep, targets), labels


def adam_expectation(trace, config, steps, evaluated=True):
    """Return {kind: values over the steps} of all that a run stores and logs.

    Each step is computed from the stored state before the step. Parameters are computed
    from the stored moments, because Adam's direction of a tiny gradient is rounding.
    """
    o, found = config.optimizer, {}

    def expect(kind, value):
        found.setdefault(kind, []).append(value)

    for step in steps:
        before = trace.params(step)
        batch = trace.batch(step, config)
        weight = batch[1]
        network, inputs, labels = network_and_inputs(trace, config, batch, True)
        (loss, (_, outputs)), gradients = network(config, before, weight, *inputs)
        gradients, norm = plain.clip_by_global_norm(gradients, o.clip_norm)
        expect("loss", loss)
        expect("gradient_norm", norm)
        expect("unreadable", (weight == 0).sum())
        if config.task == "classify":
            for top in (1, 5):
                accuracy = (
                    topk_correct(outputs, labels, top) * weight
                ).sum() / weight.sum()
                expect(f"top{top}", accuracy)
        old = {kind: trace.moment(step, kind) for kind in ("mu", "nu")}
        stored = {kind: trace.moment(step + 1, kind) for kind in ("mu", "nu")}
        for index, kind in enumerate(("mu", "nu")):
            decay = o.betas[index]
            expect(
                kind,
                {
                    name: decay * old[kind][name] + (1 - decay) * g ** (index + 1)
                    for name, g in gradients.items()
                    if name in old[kind]
                },
            )
        rate, params = plain.learning_rate(step, config, IMAGES), {}
        for name, array in before.items():
            if name not in stored["mu"]:
                params[name] = array
                continue
            moments = stored["mu"][name], stored["nu"][name]
            move = plain.adam_direction(*moments, step + 1, o.betas)
            move = move + o.weight_decay * plain.is_decayed(name, config.task) * array
            move = move * plain.layer_scale(name, o.layer_decay, trace.sizes)
            params[name] = array - rate * move
        expect("params", params)
        if o.ema_decay and "ema" in trace.states[0]:
            average, new = trace.params(step, "ema"), trace.params(step + 1)
            decay = o.ema_decay
            average = {k: decay * a + (1 - decay) * new[k] for k, a in average.items()}
            expect("ema", average)
    found["learning_rate"] = [
        plain.learning_rate(step, config, IMAGES) for step in range(STEPS)
    ]
    if evaluated:
        params = trace.params(STEPS, "ema" if o.ema_decay else "params")
        batch = trace.eval_batch(config)
        network, inputs, labels = network_and_inputs(trace, config, batch, False)
        (loss, (_, outputs)), _ = network(config, params, batch[1], *inputs)
        found["eval/loss"] = [loss]
        if config.task == "classify":
            found |= eval_topk(outputs, labels, batch[1])
    return found


def eval_topk(logits, labels, weight):
    return {
        f"eval/top{top}": [topk_correct(logits, labels, top)[weight > 0].mean()]
        for top in (1, 5)
    }


@cache
def probe_network():
    """Return two functions: features of an encoder, and gradient of a head."""

    def features(p, eps, images, keep):
        return plain.encoder(p | {"eps": eps}, images, keep)[-1].mean(1)

    def loss(head, normalized, targets, weight):
        logits = plain.linear(head, "head", normalized)
        each = plain.cross_entropy(logits, targets)
        return (each * weight).sum() / weight.sum(), logits

    gradient = jax.value_and_grad(loss, has_aux=True)
    return plain.in_float64(features), plain.in_float64(gradient)


def probe_expectation(trace, config, steps, evaluated=True):
    """Return {kind: values over the steps} for LARS and BatchNorm of frozen features.

    Follows MAE's ``main_linprobe.py`` and ``util/lars.py``.
    """
    o, found = config.optimizer, {}
    encode, losses = probe_network()
    eps = np.float64(config.model.layer_norm_eps or 1e-6)
    classes, keep = config.model.num_classes, np.ones((BATCH, 2 * sum(trace.sizes)))

    def expect(kind, value):
        found.setdefault(kind, []).append(value)

    for step in steps:
        before = trace.params(step)
        images, weight, labels, _ = trace.batch(step, config)
        features = encode(before, eps, images, keep)
        seen = features[weight > 0]
        normalized = (features - seen.mean(0)) / np.sqrt(seen.var(0) + 1e-6)
        head = {k: v for k, v in before.items() if k.startswith("head/")}
        targets = np.eye(classes)[labels]
        (loss, logits), gradients = losses(head, normalized, targets, weight)
        expect("loss", loss)
        expect("unreadable", (weight == 0).sum())
        for top in (1, 5):
            accuracy = (topk_correct(logits, labels, top) * weight).sum() / weight.sum()
            expect(f"top{top}", accuracy)
        kernel = before["head/kernel"]
        g = gradients["head/kernel"] + o.weight_decay * kernel
        expect("gradient_norm", l2_norm(np.stack([*map(l2_norm, gradients.values())])))
        gradients["head/kernel"] = g * 0.001 * l2_norm(kernel) / l2_norm(g)
        old, stored = trace.moment(step, "trace"), trace.moment(step + 1, "trace")
        moves = {name: o.betas[0] * old[name] + g for name, g in gradients.items()}
        expect("trace", moves)
        rate = plain.learning_rate(step, config, IMAGES)
        moved = {name: before[name] - rate * stored[name] for name in moves}
        frozen = {k: v for k, v in before.items() if k.startswith("encoder/")}
        expect("params", moved | frozen)
        new = {"fc_norm/mean": seen.mean(0), "fc_norm/var": seen.var(0, ddof=1)}
        expect("statistics", {k: 0.9 * before[k] + 0.1 * v for k, v in new.items()})
    found["learning_rate"] = [
        plain.learning_rate(step, config, IMAGES) for step in range(STEPS)
    ]
    if evaluated:
        params = trace.params(STEPS)
        images, weight, labels, _ = trace.eval_batch(config)
        features = encode(params, eps, images, keep) - params["fc_norm/mean"]
        normalized = features / np.sqrt(params["fc_norm/var"] + 1e-6)
        head = {k: v for k, v in params.items() if k.startswith("head/")}
        targets = np.eye(classes)[labels]
        (loss, logits), _ = losses(head, normalized, targets, weight)
        found["eval/loss"] = [loss]
        found |= eval_topk(logits, labels, weight)
    return found


EXPECTATIONS = {
    "mae": adam_expectation,
    "classify": adam_expectation,
    "linear_probe": probe_expectation,
}


def observed(trace, kind, step):
    """Return the stored or logged value of a step, counted from 0."""
    if kind in ("params", "ema", "statistics"):
        if kind == "ema" and "ema" not in trace.states[step]:
            return {}
        return trace.params(step + 1, "ema" if kind == "ema" else "params")
    if kind in ("mu", "nu", "trace"):
        return trace.moment(step + 1, kind)
    if kind.startswith("eval/"):
        return trace.line(STEPS, "eval/loss")[kind]
    return trace.line(step + 1)[kind]


def mismatches(trace, config, steps=range(STEPS), evaluated=True):
    """Return {kind: first difference} of the values that differ."""
    found = {}
    expectation = EXPECTATIONS[config.task](trace, config, steps, evaluated)
    for kind, values in expectation.items():
        each = range(STEPS) if kind == "learning_rate" else steps
        each = [STEPS - 1] if kind.startswith("eval/") else each
        for step, value in zip(each, values, strict=True):
            if difference := _difference(
                trace, kind, observed(trace, kind, step), value, step
            ):
                found[kind] = f"step {step}: {difference}"
    if "ema" in trace.states[0] and "ema" not in expectation:
        found["ema"] = "none expected"
    return found


def _difference(trace, kind, actual, expected, step):
    """Return the first difference beyond the tolerance of a kind as text, or ""."""
    line, tolerance = trace.line(step + 1), trace.tolerance
    rate = line["learning_rate"]
    norm = line["gradient_norm"]
    if not isinstance(expected, dict):
        allowed = {
            "loss": tolerance,
            "gradient_norm": 10 * tolerance,
            "eval/loss": 3e-5,
        }.get(kind, 1e-6)
        close = abs(actual - expected) <= allowed * abs(expected)
        return "" if close else f"{actual} is not {expected}"
    # Errors are relative to an array's largest value, plus an absolute floor, because
    # the rounding of a gradient is relative to the network's largest gradient, and
    # Adam's bias correction is float32.
    relative, floor = {
        "mu": (300 * tolerance, 1e-6 * tolerance * norm),
        "nu": (600 * tolerance, 1e-6 * tolerance * norm**2),
        "trace": (300 * tolerance, 0.0),
        "params": (3e-7, 1e-4 * rate),
        "ema": (1e-6, 0.0),
        "statistics": (2e-4, 1e-5),
    }[kind]
    for name, array in expected.items():
        if name not in actual:
            return f"no {name}"
        scale, error = np.abs(array).max(), np.abs(actual[name] - array).max()
        if error > relative * scale + floor:
            return f"{name} is {error} off, of {scale}"
    return ""
