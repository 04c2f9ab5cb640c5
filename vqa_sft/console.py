"""What is printed: tables as text, progress bars, and notes that the main process alone prints. No torch.

table([["", "nll"], ["base", "1.39"], ["tuned", "0.05"]])   aligned text; in a terminal the header is bold
for row in progress(rows, desc="Reading"): ...              a bar, on the main process
note("3 rows have no answer")                               a line, on the main process
"""

from collections.abc import Iterable, Sequence
from typing import Any

from tqdm import tqdm

from vqa_sft.environment import is_main_process
from vqa_sft.errors import printable


def note(text: str) -> None:
    if is_main_process():
        print(text, flush=True)


def table(
    lines: Sequence[Sequence[str]], *, header: bool = True, left: int = 1, indent: int = 0, first_width: int = 0
) -> str:
    """Lines of cells, of one length each, as text: the first `left` columns to the left, the others to the right.

    A cell is one line, is never cut, and may hold any text: nothing in it is markup or obeyed by a terminal. With
    `header` the first line is bold where stdout is a terminal. `first_width` is the least width of the first column.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for number in range(len(lines[0])):
        min_width = first_width if number == 0 else None
        grid.add_column(justify="left" if number < left else "right", no_wrap=True, min_width=min_width)
    texts = [[Text(printable(cell, limit=len(cell))) for cell in line] for line in lines]
    for number, line in enumerate(texts):
        grid.add_row(*line, style="bold" if header and number == 0 else None)
    # As wide as any line may be, whatever the terminal: nothing is cut.
    console = Console(width=first_width + sum(text.cell_len + 2 for line in texts for text in line), highlight=False)
    with console.capture() as capture:
        console.print(grid)
    return "\n".join(" " * indent + line.rstrip() for line in capture.get().splitlines())


def progress(
    rows: Iterable[Any] | None = None,
    *,
    desc: str,
    total: int | None = None,
    unit: str = "it",
    in_logs: bool = False,
    delay_s: float = 0,
) -> tqdm:
    """A progress bar on the main process, in a terminal; with `in_logs` also where stderr is none."""
    hidden = (False if in_logs else None) if is_main_process() else True  # None: tqdm asks whether it is a terminal
    return tqdm(rows, desc=desc, total=total, unit=unit, delay=delay_s, disable=hidden)
