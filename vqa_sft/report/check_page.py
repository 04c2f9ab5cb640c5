"""Renders what `check` found: a table for the terminal, and one self-contained page."""

import base64
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import numpy as np
from markupsafe import Markup

from vqa_sft.data.check import Report, Skew, count_cut, formats, quantiles, sizes
from vqa_sft.data.folds import Deviation
from vqa_sft.data.images import ImageFacts, open_image
from vqa_sft.data.problems import KINDS
from vqa_sft.data.question_types import TYPES
from vqa_sft.errors import name_rows, printable
from vqa_sft.files import write_whole
from vqa_sft.letters import LETTERS

NUM_SAMPLES = (48, 12)  # rows on the wall of the training rows, and of the others
NUM_PROBLEMS = (24, 12)  # rows that are shown for their problems
_PER_KIND = 3
_THUMBNAIL_PX = (256, 128)  # one image, one of several
_MAX_THUMBNAILS = 4
_MAX_CHARS = 600
PAGE_START = "<!DOCTYPE html>\n<!-- Written by vqa-sft check -->\n"
_LABELS = {"p5": "5%", "p25": "25%", "median": "50%", "p75": "75%", "p95": "95%"}

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# --- Sentences, for both ----------------------------------------------------------------------------------------------


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
    cut = count_cut(report)
    return f"{text}; a max_length of {report.max_length:,} would cut {cut:,} ({cut / len(report.tokens):.1%})"


def say_verdict(reports: Sequence[Report]) -> str:
    errors = sum(report.num_bad for report in reports)
    warned = sum(len({row for row, _, _ in warnings(report)}) for report in reports)
    rows = "No row has an error" if not errors else f"{_count(errors, 'row')} with errors: a run stops at them"
    return f"{rows}; {_count(warned, 'row') if warned else 'none'} with warnings."


def warnings(report: Report) -> list[tuple[int, str, str]]:
    return [row for found in report.problems if found.severity == "warning" for row in found.rows]


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _formats(report: Report) -> str:
    return ", ".join(f"{name}: {count:,}" for name, count in formats(report.images).items())


def _shares(counts: dict, total: int) -> str:
    if len(counts) == 1:
        return f"{next(iter(counts))} (all rows)"
    return ", ".join(f"{name}: {count:,} ({count / total:.1%})" for name, count in counts.items())


# --- The table --------------------------------------------------------------------------------------------------------


def describe(reports: Sequence[Report]) -> str:
    """The table that `vqa-sft check` prints."""
    blocks = [block for report in reports for block in _describe(report)]
    return "\n\n".join([*blocks, say_verdict(reports)])


def _describe(report: Report) -> Iterator[str]:
    lines = [("rows", say_rows(report))]
    if report.skew is not None:
        total = sum(report.skew.counts)
        lines.append(("answers", _shares(dict(zip(LETTERS, report.skew.counts, strict=False)), total)))
        lines.append(("", say_skew(report.skew)))
    lines.append(("choices a row", _shares(report.num_choices, report.num_rows)))
    lines.append(("question types", _shares(report.question_types, report.num_rows)))
    lines.append(("images a row", _shares(report.images_per_row, report.num_rows)))
    lines.append(("images", f"{len(report.images):,} different; {say_near(report)}"))
    if formats(report.images):
        lines.append(("", _formats(report)))
    lines.append(("tokens", say_tokens(report).removeprefix("Tokens were ")))
    text = [f"  {name:<16}{value}" for name, value in lines]
    yield "\n".join([*map(printable_line, report.loaded.notes), *text])
    if table := _table(report):
        yield table
    if report.problems:
        yield "\n".join(line for found in report.problems for line in _describe_problem(found, report.num_rows))


def printable_line(text: str) -> str:
    return printable(text, limit=1_000)


def _table(report: Report) -> str:
    """Quantiles, one line a measure."""
    rows = _quantile_rows(report)
    if not rows:
        return ""
    lines = [["", *rows[0][1]]] + [[name, *values.values()] for name, values in rows]
    return "\n".join("  " + line[0].ljust(16) + "".join(cell.rjust(9) for cell in line[1:]) for line in lines)


