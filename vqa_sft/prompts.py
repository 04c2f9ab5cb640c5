"""example -> messages. The answer is never part of the prompt."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from vqa_sft.mcq import LETTERS, choices_to_letters


@dataclass(frozen=True)
class Prompts:
    """The texts around a question. They are saved with the run, and predict uses the saved ones.

    `user` may use {question} and {choices}; `choice` may use {letter} and {text}. An empty `system` leaves the
    system turn to the model's chat template.
    """

    system: str = "Answer the multiple-choice question with the letter of the right choice."
    user: str = "{question}\n{choices}"
    choice: str = "{letter}. {text}"

    def __post_init__(self) -> None:
        for name, text, fields in (
            ("user", self.user, ("{question}", "{choices}")),
            ("choice", self.choice, ("{letter}", "{text}")),
        ):
            wrong = [field for field in fields if text.count(field) != 1]
            if wrong:
                raise ValueError(f"prompt `{name}` must contain {' and '.join(wrong)} once; got {text!r}")

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that name these texts in prediction files."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


def render_messages(
    question: str, choices: Sequence[str], order: Sequence[int], num_images: int, prompts: Prompts
) -> list[dict]:
    """Chat messages for one question whose choices stand under the letters in `order`.

    Pictures are placeholders ({"type": "image"}); the collator hands the pixels to the processor. Placeholders with
    contents would have to travel through Arrow, which adds `image: None` to text blocks and so breaks templates.
    """
    # str.replace, not str.format: questions and choices may contain braces.
    lines = [
        prompts.choice.replace("{letter}", LETTERS[i]).replace("{text}", text)
        for i, text in enumerate(choices_to_letters(choices, order))
    ]
    text = _fill(prompts.user, question=question, choices="\n".join(lines))
    content = [{"type": "image"}] * num_images + [{"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}]
    if prompts.system:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": prompts.system}]})
    return messages


def _fill(template: str, question: str, choices: str) -> str:
    # Split at the placeholder first, so that a question that contains "{choices}" stays as it is.
    before, after = template.split("{choices}", 1)
    return before.replace("{question}", question) + choices + after.replace("{question}", question)
