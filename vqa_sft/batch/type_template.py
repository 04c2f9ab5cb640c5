"""The rules of questions/types.py in Jinja, for templates of runs whose prompt depends on the type. No torch.

Jinja has no regular expressions. They are written as nested lists, and a macro walks these with the set of places that
the text matches up to (a set says all, for nobody asks what was matched):

    ["text", "how many"]              ["times", least, most, list]
    ["or", [[texts, list], ...]]      one of the lists; a text without any of its texts does not match it
    ["char", True, "ab", "az", "w"]   one of these characters, ranges (pairs) and classes; False: none of them
    ["look", True, width, list]       it follows; of some width, it comes before; False: it does not
    ["at", "b"]                       where a word begins or ends; "^": at the start
"""

from collections.abc import Iterable, Mapping
from re import _parser  # type: ignore[attr-defined]  # the module that compiles patterns; it has no public name
from typing import Any

from vqa_sft.batch.jinja_literal import literal
from vqa_sft.questions.types import MAX_CHARS, RULES_OF_ALL, YES_NO

# Of letters that NFC may join, which Jinja cannot: accents, and the parts of a Hangul syllable.
_JOINED = [(chr(first), chr(last)) for first, last in ((0x300, 0x36F), (0x1100, 0x11FF))]
_MACROS = """\
{%- macro vqa_is_word(char) -%}{{ "y" if char.isalnum() or char == "_" }}{%- endmacro -%}
{%- macro vqa_has_char(char, node) -%}
    {%- set found = namespace(any=char in node[2]) -%}
    {%- for pair in node[3] if pair[0] <= char <= pair[1] -%}{%- set found.any = true -%}{%- endfor -%}
    {%- if "w" in node[4] and vqa_is_word(char) or "d" in node[4] and char.isdecimal() -%}
        {%- set found.any = true -%}
    {%- endif -%}
    {{ "y" if char and found.any == node[1] }}
{%- endmacro -%}
{%- macro vqa_step(node) -%}
    {%- set kind, all, next = node[0], vqa.places, namespace(places=[]) -%}
    {%- if kind == "text" -%}
        {%- for at in all if vqa.read[at:at + node[1]|length] == node[1] -%}
            {%- set next.places = next.places + [at + node[1]|length] -%}
        {%- endfor -%}
    {%- elif kind == "char" -%}
        {%- for at in all if vqa_has_char(vqa.read[at:at + 1], node) -%}
            {%- set next.places = next.places + [at + 1] -%}
        {%- endfor -%}
    {%- elif kind == "or" -%}
        {%- for needed, nodes in node[1] -%}
            {%- set vqa.places = [] if needed else all -%}
            {%- for text in needed if text in vqa.read -%}{%- set vqa.places = all -%}{%- endfor -%}
            {{ vqa_walk(nodes) }}
            {%- set next.places = next.places + vqa.places -%}
        {%- endfor -%}
    {%- elif kind == "times" -%}
        {%- set next.places = all if node[1] == 0 else [] -%}
        {%- for number in range(1, [node[2], vqa.read|length]|min + 1) if vqa.places -%}
            {{ vqa_walk(node[3]) }}
            {%- if number >= node[1] -%}{%- set next.places = next.places + vqa.places -%}{%- endif -%}
        {%- endfor -%}
    {%- elif kind == "look" -%}
        {%- for at in all -%}
            {%- set vqa.places = [at - node[2]] if at >= node[2] else [] -%}{{ vqa_walk(node[3]) }}
            {%- set found = at in vqa.places if node[2] else vqa.places|length > 0 -%}
            {%- if found == node[1] -%}{%- set next.places = next.places + [at] -%}{%- endif -%}
        {%- endfor -%}
    {%- elif node[1] == "^" -%}
        {%- set next.places = [0] if 0 in all else [] -%}
    {%- else -%}
        {%- for at in all if vqa_is_word(vqa.read[at - 1:at] if at else "") != vqa_is_word(vqa.read[at:at + 1]) -%}
            {%- set next.places = next.places + [at] -%}
        {%- endfor -%}
    {%- endif -%}
    {%- set vqa.places = next.places|unique|list -%}
{%- endmacro -%}
{%- macro vqa_walk(nodes) -%}
    {%- for node in nodes if vqa.places -%}{{ vqa_step(node) }}{%- endfor -%}
{%- endmacro -%}
{%- macro vqa_clean(text) -%}
    {%- for char in text[-<max_chars>:] -%}
        {%- for pair in <joined> if pair[0] <= char <= pair[1] -%}
            {{ vqa_refuse("a text holds letters in parts; write it composed (Unicode NFC)") }}
        {%- endfor -%}
    {%- endfor -%}
    {{- text[-<max_chars>:].lower().split()|join(" ") -}}
{%- endmacro -%}
"""
_YES_NO = """\
{%- set vqa_answers = namespace(others=0) -%}
{%- for text in vqa.choices -%}
    {%- set vqa.read, vqa.places = vqa_clean(text), [0] -%}{{ vqa_walk(<yes_no>) }}
    {%- if vqa.read|length not in vqa.places -%}{%- set vqa_answers.others = 1 -%}{%- endif -%}
{%- endfor -%}
{%- set vqa.type = "" if vqa_answers.others else "yes_no" -%}
"""
_RULES = """\
{%- set vqa.read = vqa_clean(vqa_question) -%}
{%- for rule in <rules> if not vqa.type -%}
    {%- set vqa.places = range(vqa.read|length + 1)|list -%}{{ vqa_walk(rule[1]) }}
    {%- if vqa.places -%}{%- set vqa.type = rule[0] -%}{%- endif -%}
{%- endfor -%}
"""


