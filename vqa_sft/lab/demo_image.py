"""Draws docs/images/demo.png: three test questions of the demo whose answer the fine-tuning changed.

make demo
python -m vqa_sft.lab.demo_image --output docs/images/demo.png
"""

import argparse
import csv
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

from vqa_sft.predictions.file import read_predictions
from vqa_sft.questions.letters import LETTERS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BASE, TUNED = "#9aa5b1", "#2f6fb0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/numbers"))
    parser.add_argument("--base", default="runs/demo_base/submission.parquet")
    parser.add_argument("--tuned", default="runs/demo/submission.parquet")
    parser.add_argument("--output", default="docs/images/demo.png")
    args = parser.parse_args()
    rows = {row["id"]: row for row in _read(args.data / "test.csv")}
    answers = {row["id"]: row["answer"] for row in _read(args.data / "test_answers.csv")}
    base, tuned = probs_of(args.base), probs_of(args.tuned)
    right = {
        name: {i for i in rows if LETTERS[probs[i].argmax()].lower() == answers[i]}
        for name, probs in (("base", base), ("tuned", tuned))
    }
    chosen = sorted(right["tuned"] - right["base"])[:3]
    figure, axes = plt.subplots(1, 6, figsize=(10, 2.1), width_ratios=[1, 1.5] * 3, dpi=150)
    for image_axis, bar_axis, row_id in zip(axes[::2], axes[1::2], chosen, strict=True):
        row = rows[row_id]
        image_axis.imshow(Image.open(args.data / row["path"]), cmap="gray", interpolation="nearest")
        image_axis.axis("off")
        letters = [letter for letter in "abcd" if row.get(letter)]
        places = np.arange(len(letters))
        bar_axis.barh(places - 0.18, base[row_id], 0.34, color=BASE, label="base")
        bar_axis.barh(places + 0.18, tuned[row_id], 0.34, color=TUNED, label="fine-tuned")
        names = [
            f"{letter.upper()}  {row[letter]}" + ("  ✓" if letter == answers[row_id] else "") for letter in letters
        ]
        bar_axis.set(yticks=places, yticklabels=names, xlim=(0, 1), xticks=[0, 0.5, 1])
        image_axis.set_title(textwrap.fill(row["question"], 16), fontsize=8, loc="left")
        bar_axis.invert_yaxis()
        bar_axis.spines[["top", "right"]].set_visible(False)
        bar_axis.tick_params(labelsize=8, length=2)
    figure.legend(*axes[1].get_legend_handles_labels(), fontsize=8, frameon=False, loc="upper right", ncols=2)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    figure.savefig(args.output)
    num_wrong = len(rows) - len(right["base"])
    print(f"Wrote {args.output}: rows {', '.join(chosen)}; the base has {num_wrong} of {len(rows)} wrong.")


def probs_of(path: str) -> dict[str, np.ndarray]:
    """Row id -> probabilities of its choices (C,), at the temperature of the file."""
    predictions = read_predictions(path)
    return dict(zip(predictions.ids, predictions.probs, strict=True))


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    main()
