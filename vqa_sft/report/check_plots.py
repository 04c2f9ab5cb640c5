"""The plots of the page: SVG that takes its colours and its font from the page."""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from vqa_sft.data.check import Report, quantiles
from vqa_sft.questions.letters import LETTERS
from vqa_sft.report.check_text import say_skew, say_tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Stand for colours of the page's style, which differ between light and dark.
COLOURS = {"#111111": "currentColor", "#222222": "var(--bar)", "#333333": "var(--mark)", "#444444": "var(--grid)"}
TEXT, BAR, MARK, GRID = COLOURS


def make_plots(report: Report) -> Iterator[tuple[str, Markup]]:
    """(caption, SVG); no plot holds texts of the data."""
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
    sides = report.sizes
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
        bars = (axes.barh if lying else axes.bar)(names, values, 0.7, color=BAR)
        if len(expected):
            axes.hlines(expected, np.arange(len(names)) - 0.42, np.arange(len(names)) + 0.42, color=MARK, linewidth=2)
            axes.plot([], [], color=MARK, linewidth=2, label="if no letter were preferred")
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
        if lying:
            axes.bar_label(bars, [f"{value:,}" for value in values], padding=2)
            axes.margins(x=0.15)
            axes.invert_yaxis()
        _hide_numbers(axes, of_x=lying)

    return draw(paint, height=0.6 + 0.28 * len(names) if lying else 2.4)


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
            style = {"color": MARK, "linewidth": 1.5, "fill": False} if i else {"color": BAR, "fill": True}
            axes.stairs(np.histogram(numbers, edges)[0], edges, label=name, **style)
        if mark is not None:
            axes.axvline(mark, color=MARK, linewidth=2, label="max_length")
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

    return draw(paint)


def draw(paint: Callable[["Axes"], None], height: float = 2.4, width: float = 4.6) -> Markup:
    """An SVG that takes its colours and its font from the page, and is as wide as there is room: in a smaller one texts
    are larger."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {"svg.fonttype": "none", "svg.hashsalt": "vqa-sft", "font.size": 10, "text.color": TEXT}
    style |= {"axes.edgecolor": GRID, "axes.labelcolor": TEXT, "xtick.color": TEXT, "ytick.color": TEXT}
    style |= {"axes.spines.top": False, "axes.spines.right": False}
    file = io.StringIO()
    with rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(figure.add_subplot())
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>|\sxmlns(:\w+)?=\"[^\"]*\"", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    for colour, name in COLOURS.items():
        svg = svg.replace(colour, name)
    return Markup(svg)
