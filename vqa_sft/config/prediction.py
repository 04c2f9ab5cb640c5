"""The fields of a prediction and their checks; like a recipe they come from a yaml and the command line. No torch."""

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from vqa_sft.batch.control import KINDS, ORIGINAL, SWAPPED
from vqa_sft.batch.prompts import NONE_OF_THESE
from vqa_sft.config.fields import bounds_of, build, check_bounds, check_required, option, read_values
from vqa_sft.config.packaged import find_base
from vqa_sft.data.columns import Columns, check_columns, check_fixed, known_columns
from vqa_sft.data.options import CLASSIFICATION, NO_CANDIDATES, ReadOptions
from vqa_sft.errors import InputError, printable
from vqa_sft.questions.letters import MOST_ORDERS, Views

if TYPE_CHECKING:  # it opens sources
    from vqa_sft.data.classes import Classes

BASE = "none"  # in place of a run: the base model as it is


@dataclass
class PredictionArguments:
    """What is scored, how, and where it is written."""

    run: str | list[str] = option(
        "Run folders (one that `fold: all` made is all of its folds), or none to score a base model as it is."
    )
    output: str = option("Submission to write (.csv).")
    model: str | None = option("Base model of `run: none`; of a run, where its base is now.", default=None)

    data: str | None = option("File (CSV, TSV, JSONL, Parquet) or glob, saved or Hub dataset.", default=None)
    part: Literal["all", "validation"] = option(
        "All rows of data, or each run's own validation rows, of all folds those out of fold; data is then what the "
        "run was trained on, by default where its recipe says.",
        default="all",
    )
    split: str = option("Split of a Hub dataset.", default="test")
    data_config: str | None = option("Configuration (subset) of a Hub dataset.", default=None)
    encoding: str | None = option("Encoding of text files; default: detected.", default=None)
    image_root: str | None = option(
        "Folder that image paths are relative to and stay in; default: the folder of the file.", default=None
    )
    columns: dict | None = option(
        "Columns that are not found by their names, as in a recipe: {id: key, image: photo}.", default=None
    )
    task: Literal["multiple_choice", "classification"] | None = option(
        "As in a recipe; default: as in training.", default=None
    )
    candidates: str | None = option(
        "Candidates of the rows of a classification, as `vqa-sft candidates` writes them; with --part validation where "
        "those of the recipe are now.",
        default=None,
    )
    num_candidates: int | None = option("As in a recipe; default: as in training.", default=None, bounds=(2, 26))
    absent: Literal["insert", "drop", "none_of_these"] | None = option(
        "none_of_these gives every row one more choice; the others do not. Default: as in training.", default=None
    )
    fixed_question: str | None = option("The question of every row; default: as in training.", default=None)
    fixed_choices: list[str] | None = option("The choices of every row; default: as in training.", default=None)
    keep_rows: dict | None = option("Keep only rows whose columns hold these values: {column: value}.", default=None)
    limit: int | None = option("Score only the first rows.", default=None, bounds=(1, None))
    streaming: bool = option(
        "Read and score the rows as they are needed: memory does not grow with them.", default=False
    )
    on_bad_row: Literal["error", "guess"] = option(
        "Rows whose image, question or choices cannot be used: stop, or answer without them, mark and count them.",
        default="error",
    )

    answer_format: Literal["letter", "index_from_0", "index_from_1", "text", "probabilities"] | None = option(
        "How answers are written; default: as in training.", default=None
    )
    template: str | None = option(
        "A contest's sample submission, whose columns, rows and letters are taken.", default=None
    )

    orders: int | Literal["identity", "rotations", "all"] = option(
        "Orders of the choices in which each row is scored: rotations shows each choice once under each letter; or a "
        f"number of orders, at most {MOST_ORDERS}. Choices that refer to others keep their places.",
        default="identity",
    )
    scales: float | str | list[float] = option(
        "Of the images' sides, one pass over the data each (Qwen2.5-VL and Qwen3-VL): 0.9,1.0,1.1. With the weights "
        "that vqa-sft calibrate found, else equal ones.",
        default=1.0,
    )
    images: str | list[str] = option(
        "How images are shown: original; or blank, swapped or blurred, to see whether the model looks at them. Of "
        "several (original,blank) each has a file of its own, out.blank.csv.",
        default=ORIGINAL,
    )
    average: Literal["mean", "log"] = option(
        "Over orders and scales: of the probabilities, or of their logarithms.", default="mean"
    )
    average_runs: Literal["mean", "log", "vote"] = option(
        "Over several runs: of their calibrated probabilities, of the logarithms of these, or of their votes.",
        default="log",
    )

    batch_size: int = option("Rows per forward and process, each order counted as one.", default=16, bounds=(1, None))
    num_workers: int = option("Processes that read images.", default=2, bounds=(0, None))
    compile_layers: bool | None = option(
        "Compile the layers at the start; default: from 3,000 views on (rows x orders x scales x runs).", default=None
    )
    min_pixels: int | None = option("With `run: none`; a run has its own.", default=None, bounds=(1, 10**8))
    max_pixels: int | None = option("With `run: none`; a run has its own.", default=None, bounds=(1, 10**8))
    system_prompt: str | None = option("With `run: none`: as in a recipe; a run has its own.", default=None)
    template_options: dict | None = option("With `run: none`: as in a recipe; a run has its own.", default=None)
    use_cpu: bool = option("Do not use the GPU.", default=False)

    def __post_init__(self) -> None:
        self.run = self.run if isinstance(self.run, list) else [self.run]
        self.scales = _as_numbers(self.scales)
        self.images = self.images.split(",") if isinstance(self.images, str) else self.images
        self.views  # noqa: B018  raises for what cannot be scored
        validates = self.part == "validation"
        self._check_base()
        if self.data is None and not validates:
            raise InputError("--data is missing: the rows to score.")
        if validates and (self.streaming or self.limit or self.template):
            raise InputError("--part validation scores the run's own rows: no --streaming, --limit or --template.")
        if validates and self.on_bad_row != "error":
            raise InputError("--part validation: bad rows were found in training. Leave --on_bad_row out.")
        if validates and (self.task or self.num_candidates or self.absent):
            raise InputError("--part validation: task, num_candidates and absent are those of the run. Leave them out.")
        self._check_images()
        if self.template and self.streaming:
            raise InputError("--template needs rows that are known. Leave it out; vqa-sft submit takes it later.")
        check_columns(self.columns or {})
        check_fixed(self.fixed_question, self.fixed_choices)

    def _check_base(self) -> None:
        if BASE not in self.run:
            if any(value is not None for value in self.of_base.values()):
                raise InputError(f"{', '.join(self.of_base)} belong to the run; they go with --run none only.")
            return
        if len(self.run) > 1 or self.part == "validation":
            raise InputError("--run none scores a base model alone, and has no validation rows.")
        if self.model is None:
            raise InputError("--run none needs --model: the base model to score.")

    def _check_images(self) -> None:
        if not self.images or {*self.images} - {*KINDS} or len({*self.images}) < len(self.images):
            raise InputError(
                f"images must be different ones of {', '.join(KINDS)}; got {printable(','.join(self.images))}."
            )
        if self.images != [ORIGINAL] and self.on_bad_row != "error":
            raise InputError("--images compares rows whose images can be used. Leave --on_bad_row out.")
        if SWAPPED in self.images and self.streaming:
            raise InputError("--images swapped needs rows that are known. Leave --streaming out.")

    @property
    def apart(self) -> list["PredictionArguments"]:
        """This prediction for each of the ways in which images are shown, with an output of its own."""
        if len(self.images) == 1:
            return [self]
        stem, suffix = os.path.splitext(self.output)
        return [replace(self, images=[kind], output=f"{stem}.{kind}{suffix}") for kind in self.images]

    @property
    def of_base(self) -> dict[str, Any]:
        """Fields of a recipe that a base model has here, and a run has of its own."""
        names = ("min_pixels", "max_pixels", "system_prompt", "template_options")
        return {name: getattr(self, name) for name in names}

    @property
    def views(self) -> Views:
        return Views(self.orders, self.scales, self.average)  # type: ignore[arg-type]  # numbers, by __post_init__

    def data_options(
        self,
        recipe: dict[str, Any],
        trained: Columns | None,
        classes: "Classes | None" = None,
        num_letters: int | None = None,
    ) -> ReadOptions:
        """How to read the data: as given here, else as the recipe of the run says where that fits, else found again. Of
        a classification with the `classes` of the run, and as many candidates as its `num_letters` hold."""
        names = ("keep_rows", "encoding", "fixed_question", "fixed_choices")
        options = {name: getattr(self, name) or recipe.get(name) for name in names}
        given, named = self.columns or {}, recipe.get("columns")
        for role in ("question", "choices"):
            is_fixed = getattr(self, f"fixed_{role}") is not None
            if given.get(role) and not is_fixed:  # a column in place of what was the same for all
                options[f"fixed_{role}"] = None
            elif is_fixed:
                named = {key: name for key, name in (named or {}).items() if key != role}
        return ReadOptions(
            **options,
            columns={key: name for key, name in given.items() if key != "targets"},
            known_columns=known_columns(trained, named),
            trained=trained,
            empty_cells=recipe.get("empty_cells"),
            image_root=self.image_root,  # test images lie where the test data say, not where training did
            answer_format=self.answer_format if self.answer_format != "probabilities" else None,
            split=self.split,
            config=self.data_config,
            limit=self.limit,
            answers="optional",
            on_bad_row=self.on_bad_row,
            **self._options_of_classification(recipe, classes, num_letters),
        )

    def _options_of_classification(
        self, recipe: dict[str, Any], classes: "Classes | None", num_letters: int | None
    ) -> dict[str, Any]:
        """Raises InputError for candidates of another task, and for a classification without."""
        if (self.task or recipe.get("task")) != CLASSIFICATION:
            if given := [
                name for name in ("candidates", "num_candidates", "absent") if getattr(self, name) is not None
            ]:
                raise InputError(
                    f"--{', --'.join(given)}: of a classification, and the run is none. Leave it out, or give --task "
                    "classification."
                )
            return {}
        if self.candidates is None:
            raise InputError(NO_CANDIDATES)
        if self.streaming or self.template or self.answer_format not in (None, "text"):
            raise InputError(
                "a classification needs rows that are known, and its submission names the likeliest candidate: leave "
                "out --streaming, --template and --answer_format. `vqa-sft fuse` gives probabilities of all classes."
            )
        has_none = (self.absent or recipe.get("absent")) == "none_of_these"
        of_run = num_letters - (recipe.get("absent") == "none_of_these") if num_letters and classes else None
        text = NONE_OF_THESE[recipe.get("prompt_language") or "en"] if has_none else None
        num = self.num_candidates or of_run
        how = {"candidates": self.candidates, "num_candidates": num, "none_of_these": text}
        return {"task": CLASSIFICATION, "classes": classes} | how


def _as_numbers(scales: float | str | list[float]) -> Any:
    """Scales as the views take them; a text that holds no numbers stays one."""
    parts = scales.split(",") if isinstance(scales, str) else scales if isinstance(scales, list) else [scales]
    try:
        return [float(part) for part in parts]
    except ValueError:
        return scales


def read_prediction(argv: list[str]) -> PredictionArguments:
    """The prediction that `--config FILE` and `--key value` ask for, checked. Raises InputError."""
    values, _ = read_values(argv, PredictionArguments)
    check_bounds(values, bounds_of(PredictionArguments))
    # An empty output is no missing one: it may come from a variable of a shell.
    check_required({name: value not in (None, []) for name, value in values.items()}, ("run", "output"))
    if values.get("model"):
        values["model"] = find_base(values["model"])
    return build(PredictionArguments, values)
