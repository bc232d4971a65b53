"""Cells of `benchmarks.paper`, and the tables and the figure of their results."""

from pathlib import Path
from typing import Any

from benchmarks.peer_rows import OURS

PYTORCH = "torch"
# Pretraining speed of HiViT-B divided by the speed of Swin-B with SimMIM, in the paper.
PAPER_RATIO = 1.9
JOBS = ("pretrain", "classify", "inference")
# Model -> recipes of pretraining and finetuning ("": not finetuned).
RECIPES_OF_MODELS = {
    "HiViT-T": ("mae_tiny", "finetune:tiny"),
    "HiViT-S": ("mae_small", "finetune:small"),
    "HiViT-B": ("mae_base", "finetune:base"),
    "ViT-B": ("mae_vit:base", "finetune_vit:base"),
    "Swin-B": ("simmim_swin:base", "finetune_swin:base"),
    "Swin-B 192": ("simmim_swin:base", ""),
}
CELLS = {
    f"{job} {model} {program}": (job, model, program)
    for job in JOBS
    for model in RECIPES_OF_MODELS
    for program in (OURS, PYTORCH)
    if job == "pretrain" or RECIPES_OF_MODELS[model][1]
}
Results = dict[str, dict[str, Any]]  # name of a cell -> content of its file


def ratio(results: Results, numerator: str, denominator: str) -> float | None:
    """Return the ratio of images per second of two cells.

    Returns None unless both cells were measured in the same run, interleaved.
    """
    a, b = results.get(numerator), results.get(denominator)
    if a is None or b is None or a["run"] != b["run"]:
        return None
    return a["images_per_second"] / b["images_per_second"]


def table(results: Results) -> str:
    """Format a row per model and job: throughput, ratios, memory and utilization."""

    def format_number(value: Any, format_spec: str, scale: float = 1.0) -> str:
        return "" if value is None else f"{value * scale:{format_spec}}"

    lines = [
        "| | images/s | images/s, PyTorch | hivit_jax / PyTorch | HiViT-B / this model "
        "| HiViT-B / this model, PyTorch | GiB | GiB, PyTorch | MFU | MFU, PyTorch |",
        "|---" * 10 + "|",
    ]
    for row in dict.fromkeys(name.rpartition(" ")[0] for name in results):
        job, base = row.split()[0], f"{row.split()[0]} HiViT-B"
        pair = [results.get(f"{row} {program}", {}) for program in (OURS, PYTORCH)]
        columns = [format_number(x.get("images_per_second"), ",.2f") for x in pair]
        columns += [
            format_number(ratio(results, f"{row} {OURS}", f"{row} {PYTORCH}"), ".2f")
        ]
        columns += [
            format_number(
                ratio(results, f"{base} {program}", f"{row} {program}"), ".2f"
            )
            for program in (OURS, PYTORCH)
        ]
        columns += [
            format_number(x.get("peak_memory_bytes"), ".2f", 2**-30) for x in pair
        ]
        columns += [format_number(x.get("model_flop_utilization"), ".1%") for x in pair]
        lines.append(
            f"| {row.removeprefix(job + ' ')}, {job} | {' | '.join(columns)} |"
        )
    return "\n".join(lines)


def paper_ratios(results: Results) -> list[str]:
    """Return a line per program and baseline: HiViT-B's relative pretraining speed."""
    lines = []
    for program in (OURS, PYTORCH):
        for model in ("Swin-B", "Swin-B 192", "ViT-B"):
            names = (f"pretrain {m} {program}" for m in ("HiViT-B", model))
            found = ratio(results, *names)
            if found is not None:
                paper = (
                    f" (the paper: {PAPER_RATIO})" if model.startswith("Swin") else ""
                )
                line = f"{program}: HiViT-B / {model}, pretraining: {found:.2f}"
                lines.append(line + paper)
    return lines


def draw(results: Results, path: Path) -> None:
    """Draw throughput relative to HiViT-B in hivit_jax, one panel per job."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.5), layout="constrained")
    for job, axes in zip(JOBS, figure.subplots(1, 3), strict=True):
        models = [m for m in RECIPES_OF_MODELS if f"{job} {m} {OURS}" in results]
        for shift, program in ((-0.2, OURS), (0.2, PYTORCH)):
            reference = f"{job} HiViT-B {OURS}"
            cells = [f"{job} {model} {program}" for model in models]
            heights = [ratio(results, cell, reference) for cell in cells]
            positions = [index + shift for index in range(len(models))]
            axes.bar(positions, [h or 0 for h in heights], 0.4, label=program)
        axes.set_xticks(range(len(models)), models, rotation=30)
        axes.set_title(job)
    figure.axes[0].set_ylabel("images/s, HiViT-B = 1")
    figure.axes[0].legend()
    figure.savefig(path)


def format_compiled(
    name: str, report: dict[str, Any], hivit_bound: float | None
) -> str:
    """Format a row of the table of compiled cells.

    Args:
      hivit_bound: bound on HiViT-B's images per second for this job and chip; None:
        unknown.
    """
    total, roofline = report["hbm_bytes_per_device"]["total"], report["roofline"]
    line = f"| {name} | {report['batch_per_device']} "
    line += f"| {'yes' if report['fits'] else 'no'} | {(total or 0) / 2**30:.2f} "
    if not roofline:
        return line + 4 * "| " + "|"
    bound = roofline["images_per_second_per_chip"]
    line += f"| {report['flops_per_image'] / 1e9:.1f} "
    line += f"| {report['hbm_bytes_per_image'] / 1e6:,.0f} "
    line += f"| {bound:,.0f}, {roofline['limited_by']} "
    return line + (f"| {hivit_bound / bound:.2f} |" if hivit_bound else "| |")
