"""What a prediction ends with: the prediction file of each run, that of all together, and the submission. No torch.

    out.csv.parts/pass0-block0.parquet ...  ->  out.fold0.parquet, out.fold1.parquet, out.parquet, out.csv

Block by block (shards.py), so that memory does not grow with the rows of a stream.
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from vqa_sft.errors import InputError
from vqa_sft.inference import shards
from vqa_sft.predictions.calibration import OUT_OF_FOLD, RUN, VALIDATION
from vqa_sft.predictions.ensemble import combine
from vqa_sft.predictions.file import Predictions, read_predictions, write_predictions
from vqa_sft.predictions.style import Style
from vqa_sft.predictions.submission import write

# What a run folder holds of its own, and what is there where it does.
OWN_FILES = {VALIDATION: RUN, OUT_OF_FOLD: "out_of_fold.json"}


@dataclass
class Block:
    """Rows in the order of the data, and what each run says of them: choice logits, agreement and scale logits of every
    row."""

    COLUMNS: ClassVar = ("id", "answer", "choices", "blanked", "digest")  # of its file, beside what the runs say

    ids: list[str]
    answers: list[int | None]
    choices: list[list[str]]
    blanked: list[bool]
    digests: list[str]
    of_runs: list[tuple[Sequence, Sequence, Sequence]]


def blocks_of_runs(parts: Path, num_passes: int) -> Iterator[Block]:
    """The same rows scored by the runs of all passes, which stand in the order of the passes."""
    for tables in zip(*(shards.read_blocks(parts, number) for number in range(num_passes)), strict=True):
        yield _block(tables[0], [of_run for table in tables for of_run in _of_runs(table)])


def block_of_parts(parts: Path, num_passes: int, ids: Sequence[str]) -> Iterator[Block]:
    """All rows at once, each scored in one of the passes, in the order of `ids`."""
    table = pa.concat_tables([table for i in range(num_passes) for table in shards.read_blocks(parts, i)])
    place = {row_id: number for number, row_id in enumerate(ids)}
    found = table["id"].to_pylist()
    table = table.take(sorted(range(len(found)), key=lambda row: place[found[row]]))
    yield _block(table, _of_runs(table))


def _block(table: pa.Table, of_runs: list[tuple[Sequence, Sequence, Sequence]]) -> Block:
    return Block(*(table[name].to_pylist() for name in Block.COLUMNS), of_runs)


def _of_runs(table: pa.Table) -> list[tuple[Sequence, Sequence, Sequence]]:
    columns = (table[name].to_pylist() for name in ("choice_logits", "agreement", "scale_logits"))
    return list(zip(*(zip(*column, strict=True) for column in columns), strict=True))


def write_results(
    output: Path, parts: Path, blocks: Iterator[Block], about: Mapping[str, dict], style: Style, average_runs: str
) -> tuple[int, list[str]]:
    """Write all files, each whole or not at all; how many rows there are, and which were answered without an image.

    `about` holds the metadata of each run; of all together those that they share, and the folder that holds them all.
    """
    folders = [*about]
    together = dict(about[folders[0]])
    if len(folders) > 1:
        together["run"] = os.path.commonpath(list(map(os.path.abspath, folders)))
        together.pop("calibration", None)  # each run has its own, and all together none
    written: dict[Path, list[Path]] = {}

    def put(path: Path, save: Callable, *what: Any) -> None:
        part = parts / f"{len(written.setdefault(path, []))}-{path.name}"
        save(part, *what)
        written[path].append(part)

    num_rows, blanked = 0, []
    for block in blocks:
        alone = [
            Predictions(
                *(block.ids, logits, block.answers, metadata, block.blanked, agreement, [*filter(None, scales)]),
                block.digests,
            )
            for (logits, agreement, scales), metadata in zip(block.of_runs, about.values(), strict=False)
        ]
        mean = alone[0]
        if len(alone) > 1:
            mean = combine(alone, folders, [1 / len(folders)] * len(folders), average_runs)
            for folder, predictions in zip(folders, alone, strict=True):
                put(path_of_run(output, folder, folders), write_predictions, predictions)
        mean = replace(mean, metadata=mean.metadata | together)
        put(output.with_suffix(".parquet"), write_predictions, mean)
        put(output, write, mean, style, block.choices)
        num_rows += len(block.ids)
        blanked += [row_id for row_id, is_blank in zip(block.ids, block.blanked, strict=True) if is_blank]
    for path, pieces in written.items():
        shards.join_files(pieces, path)
    return num_rows, blanked


def check_outputs(output: Path, inputs: Mapping[str, str | None], folders: Sequence[str]) -> None:
    """Raises InputError where a file cannot be written, or would replace an input (`--option` -> file), a run's own
    predictions, or what we did not write."""
    if output.suffix != ".csv":
        raise InputError(f"--output must end in .csv; got {output if str(output) != '.' else 'nothing'}.")
    for option, path in inputs.items():
        if path is not None and output.resolve() == Path(path).resolve():
            raise InputError(f"--output is {option} ({path}). Name another --output.")
    if output.is_dir():
        raise InputError(f"--output {output} is a folder. Name a file.")
    parquet = output.with_suffix(".parquet")
    if parquet.name in OWN_FILES and (output.parent / OWN_FILES[parquet.name]).is_file():
        raise InputError(f"{parquet} holds the run's own validation predictions. Name another --output.")
    if output.exists() and not _is_ours(parquet) or parquet.exists() and not _is_ours(parquet):
        raise InputError(f"{output} or {parquet} exists and is none of our submissions. Name another --output.")
    for path in [path_of_run(output, folder, folders) for folder in folders] * (len(folders) > 1):
        if path.exists() and not _is_ours(path):
            raise InputError(f"{path} exists and is no prediction file. Name another --output.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise InputError(f"{output} cannot be written: {error}.") from error


def path_of_run(output: Path, folder: str, folders: Sequence[str]) -> Path:
    """Where the prediction file of one of several runs stands: out.fold0.parquet, as short as tells them apart."""
    parts = [Path(other).resolve().parts for other in folders]
    length = next(n for n in range(1, 100) if len({"_".join(own[-n:]) for own in parts}) == len(parts))
    return output.with_name(f"{output.stem}.{'_'.join(Path(folder).resolve().parts[-length:])}.parquet")


def _is_ours(parquet: Path) -> bool:
    try:
        return bool(read_predictions(parquet).metadata)
    except InputError:
        return False
