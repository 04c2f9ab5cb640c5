"""Whether training had the images of the rows of a page, or nearly the same: accuracy there says little of new ones.

It is what `vqa-sft check --test` finds, where a run that made the predictions is here. No torch.
"""

from collections.abc import Sequence
from pathlib import Path

from vqa_sft.config.training import RecipeArguments
from vqa_sft.data.duplicates import rows_in_training
from vqa_sft.data.examples import Loaded
from vqa_sft.data.scan import scan_images
from vqa_sft.data.split import ROWS, TRAIN, VALIDATION, read_parts
from vqa_sft.errors import InputError
from vqa_sft.report.report_inputs import Data, Inputs, find_places, read_sources, runs_in
from vqa_sft.runs.folder import read_run

MOST_ROWS = 20_000  # of the page and of training, whose images are opened, unless some check did, and compared


def add_leakage(inputs: Inputs) -> None:
    """Fill `in_training`, and note the result. There is no note for rows without images, of a run that is not
    here, of one that was trained on a stream, and of one whose recipe asks that no image be looked at."""
    data, folder = inputs.data, _find_run(inputs)
    if data is None or folder is None or not any(loaded.columns.image for loaded in data.sources):
        return
    try:
        recipe = RecipeArguments.of_run(read_run(runs_in(folder)[0]).recipe)
        if recipe.streaming or not recipe.check_images or not (runs_in(folder)[0] / ROWS).is_file():
            return
        distance = recipe.duplicate_distance
        if data.run != folder or recipe.validation_data or recipe.folds_file:
            _compare(inputs, data, folder, distance)  # else the split kept such images together
    except InputError as error:
        inputs.notes.append(f"Images of these rows and of training were not compared: {error}")
        return
    nearly = "" if distance is None else ", nor nearly the same one"
    if found := inputs.in_training.values():
        same = sum(bits == 0 for bits, _ in found)
        inputs.notes.append(
            f"Beware: {folder} was trained with the image of {same:,} of these {len(inputs.ids):,} rows, and with "
            f"nearly the image of {len(found) - same:,}. Accuracy on them says little of new images."
        )
    else:
        inputs.notes.append(f"{folder} was trained with no image of these rows{nearly}.")


def _find_run(inputs: Inputs) -> Path | None:
    """The folder of the first run, or of its folds, that made one of the inputs and is here."""
    for one in inputs.inputs:
        named = one.predictions.metadata.get("run")
        folder = one.folder or (Path(named) if isinstance(named, str) else None)
        if folder is not None and runs_in(folder):
            return folder
    return None


def _compare(inputs: Inputs, data: Data, folder: Path, distance: int | None) -> None:
    """Each row with the training rows of every run, but a row that one fold validated on not with those of the other
    folds."""
    own = data.run == folder
    sources = data.sources if own else read_sources(folder)
    if (num_rows := len(data.places) + len(sources[0].examples)) > MOST_ROWS:
        raise InputError(f"they are {num_rows:,} rows. `vqa-sft check RECIPE --test DATA` compares them.")
    parts = [_read_parts(run, sources) for run in runs_in(folder)]
    place_of = {} if own else find_places(sources)
    # Without digests an id alone does not tell a training row from a test row.
    keys = zip(inputs.ids, inputs.inputs[0].predictions.digests or [""] * len(inputs.ids), strict=True)
    places = data.places if own else [place_of.get(key) for key in keys]  # among the run's own rows, or None
    validated = {place for of_run in parts for place, part in of_run.items() if part == VALIDATION}
    training, training_ids = scan_images(sources[0].examples), sources[0].examples["id"][:]
    for number, loaded in enumerate(data.sources):
        scan = training if loaded is sources[0] else scan_images(loaded.examples)
        of_source = [row for row, (source, _) in enumerate(data.places) if source == number]
        for of_run in parts:
            trained = [position for (_, position), part in of_run.items() if part == TRAIN]
            rows = [row for row in of_source if not (places[row] in validated and of_run[places[row]] == TRAIN)]
            tested = scan.take([data.places[row][1] for row in rows])
            for i, (bits, other) in rows_in_training(tested, training.take(trained), distance).items():
                found = bits, training_ids[trained[other]]
                inputs.in_training[rows[i]] = min(inputs.in_training.get(rows[i], found), found)


def _read_parts(run: Path, sources: Sequence[Loaded]) -> dict[tuple[int, int], str]:
    """Place of a row among the run's own -> its part; those of training are all in the first source."""
    parts = read_parts(run, sources, "Images are compared with those that it was trained on.")
    return {(source, row): part for source, of_source in enumerate(parts) for row, part in enumerate(of_source)}
