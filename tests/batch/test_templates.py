"""Chat templates of model families, each as short as what is tested of it: written here, after how the public ones
behave (their repositories on the Hub, llama.cpp's models/templates, Google's "Gemma 4 Prompt Formatting")."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from vqa_sft.batch.prompts import Prompts, render_messages, render_prompt, settle_prompts
from vqa_sft.batch.template import answer_prefix, answer_suffix
from vqa_sft.errors import InputError


class Processor:
    """As much of a processor as a template sees."""

    def __init__(self, chat_template):
        self.chat_template = chat_template
        self.tokenizer = SimpleNamespace(special_tokens_map={"bos_token": "<s>", "eos_token": "</s>"})

    def apply_chat_template(self, messages, add_generation_prompt=False, tokenize=True, **options):
        assert not tokenize
        given = {"chat_template": self.chat_template, "add_generation_prompt": add_generation_prompt}
        return render_jinja_template([messages], **given, **self.tokenizer.special_tokens_map, **options)[0][0]


# Texts and images of a message, whether its content is a text or a list.
PARTS = """\
{%- macro parts(content) -%}
  {%- if content is string -%}{{ content }}{%- else -%}
    {%- for part in content -%}{{ '<image>' if part.type == 'image' else part.text }}{%- endfor -%}
  {%- endif -%}
{%- endmacro -%}"""
ASKS = "{%- if add_generation_prompt -%}"


def chatml(asks="", shown="", image="<image>", start=""):
    """Turns as Qwen writes them; `asks` ends the generation prompt, `shown` stands before a shown answer."""
    return (
        PARTS.replace("<image>", image)
        + f"{start}{{%- for m in messages -%}}{{{{ '<|im_start|>' + m.role + '\\n' }}}}"
        + f"{{%- if m.role == 'assistant' -%}}{shown}{{%- endif -%}}"
        + "{{ parts(m.content) + '<|im_end|>\\n' }}{%- endfor -%}"
        + f"{ASKS}{{{{ '<|im_start|>assistant\\n' }}}}{asks}{{%- endif -%}}"
    )


def gemma4(asks, system):
    """`system` is what it makes of the content of a system turn."""
    return (
        PARTS.replace("part.text", "part.text | trim")
        + "{{ bos_token }}{%- if enable_thinking is defined and enable_thinking -%}<|think|>{%- endif -%}"
        + "{%- for m in messages -%}{{ '<|turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}"
        + f"{{{{ {system} if m.role == 'system' else parts(m.content) }}}}{{{{ '<turn|>\\n' }}}}{{%- endfor -%}}"
        + f"{ASKS}{{{{ '<|turn>model\\n' }}}}{asks}{{%- endif -%}}"
    )


CLOSED, OPEN = "{{ '<think>\\n\\n</think>\\n\\n' }}", "{{ '<think>\\n' }}"
OFF = "{%- if enable_thinking is defined and enable_thinking is false -%}"
ON = "{%- if enable_thinking is defined and enable_thinking is true -%}"
EMPTY_CHANNEL = "{%- if not enable_thinking | default(false) -%}{{ '<|channel>thought\\n<channel|>' }}{%- endif -%}"
TRIMMED = "m.content | trim"  # of a list of content: the list as Python writes it

TEMPLATES = {
    "Qwen2.5-VL": chatml(),
    "Qwen3-VL thinking": chatml(asks=OPEN, shown=CLOSED),
    "Qwen3.5": chatml(asks=f"{OFF}{CLOSED}{{%- else -%}}{OPEN}{{%- endif -%}}", shown=CLOSED),
    "Qwen3.5 0.8B": chatml(asks=f"{ON}{OPEN}{{%- else -%}}{CLOSED}{{%- endif -%}}", shown=CLOSED),
    "Gemma 3": PARTS
    + "{{ bos_token }}{%- set first = parts(messages[0].content) + '\\n\\n' if messages[0].role == 'system' else '' -%}"
    "{%- for m in messages if m.role != 'system' -%}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + (first if loop.first else '') }}"
    "{{ parts(m.content) | trim + '<end_of_turn>\\n' }}{%- endfor -%}"
    f"{ASKS}{{{{ '<start_of_turn>model\\n' }}}}{{%- endif -%}}",
    "Gemma 4 E4B": gemma4("", "parts(m.content)"),
    "Gemma 4 12B": gemma4(EMPTY_CHANNEL, "parts(m.content)"),
    "Gemma 4, older": gemma4(EMPTY_CHANNEL, TRIMMED),
    "LLaVA-OneVision": "{%- for m in messages -%}{{ '<|im_start|>' + m.role + ' ' }}"
    "{%- for part in m.content -%}{{ '<image>' if part.type == 'image' else '' }}{%- endfor -%}"
    "{%- for part in m.content if part.type == 'text' -%}{% generation %}{{ '\\n' + part.text }}{% endgeneration %}"
    "{%- endfor -%}{{ '<|im_end|>' }}{%- endfor -%}"
    f"{ASKS}{{{{ '<|im_start|>assistant\\n' }}}}{{%- endif -%}}",
    "SmolVLM": PARTS + "<|im_start|>{%- for m in messages -%}{{ m.role | capitalize }}"
    "{{ ':' if m.content[0].type == 'image' else ': ' }}{{ parts(m.content) + '<end_of_utterance>\\n' }}{%- endfor -%}"
    f"{ASKS}{{{{ 'Assistant:' }}}}{{%- endif -%}}",
    "Pixtral-12B": PARTS
    + "{%- set system = messages[0].content if messages[0].role == 'system' else '' -%}{{ bos_token }}"
    "{%- for m in messages if m.role != 'system' -%}{%- if m.role == 'user' -%}{{ '[INST]' }}"
    "{%- if loop.last and system -%}{{ system + '\\n\\n' }}{%- endif -%}{{ parts(m.content) + '[/INST]' }}"
    "{%- else -%}{{ m.content + eos_token }}{%- endif -%}{%- endfor -%}",
    "Mistral Small 3.1": PARTS + "{{ bos_token }}{%- for m in messages -%}{%- if m.role == 'system' -%}"
    "{{ '[SYSTEM_PROMPT]' + (m.content if m.content is string else m.content[0].text) + '[/SYSTEM_PROMPT]' }}"
    "{%- elif m.role == 'user' -%}{{ '[INST]' + parts(m.content) + '[/INST]' }}"
    "{%- else -%}{{ parts(m.content) + eos_token }}{%- endif -%}{%- endfor -%}",
    "Ministral 3": PARTS + "{{ bos_token }}{%- for m in messages -%}{%- if m.role == 'system' -%}"
    "{{ '[SYSTEM_PROMPT]' + parts(m.content) + '[/SYSTEM_PROMPT]' }}"
    "{%- elif m.role == 'user' -%}{{ '[INST]' + parts(m.content) + '[/INST]' }}"
    "{%- elif m.role == 'assistant' -%}{{ parts(m.content) + eos_token }}"
    "{%- else -%}{{ raise_exception('Only user, assistant, system and tool roles') }}{%- endif -%}{%- endfor -%}",
    "InternVL3": chatml(image="<IMG_CONTEXT>\\n"),
    "MiniCPM-V 4.5": chatml(asks=f"{OFF}{CLOSED}{{%- endif -%}}", shown=CLOSED),
    "LFM2-VL": chatml(start="{{ bos_token }}"),
    "GLM-4.6V": chatml(
        asks=f"{OFF}{{{{ '<think></think>\\n' }}}}{{%- endif -%}}", shown="{{ '<think></think>\\n' }}"
    ).replace("+ '<|im_end|>\\n'", "+ ('/nothink' if m.role == 'user' and enable_thinking is false else '')", 1),
}
# How the prompt ends, what stands before the letter in its own token, whether the template knows `enable_thinking`,
# and whether it wants the system text as a text.
EXPECTED = {
    "Qwen2.5-VL": ("<|im_start|>assistant\n", "", False, False),
    "Qwen3-VL thinking": ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "", False, False),
    "Qwen3.5": ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "", True, False),
    "Qwen3.5 0.8B": ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "", True, False),
    "Gemma 3": ("<start_of_turn>model\n", "", False, False),
    "Gemma 4 E4B": ("<|turn>model\n", "", True, False),
    "Gemma 4 12B": ("<|turn>model\n<|channel>thought\n<channel|>", "", True, False),
    "Gemma 4, older": ("<|turn>model\n<|channel>thought\n<channel|>", "", True, True),
    "LLaVA-OneVision": ("<|im_end|><|im_start|>assistant\n", "", False, False),
    "SmolVLM": ("<end_of_utterance>\nAssistant:", " ", False, False),
    "Pixtral-12B": ("[/INST]", "", False, True),
    "Mistral Small 3.1": ("[/INST]", "", False, False),
    "Ministral 3": ("[/INST]", "", False, False),
    "InternVL3": ("<|im_start|>assistant\n", "", False, False),
    "MiniCPM-V 4.5": ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "", True, False),
    "LFM2-VL": ("<|im_start|>assistant\n", "", False, False),
    "GLM-4.6V": ("/nothink<|im_start|>assistant\n<think></think>\n", "", True, False),
}
# Those that TRL brings along, if it still does; of some families it has several.
PUBLIC = Path(find_spec("trl").origin).parent / "chat_templates"
SHOW_IMAGES = {"gemma3", "gemma4", "idefics3", "lfm2_2_5_vl", "llava_next", "qwen2_5_vl", "qwen3_5_think", "qwen3_8"}
SHOW_IMAGES |= {"qwen3_vl", "smolvlm"}
ROW = {"question": "Which?", "choices": ["cat", "dog"], "images": [None]}
ORDER = (0, 1)


@pytest.mark.parametrize("family", TEMPLATES)
def test_the_letter_comes_after_the_generation_prompt_of_every_family(family):
    ending, spaces, knows_thinking, as_text = EXPECTED[family]
    processor = Processor(TEMPLATES[family])
    prompts, lines = settle_prompts(processor, Prompts(system="Look."))
    assert prompts.template_options == ({"enable_thinking": False} if knows_thinking else {})
    assert len(lines) == knows_thinking and prompts.system_as_text is as_text
    text = render_prompt(processor, ROW, ORDER, prompts)
    assert text.endswith(ending) and answer_prefix(processor, prompts.template_options)[1] == spaces
    assert text.count("Look.") == text.count("Which?") == 1 and "'type'" not in text and "<think>\n<" not in text


def test_the_prompt_is_what_the_model_would_continue():
    """Whatever an answer is shown with: the generation prompt, and nothing else where that does not begin it."""
    for family in ("Gemma 4 12B", "LLaVA-OneVision", "Qwen2.5-VL", "SmolVLM", "Qwen3.5"):
        processor = Processor(TEMPLATES[family])
        prompts, _ = settle_prompts(processor, Prompts(system=""))
        content = [{"type": "image"}, {"type": "text", "text": "Which?\nA. cat\nB. dog"}]
        messages = [{"role": "user", "content": content}]
        asked = processor.apply_chat_template(messages, True, False, **prompts.template_options)
        assert render_prompt(processor, ROW, ORDER, prompts) == asked


@pytest.mark.parametrize("path", sorted(PUBLIC.glob("*.jinja")), ids=lambda path: path.stem)
def test_public_templates_are_taken_or_refused_in_one_line(path):
    processor = Processor(path.read_text(encoding="utf-8"))
    try:
        prompts, _ = settle_prompts(processor, Prompts(system="Look."))
    except InputError as error:
        assert "\n" not in str(error) and path.stem.removesuffix("_training") not in SHOW_IMAGES
        return
    text = render_prompt(processor, ROW, ORDER, prompts)
    asked = processor.apply_chat_template(
        render_messages(ROW, ORDER, prompts), True, tokenize=False, **prompts.template_options
    )
    assert text.startswith(asked) and text.count("Look.") == text.count("Which?\nA. cat\nB. dog") == 1
    assert "'type'" not in text and "effort" not in text and text.count("<think>") == text.count("</think>")


# ---- options


def test_options_reach_the_template_and_change_the_digest_only_where_there_are_some():
    effort = "{%- if m.role == 'system' -%}{{ 'Effort: ' + (effort or 'high') + '. ' }}{%- endif -%}{{ parts(m.content)"
    processor = Processor(chatml().replace("{{ parts(m.content)", effort))
    default, _ = settle_prompts(processor, Prompts())
    low, lines = settle_prompts(processor, Prompts(template_options={"effort": "low"}))
    assert "Effort: high. Answer" in render_prompt(processor, ROW, ORDER, default)
    assert "Effort: low. Answer" in render_prompt(processor, ROW, ORDER, low) and not lines
    assert default.digest == Prompts().digest != low.digest
    assert Prompts(**json.loads(json.dumps(vars(low)))) == low


def test_what_is_given_counts_more_than_what_is_found_and_null_is_left_to_the_template():
    template = chatml(asks=f"{ON}ON{{%- elif enable_thinking is defined -%}}OFF{{%- else -%}}OWN{{%- endif -%}}")
    for given, ending in (({}, "OFF"), ({"enable_thinking": True}, "ON"), ({"enable_thinking": None}, "OWN")):
        prompts, lines = settle_prompts(Processor(template), Prompts(template_options=given))
        assert render_prompt(Processor(template), ROW, ORDER, prompts).endswith(f"assistant\n{ending}")
        assert ["Thinking is off" in line for line in lines] == ([] if given else [True])


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"enable_thinkng": False}, "has no option 'enable_thinkng'. Did you mean 'enable_thinking'?"),
        ({"chat_template": "x"}, "has no option 'chat_template'. It has enable_thinking."),
        ({"messages": []}, "has no option 'messages'"),
        ({"bos_token": ""}, "has no option 'bos_token'"),
        ({1: 2}, "has no option 1"),
    ],
)
def test_an_option_that_the_template_does_not_know_is_named(options, part):
    with pytest.raises(InputError) as error:
        settle_prompts(Processor("{{ bos_token }}" + TEMPLATES["Qwen3.5"]), Prompts(template_options=options))
    assert part in str(error.value)
    sets = "{% set name = 1 %}{{ name }}{% for m in messages %}{% set text = m.content %}{% endfor %}"
    for template in (TEMPLATES["Qwen2.5-VL"], TEMPLATES["Qwen2.5-VL"] + sets):
        with pytest.raises(InputError, match="It has none"):
            settle_prompts(Processor(template), Prompts(template_options={"enable_thinking": False}))


def test_the_date_of_the_training_stays_in_the_prompt():
    written = chatml(start="Today: {{ date_string or strftime_now('%d %b %Y') }}{{ raised }}\n")
    processor = Processor(written)
    prompts, (line,) = settle_prompts(processor, Prompts())
    today = prompts.template_options["date_string"]
    assert line == f"The chat template writes the date; the run keeps today's, date_string: {today}."
    assert render_prompt(processor, ROW, ORDER, prompts) == render_prompt(processor, ROW, ORDER, Prompts())
    assert render_prompt(processor, ROW, ORDER, prompts).startswith(f"Today: {today}<")
    given = Prompts(template_options={"date_string": "26 Jul 2024"})
    assert settle_prompts(processor, given) == (given, [])
    with pytest.raises(InputError, match=f"writes the time of a prediction into its prompt \\({today}\\)"):
        settle_prompts(Processor(written.replace("date_string or ", "")), Prompts())
    unread = chatml(start="{%- if messages[0].role != 'system' -%}{{ strftime_now('%d %b %Y') }}{%- endif -%}")
    assert settle_prompts(Processor(unread), Prompts()) == (Prompts(), [])
    with pytest.raises(InputError, match="Set a system_prompt"):
        settle_prompts(Processor(unread), Prompts(system=""))


def test_options_that_cannot_be_saved_are_refused():
    for value in (float("nan"), {1, 2}):
        with pytest.raises(InputError, match="template_options must be plain values"):
            Prompts(template_options={"x": value})


def test_a_run_from_before_options_reads_the_prompts_that_it_was_trained_with():
    saved = {name: text for name, text in vars(Prompts()).items() if not name.startswith(("template_", "system_as"))}
    old = Prompts(**saved)
    assert old.digest == "da52fd9015f5"  # as before there were options
    for family, ending in (("Qwen3.5", "</think>\n\n"), ("GLM-4.6V", "assistant\n<think></think>\n")):
        text = render_prompt(Processor(TEMPLATES[family]), ROW, ORDER, old)
        assert text.endswith(ending) and "/nothink" not in text
    assert "[{'type': 'text'" in render_prompt(Processor(TEMPLATES["Gemma 4, older"]), ROW, ORDER, old)


# ---- what a template refuses


def test_a_template_without_a_system_turn_names_the_fix():
    refusing = "{%- if messages[0].role == 'system' -%}{{ raise_exception('No system role') }}{%- endif -%}" + chatml()
    with pytest.raises(InputError, match=r'refuses a system text \(TemplateError: No system role\).*system_prompt: ""'):
        settle_prompts(Processor(refusing), Prompts())
    settled, lines = settle_prompts(Processor(refusing), Prompts(system=""))
    assert settled == Prompts(system="") and not lines


def test_a_template_that_leaves_the_system_text_out_says_so():
    silent = chatml().replace("for m in messages", "for m in messages if m.role != 'system'")
    prompts, (line,) = settle_prompts(Processor(silent), Prompts())
    assert "leaves the system text out" in line and not prompts.system_as_text


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("{{ 'a' + 1 }}", "TypeError"),
        ("{{ nothing.of.it }}", "UndefinedError"),
        ("{{ {}['key'].text }}", "UndefinedError"),
        ("{{ raise_exception('no such thing') }}", "TemplateError: no such thing"),
        ("{{ messages[-1].content[-1].text.index('zzz') }}", "ValueError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ messages | nofilter }}", "TemplateAssertionError"),
    ],
)
def test_whatever_a_template_raises_is_one_line(code, kind):
    for prompts in (Prompts(), Prompts(system="")):
        with pytest.raises(InputError) as error:
            render_prompt(Processor(chatml() + code), ROW, ORDER, prompts)
        with pytest.raises(InputError) as settled:
            settle_prompts(Processor(chatml() + code), prompts)
        for raised in (error, settled):
            assert kind in str(raised.value) and "\n" not in str(raised.value)


def test_a_template_for_texts_alone_is_refused():
    for content in ("m.content", "m.content | tojson"):
        with pytest.raises(InputError, match="one for texts alone"):
            settle_prompts(Processor(f"{{% for m in messages %}}{{{{ {content} }}}}{{% endfor %}}"), Prompts())


def test_an_open_thought_is_refused():
    for opening in ("<think>\\n", "[THINK]", "◁think▷", "<|channel>thought\\n"):
        for shown in ("", f"{{{{ '{opening}' }}}}"):
            with pytest.raises(InputError, match="opens a thought in its generation prompt"):
                answer_prefix(Processor(chatml(asks=f"{{{{ '{opening}' }}}}", shown=shown)), {})


def test_a_template_that_shows_no_answer_is_refused():
    for code in ("if m.role != 'assistant'", "if m.role != 'assistant' or raise_exception('No answers')"):
        silent = chatml().replace("for m in messages", f"for m in messages {code}")
        with pytest.raises(InputError, match="does not show an answer"):
            answer_prefix(Processor(silent), {})


def test_what_follows_an_answer_is_that_of_the_template():
    suffixes = {"Qwen2.5-VL": "<|im_end|>\n", "Pixtral-12B": "</s>", "Gemma 4 12B": "<turn|>\n"}
    for family, suffix in suffixes.items():
        assert answer_suffix(Processor(TEMPLATES[family]), {}) == suffix


def test_a_changed_template_is_looked_at_again():
    processor = Processor(TEMPLATES["Qwen2.5-VL"])
    assert answer_prefix(processor, {}) == ("", "")
    processor.chat_template = TEMPLATES["SmolVLM"]
    assert answer_prefix(processor, {}) == ("", " ")


def test_settled_prompts_differ_only_in_what_was_found():
    prompts = Prompts(system="S", user="{question} {choices}")
    settled, _ = settle_prompts(Processor(TEMPLATES["Pixtral-12B"]), prompts)
    assert replace(settled, system_as_text=False) == prompts
