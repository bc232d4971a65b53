"""Tests that every config key affects a run as documented.

The oracle, a second implementation in `oracle.py`, computes the expected values.
"""

import re
from functools import cache

import jax
import mini_runs
import numpy as np
import oracle
import pytest
import recorded_runs
from flax import nnx
from recorded_runs import STEPS, mismatches, run_config

import hivit_jax
from hivit_jax.errors import ConfigError
from hivit_jax.main import main
from hivit_jax.models import create_arguments
from hivit_jax.train import train
from hivit_jax.tree import named_leaves, split

pytestmark = [
    pytest.mark.usefixtures("minimal_output", "single_device"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def recorded_run(tmp_path_factory):
    """Return a cached function from a name to a `RecordedRun`."""
    folder = tmp_path_factory.mktemp("folder")
    recorded_runs.write_folder(folder)

    @cache
    def record(name):
        workdir = tmp_path_factory.mktemp(name.replace(", ", "_")) / "run"
        overrides = (
            {"init_from": record("mae").workdir} if name == "linear_probe" else {}
        )
        return recorded_runs.RecordedRun(name, folder, workdir, **overrides)

    return record


# Every step, from files to parameters


@pytest.mark.parametrize("name", recorded_runs.RECORDED_RUNS)
def test_steps_and_evaluation_equal_the_oracle(name, recorded_run):
    """The run has three training steps and two evaluations."""
    run = recorded_run(name)
    assert mismatches(run, run.config) == {}
    line = run.line(STEPS, "eval/loss")
    assert (line["eval/count"], line["eval/unreadable"]) == (10, 1)
    assert {x: line[x] for x in run.results} == run.results
    assert [x["step"] for x in run.lines if "eval/loss" in x] == [2, 3]


def test_recorded_steps_include_mixup_and_cutmix():
    """The recorded run is the classifier."""
    uses_cutmix = set()
    for step in range(STEPS):
        key = oracle.keys_per_sample(5, "train", step * recorded_runs.BATCH, 1)[0]
        kind_key = jax.random.split(oracle.fold(key, "step"), 4)[0]
        uses_cutmix.add(bool(jax.random.bernoulli(kind_key)))
    assert uses_cutmix == {True, False}


def test_seed_determines_the_initial_parameters(recorded_run):
    run = recorded_run("classify, plain")
    arguments = create_arguments(run.config.model)

    @jax.jit
    def initialize():
        model = hivit_jax.create_model(seed=jax.random.key(5), **arguments)
        return split(model)[1]

    expected = named_leaves(initialize())
    initial = run.states[0]["params"]
    assert expected.keys() == initial.keys()
    for name, array in initial.items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-6, atol=1e-7)


def test_frozen_parameters_stay_fixed(recorded_run):
    """The decoder's position table and a probe's encoder stay fixed.

    The probe starts from the averaged encoder and a new head.
    """
    mae, name = recorded_run("mae"), "decoder_pos_embed"
    np.testing.assert_array_equal(mae.params(0)[name], mae.params(STEPS)[name])
    pretrained = mae.params(STEPS, "ema")
    for step in range(STEPS + 1):
        params = recorded_run("linear_probe").params(step)
        for name, array in params.items():
            if name.startswith("encoder/"):
                np.testing.assert_array_equal(array, pretrained[name])
    initial_head = recorded_run("linear_probe").params(0)["head/kernel"]
    assert initial_head.std() == pytest.approx(0.01, rel=0.15)


# Every key

# Kinds of values that a key changes together
TRAINED = {"loss", "mu", "nu"}
PROBED = {"loss", "trace", "statistics"}
LEARNING_RATE = {"learning_rate", "params"}
EVALUATED = {"eval/loss"}


# Key -> kinds of values that the key changes
TRAINING_KEYS = {
    "total_steps": LEARNING_RATE,
    "optimizer.base_learning_rate": LEARNING_RATE,
    "optimizer.min_learning_rate": LEARNING_RATE,
    "optimizer.warmup_epochs": LEARNING_RATE,
    "optimizer.warmup_learning_rate": LEARNING_RATE,
}


ADAM_KEYS = {
    "optimizer.betas": {"mu", "nu", "params"},
    "optimizer.clip_norm": {"mu", "nu"},
    "optimizer.ema_decay": {"ema", "eval/loss"},
    "optimizer.weight_decay": {"params"},
}


PIXEL_KEYS = {
    "data.crop_pct": EVALUATED,
    "data.crop_scale": TRAINED,
    "data.mean": TRAINED | EVALUATED,
    "data.std": TRAINED | EVALUATED,
}


# Recorded run -> key -> kinds of values that the key changes. The run overrides the
# recipe's value. If the oracle uses the recipe's value, exactly these kinds differ from
# the recorded values. The difference of a kind with ~ may be within the tolerance.
CHANGED_KINDS = {
    "mae": TRAINING_KEYS
    | ADAM_KEYS
    | PIXEL_KEYS
    | {
        "seed": TRAINED | EVALUATED,
        "mask_ratio": TRAINED | EVALUATED,
        "model.drop_path_rate": {"mu", "nu", "~loss"},
        "model.layer_norm_eps": TRAINED | EVALUATED,
        "model.norm_pix_loss": TRAINED | EVALUATED,
        "data.antialias": TRAINED | EVALUATED,
        "data.interpolation": TRAINED | EVALUATED,
        "data.randaugment": TRAINED,
    },
    "classify": TRAINING_KEYS
    | ADAM_KEYS
    | PIXEL_KEYS
    | {
        "seed": TRAINED,
        "cutmix": TRAINED,
        "label_smoothing": TRAINED,
        "mixup": TRAINED,
        "random_erasing": TRAINED,
        "model.drop_path_rate": TRAINED,
        "model.layer_norm_eps": TRAINED | EVALUATED,
        "optimizer.layer_decay": {"params"},
    },
    "classify, plain": {
        "data.antialias": TRAINED | EVALUATED,
        "data.flip": TRAINED,
        "data.interpolation": TRAINED | EVALUATED,
        "data.randaugment": TRAINED,
    },
    "linear_probe": TRAINING_KEYS
    | {
        "seed": PROBED,
        "model.layer_norm_eps": PROBED | {"~eval/loss"},
        "data.antialias": PROBED | {"~eval/loss"},
        "data.crop_pct": EVALUATED,
        "data.crop_scale": PROBED,
        "data.mean": PROBED | {"~eval/loss"},
        "data.std": PROBED | {"~eval/loss"},
        "optimizer.betas": {"trace"},
        "optimizer.weight_decay": {"trace"},
    },
}


# Kinds that the test ignores, because they depend on other kinds or may agree by chance
DEPENDENT = {"gradient_norm", "unreadable", "top1", "top5", "eval/top1", "eval/top5"}


@pytest.mark.parametrize(
    ("name", "key"),
    [(name, key) for name, keys in CHANGED_KINDS.items() for key in keys],
)
def test_key_changes_exactly_the_listed_values(name, key, recorded_run):
    """The oracle uses the recipe's value of the key instead of the run's value."""
    run = recorded_run(name)
    recipe = mini_runs.recipe(recorded_runs.RECORDED_RUNS[name][0])
    config = run.config.copy_and_resolve_references()
    *parents, leaf = key.split(".")
    source, target = recipe, config
    for parent in parents:
        source, target = source[parent], target[parent]
    assert source[leaf] != target[leaf]
    with config.unlocked():
        target[leaf] = source[leaf]
    expected = {kind for kind in CHANGED_KINDS[name][key] if kind[0] != "~"}
    may_differ = {kind[1:] for kind in CHANGED_KINDS[name][key] - expected}
    assert mismatches(run, config).keys() - DEPENDENT - may_differ == expected


# Keys of a model's shape, with values that differ from those of the recorded runs
SHAPES = {
    "depths": (2, 3),
    "embed_dim": 48,
    "image_size": (48, 80),
    "in_channels": 1,
    "inner_patches": 2,
    "mlp_ratio": 3.0,
    "num_heads": 4,
    "patch_size": 8,
    "relative_position": True,
    "stem_mlp_ratio": 2.0,
}


DECODER_KEYS = {"decoder_depth": 3, "decoder_embed_dim": 24, "multi_scale": False}


CLASSIFIER_KEYS = {"num_classes": 9, "global_blocks": (1,), "window_size": 2}


MODEL_KEYS = {
    "mae": SHAPES | DECODER_KEYS | {"name": "mae_hivit_small"},
    "classify": SHAPES | CLASSIFIER_KEYS | {"name": "hivit_small", "fc_norm": False},
    "linear_probe": SHAPES | CLASSIFIER_KEYS | {"name": "hivit_small"},
}


@pytest.mark.parametrize("name", MODEL_KEYS)
def test_shape_keys_equal_arguments_of_create_model(name, capsys):
    """Counts of parameters and multiply-adds equal those of `create_model`."""
    synthetic = {
        "data__name": "synthetic",
        "data__mean": "(0.5,)",
        "data__std": "(0.5,)",
    }
    values = MODEL_KEYS[name] | {"dtype": "float32"}
    flags = recorded_runs.run_flags(name, **synthetic)
    flags += [f"--config.model.{k}={v}".replace(" ", "") for k, v in values.items()]
    assert main([*flags, "--mode=describe"]) == 0
    text = capsys.readouterr().out
    decoder = {"decoder_num_heads": 2} if name == "mae" else {}
    probe = {"running_norm": True} if name == "linear_probe" else {}
    arguments = values | decoder | probe
    model = nnx.eval_shape(lambda: hivit_jax.create_model(**arguments))
    options = {"mask_ratio": 0.6} if name == "mae" else {}
    macs = [model.macs(layer_norm_cost=cost, **options) / 1e9 for cost in (0, 5)]
    for count in (f"{model.parameter_count():,}  = ", *(f"{m:.4f} G" for m in macs)):
        assert f" {count}" in text


def test_num_heads_reaches_the_model(recorded_run):
    """Parameter counts do not depend on the numbers of heads, but shapes do."""
    params = recorded_run("mae").states[0]["params"]
    assert params["encoder/stages/2/0/attn/qkv/kernel"].shape == (32, 3, 2, 16)
    assert params["decoder_blocks/1/attn/qkv/kernel"].shape == (16, 3, 2, 8)


# Key -> (value, text that the jaxpr contains more often with this value)
PROGRAM_KEYS = {
    "model.dtype": ("bfloat16", "bf16["),
    "model.kernels": ("fused", "pallas_call"),
    "model.remat": (True, "prevent_cse=True"),
    "model.scan_blocks": (True, "length=2"),
    "optimizer.accumulate_steps": (3, "length=3"),
}


@pytest.mark.parametrize("key", PROGRAM_KEYS)
def test_program_keys_change_the_jaxpr(key):
    """These keys change the program; other tests show that values stay equal."""
    value, text = PROGRAM_KEYS[key]
    assert traced_step(key, value).count(text) > traced_step("", None).count(text)


@cache
def traced_step(key, value):
    """Trace the step of a classifier that is wide enough for kernels."""
    fixed = {
        "data.name": "synthetic",
        "batch_size": 96,
        "model.embed_dim": 512,
        "optimizer.accumulate_steps": 1,
    }
    changed = {key: value} if key else {}
    return mini_runs.traced_step(run_config("classify, plain", **fixed | changed))


def test_intervals_limits_and_caches_change_no_bit(recorded_run, tmp_path):
    """Intervals, limits, timeouts, worker threads and caches change no result."""
    run = recorded_run("classify, plain")
    other_values = dict(
        log_every=3,
        eval_every=3,
        checkpoint_every=3,
        keep_checkpoints=1,
        total_epochs=77.0,
        stall_timeout=77.0,
        peer_timeout=77.0,
        compilation_cache=str(tmp_path / "programs"),
        data__workers=3,
        data__max_unreadable=0.9,
    )
    config = run_config("classify, plain", data__dir=run.root, **other_values)
    assert train(config, tmp_path / "run") == run.results
    saved = mini_runs.saved_arrays(tmp_path / "run", STEPS)
    mini_runs.assert_identical(saved, run.states[STEPS])


# Recorded run -> keys without effect, each with a value that is refused
UNUSED = {
    "mae": {"optimizer.layer_decay": 0.9},
    "linear_probe": {
        "model.drop_path_rate": 0.1,
        "model.fc_norm": False,
        "model.freeze": "encoder",
        "optimizer.clip_norm": 1.0,
        "optimizer.first_moment_dtype": "bfloat16",
        "optimizer.layer_decay": 0.9,
    },
}


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [(name, *item) for name, keys in UNUSED.items() for item in keys.items()],
)
def test_key_without_effect_is_refused(name, key, value):
    """The task of the recorded run has no use for the key."""
    with pytest.raises(ConfigError, match=f"{key}={value} has no effect .*{name}"):
        run_config(name, **{key: value})


