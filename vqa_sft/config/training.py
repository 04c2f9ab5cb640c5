"""Our own fields of a training recipe, beside those of TRL."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from vqa_sft.batch.prompts import NONE_OF_THESE, Prompts, builtin_prompts
from vqa_sft.config.fields import bounds_of, build, check_bounds, option
from vqa_sft.data.columns import Columns, check_columns, check_fixed, known_columns
from vqa_sft.data.duplicates import DISTANCE, MAX_DISTANCE
from vqa_sft.data.options import CLASSIFICATION, NO_CANDIDATES, ReadOptions
from vqa_sft.errors import InputError

if TYPE_CHECKING:  # it opens sources
    from vqa_sft.data.classes import Classes


@dataclass
class RecipeArguments:
    """Our own fields; model and data have no default."""

    train_data: str | list[str] = option(
        "File (CSV, TSV, JSONL, Parquet), several, a glob, a saved dataset, or a Hub dataset to train on."
    )
    train_split: str = option("Split of a Hub dataset to train on.", default="train")
    validation_data: str | list[str] | None = option("Like train_data, for validation.", default=None)
    validation_split: str = option("Split of a Hub dataset to validate on.", default="validation")
    validation_fraction: float = option(
        "Share of the training rows to hold out, in place of validation_data; 0: none.", default=0.0, bounds=(0, 0.5)
    )
    folds_file: str | None = option("CSV of id and fold, as `vqa-sft folds` writes it.", default=None)
    fold: int | Literal["all"] | None = option(
        "Fold of folds_file to validate on, training on the others; all: each in turn.", default=None, bounds=(0, None)
    )
    folds_at_once: int = option(
        "Folds of `fold: all` that train at the same time, each in a process and on a GPU of its own.",
        default=1,
        bounds=(1, None),
    )
    time_budget_h: float | None = option(
        "Hours after which to save and stop; the same command resumes.", default=None, bounds=(0.001, None)
    )
    duplicate_distance: int | None = option(
        "Near-duplicates, whose image hashes differ in at most so many bits, are held out together; null: exact ones.",
        default=DISTANCE,
        bounds=(0, MAX_DISTANCE),
    )
    data_config: str | list[str] | None = option("Configuration (subset) of a Hub dataset, or several.", default=None)
    encoding: str | None = option("Encoding of text files; default: detected.", default=None)
    streaming: bool = option("Read the training rows as they are needed; needs max_steps.", default=False)
    image_root: str | None = option(
        "Folder that image paths are relative to and stay in; default: the folder of the file.", default=None
    )
    columns: dict | None = option(
        "Columns that are not found by their names: {id, image, question, choices, answer, context, targets}. choices: "
        "in_question reads them from the question's text; image: 'img/{id}.png' is a path with cells of the row.",
        default=None,
    )
    task: Literal["multiple_choice", "classification"] = option(
        "What a row is: a question with choices, or with the name of a class, which then needs candidates.",
        default="multiple_choice",
    )
    classes: str | None = option(
        "List of the classes of a classification: .txt, .csv with name, description, other_names, or a sample "
        "submission; default: those of the candidates, else of the rows.",
        default=None,
    )
    candidates: str | None = option(
        "File with the likely classes of each row of a classification, its choices, as `vqa-sft candidates` writes it.",
        default=None,
    )
    validation_candidates: str | None = option("The same for validation_data; default: candidates.", default=None)
    num_candidates: int | None = option(
        "Candidates of a row, the most likely ones; default: as many as their file says, else 10.",
        default=None,
        bounds=(2, 26),
    )
    candidate_pool: int | None = option(
        "So many most likely ones from which training draws those of each epoch; default: 2 x num_candidates.",
        default=None,
        bounds=(2, None),
    )
    absent: Literal["insert", "drop", "none_of_these"] = option(
        "Training rows whose class is no candidate: put it in the last one's place, leave them out, or answer with one "
        "more choice, None of these, which all rows then have.",
        default="insert",
    )
    class_balance: Literal["none", "sample", "weight"] = option(
        "Rare classes of a classification: as they are, shown as often as others, or with weights in the loss.",
        default="none",
    )
    fixed_question: str | None = option("The question of every row, where no column holds it.", default=None)
    fixed_choices: list[str] | None = option("The choices of every row: [yes, no].", default=None)
    answer_format: Literal["letter", "index_from_0", "index_from_1", "text"] | None = option(
        "How the answers are written; default: inferred.", default=None
    )
    keep_rows: dict | None = option("Keep only rows whose columns hold these values: {column: value}.", default=None)
    empty_cells: list[str] | None = option(
        "Texts that mean an empty cell; pandas writes nan, which may also be a choice.", default=None
    )
    max_choices: int | None = option(
        "Most choices of a row; default: found. A stream whose later rows have more needs it.",
        default=None,
        bounds=(2, 26),
    )
    limit: int | None = option("Use only the first rows, to try a recipe out.", default=None, bounds=(1, None))
    check_images: bool = option("Decode every image before the model is loaded.", default=True)
    on_bad_row: Literal["error", "skip"] = option(
        "Rows that cannot be used, or whose images cannot: stop, or leave them out.", default="error"
    )

    min_pixels: int | None = option(
        "Smaller images are enlarged to this width x height, where the model can; docs/training.md, image size.",
        default=None,
        bounds=(1, 10**8),
    )
    max_pixels: int | None = option(
        "Largest width x height that the model is shown of one image; docs/training.md, image size.",
        default=None,
        bounds=(1, 10**8),
    )
    prompt_language: Literal["en", "ko", "both"] = option("Language of the built-in prompts.", default="en")
    type_prompts: dict | Literal["builtin"] | None = option(
        "User texts per question type: {counting: ...}, or builtin; default: one text for all.", default=None
    )
    system_prompt: str | None = option("System text; empty: the model's own; default: built in.", default=None)
    user_prompt: str | None = option("User text with {question} and {choices}; default: built in.", default=None)
    choice_prompt: str = option("One line of {choices}, with {letter} and {text}.", default=Prompts.choice)
    template_options: dict | None = option(
        "Options of the model's chat template, as {enable_thinking: false}, which is the default where it has that; "
        "null: the template's own.",
        default=None,
    )

    loss: Literal["letters", "vocabulary"] = option(
        "Cross-entropy over the row's own letters, or over the whole vocabulary.", default="letters"
    )
    vocabulary_weight: float | None = option(
        "Between the two losses: 0 is `letters`, 1 is `vocabulary`; default: as loss says.", default=None, bounds=(0, 1)
    )
    letter_smoothing: float = option(
        "Label smoothing over the row's own letters: the share of the target that is spread.",
        default=0.0,
        bounds=(0, 0.5),
    )
    supervise_end_of_turn: bool = option(
        "Train the token that ends the turn after the letter too, for use with `generate`.", default=False
    )
    init_adapter: str | None = option(
        "Folder of an adapter, of an earlier run perhaps, to start from; its rank and layers are kept.", default=None
    )
    base_precision: Literal["fp8"] | None = option(
        "fp8: the frozen language model in FP8, from compute capability 8.9 on; default: in the precision of the run.",
        default=None,
    )
    adapt_tower: bool = option("Adapt the linear layers of the vision tower's blocks too.", default=False)
    adapt_merger: bool = option(
        "Adapt the linear layers of the merger or projector too, from the tower to the language model.", default=False
    )
    adapt_experts: bool = option("Adapt the routed experts of a mixture of experts too.", default=False)
    vision_learning_rate: float | None = option(
        "Learning rate outside the language model; default: learning_rate.", default=None, bounds=(0, 1e3)
    )
    averaging: Literal["ema", "swa"] | None = option(
        "Average the adapter over steps, and keep the average if its validation NLL is lower.", default=None
    )
    ema_decay: float = option("Decay of ema, after its warm-up.", default=0.99, bounds=(0, 0.99999))
    swa_start: float = option("Steps before swa begins; below 1: a share of all.", default=0.5, bounds=(0, None))
    shuffle_choices: bool = option("Draw a permutation of the choices for every row and epoch.", default=True)
    image_augmentation: float = option(
        "In training, sides, brightness, contrast and colour of an image change by at most this share.",
        default=0.0,
        bounds=(0, 0.5),
    )
    flip_images: bool = option(
        "In training, mirror half of the images; not where left and right matter, or text is read.", default=False
    )
    global_batch_size: int | None = option(
        "Rows per optimiser step over all processes; accumulation follows.", default=None, bounds=(1, None)
    )
    fast: bool = option(
        "Packed rows and a faster vision tower, where the model allows it; false: the libraries' own.", default=True
    )
    cache_image_features: bool = option(
        "Keep the frozen vision tower's features of each image on disk, for all epochs and runs.", default=False
    )
    compile_layers: bool | None = option(
        "Compile the layers before the first step; default: after a few steps, if that pays.", default=None
    )
    # Compiled layers keep less at the same speed (docs/speed.md); torch's own default is 1.
    activation_memory_budget: float = option(
        "Share of their activations that compiled layers keep; the rest is recomputed.", default=0.7, bounds=(0, 1)
    )
    auto_batch: bool = option(
        "Choose micro-batch, accumulation and gradient_checkpointing for the GPU's memory.", default=False
    )
    early_stopping_patience: int | None = option(
        "Stop after this many evaluations without an improvement.", default=None, bounds=(1, None)
    )
    overwrite: bool = option("Move an earlier run in output_dir to output_dir.old first.", default=False)

    def __post_init__(self) -> None:
        check_bounds(vars(self), bounds_of(RecipeArguments))
        if self.vocabulary_weight is None:
            self.vocabulary_weight = 1.0 if self.loss == "vocabulary" else 0.0
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise InputError(f"min_pixels {self.min_pixels} is larger than max_pixels {self.max_pixels}.")
        check_columns(self.columns or {})
        check_fixed(self.fixed_question, self.fixed_choices)
        self._check_task()
        self.prompts  # noqa: B018  raises for a template without its placeholders

    def _check_task(self) -> None:
        if self.task != CLASSIFICATION:
            if self.classes is not None:
                raise InputError("classes is the list of a classification. Set task: classification, or remove it.")
            own = ("candidates", "validation_candidates", "num_candidates", "candidate_pool", "absent", "class_balance")
            if given := [name for name in own if getattr(self, name) not in (None, "insert", "none")]:
                raise InputError(f"{', '.join(given)}: of a classification. Set task: classification, or remove it.")
            return
        given = [name for name in ("fixed_choices", "answer_format", "max_choices") if getattr(self, name) is not None]
        given += [f"columns: {{{key}: ...}}" for key in ("choices", "targets") if (self.columns or {}).get(key)]
        given += ["streaming"] if self.streaming else []
        if given:
            raise InputError(f"{', '.join(given)} cannot be set beside task: classification. Remove one of the two.")
        if self.candidate_pool and self.num_candidates and self.candidate_pool < self.num_candidates:
            raise InputError(f"candidate_pool {self.candidate_pool} is smaller than num_candidates. Raise it.")
        if self.candidates is not None and self.absent == "insert" and not self.shuffle_choices:
            raise InputError(
                "absent: insert puts the class under the last letter wherever it was no candidate, and with "
                "shuffle_choices: false the model would learn that letter. Set shuffle_choices: true or absent: drop."
            )
        if self.validation_candidates is not None and self.validation_data is None:
            raise InputError("validation_candidates are those of validation_data, which is not set. Remove it.")

    @classmethod
    def of_run(cls, values: dict[str, Any]) -> "RecipeArguments":
        """From the values of a recipe that a run folder holds."""
        return build(cls, values)

    @property
    def validates(self) -> bool:
        return self.validation_data is not None or self.validation_fraction > 0 or self.folds_file is not None

    @property
    def data_options(self) -> ReadOptions:
        """How the training rows are read."""
        names = ("encoding", "image_root", "columns", "answer_format", "keep_rows", "empty_cells", "limit")
        names += ("fixed_question", "fixed_choices", "task", "classes")
        values = {name: getattr(self, name) for name in names}
        values["max_choices"] = self.max_choices if self.streaming else None
        return ReadOptions(split=self.train_split, config=self.data_config, **values)

    def options_for_other_data(self, trained: Columns) -> ReadOptions:
        """The same for validation or test rows, which may be written in another way than the training rows."""
        values: dict[str, Any] = {"known_columns": known_columns(trained, self.columns), "trained": trained}
        values |= {"columns": None, "answer_format": None, "max_choices": None}
        return replace(self.data_options, split=self.validation_split, **values)

    def with_candidates(self, options: ReadOptions, path: str | None = None) -> ReadOptions:
        """How the same rows are read with their candidates: of the recipe, or where they are now. Raises InputError for
        a classification without."""
        if self.task != CLASSIFICATION:
            return options
        if (path or self.candidates) is None:
            raise InputError(NO_CANDIDATES)
        how: dict[str, Any] = {"num_candidates": self.num_candidates, "candidate_pool": self.candidate_pool}
        text = NONE_OF_THESE[self.prompt_language] if self.absent == "none_of_these" else None
        return replace(options, candidates=path or self.candidates, none_of_these=text, **how)

    def validation_options(self, trained: Columns, classes: "Classes | None") -> ReadOptions:
        """How the rows of validation_data are read, with candidates of the classes that the training rows have."""
        options = replace(self.options_for_other_data(trained), classes=classes)
        return self.with_candidates(options, self.validation_candidates)

    @property
    def adapted_vision(self) -> dict[str, bool]:
        return {"adapt_tower": self.adapt_tower, "adapt_merger": self.adapt_merger}

    @property
    def adapted_parts(self) -> dict[str, bool]:
        """What `models.lora.lora_config` takes beside TRL's fields."""
        return self.adapted_vision | {"adapt_experts": self.adapt_experts}

    @property
    def prompts(self) -> Prompts:
        prompts = builtin_prompts(self.prompt_language, by_type=self.type_prompts == "builtin")
        given: dict[str, Any] = {"system": self.system_prompt, "user": self.user_prompt, "choice": self.choice_prompt}
        given["template_options"] = self.template_options
        if isinstance(self.type_prompts, dict):
            given["types"] = self.type_prompts
        return replace(prompts, **{name: text for name, text in given.items() if text is not None})


def as_list(source: str | list[str] | None) -> list[str]:
    """The names of a source that may be one, several or none."""
    return source if isinstance(source, list) else [source] if source else []
