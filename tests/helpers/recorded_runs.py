"""Runs that save every state, and their comparison with `oracle.py`."""

import hashlib
import json
from functools import cache, partial

import jax
import mini_runs
import numpy as np
import oracle
import pytest
from PIL import Image

from hivit_jax import config as configs
from hivit_jax.errors import Interrupted
from hivit_jax.train import train

CLASSES = ("ape", "bee", "cat", "dog", "eel", "fly", "gnu")
BROKEN = {"train": 9, "val": 4}  # split -> index of an image that cannot be read
NUM_IMAGES, BATCH, STEPS = 22, 16, 3  # NUM_IMAGES: of the training split
COMMON = {
    "seed": 5,
    "batch_size": BATCH,
    "total_steps": STEPS,
    "log_every": 1,
    "checkpoint_every": 1,
    "eval_every": 2,
    "keep_checkpoints": 9,
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
# Overrides of classifiers with and without augmentation, and of a linear probe
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
# Name -> recipe, overrides, relative tolerance of a loss. The tolerance is larger if
# the device resizes images, because rounding changes about one in a thousand pixels.
RECORDED_RUNS = {
    "mae": ("mae_base", OPTIMIZER | AUTOENCODER, 5e-6),
    "classify": ("finetune:base", OPTIMIZER | CLASSIFIER | AUGMENTED, 2e-6),
    "classify, plain": ("supervised:base", CLASSIFIER | PLAIN, 3e-5),
    "linear_probe": ("linear:base", CLASSIFIER | PROBE, 3e-5),
}


def write_folder(root):
    """Write 22 training and 11 validation images of many sizes into class folders.

    Some files are in subfolders, some are PNG. One file per split cannot be read.
    """
    random = np.random.RandomState(3)
    for split, count in (("train", NUM_IMAGES), ("val", 11)):
        for index in range(count):
            name = CLASSES[index % 7]
            size = (70 + 9 * (index % 7), 130 - 3 * index)
            small = random.randint(0, 256, (9, 7, 3), np.uint8)
            image = Image.fromarray(small).resize(size, Image.Resampling.BILINEAR)
            suffix, folder = ("png", "deep/") if index % 5 == 1 else ("jpg", "")
            path = root / split / name / f"{folder}{index:02}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
        list_files(root, split)[BROKEN[split]][0].write_bytes(b"no image")


def list_files(root, split):
    """Return [(path, label)], sorted by class and file."""
    return [
        (path, label)
        for label, name in enumerate(CLASSES)
        for path in sorted(p for p in (root / split / name).rglob("*") if p.is_file())
    ]


def run_flags(name, **more):
    """Return the command line of a recorded run.

    more: config values; two underscores stand for a dot.
    """
    recipe, overrides, _ = RECORDED_RUNS[name]
    more = {key.replace("__", "."): value for key, value in more.items()}
    values = COMMON | overrides | more
    return [f"--config={recipe}"] + [f"--config.{k}={v}" for k, v in values.items()]


def run_config(name, **more):
    """Return the config of a recorded run.

    more: see `run_flags`.
    """
    path, *overrides = run_flags(name, **more)
    return configs.load(path.removeprefix("--config="), overrides)


class RecordedRun:
    """Run of a recipe that saves every state, including the initial state."""

    def __init__(self, name, root, workdir, **more):
        self.name, self.root, self.workdir = name, root, workdir
        self._batches = {}
        self.tolerance = RECORDED_RUNS[name][2]
        self.config = run_config(name, data__dir=root, **more)
        with pytest.raises(Interrupted):
            train(self.config, workdir, lambda step: "stop" if step == 0 else None)
        self.results = train(self.config, workdir)
        self.states = [
            mini_runs.saved_arrays(workdir, step) for step in range(STEPS + 1)
        ]
        text = (workdir / "metrics.jsonl").read_text().splitlines()
        self.lines = [json.loads(line) for line in text]
        params = self.states[0]["params"]
        self.blocks_per_stage = [
            oracle.count_blocks(params, stage) for stage in range(3)
        ]

    def params(self, step, item="params"):
        """Return parameters (item="ema": averaged) and model state, by name."""
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
        """Return the line of metrics.jsonl that contains a key at a step."""
        return next(x for x in self.lines if x["step"] == step and key in x)

    def batch(self, step, config):
        """Return (images, weight, labels, keys) of a training step after the flip.

        The batch is cached, because most configs differ in other keys.
        """
        image_size = config.model.image_size
        key = step, config.seed, config.batch_size, image_size, config.data.to_json()
        if key not in self._batches:
            self._batches[key] = self._read_batch(step, config)
        return self._batches[key]

    def _read_batch(self, step, config):
        files, images, labels = list_files(self.root, "train"), [], []
        size, seed = config.batch_size, config.seed
        for index, epoch in oracle.samples_of_step(seed, step, size, len(files)):
            path, label = files[index]
            draws = oracle.uniforms(seed, int(epoch), int(index), 30)
            images.append(oracle.prepare_image(path.read_bytes(), config, draws))
            labels.append(label if images[-1] is not None else 0)
        keys = oracle.keys_per_sample(seed, "train", step * size, size)
        images, weight = oracle.make_batch(images, config)
        images = oracle.flip(images, keys) if config.data.flip else images
        return images, weight, np.array(labels), keys

    def eval_batch(self, config):
        """Return (images, weight, labels, keys) of the held-out images, padded."""
        files = list_files(self.root, "val")
        images = [oracle.prepare_image(p.read_bytes(), config) for p, _ in files]
        padding = BATCH - len(files)
        images, weight = oracle.make_batch(images + [None] * padding, config)
        labels = np.array([label for _, label in files] + [0] * padding)
        keys = oracle.keys_per_sample(config.seed, "eval", 0, BATCH)
        return images, weight, labels, keys

    def drop_path_scales(self, keys, config):
        """Return the drop-path factors [B, branches] of a training step."""
        largest = config.model.get("drop_path_rate") or 0
        rates = np.linspace(0, largest, sum(self.blocks_per_stage))
        return oracle.drop_path_scales(keys, rates)


def topk_correct(logits, labels, count):
    """Return 1 for each label among the `count` highest logits, else 0."""
    highest = np.argsort(-logits, 1, kind="stable")[:, :count]
    return (highest == labels[:, None]).any(1).astype(float)


def l2_norm(x):
    """Return the Euclidean norm."""
    return np.sqrt((x**2).sum())


class LossAndGrad:
    """Weighted mean loss of a network, with gradients.

    A call returns ((mean loss, (losses [B], outputs)), gradients). Results are cached,
    because the keys of an optimizer do not change them.
    """

    def __init__(self, losses_of):
        self._run, self._results = oracle.weighted_value_and_grad(losses_of), {}

    def __call__(self, config, params, weight, *inputs):
        eps = np.float64(config.model.layer_norm_eps or 1e-6)
        arguments = params, eps, weight, *inputs
        leaves = jax.tree.leaves(arguments)
        key = hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in leaves)).digest()
        if key not in self._results:
            self._results[key] = self._run(*arguments)
        return self._results[key]


