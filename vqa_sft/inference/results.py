"""What a prediction ends with: the prediction file of each run, that of all together, and the submission. No torch.

    out.csv.parts/pass0-block0.parquet ...  ->  out.fold0.parquet, out.fold1.parquet, out.parquet, out.csv

Block by block, so that memory does not grow with the rows of a stream.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from vqa_sft.batch.control import ORIGINAL
from vqa_sft.config.prediction import PredictionArguments
from vqa_sft.data.answers import FORMATS
from vqa_sft.data.options import CANDIDATES, CLASS
from vqa_sft.errors import InputError, name_rows
from vqa_sft.files import check_output, whole
from vqa_sft.inference.rows import Rows
from vqa_sft.predictions.calibration import OUT_OF_FOLD, RUN, VALIDATION, read_calibration, views_key
from vqa_sft.predictions.check_file import CLASSES, IMAGES
from vqa_sft.predictions.ensemble import combine
from vqa_sft.predictions.file import Predictions, answers_as, read_predictions, write_predictions
from vqa_sft.predictions.style import Style
from vqa_sft.predictions.submission import write

if TYPE_CHECKING:  # it loads torch
    from vqa_sft.runs.folder import Run

# Of a block's file, beside the scores.
BLOCK_COLUMNS = ("id", "answer", "choices", "blanked", "digest", "changed", CANDIDATES, CLASS)
# What a run folder holds of its own, and what is there where it does.
OWN_FILES = {VALIDATION: RUN, OUT_OF_FOLD: "out_of_fold.json"}


def describe_run(args: PredictionArguments, run: "Run") -> dict[str, Any]:
    """The metadata of a run's prediction file, with the calibration that is known for it and these views, whatever
    images are shown. Raises InputError for a damaged one."""
    metadata = args.views.metadata
    about = {"base_model": run.base_model, "run": run.folder}
    if args.images != [ORIGINAL]:
        about[IMAGES] = args.images[0]
    # A temperature is fitted on validation rows as they were scored.
    uses_calibration = run.folder is not None and args.part == "all"
    found = read_calibration(run.folder, metadata) if uses_calibration else None
    return metadata | about | ({"calibration": found.as_dict} if found else {})


def style_of(args: PredictionArguments, rows: Rows) -> Style:
    """How the submission is written: as the template, else in the names and the answer format of the data, or those of
    training where the data have no answers. Raises InputError for a template of other rows."""
    answers = describe_answers(args, rows)
    if not args.template:
        return Style.plain(args.answer_format, rows.num_choices, answers)
    examples = rows.sources[0].examples
    counts, choices = list(map(len, examples["choices"])), examples["choices"][:]
    return Style.from_template(args.template, examples["id"][:], counts, args.answer_format, choices, answers)


def describe_answers(args: PredictionArguments, rows: Rows) -> dict[str, Any]:
    """The names and the answer format of a submission: the data's own, or those of training where it has no answers."""
    columns, trained = rows.sources[0].columns, rows.trained
    how: dict[str, Any] = {"id": columns.id or "id"}
    how["answer"] = columns.answer or (trained and trained.answer) or "answer"
    if columns.answer_format is None and trained is not None:  # no row has an answer
        how |= {"answer_format": trained.answer_format, "answers_are_upper": trained.answers_are_upper}
    if rows.sources[0].classes is not None:
        how["answer_format"] = "text"  # the name of a class
    if args.answer_format in FORMATS:
        how["answer_format"] = args.answer_format
    return answers_as(replace(columns, **how))


