"""Tests of RandAugment: equality with timm, and distribution of the policy."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image
from reference import golden

from benchmarks.photographs import photographs
from hivit_jax.data import randaugment
from hivit_jax.data.randaugment import DRAWS, FILL, OPERATIONS

GOLDEN = golden("randaugment")
ALMOST_ONE = 1 - 2.0**-53  # the largest draw below 1
# Values of an operation's second draw that apply or omit it, at probability 0.5
APPLIED, OMITTED = 0.0, 0.5


def draws(count, seed=0):
    """Return lists of uniform draws, one list per image.

    An operation uses four draws: choice, application, magnitude, sign.
    """
    return np.random.RandomState(seed).random_sample((count, DRAWS)).tolist()


def draw_for(name):
    """Return a draw that selects this operation."""
    return (list(OPERATIONS).index(name) + 0.5) / len(OPERATIONS)


def test_golden_operation_names_equal_ours():
    assert GOLDEN["names"].tolist() == list(OPERATIONS)
    assert len(OPERATIONS) == 15


@pytest.mark.parametrize("crop", ["wide", "tall"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_equal_timm(name, crop):
    image = Image.fromarray(GOLDEN[crop])
    results = GOLDEN[f"{crop}_results"][list(OPERATIONS).index(name)]
    for magnitude, both in zip(GOLDEN["magnitudes"].tolist(), results, strict=True):
        for sign, expected in zip(GOLDEN["signs"].tolist(), both, strict=True):
            actual = np.asarray(randaugment.apply(name, image, magnitude, sign))
            assert actual.dtype == np.uint8
            # Pillow releases may round differently.
            assert np.abs(actual - expected.astype(float)).mean() <= 1 / 255


def test_golden_operations_that_ignore_the_sign():
    """In timm's results, six operations ignore the sign."""
    results = GOLDEN["wide_results"]
    unsigned = [
        name
        for name, result in zip(OPERATIONS, results, strict=True)
        if (result[:, 0] == result[:, 1]).all()
    ]
    assert unsigned == [
        "AutoContrast",
        "Equalize",
        "Invert",
        "PosterizeIncreasing",
        "SolarizeIncreasing",
        "SolarizeAdd",
    ]


@pytest.mark.parametrize(
    "name", ["Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"]
)
@pytest.mark.parametrize("sign", [1, -1])
def test_geometric_operations_fill_with_the_mean_color(name, sign):
    white = Image.new("RGB", (40, 30), (255, 255, 255))
    result = np.asarray(randaugment.apply(name, white, 10, sign))
    colors = {tuple(color) for color in result.reshape(-1, 3).tolist()}
    assert FILL in colors
    assert (255, 255, 255) in colors
    filled_fraction = (result == FILL).all(-1).mean()
    if name.startswith("Translate"):
        assert filled_fraction == pytest.approx(0.45, abs=0.03)


def test_largest_magnitude_posterizes_to_black_and_inverts():
    """At magnitude 10, posterizing returns black and solarizing inverts every value."""
    image = Image.fromarray(GOLDEN["wide"])
    black = randaugment.apply("PosterizeIncreasing", image, 10, 1)
    assert not np.asarray(black).any()
    inverted = randaugment.apply("SolarizeIncreasing", image, 10, 1)
    assert_array_equal(inverted, 255 - GOLDEN["wide"])


@pytest.mark.slow
def test_operations_have_the_documented_distribution():
    """Operations are equally frequent and applied with probability 1/2."""
    count = 20_000
    chosen = [randaugment.choose(sample) for sample in draws(count)]
    lengths = np.array([len(operations) for operations in chosen])
    for length, expected in enumerate((0.25, 0.5, 0.25)):
        assert (lengths == length).mean() == pytest.approx(expected, abs=0.015)
    names, magnitudes, signs = zip(*sum(chosen, []), strict=True)
    for name in OPERATIONS:
        assert names.count(name) / len(names) == pytest.approx(1 / 15, abs=0.008)
    pairs = [pair for pair in chosen if len(pair) == 2]
    same_operation = [first[0] == second[0] for first, second in pairs]
    # Operations are drawn with replacement.
    assert np.mean(same_operation) == pytest.approx(1 / 15, abs=0.015)
    assert set(signs) == {1, -1}
    assert np.mean(signs) == pytest.approx(0, abs=0.03)
    # Magnitudes are clipped at 10, two standard deviations above 9.
    assert max(magnitudes) == 10
    assert min(magnitudes) > 6
    magnitudes = np.array(magnitudes)
    assert (magnitudes == 10).mean() == pytest.approx(0.0228, abs=0.005)
    assert np.median(magnitudes) == pytest.approx(9, abs=0.02)
    below = magnitudes[magnitudes < 9] - 9  # this half is not clipped
    assert np.sqrt((below**2).mean()) == pytest.approx(0.5, abs=0.015)
    operation_indices = np.unique(names, return_inverse=True)[1]
    correlations = np.corrcoef([operation_indices, magnitudes, signs])
    assert np.abs(correlations - np.eye(3)).max() < 0.03


