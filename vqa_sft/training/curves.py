"""What a run logs, in its folder and without any tracker: log.csv, a line a step, and log.png."""

import csv
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from vqa_sft.files import whole
from vqa_sft.runs.folder import LOG, PLOT

# The left panel and the right one.
PANELS = (("loss", "eval_loss", "eval_average_loss"), ("accuracy", "eval_accuracy", "eval_average_accuracy"))

STYLES: tuple[dict[str, Any], ...] = ({"alpha": 0.6}, {"marker": "o"}, {"marker": "s"})


class WriteCurves(TrainerCallback):
    """Writes log.csv whenever something is logged, from the beginning of the run also after a resume, and log.png when
    the training ends."""

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            write_log(Path(args.output_dir) / LOG, state.log_history)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            draw(Path(args.output_dir) / PLOT, by_step(state.log_history))


def by_step(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """One mapping for every step, though training and evaluations log it apart."""
    steps: dict[float, dict[str, float]] = {}
    for entry in history:
        steps.setdefault(entry["step"], {"step": entry["step"]}).update(entry)
    return [steps[step] for step in sorted(steps)]


def write_log(path: Path, history: list[dict[str, float]]) -> None:
    steps = by_step(history)
    names = ["step", "epoch"] + sorted({name for entry in steps for name in entry} - {"step", "epoch"})
    with whole(path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(steps)


def draw(path: Path, steps: list[dict[str, float]]) -> None:
    """Loss on the left, accuracy on the right; nothing where nothing was logged."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    has_lines = False
    for axes, names in zip(figure.subplots(1, 2), PANELS, strict=True):
        for name, style in zip(names, STYLES, strict=True):
            points = [(entry["step"], entry[name]) for entry in steps if name in entry]
            if points:
                label = {"eval": "validation"}.get(name.split("_")[0], "training")
                label += ", average" if "average" in name else ""
                axes.plot(*zip(*points, strict=True), label=label, **style)
                has_lines = True
        axes.set_xlabel("step")
        axes.set_ylabel(names[0])
        if axes.lines:
            axes.legend()
    if has_lines:
        with whole(path) as unfinished:
            figure.savefig(unfinished, dpi=120, format=path.suffix[1:])