def write_results(
    args: PredictionArguments,
    rows: Rows,
    style: Style,
    about: Sequence[dict[str, Any]],
    parts: Path,
    passes: Sequence[int],
) -> str:
    """Write all files of the passes with these numbers, each whole or not at all; what was done, in words. `about`
    holds the metadata of each run."""
    blocks = _blocks_of_runs(parts, passes)
    if args.part == "validation":
        blocks = _block_of_parts(parts, passes, rows.ids)
        split = "validation" if len(about) == 1 else "out-of-fold"
        about = [metadata | {"split": split} for metadata in about]
    pieces: dict[Path, list[Path]] = {}  # of each file, one of each block
    num_rows, blanked = 0, []
    for block in blocks:
        for path, save in _files_of(block, Path(args.output), about, style, args.average_runs):
            of_file = pieces.setdefault(path, [])
            of_file.append(parts / f"{len(of_file)}-{path.name}")
            save(of_file[-1])
        num_rows += len(block.ids)
        blanked += [row_id for row_id, is_blank in zip(block.ids, block.blanked, strict=True) if is_blank]
    for path, of_file in pieces.items():
        _join_files(of_file, path)
    lines = [f"Wrote {num_rows:,} answers to {args.output}"]
    if args.images != [ORIGINAL]:
        lines[0] += f", with images {args.images[0]}: not to be submitted"
    if blanked:
        lines.append(f"Guessed, because something of them could not be used: {name_rows(blanked, num_rows)}")
    if CLASSES in about[0] and args.part == "all":
        files = _files_to_fuse(Path(args.output), [metadata["run"] for metadata in about])
        lines.append(f"Probabilities of all classes: vqa-sft fuse {' '.join(map(str, files))} --output fused.parquet")
    bare = [metadata for metadata in about if "calibration" not in metadata and metadata["run"] is not None]
    if bare and args.part == "all":
        lines.append(
            f"Probabilities are as they were scored: no temperature is known of {', '.join(m['run'] for m in bare)} "
            f"for {views_key(bare[0])}. To find one: --part validation with the same views, then vqa-sft calibrate."
        )
    return "\n".join(lines)


def _files_of(
    block: "Block", output: Path, about: Sequence[dict[str, Any]], style: Style, average_runs: str
) -> Iterator[tuple[Path, Callable[[Path], None]]]:
    """The files of a block of rows, and what writes each to a path. Of several runs the metadata of all together are
    those that they share, and the folder that holds them all."""
    folders, together = [metadata["run"] for metadata in about], dict(about[0])
    alone = [
        Predictions(
            block.ids,
            logits,
            block.answers,
            metadata,
            block.blanked,
            agreement,
            [*filter(None, scales)],
            block.digests,
            block.changed if metadata.get(IMAGES) else [],
            block.candidates if CLASSES in metadata else [],
            block.labels if CLASSES in metadata else [],
        )
        for (logits, agreement, scales), metadata in zip(block.of_runs, about, strict=False)
    ]
    mean = alone[0]
    if len(about) > 1:
        together["run"] = _folder_of(folders)
        together.pop("calibration", None)  # each run has its own, and all together none
    if len(alone) > 1:
        mean = combine(alone, folders, [1 / len(folders)] * len(folders), average_runs)
        for folder, predictions in zip(folders, alone, strict=True):
            yield path_of_run(output, folder, folders), partial(write_predictions, predictions=predictions)
    mean = replace(mean, metadata=mean.metadata | together)
    yield output.with_suffix(".parquet"), partial(write_predictions, predictions=mean)
    yield output, partial(write, predictions=mean, style=style, choices=block.choices)


def _folder_of(folders: Sequence[str]) -> str:
    """The folder that holds several runs."""
    return os.path.commonpath(list(map(os.path.abspath, folders)))


def _files_to_fuse(output: Path, folders: Sequence[str]) -> list[Path]:
    """The prediction file of all runs where their held-out rows are in one file too; else that of each."""
    if len(folders) == 1 or (Path(_folder_of(folders)) / OUT_OF_FOLD).is_file():
        return [output.with_suffix(".parquet")]
    return [path_of_run(output, folder, folders) for folder in folders]


@dataclass
class Block:
    """Rows in the order of the data, and what each run says of them: choice logits, agreement and scale logits of every
    row."""

    ids: list[str]
    answers: list[int | None]
    choices: list[list[str]]
    blanked: list[bool]
    digests: list[str]
    changed: list[bool]
    candidates: list[list[int] | None]
    labels: list[int | None]
    of_runs: list[tuple[Any, Any, Any]]