def type_template(types: Mapping[str, str], *, by_choices: bool = True) -> str:
    """Sets `vqa.type` to the type of the question, where prompts have `types`. The type of a classification's rows is
    that of the question alone, for it is the same whatever the candidates are: not `by_choices`."""
    if not types:
        return ""
    rules = [[name, _nodes(_parser.parse(rule.pattern))] for name, rule in RULES_OF_ALL]
    macros = _MACROS.replace("<max_chars>", str(MAX_CHARS)).replace("<joined>", literal(_JOINED))
    yes_no = _YES_NO.replace("<yes_no>", literal(_nodes(_parser.parse(YES_NO.pattern)))) if by_choices else ""
    return macros + yes_no + _RULES.replace("<rules>", literal(rules))


def _nodes(parsed: Iterable[tuple[Any, Any]]) -> list[list]:
    nodes: list[list] = []
    for kind, value in parsed:
        node = _node(str(kind), value)
        if node[0] == "text" and nodes and nodes[-1][0] == "text":
            nodes[-1][1] += node[1]
        else:
            nodes.append(node)
    return nodes


def _node(kind: str, value: Any) -> list:
    if kind == "LITERAL":
        return ["text", chr(value)]
    if kind == "NOT_LITERAL":
        return ["char", False, chr(value), [], ""]
    if kind == "ANY":
        return ["char", False, "\n", [], ""]
    if kind == "IN":
        return _char(value)
    if kind == "BRANCH":
        branches = [_nodes(branch) for branch in value[1]]
        return ["or", [[_needed(branch), branch] for branch in branches]]
    if kind == "SUBPATTERN":
        nodes = _nodes(value[3])
        return ["or", [[_needed(nodes), nodes]]]
    if kind == "MAX_REPEAT":
        least, most, nodes = value
        return ["times", least, min(int(most), 10 * MAX_CHARS), _nodes(nodes)]
    if kind in ("ASSERT", "ASSERT_NOT"):
        direction, nodes = value
        low, high = nodes.getwidth()
        assert direction == 1 or low == high
        return ["look", kind == "ASSERT", 0 if direction == 1 else int(low), _nodes(nodes)]
    assert kind == "AT" and str(value) in ("AT_BOUNDARY", "AT_BEGINNING"), (kind, value)
    return ["at", "b" if str(value) == "AT_BOUNDARY" else "^"]


def _needed(nodes: list[list]) -> list[str]:
    """Texts of which one stands in all that the list matches; none where there are no such texts."""
    found: list[list[str]] = []
    for node in nodes:
        if node[0] == "text":
            found.append([node[1]])
        elif node[0] == "or" and all(needed for needed, _ in node[1]):
            found.append([text for needed, _ in node[1] for text in needed])
        elif node[0] == "times" and node[1]:
            found.append(_needed(node[3]))
    return min(filter(None, found), key=lambda texts: (len(texts), -min(map(len, texts))), default=[])


def _char(values: Iterable[tuple[Any, Any]]) -> list:
    is_one, chars, pairs, classes = True, "", [], ""
    for kind, value in values:
        if str(kind) == "NEGATE":
            is_one = False
        elif str(kind) == "LITERAL":
            chars += chr(value)
        elif str(kind) == "RANGE":
            pairs.append([chr(value[0]), chr(value[1])])
        else:
            classes += {"CATEGORY_WORD": "w", "CATEGORY_DIGIT": "d"}[str(value)]
    return ["char", is_one, chars, pairs, classes]
