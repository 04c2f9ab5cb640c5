"""example -> messages -> the text that the model reads before the letter. The answer is never part of it. No torch."""

import functools
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from vqa_sft.batch import template
from vqa_sft.errors import InputError, explains, name_rows
from vqa_sft.questions.letters import LETTERS, choices_to_letters
from vqa_sft.questions.types import TYPES

if TYPE_CHECKING:
    import datasets
    from transformers import ProcessorMixin


@dataclass(frozen=True)
class Prompts:
    """The texts around a question. They are saved with the run, and predict uses the saved ones.

    An empty `system` leaves the system turn to the model's chat template. `user` uses {question} and {choices}; `types`
    holds such a text for each question type that does not use `user`. `choice` uses {letter} and {text}. `context`
    surrounds a hint or passage, its label and line end included, before the line of the question or at {context}.
    `image` stands before each image of a row with several, {number} from 1.

    `template_options` go to the chat template, and `system_as_text` says that it wants the system text as a text and
    not as a list of content: what `settle_prompts` found for the model. Runs made before it have neither.
    """

    system: str = "Answer the multiple-choice question with the letter of the right choice."
    user: str = "{question}\n{choices}"
    choice: str = "{letter}. {text}"
    context: str = "{context}\n"
    # With the space, because some chat templates put all images first and then all texts in one line.
    image: str = "Image {number}: "
    types: dict[str, str] = field(default_factory=dict)
    template_options: dict[str, Any] = field(default_factory=dict)
    system_as_text: bool = False

    def __post_init__(self) -> None:
        unknown = [name for name in self.types if name not in TYPES]
        if unknown:
            raise InputError(f"no question type is called {unknown[0]!r}. Use one of {', '.join(TYPES)}.")
        _check("choice", self.choice, ("{letter}", "{text}"))
        _check("context", self.context, ("{context}",))
        _check("image", self.image, ("{number}",))
        for name, text in {"user": self.user, **self.types}.items():
            _check(name, text, ("{question}", "{choices}"))
            if text.count("{context}") > 1:
                raise InputError(f"prompt `{name}` may contain {{context}} once only; got {text!r}.")
        with explains((TypeError, ValueError), f"template_options must be plain values; got {self.template_options!r}"):
            json.dumps(self.template_options, sort_keys=True, allow_nan=False)

    @property
    def all_texts(self) -> str:
        """Every text, one below the other, to search in."""
        return "\n".join([self.system, self.user, self.choice, self.context, self.image, *self.types.values()])

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that name these texts in prediction files."""
        texts = asdict(self)
        for name in ("template_options", "system_as_text"):  # older files were named without them
            if not texts[name]:
                del texts[name]
        return hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()[:12]


def _check(name: str, text: str, fields: Sequence[str]) -> None:
    if not isinstance(text, str):  # a recipe may hold anything
        raise InputError(f"prompt `{name}` must be a text; got {text!r}.")
    wrong = [field for field in fields if text.count(field) != 1]
    if wrong:
        raise InputError(f"prompt `{name}` must contain {' and '.join(wrong)} once; got {text!r}.")


# What the built-in prompts say: English, Korean. No word on the form of the answer but in the system text.
_SYSTEM = (Prompts.system, "객관식 문제입니다. 정답에 해당하는 보기의 알파벳만 쓰세요.")
_GUIDANCE = {
    "counting": ("Count one by one.", "하나씩 세어 보세요."),
    "colour": ("Look closely at the colour.", "색을 자세히 살펴보세요."),
    "ocr": ("Read carefully what is written.", "적혀 있는 내용을 꼼꼼히 읽어 보세요."),
    "yes_no": ("Check whether it is true.", "사실인지 확인해 보세요."),
    "place": ("Look at the place and what is around it.", "장소와 그 주변을 살펴보세요."),
    "attribute": ("Look closely at the details.", "세부적인 특징을 자세히 살펴보세요."),
}


def _texts(*languages: int) -> dict[str, str]:
    """The system text and a template for each type, in the given languages: 0 English, 1 Korean."""
    guidance = {name: " ".join(texts[i] for i in languages) for name, texts in _GUIDANCE.items()}
    return {
        "system": "\n".join(_SYSTEM[i] for i in languages),
        "general": Prompts.user,
        **{name: f"{text}\n{Prompts.user}" for name, text in guidance.items()},
    }


LANGUAGES = {"en": _texts(0), "ko": _texts(1), "both": _texts(0, 1)}
# The choice of a classification that none of the candidates is right.
NONE_OF_THESE = {"en": "None of these", "ko": "해당하는 것 없음", "both": "None of these (해당하는 것 없음)"}


def builtin_prompts(language: str = "en", by_type: bool = False) -> Prompts:
    """Our own texts in a language of LANGUAGES; with `by_type`, a sentence of guidance for the type of the question."""
    if language not in LANGUAGES:
        raise InputError(f"no built-in prompts in {language!r}. Use one of {', '.join(LANGUAGES)}.")
    texts = LANGUAGES[language]
    types = {name: texts[name] for name in TYPES if name != "general"}
    return Prompts(system=texts["system"], user=texts["general"], types=types if by_type else {})


def render_messages(row: dict, order: Sequence[int], prompts: Prompts) -> list[dict]:
    """Chat messages for a canonical row whose choices stand under the letters in `order`. What the row says is shown
    unchanged, MMMU's "<image 2>" too: it is no control token ("<image>" is), and names the number before that image.

    Images are placeholders ({"type": "image"}): their contents would have to travel through Arrow, which adds
    `image: None` to text blocks and so breaks templates.
    """
    # str.replace, not str.format: questions and choices may contain braces.
    lines = [
        prompts.choice.replace("{letter}", LETTERS[i]).replace("{text}", text)
        for i, text in enumerate(choices_to_letters(row["choices"], order))
    ]
    context = row.get("context") or ""
    text = _fill(
        prompts.types.get(row.get("question_type"), prompts.user),
        question=row["question"],
        choices="\n".join(lines),
        context=prompts.context.replace("{context}", context) if context else "",
    )
    content = [*_image_blocks(len(row["images"]), prompts.image), {"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}]
    if prompts.system:
        system = prompts.system if prompts.system_as_text else [{"type": "text", "text": prompts.system}]
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _image_blocks(num_images: int, label: str) -> list[dict]:
    if num_images < 2:
        return [{"type": "image"}] * num_images
    labels = [label.replace("{number}", str(number)) for number in range(1, num_images + 1)]
    return [block for text in labels for block in ({"type": "text", "text": text}, {"type": "image"})]


def _fill(template: str, **texts: str) -> str:
    return "".join(texts[part] if i % 2 else part for i, part in enumerate(split_user(template)))


def split_user(template: str) -> list[str]:
    """The user's text in parts: its own words and names of fields take turns."""
    if "{context}" not in template:
        line = template.rfind("\n", 0, template.index("{question}")) + 1
        template = f"{template[:line]}{{context}}{template[line:]}"
    # Line ends after {context} are those of that text: without it, no empty line remains. Only the
    # template is split, so that a question that contains "{choices}" stays as it is.
    return re.split(r"\{(question|choices|context)\}", re.sub(r"(\{context\})\n+", r"\1", template))


