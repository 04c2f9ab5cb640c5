from dataclasses import dataclass
from typing import Literal

import pytest

from vqa_sft.config.fields import bounds_of, build, check_bounds, check_required, describe_fields, option, read_values
from vqa_sft.errors import InputError


@dataclass
class Arguments:
    data: str = option("What to read.")
    run: list[str] | None = option("Run folders.", default=None)
    orders: int | Literal["identity", "all"] = option("Orders to score.", default="identity", bounds=(1, 24))
    scales: list[float] = option("Image scales.", default_factory=lambda: [1.0])
    keep_rows: dict | None = option("Rows to keep.", default=None)
    use_cpu: bool = option("Stay on the CPU.", default=False)
    compile_layers: bool | None = option("Compile.", default=None)


def read(*argv):
    values, _ = read_values([*map(str, argv)], Arguments)
    return build(Arguments, values)


def test_any_dataclass_of_fields_is_read_from_a_yaml_and_the_command_line(tmp_path):
    (tmp_path / "it.yaml").write_text("data: a.csv\norders: all\nkeep_rows: {lang: no}\n")
    given = ("--config", tmp_path / "it.yaml", "--orders=4", "--run", "1", "two", "--use-cpu", "--scales", "0.9", 1)
    arguments = read(*given, "--no-compile_layers")
    assert arguments == Arguments("a.csv", ["1", "two"], 4, [0.9, 1], {"lang": "no"}, True, False)
    assert read_values([*map(str, given)], Arguments)[1] == str(tmp_path / "it.yaml")
    assert read("--data", "b.csv") == Arguments("b.csv")


@pytest.mark.parametrize("spelling", ["--keep_rows", "--keep-rows"])
def test_a_key_is_spelt_with_underscores_or_hyphens(spelling):
    assert read("--data", "x", spelling, "{a: 1}").keep_rows == read("--data", "x", f"{spelling}={{a: 1}}").keep_rows


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--order", "all"], "unknown key `order`. Did you mean `orders`?"),
        (["--no_data"], "unknown key `no_data`"),
        (["--orders", "some"], "`orders` must be a whole number or 'identity' or 'all'; got 'some'"),
        (["--use_cpu", "maybe"], "`use_cpu` must be true or false; got 'maybe'"),
        (["a.csv"], "expected --key value; got 'a.csv'"),
    ],
)
def test_mistakes_are_named(argv, part):
    with pytest.raises(InputError) as error:
        read(*argv)
    assert part in str(error.value)


def test_bounds_and_required_fields_are_checked():
    check_bounds({"orders": "all"}, bounds_of(Arguments))
    with pytest.raises(InputError, match="orders must be between 1 and 24; got 25"):
        check_bounds({"orders": 25}, bounds_of(Arguments))
    with pytest.raises(InputError, match="`data` is not set. Set it in the yaml or give --data"):
        check_required({}, ["data"])


def test_help_shows_choices_sentence_and_default():
    text = describe_fields(Arguments)
    assert "  --data: What to read. (required)" in text and "--scales: Image scales. (default: [1.0])" in text
    assert "  --orders N|identity|all: Orders to score. (default: 'identity')" in text


def test_an_option_without_a_value_says_that_it_needs_one():
    assert read("--data", "x.csv", "--use_cpu").use_cpu is True
    with pytest.raises(InputError, match="`scales` needs a value: "):
        read("--data", "x.csv", "--scales")
