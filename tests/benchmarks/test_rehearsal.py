"""Tests of the images and models of `benchmarks.rehearsal`."""

import numpy as np
import pytest
from PIL import Image

from benchmarks import rehearsal, small_data


def gray_values(root):
    """Return the gray value of each PNG file below a directory."""
    return [int(np.asarray(Image.open(path))[0, 0]) for path in root.rglob("*.png")]


def test_pretraining_uses_every_image_that_is_not_tested(tmp_path):
    """Each image has its own gray value."""
    images = {"a": np.arange(90, dtype=np.uint8)[:, None, None] * np.ones((1, 2, 2))}
    images = {name: pixels.astype(np.uint8) for name, pixels in images.items()}
    for draw in range(2):
        root = tmp_path / str(draw)
        small_data.write(root, images, draw)
        small_data.write_png(root / "all", rehearsal.pretraining_images(images, draw))
        train, tested = gray_values(root / "train"), gray_values(root / "val")
        assert (len(train), len(tested)) == (small_data.TRAIN, small_data.TEST)
        assert sorted(gray_values(root / "all") + tested) == list(range(90))
        assert set(train) < set(gray_values(root / "all"))
    assert gray_values(tmp_path / "0" / "val") != gray_values(tmp_path / "1" / "val")


@pytest.mark.slow
def test_classifiers_of_all_methods_cost_about_the_same():
    """The multiply-adds of the largest exceed those of the smallest by under 10 %."""
    rows = [line.split() for line in rehearsal.costs().splitlines()[1:]]
    macs = [int(row[-2].replace(",", "")) for row in rows]
    assert len(macs) == len(rehearsal.METHODS) == 3
    assert max(macs) < 1.1 * min(macs)
