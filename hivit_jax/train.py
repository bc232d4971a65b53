"""The training loop: task, mesh, state, evaluation and steps, from top to bottom."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils.epath import Path
from flax import nnx

from hivit_jax import evaluate, inputs
from hivit_jax.checkpoints import manager
from hivit_jax.config import step_options, to_json
from hivit_jax.data.prefetch import prefetch_to_device
from hivit_jax.distributed.processes import check_same_on_all_processes
from hivit_jax.distributed.sharding import make_mesh, replicate, shardings_of
from hivit_jax.errors import DataError, DivergedError, Interrupted, LocalDataError
from hivit_jax.reporting import console, figures, metrics
from hivit_jax.reporting.console import log
from hivit_jax.training.schedule import make_schedule, skip_steps
from hivit_jax.training.step import State, prepare
from hivit_jax.weights import adapt, load
from hivit_jax.xla.compile import compile_steps


def train(
    config: Any,
    workdir: str | Path,
    stop_requested: Callable[[int], str | None] = lambda step: None,
    heartbeat: Callable[[], None] = lambda: None,
) -> dict[str, float | int]:
    """Train to the last step, starting from the newest checkpoint in the workdir.

    Args:
      config: result of `hivit_jax.config.load`.
      workdir: directory for config.json, metrics.jsonl, checkpoints/ and figures/.
      stop_requested: called with the number of completed steps, after every step.
        Returns None or the reason to save and exit, the same on all processes.
      heartbeat: called after every step and every batch of an evaluation.

    Returns:
      The last result of `evaluate.evaluate`.

    Raises:
      HivitError: invalid config or input, divergence or interruption; see `errors`.
    """
    # --- Task, mesh, train step: shapes only ----------------------------------------
    workdir = Path(workdir)
    task = inputs.make_task(config)
    mesh = make_mesh(config.mesh, config.batch_size, config.optimizer.accumulate_steps)
    num_images = inputs.images_per_epoch(config, task)
    per_epoch, total_steps = inputs.count_steps(config, num_images)
    schedule = make_schedule(
        config.optimizer, config.batch_size, per_epoch, total_steps
    )
    training = prepare(task, mesh, schedule, **step_options(config))
    shardings = shardings_of(training.state)
    model = nnx.eval_shape(task.build_model)
    log(
        f"{config.model.name}: {model.parameter_count():,} parameters on {mesh.size} x "
        f"{jax.devices()[0].device_kind}; {total_steps:,} steps of "
        f"{config.batch_size:,} images"
    )

    # --- State: restored, initialized from a pretrained model, or new ---------------
    metrics.prepare_workdir(workdir)
    checkpoints = manager.Checkpoints(workdir, config.keep_checkpoints, task.best)
    steps = checkpoints.steps()
    check_same_on_all_processes(
        {"config": config, "dataset's size": num_images, "checkpoints": steps}
    )
    step = 0
    if restored := checkpoints.restore_newest(training.state):
        step, state = restored
        log(f"resuming at step {step:,} from {checkpoints.directory / str(step)}")
        if config.optimizer.first_epoch:
            skipped = min(round(per_epoch), total_steps - step)
            state, step = skip_steps(state, skipped), step + skipped
            log(f"first_epoch=1: skipped one epoch, to step {step:,}")
    else:
        pretrained = config.init_from and load.read_for(config.model, config.init_from)
        state = jax.jit(training.init, out_shardings=shardings)()
        if pretrained:
            state |= adapt.initialize_from(
                pretrained,
                model,
                {name: state[name] for name in ("params", "model_state")},
                fresh=task.fresh,
                head_scale=task.head_scale,
            )
            if "ema" in state:
                state["ema"] = jax.tree.map(jnp.copy, state["params"])
    frozen = evaluate.put_frozen(task, mesh)
    if jax.process_index() == 0:
        (workdir / "config.json").write_text(to_json(config))

    # --- Evaluation -----------------------------------------------------------------
    writer = metrics.Writer(workdir, step) if jax.process_index() == 0 else None
    eval_step = evaluate.make_eval_step(config, task, training.graphdef, mesh)
    make_panels = evaluate.make_panels(config, task, training.graphdef, mesh)

    def run_evaluation():
        variables = {
            "params": state.get("ema", state["params"]),
            "model_state": state["model_state"],
            "frozen": frozen,
        }
        values = evaluate.evaluate(config, task, eval_step, variables, mesh, heartbeat)
        panels = make_panels(variables)
        log(console.eval_line(f"step {step}", values))
        if writer:
            writer.scalars(step, values)
            images = task.figures(panels) if panels else {}
            writer.images(step, figures.draw_run(workdir, step, images))
        return values

    # --- Steps ------------------------------------------------------------------------
    throughput, results, pending = metrics.Throughput(), None, []
    first_step, unreadable = step, 0
    try:
        stop = stop_requested(step)
        if step < total_steps and not stop:
            batches = prefetch_to_device(
                inputs.train_batches(config, step, total_steps), mesh
            )
            batch = next(batches)
            train_step = compile_steps(training)
        throughput.read()  # starts the measurement
        while step < total_steps and not stop:
            steps_done = replicate(mesh, np.int32(step))
            state, values = train_step(state, frozen, batch, steps_done)
            if pending:  # so that at most two steps and their batches are in flight
                jax.block_until_ready(pending[-1])
            batch = next(batches, None)  # while the devices compute
            throughput.add(config.batch_size, starved=values["loss"].is_ready())
            step += 1
            pending.append((step, values))
            stop = stop_requested(step)
            heartbeat()
            due = {
                name: step == total_steps or step % config[f"{name}_every"] == 0
                for name in ("log", "eval", "checkpoint")
            }
            if any(due.values()) or stop:
                scalars = fetch_metrics(pending, state)
                speed, scalars["input_bound"] = throughput.read()
                scalars["images_per_second"] = speed
                images_left = (total_steps - step) * config.batch_size
                scalars["seconds_left"] = images_left / speed
                log(console.step_line(step, total_steps, scalars))
                if writer:
                    writer.scalars(step, scalars)
                unreadable += scalars["unreadable"]
                seen = (step - first_step) * config.batch_size
                inputs.check_unreadable(unreadable, seen, config.data, "train")
                with throughput.pause():
                    # Before the checkpoint, so that a resumed run never skips it.
                    if due["eval"]:
                        results = run_evaluation()
                    if due["checkpoint"]:
                        evaluated = results if due["eval"] else None
                        checkpoints.save(state, to_json(config), evaluated)
        if step < total_steps:
            checkpoints.save(state, to_json(config))
            raise Interrupted(
                f"{stop}: step {step} of {total_steps} is saved in "
                f"{workdir}; run the same command to resume"
            )
        results = results or run_evaluation()
        log(console.best_line(workdir, checkpoints.steps(), task.best))
        return results
    except (DataError, DivergedError) as error:
        # All processes must save together, but only one of them sees a local error.
        if jax.process_count() == 1 or not isinstance(error, LocalDataError):
            checkpoints.save(state, to_json(config))
        raise
    finally:
        checkpoints.close()
        if writer:
            writer.close()


def fetch_metrics(pending: list, state: State) -> dict[str, float]:
    """Fetch and clear the pending metrics, a list of (step, metrics on the devices).

    Returns:
      The metrics of the newest step as floats; "unreadable" is summed over all steps.

    Raises:
      DivergedError: the loss, gradient or model state of a step is not finite.
    """
    fetched = jax.device_get(pending)
    pending.clear()
    for step, values in fetched:
        if not values.pop("finite"):
            good_step = jax.device_get(state["step"])
            raise DivergedError(
                f"step {step}: loss {values['loss']}, gradient norm "
                f"{values['gradient_norm']}; expected finite numbers, also in the "
                "batch statistics.\n"
                f"The last good state, of step {good_step}, is saved."
            )
    newest = {name: float(value) for name, value in fetched[-1][1].items()}
    return newest | {"unreadable": int(sum(v["unreadable"] for _, v in fetched))}
