"""A prediction from a yaml and the command line, as a recipe is read."""

from typing import get_args, get_type_hints

import pytest

from vqa_sft.batch.prompts import Prompts
from vqa_sft.config.prediction import PredictionArguments, read_prediction
from vqa_sft.data.split import VALIDATION
from vqa_sft.errors import InputError
from vqa_sft.inference.plan import find_runs
from vqa_sft.predictions.ensemble import AVERAGES
from vqa_sft.predictions.style import STYLES

GIVEN = ("--run", "runs/a", "--data", "test.csv", "--output", "out.csv")
BASE = ("--run", "none", "--model", "x", "--data", "test.csv", "--output", "out.csv")


def test_a_yaml_and_the_command_line_say_the_same_and_the_command_line_counts(tmp_path):
    (tmp_path / "predict.yaml").write_text(
        "run: [runs/a, runs/b]\ndata: test.csv\noutput: out.csv\nscales: [0.9, 1]\norders: 3\ncompile_layers: no\n"
        "columns: {id: key}\nfixed_choices: [yes, no]\nbatch_size: 4\n"
    )
    config = ("--config", str(tmp_path / "predict.yaml"))
    given = ("--run", "runs/a", "runs/b", *GIVEN[2:], "--scales", "0.9,1", "--orders", "3", "--no-compile_layers")
    given += ("--columns", "{id: key}", "--fixed-choices", "yes", "no", "--batch_size=4")
    assert read_prediction([*config]) == read_prediction([*given])
    args = read_prediction([*config, "--batch-size", "8", "--scales", "1"])
    assert (args.batch_size, args.scales, args.run) == (8, [1.0], ["runs/a", "runs/b"])
    assert (args.orders, args.compile_layers, args.fixed_choices) == (3, False, ["yes", "no"])


@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        ((), "use_cpu", False),
        (("--use_cpu",), "use_cpu", True),
        (("--use-cpu", "false"), "use_cpu", False),
        ((), "compile_layers", None),
        (("--compile_layers",), "compile_layers", True),
        (("--compile_layers", "false"), "compile_layers", False),
        (("--no-compile_layers",), "compile_layers", False),
        (("--streaming", "--limit", "5"), "streaming", True),
        (("--orders", "rotations"), "orders", "rotations"),
        (("--scales", "0.5,1.0"), "scales", [0.5, 1.0]),
        (("--scales", "0.5", "1.0"), "scales", [0.5, 1.0]),
        ((), "images", ["original"]),
        (("--images", "original,blank"), "images", ["original", "blank"]),
        (("--keep_rows", "{part: yes}"), "keep_rows", {"part": "yes"}),
        (("--data_config", "2024"), "data_config", "2024"),
        (("--image_root", ""), "image_root", None),
    ],
)
def test_flags_are_read_as_they_always_were(options, name, value):
    assert getattr(read_prediction([*GIVEN, *options]), name) == value


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (("--data", "test.csv", "--output", "out.csv"), "`run` is not set"),
        (("--run", "[]", *GIVEN[2:]), "`run` is not set"),
        (GIVEN[:4], "`output` is not set"),
        ((*GIVEN[:2], *GIVEN[4:]), "--data is missing"),
        ((*GIVEN, "--batchsize", "4"), "unknown key `batchsize`. Did you mean `batch_size`?"),
        ((*GIVEN, "--batch_size", "0"), "batch_size must be at least 1; got 0"),
        ((*GIVEN, "--num_workers", "-1"), "num_workers must be at least 0; got -1"),
        ((*GIVEN, "--limit", "2.5"), "`limit` must be a whole number; got 2.5"),
        ((*GIVEN, "--part", "test"), "`part` must be 'all' or 'validation'; got 'test'"),
        ((*GIVEN, "--orders", "0"), "orders must be identity, rotations, all or a number from 1 to 120; got 0"),
        ((*GIVEN, "--scales", "9"), "scales must be a list of numbers from 0.25 to 4"),
        ((*GIVEN, "--columns", "{idd: key}"), "idd"),
        ((*GIVEN, "--fixed_choices", "a", "a"), "fixed_choices must be"),
        ((*GIVEN, "--max_pixels", "100"), "they go with --run none only"),
        ((*GIVEN, "--system_prompt", ""), "they go with --run none only"),
        ((*GIVEN, "--template_options", "{enable_thinking: true}"), "they go with --run none only"),
        (
            (*BASE, "--template_options", "enable_thinking"),
            "`template_options` must be a mapping; got 'enable_thinking'",
        ),
        ((*GIVEN, "--part", "validation", "--limit", "3"), "no --streaming, --limit or --template"),
        ((*GIVEN, "--part", "validation", "--on_bad_row", "guess"), "bad rows were found in training"),
        ((*GIVEN, "--images", "grey"), "images must be different ones of original, blank, swapped, blurred; got grey"),
        ((*GIVEN, "--images", "blank,blank"), "images must be different ones of"),
        ((*GIVEN, "--images", "blank", "--on_bad_row", "guess"), "Leave --on_bad_row out"),
        ((*GIVEN, "--images", "blank,swapped", "--streaming"), "Leave --streaming out"),
        ((*GIVEN, "--template", "t.csv", "--streaming"), "--template needs rows that are known"),
        ((*BASE[:2], *BASE[4:]), "--run none needs --model"),
        ((*BASE, "--part", "validation"), "scores a base model alone"),
        (("--run", "none", "runs/a", *BASE[2:]), "scores a base model alone"),
        ((*BASE, "--max_pixels", "0"), "max_pixels must be between 1 and 100000000; got 0"),
    ],
)
def test_what_cannot_be_predicted_is_named(argv, part):
    with pytest.raises(InputError) as error:
        read_prediction([*argv])
    assert part in str(error.value)


def test_a_base_model_has_a_system_text_and_template_options_of_its_own():
    args = read_prediction([*BASE, "--system_prompt", "", "--template_options", "{enable_thinking: no}"])
    (run,) = find_runs(args)
    assert run.prompts == Prompts(system="", template_options={"enable_thinking": False})
    assert find_runs(read_prediction([*BASE]))[0].prompts == Prompts()


def test_words_of_a_prediction_are_those_of_the_modules_that_use_them():
    kinds = get_type_hints(PredictionArguments)
    assert get_args(kinds["average_runs"]) == AVERAGES and VALIDATION in get_args(kinds["part"])
    assert get_args(get_args(kinds["answer_format"])[0]) == STYLES
