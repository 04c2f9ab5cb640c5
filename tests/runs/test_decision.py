"""A run as a decision model: transformers' pipeline, on what was exported or pushed, against our Predictor."""

import base64
import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import DecisionConfig, pipeline

import vqa_sft
from vqa_sft.batch.decision_template import MOST_CHARS, decision_template
from vqa_sft.batch.prompts import Prompts, builtin_prompts, render_prompt
from vqa_sft.errors import InputError
from vqa_sft.models.load import load_processor
from vqa_sft.questions.letters import identity_order
from vqa_sft.questions.types import find_type
from vqa_sft.runs import hub
from vqa_sft.runs.decision import decision_config
from vqa_sft.runs.export import export_run
from vqa_sft.runs.folder import read_run
from vqa_sft.tiny import TINY_PATH

pytestmark = pytest.mark.usefixtures("one_thread")
ODD = Prompts(
    system="",
    user='\tSay "{question}" \\ {{of}}\r\n{choices}\n\\end',
    choice="{text} ({letter}) \\n",
    context="<<{context}>>\n\n",
    image="[{number}]",
)
LATER = replace(builtin_prompts("both", by_type=True), user="{question}\n{context}\n\n{choices}")


@pytest.fixture(scope="module")
def calibrated(three, tmp_path_factory):
    """(contest, a run with a temperature)."""
    contest, run = three
    folder = tmp_path_factory.mktemp("decision") / "run"
    shutil.copytree(run / "fold0", folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    write_calibration(folder, {"temperature": 2.0, "bias": None})
    return contest, folder


@pytest.fixture(scope="module")
def exported(calibrated, tmp_path_factory):
    """The run's folders in fp32: merged, and base and adapter."""
    merged, adapter = (tmp_path_factory.mktemp("exported") / name for name in ("merged", "adapter"))
    export_run(str(calibrated[1]), str(merged), dtype="fp32")
    export_run(str(calibrated[1]), str(adapter), dtype="fp32", adapter=True)
    return merged, adapter


@pytest.fixture(scope="module")
def predict(calibrated):
    return vqa_sft.Predictor(calibrated[1], use_cpu=True)


@pytest.fixture(scope="module")
def decide(exported):
    return pipeline("decision", model=str(exported[0]))


def write_calibration(folder, entry):
    (folder / "calibration.json").write_text(json.dumps({"orders identity": entry}))


def rows_of(contest):
    with (contest / "test.csv").open(newline="") as file:
        return [*csv.DictReader(file)]


def asset(path):
    return {"type": "image", "format": "png", "data_base64": base64.b64encode(path.read_bytes()).decode()}


def request_of(contest, row, **own):
    choice = {"type": "choice", "instructions": row["question"], "criteria": {x: row[x] for x in "abcd" if row[x]}}
    questions = {"one": choice, "level": {"type": "score", "instructions": "How?", "criteria": ["low", "mid", "high"]}}
    questions |= {"is it": {"type": "noul", "instructions": "Is it red?"}}
    questions |= {"by name": {"type": "choice", "instructions": " Which? ", "criteria": {"cat ": None, "dog": None}}}
    assets = {"image-1": asset(contest / row["path"])}
    return {"state": {"images": ["image-1"]}, "questions": questions, "assets": assets} | own


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, answer in found.items():
        assert answer.keys() == expected[name].keys()
        for key, value in answer.items():
            assert value == pytest.approx(expected[name][key], abs=1e-5), (name, key)


def test_the_pipeline_answers_as_the_predictor_merged_or_with_the_adapter_beside_the_base(
    calibrated, exported, predict, decide
):
    contest, _ = calibrated
    beside = pipeline("decision", model=str(exported[1]))
    for row in rows_of(contest)[:3]:
        request = request_of(contest, row)
        expected = predict.decide(request)
        choices = [row[x] for x in "abcd" if row[x]]
        probs = predict(contest / row["path"], row["question"], choices)
        assert [*expected["one"]["probabilities"].values()] == pytest.approx(probs.tolist(), abs=1e-5)
        assert_same(decide(request), expected)
        assert_same(beside(request), expected)
        assert_same(predict.decide(json.dumps(request)), expected)
    # Without the temperature it would be another.
    assert DecisionConfig.from_pretrained(exported[0]).temperature == {"choice": 2.0, "score": 2.0, "noul": 2.0}


@pytest.mark.parametrize(
    "state", [{"images": []}, "image-1", ["image-1", "image-1"], {"images": "image-1 image-1 image-1"}]
)
def test_images_stand_in_a_state_as_one_likes(calibrated, predict, decide, state):
    request = request_of(calibrated[0], rows_of(calibrated[0])[0], state=state)
    assert_same(decide(request), predict.decide(request))


def questions(**own):
    return {"questions": {"q": {"type": "choice", "instructions": "Which?", "criteria": {"x": None, "y": None}} | own}}


WRONG = {
    "must be one of noul, choice, score": questions(type="rank"),
    "at most 4 options": questions(criteria=dict.fromkeys("vwxyz")),
    "needs? (2 to 4 choices|two options)": questions(criteria={"x": None}),
    "differ|all the same": questions(criteria={"x": "z", "y": "z"}),
    "an option .*is empty": questions(criteria={"x": " ", "y": None}),
    "an option must be a text": questions(criteria={"x": ["z"], "y": None}),
    "an option must be a text without images": questions(criteria={"x": "image-1", "y": None}),
    "instructions must be a text": questions(instructions=None),
    "instructions must be a text without images": questions(instructions="image-1?"),
    "empty": questions(instructions=" "),
    "control token": questions(instructions="<|image_pad|> What?"),
    "null byte": questions(instructions="W\0?"),
    f"more than {MOST_CHARS:,}|more than {MOST_CHARS}": questions(instructions="x" * 70_000),
    "at least one question": {"questions": {}},
    "names no image": {"state": "What?"},
    "names no image of assets": {"assets": {}},
    "needs images": {"state": {}},
    "neither a text nor": {"state": 5},
    "neither a text nor an image": {"state": {"images": None}},
    "images and context, and nothing else": {"state": {"images": ["image-1"], "photo": "image-1"}},
    "trained without contexts": {"state": ["image-1", "It is night."]},
    "more than 32 images": {"state": "image-1" * 33},
}


@pytest.mark.parametrize("said", WRONG)
def test_what_the_run_was_not_trained_for_is_a_value_error_here_and_there(calibrated, predict, decide, said):
    """transformers serve answers 400 to it."""
    request = request_of(calibrated[0], rows_of(calibrated[0])[0]) | WRONG[said]
    with pytest.raises(ValueError, match=said):
        predict.decide(request)
    # Of a control token the processor would make an image.
    with pytest.raises(ValueError, match=said):
        decide(request)


def test_assets_that_only_the_predictor_refuses_in_one_line(calibrated, predict):
    row = rows_of(calibrated[0])[0]
    for given, said in (("http://localhost/x.png", "nothing is downloaded"), ({}, "no data_base64"), (5, "is a path")):
        with pytest.raises(InputError, match=said):
            predict.decide(request_of(calibrated[0], row, assets={"image-1": given}))
    # transformers would open the file.
    with pytest.raises(InputError, match="is no base64"):
        path = str(calibrated[0] / row["path"])
        predict.decide(request_of(calibrated[0], row, assets={"image-1": {"data_base64": path}}))
    for assets in (5, {1: b""}, {"": b""}):
        with pytest.raises(InputError, match="assets map names to images"):
            predict.decide(request_of(calibrated[0], row, assets=assets))
    for given in ("{", [], {"state": ""}):
        with pytest.raises(InputError, match="request"):
            predict.decide(given)


@pytest.mark.parametrize("prompts", [Prompts(), ODD, LATER], ids=["default", "odd", "by type"])
@pytest.mark.parametrize("context", ["", "It is {night}.\n\nAnd dark. "])
def test_the_template_writes_the_prompt_of_the_run_byte_for_byte(prompts, context):
    processor = load_processor(str(TINY_PATH))
    template = decision_template(processor, prompts, has_images=True, has_context=True)
    for number, text in enumerate(
        ["Who is it?", "몇 마리의 개가 있나요?", 'What does "{choices}" say?', "Where \\n is {x}?"]
    ):
        choices, images = ["yes", "no"] if number == 3 else ["{text}", "a\nb", "고양이 🐈", "</s>"], number % 3
        row = {"question": text, "choices": choices, "context": context.strip(), "images": [None] * images}
        row["question_type"] = find_type(text, choices)
        question = {"type": "choice", "instructions": text, "options": choices, "descriptions": [None] * len(choices)}
        state = {"images": [[{"type": "image"}]] * images, "context": context}
        how = {"chat_template": template, "add_generation_prompt": True, "tokenize": False}
        shown = processor.apply_chat_template([{"role": "user", "content": ""}], **how, state=state, question=question)
        assert shown == render_prompt(processor, row, identity_order(len(choices)), prompts)


def test_candidates_that_say_yes_and_no_leave_the_type_of_a_classification_to_its_question():
    processor = load_processor(str(TINY_PATH))
    how = {"has_images": False, "has_context": False}
    for choices in (["yes", "no"], ["cat", "dog"]):
        row = {"question": "What colour is it?", "choices": choices, "images": [], "question_type": "colour"}
        question = {"type": "choice", "instructions": row["question"], "options": choices, "descriptions": [None] * 2}
        template = decision_template(processor, LATER, **how, is_classification=True)
        asked = {"chat_template": template, "add_generation_prompt": True, "tokenize": False, "state": ""}
        shown = processor.apply_chat_template([{"role": "user", "content": ""}], **asked, question=question)
        assert shown == render_prompt(processor, row, identity_order(2), LATER)


def test_a_run_that_cannot_be_expressed_is_refused_and_can_be_exported_plain(calibrated, tmp_path, run):
    folder = shutil.copytree(calibrated[1], tmp_path / "run")
    write_calibration(folder, {"temperature": 2.0, "bias": [0.0, 0.1, -0.1, 0.0]})
    code, _, error = run("export", folder, tmp_path / "out")
    assert code == 2 and "has a bias for each letter" in error and "--plain" in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()
    code, printed, _ = run("export", folder, tmp_path / "out", "--plain")
    assert code == 0 and "decision" not in printed and not (tmp_path / "out" / "decision.json").exists()


def test_a_prompt_that_transformers_would_write_otherwise_is_noticed(calibrated, monkeypatch):
    run = read_run(calibrated[1])
    other = replace(run, prompts=replace(run.prompts, user="{question}\n\n{choices}"))
    template = decision_template(load_processor(str(calibrated[1])), other.prompts, has_images=True, has_context=False)
    monkeypatch.setattr("vqa_sft.runs.decision.decision_template", lambda *args, **how: template)
    with pytest.raises(InputError, match="makes another prompt than the run was trained on"):
        decision_config(run, load_processor(str(calibrated[1])))


def python_of(card, contest):
    """The Python blocks of a card, on an image that is there."""
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    path = contest / rows_of(contest)[0]["path"]
    return [block.replace("photo.jpg", str(path)) for block in blocks]


@pytest.mark.parametrize("name", ["pushed", "merged"])
def test_what_a_card_says_can_be_run(calibrated, exported, predict, tmp_path, name):
    contest, run = calibrated
    if name == "pushed":
        folder = shutil.copytree(run, tmp_path / "run")
        hub.write_card(folder)
        assert "decision" not in (folder / "README.md").read_text()
        assert hub.add_decision(folder, read_run(folder)) is None
    else:
        folder = exported[0]
    card = (folder / "README.md").read_text()
    card = re.sub(r'folder = ".*?"', f'folder = "{folder}"', card)
    found = {}
    for block in python_of(card, contest):
        exec(block.replace("print(", "found = ("), found)
    assert "not run" in card and len(python_of(card, contest)) == 2 and isinstance(found["model"], torch.nn.Module)
    expected = predict(contest / rows_of(contest)[0]["path"], "Which animal is it?", ["cat", "dog"])
    assert [*found["found"].values()] == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("columns", [{"image": []}, {"context": "hint"}], ids=["no images", "context"])
def test_a_card_asks_as_the_run_was_trained(calibrated, tmp_path, columns):
    contest, run = calibrated
    folder = shutil.copytree(run, tmp_path / "run")
    content = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(content | {"columns": content["columns"] | columns}))
    hub.write_card(folder)
    assert hub.add_decision(folder, read_run(folder)) is None
    block = python_of((folder / "README.md").read_text(), contest)[1]
    found = {}
    exec(re.sub(r'folder = ".*?"', f'folder = "{folder}"', block).replace("print(", "found = ("), found)
    predict = vqa_sft.Predictor(folder, use_cpu=True)
    expected = predict.decide(found["request"])["one"]["probabilities"]
    assert found["found"] == pytest.approx(expected, abs=1e-5)
    if not predict.has_images:
        for decide in (found["decide"], predict.decide):
            with pytest.raises(ValueError, match="trained without images"):
                decide(request_of(contest, rows_of(contest)[0]))