@cache
def autoencoder_loss(num_visible):
    """Return the `LossAndGrad` of a masked autoencoder."""
    return LossAndGrad(partial(oracle.masked_loss, num_visible))


def _classifier_losses(p, images, drop_path_scale, targets):
    """Return (losses [B], logits)."""
    logits = oracle.classifier_logits(p, images, drop_path_scale)
    return oracle.cross_entropy(logits, targets), logits


@cache
def classifier_loss():
    """Return the `LossAndGrad` of a classifier."""
    return LossAndGrad(_classifier_losses)


def loss_and_inputs(run, config, batch, is_training):
    """Return (`LossAndGrad`, inputs of its call, labels) for a batch."""
    images, weight, labels, keys = batch
    drop_path_scale = np.ones((len(keys), 2 * sum(run.blocks_per_stage)))
    if is_training:
        drop_path_scale = run.drop_path_scales(keys, config)
    if config.task == "mae":
        units = images.shape[1] * images.shape[2] // 256
        noise = [jax.random.uniform(oracle.fold(k, "mask"), (units,)) for k in keys]
        order = np.argsort(np.array(noise), 1, kind="stable")
        loss_and_grad = autoencoder_loss(int(units * (1 - config.mask_ratio)))
        use_raw_pixel_targets = np.bool_(config.model.norm_pix_loss is False)
        inputs = images, drop_path_scale, order, use_raw_pixel_targets
        return loss_and_grad, inputs, labels
    classes = config.model.num_classes
    smoothing = config.label_smoothing if is_training else 0.0
    targets = (1 - smoothing) * np.eye(classes)[labels] + smoothing / classes
    if is_training and config.random_erasing:
        pairs = zip(images, keys, strict=True)
        images = np.stack(
            [oracle.erase(image, key, config.random_erasing) for image, key in pairs]
        )
    if is_training and (config.mixup or config.cutmix):
        key, mix_alphas = oracle.fold(keys[0], "step"), (config.mixup, config.cutmix)
        images, targets = oracle.mix(images, targets, weight, key, *mix_alphas)
    return classifier_loss(), (images, drop_path_scale, targets), labels


