import json
from dataclasses import fields, replace

import pytest

from vqa_sft.batch.prompts import LANGUAGES, Prompts, builtin_prompts, render_messages
from vqa_sft.errors import InputError
from vqa_sft.questions.types import TYPES


def row(num_images=0, question="Which?", choices=("cat", "dog"), **more):
    return {"question": question, "choices": list(choices), "images": [None] * num_images, **more}


def user_text(row, prompts):
    messages = render_messages(row, range(len(row["choices"])), prompts)
    return messages[-1]["content"][-1]["text"]


# ---- the default: what the tiny base was trained on, byte for byte


def test_a_question_becomes_system_text_image_and_lettered_choices():
    assert render_messages(row(1, choices=["cat", "dog", "fox"]), (2, 0, 1), Prompts()) == [
        {
            "role": "system",
            "content": [
                {
                    "type": "text",
                    "text": "Answer the multiple-choice question with the letter of the right choice.",
                }
            ],
        },
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "Which?\nA. fox\nB. cat\nC. dog"}],
        },
    ]


@pytest.mark.parametrize("question_type", TYPES)
def test_without_templates_for_types_the_type_changes_nothing(question_type):
    plain = render_messages(row(1), (0, 1), Prompts())
    assert render_messages(row(1, context="", question_type=question_type), (0, 1), Prompts()) == plain


def test_an_empty_system_text_is_left_to_the_template():
    roles = [message["role"] for message in render_messages(row(1), (0, 1), Prompts(system=""))]
    assert roles == ["user"]


# ---- several images


def test_each_of_several_images_is_preceded_by_its_number():
    user = render_messages(row(3), (0, 1), Prompts(system=""))[0]
    assert user["content"] == [
        {"type": "text", "text": "Image 1: "},
        {"type": "image"},
        {"type": "text", "text": "Image 2: "},
        {"type": "image"},
        {"type": "text", "text": "Image 3: "},
        {"type": "image"},
        {"type": "text", "text": "Which?\nA. cat\nB. dog"},
    ]


def test_the_label_of_images_can_be_changed():
    user = render_messages(row(2), (0, 1), Prompts(image="({number})"))[1]
    assert [block.get("text") for block in user["content"][:4]] == ["(1)", None, "(2)", None]


def test_a_row_without_images_has_only_text():
    user = render_messages(row(0), (0, 1), Prompts())[1]
    assert user["content"] == [{"type": "text", "text": "Which?\nA. cat\nB. dog"}]


def test_references_to_images_stay_as_the_data_writes_them():
    mmmu = row(2, "Is <image 1> or <image 2> older?", ["<image 1>", "<image 2>"])
    assert user_text(mmmu, Prompts()) == "Is <image 1> or <image 2> older?\nA. <image 1>\nB. <image 2>"


# ---- context


def test_a_context_stands_before_the_question():
    assert user_text(row(context="It barks."), Prompts()) == "It barks.\nWhich?\nA. cat\nB. dog"


def test_a_context_stands_before_the_line_of_the_question():
    prompts = Prompts(user="Look.\nQuestion: {question}\n{choices}", context="Hint: {context}\n\n")
    assert user_text(row(context="It barks."), prompts) == (
        "Look.\nHint: It barks.\n\nQuestion: Which?\nA. cat\nB. dog"
    )
    assert user_text(row(context=""), prompts) == "Look.\nQuestion: Which?\nA. cat\nB. dog"


@pytest.mark.parametrize("user", ["{question}\n{context}{choices}", "{question}\n{context}\n{choices}"])
def test_a_template_may_say_where_the_context_stands(user):
    prompts = Prompts(user=user, context="Hint: {context}\n")
    assert user_text(row(context="It barks."), prompts) == "Which?\nHint: It barks.\nA. cat\nB. dog"


@pytest.mark.parametrize("user", ["{context}{question}\n{choices}", "{question}\n{context}\n{choices}"])
@pytest.mark.parametrize("absent", [{}, {"context": ""}, {"context": None}])
def test_no_context_leaves_nothing_not_even_an_empty_line(user, absent):
    assert user_text(row(**absent), Prompts(user=user)) == "Which?\nA. cat\nB. dog"


# ---- data stays as it is


def test_braces_and_placeholders_in_the_data_stay_as_they_are():
    hostile = row(0, "{choices} or {context} or {x}?", ["{letter}", "{text} {question}"], context="{question}{context}")
    prompts = Prompts(user="{context}{question}\n{choices}")
    expected = "{question}{context}\n{choices} or {context} or {x}?\nA. {letter}\nB. {text} {question}"
    assert user_text(hostile, prompts) == user_text(hostile, Prompts()) == expected