def test_policy_parameters_set_probability_magnitude_and_num_ops():
    samples = draws(200)
    for sample in samples:
        a, b = randaugment.choose(sample, mean_magnitude=5, std=0, probability=1)
        assert a[1] == b[1] == 5
        assert randaugment.choose(sample, probability=0) == []
        assert randaugment.choose(sample, num_ops=1) == (
            randaugment.choose([*sample[:4], *[OMITTED] * 4])
        )
    four = randaugment.choose(sum(samples[:2], []), num_ops=4, probability=1)
    pairs = [randaugment.choose(sample, probability=1) for sample in samples[:2]]
    assert four == sum(pairs, [])
    for magnitude, std in ((0, 1), (10, 1), (5, 100)):
        magnitudes = [
            operation[1]
            for sample in samples
            for operation in randaugment.choose(sample, magnitude, std)
        ]
        assert min(magnitudes) >= 0
        assert max(magnitudes) <= 10
        assert {0.0, 10.0} & set(magnitudes)


def test_operations_are_chained():
    """Operations are applied one after another; draws can omit each of them."""
    pixels = photographs()["coffee"][:100, :120]
    sample = [draw_for("Rotate"), APPLIED, 0.5, 0.0]
    sample += [draw_for("SolarizeAdd"), APPLIED, 0.5, 0.0]
    turned = randaugment.apply("Rotate", Image.fromarray(pixels), 9.0, -1)
    expected = randaugment.apply("SolarizeAdd", turned, 9.0, -1)
    actual = randaugment.randaugment(pixels, sample)
    assert_array_equal(actual, expected)
    assert actual.dtype == np.uint8
    sample[5] = OMITTED
    assert_array_equal(randaugment.randaugment(pixels, sample), turned)
    sample[1] = OMITTED
    assert_array_equal(randaugment.randaugment(pixels, sample), pixels)


def test_threads_do_not_change_results():
    """Results are equal in any thread, and the input images stay unchanged."""
    samples = draws(80)
    images = [photo[:112, :112] for photo in photographs().values()]
    before = [image.copy() for image in images]

    def run(i):
        return randaugment.randaugment(images[i % len(images)], samples[i]).tobytes()

    sequential = [run(i) for i in range(len(samples))]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(run, range(len(samples)))) == sequential
    for image, copy in zip(images, before, strict=True):
        assert_array_equal(image, copy)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (9, 2), (30, 50), (333, 224)])
def test_operations_keep_the_size_of_any_image(shape):
    pixels = np.random.RandomState(0).randint(0, 256, (*shape, 3)).astype(np.uint8)
    for name in OPERATIONS:
        sample = [draw_for(name), APPLIED, 0.9, 0.9] * 2
        result = randaugment.randaugment(pixels, sample)
        assert result.shape == pixels.shape
        assert result.dtype == np.uint8


@pytest.mark.parametrize("extreme", [0.0, 2.0**-53, ALMOST_ONE])
def test_extreme_draws_select_the_first_or_last_operation(extreme):
    pixels = photographs()["cat"][:64, :64]
    operations = randaugment.choose([extreme] * DRAWS, probability=1)
    assert len(operations) == 2
    for name, magnitude, sign in operations:
        assert name == list(OPERATIONS)[-1 if extreme > 0.5 else 0]
        assert 0 <= magnitude <= 10
        assert sign == (1 if extreme > 0.5 else -1)
    result = randaugment.randaugment(pixels, [extreme] * DRAWS, probability=1)
    assert result.shape == pixels.shape
