"""Fields of dataclasses, read from a yaml and the command line and checked: types, choices, bounds, unknown keys.

    values, path = read_values(argv, PredictionArguments)      --config FILE; --some_key value, --some-key=value, --flag
    check_bounds(values, bounds_of(PredictionArguments))
    arguments = build(PredictionArguments, values)

No torch, nothing about training or prediction. TRL's parser checks neither types nor choices of yaml values, takes
abbreviations and drops duplicate keys.
"""

import difflib
import enum
import math
import types
import typing
from collections.abc import Iterable
from dataclasses import MISSING, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from vqa_sft.config.packaged import find_packaged
from vqa_sft.data.cells import is_number
from vqa_sft.errors import InputError

TEXT_FIELDS = ("columns", "keep_rows", "type_prompts")  # mappings that hold names and cells of data
EMPTY_FIELDS = ("system_prompt",)  # an empty text means one, and not that nothing is given
# Name of a field -> its type and, where it has them, its choices.
Known = dict[str, tuple[Any, list | None]]
# Name of a field -> its smallest and its largest value; None: no limit.
Bounds = dict[str, tuple[float, float | None]]


def option(help: str, *, bounds: tuple[float, float | None] | None = None, **kwargs: Any) -> Any:
    """A field with the sentence that `--help` shows; `kwargs` are those of `dataclasses.field`."""
    return field(metadata={"help": help, "bounds": bounds}, **kwargs)


def known_fields(*kinds: type) -> Known:
    """The fields of some dataclasses; of two of one name the last counts."""
    known = {}
    for kind in kinds:
        hints = typing.get_type_hints(kind)
        known |= {spec.name: (hints[spec.name], spec.metadata.get("choices")) for spec in fields(kind) if spec.init}
    return known


def bounds_of(kind: type) -> Bounds:
    """The bounds that are stated with the fields of a dataclass."""
    return {spec.name: spec.metadata["bounds"] for spec in fields(kind) if spec.metadata.get("bounds")}


def describe_fields(kind: type) -> str:
    """Help text: each field with its choices, its sentence and its default."""
    hints, lines = typing.get_type_hints(kind), []
    for spec in fields(kind):
        factory = spec.default_factory
        default = spec.default if factory is MISSING else factory()
        shown = " (required)" if default is MISSING else "" if default is None else f" (default: {default!r})"
        members = _members(hints[spec.name])
        words = [str(word) for member in members for word in _words(member)]
        others = [name for kind, name in {int: "N", dict: "{...}"}.items() if words and kind in members]
        choices = " " + "|".join([*others, *words]) if words else ""
        lines.append(f"  --{spec.name}{choices}: {spec.metadata['help']}{shown}")
    return "\n".join(lines)


def read_values(argv: list[str], *kinds: type) -> tuple[dict[str, Any], str | None]:
    """The values of the yaml that `--config FILE` names, overridden by `--key value`, each in the type of its field;
    and the name of that yaml. Raises InputError."""
    known, given = known_fields(*kinds), read_command_line(argv)
    path = given.pop("config", None)
    values = read_yaml(find_packaged(path[-1], "recipes")) if path else {}
    for name, tokens in given.items():
        positive = name.removeprefix("no_")
        if name not in known and not tokens and bool in _members(known.get(positive, (Any,))[0]):
            values[positive] = False  # --no_flag
        else:
            values[name] = from_tokens(name, tokens, known)
    return {name: checked(name, value, known) for name, value in values.items()}, path[-1] if path else None


def build(kind: type, values: dict[str, Any]) -> Any:
    """An instance of a dataclass from the values that are its fields; the checks of its own end in an InputError."""
    own = {spec.name: values[spec.name] for spec in fields(kind) if spec.init and spec.name in values}
    try:
        return kind(**own)
    except InputError:
        raise
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise InputError(" ".join(str(error).split())) from error


def check_required(values: dict[str, Any], names: Iterable[str]) -> None:
    for name in names:
        if not values.get(name):
            raise InputError(f"`{name}` is not set. Set it in the yaml or give --{name}.")


def check_bounds(values: dict[str, Any], bounds: Bounds) -> None:
    for name, (low, high) in bounds.items():
        value = values.get(name)
        if value is None or isinstance(value, str):  # one of the words that a field may hold
            continue
        if not (low <= value <= (math.inf if high is None else high) and math.isfinite(value)):
            limits = f"at least {low}" if high is None else f"between {low} and {high}"
            raise InputError(f"{name} must be {limits}; got {value}.")


def read_command_line(argv: list[str]) -> dict[str, list[str]]:
    """`--key value ...`, `--key=value` and a bare `--flag` (true), as text."""
    given: dict[str, list[str]] = {}
    name = None
    for token in argv:
        if token.startswith("--"):
            name, equals, value = token[2:].partition("=")
            name = name.replace("-", "_")
            given[name] = [value] if equals else []
        elif name is None:
            raise InputError(f"expected --key value; got {token!r}. Name the yaml with --config.")
        else:
            given[name].append(token)
    return given


class _Word(str):
    """A bare yes, no, on or off: YAML 1.1 reads a truth value, and a choice or a cell may be that very word."""


