"""What `vqa-sft blind` reads beside the scores: what training answers alone make of the rows. No torch."""

from collections import Counter
from typing import TYPE_CHECKING

from datasets import Dataset

from vqa_sft.config.prediction import PredictionArguments
from vqa_sft.config.training import RecipeArguments
from vqa_sft.data.examples import read_examples
from vqa_sft.data.split import TRAIN, VALIDATION, read_parts, select
from vqa_sft.errors import InputError
from vqa_sft.inference.rows import Rows, sources_of

if TYPE_CHECKING:  # it loads torch
    from vqa_sft.runs.folder import Run


def check_answers(rows: Rows) -> None:
    """Raises InputError where no row has an answer."""
    if all(answer is None for examples in rows.of_run for answer in examples["answer"]):
        raise InputError(f"{rows.sources[0].name} has no answers, so there is no accuracy. Give rows with answers.")


def most_frequent_answers(args: PredictionArguments, runs: list["Run"], rows: Rows) -> dict[str, int]:
    """Row id -> the choice whose text was the answer most often in training, the first of equal ones. Empty where a run
    was trained on nothing that can be read now."""
    found: dict[str, int] = {}
    for run, examples in zip(runs, rows.of_run, strict=True):
        try:
            trained = _trained_on(args, run)
        except InputError:  # moved, or changed: a baseline is not worth an error
            return {}
        if trained is None:
            return {}
        pairs = zip(trained["choices"], trained["answer"], strict=True)
        counts = Counter(_plain(choices[answer]) for choices, answer in pairs if answer is not None)
        for row in examples.select_columns(["id", "choices"]):
            of_row = [counts[_plain(text)] for text in row["choices"]]
            found.setdefault(row["id"], of_row.index(max(of_row)) if of_row else 0)
    return found


def _trained_on(args: PredictionArguments, run: "Run") -> Dataset | None:
    if run.folder is None:
        return None
    own = RecipeArguments.of_run(run.recipe)
    named = sources_of(args if args.part == VALIDATION else None, own, run)
    if own.streaming:
        return None
    loaded = [read_examples(source, options) for source, options in named]
    return select(loaded, read_parts(run.folder, loaded, part=VALIDATION), TRAIN)


def _plain(text: str) -> str:
    return text.strip().casefold()
