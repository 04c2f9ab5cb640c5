"""Tables, bars and notes: what a terminal shows and what a file holds."""

import os
import pty
import subprocess
import sys

from scripts import RECIPES

from vqa_sft import console

LINES = [["", "rows", "nll"], ["a long name", "12,000", "0.5"], ["b", "3", "10.25"]]


def test_a_table_aligns_names_to_the_left_and_numbers_to_the_right():
    assert console.table(LINES).splitlines() == [
        "               rows    nll",
        "a long name  12,000    0.5",
        "b                 3  10.25",
    ]
    assert console.table([["a", "b", "c"]], left=2, indent=2, first_width=4) == "  a     b  c"


def test_cells_may_hold_anything_and_are_never_cut():
    long = "x" * 1_000
    odd = ["[red]a[/red]", ":smile:", "two\nlines", "\x1b[31m", "https://x.y/z 12 None 'quoted'", "画像"]
    lines = console.table([[cell, long] for cell in odd]).splitlines()
    assert [line.removesuffix(long).rstrip() for line in lines] == [*odd[:2], "two\\nlines", "\\x1b[31m", *odd[4:]]


def test_a_terminal_gets_a_bold_header_and_the_same_text():
    code = f"from vqa_sft.console import table; print(table({LINES}))"
    environment = os.environ | {"PYTHONPATH": str(RECIPES.parent), "TERM": "xterm", "COLUMNS": "12"}
    main, terminal = pty.openpty()
    subprocess.run([sys.executable, "-c", code], stdout=terminal, env=environment, check=True)
    os.close(terminal)
    shown = os.read(main, 10_000).decode().replace("\r\n", "\n")
    os.close(main)
    assert shown.startswith("\x1b[1m")
    plain = shown.replace("\x1b[1m", "").replace("\x1b[0m", "").splitlines()
    assert [line.rstrip() for line in plain] == console.table(LINES).splitlines()


def test_only_the_main_process_prints_notes_and_bars(monkeypatch, capsys):
    for rank, printed in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        console.note("3 rows")
        assert list(console.progress([1, 2], desc="Reading", in_logs=True)) == [1, 2]
        out, err = capsys.readouterr()
        assert (out == "3 rows\n", "Reading" in err) == (printed, printed)
    monkeypatch.delenv("RANK")
    assert list(console.progress([1, 2], desc="Reading")) == [1, 2]  # stderr is no terminal here
    assert not capsys.readouterr().err
