"""The rows of a run: read, checked, and split into those that are trained and those that are validated on."""

from collections import Counter
from dataclasses import dataclass

import datasets
from trl import SFTConfig

from vqa_sft.batch.collator import WEIGHT
from vqa_sft.config.recipe import Recipe
from vqa_sft.console import note
from vqa_sft.data.candidates import settle_absent
from vqa_sft.data.examples import Loaded, note_kept_orders, read_examples, stream_examples
from vqa_sft.data.options import CLASS
from vqa_sft.data.split import TRAIN, VALIDATION, choose_parts, most_choices, read_parts, select
from vqa_sft.errors import InputError
from vqa_sft.models import processes
from vqa_sft.runs import folder as run_folder
from vqa_sft.runs.checkpoints import last_whole_checkpoint

# The part of every row of a source; of a stream, whose rows nobody counts, None.
Parts = list[list[str] | None]


@dataclass(frozen=True)
class Rows:
    """What a run trains and validates on, and where it comes from."""

    loaded: list[Loaded]  # the training data and, where the recipe names some, the validation data
    parts: Parts
    train: datasets.Dataset | datasets.IterableDataset
    validation: datasets.Dataset | None
    num_letters: int

    @property
    def counted(self) -> list[datasets.Dataset]:
        """Both, but for a stream."""
        return [part for part in (self.train, self.validation) if isinstance(part, datasets.Dataset)]

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Of a classification."""
        classes = self.loaded[0].classes
        return None if classes is None else classes.names

    @property
    def num_train(self) -> int | None:
        return len(self.train) if isinstance(self.train, datasets.Dataset) else None

    def num_seen(self, training_args: SFTConfig) -> int:
        """How many rows the training goes through, over all epochs."""
        rows_a_step = training_args.per_device_train_batch_size * training_args.world_size
        by_steps = training_args.max_steps * rows_a_step * training_args.gradient_accumulation_steps
        return by_steps if by_steps > 0 else int(len(self.train) * training_args.num_train_epochs)


def load_data(recipe: Recipe) -> list[Loaded]:
    """The training rows and, where the recipe names data for it, the validation rows; texts only."""
    args = recipe.arguments
    read = stream_examples if args.streaming else read_examples
    loaded = [read(args.train_data, args.with_candidates(args.data_options))]
    if args.validation_data is not None:
        # Few rows may not tell how their answers are written; the training rows have told.
        options = args.validation_options(loaded[0].columns, loaded[0].classes)
        loaded.append(read_examples(args.validation_data, options))
        if args.candidates and loaded[1].num_choices not in (0, loaded[0].num_choices):  # 0: none has candidates
            shown = f"{loaded[0].num_choices} and {loaded[1].num_choices} choices"
            raise InputError(f"training and validation rows would have {shown}: set num_candidates.")
    for data in loaded:
        needless = [] if args.shuffle_choices else note_kept_orders(data.name, data.problems)
        for line in data.notes:
            if line not in needless:
                note(line)
        data.problems.raise_if_any(data.name, args.on_bad_row)
    return loaded


def split_data(recipe: Recipe, loaded: list[Loaded]) -> Parts:
    """Which rows are trained on, validated on and left out; a resumed run keeps its own. Decodes the images, so the
    main process does it for all."""
    args, output_dir = recipe.arguments, recipe.values["output_dir"]
    names = ("check_images", "on_bad_row", "validation_fraction", "folds_file", "fold", "duplicate_distance", "limit")
    how = {name: getattr(args, name) for name in names}
    parts = choose_parts(loaded, seed=recipe.values.get("seed", 42), **how)
    if not args.overwrite:
        if last_whole_checkpoint(output_dir):
            parts = read_parts(output_dir, loaded)
        for folder in recipe.folders:
            if run_folder.is_finished(folder):  # a fold of the same data
                read_parts(folder, loaded)
    counts = Counter(part for data_parts in filter(None, parts) for part in data_parts)
    print("Rows: " + ", ".join(f"{count:,} {part}" for part, count in counts.items()))
    return parts


def select_rows(recipe: Recipe, loaded: list[Loaded], parts: Parts, training_args: SFTConfig) -> Rows:
    """The rows of each part. Raises InputError where they do not fit the recipe or the processes of this launch."""
    args = recipe.arguments
    train, validation = select(loaded, parts, TRAIN), select(loaded, parts, VALIDATION)
    if args.streaming:
        # Without an end, so that no process runs out of rows before the others; max_steps ends the training.
        train = train.shuffle(seed=training_args.seed).repeat(None)
    if loaded[0].classes is not None:
        train = _select_classified(recipe, loaded[0], parts[0] or [], validation)
    most = most_choices(loaded, parts)
    if most > (args.max_choices or most):
        raise InputError(f"max_choices is {args.max_choices}, and the data have rows of {most} choices. Raise it.")
    rows = Rows(loaded, parts, train, validation, num_letters=args.max_choices or most)
    if args.averaging and processes.shards_weights():
        raise InputError("averaging needs whole weights on every process: launch by DDP or ZeRO-2, or remove it.")
    if args.vision_learning_rate is not None and processes.has_own_optimizer():
        raise InputError("DeepSpeed's configuration names an optimizer, which has one learning rate: remove it there.")
    processes.check_images(rows.counted)
    rows_a_step = training_args.per_device_train_batch_size * training_args.world_size
    if training_args.dataloader_drop_last and not args.streaming and len(train) < rows_a_step:
        raise InputError(f"dataloader_drop_last drops all {len(train)} rows: a step takes {rows_a_step}. Remove it.")
    return rows


def _select_classified(
    recipe: Recipe, loaded: Loaded, parts: list[str], validation: datasets.Dataset | None
) -> datasets.Dataset:
    """The training rows of a classification, each with its class among its choices, and weights where the recipe wants
    them. Raises InputError where no row can be trained or validated on."""
    assert loaded.classes is not None
    rows = [row for row, part in enumerate(parts) if part == TRAIN]
    examples, rows, lines = settle_absent(loaded.examples, rows, recipe.arguments.absent, loaded.classes)
    for line in lines:
        note(line)
    if validation is not None and all(answer is None for answer in validation["answer"]):
        raise InputError("no validation row has its class among its candidates. Raise num_candidates.")
    if recipe.arguments.class_balance == "weight":
        labels = examples[CLASS][:]
        counts = Counter(labels[row] for row in rows)
        # The mean of those that are trained on is 1; there are no others.
        weights = [len(rows) / (len(counts) * max(1, counts[label])) for label in labels]
        examples = examples.add_column(WEIGHT, weights, feature=datasets.Value("float32"))
    return examples.select(rows)
