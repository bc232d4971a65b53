"""Tests of nearest neighbors; numpy recounts the votes of all readable images."""

import itertools

import mini_runs
import numpy as np
import pytest
from networks import jit_model, mini
from PIL import Image

import hivit_jax
from hivit_jax import progress
from hivit_jax.distributed.watchdog import Watchdog
from hivit_jax.main import main

SIZE, CLASSES, BATCH = (32, 48), 9, 8
SPLIT_SIZES = {"train": 43, "val": 29}  # not multiples of the batch size
DAMAGED = {"train": (1, 20), "val": (7,)}  # indices of the unreadable images
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return (root, {split: (pixels, labels)}): one pattern per class, plus noise.

    The first pattern is nearly black, as are padding and unreadable images.
    """
    root, random = tmp_path_factory.mktemp("files"), np.random.RandomState(49)
    patterns = random.uniform(0, 1, (CLASSES, 4, 6, 3))
    patterns[0] *= 0.03
    patterns[1] *= 0.1
    splits = {}
    for split, count in SPLIT_SIZES.items():
        labels = np.sort(np.arange(count) % CLASSES)
        images = patterns[labels].repeat(8, 1).repeat(8, 2)
        images = images * random.uniform(0.3, 1.7, (count, 1, 1, 1))
        images = images + random.normal(0, 0.3, images.shape)
        pixels = np.rint(images * 255).clip(0, 255).astype(np.uint8)
        for index, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            path = root / split / str(label) / f"{index:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
            if index in DAMAGED[split]:
                path.write_bytes(b"damaged")
        splits[split] = pixels, labels
    return root, splits


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return (small network, directory that contains it)."""
    directory = tmp_path_factory.mktemp("model")
    model = mini(image_size=SIZE, depths=(1, 1, 1), num_classes=CLASSES)
    hivit_jax.save_pretrained(model, directory)
    return model, directory


def features_of(model, pixels):
    """Return the features of images, scaled to unit length."""
    images = (pixels / 255 - MEAN) / STD
    run = jit_model(model, lambda model, images: model.encoder(images)[-1])
    features = np.float64(run(images.astype(np.float32))).mean(1)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def count_correct(queries, query_labels, keys, key_labels, check=True):
    """Count correct top-1 and top-5 predictions by the votes of 20 neighbors.

    Args:
      check: assert that no two compared values are close.
    """
    neighbors, temperature = 20, 0.07
    cosine = queries @ keys.T
    order = (-cosine).argsort(1)
    ranked = np.take_along_axis(cosine, order, 1)
    gaps, correct = [ranked[:, neighbors - 1] - ranked[:, neighbors]], [0, 0]
    rows = zip(cosine, order[:, :neighbors], query_labels, strict=True)
    for row, near, label in rows:
        votes = np.zeros(CLASSES)
        np.add.at(votes, key_labels[near], np.exp((row[near] - 1) / temperature))
        others = np.delete(votes, label)
        gaps.append(np.abs(others - votes[label])[others + votes[label] > 0])
        # Of classes with equal votes, the class with the lower index ranks first.
        rank = (others > votes[label]).sum() + (votes[:label] == votes[label]).sum()
        correct = [correct[0] + (rank < 1), correct[1] + (rank < 5)]
    assert not check or min(gap.min(initial=1) for gap in gaps) > 1e-4
    return [int(count) for count in correct]


def readable_images(files, split):
    """Return pixels and labels of the readable images of a split."""
    is_readable = ~np.isin(np.arange(SPLIT_SIZES[split]), DAMAGED[split])
    return [array[is_readable] for array in files[1][split]]


def flags_of(root, directory, **more):
    """Return the command line of a nearest-neighbor evaluation."""
    values = dict(
        batch_size=BATCH,
        init_from=directory,
        model__num_classes=CLASSES,
        model__image_size=SIZE,
        model__patch_size=16,
        model__in_channels=3,
        model__depths=(1, 1, 1),
        data__name="folder",
        data__dir=root,
        data__train_examples=0,
        data__canvas=64,
        data__crop_scale=(0.2, 0.5),
        data__flip=True,
        data__mean=MEAN,
        data__std=STD,
        label_smoothing=0.1,
        random_erasing=1.0,
        **more,
    )
    recipe = mini_runs.ROOT / "configs" / "digits_finetune.py"
    flags = [f"--config.{k.replace('__', '.')}={v}" for k, v in values.items()]
    return [f"--config={recipe}", *flags]


@pytest.mark.slow
def test_nearest_neighbors_equal_numpy(model, files, monkeypatch, tmp_path, capsys):
    """Unreadable images and padding neither vote nor count."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    train_images, train_labels = readable_images(files, "train")
    test_images, test_labels = readable_images(files, "val")
    net, directory = model
    padding = [np.zeros((*SIZE, 3))]
    pixels = np.concatenate([train_images, test_images, padding])
    features = features_of(net, pixels)
    keys, queries, black = np.split(features, [len(train_images), len(features) - 1])

    beats = []
    monkeypatch.setattr(Watchdog, "heartbeat", lambda watchdog: beats.append(watchdog))
    monkeypatch.setattr(progress, "monotonic", itertools.count(0, 10).__next__)
    with mini_runs.minimal_output():
        flags = flags_of(files[0], directory, data__max_unreadable=0.05)
        assert main([*flags, "--mode=knn"]) == 0
    assert len(beats) == 6 + 4  # batches of 8 images of the two splits
    top1, top5 = count_correct(queries, test_labels, keys, train_labels)
    out = capsys.readouterr().out
    for split, count in zip(("train", "test"), SPLIT_SIZES.values(), strict=True):
        line = f"features of the {split} split  {count}/{count} images  0:00 left\n"
        assert line in out
    assert out.endswith(
        f"nearest neighbors  top1 {top1 / 28:.2%}  top5 {top5 / 28:.2%}  (28 images)\n"
    )
    # Votes of the two damaged images, of the five padding images, or of both would
    # change the result.
    for count in (2, 5, 7):
        more_keys = np.concatenate([keys, *[black] * count])
        more_labels = np.concatenate([train_labels, [0] * count])
        changed = count_correct(
            queries, test_labels, more_keys, more_labels, check=False
        )
        assert changed != [top1, top5]


@pytest.mark.slow
def test_too_many_unreadable_images_give_exit_code_4(
    model, files, monkeypatch, tmp_path, capsys
):
    """Two unreadable images of 43 exceed the limit of 4 %."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flags = flags_of(files[0], model[1], data__max_unreadable=0.04)
    with mini_runs.minimal_output():
        assert main([*flags, "--mode=knn"]) == 4
    error = capsys.readouterr().err
    assert "2 images of folder could not be read, 4.65%" in error
