"""A run's prompt as `decision_template.jinja`, which transformers' decision models render. No torch.

state, question of a request     read as data/ reads a row: texts without spaces around them, images, context
messages                         as `prompts.render_messages` makes them, the choices in their order
the model's own chat template    as it is, with the run's options
what closes an empty thought     where the template has that before an answer

What the run was not trained on is refused by a ValueError, for which a server answers 400.
"""

import re
from typing import TYPE_CHECKING

from vqa_sft.batch import template
from vqa_sft.batch.jinja_literal import literal
from vqa_sft.batch.prompts import Prompts, list_control_tokens, split_user
from vqa_sft.batch.type_template import type_template
from vqa_sft.questions.letters import LETTERS

if TYPE_CHECKING:
    from transformers import ProcessorMixin

# Of one question. Without them a request of 10 MB takes all memory, and a server of it ends.
MOST_IMAGES, MOST_CHARS = 32, 2**16
NOUL = {"true": "Yes", "false": "No"}  # what the options of a yes-no question are shown as
# transformers' sandbox knows one way to raise a ValueError that says something: a format that there is none of.
MACROS = """\
{%- set vqa = namespace(text="", num_images=0, choices=[], lines=[], content=[], type="") -%}
{%- macro vqa_refuse(why) -%}{{ ("{:" ~ why ~ "}").format("") }}{%- endmacro -%}
{%- macro vqa_text(value, what) -%}
    {%- if value is not string -%}{{ vqa_refuse(what ~ " must be a text without images") }}{%- endif -%}
    {%- for token in vqa_tokens if token in value -%}
        {{ vqa_refuse(what ~ " holds a control token of this model") }}
    {%- endfor -%}
    {%- if "\\0" in value -%}{{ vqa_refuse(what ~ " holds a null byte") }}{%- endif -%}
    {{- value|trim -}}
{%- endmacro -%}
{%- macro vqa_read(value) -%}
    {%- if value is string -%}{%- set vqa.text = vqa.text ~ value -%}
    {%- elif value is mapping and value.type == "text" -%}{%- set vqa.text = vqa.text ~ value.text -%}
    {%- elif value is mapping and value.type == "image" -%}
        {%- set vqa.num_images = vqa.num_images + 1 -%}
        {%- if vqa.num_images > vqa_most_images -%}
            {{ vqa_refuse("state names more than " ~ vqa_most_images ~ " images") }}
        {%- endif -%}
    {%- elif value is sequence and value is not mapping -%}
        {%- for part in value -%}{{ vqa_read(part) }}{%- endfor -%}
    {%- else -%}{{ vqa_refuse("state holds what is neither a text nor an image of assets") }}
    {%- endif -%}
{%- endmacro -%}
"""
_STATE = """\
{%- if state is mapping -%}
    {%- for key in state if key not in ["images", "context"] -%}
        {{ vqa_refuse("state may hold images and context, and nothing else") }}
    {%- endfor -%}
    {%- if "images" in state -%}{{ vqa_read(state["images"]) }}{%- endif -%}
    {%- if vqa.text|trim -%}{{ vqa_refuse("state.images holds a text that names no image of assets") }}{%- endif -%}
    {%- if vqa_has_images and "images" not in state -%}
        {{ vqa_refuse("state needs images that assets hold; images [] asks without one") }}
    {%- endif -%}
    {%- if vqa_has_context and "context" not in state -%}
        {{ vqa_refuse("state needs a context, empty for no text, for the run was trained with contexts") }}
    {%- endif -%}
    {%- set vqa.text = vqa_text(state["context"], "state.context") if "context" in state else "" -%}
{%- else -%}
    {{- vqa_read(state) -}}
    {%- if vqa_has_images and not vqa.num_images -%}{{ vqa_refuse("state names no image of assets") }}{%- endif -%}
    {%- set vqa.text = vqa_text(vqa.text, "state") -%}
{%- endif -%}
{%- if vqa.num_images and not vqa_has_images -%}
    {{ vqa_refuse("state names an image, and the run was trained without images") }}
{%- endif -%}
{%- if vqa.text and not vqa_has_context -%}
    {{ vqa_refuse("state holds a text that names no image of assets, and the run was trained without contexts") }}
{%- endif -%}
"""
_CHOICES = """\
{%- set vqa_question = vqa_text(question.instructions, "instructions") -%}
{%- if not vqa_question -%}{{ vqa_refuse("instructions must be the question; they are empty") }}{%- endif -%}
{%- for option in question.options -%}
    {%- set described = question.descriptions[loop.index0] -%}
    {%- set option = <noul>[option] if question.type == "noul" else option -%}
    {%- set text = vqa_text(described if described is not none and described != "" else option, "an option") -%}
    {%- if not text -%}{{ vqa_refuse("an option is empty") }}{%- endif -%}
    {%- set vqa.choices = vqa.choices + [text] -%}
    {%- set vqa.lines = vqa.lines + [<choice>] -%}
{%- endfor -%}
{%- if vqa.choices|length < 2 or vqa.choices|unique(case_sensitive=true)|list|length < 2 -%}
    {{ vqa_refuse("a question needs two options at least that differ") }}
{%- endif -%}
"""
_MESSAGES = """\
{%- if vqa_user|length > vqa_most_chars -%}
    {{ vqa_refuse("the texts of a question have more than " ~ vqa_most_chars ~ " characters") }}
{%- endif -%}
{%- for number in range(1, vqa.num_images + 1) -%}
    {%- if vqa.num_images > 1 -%}
        {%- set vqa.content = vqa.content + [{"type": "text", "text": <image>}] -%}
    {%- endif -%}
    {%- set vqa.content = vqa.content + [{"type": "image"}] -%}
{%- endfor -%}
{%- set vqa.content = vqa.content + [{"type": "text", "text": vqa_user}] -%}
{%- set messages = [<system>{"role": "user", "content": vqa.content}] -%}
"""


