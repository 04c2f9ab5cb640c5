"""How a source is read: the one place of these options, for training, prediction and checks. No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vqa_sft.data.columns import Columns

if TYPE_CHECKING:  # it opens sources, and options alone open none
    from vqa_sft.data.classes import Classes

CLASSIFICATION = "classification"  # the task whose rows have a class in place of choices

NO_CANDIDATES = (
    "task: classification: candidates are not built yet, so such rows are neither trained on nor predicted. Check them "
    "with `vqa-sft check`."
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
    the file that holds it, by default of those that the rows name.

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

    @property
    def is_classification(self) -> bool:
        return self.task == CLASSIFICATION