def _quantile_rows(report: Report) -> list[tuple[str, dict[str, str]]]:
    measures = {
        "width, px": ("width_px", "{:,}"),
        "height, px": ("height_px", "{:,}"),
        "megapixels": ("megapixels", "{:.2f}"),
    }
    values = sizes(report.images)
    rows = [(name, quantiles(values[key]), style) for name, (key, style) in measures.items()]
    rows += [("tokens", quantiles(report.tokens), "{:,}")] if report.tokens is not None else []
    return [
        (name, {_LABELS.get(key, key): style.format(value) for key, value in found.items()})
        for name, found, style in rows
        if found
    ]


def _describe_problem(found, total: int) -> list[str]:
    labels = [label for _, _, label in found.rows]
    return [f"  {found.severity:<9}{found.what}: {name_rows(labels, total)}", f"{'':<11}{found.mend}"]


def describe_folds(folds: Sequence[int], groups: Sequence[int], deviation: Deviation, plain: Deviation | None) -> str:
    """What `vqa-sft folds` prints; `plain` is the deviation of scikit-learn's folds on the same rows."""
    sizes_of_groups = Counter(groups).values()
    repeated = [size for size in sizes_of_groups if size > 1]
    counts = Counter(folds)
    held = {fold: len({group for group, of in zip(groups, folds, strict=True) if of == fold}) for fold in counts}
    lines = [f"{'fold':>6}{'rows':>10}{'groups':>10}"]
    lines += [f"{fold:>6}{counts[fold]:>10,}{held[fold]:>10,}" for fold in sorted(counts, key=lambda f: (f < 0, f))]
    lines.append("")
    lines.append(
        f"{len(folds):,} rows in {len(sizes_of_groups):,} groups that show the same image, or nearly the same;"
    )
    if repeated:
        lines[-1] += f" {len(repeated):,} have several rows, the largest {max(repeated):,}."
    else:
        lines[-1] += " every row is a group of its own."
    lines.append(f"Largest deviation from an even split: {_say_deviation(deviation)}.")
    if plain is not None:
        lines.append(f"scikit-learn's StratifiedGroupKFold on the same rows: {_say_deviation(plain)}.")
    return "\n".join(lines)


def _say_deviation(deviation: Deviation) -> str:
    return (
        f"{deviation.stratum:.1f} rows of a stratum (answer, question type and number of choices together), "
        f"{deviation.part:.1f} of one of them alone, {deviation.size:.1f} of all rows"
    )


# --- The page ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Card:
    """One row on the wall."""

    row_id: str
    question_type: str
    question: str
    context: str
    choices: list[tuple[str, str, bool]]  # letter, text, is the answer
    problems: list[tuple[str, str]]  # severity, what is wrong
    images: list[tuple[str | None, str]]  # data address, or None and the reason
    num_more: int  # images that are not shown