def test_backslashes_in_the_data_stay_as_they_are():
    assert user_text(row(0, r"\1 \g<0> \n", [r"\alpha", "%s"]), Prompts()) == "\\1 \\g<0> \\n\nA. \\alpha\nB. %s"


# ---- types


def test_a_type_has_its_own_template_and_others_use_the_general_one():
    prompts = Prompts(types={"counting": "Count.\n{question}\n{choices}"})
    assert user_text(row(question_type="counting"), prompts) == "Count.\nWhich?\nA. cat\nB. dog"
    assert user_text(row(question_type="colour"), prompts) == "Which?\nA. cat\nB. dog"
    assert user_text(row(), prompts) == "Which?\nA. cat\nB. dog"


# ---- languages


def test_the_english_default_is_the_default_of_all():
    assert builtin_prompts("en", by_type=False) == Prompts() == builtin_prompts()
    assert LANGUAGES["en"]["system"] == Prompts.system and LANGUAGES["en"]["general"] == Prompts.user


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_has_a_template_for_every_type(language):
    assert set(LANGUAGES[language]) == {"system", *TYPES}
    prompts = builtin_prompts(language, by_type=True)
    texts = {user_text(row(question_type=name, context="It barks."), prompts) for name in TYPES}
    assert len(texts) == len(TYPES)
    assert all(text.endswith("It barks.\nWhich?\nA. cat\nB. dog") for text in texts)
    assert builtin_prompts(language, by_type=False) == replace(prompts, types={})


def test_guidance_in_english_in_korean_and_in_both():
    counting = row(question_type="counting")
    lines = {name: user_text(counting, builtin_prompts(name, by_type=True)).split("\n") for name in LANGUAGES}
    assert lines == {
        "en": ["Count one by one.", "Which?", "A. cat", "B. dog"],
        "ko": ["하나씩 세어 보세요.", "Which?", "A. cat", "B. dog"],
        "both": ["Count one by one. 하나씩 세어 보세요.", "Which?", "A. cat", "B. dog"],
    }
    english, korean = LANGUAGES["en"]["system"], LANGUAGES["ko"]["system"]
    assert builtin_prompts("both", by_type=False).system == f"{english}\n{korean}"


def test_an_unknown_language_is_refused():
    with pytest.raises(InputError, match="'fr'.*en, ko, both"):
        builtin_prompts("fr", by_type=False)


# ---- what is refused


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"user": "{question}"}, "`user` must contain {choices} once"),
        ({"user": "{question}{question}{choices}"}, "`user` must contain {question} once"),
        ({"user": "{context}{question}{context}{choices}"}, "`user` may contain {context} once only"),
        ({"choice": "{text}"}, "`choice` must contain {letter} once"),
        ({"context": "Hint"}, "`context` must contain {context} once"),
        ({"image": "Image"}, "`image` must contain {number} once"),
        ({"types": {"ocr": "{choices}"}}, "`ocr` must contain {question} once"),
        ({"types": {"ocr": 3}}, "`ocr` must be a text; got 3"),
        ({"types": {"color": "{question}{choices}"}}, "'color'. Use one of counting, colour, ocr, yes_no, place"),
    ],
)
def test_templates_that_cannot_be_used_are_refused(texts, message):
    with pytest.raises(InputError) as error:
        Prompts(**texts)
    assert message in str(error.value)


# ---- saved with the run


def test_prompts_survive_being_saved_with_the_run():
    prompts = builtin_prompts("both", by_type=True)
    again = Prompts(**json.loads(json.dumps(vars(prompts))))
    assert again == prompts and again.digest == prompts.digest


def test_a_run_saved_before_there_were_types_still_loads():
    saved = {"system": "S", "user": "{question} {choices}", "choice": "{letter}) {text}"}
    assert user_text(row(), Prompts(**saved)) == "Which? A) cat\nB) dog"


def test_the_digest_changes_with_any_text_and_all_texts_holds_it():
    texts = {
        "system": "Look!",
        "user": "Look! {question}{choices}",
        "choice": "Look! {letter}{text}",
        "context": "Look! {context}",
        "image": "Look! {number}",
        "types": {"ocr": "Look! {question}{choices}"},
    }
    found = {"template_options": {"effort": "low"}, "system_as_text": True}
    assert {*texts, *found} == {field.name for field in fields(Prompts)}
    changed = [Prompts(**{name: text}) for name, text in texts.items()]
    more = [Prompts(**{name: value}) for name, value in found.items()]
    assert len({Prompts().digest, *(prompts.digest for prompts in [*changed, *more])}) == 9
    assert all("Look!" in prompts.all_texts for prompts in changed)
