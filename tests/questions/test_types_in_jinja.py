"""The types of questions in Jinja, against those in Python; rendered in a sandbox like transformers' own."""

import time
import unicodedata

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from test_types import HARD, QUESTIONS, WORDS_OF_CHOICES

from vqa_sft.batch.decision_template import MACROS
from vqa_sft.batch.type_template import type_template
from vqa_sft.questions.types import find_type

WRITTEN = [line.strip() for lines in QUESTIONS.values() for line in lines.strip().splitlines()]
YES_NO = (
    ["yes", "no"],
    ["Yes.", "No, it is closed."],
    ["예", "아니오"],
    ["네, 켜져 있습니다.", "아니요."],
    ["네모", "예술"],
)


@pytest.fixture(scope="module")
def find():
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    given = "{%- set vqa_tokens, vqa_question = [], question -%}{%- set vqa.choices = choices -%}"
    template = environment.from_string(MACROS + given + type_template({"ocr": "..."}) + "[{{ vqa.type }}]")

    def find(question, choices=WORDS_OF_CHOICES):
        shown = template.render(question=question, choices=choices)
        assert shown[0] == "[" and shown[-1] == "]"  # nothing is written beside the prompt
        return shown[1:-1] or "general"

    return find


@pytest.mark.medium
def test_every_question_has_the_type_that_training_gave_it(find):
    odd = [f"  {text.upper()}\n" for text in WRITTEN[::5]] + [text * 9 for text in WRITTEN[::40]]
    questions = [*WRITTEN, *HARD, *odd, "?", "색", "How\tmany dogs?"]
    assert [text for text in questions if find(text) != find_type(text, WORDS_OF_CHOICES)] == []
    assert len({find(text) for text in WRITTEN}) == 6


@pytest.mark.parametrize("choices", YES_NO)
def test_choices_that_say_yes_and_no_decide(find, choices):
    assert find("What colour is it?", choices) == find_type("What colour is it?", choices)


def test_letters_in_parts_are_refused_for_jinja_cannot_join_them(find):
    with pytest.raises(ValueError, match="Unicode NFC"):
        find(unicodedata.normalize("NFD", "소파의 색깔은 무엇인가요?"))


@pytest.mark.parametrize("piece", ["what ", "what is the ", "색깔", "표지판에 ", "title of the a b ", "where", "("])
def test_a_hostile_text_costs_little_time(find, piece):
    text, start = piece * 10_000, time.process_time()
    assert find(text) == find_type(text, WORDS_OF_CHOICES)
    assert time.process_time() - start < 2  # 0.1 s
