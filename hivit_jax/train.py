"""The training loop: task, mesh, state, evaluation and steps, from top to bottom."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import jax
import numpy as np
from etils.epath import Path
from flax import nnx

from hivit_jax import evaluate, inputs, record, resources, tasks
from hivit_jax.checkpoints import manager, read
from hivit_jax.checkpoints.lock import exclusive
from hivit_jax.config import complete_saved, due_after, record_text, step_options
from hivit_jax.data.prefetch import batch_or_raise, defer_error, prefetch_to_device
from hivit_jax.data.unreadable import UnreadableImages, check_unreadable
from hivit_jax.distributed.processes import check_same_on_all_processes
from hivit_jax.distributed.sharding import make_mesh, replicate
from hivit_jax.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    Interrupted,
    ProcessDataError,
    ResourceError,
)
from hivit_jax.initial import initial_state, read_pretrained
from hivit_jax.paths import open_path, with_absolute_paths
from hivit_jax.progress import counted
from hivit_jax.reporting import console, figures, metrics
from hivit_jax.reporting.console import log
from hivit_jax.training.early_stopping import stopping_flags
from hivit_jax.training.schedule import make_schedule, skip_steps
from hivit_jax.training.step import prepare
from hivit_jax.xla.compile import compile_steps


@resources.raise_resource_errors()
@exclusive  # one run at a time in a workdir
def train(
    config: Any,
    workdir: str | Path,
    stop_requested: Callable[[int], str | None] = lambda step: None,
    heartbeat: Callable[[], None] = lambda: None,
) -> dict[str, float | int]:
    """Train to the last step, from the newest checkpoint in the workdir, if any.

    Args:
      config: result of `hivit_jax.config.load`.
      workdir: directory for config.json, metrics.jsonl, checkpoints/ and figures/.
        For a finished run, only a missing evaluation result is written.
      stop_requested: called with the number of completed steps, at the start and after
        every step. Returns None or the reason to save and exit, equal on all processes.
      heartbeat: called after every step and every batch of an evaluation.

    Returns:
      The last result of `evaluate.evaluate`; {} with `data.eval_split="none"`.

    Raises:
      HivitError: invalid config or input, divergence or interruption; see `errors`.
    """
    # --- Task, mesh, train step: shapes only ----------------------------------------
    workdir = open_path(workdir)
    pretrained = read_pretrained(config, workdir)
    task = inputs.make_task(config)
    config = task.config  # with the dataset's number of classes
    notes = inputs.check_splits(config, task)
    mesh = make_mesh(config.mesh, config.batch_size, config.optimizer.accumulate_steps)
    images_per_epoch = inputs.images_per_epoch(config, task)
    steps_per_epoch, total_steps = inputs.count_steps(config, images_per_epoch)
    schedule = make_schedule(
        config.optimizer, config.batch_size, steps_per_epoch, total_steps
    )
    training = prepare(task, mesh, schedule, **step_options(config))
    model = nnx.eval_shape(task.build_model)
    devices, flops = [*mesh.devices.flat], task.training_flops(model)
    log(
        f"{config.model.name}: {model.parameter_count():,} parameters on {mesh.size} x "
        f"{devices[0].device_kind}; {counted(total_steps, 'step')} of "
        f"{counted(config.batch_size, 'image')}"
    )
    for warning in [*notes, *task.warnings(steps_per_epoch, total_steps)]:
        log(f"warning: {warning}")

    # --- State: restored, initialized from a pretrained model, or new ---------------
    dataset, keep = asdict(task.data), config.keep_checkpoints
    checkpoints = manager.Checkpoints(workdir, keep, task.best, dataset)
    found = {"dataset's size": images_per_epoch, "checkpoints": checkpoints.steps()}
    check_same_on_all_processes({"config": config} | found)
    check_resumption(config, dataset, checkpoints)
    if restored := checkpoints.restore_newest(training.state):
        step, state = restored
        report_resumption(config, dataset, checkpoints.directory / str(step))
        if config.optimizer.first_epoch:
            skipped = min(round(steps_per_epoch), total_steps - step)
            state, step = skip_steps(state, skipped), step + skipped
            log(f"first_epoch=1: skipped one epoch, to step {step:,}")
    else:
        step, state = 0, initial_state(config, task, training, pretrained)
    frozen, writer = evaluate.put_frozen(task, mesh), None
    flags_at = partial(stopping_flags, workdir, config.early_stopping, task.best)
    if finished := step >= total_steps or flags_at(step).end_early:
        log(f"the run in {workdir} is finished; another --workdir starts a new run")
    missing = evaluate.is_evaluation_missing(config, task, workdir, step, total_steps)
    if not finished or missing:
        resources.check_disk(workdir, training.state)
        if jax.process_index() == 0:
            writer = start_record(config, workdir, step)

    # --- Evaluation -----------------------------------------------------------------
    eval_step = evaluate.make_eval_step(config, task, training.graphdef, mesh)
    compute_panels = evaluate.make_panels(config, task, training.graphdef, mesh)

    def run_evaluation():
        variables = {
            "params": state.get("ema", state["params"]),
            "model_state": state["model_state"],
            "frozen": frozen,
        }
        with resources.raise_resource_errors():
            values = evaluate.evaluate(
                config, task, eval_step, variables, mesh, heartbeat
            )
            panels = compute_panels(variables)
        if values:
            log(console.eval_line(f"step {step}", values))
        if writer:
            writer.scalars(step, values)
            images = task.figures(panels) if panels else {}
            figures.draw_run(workdir, step, images)
            writer.images(step, images)
        return values

    # --- Steps ------------------------------------------------------------------------
    throughput, first_step, results, pending = metrics.Throughput(), step, None, []
    num_images = task.data.counts["train"]
    unreadable = UnreadableImages(config.data, num_images)
    try:
        stop = stop_requested(step)
        if missing and not stop:
            results = run_evaluation()
            finished |= flags_at(step).end_early
        if not finished and not stop:
            batches = inputs.train_batches(config, step, total_steps)
            batches = defer_error(prefetch_to_device(unreadable.watch(batches), mesh))
            batch = batch_or_raise(next(batches))
            train_step = compile_steps(training)
        throughput.read()  # starts the measurement
        while not finished and not stop:
            steps_done = replicate(mesh, np.int32(step))
            state, values = train_step(state, frozen, batch_or_raise(batch), steps_done)
            if pending:  # so that at most two steps and their batches are in flight
                jax.block_until_ready(pending[-1])
            batch = next(batches, None)  # while the devices compute
            throughput.add(config.batch_size, starved=values["loss"].is_ready())
            step += 1
            pending.append((step, values))
            finished, stop = step == total_steps, stop_requested(step)
            heartbeat()
            due = due_after(config, step, total_steps)
            if any(due.values()) or stop:
                scalars = metrics.fetch(pending, state)
                speed, scalars["input_bound"] = throughput.read()
                scalars |= metrics.device_metrics(speed, devices, flops)
                scalars["epoch"] = step / steps_per_epoch
                images_left = (total_steps - step) * config.batch_size
                scalars["seconds_left"] = images_left / speed
                if writer:
                    writer.scalars(step, scalars)
                if scalars["unreadable"]:  # log different images, not failed reads
                    scalars["unreadable"] = unreadable.gather()
                log(console.step_line(step, total_steps, scalars))
                check_unreadable(scalars["unreadable"], num_images, config.data)
                with throughput.pause():
                    # Evaluate before saving, or a resumed run may skip the evaluation.
                    if due["eval"] and (results := run_evaluation()):
                        end_early, improved = flags_at(step)
                        finished |= end_early
                        due["checkpoint"] |= end_early or improved or bool(stop)
                    if due["checkpoint"]:
                        evaluated = results or None if due["eval"] else None
                        checkpoints.save(state, record_text(config), evaluated)
        if not finished:
            checkpoints.save(state, record_text(config))
            raise interrupted(stop, step, total_steps, workdir)
        results = run_evaluation() if results is None else results
        best = task.best if results else None
        log(console.final_line(workdir, checkpoints.steps(), best))
        return results
    except (DataError, DivergedError, ResourceError) as error:
        # All processes must save together, but only some may raise these errors.
        on_some = isinstance(error, (ProcessDataError, ResourceError))
        if step > first_step and (jax.process_count() == 1 or not on_some):
            checkpoints.save(state, record_text(config))
        raise
    finally:
        checkpoints.close()
        if writer:
            writer.close()


def interrupted(reason: str, step: int, total_steps: int, workdir: Path) -> Interrupted:
    """Return the error of a run that was interrupted and saved."""
    return Interrupted(
        f"{reason}: step {step} of {total_steps} is saved in {workdir}; run the same "
        "command to resume"
    )


def start_record(config: Any, workdir: Path, step: int) -> metrics.Writer:
    """Record a start of the run, and return the writer of its metrics."""
    record.add_start(workdir, record_text(config))
    settings = record.flatten(config.to_dict())
    return metrics.Writer(workdir, step, settings, config.wandb_project)


def check_resumption(
    config: Any, dataset: dict[str, Any], checkpoints: manager.Checkpoints
) -> None:
    """Raise ConfigError for checkpoints of another task, batch size or classes.

    Args:
      dataset: fields of the `DatasetInfo`.
    """
    workdir = checkpoints.directory.parent
    for step in sorted(checkpoints.steps(), reverse=True):
        checkpoint = checkpoints.directory / str(step)
        try:
            saved = read.load_config(checkpoint)
            before = read.load_dataset_info(checkpoint)
        except CheckpointError:
            continue  # a damaged checkpoint, which is reported when it is restored
        # A user's own task is not checked, because it may have been renamed.
        if {saved["task"], config.task} <= tasks.TASKS.keys():
            record.check_task(saved["task"], config.task, workdir)
        if step == 0:  # before the first step, any batch size and classes fit
            return
        if before and tasks.find(config.task).needs_labels:
            record.check_classes(before["classes"], dataset["classes"], workdir)
        accumulate_steps = config.optimizer.accumulate_steps
        sizes = saved["batch_size"], config.batch_size
        record.check_batch_size(*sizes, accumulate_steps, workdir)
        return


def report_resumption(config: Any, dataset: dict[str, Any], checkpoint: Path) -> None:
    """Log the checkpoint that a run resumes from, and changes of config and dataset.

    Args:
      dataset: fields of the `DatasetInfo`.
    """
    log(f"resuming at step {int(checkpoint.name):,} from {checkpoint}")
    try:
        saved = complete_saved(read.load_config(checkpoint), str(checkpoint))
        before = read.load_dataset_info(checkpoint)
    except (CheckpointError, ConfigError) as error:
        log(f"note: changes since {checkpoint} are unknown: {error}")
        return
    old, new = (with_absolute_paths(c.to_dict()) for c in (saved, config))
    for line in record.differences(old, new):
        log(f"changed: {line}")
    for line in record.dataset_changes(before, dataset) if before else []:
        log(f"dataset changed: {line}")
