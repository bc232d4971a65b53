"""Compare HiViT with ViT and Swin, as the HiViT paper does.

    python -m benchmarks.paper [--device cpu|gpu] [--only "pretrain HiViT-B" ...] \
        [--again] [--batch 8] [--rounds 5] [--steps 2] [--threads 2]
    python -m benchmarks.paper --topologies [--chip v5e:2x4 ...] [--only ...]

A cell is a job, a model and a program, such as "pretrain HiViT-B torch". `--only
TEXT ...` selects the cells whose names contain any TEXT. The jobs are:

- pretrain: the train step of pretraining at 224x224, by masked autoencoding for HiViT
  and ViT, and by SimMIM for Swin. "Swin-B 192" is Swin-B at 192x192, the size in the
  official recipe of SimMIM.
- classify: the train step of finetuning at 224x224. In hivit_jax, this step includes
  drop path, Mixup, CutMix and random erasing; in PyTorch, it does not.
- inference: the forward pass of the classifier.

The programs are hivit_jax and, if torch is installed, the networks of
benchmarks/torch_twin.py and torch_peers.py with torch.compile and PyTorch's fused
attention. In both programs, the images are already on the device. hivit_jax receives
uint8 images, normalizes them in every step and, in training, flips them. PyTorch
receives normalized images. The dtype is float32 on a CPU and bfloat16 on a GPU. On a
CPU, malloc keeps freed memory in both programs, as in training with hivit_jax.

The processes of a job take turns, as in benchmarks/peers.py. The result of each cell is
a JSON file in results/paper/cpu or results/paper/gpu. A rerun measures only the missing
cells; with --again, it measures all selected cells. Ratios and the figure,
results/paper/DEVICE.png, compare only cells of the same run. A cell that cannot start,
for example for lack of memory, is reported and left out; rerun the benchmark with fewer
cells (`--only`) or a smaller `--batch`.

--topologies compiles the train steps of hivit_jax for the topologies in --chip instead
(default: all in benchmarks/compiled.py). No accelerator is needed. The results are in
results/paper/TOPOLOGY. A rerun compiles only the missing cells. Reports in --workdir
are reused, even with --again. The inference job is left out, because only train steps
can be compiled ahead of time.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.paper_tables import (
    CELLS,
    JOBS,
    RECIPES_OF_MODELS,
    Results,
    draw,
    format_compiled,
    paper_ratios,
    table,
)
from benchmarks.peer_rows import OURS, load_recipe, start_recipe, start_torch
from benchmarks.peers import (
    add_flags,
    receive,
    set_defaults,
    shared_facts,
    start_row,
    time_rows,
)

GPU_BATCH = 64  # default number of images per step on a GPU
RESULTS = Path(__file__).resolve().parent / "results" / "paper"
OVERRIDES: dict[str, dict[str, Any]] = {
    "pretrain Swin-B": {"model.image_size": 224, "model.window_size": 7}
}


def recipe_of(job: str, model: str) -> tuple[str, dict[str, Any]]:
    """Return the recipe of a model for a job, and the overrides of the recipe."""
    overrides = {"data.canvas": 0} | OVERRIDES.get(f"{job} {model}", {})
    return RECIPES_OF_MODELS[model][job != "pretrain"], overrides


def path_of(folder: Path, name: str) -> Path:
    """Return the path of a cell's JSON file."""
    return folder / f"{name.replace(' ', '_')}.json"


def read(folder: Path, names: Any) -> Results:
    """Return the results of the named cells that have a file."""
    paths = {name: path_of(folder, name) for name in names}
    return {
        n: json.loads(path.read_text()) for n, path in paths.items() if path.exists()
    }


