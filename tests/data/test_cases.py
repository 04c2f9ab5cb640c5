"""The table of cases.py: each input is read as it is right, and by all three loaders alike."""

import importlib.util
from pathlib import Path

import cases
import pytest
import yaml
from cases import CASES
from hypothesis import HealthCheck, given, settings, strategies as st
from scripts import RECIPES

from vqa_sft.cli.data import read_data
from vqa_sft.config.prediction import PredictionArguments
from vqa_sft.config.recipe import read_recipe
from vqa_sft.config.training import RecipeArguments
from vqa_sft.data.examples import read_examples, stream_examples
from vqa_sft.errors import InputError
from vqa_sft.inference.plan import find_runs
from vqa_sft.inference.rows import read_rows


def script(name):
    spec = importlib.util.spec_from_file_location(f"recipes_{name}", RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SFT = script("sft")


def options_of(case):
    return RecipeArguments(train_data="none", **case.options).data_options


def found(load):
    """(choices, answers) of every row, or None where the rows are refused."""
    try:
        loaded = load()
        loaded.problems.raise_if_any(loaded.name)
    except InputError:
        return None
    return loaded.examples["choices"][:], loaded.examples["answer"][:]


def by_training(path, case):
    recipe = Path(path).with_suffix(".yaml")
    values = {"train_data": str(path), "output_dir": str(path.parent / "run"), "model_name_or_path": "none"}
    recipe.write_text(yaml.safe_dump(values | case.options, allow_unicode=True))
    return found(lambda: SFT.load_data(read_recipe(["--config", str(recipe)]))[0])


def by_prediction(path, case):
    names = ("columns", "keep_rows", "encoding", "answer_format", "fixed_question", "fixed_choices")
    options = {name: case.options.get(name) for name in names}
    args = PredictionArguments(run="none", output="out.csv", model="none", data=str(path), **options)
    return found(lambda: read_rows(args, find_runs(args)).sources[0])


def by_check(path, case):
    return found(lambda: read_data(RecipeArguments(train_data=str(path), **case.options))[0][1])


@pytest.mark.parametrize("name", CASES)
def test_each_input_is_read_as_it_is_right_or_refused(name, tmp_path):
    case = CASES[name]
    path = str(cases.write(case, tmp_path))
    if case.refused:
        with pytest.raises(InputError) as error:
            loaded = read_examples(path, options_of(case))
            loaded.problems.raise_if_any(loaded.name)
        assert all(word in str(error.value) for word in case.refused), error.value
        return
    loaded = read_examples(path, options_of(case))
    loaded.problems.raise_if_any(loaded.name)
    assert loaded.examples["answer"][:] == case.answers
    assert case.choices is None or loaded.examples["choices"][0] == case.choices
    warned = " ".join(f"{kind.what} {kind.fix} {labels}" for _, kind, labels in loaded.problems)
    assert all(word in warned for word in case.warns), warned
    assert all(any(word in note for note in loaded.notes) for word in case.notes), loaded.notes


@pytest.mark.parametrize("name", [name for name in CASES if not CASES[name].refused])
def test_a_stream_reads_the_same(name, tmp_path):
    case = CASES[name]
    examples = stream_examples(str(cases.write(case, tmp_path)), options_of(case)).examples
    assert sorted(row["answer"] for row in examples) == sorted(case.answers)


@pytest.mark.parametrize("name", CASES)
def test_training_prediction_and_check_agree(name, tmp_path):
    case, path = CASES[name], cases.write(CASES[name], tmp_path)
    trained = by_training(path, case)
    assert (trained is None) == bool(case.refused)
    assert by_prediction(path, case) == trained and by_check(path, case) == trained


TABLES = [name for name, case in CASES.items() if not isinstance(case.rows, str)]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_training_prediction_and_check_agree_on_any_rows_of_the_cases(tmp_path, data):
    """Some rows of a case, in any order, with cells of other rows or none in some of them: the same reading, or each a
    refusal. (Prediction needs no answers, and takes one answer in all rows for none: rows are kept that have two.)"""
    case = CASES[data.draw(st.sampled_from(TABLES))]
    rows = data.draw(st.lists(st.sampled_from(case.rows), min_size=6, max_size=16, unique_by=lambda row: str(row)))
    rows = [dict(row) for row in rows]
    texts = [key for key in rows[0] if key not in ("id", "image", "answer", "label", "correct_answer")]
    for number, key in (
        data.draw(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(texts)), max_size=2)) if texts else ()
    ):
        rows[number][key] = data.draw(st.sampled_from(["", "NaN", "A", "3", "cat", "All of the above"]))
    answer = next(key for key in ("answer", "label") if key in rows[0])
    if len({str(row[answer]) for row in rows}) < 2:
        return
    path = cases.write(case, tmp_path, rows=rows)
    trained = by_training(path, case)
    assert by_check(path, case) == trained
    assert by_prediction(path, case) == trained