def settle_prompts(processor: "ProcessorMixin", prompts: Prompts) -> tuple[Prompts, list[str]]:
    """The prompts as the model's chat template takes them, and what to tell the user of that. Raises InputError where
    it cannot take them."""
    options, lines = template.choose_options(processor, prompts.template_options), []
    if "enable_thinking" in options.keys() - prompts.template_options.keys():
        lines.append("Thinking is off: the chat template gets enable_thinking: false. template_options changes that.")
    template.check_content(processor, options)
    as_text = False
    if prompts.system:
        as_text, is_shown = template.find_system_form(processor, options)
        if not is_shown:
            lines.append('The chat template leaves the system text out; system_prompt: "" says the same.')
    settled = replace(prompts, system_as_text=as_text)
    row = {"question": "?", "choices": ["x", "y"], "images": [None]}
    dated = template.keep_date(processor, options, render_messages(row, (0, 1), settled))
    for name in dated.keys() - options.keys():
        lines.append(f"The chat template writes the date; the run keeps today's, {name}: {dated[name]}.")
    return replace(settled, template_options=dated), lines


def render_prompt(processor: "ProcessorMixin", row: dict, order: Sequence[int], prompts: Prompts) -> str:
    """The text that the model reads before the letter, generation prompt included."""
    messages, options = render_messages(row, order, prompts), prompts.template_options
    try:
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **options)
    except Exception as error:
        raise template.refusal(error) from error
    before, _, _ = template.find_answer(processor, str(processor.chat_template), json.dumps(options, sort_keys=True))
    return prompt + before


def list_control_tokens(processor: "ProcessorMixin") -> list[str]:
    """Every control token of the model."""
    tokens = {token.content for token in processor.tokenizer.added_tokens_decoder.values() if token.special}
    return [token for token in sorted(tokens) if token.strip()]


@functools.lru_cache
def control_tokens(processor: "ProcessorMixin") -> re.Pattern:
    """Matches every control token of the model."""
    return re.compile("|".join(map(re.escape, list_control_tokens(processor))) or r"(?!)")


def has_control_token(processor: "ProcessorMixin", row: dict) -> bool:
    """Whether a text of the row holds one."""
    return bool(control_tokens(processor).search("\n".join([row["context"], row["question"], *row["choices"]])))


def check_prompts(processor: "ProcessorMixin", prompts: Prompts) -> None:
    """Raises InputError for prompts that hold a control token of this model."""
    own = control_tokens(processor).search(prompts.all_texts)
    if own:
        raise InputError(f"the prompt holds {own.group()!r}, a control token of this model. Take it out.")


def check_names(processor: "ProcessorMixin", names: Sequence[str]) -> None:
    """Raises InputError for classes whose names hold a control token of this model."""
    if found := [name for name in names if control_tokens(processor).search(name)]:
        raise InputError(f"a control token of this model is in the name of the class {found[0]!r}. Take it out.")


def check_texts(processor: "ProcessorMixin", examples: "datasets.Dataset", prompts: Prompts) -> None:
    """Raises InputError for texts that hold a control token of this model ("<|image_pad|>", "<image>", "<|im_end|>"):
    the tokenizer would take it for the real one, and the row would be another prompt or none."""
    check_prompts(processor, prompts)
    rows = examples.select_columns(["id", "question", "context", "choices"])
    found = [row["id"] for row in rows if has_control_token(processor, row)]
    if found:
        raise InputError(
            f"the question or a choice holds a control token of this model in {name_rows(found, len(examples))}. "
            "Take it out."
        )
