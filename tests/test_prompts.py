import pytest

from vqa_sft.prompts import Prompts, render_messages


def test_a_question_becomes_system_text_pictures_and_lettered_choices():
    messages = render_messages("Which?", ["cat", "dog", "fox"], (2, 0, 1), 2, Prompts(system="S"))
    assert messages == [
        {"role": "system", "content": [{"type": "text", "text": "S"}]},
        {
            "role": "user",
            "content": [
                {"type": "image"},
                {"type": "image"},
                {"type": "text", "text": "Which?\nA. fox\nB. cat\nC. dog"},
            ],
        },
    ]


def test_an_empty_system_text_is_left_to_the_template():
    roles = [message["role"] for message in render_messages("Q", ["x", "y"], (0, 1), 1, Prompts(system=""))]
    assert roles == ["user"]


def test_braces_and_placeholders_in_the_data_stay_as_they_are():
    messages = render_messages("{choices} or {x}?", ["{letter}", "{text}"], (0, 1), 0, Prompts(system=""))
    assert messages[0]["content"][-1]["text"] == "{choices} or {x}?\nA. {letter}\nB. {text}"


def test_a_template_without_its_placeholders_is_refused():
    with pytest.raises(ValueError, match="`user` must contain"):
        Prompts(user="{question}")


def test_the_digest_changes_with_any_text():
    assert len({Prompts().digest, Prompts(system="").digest, Prompts(choice="{letter}) {text}").digest}) == 3