def expected_with_adam(run, config, steps, evaluated=True):
    """Return {kind: values of all steps} that a run with Adam must save and log.

    Each step is computed from the saved state before the step. Parameters are computed
    from the saved moments, because rounding determines Adam's direction if a gradient
    is tiny.
    """
    o, expected = config.optimizer, {}

    def expect(kind, value):
        expected.setdefault(kind, []).append(value)

    for step in steps:
        before = run.params(step)
        batch = run.batch(step, config)
        weight = batch[1]
        loss_and_grad, inputs, labels = loss_and_inputs(run, config, batch, True)
        (loss, (_, outputs)), gradients = loss_and_grad(config, before, weight, *inputs)
        gradients, norm = oracle.clip_by_global_norm(gradients, o.clip_norm)
        expect("loss", loss)
        expect("gradient_norm", norm)
        expect("unreadable", (weight == 0).sum())
        if config.task == "classify":
            for top in (1, 5):
                accuracy = (
                    topk_correct(outputs, labels, top) * weight
                ).sum() / weight.sum()
                expect(f"top{top}", accuracy)
        old = {kind: run.moment(step, kind) for kind in ("mu", "nu")}
        saved = {kind: run.moment(step + 1, kind) for kind in ("mu", "nu")}
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
        learning_rate, params = oracle.learning_rate(step, config, NUM_IMAGES), {}
        for name, array in before.items():
            if name not in saved["mu"]:
                params[name] = array
                continue
            moments = saved["mu"][name], saved["nu"][name]
            update = oracle.adam_direction(*moments, step + 1, o.betas)
            update += o.weight_decay * oracle.is_decayed(name, config.task) * array
            update *= oracle.layer_decay_factor(
                name, o.layer_decay, run.blocks_per_stage
            )
            params[name] = array - learning_rate * update
        expect("params", params)
        if o.ema_decay and "ema" in run.states[0]:
            average, params = run.params(step, "ema"), run.params(step + 1)
            decay = o.ema_decay
            expect(
                "ema",
                {k: decay * a + (1 - decay) * params[k] for k, a in average.items()},
            )
    expected["learning_rate"] = [
        oracle.learning_rate(step, config, NUM_IMAGES) for step in range(STEPS)
    ]
    if evaluated:
        params = run.params(STEPS, "ema" if o.ema_decay else "params")
        batch = run.eval_batch(config)
        loss_and_grad, inputs, labels = loss_and_inputs(run, config, batch, False)
        (loss, (_, outputs)), _ = loss_and_grad(config, params, batch[1], *inputs)
        expected["eval/loss"] = [loss]
        if config.task == "classify":
            expected |= eval_topk(outputs, labels, batch[1])
    return expected


def eval_topk(logits, labels, weight):
    """Return {metric: [accuracy]} of an evaluation."""
    return {
        f"eval/top{top}": [topk_correct(logits, labels, top)[weight > 0].mean()]
        for top in (1, 5)
    }


@cache
def probe_functions():
    """Return two functions: encoder features, and loss and gradients of the head.

    The second function returns ((mean loss, logits), gradients).
    """

    def features(p, eps, images, drop_path_scale):
        return oracle.encoder(p | {"eps": eps}, images, drop_path_scale)[-1].mean(1)

    def loss(head, normalized, targets, weight):
        logits = oracle.linear(head, "head", normalized)
        losses = oracle.cross_entropy(logits, targets)
        return (losses * weight).sum() / weight.sum(), logits

    loss_and_grad = jax.value_and_grad(loss, has_aux=True)
    return oracle.in_float64(features), oracle.in_float64(loss_and_grad)