def test_an_adapter_beside_its_base_is_a_run_of_its_own_folder(exported):
    with pytest.raises(InputError, match="Give the run in it: .*/adapter"):
        read_run(exported[1])
    run = read_run(exported[1] / "adapter")
    assert run.recipe["output_dir"] == run.folder
    assert f'folder = "{run.folder}"' in (exported[1] / "adapter" / "README.md").read_text()


def test_a_folder_that_cannot_be_written_is_pushed_all_the_same(calibrated, monkeypatch):
    def refuse(*_, **how):
        raise PermissionError(13, "Permission denied", "decision.json")

    monkeypatch.setattr(DecisionConfig, "save_pretrained", refuse)
    said = hub.add_decision(calibrated[1], read_run(calibrated[1]))
    assert said == "No decision model: PermissionError: [Errno 13] Permission denied: 'decision.json'"


def test_the_request_of_the_docs_can_be_asked(calibrated, exported, predict):
    docs = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    (block,) = (found for found in python_of(docs, calibrated[0]) if "pipeline" in found)
    found = {}
    exec(block.replace("runs/mine_merged", str(exported[0])), found)
    assert_same(found["decide"](found["request"]), predict.decide(found["request"]))


def test_a_card_that_somebody_changed_stays_and_a_push_says_what_it_leaves_out(calibrated, tmp_path):
    folder = shutil.copytree(calibrated[1], tmp_path / "run")
    (folder / "README.md").write_text("mine")
    assert hub.add_decision(folder, read_run(folder)) is None and (folder / "decision.json").is_file()
    assert (folder / "README.md").read_text() == "mine"
    write_calibration(folder, {"temperature": 2.0, "bias": [0.0, 0.1, -0.1, 0.0]})
    assert "has a bias" in hub.add_decision(folder, read_run(folder))
    assert not [*Path(folder).glob("decision*")]  # those of before would say another temperature