def write_page(path: str | Path, reports: Sequence[Report]) -> None:
    """One HTML file that needs nothing else: plots, problems, and a wall of rows. Written whole or not at all."""
    template = Path(__file__).with_name("check_page.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["shown"] = shown
    page = environment.from_string(template).render(
        title=Path(reports[0].loaded.name).name,
        verdict=say_verdict(reports),
        clean=not any(report.num_bad for report in reports),
        sections=[_section(report, is_first=report is reports[0]) for report in reports],
    )
    write_whole(path, PAGE_START + page)


def shown(text: str, limit: int = _MAX_CHARS) -> str:
    """Data on the page: not endless, and without characters that turn or hide the text around them."""
    text = text if len(text) <= limit else text[:limit] + " ..."
    # The joiners are part of words in many scripts, and of emoji.
    return "".join(c if c.isprintable() or c in "\n\u200c\u200d" else ascii(c)[1:-1] for c in text)


def _section(report: Report, is_first: bool) -> dict:
    which = 0 if is_first else 1
    problem_rows = choose_problem_rows(report, NUM_PROBLEMS[which])
    samples = choose_samples(report, NUM_SAMPLES[which])
    of_row = _problems_of_rows(report)
    return {
        "heading": say_rows(report),
        "notes": report.loaded.notes,
        "plots": list(_plots(report)),
        "facts": list(_facts(report)),
        "quantiles": _quantile_rows(report),
        "problems": [
            {
                "severity": found.severity,
                "what": found.what,
                "mend": found.mend,
                "count": len(found.rows),
                "labels": [label for _, _, label in found.rows[:5]],
            }
            for found in report.problems
        ],
        "problem_cards": [_card(report, row, of_row) for row in problem_rows],
        "samples": [
            (name, report.question_types[name], [_card(report, row, of_row) for row in rows]) for name, rows in samples
        ],
    }


def _facts(report: Report) -> Iterator[str]:
    """Sentences for what needs no plot."""
    if report.skew is None:
        yield "No row has an answer."
    if len(report.num_choices) == 1:
        yield f"Every question has {next(iter(report.num_choices))} choices."
    if len(report.images_per_row) == 1:
        number = next(iter(report.images_per_row))
        yield f"Every row has {'one' if number == 1 else number or 'no'} image{'s' * (number > 1)}."
    named = _formats(report)
    if named:
        yield f"{_count(len(report.images), 'different image')} ({named}); {say_near(report)}."
    if report.tokens is None or not len(report.tokens):
        yield say_tokens(report)


def _problems_of_rows(report: Report) -> dict[int, dict[str, str]]:
    """Number of a row -> kinds of its problems -> what is wrong."""
    of_row: dict[int, dict[str, str]] = {}
    for found in report.problems:
        for number, row_id, label in found.rows:
            evidence = label.removeprefix(row_id or f"number {number}")
            of_row.setdefault(number, {})[found.kind] = found.what + evidence
    return of_row


def choose_problem_rows(report: Report, limit: int) -> list[int]:
    """A few rows of every kind of problem, as positions in the examples; errors first."""
    positions = {number: row for row, number in enumerate(report.loaded.numbers)}
    chosen: dict[int, None] = {}
    for found in report.problems:
        chosen |= dict.fromkeys(list(dict.fromkeys(positions[number] for number, _, _ in found.rows))[:_PER_KIND])
    return list(chosen)[:limit]


def choose_samples(report: Report, limit: int) -> list[tuple[str, list[int]]]:
    """Rows of every question type, evenly spaced over the data: every type gets as many, as far as it has them."""
    rows_of = {name: [] for name in TYPES}
    for row, name in enumerate(report.loaded.examples["question_type"]):
        rows_of[name].append(row)
    slots = dict.fromkeys(TYPES, 0)
    while limit and any(slots[name] < len(rows) for name, rows in rows_of.items()):
        for name, rows in rows_of.items():
            if limit and slots[name] < len(rows):
                slots[name] += 1
                limit -= 1
    spaced = {
        name: [rows[(2 * i + 1) * len(rows) // (2 * slots[name])] for i in range(slots[name])]
        for name, rows in rows_of.items()
    }
    return [(name, rows) for name, rows in spaced.items() if rows]


def _card(report: Report, row: int, problems_of: dict[int, dict[str, str]]) -> Card:
    example, number = report.loaded.examples[row], report.loaded.numbers[row]
    problems = problems_of.get(number, {})
    facts = [report.scan.images[i] for i in report.scan.of_row[row]]
    images = list(zip(example["images"], facts, strict=True))[:_MAX_THUMBNAILS]
    if "path_outside" in problems:  # what the recipe does not allow to be read is not shown to whoever gets the page
        thumbnails = [(None, KINDS["path_outside"].what)]
    else:
        thumbnails = [_make_thumbnail(*image, _THUMBNAIL_PX[len(facts) > 1]) for image in images]
    return Card(
        example["id"] or f"number {number}",
        example["question_type"],
        example["question"],
        example["context"],
        [
            (letter, text, i == example["answer"])
            for i, (letter, text) in enumerate(zip(LETTERS, example["choices"], strict=False))
        ],
        [(KINDS[kind].severity, text) for kind, text in problems.items()],
        thumbnails,
        len(facts) - len(images),
    )


def _make_thumbnail(image: dict, facts: ImageFacts, size: int) -> tuple[str | None, str]:
    if facts.problem not in (None, "long_image"):
        return None, KINDS[facts.problem].what
    thumbnail = open_image(image)
    thumbnail.thumbnail((size, size))
    file = io.BytesIO()
    thumbnail.save(file, format="JPEG", quality=75)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}", f"{facts.width} x {facts.height}"


# --- Plots ------------------------------------------------------------------------------------------------------------

# Stand for colours of the page's style, which differ between light and dark.
_COLOURS = {"#111111": "currentColor", "#222222": "var(--bar)", "#333333": "var(--mark)", "#444444": "var(--grid)"}
_TEXT, _BAR, _MARK, _GRID = _COLOURS


def _plots(report: Report) -> Iterator[tuple[str, Markup]]:
    """(what is seen, SVG); texts of the data never stand in a plot."""
    if report.skew is not None:
        counts = dict(zip(LETTERS, report.skew.counts, strict=False))
        yield f"{say_skew(report.skew)}.", _bars(counts, report.skew.expected)
    types = report.question_types
    name, count = next(iter(types.items()))
    yield f"The commonest question type is {name}: {count / report.num_rows:.0%}.", _bars(types, lying=True)
    for counts, what in ((report.num_choices, "choices"), (report.images_per_row, "images a row")):
        if len(counts) > 1:
            number = max(counts, key=counts.get)
            yield f"The commonest number of {what} is {number}: {counts[number] / report.num_rows:.0%}.", _bars(counts)
    sides = sizes(report.images)
    if len(sides["width_px"]):
        width, height = (quantiles(sides[key])["median"] for key in ("width_px", "height_px"))
        yield (
            f"Half of the images are wider than {width:,} pixels, and half are higher than {height:,}.",
            _histogram({"width": sides["width_px"], "height": sides["height_px"]}, "pixels", "images"),
        )
    if report.tokens is not None and len(report.tokens):
        yield f"{say_tokens(report)}.", _histogram({"": report.tokens}, "tokens", "rows", mark=report.max_length)


def _bars(counts: dict, expected: Sequence[float] = (), lying: bool = False) -> Markup:
    """One bar a name; with `expected`, a mark on each."""
    names, values = list(map(str, counts)), list(counts.values())
    if len(names) <= 10 and not lying:
        names = [f"{name}\n{value:,}" for name, value in counts.items()]

    def paint(axes: "Axes") -> None:
        bars = (axes.barh if lying else axes.bar)(names, values, 0.7, color=_BAR)
        if len(expected):
            axes.hlines(expected, np.arange(len(names)) - 0.42, np.arange(len(names)) + 0.42, color=_MARK, linewidth=2)
            axes.plot([], [], color=_MARK, linewidth=2, label="if no letter were preferred")
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
        if lying:
            axes.bar_label(bars, [f"{value:,}" for value in values], padding=2)
            axes.margins(x=0.15)
            axes.invert_yaxis()
        _hide_numbers(axes, of_x=lying)

    return _draw(paint, height=0.6 + 0.28 * len(names) if lying else 2.4)


def _hide_numbers(axes: "Axes", of_x: bool) -> None:
    axes.spines["bottom" if of_x else "left"].set_visible(False)
    axes.tick_params(**({"bottom": False, "labelbottom": False} if of_x else {"left": False, "labelleft": False}))
    axes.tick_params(length=0)


def _histogram(values: dict[str, np.ndarray], unit: str, of_what: str, mark: int | None = None) -> Markup:
    """Outlines over common bins; the first is filled. A wide range is drawn on a logarithmic axis."""
    together = np.concatenate(list(values.values()))
    low, high = max(1, together.min()), max(2, together.max(), mark or 0)
    is_wide = high > 30 * low
    from matplotlib.ticker import LogLocator

    edges = np.geomspace(low, high + 1, 41) if is_wide else np.linspace(low, high + 1, 41)

    def paint(axes: "Axes") -> None:
        for i, (name, numbers) in enumerate(values.items()):
            style = {"color": _MARK, "linewidth": 1.5, "fill": False} if i else {"color": _BAR, "fill": True}
            axes.stairs(np.histogram(numbers, edges)[0], edges, label=name, **style)
        if mark is not None:
            axes.axvline(mark, color=_MARK, linewidth=2, label="max_length")
        if len(values) > 1 or mark is not None:
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
        if is_wide:
            axes.set_xscale("log", subs=[])
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1_000 * low else (1,)))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.get_major_locator().set_params(integer=True, nbins=4)
        axes.set_xlabel(unit)
        axes.set_ylabel(of_what)

    return _draw(paint)


def _draw(paint: Callable[["Axes"], None], height: float = 2.4) -> Markup:
    """An SVG that takes its colours and its font from the page."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {"svg.fonttype": "none", "svg.hashsalt": "vqa-sft", "font.size": 10, "text.color": _TEXT}
    style |= {"axes.edgecolor": _GRID, "axes.labelcolor": _TEXT, "xtick.color": _TEXT, "ytick.color": _TEXT}
    style |= {"axes.spines.top": False, "axes.spines.right": False}
    file = io.StringIO()
    with rc_context(style):
        figure = Figure(figsize=(4.6, height), layout="constrained")
        paint(figure.add_subplot())
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>|\sxmlns(:\w+)?=\"[^\"]*\"", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    for colour, name in _COLOURS.items():
        svg = svg.replace(colour, name)
    return Markup(svg)
