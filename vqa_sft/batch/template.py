"""The chat template: the text that the model reads before the letter, and what stands around an answer."""

import functools
import re
from collections.abc import Sequence

import datasets
from jinja2 import TemplateError
from transformers import ProcessorMixin

from vqa_sft.batch.prompts import Prompts, render_messages
from vqa_sft.errors import InputError, name_rows

_ANSWER = "Answer-of-a-row"  # stands in no template


def render_prompt(processor: ProcessorMixin, row: dict, order: Sequence[int], prompts: Prompts) -> str:
    """The text that the model reads before the letter, generation prompt included."""
    messages = render_messages(row, order, prompts)
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return prompt + answer_prefix(processor)[0]


@functools.lru_cache
def answer_prefix(processor: ProcessorMixin) -> tuple[str, str]:
    """What the template puts between the generation prompt and the answer: (what belongs to the prompt, what belongs to
    the letter's token). Most put nothing; after "Assistant:" comes " A", which is another token than "A"; templates of
    thinking models close an empty thought first ("\\n</think>\\n\\nA").

    Raises InputError where the template does not show the answer right after its own generation prompt.
    """
    prompt, whole = _show_answer(processor)
    start, found, _ = whole.rpartition(_ANSWER)
    if not found or not start.startswith(prompt):
        raise InputError(
            "the chat template of this model does not put the answer after its generation prompt, so the place of the "
            f"letter is not known. It ends a prompt with {prompt[-40:]!r} and a shown answer with {whole[-60:]!r}."
        )
    between = start[len(prompt) :]
    spaces = between[len(between.rstrip(" ")) :]  # a space before the letter is part of its token
    return between[: len(between) - len(spaces)], spaces


def answer_suffix(processor: ProcessorMixin) -> str:
    """What the template puts after the answer: "<|im_end|>\\n" for one, nothing for others."""
    return _show_answer(processor)[1].rpartition(_ANSWER)[2]


def _show_answer(processor: ProcessorMixin) -> tuple[str, str]:
    """A prompt, and what the template makes of it once it is answered."""
    question = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": _ANSWER}]}
    try:
        prompt = processor.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
        return prompt, processor.apply_chat_template([*question, answer], tokenize=False)
    except TemplateError as error:
        raise InputError(f"the chat template of this model refuses a question and its answer: {error}") from error


@functools.lru_cache
def control_tokens(processor: ProcessorMixin) -> re.Pattern:
    """Matches every control token of the model."""
    tokens = {token.content for token in processor.tokenizer.added_tokens_decoder.values() if token.special}
    return re.compile("|".join(re.escape(token) for token in sorted(tokens) if token.strip()) or r"(?!)")


def has_control_token(processor: ProcessorMixin, row: dict) -> bool:
    """Whether a text of the row holds one."""
    return bool(control_tokens(processor).search("\n".join([row["context"], row["question"], *row["choices"]])))


def check_prompts(processor: ProcessorMixin, prompts: Prompts) -> None:
    """Raises InputError for prompts that hold a control token of this model."""
    own = control_tokens(processor).search(prompts.all_texts)
    if own:
        raise InputError(f"the prompt holds {own.group()!r}, a control token of this model. Take it out.")


def check_texts(processor: ProcessorMixin, examples: datasets.Dataset, prompts: Prompts) -> None:
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