def _blocks_of_runs(parts: Path, passes: Sequence[int]) -> Iterator[Block]:
    """The same rows scored by the runs of all passes, in the order of the passes."""
    for tables in zip(*(_read_blocks(parts, number) for number in passes), strict=True):
        yield _block(tables[0], [of_run for table in tables for of_run in _of_runs(table)])


def _block_of_parts(parts: Path, passes: Sequence[int], ids: Sequence[str]) -> Iterator[Block]:
    """All rows at once, each scored in one of the passes, in the order of `ids`."""
    table = pa.concat_tables([table for number in passes for table in _read_blocks(parts, number)])
    place = {row_id: number for number, row_id in enumerate(ids)}
    found = table["id"].to_pylist()
    table = table.take(sorted(range(len(found)), key=lambda row: place[found[row]]))
    yield _block(table, _of_runs(table))


def _block(table: pa.Table, of_runs: list[tuple[Any, Any, Any]]) -> Block:
    columns: dict[str, Any] = {name: table[name].to_pylist() for name in BLOCK_COLUMNS}
    return Block(*columns.values(), of_runs)  # type: ignore[call-arg]


def _of_runs(table: pa.Table) -> list[tuple[Any, Any, Any]]:
    columns = (table[name].to_pylist() for name in ("choice_logits", "agreement", "scale_logits"))
    return list(zip(*(zip(*column, strict=True) for column in columns), strict=True))


def _read_blocks(folder: Path, num_pass: int) -> Iterator[pa.Table]:
    """The whole blocks of a pass, in their order."""
    number = 0
    while (path := folder / f"pass{num_pass}-block{number}.parquet").is_file():
        yield pq.read_table(path)
        number += 1


def _join_files(parts: Sequence[Path], output: Path) -> None:
    """One Parquet or text file of several, whole or not at all; they are removed. Texts have one header line each."""
    with whole(output) as unfinished:
        if output.suffix == ".parquet":
            with pq.ParquetWriter(unfinished, pq.read_schema(parts[0])) as writer:
                for part in parts:
                    writer.write_table(pq.read_table(part))
        else:
            with unfinished.open("wb") as file:
                for number, part in enumerate(parts):
                    with part.open("rb") as lines:
                        header = lines.readline()
                        file.write(header if number == 0 else b"")
                        shutil.copyfileobj(lines, file)
    for part in parts:
        part.unlink()


def check_outputs(args: PredictionArguments, runs: Sequence["Run"]) -> None:
    """Raises InputError where a file cannot be written, or would replace an input, a run's own predictions, or what we
    did not write."""
    output, folders = Path(args.output), [run.folder for run in runs]
    parquet = output.with_suffix(".parquet") if output.name else output
    if parquet.name in OWN_FILES and (output.parent / OWN_FILES[parquet.name]).is_file():
        raise InputError(f"{parquet} holds the run's own validation predictions. Name another --output.")
    guard: dict[str, Any] = {
        "reads": [args.data, args.template],
        "is_ours": lambda _: _is_ours(parquet),
        "kind": "submission of ours",
    }
    check_output(output, suffix=".csv", **guard)
    check_output(parquet, suffix=".parquet", **guard)
    for path in [path_of_run(output, folder, folders) for folder in folders] if len(folders) > 1 else []:
        check_output(path, suffix=".parquet", is_ours=_is_ours, kind="prediction file")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise InputError(f"{output} cannot be written: {error}.") from error


def path_of_run(output: Path, folder: str, folders: Sequence[str]) -> Path:
    """The prediction file of one of several runs: out.fold0.parquet, as short as tells them apart."""
    parts = [Path(other).resolve().parts for other in folders]
    length = next(n for n in range(1, 100) if len({"_".join(own[-n:]) for own in parts}) == len(parts))
    return output.with_name(f"{output.stem}.{'_'.join(Path(folder).resolve().parts[-length:])}.parquet")


def _is_ours(parquet: Path) -> bool:
    try:
        return bool(read_predictions(parquet).metadata)
    except InputError:
        return False
