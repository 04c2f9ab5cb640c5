"""Scores the rows of a plan, block by block, into shards on the disk: an interrupted prediction resumes from them.

    submission.csv.parts/
      plan.json                what is predicted, and how; scores of another plan are not used
      pass0-block0/*.parquet   shards of every process, some seconds each: rows, and their scores by the runs
      pass0-block0.parquet     a finished block, in the order of its rows; its shards are removed then
      pass0-block0.rows        of a stream, a digest of the block's rows

A pass is one model over the rows. A block is all of them, or of a stream some ten thousand.
"""

import json
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import PartialState
from datasets import Dataset

from vqa_sft.batch.control import SWAPPED, Control, control_of, donors_of
from vqa_sft.config.prediction import PredictionArguments
from vqa_sft.data.digests import digests_of
from vqa_sft.data.options import CANDIDATES, CLASS
from vqa_sft.errors import InputError, explains
from vqa_sft.files import whole, write_whole
from vqa_sft.inference import scorer as scorers
from vqa_sft.inference.plan import Pass, digest_rows
from vqa_sft.inference.rows import Rows, blocks_of, find_blank, guessed_rows
from vqa_sft.inference.scorer import Scorer
from vqa_sft.models import processes, scoring

EVERY_S = 20.0  # between two shards of a process
PLAN = "plan.json"
OURS = re.compile(r"plan\.json|pass\d+-block\d+|\d+-")  # how the names in the folder begin
SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("choice_logits", pa.list_(pa.list_(pa.float32()))),  # of each run
        ("agreement", pa.list_(pa.float32())),
        ("scale_logits", pa.list_(pa.list_(pa.list_(pa.float32())))),
    ]
)
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
    # Where nothing can be swapped that is said before weights are loaded.
    of_passes = [donors_of(each.examples) if is_main and each.images == SWAPPED else {} for each in passes]
    donors = processes.from_main(of_passes)
    for number, each in enumerate(passes):
        for block, examples in enumerate(blocks_of(each.examples)):
            folder = parts / f"pass{number}-block{block}"
            if args.streaming and is_main:  # whose images the plan does not know
                begin_block(folder, digest_rows(examples))
            if processes.from_main(is_finished(folder) if is_main else None):
                continue
            if group is not each.group:
                scorer = None  # its memory is needed
                group = each.group
                how: dict[str, Any] = {"most_choices": rows.num_choices, "compile_layers": args.compile_layers}
                views_a_row = args.views.num_of(rows.num_choices)
                scorer = scorers.load(group, examples=examples, views_a_row=views_a_row, **how)
            if args.streaming:
                found = find_blank(replace(rows.sources[0], examples=examples), args.on_bad_row) if is_main else {}
                blank = processes.from_main(found)
            control = control_of(each.images, examples, donors[number])
            _score_block(args, scorer, each, examples, folder, blank, control)
            if is_main:
                guessed = blank.keys() | guessed_rows(rows, examples)
                finish_block(folder, _describe_rows(examples, guessed, control))
            PartialState().wait_for_everyone()


def _score_block(
    args: PredictionArguments,
    scorer: Scorer,
    each: Pass,
    examples: Dataset,
    folder: Path,
    blank: Blank,
    control: Control | None,
) -> None:
    """Score the rows that are not scored yet. Rows of fewer than two choices are not shown to the model."""
    state = PartialState()
    collators = scorer.collators(args.views, blank, control)
    scales = args.views.scales
    unasked = {row for row, choices in enumerate(examples["choices"]) if len(choices) < 2}
    asked = examples.select([row for row in range(len(examples)) if row not in unasked]) if unasked else examples
    scorer.fill_store(collators, asked, args.batch_size, args.num_workers)
    done = processes.from_main(rows_done(folder) if state.is_main_process else None)
    packs_rows = bool(scorer.packer and scorer.packer.packs_rows)
    batches = scoring.plan_batches(examples, args.orders, args.batch_size, packs_rows=packs_rows)
    batches = [[row for row in batch if row not in unasked] for batch in batches]
    batches = [batch for batch in batches if not done.issuperset(batch)]
    scored = Shards(folder)
    if state.is_main_process and (left := sorted(unasked - done)):
        of_scales = [[0.0]] * len(scales) if len(scales) > 1 else []
        num_runs = len(each.numbers)
        # Their only choice is certain.
        of_row: Any = [[0.0]] * num_runs, [1.0] * num_runs, [of_scales] * num_runs
        scored.add(left, *([value] * len(left) for value in of_row))
    how: dict[str, Any] = {"average": args.average, "num_workers": args.num_workers, "runs": each.numbers}
    try:
        for batch in scoring.score_batches(scorer, examples, batches, collators, **how):
            scored.add(batch.rows, batch.choice_logits, batch.agreement, batch.scale_logits)
    finally:
        scored.flush()
    state.wait_for_everyone()


