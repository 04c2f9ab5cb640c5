import json
import signal
import sys

import datasets
import pytest
from broken import HOSTILE, KINDS, NUM_GOOD, row, table, write_broken
from scripts import run_script

from vqa_sft.batch.collator import AnswerCollator
from vqa_sft.batch.prompts import Prompts
from vqa_sft.cli.main import main
from vqa_sft.config.recipe import read_recipe
from vqa_sft.data import problems
from vqa_sft.data.examples import read_examples, stream_examples
from vqa_sft.data.split import TRAIN, choose_parts
from vqa_sft.errors import InputError

# Only a stream has these, or a test set, or a classification (test_classes.py).
ELSEWHERE = {"more_choices", "in_training", "near_training"}
ELSEWHERE |= {"no_candidates"}  # test_candidates.py
ELSEWHERE |= {"unknown_class", "classes_differ", "near_classes_differ", "only_of_class", "class_not_trained"}


def severity(name):
    says = KINDS[name].says
    return "fatal" if says and says not in problems.KINDS else says and problems.KINDS[says].severity


ERRORS = [name for name in KINDS if severity(name) in ("fatal", "error")]
# What a stream of the training rows does not meet before the model is there, or not at all.
LATER = {"control_token", "validation_of_other_answers"}


@pytest.fixture(autouse=True)
def no_hang():
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """`recipe("truncated_jpeg")`: the recipe of one kind, written once."""
    root, written = tmp_path_factory.mktemp("broken"), {}
    datasets.disable_progress_bars()

    def path(name):
        if not KINDS[name].needs():
            pytest.skip("not to be had here")
        if name not in written:
            written[name] = write_broken(name, root)
        return written[name]

    yield path
    datasets.enable_progress_bars()


@pytest.fixture
def check(monkeypatch, capsys):
    """`check(recipe)`: exit code of `vqa-sft check`, the problems in its JSON or None, and all that it prints."""

    def check(recipe, *arguments):
        report = recipe.parent / "report.json"
        monkeypatch.setattr(sys, "argv", ["vqa-sft", "check", str(recipe), "--json", str(report), *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        found = json.loads(report.read_text())["data"][0]["problems"] if end.value.code != 2 else None
        return end.value.code, found, "".join(capsys.readouterr())

    return check


@pytest.fixture
def sft(capsys):
    """`sft("--config", path, ...)`: exit code of recipes/sft.py, and all that it prints; another exception fails."""

    def sft(*arguments):
        with pytest.raises(SystemExit) as end:
            run_script("sft", *arguments)
        printed = capsys.readouterr()
        assert is_safe(printed.out + printed.err)
        return end.value.code, printed.err

    return sft


def is_safe(text):
    """Whether a terminal shows the text and obeys nothing in it."""
    return all(char.isprintable() or char == "\n" for char in text)


def test_every_kind_of_problem_is_among_them_and_many_that_are_no_rows():
    said = {broken.says for broken in KINDS.values()}
    assert {*problems.KINDS} - said == ELSEWHERE
    assert len(said) > 80


@pytest.mark.parametrize("name", KINDS)
def test_check_names_the_problem_and_its_rows(name, recipe, check):
    says, rows = KINDS[name].says, KINDS[name].rows
    code, found, printed = check(recipe(name))
    assert is_safe(printed)
    assert code == {"fatal": 2, "error": 1}.get(severity(name), 0)
    if code == 2:
        assert printed.startswith("error: ") and says in printed
        return
    # A row with an error may have a warning as well, but no second error.
    named = [problem for problem in found if problem["severity"] == "error" or not code]
    assert [problem["kind"] for problem in named] == [says] * bool(says)
    for problem in named:
        assert [row["row"] for row in problem["rows"]] == list(rows) and problem["what"] in printed


@pytest.mark.parametrize("name", ERRORS)
def test_training_ends_with_the_message_before_it_begins(name, recipe, sft):
    path, says = recipe(name), KINDS[name].says
    code, message = sft("--config", path)
    if says == "control_token":  # not found by the data side, which knows no model
        says = "holds a control token of this model in row bad"
    assert code == 2 and message.startswith("error: ")
    assert (problems.KINDS[says].what if says in problems.KINDS else says) in message
    assert not (path.parent / "run").exists()


@pytest.mark.parametrize("name", [name for name in ERRORS if name not in LATER])
def test_a_stream_ends_with_a_message_at_the_row(name, recipe):
    collator = AnswerCollator(None, Prompts(), num_letters=4)
    with pytest.raises(InputError):
        arguments = read_recipe(["--config", str(recipe(name)), "--streaming", "true"]).arguments
        for example in stream_examples(arguments.train_data, arguments.data_options).examples:
            collator.images(example)


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ERRORS])
def test_what_is_no_error_is_trained_on(name, recipe):
    arguments = read_recipe(["--config", str(recipe(name))]).arguments
    loaded = read_examples(arguments.train_data, arguments.data_options)
    assert {*choose_parts([loaded])[0]} == {TRAIN}


