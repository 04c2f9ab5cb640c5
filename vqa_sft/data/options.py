"""How a source is read: the one place of these options, for training, prediction and checks. No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vqa_sft.data.columns import Columns

if TYPE_CHECKING:  # it opens sources, and options alone open none
    from vqa_sft.data.classes import Classes

CLASSIFICATION = "classification"  # the task whose rows have a class in place of choices
# Columns more of a classification: the row's class in `Loaded.classes`, None for none; the class of each choice; those
# that training draws from (candidates.py).
CLASS, CANDIDATES, POOL = "class_index", "candidates", "pool"

NO_CANDIDATES = (
    "task: classification needs candidates, the file with the likely classes of each row that `vqa-sft candidates` "
    "writes. Give --candidates FILE, or a line of the yaml."
)


@dataclass(frozen=True)
class ReadOptions:
    """How the rows of a source are read.

    `columns` names the columns that are not found by themselves; `answer_format` is inferred when it is None.
    `keep_rows` keeps the rows whose columns hold the given value, or one of the given values. A cell that holds one of
    `empty_cells` counts as empty. `answers` is "required" (training) or "optional" (prediction). Image paths are
    relative to `image_root` and must stay in it; by default it is the folder of the file. `fixed_question` and
    `fixed_choices` are those of every row. `max_choices` is for streams, whose rows are not all known.

    With the `task` CLASSIFICATION rows have no choices, and the answer is the name of a class: of `classes`, a list or
    the file that holds it, by default of those that the rows name. With `candidates`, a file of class probabilities,
    whose classes are then the default, the `num_candidates` most likely classes of a row are its choices, and
    `none_of_these` is the text of one more; `candidate_pool` are kept to be drawn from (candidates.py).

    Rows that go with others, as validation and test rows do with those of training, may be written in another way:
    `trained` are the columns of those, whose answer format counts where it fits, and `known_columns` what their recipe
    names, which counts where it is there.
    """

    split: str = "train"
    config: str | Sequence[str] | None = None
    encoding: str | None = None
    columns: Mapping[str, Any] | None = None
    answer_format: str | None = None
    keep_rows: Mapping[str, Any] | None = None
    empty_cells: Sequence[str] | None = None
    image_root: str | None = None
    answers: str = "required"
    limit: int | None = None
    max_choices: int | None = None
    fixed_question: str | None = None
    fixed_choices: Sequence[str] | None = None
    known_columns: Mapping[str, Any] | None = None
    trained: Columns | None = None
    on_bad_row: str = "error"
    task: str = "multiple_choice"
    classes: "str | Classes | None" = None
    candidates: str | None = None
    num_candidates: int | None = None
    candidate_pool: int | None = None
    none_of_these: str | None = None

    @property
    def is_classification(self) -> bool:
        return self.task == CLASSIFICATION