# Recorded run -> keys of other networks, each with a value
OTHER_MODEL_KEYS = {
    "mae": {"fc_norm": False, "num_classes": 3, "running_norm": True},
    "classify": {
        "decoder_depth": 1,
        "decoder_embed_dim": 8,
        "decoder_num_heads": 1,
        "multi_scale": False,
        "norm_pix_loss": False,
    },
}
OTHER_MODEL_KEYS["linear_probe"] = OTHER_MODEL_KEYS["classify"]


@pytest.mark.parametrize(
    ("name", "key"),
    [(name, key) for name, keys in OTHER_MODEL_KEYS.items() for key in keys],
)
def test_keys_of_another_network_are_refused(name, key, capsys):
    flags = recorded_runs.run_flags(
        name, **{f"model.{key}": OTHER_MODEL_KEYS[name][key]}
    )
    assert main([*flags, "--mode=describe"]) == 2
    assert f"unknown override of {'mae_' * (name == 'mae')}hivit" in (
        capsys.readouterr().err
    )


# Key -> test elsewhere that shows the key's effect
ELSEWHERE = {
    "task": "test_steps_and_evaluation_equal_the_oracle",
    "batch_size": "test_training_batches_follow_the_permutations_of_the_epochs",
    "checkpoint_every": "test_each_interval_key_is_followed",
    "class_weights": "test_class_weights_scale_the_loss_of_each_target",
    "compilation_cache": "test_programs_are_cached_in_the_workdir",
    "early_stopping": "test_run_ends_at_the_same_step_after_interruptions",
    "eval_every": "test_each_interval_key_is_followed",
    "init_from": "test_classifier_starts_from_the_pretrained_encoder",
    "keep_checkpoints": "test_each_interval_key_is_followed",
    "log_every": "test_each_interval_key_is_followed",
    "peer_timeout": "test_a_lost_process_ends_the_others",
    "stall_timeout": "test_each_step_and_batch_sends_a_heartbeat",
    "total_epochs": "test_each_interval_key_is_followed",
    "data.balance": "test_balanced_batches_contain_each_class_equally_often",
    "wandb_project": "test_offline_wandb_run_is_written_into_the_workdir",
    "data.cache": "test_later_runs_read_the_copies_in_data_cache",
    "data.canvas": "test_data_keys_change_only_the_listed_batches",
    "data.class_level": "test_leaf_directories_are_classes",
    "data.dir": "test_steps_and_evaluation_equal_the_oracle",
    "data.dtype": "test_dtypes_reach_the_batches",
    "data.eval_fraction": "test_eval_fraction_puts_every_image_on_one_side",
    "data.eval_group": "test_groups_stay_together",
    "data.eval_split": "test_split_keys_select_directories",
    "data.exclude": "test_excluded_paths_may_be_absolute_or_relative",
    "data.flip": "test_training_flips_and_erases_resized_images",
    "data.max_unreadable": "test_unreadable_images_do_not_affect_training",
    "data.multi_label": "test_images_with_several_labels_are_trained_and_predicted",
    "data.name": "test_steps_and_evaluation_equal_the_oracle",
    "data.randaugment": "test_randaugment_changes_training_images_only",
    "data.reader": "test_training_with_tf_data_is_bit_identical",
    "data.interpolation": "test_images_are_resized_as_configured",
    "data.scale": "test_dtypes_reach_the_batches",
    "data.subset": "test_subsets_of_digits_are_class_balanced",
    "data.train_examples": "test_subsets_of_digits_are_class_balanced",
    "data.train_split": "test_split_keys_select_directories",
    "data.value_range": "test_value_range_is_mapped_to_uint8",
    "data.workers": "test_data_workers_sets_the_number_of_threads",
    "mesh.data": "test_state_is_sharded_from_the_first_step",
    "mesh.fsdp": "test_state_is_sharded_from_the_first_step",
    "mesh.replica": "test_losses_do_not_depend_on_the_mesh",
    "mesh.tensor": "test_tensor_axis_splits_heads_and_hidden_units",
    "mesh.zero": "test_zero_1_shards_only_the_moments",
    "model.decoder_num_heads": "test_num_heads_reaches_the_model",
    "model.freeze": "test_run_with_frozen_stages_resumes_bit_identically",
    "model.global_blocks": "test_config_keys_set_windows",
    "model.running_norm": "test_probe_without_running_norm_is_refused",
    "model.window_size": "test_windows_with_dropped_units_are_refused",
    "optimizer.ema_decay": "test_each_step_updates_the_average",
    "optimizer.first_moment_dtype": "test_ten_steps_equal_the_official_adamw",
    "optimizer.first_epoch": "test_resuming_with_first_epoch_1_skips_an_epoch",
    "optimizer.gamma": "test_multistep_schedule_equals_torch",
    "optimizer.lr_batch": "test_peak_is_proportional_to_batch_size_over_lr_batch",
    "optimizer.milestones": "test_multistep_schedule_equals_torch",
    "optimizer.power": "test_polynomial_schedule_equals_mmcv",
    "optimizer.schedule": "test_old_recipes_have_the_recorded_learning_rates",
}


@pytest.mark.parametrize("name", ["mae", "classify", "linear_probe"])
def test_every_key_is_in_a_table(name):
    """Each key of a task is in one of the tables above."""
    known = set(PROGRAM_KEYS) | set(ELSEWHERE) | set(CHANGED_KINDS[name])
    known |= set(CHANGED_KINDS["classify, plain"] if name == "classify" else ())
    known |= {f"model.{key}" for key in [*MODEL_KEYS[name], *OTHER_MODEL_KEYS[name]]}
    known |= set(UNUSED.get(name, ()))
    keys = {key.replace("/", ".") for key in named_leaves(run_config(name).to_dict())}
    keys |= {f"model.{key}" for key in run_config(name).model}
    # Names such as data.mean.0 are elements of tuples, not keys.
    keys = {key for key in keys if not re.search(r"\.\d+$", key)}
    assert keys - known == set()


def test_named_tests_exist():
    files = (mini_runs.ROOT / "tests").rglob("test_*.py")
    tests = "\n".join(path.read_text() for path in files)
    for test in ELSEWHERE.values():
        assert f"def {test}(" in tests, test