def decision_template(
    processor: "ProcessorMixin",
    prompts: Prompts,
    *,
    has_images: bool,
    has_context: bool,
    is_classification: bool = False,
) -> str:
    """The Jinja template of a run that was trained with `has_images` and `has_context`, on questions with choices of
    their own or on candidates of a classification. Raises InputError."""
    system = ""
    if prompts.system:
        content = prompts.system if prompts.system_as_text else [{"type": "text", "text": prompts.system}]
        system = literal({"role": "system", "content": content}) + ", "
    choice = _filled(prompts.choice, letter=f"{literal(LETTERS)}[loop.index0]", text="text")
    before, _ = template.answer_prefix(processor, prompts.template_options)
    source = template.source_of(processor)
    # Jinja drops one line end at the end of a template, and the one after a comment.
    source = source.removesuffix("\n") if before else source
    return "".join(
        [
            "{#- The prompt of a run of vqa-sft, from the state and one question of a request. -#}\n",
            _assign("vqa_has_images", literal(has_images)),
            _assign("vqa_has_context", literal(has_context)),
            _assign("vqa_most_images", literal(MOST_IMAGES)),
            _assign("vqa_most_chars", literal(MOST_CHARS)),
            _assign("vqa_tokens", literal(list_control_tokens(processor))),
            MACROS,
            _STATE,
            _CHOICES.replace("<choice>", choice).replace("<noul>", literal(NOUL)),
            type_template(prompts.types, by_choices=not is_classification),
            _user(prompts),
            _MESSAGES.replace("<image>", _filled(prompts.image, number="number")).replace("<system>", system),
            *_options(source, prompts.template_options),
            "{#- What follows is the model's own chat template. #}\n",
            source,
            "{{ " + literal(before) + " }}" if before else "",
        ]
    )


def _assign(name: str, expression: str) -> str:
    return "{%- set " + name + " = " + expression + " -%}\n"


def _filled(own: str, **fields: str) -> str:
    """An expression: the text with expressions in place of its {fields}."""
    parts = re.split(r"\{(" + "|".join(fields) + r")\}", own)
    filled = [fields[part] if i % 2 else literal(part) for i, part in enumerate(parts) if i % 2 or part]
    return "(" + " ~ ".join(filled) + ")"


def _user(prompts: Prompts) -> str:
    """Sets `vqa_user`: the user's text, by the type of the question."""
    fields = {"question": "vqa_question", "choices": 'vqa.lines|join("\\n")'}
    fields["context"] = "(" + _filled(prompts.context, context="vqa.text") + ' if vqa.text else "")'

    def expression(text: str) -> str:
        parts = split_user(text)
        return " ~ ".join(f"({fields[part]})" if i % 2 else literal(part) for i, part in enumerate(parts) if part)

    lines = [_assign("vqa_user", expression(prompts.user))]
    for kind, text in prompts.types.items():
        own = _assign("vqa_user", expression(text))
        lines.append("{%- if vqa.type == " + literal(kind) + " -%}\n" + own + "{%- endif -%}\n")
    return "".join(lines)


def _options(source: str, options: template.Options) -> list[str]:
    """Sets what the chat template gets beside the messages. transformers passes `enable_thinking: false` to every
    template that names it: one that the run left alone does not see it."""
    lines = []
    if "enable_thinking" in template.read_source(source).reads:
        # A name that is read first is one that a template takes: others go to the processor.
        lines.append(_assign("vqa_thinks", "enable_thinking"))
        if "enable_thinking" not in options:
            lines.append(_assign("enable_thinking", "vqa_not_given"))
    return lines + [_assign(name, literal(value)) for name, value in options.items()]