@pytest.mark.parametrize("name", [name for name in HOSTILE if severity(name) != "fatal"])
def test_hostile_texts_are_only_shown_on_the_page(name, recipe, check):
    page = recipe(name).parent / "page.html"
    check(recipe(name), "--html", page)
    text = page.read_text()
    assert is_safe(text.replace("\u200c", "").replace("\u200d", ""))
    assert "<script>alert" not in text and "<img src=x" not in text
    assert "Which animal is on card 0?" in text


# --- Recipes that do not fit their data -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"max_choices": 3}, "max_choices is 3, and"),
        ({"folds_file": "folds.csv", "fold": 0}, "is left to train on"),
        ({"folds_file": "folds.csv", "fold": 1}, "it has the folds 0"),
        ({"on_bad_row": "skip", "folds_file": "missing.csv", "fold": 1}, "is left to validate on"),
        ({"on_bad_row": "skip", "folds_file": "missing.csv", "fold": 0}, "is left to train on"),
        ({"train_data": "[]"}, "`train_data` is not set"),
        ({"train_data": "['']"}, "no data is named"),
        ({"columns": "nonsense"}, "`columns` must be a mapping"),
        ({"type_prompts": "{zebra: 'x'}"}, "no question type is called 'zebra'"),
        ({"folds_file": "folds.csv", "fold": -1}, "fold must be at least 0"),
    ],
)
def test_a_recipe_that_does_not_fit_its_rows_says_so(fields, part, recipe, sft, tmp_path):
    (tmp_path / "good.png").write_bytes((recipe("formula").parent / "good.png").read_bytes())
    source = tmp_path / table(
        [row(i, path="nowhere.png" if i % 2 and "on_bad_row" in fields else "good.png") for i in range(4)]
    )(tmp_path)
    (tmp_path / "folds.csv").write_text("id,fold\n" + "".join(f"good_{i},0\n" for i in range(4)))
    (tmp_path / "missing.csv").write_text("id,fold\n" + "".join(f"good_{i},{i % 2}\n" for i in range(4)))
    fields = {"train_data": source} | fields
    if "folds_file" in fields:
        fields["folds_file"] = tmp_path / fields["folds_file"]
    arguments = [token for key, value in fields.items() for token in (f"--{key}", value)]
    code, message = sft("--config", recipe("formula"), *arguments, "--output_dir", tmp_path / "run")
    assert code == 2 and part in message and not (tmp_path / "run").exists()


def test_a_path_on_the_command_line_is_taken_as_it_is(recipe, sft, tmp_path):
    code, message = sft("--config", recipe("formula"), "--train_data", f"{tmp_path}/part #2/train.csv")
    assert code == 2 and f"no such file: {tmp_path}/part #2/train.csv" in message


def test_paths_of_a_streamed_parquet_file_are_relative_to_it(recipe):
    folder = recipe("bytes_for_a_question").parent
    datasets.Dataset.from_list([row(i) for i in range(NUM_GOOD)]).to_parquet(folder / "paths.parquet")
    read, streamed = read_examples(str(folder / "paths.parquet")), stream_examples(str(folder / "paths.parquet"))
    assert list(streamed.examples) == list(read.examples)
