"""A screenshot of the report's page, taken by a browser. Skipped where no Chromium is installed."""

import shutil
import subprocess
import sys

import pytest
from PIL import Image

from vqa_sft.lab.report_image import BROWSERS, MARGIN, WIDTH

pytestmark = pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason="no Chromium is installed")
PAGE = """<!DOCTYPE html><html><head><style>
body {{ margin: 0; padding-top: 10px }} article {{ height: 100px; background: teal }} .kinds {{ height: 900px }}
</style></head><body><div class="kinds"></div>{}</body></html>"""


def test_the_screenshot_ends_with_the_first_line_of_rows(tmp_path):
    rows = '<article class="card" hidden></article>' + 9 * '<article class="card"></article>'
    (tmp_path / "page.html").write_text(PAGE.format(f"<div>{rows}</div>"))
    command = [sys.executable, "-m", "vqa_sft.lab.report_image", "--page", tmp_path / "page.html"]
    command += ["--output", tmp_path / "out.png"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "out.png").size == (WIDTH, 10 + 4 * 100 + MARGIN)  # four rows are one line
    assert (tmp_path / "out.png").stat().st_size < 300_000


def test_a_page_that_is_not_there_is_one_line(tmp_path):
    command = [sys.executable, "-m", "vqa_sft.lab.report_image", "--page", str(tmp_path / "nowhere.html")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "no such page" in done.stderr and len(done.stderr.splitlines()) == 1
