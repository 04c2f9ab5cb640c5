"""What a model's chat template takes, and where it puts the answer: its options, its form of texts, what is before the
letter. No torch.

A template is a program that came with the model. Whatever it raises is an InputError here.
"""

import difflib
import functools
import json
import re
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension

from vqa_sft.errors import InputError, printable

if TYPE_CHECKING:
    from transformers import ProcessorMixin

Options = dict[str, Any]  # what goes to the template beside the messages

_ANSWER, _SYSTEM, _QUESTION = "Answer-of-a-row", "Text-of-the-system", "Text-of-a-question"  # stand in no template
_OPEN_THOUGHT = re.compile(r"(<think>|\[THINK\]|◁think▷|<\|channel>thought)\s*$")
# Variables that transformers fills in.
_FILLED = {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"}


def render(processor: "ProcessorMixin", messages: list[dict], options: Options, *, asks: bool = True) -> str:
    """The text of the messages, ready for an answer where it `asks` for one. Raises InputError."""
    try:
        return processor.apply_chat_template(messages, add_generation_prompt=asks, tokenize=False, **options)
    except Exception as error:
        raise refusal(error) from error


def refusal(error: Exception) -> InputError:
    """What to raise for whatever a template raised."""
    return InputError(f"the chat template of this model refuses the messages: {_said(error)}.")


def _is_shown(text: str, shown: str) -> bool:
    """And not as part of a list of content that was written as it is: "[{'type': 'text', 'text': 'Which?'}]"."""
    return text in shown and not re.search(rf"""['"]text['"]: ?['"]{text}""", shown)


def _said(error: BaseException | None) -> str:
    text = printable(" ".join(str(error).split()), limit=300)
    return f"{type(error).__name__}: {text}".rstrip(": .")


def _message(role: str, text: str, *, as_text: bool = False) -> dict:
    return {"role": role, "content": text if as_text else [{"type": "text", "text": text}]}


def choose_options(processor: "ProcessorMixin", given: Options) -> Options:
    """What goes to the template: what is `given`, and `enable_thinking: false` where the template knows that and
    nothing else is given; what is given as None is left to the template. Raises InputError for what it does not know.
    """
    known, own = _options(processor), read_source(source_of(processor)).sets
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"It has {', '.join(sorted(known - own)) or 'none'}."
            raise InputError(f"template_options: the chat template of this model has no option {name!r}. {hint}")
    found = {"enable_thinking": False} if "enable_thinking" in known else {}
    return {name: value for name, value in (found | given).items() if value is not None}


def keep_date(processor: "ProcessorMixin", options: Options, messages: list[dict]) -> Options:
    """The options, and today's date among them where the template would write it into such messages: another day's
    prediction must read the same prompt. Raises InputError where the template has no option for it."""
    shown = render(processor, messages, options)
    dates = {datetime.now().strftime(pattern) for pattern in read_source(source_of(processor)).dates}
    dates = {date for date in dates if date in shown}
    for name in sorted(_options(processor) - options.keys()):
        for date in dates:
            if "date" in name and render(processor, messages, options | {name: date}) == shown:
                return options | {name: date}
    if dates:
        raise InputError(
            f"the chat template of this model writes the time of a prediction into its prompt ({', '.join(dates)}), so "
            "that no prediction would read what was trained. Set a system_prompt, or an option of the template that "
            "fixes it in template_options."
        )
    return options


def _options(processor: "ProcessorMixin") -> set[str]:
    """The names of the options that the template reads."""
    return read_source(source_of(processor)).reads - _FILLED - {*processor.tokenizer.special_tokens_map}


def source_of(processor: "ProcessorMixin") -> str:
    """The text of the chat template."""
    template = processor.chat_template
    return template.get("default", "") if isinstance(template, dict) else template


class _Generation(Extension):
    """The block of transformers that marks an answer."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Names(NamedTuple):
    """What a template names."""

    reads: set[str]  # variables that it reads before it has set them
    sets: set[str]  # variables that are its own
    dates: set[str]  # how it writes the time, as strftime takes it


@functools.lru_cache
def read_source(template: str) -> _Names:
    """What a template names. Raises InputError for one that cannot be read."""
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols", _Generation])
    try:
        tree = environment.parse(template)
        reads = meta.find_undeclared_variables(tree)
    except jinja2.TemplateError as error:
        raise InputError(f"the chat template of this model cannot be read: {_said(error)}.") from error
    calls = [call for call in tree.find_all(nodes.Call) if getattr(call.node, "name", None) == "strftime_now"]
    dates = {call.args[0].value for call in calls if call.args and isinstance(call.args[0], nodes.Const)}
    sets = {name.name for name in tree.find_all(nodes.Name) if name.ctx != "load"}
    for asked in tree.find_all((nodes.Test, nodes.Filter)):
        if asked.name in ("defined", "undefined", "default") and isinstance(asked.node, nodes.Name):
            sets.discard(asked.node.name)  # set where nothing was given
    return _Names(reads, sets, dates)


def check_content(processor: "ProcessorMixin", options: Options) -> None:
    """Raises InputError for a template that writes a question's list of content as it is, and so shows no image."""
    shown = render(processor, [_message("user", _QUESTION)], options)
    if not _is_shown(_QUESTION, shown):
        raise InputError(
            f"the chat template of this model is one for texts alone: of a question it makes {shown[-120:]!r}. Use a "
            "vision-language model with its own template."
        )


def find_system_form(processor: "ProcessorMixin", options: Options) -> tuple[bool, bool]:
    """Whether the template wants the system text as a text and not as a list of content, and whether it shows it at
    all. Raises InputError where it refuses it."""
    refused, without = None, []
    for as_text in (False, True):
        messages = [_message("system", _SYSTEM, as_text=as_text), _message("user", _QUESTION)]
        try:
            shown = render(processor, messages, options)
        except InputError as error:
            refused = error.__cause__
            continue
        if _is_shown(_SYSTEM, shown):
            return as_text, True
        if _SYSTEM not in shown:
            without.append(as_text)
    if without:
        return without[0], False
    raise InputError(
        f'the chat template of this model refuses a system text ({_said(refused)}). Set system_prompt: "".'
    ) from refused


def answer_prefix(processor: "ProcessorMixin", options: Options) -> tuple[str, str]:
    """What stands between the generation prompt and the answer: (what belongs to the prompt, what belongs to the
    letter's token).

    The prompt is the generation prompt. Where the template shows an answered question with that prompt and more, the
    rest belongs to it too: thinking models close an empty thought there ("\\n</think>\\n\\nA"). Spaces belong to the
    letter: after "Assistant:" comes " A", which is another token than "A". Elsewhere an answer is shown in another way
    than it is asked for (Gemma 4 from 12B on closes an empty thought in the generation prompt alone, LLaVA-OneVision
    has a space more), and the letter comes right after the generation prompt.

    Raises InputError where the template shows no answer, or the letter would stand in an open thought.
    """
    return find_answer(processor, str(processor.chat_template), json.dumps(options, sort_keys=True))[:2]


def answer_suffix(processor: "ProcessorMixin", options: Options) -> str:
    """What the template puts after the answer: "<|im_end|>\\n" for one, nothing for others."""
    return find_answer(processor, str(processor.chat_template), json.dumps(options, sort_keys=True))[2]


@functools.lru_cache
def find_answer(processor: "ProcessorMixin", template: str, options_json: str) -> tuple[str, str, str]:
    """`answer_prefix` and `answer_suffix`, remembered by the text of the template and the options, in JSON."""
    options = json.loads(options_json)
    prompt = render(processor, [_message("user", _QUESTION)], options)
    start, suffix = _show_answer(processor, options)
    between = start[len(prompt) :] if start.startswith(prompt) else ""
    before = between.rstrip(" ")
    if _OPEN_THOUGHT.search(prompt + before):
        raise InputError(
            "the chat template of this model opens a thought in its generation prompt, and does not close it where it "
            f"shows an answer, so the place of the letter is not known. It ends a prompt with {prompt[-40:]!r}. An "
            "option of the template may turn thoughts off: template_options."
        )
    return before, between[len(before) :], suffix


def _show_answer(processor: "ProcessorMixin", options: Options) -> tuple[str, str]:
    """What the template writes before and after the answer to a question."""
    refused = None
    for as_text in (False, True):
        messages = [_message("user", _QUESTION), _message("assistant", _ANSWER, as_text=as_text)]
        try:
            shown = render(processor, messages, options, asks=False)
        except InputError as error:
            refused = error.__cause__
            continue
        if _is_shown(_ANSWER, shown):
            start, _, suffix = shown.rpartition(_ANSWER)
            return start, suffix
    why = f" ({_said(refused)})" if refused else ""
    raise InputError(
        f"the chat template of this model does not show an answer{why}, so the place of the letter is not known. Use "
        "an instruction-tuned model with its own template."
    ) from refused
