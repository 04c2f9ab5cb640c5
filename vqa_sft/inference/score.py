"""Scores the rows of a plan, block by block, into shards on the disk; what is there already is not scored again."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from accelerate import PartialState
from datasets import Dataset

from vqa_sft.config.prediction import PredictionArguments
from vqa_sft.data.digests import digests_of
from vqa_sft.errors import explains
from vqa_sft.inference import scorer as scorers, shards
from vqa_sft.inference.plan import Pass, digest_rows
from vqa_sft.inference.rows import Rows, blocks_of, find_blank, guessed_rows
from vqa_sft.inference.scorer import Scorer
from vqa_sft.models import processes, scoring

Blank = Mapping[str, tuple[int, ...]]  # row id -> positions of its images that cannot be used


def join_processes(use_cpu: bool) -> None:
    """Let the processes of a launch know each other. Raises InputError."""
    processes.check_processes(use_cpu)
    with explains((ValueError, RuntimeError), "the processes do not find each other: use accelerate launch"):
        PartialState(cpu=use_cpu)


def score_passes(args: PredictionArguments, rows: Rows, passes: list[Pass], parts: Path, blank: Blank) -> None:
    """Score every pass into `parts`, one model after another. Called by every process. `blank` are the images that
    cannot be used, as far as they are known before: those of a stream are looked at block by block."""
    is_main = PartialState().is_main_process
    scorer = group = None
    for number, each in enumerate(passes):
        for block, examples in enumerate(blocks_of(each.examples)):
            folder = parts / f"pass{number}-block{block}"
            if args.streaming and is_main:  # whose images the plan does not know
                shards.begin_block(folder, digest_rows(examples))
            if processes.from_main(shards.is_finished(folder) if is_main else None):
                continue
            if group is not each.group:
                scorer = None  # its memory is needed
                group, how = each.group, {"most_choices": rows.num_choices, "compile_layers": args.compile_layers}
                views_a_row = args.views.num_of(rows.num_choices)
                scorer = scorers.load(group, examples=examples, views_a_row=views_a_row, **how)
            if args.streaming:
                found = find_blank(replace(rows.sources[0], examples=examples), args.on_bad_row) if is_main else {}
                blank = processes.from_main(found)
            _score_block(args, scorer, each, examples, folder, blank)
            if is_main:
                shards.finish_block(folder, _describe_rows(examples, blank.keys() | guessed_rows(rows, examples)))
            PartialState().wait_for_everyone()


def _score_block(
    args: PredictionArguments, scorer: Scorer, each: Pass, examples: Dataset, folder: Path, blank: Blank
) -> None:
    """Score the rows that are not scored yet. Rows of fewer than two choices are not shown to the model."""
    state = PartialState()
    collators = scorer.collators(args.orders, args.scales, blank)
    unasked = {row for row, choices in enumerate(examples["choices"]) if len(choices) < 2}
    asked = examples.select([row for row in range(len(examples)) if row not in unasked]) if unasked else examples
    scorer.fill_store(collators, asked, args.batch_size, args.num_workers)
    done = processes.from_main(shards.rows_done(folder) if state.is_main_process else None)
    batches = scoring.plan_batches(examples, args.orders, args.batch_size)
    batches = [[row for row in batch if row not in unasked] for batch in batches]
    batches = [batch for batch in batches if not done.issuperset(batch)]
    scored = shards.Shards(folder)
    if state.is_main_process and (left := sorted(unasked - done)):
        of_scales = [[0.0]] * len(args.scales) if len(args.scales) > 1 else []
        num_runs = len(each.numbers)
        of_row = [[0.0]] * num_runs, [1.0] * num_runs, [of_scales] * num_runs  # their only choice is certain
        scored.add(left, *([value] * len(left) for value in of_row))
    how: dict[str, Any] = {"average": args.average, "num_workers": args.num_workers, "runs": each.numbers}
    try:
        for batch in scoring.score_batches(scorer, examples, batches, collators, **how):
            scored.add(batch.rows, batch.choice_logits, batch.agreement, batch.scale_logits)
    finally:
        scored.flush()
    state.wait_for_everyone()


def _describe_rows(examples: Dataset, guessed: set[str]) -> pa.Table:
    """What the file of a block holds beside what the runs say."""
    ids = examples["id"][:]
    columns = {"id": ids, "answer": examples["answer"][:], "blanked": [row_id in guessed for row_id in ids]}
    columns |= {"digest": digests_of(examples), "choices": [texts or [""] for texts in examples["choices"]]}
    return pa.table(columns)
