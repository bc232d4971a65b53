"""The loop: model, mesh, state, data, steps, evaluation. Read top to bottom."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils.epath import Path
from flax import nnx

from hivit_jax import (
    checkpoint,
    evaluate,
    figures,
    metrics,
    pretrained,
    tasks,
)
from hivit_jax.compiling import compile_step
from hivit_jax.config import to_json
from hivit_jax.data import pipeline, sources
from hivit_jax.distributed.processes import check_same_on_all_processes
from hivit_jax.errors import DataError, DivergedError, Interrupted, LocalDataError
from hivit_jax.metrics import say
from hivit_jax.models import split
from hivit_jax.optimizer import count_steps, skip_steps
from hivit_jax.sharding import make_mesh, placed, state_shardings, to_devices
from hivit_jax.step import State, make_init, make_train_step


def train(
    config: Any,
    workdir: str | Path,
    stop_requested: Callable[[int], str | None] = lambda step: None,
    beat: Callable[[], None] = lambda: None,
) -> dict[str, float | int]:
    """Trains to the end, from where the workdir's newest checkpoint stands.

    Args:
      config: a recipe, as in ``configs/``.
      workdir: gets config.json, metrics.jsonl, checkpoints/, figures/.
      stop_requested: asked after every step, with its number; a text is the reason to
        save and leave, the same on all processes.
      beat: called after every step and batch of an evaluation.

    Returns:
      The last evaluation, as `evaluate.evaluate` gives it.

    Raises:
      HivitError: a bad config or input, divergence, interruption; see `errors`.
    """
    # --- Model, mesh, optimiser: shapes only --------------------------------------
    workdir = Path(workdir)
    task = tasks.create(config)
    model = nnx.eval_shape(task.build_model)
    graphdef, abstract_params = split(model)
    mesh = make_mesh(config.mesh, config.batch_size, config.optimizer.accumulate_steps)
    images = sources.num_examples(config.data, "train")
    per_epoch, total_steps = count_steps(config, images)
    schedule = task.schedule(per_epoch, total_steps)
    optimizer = task.optimizer(abstract_params, schedule)
    init = make_init(config, task, optimizer)
    abstract_state = jax.eval_shape(init)
    shardings = state_shardings(mesh, abstract_state, config.mesh.zero)
    say(
        f"{config.model.name}: {model.parameter_count():,} parameters on {mesh.size} x "
        f"{jax.devices()[0].device_kind}; {total_steps:,} steps of "
        f"{config.batch_size:,} images"
    )

    # --- State: from the newest checkpoint, from a pretrained one, or fresh ---------
    metrics.prepare_workdir(workdir)
    checkpoints = checkpoint.Checkpoints(workdir, config.keep_checkpoints, task.best)
    steps = checkpoints.steps()
    check_same_on_all_processes(
        {"config": config, "dataset's size": images, "checkpoints": steps}
    )
    step = 0
    if found := checkpoints.restore_newest(placed(abstract_state, shardings)):
        step, state = found
        say(f"going on at step {step:,} from {checkpoints.directory / str(step)}")
        if task.starts_at_epoch_one():
            skipped = min(round(per_epoch), total_steps - step)
            state, step = skip_steps(state, skipped), step + skipped
            say(f"official_quirks: an epoch is left out, to step {step:,}")
    else:
        start = config.init_from and pretrained.find_for(config, config.init_from)
        state = jax.jit(init, out_shardings=shardings)()
        if start:
            state["params"] = pretrained.start_from(
                start,
                model,
                state["params"],
                fresh=task.fresh,
                head_scale=task.head_scale,
            )
            if "ema" in state:
                state["ema"] = jax.tree.map(jnp.copy, state["params"])
    if jax.process_index() == 0:
        (workdir / "config.json").write_text(to_json(config))

    # --- Evaluation -----------------------------------------------------------------
    writer = metrics.Writer(workdir, step) if jax.process_index() == 0 else None
    eval_step = evaluate.make_eval_step(config, task, graphdef)
    panels_of = evaluate.make_panels(config, task, graphdef)

    def run_evaluation():
        params = state.get("ema", state["params"])
        values = evaluate.evaluate(config, task, eval_step, params, mesh, beat)
        panels = panels_of(params)
        title = f"held-out images, step {step}"
        pictures = task.figures(panels, title) if panels else {}
        say(metrics.eval_line(f"step {step}", values))
        if writer:
            writer.scalars(step, values)
            writer.images(step, figures.draw_run(workdir, step, pictures))
        return values

    # --- Steps ------------------------------------------------------------------------
    clock, results, pending = metrics.Throughput(), None, []
    first, unreadable = step, 0
    try:
        stop = stop_requested(step)
        if step < total_steps and not stop:
            batches = to_devices(
                pipeline.train_batches(config, step, total_steps), mesh
            )
            batch = next(batches)
            train_step = compile_step(
                make_train_step(config, task, graphdef, optimizer, schedule),
                (state, batch, np.int32(step)),
                shardings,
            )
        clock.read()  # starts it
        while step < total_steps and not stop:
            state, values = train_step(state, batch, np.int32(step))
            if pending:  # no more than two steps, and their batches, in flight
                jax.block_until_ready(pending[-1])
            batch = next(batches, None)  # while the devices work
            clock.add(config.batch_size, starved=values["loss"].is_ready())
            step += 1
            pending.append((step, values))
            stop = stop_requested(step)
            beat()
            due = {
                name: step == total_steps or step % config[f"{name}_every"] == 0
                for name in ("log", "eval", "checkpoint")
            }
            if any(due.values()) or stop:
                line = fetch_metrics(pending, state)
                rate, line["input_bound"] = clock.read()
                line["images_per_second"] = rate
                line["seconds_left"] = (total_steps - step) * config.batch_size / rate
                say(metrics.step_line(step, total_steps, line))
                if writer:
                    writer.scalars(step, line)
                unreadable += line["unreadable"]
                pipeline.check_unreadable(
                    unreadable, (step - first) * config.batch_size, config.data, "train"
                )
                with clock.pause():
                    if due["eval"]:  # first, so that no kill can leave it out
                        results = run_evaluation()
                    if due["checkpoint"]:
                        evaluated = results if due["eval"] else None
                        checkpoints.save(state, to_json(config), evaluated)
        if step < total_steps:
            checkpoints.save(state, to_json(config))
            raise Interrupted(
                f"{stop}: step {step} of {total_steps} is saved in "
                f"{workdir}; run the same command to go on"
            )
        results = results or run_evaluation()
        say(metrics.best_line(workdir, checkpoints.steps(), task.best))
        return results
    except (DataError, DivergedError) as error:
        # All processes save together, and a local error is known to one of them only.
        if jax.process_count() == 1 or not isinstance(error, LocalDataError):
            checkpoints.save(state, to_json(config))
        raise
    finally:
        checkpoints.close()
        if writer:
            writer.close()


def fetch_metrics(pending: list, state: State) -> dict[str, float]:
    """Empties the metrics of steps still on the devices.

    Returns:
      The newest as floats; "unreadable" is the sum over the steps.

    Raises:
      DivergedError: one of the steps had a loss or gradient that is not finite.
    """
    fetched = jax.device_get(pending)
    pending.clear()
    for step, values in fetched:
        if not np.isfinite(values["loss"] + values["gradient_norm"]):
            raise DivergedError(
                f"step {step}: loss {values['loss']}, gradient norm "
                f"{values['gradient_norm']}; expected finite numbers.\n"
                f"The last good state, of step {int(state['step'])}, is saved."
            )
    newest = {name: float(value) for name, value in fetched[-1][1].items()}
    return newest | {"unreadable": int(sum(v["unreadable"] for _, v in fetched))}