class _Loader(yaml.SafeLoader):
    """Leaves it to the field whether yes, no, on and off are truth values. PyYAML keeps the last of two equal keys and
    is silent; here they are refused."""

    def construct_word(self, node: yaml.ScalarNode) -> bool | str:
        return node.value.lower() == "true" if node.value.lower() in ("true", "false") else _Word(node.value)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise InputError(
                f"{', '.join(map(repr, sorted(twice, key=str)))} is given more than once in the yaml. Keep one."
            )
        return super().construct_mapping(node, deep)


_Loader.add_constructor("tag:yaml.org,2002:bool", _Loader.construct_word)


def settle_words(value: Any, are_texts: bool) -> Any:
    """The value with every bare yes, no, on and off in it as a text, or as true and false."""
    if isinstance(value, _Word):
        return str(value) if are_texts else value.lower() in ("yes", "on")
    if isinstance(value, list):
        return [settle_words(item, are_texts) for item in value]
    if isinstance(value, dict):
        return {settle_words(key, True): settle_words(item, are_texts) for key, item in value.items()}
    return value


def load_yaml(text: str) -> Any:
    """A value in YAML, as `checked` takes it. Raises yaml.YAMLError or ValueError."""
    return yaml.load(text, _Loader)


def read_yaml(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise InputError(f"no such yaml: {path}.")
    try:
        values = load_yaml(Path(path).read_text(encoding="utf-8"))
    except InputError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold `key: value` lines; got {type(values).__name__}.")
    return values


def from_tokens(name: str, tokens: list[str], known: Known) -> Any:
    """A value from the command line: the first reading of the text that fits the field."""
    hint = known.get(name, (Any, None))[0]
    if not tokens:
        if name in known and not _fits(True, hint):
            raise InputError(f"`{name}` needs a value: {_describe(hint)}.")
        return True
    if tokens == [""] and name in EMPTY_FIELDS:
        return ""
    texts = [_as_yaml(token) for token in tokens]
    readings = [texts[0], tokens[0]] if len(tokens) == 1 else []
    readings += [texts, tokens]
    return next((value for value in readings if _fits(value, hint)), readings[0])


def _as_yaml(token: str) -> Any:
    try:
        value = load_yaml(token)
        # "part #2.csv" is no name with a comment.
        return token if isinstance(value, str) and token[:1] not in ("'", '"') else value
    except (yaml.YAMLError, ValueError):  # "{question} {choices}" is fine text and no YAML
        return token


def checked(name: str, value: Any, known: Known) -> Any:
    """`value`, in the type of its field. Raises InputError for unknown keys, wrong types and wrong choices."""
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1)
        raise InputError(f"unknown key `{name}`." + (f" Did you mean `{near[0]}`?" if near else ""))
    hint, choices = known[name]
    # Of a mapping that a library takes, the values may be anything, and are truth values as YAML says.
    value = settle_words(value, name in TEXT_FIELDS or (_holds_texts(hint) and not isinstance(value, dict)))
    if isinstance(value, str) and "\0" in value:
        raise InputError(f"`{name}` holds a null byte. Take it out; got {value!r}.")
    if value is False and not _fits(value, hint) and _fits("no", hint):
        value = "no"  # YAML reads a bare `no` as False
    if not _fits(value, hint):
        raise InputError(f"`{name}` must be {_describe(hint)}; got {value!r}.")
    if choices and value is not None and value not in choices:
        raise InputError(f"`{name}` must be one of {', '.join(map(str, choices))}; got {value!r}.")
    # YAML 1.1 reads 2e-4 as text, because it has no dot.
    if isinstance(value, str) and float in _members(hint) and str not in _members(hint):
        return float(value)
    return value


def _holds_texts(hint: Any) -> bool:
    """Whether a field of this type holds texts and no truth value: text, or a list of texts."""
    members = _members(hint)
    lists = [typing.get_args(kind) for kind in members if typing.get_origin(kind) is list]
    return bool not in members and (str in members or (str,) in lists)


def _members(hint: Any) -> tuple:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _words(hint: Any) -> tuple:
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def _fits(value: Any, hint: Any) -> bool:
    """Whether a field of this type may hold a value read from YAML."""
    members = _members(hint)
    enums = [kind for kind in members if isinstance(kind, type) and issubclass(kind, enum.Enum)]
    if enums:  # such fields are annotated `Enum | str` and mean the names of the enum
        return value in [item.value for kind in enums for item in kind] or (value is None and type(None) in members)
    return any(_fits_one(value, kind) for kind in members)


def _fits_one(value: Any, kind: Any) -> bool:
    origin = typing.get_origin(kind) or kind
    if kind is Any:
        return True
    if origin is Literal:
        return value in _words(kind)
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if kind is float:
        return isinstance(value, int | float) or (isinstance(value, str) and is_number(value))
    if origin is list:
        inner = typing.get_args(kind) or (Any,)
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in value)
    return isinstance(value, origin) if isinstance(origin, type) else False


def _describe(hint: Any) -> str:
    words = []
    for kind in _members(hint):
        if typing.get_origin(kind) is Literal:
            words += map(repr, _words(kind))
        elif isinstance(kind, type) and issubclass(kind, enum.Enum):
            return "one of " + ", ".join(str(item.value) for item in kind)
        elif kind is not type(None):
            names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "a mapping"}
            words.append(names.get(typing.get_origin(kind) or kind) or f"a list ({kind})")
    return " or ".join(words)