def write(folder: Path, results: Results) -> None:
    """Write one JSON file per cell."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, result in results.items():
        path_of(folder, name).write_text(json.dumps(result, indent=1) + "\n")


def starter(name: str, args: argparse.Namespace) -> Callable:
    """Return the function that prepares the program of a cell, for `start_row`."""
    job, model, program = CELLS[name]
    if program == OURS:
        return partial(start_recipe, *recipe_of(job, model), args)
    return partial(start_torch, model, True, False, args)


def model_flops(job: str, model: str, args: argparse.Namespace) -> int:
    """Return the FLOPs per image of a model in a job, without recomputation."""
    from benchmarks.train_step import flops_per_image, task_of

    config = load_recipe(*recipe_of(job, model), args)
    return flops_per_image(task_of(config), job == "inference")


def measure(names: list[str], args: argparse.Namespace) -> Results:
    """Measure cells of one job, interleaved; leave out cells that cannot start."""
    from hivit_jax.errors import HivitError
    from hivit_jax.xla.chips import peak_flops

    pipes, facts = {}, {}
    for name in names:
        pipe = start_row(starter(name, args), True, args)
        try:
            facts[name] = receive(pipe, name)
        except HivitError as error:
            print(f"left out: {error}")
            continue
        pipes[name] = pipe
        print(f"{name}: ready", flush=True)
    results = {name: facts[name] | x for name, x in time_rows(pipes, args).items()}
    run = datetime.now(UTC).isoformat()
    for name, result in results.items():
        flops = model_flops(*CELLS[name][:2], args)
        peak = peak_flops(result["gpu"] or "cpu")
        flops_per_second = result["images_per_second"] * flops
        result |= {
            "run": run,  # cells with equal values were interleaved
            "model_flops_per_image": flops,
            "model_flop_utilization": flops_per_second / peak if peak else None,
            **shared_facts(args),
        }
    return results


def compile_all(cells: list[str], args: argparse.Namespace) -> None:
    """Compile the train steps of hivit_jax for each topology, and print a table.

    Compiles only the cells without a file, or with `args.again` all selected cells.
    """
    from benchmarks import compiled
    from hivit_jax.errors import ConfigError

    print(
        "| | images per chip | fits | GiB | GFLOP per image | HBM MB per image "
        "| bound: images/s per chip | HiViT-B / this model |\n" + "|---" * 8 + "|"
    )
    cells = [c for c in cells if CELLS[c][0] != "inference" and CELLS[c][2] == OURS]
    # HiViT-B comes first, because the other models are compared with it.
    cells.sort(key=lambda name: "HiViT-B" not in name)
    for chip in args.chip:
        folder, bounds = args.out / chip.replace(":", "_"), {}
        for name in cells:
            job, model, _ = CELLS[name]
            recipe, overrides = recipe_of(job, model)
            flags = [f"{key}={value}" for key, value in overrides.items()]
            report = None if args.again else read(folder, [name]).get(name)
            try:
                report = report or compiled.report_for(
                    recipe, chip, flags, args.workdir
                )
            except ConfigError as error:
                print(f"{chip} skipped: {error}")
                break
            write(folder, {name: report})
            if roofline := report["roofline"]:
                bounds[job, model] = roofline["images_per_second_per_chip"]
            title, hivit_bound = f"{model}, {job}, {chip}", bounds.get((job, "HiViT-B"))
            print(format_compiled(title, report, hivit_bound), flush=True)


def measure_all(cells: list[str], args: argparse.Namespace) -> None:
    """Measure all missing cells, print the table and draw the figure."""
    from hivit_jax.platforms import use_cpu

    set_defaults(args, GPU_BATCH)
    use_cpu()  # only in this process; the processes of the cells use the device
    if not importlib.util.find_spec("torch"):
        print("torch is not installed; only the cells of hivit_jax are measured")
        cells = [name for name in cells if CELLS[name][2] == OURS]
    folder = args.out / args.device
    done = {} if args.again else read(folder, cells)
    for job in JOBS:
        args.task = job
        names = [n for n in cells if CELLS[n][0] == job and n not in done]
        write(folder, measure(names, args) if names else {})
    results = read(folder, CELLS)
    print("\n".join([table(results), *paper_ratios(results)]))
    draw(results, args.out / f"{args.device}.png")


def run(argv: list[str] | None) -> None:
    """Parse flags and run the comparison."""
    from benchmarks.compiled import BATCH_OF_TOPOLOGY
    from hivit_jax.errors import ConfigError

    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    text = "select only cells whose names contain one of these texts"
    add("--only", nargs="+", default=[""], metavar="TEXT", help=text)
    add("--again", action="store_true", help="do not reuse the results of cells")
    add("--topologies", action="store_true", help="compile for other chips instead")
    text = "topologies to compile for; default: all"
    add(
        "--chip",
        nargs="+",
        choices=BATCH_OF_TOPOLOGY,
        default=list(BATCH_OF_TOPOLOGY),
        help=text,
    )
    text = "directory of compile reports; existing reports are reused"
    add("--workdir", type=Path, default=Path("runs/compiled"), help=text)
    add("--out", type=Path, default=RESULTS, help="directory of the results")
    add_flags(add, GPU_BATCH)
    args = parser.parse_args(argv)
    cells = [name for name in CELLS if any(text in name for text in args.only)]
    if not cells:
        known = ", ".join(CELLS)
        raise ConfigError(
            f"--only {args.only}: expected parts of the names of cells: {known}"
        )
    (compile_all if args.topologies else measure_all)(cells, args)


def main(argv: list[str] | None = None) -> int:
    """Entry point. Return the exit code."""
    from hivit_jax.errors import run_command

    return run_command(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