def expected_with_lars(run, config, steps, evaluated=True):
    """Return {kind: values of all steps} that a linear probe must save and log.

    The update follows MAE's ``main_linprobe.py`` and ``util/lars.py``.
    """
    o, expected = config.optimizer, {}
    encode, loss_and_grad = probe_functions()
    eps = np.float64(config.model.layer_norm_eps or 1e-6)
    classes = config.model.num_classes
    no_drop_path = np.ones((BATCH, 2 * sum(run.blocks_per_stage)))

    def expect(kind, value):
        expected.setdefault(kind, []).append(value)

    for step in steps:
        before = run.params(step)
        images, weight, labels, _ = run.batch(step, config)
        features = encode(before, eps, images, no_drop_path)
        readable = features[weight > 0]
        normalized = (features - readable.mean(0)) / np.sqrt(readable.var(0) + 1e-6)
        head = {k: v for k, v in before.items() if k.startswith("head/")}
        targets = np.eye(classes)[labels]
        (loss, logits), gradients = loss_and_grad(head, normalized, targets, weight)
        expect("loss", loss)
        expect("unreadable", (weight == 0).sum())
        for top in (1, 5):
            accuracy = (topk_correct(logits, labels, top) * weight).sum() / weight.sum()
            expect(f"top{top}", accuracy)
        kernel = before["head/kernel"]
        g = gradients["head/kernel"] + o.weight_decay * kernel
        expect("gradient_norm", l2_norm(np.stack([*map(l2_norm, gradients.values())])))
        gradients["head/kernel"] = g * 0.001 * l2_norm(kernel) / l2_norm(g)
        old, saved = run.moment(step, "trace"), run.moment(step + 1, "trace")
        momentum = {name: o.betas[0] * old[name] + g for name, g in gradients.items()}
        expect("trace", momentum)
        learning_rate = oracle.learning_rate(step, config, NUM_IMAGES)
        trained = {
            name: before[name] - learning_rate * saved[name] for name in momentum
        }
        frozen = {k: v for k, v in before.items() if k.startswith("encoder/")}
        expect("params", trained | frozen)
        mean, variance = readable.mean(0), readable.var(0, ddof=1)
        batch_statistics = {"fc_norm/mean": mean, "fc_norm/var": variance}
        expect(
            "statistics",
            {k: 0.9 * before[k] + 0.1 * v for k, v in batch_statistics.items()},
        )
    expected["learning_rate"] = [
        oracle.learning_rate(step, config, NUM_IMAGES) for step in range(STEPS)
    ]
    if evaluated:
        params = run.params(STEPS)
        images, weight, labels, _ = run.eval_batch(config)
        features = encode(params, eps, images, no_drop_path)
        centered = features - params["fc_norm/mean"]
        normalized = centered / np.sqrt(params["fc_norm/var"] + 1e-6)
        head = {k: v for k, v in params.items() if k.startswith("head/")}
        targets = np.eye(classes)[labels]
        (loss, logits), _ = loss_and_grad(head, normalized, targets, weight)
        expected["eval/loss"] = [loss]
        expected |= eval_topk(logits, labels, weight)
    return expected


COMPUTE_EXPECTED = {
    "mae": expected_with_adam,
    "classify": expected_with_adam,
    "linear_probe": expected_with_lars,
}


def recorded_value(run, kind, step):
    """Return the saved or logged value of a step; steps count from 0."""
    if kind in ("params", "ema", "statistics"):
        if kind == "ema" and "ema" not in run.states[step]:
            return {}
        return run.params(step + 1, "ema" if kind == "ema" else "params")
    if kind in ("mu", "nu", "trace"):
        return run.moment(step + 1, kind)
    if kind.startswith("eval/"):
        return run.line(STEPS, "eval/loss")[kind]
    return run.line(step + 1)[kind]


def mismatches(run, config, steps=range(STEPS), evaluated=True):
    """Return {kind: difference} for recorded values that differ from the expected ones.

    config: config of the oracle, which may differ from the config of the run.
    """
    differences = {}
    expected = COMPUTE_EXPECTED[config.task](run, config, steps, evaluated)
    for kind, values in expected.items():
        steps_of_kind = range(STEPS) if kind == "learning_rate" else steps
        if kind.startswith("eval/"):
            steps_of_kind = [STEPS - 1]
        for step, value in zip(steps_of_kind, values, strict=True):
            recorded = recorded_value(run, kind, step)
            if difference := _difference(run, kind, recorded, value, step):
                differences[kind] = f"step {step}: {difference}"
    if "ema" in run.states[0] and "ema" not in expected:
        differences["ema"] = "expected none"
    return differences


def _difference(run, kind, actual, expected, step):
    """Describe a difference beyond the tolerance of a kind; "" if there is none."""
    line, tolerance = run.line(step + 1), run.tolerance
    learning_rate, norm = line["learning_rate"], line["gradient_norm"]
    if not isinstance(expected, dict):
        allowed = {
            "loss": tolerance,
            "gradient_norm": 10 * tolerance,
            "eval/loss": 3e-5,
        }.get(kind, 1e-6)
        close = abs(actual - expected) <= allowed * abs(expected)
        return "" if close else f"expected {expected}, found {actual}"
    # The limit is relative to an array's largest value, plus an absolute floor, because
    # rounding errors of gradients scale with the network's largest gradient, and Adam's
    # bias correction is float32.
    relative, floor = {
        "mu": (300 * tolerance, 1e-6 * tolerance * norm),
        "nu": (600 * tolerance, 1e-6 * tolerance * norm**2),
        "trace": (300 * tolerance, 0.0),
        "params": (3e-7, 1e-4 * learning_rate),
        "ema": (1e-6, 0.0),
        "statistics": (2e-4, 1e-5),
    }[kind]
    for name, array in expected.items():
        if name not in actual:
            return f"{name} is missing"
        scale, error = np.abs(array).max(), np.abs(actual[name] - array).max()
        if error > relative * scale + floor:
            return f"{name}: largest error {error}, largest value {scale}"
    return ""
