"""What `vqa-sft check` prints: sentences and tables. The page uses the sentences too."""

from collections.abc import Iterator, Sequence

import numpy as np

from vqa_sft.console import table
from vqa_sft.data.check import Found, Report, Skew, quantiles
from vqa_sft.errors import name_rows, printable
from vqa_sft.questions.letters import LETTERS

_LABELS = {"p5": "5%", "p25": "25%", "median": "50%", "p75": "75%", "p95": "95%"}
_NAME_WIDTH = 16


def say_rows(report: Report) -> str:
    bad = report.num_bad
    if not bad:
        return f"{report.num_rows:,} {report.role} rows, all of which can be used"
    return f"{report.num_rows:,} {report.role} rows, of which {bad:,} cannot be used"


def say_skew(skew: Skew) -> str:
    letter, share, even = skew.largest
    evidence = f"{letter} answers {share:.1%} of the rows, {even:.1%} if no letter were preferred"
    if skew.p_value is None:
        return f"Too few rows to tell whether the answers are skewed: {evidence}"
    p_value = f"p = {skew.p_value:.2f}" if not skew.skewed else f"p = {max(skew.p_value, 1e-12):.1g}"
    p_value = p_value.replace("= 1e-12", "< 1e-12")
    return f"The answers are {'' if skew.skewed else 'not '}skewed ({p_value}): {evidence}"


def say_classes(report: Report) -> str:
    """How many classes there are, and the rows of the smallest, the median and the largest."""
    rows, classes = report.class_rows, report.loaded.classes
    assert rows is not None and classes is not None
    if not rows.any():
        return f"{len(rows):,}; no row names one"
    least, most = (f"{rows[i]:,} ({printable(classes.names[i], 60)})" for i in (rows.argmin(), rows.argmax()))
    return f"{len(rows):,}; rows a class: least {least}, median {np.median(rows):,g}, most {most}"


def say_near(report: Report) -> str:
    groups = report.near_groups
    if groups is None:
        return "nearly equal ones were not looked for"
    if not groups:
        return "no two nearly alike"
    return f"{sum(groups):,} in {len(groups):,} groups of nearly the same image, the largest of {groups[0]:,}"


def say_tokens(report: Report) -> str:
    if report.tokens is None:
        return f"Tokens were not counted: {report.tokens_note}"
    if not len(report.tokens):
        return "Tokens were not counted: no row can be used."
    found = quantiles(report.tokens)
    text = f"Half of the prompts have more than {found['median']:,} tokens, the longest has {found['max']:,}"
    if report.max_length is None:
        return text
    cut = report.num_cut
    return f"{text}; a max_length of {report.max_length:,} would cut {cut:,} ({cut / len(report.tokens):.1%})"


def say_verdict(reports: Sequence[Report]) -> str:
    errors = sum(report.num_bad for report in reports)
    warned = sum(len({row for row, _, _ in _warnings(report)}) for report in reports)
    rows = "No row has an error" if not errors else f"{say_count(errors, 'row')} with errors: a run stops at them"
    return f"{rows}; {say_count(warned, 'row') if warned else 'none'} with warnings."


def _warnings(report: Report) -> list[tuple[int, str, str]]:
    return [row for found in report.problems if found.severity == "warning" for row in found.rows]


def say_count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def say_formats(report: Report) -> str:
    return ", ".join(f"{name}: {count:,}" for name, count in report.formats.items())


def _shares(counts: dict) -> str:
    total = sum(counts.values())
    if len(counts) == 1:
        return f"{next(iter(counts))} (all rows)"
    return ", ".join(f"{name}: {count:,} ({count / total:.1%})" for name, count in counts.items())


def describe(reports: Sequence[Report]) -> str:
    """The table that `vqa-sft check` prints."""
    blocks = [block for report in reports for block in _describe(report)]
    return "\n\n".join([*blocks, say_verdict(reports)])


def _describe(report: Report) -> Iterator[str]:
    lines = [("rows", say_rows(report))]
    if report.class_rows is not None:
        lines.append(("classes", say_classes(report)))
    if report.skew is not None:
        lines.append(("answers", _shares(dict(zip(LETTERS, report.skew.counts, strict=False)))))
        lines.append(("", say_skew(report.skew)))
    if report.class_rows is None:
        lines.append(("choices a row", _shares(report.num_choices)))
    lines.append(("question types", _shares(report.question_types)))
    lines.append(("images a row", _shares(report.images_per_row)))
    lines.append(("images", f"{len(report.images):,} different; {say_near(report)}"))
    if report.formats:
        lines.append(("", say_formats(report)))
    lines.append(("tokens", say_tokens(report).removeprefix("Tokens were ")))
    text = [f"  {name:<{_NAME_WIDTH}}{value}" for name, value in lines]
    yield "\n".join([*map(printable_line, report.loaded.notes), *text])
    rows = quantile_rows(report)
    if rows:
        lines = [["", *rows[0][1]]] + [[name, *values.values()] for name, values in rows]
        yield table(lines, indent=2, first_width=_NAME_WIDTH)
    if report.problems:
        yield "\n".join(_describe_problem(found, report.num_rows) for found in report.problems)


def printable_line(text: str) -> str:
    return printable(text, limit=1_000)


def quantile_rows(report: Report) -> list[tuple[str, dict[str, str]]]:
    """One a measure, with the name of each quantile and its value."""
    sizes = report.sizes
    measures = [
        ("width, px", sizes["width_px"], "{:,}"),
        ("height, px", sizes["height_px"], "{:,}"),
        ("megapixels", sizes["megapixels"], "{:.2f}"),
    ]
    measures += [("tokens", report.tokens, "{:,}")] if report.tokens is not None else []
    found = [(name, quantiles(values), style) for name, values, style in measures]
    return [
        (name, {_LABELS.get(key, key): style.format(value) for key, value in values.items()})
        for name, values, style in found
        if values
    ]


def _describe_problem(found: Found, total: int) -> str:
    labels = [label for _, _, label in found.rows]
    return f"  {found.severity:<9}{found.what}: {name_rows(labels, total)}\n{'':<11}{found.fix}"
