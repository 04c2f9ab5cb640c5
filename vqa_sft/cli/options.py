"""Options that several commands share. They are texts, which become fields of a recipe and are checked as such."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from vqa_sft.errors import InputError, printable

if TYPE_CHECKING:
    from vqa_sft.config.training import RecipeArguments

# What a data file takes of a recipe's fields as --key value, in addition to the options of `SourceOptions`.
DATA_FIELDS = (
    "keep_rows",
    "empty_cells",
    "task",
    "classes",
    "fixed_question",
    "fixed_choices",
    "max_choices",
    "validation_data",
)
DATA_FIELDS += ("validation_split", "on_bad_row")
SOURCE_EPILOG = f"As in a recipe, for a data file too: --{', --'.join(DATA_FIELDS)}."


def with_options(kind: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The fields of a dataclass as options of a command, which gets an instance as its parameter `options`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        added = list(inspect.signature(kind).parameters.values())
        own = [param for param in inspect.signature(command).parameters.values() if param.name != "options"]

        @functools.wraps(command)
        def run(**given: Any) -> None:
            options = kind(**{param.name: given.pop(param.name) for param in added})
            command(**given, options=options)

        params = [param.replace(kind=inspect.Parameter.KEYWORD_ONLY) for param in (*own, *added)]
        run.__signature__ = inspect.Signature(params)  # type: ignore[attr-defined]  # where typer looks
        return run

    return decorate


@dataclass
class DataOptions:
    """How the answers to a prediction file, and the data that were predicted, are read."""

    columns: Annotated[
        str | None,
        Option(help="of the file of answers or of --data, as in a recipe: '{id: key, answer: label}'; default: found"),
    ] = None
    fixed_question: Annotated[str | None, Option(help="the question of every row of --data, as in a recipe")] = None
    fixed_choices: Annotated[
        str | None, Option(help="the choices of every row of --data, as in a recipe: '[yes, no]'")
    ] = None
    encoding: Annotated[str | None, Option(help="of the file of answers or of --data; default: detected")] = None
    keep_rows: Annotated[
        str | None, Option(help="of the file of answers or of --data, as in a recipe: '{column: value}'")
    ] = None
    empty_cells: Annotated[str | None, Option(help="cells of --data that count as empty, as in a recipe: '[NA]'")] = (
        None
    )
    image_root: Annotated[
        str | None, Option(metavar="FOLDER", help="folder that image paths of --data are relative to")
    ] = None
    split: Annotated[str | None, Option(help="of a Hub dataset (default: test)")] = None
    data_config: Annotated[str | None, Option(help="configuration of a Hub dataset")] = None

    def read(self) -> dict[str, Any]:
        """What `predictions.matched.read_rows` takes: the options that were given, checked as in a recipe."""
        from vqa_sft.data.columns import check_columns, check_fixed

        given = {spec.name: [value] for spec in fields(self) if (value := getattr(self, spec.name)) is not None}
        split = given.pop("split", [])
        values = _checked(given)
        check_columns(values.get("columns") or {})
        check_fixed(values.get("fixed_question"), values.get("fixed_choices"))
        if "data_config" in values:
            values["config"] = values.pop("data_config")
        return values | ({"split": split[0]} if split else {})


@dataclass
class AnswerOptions(DataOptions):
    answer_format: Annotated[
        str | None, Option(help="letter, index_from_0, index_from_1 or text; default: that of the run's data")
    ] = None


@dataclass
class SourceOptions:
    """Fields of a recipe that say which rows are read, and how."""

    train_split: Annotated[str | None, Option("--split", help="split of a Hub dataset (default: train)")] = None
    data_config: Annotated[str | None, Option(help="configuration of a Hub dataset")] = None
    image_root: Annotated[str | None, Option(metavar="FOLDER", help="folder that image paths are relative to")] = None
    columns: Annotated[str | None, Option(help="as in a recipe: '{id: key, image: photo}'; default: found")] = None
    answer_format: Annotated[
        str | None, Option(help="letter, index_from_0, index_from_1 or text; default: inferred")
    ] = None
    encoding: Annotated[str | None, Option(help="of text files; default: detected")] = None
    limit: Annotated[str | None, Option(metavar="N", help="the first N rows only")] = None
    duplicate_distance: Annotated[
        str | None,
        Option(
            "--distance",
            metavar="BITS",
            help="by which the hashes of nearly the same images may differ; null: equal files only",
        ),
    ] = None

    def read(self, source: str, rest: list[str]) -> tuple["RecipeArguments", dict[str, Any]]:
        """The fields of the recipe `source`, or what a data file makes of them; and the values of the recipe, which a
        data file has not. `rest` are more fields as --key value."""
        from vqa_sft.config.fields import read_command_line
        from vqa_sft.config.recipe import read_recipe
        from vqa_sft.config.training import RecipeArguments

        names = [spec.name for spec in fields(SourceOptions)]  # a command may have added its own
        given = {name: [value] for name in names if (value := getattr(self, name)) is not None}
        if is_recipe(source):
            overrides = [f"--{name}={value}" for name, (value,) in given.items()]
            recipe = read_recipe(["--config", source, *overrides, *rest])
            return recipe.arguments, recipe.values
        given |= read_command_line(rest)
        known = (*names, *DATA_FIELDS)
        if unknown := [name for name in given if name not in known]:
            raise InputError(
                f"--{printable(unknown[0])} is no option for a data file; only a recipe has more fields than "
                f"{', '.join(known)}."
            )
        return RecipeArguments(train_data=source, **_checked(given)), {}


def is_recipe(source: str) -> bool:
    return Path(source).suffix in (".yaml", ".yml")


def _checked(given: dict[str, list[str]]) -> dict[str, Any]:
    """Texts of the command line as fields of a recipe. Raises InputError."""
    from vqa_sft.config.fields import checked, from_tokens, known_fields
    from vqa_sft.config.training import RecipeArguments

    known = known_fields(RecipeArguments)
    return {name: checked(name, from_tokens(name, tokens, known), known) for name, tokens in given.items()}


def check_positive(**values: float | None) -> None:
    """Raises InputError for an option that was given and is not above 0."""
    for name, value in values.items():
        if value is not None and not 0 < value < 1e9:
            raise InputError(f"--{name.replace('_', '-')} must be above 0; got {value}.")