def _describe_rows(examples: Dataset, guessed: set[str], control: Control | None) -> pa.Table:
    """What the file of a block holds beside what the runs say."""
    ids = examples["id"][:]
    columns = {"id": ids, "answer": examples["answer"][:], "blanked": [row_id in guessed for row_id in ids]}
    columns |= {"digest": digests_of(examples), "choices": [texts or [""] for texts in examples["choices"]]}
    columns["changed"] = control.changed(examples) if control else [False] * len(ids)
    own = {CANDIDATES: pa.list_(pa.int32()), CLASS: pa.int32()}  # null where there are no classes
    has_classes = CANDIDATES in examples.column_names
    columns |= {name: pa.array(examples[name][:] if has_classes else [None] * len(ids), own[name]) for name in own}
    return pa.table(columns)


# --- On the disk ------------------------------------------------------------------------------------------------------


def open_parts(output: Path, plan: dict[str, Any]) -> tuple[Path, bool]:
    """The folder of the scores for `output`, and whether it holds some already. Called by one process.

    Scores of another plan, that is of another run or of other data, are removed.
    """
    folder = output.with_name(output.name + ".parts")
    text = json.dumps(plan | {"columns of shards": SCHEMA.names}, indent=1, ensure_ascii=False)
    with suppress(OSError, UnicodeDecodeError):
        if (folder / PLAN).read_text(encoding="utf-8") == text:
            return folder, any(folder.glob("*/*.parquet")) or any(folder.glob("*.parquet"))
    if folder.exists() and not (folder.is_dir() and all(OURS.match(path.name) for path in folder.iterdir())):
        raise InputError(f"{folder} is in the way and none of our folders. Move it, or name another --output.")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_whole(folder / PLAN, text)
    return folder, False


class Shards:
    """Those of one block, written by this process."""

    def __init__(self, folder: Path, every_s: float | None = None) -> None:
        self.folder, self.every_s = folder, EVERY_S if every_s is None else every_s
        self._waiting: list[tuple] = []
        self._written_s = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)

    def add(
        self,
        rows: Sequence[int],
        choice_logits: Sequence[Sequence[Sequence[float]]],
        agreement: Sequence[Sequence[float]],
        scale_logits: Sequence[Sequence[Sequence[Sequence[float]]]],
    ) -> None:
        """As in scoring.Scored."""
        self._waiting += zip(rows, choice_logits, agreement, scale_logits, strict=True)
        if time.monotonic() - self._written_s >= self.every_s:
            self.flush()

    def flush(self) -> None:
        """Write what waits, whole or not at all."""
        if self._waiting:
            columns = zip(*self._waiting, strict=True)
            columns = [pa.array(column, kind) for column, kind in zip(columns, SCHEMA.types, strict=True)]
            write_table(pa.Table.from_arrays(columns, schema=SCHEMA), self.folder / f"{uuid4().hex}.parquet")
        self._waiting, self._written_s = [], time.monotonic()


def write_table(table: pa.Table, path: Path) -> None:
    with whole(path) as unfinished:
        pq.write_table(table, unfinished)


def read_shards(folder: Path) -> pa.Table:
    """What all processes have written of a block, by row."""
    tables = []
    for path in sorted(folder.glob("*.parquet")):
        try:
            tables.append(pq.read_table(path, schema=SCHEMA))
        except (OSError, pa.ArrowException):  # a machine that lost power; its rows are scored again
            path.unlink()
    table = pa.concat_tables([SCHEMA.empty_table(), *tables])
    rows = table["row"].to_numpy()
    _, first = np.unique(rows, return_index=True)  # sorted by row
    return table.take(first)


def rows_done(folder: Path) -> set[int]:
    return set(read_shards(folder)["row"].to_pylist())


def finish_block(folder: Path, beside: pa.Table) -> None:
    """One file of all shards of a block and, `beside` them, the columns of its rows in their order. Raises InputError
    where shards are missing, as when processes do not see one disk."""
    table = read_shards(folder)
    if table["row"].to_pylist() != [*range(len(beside))]:
        raise InputError(
            f"{folder} holds {len(table):,} of {len(beside):,} rows: not every process writes where the first one "
            "reads. Give an --output on a disk that all of them see."
        )
    for name in SCHEMA.names[1:]:
        beside = beside.append_column(name, table[name])
    write_table(beside, folder.with_name(folder.name + ".parquet"))
    shutil.rmtree(folder, ignore_errors=True)


def begin_block(folder: Path, rows: str) -> None:
    """Remove what there is of a block of other rows; `rows` tells one from another."""
    known = folder.with_name(folder.name + ".rows")
    if known.is_file() and known.read_text(encoding="utf-8") == rows:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.with_name(folder.name + ".parquet").unlink(missing_ok=True)
    known.write_text(rows, encoding="utf-8")


def is_finished(folder: Path) -> bool:
    """Whether a block is in one file; a damaged one, of a machine that lost power, is removed and scored again."""
    path = folder.with_name(folder.name + ".parquet")
    try:
        pq.read_table(path)
    except FileNotFoundError:
        return False
    except (OSError, pa.ArrowException):
        path.unlink()
        return False
    return True
