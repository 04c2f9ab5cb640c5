"""Takes docs/images/report.png: the page of the demo in headless Chromium, without tables by kind of row and notes.

make demo
python -m vqa_sft.lab.report_image --page runs/demo/report.html --output docs/images/report.png
"""

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image, ImageChops

from vqa_sft.errors import InputError, exits_with_message

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH, MAX_HEIGHT = 1280, 4000
MAX_BYTES = 300_000
MARGIN = 24  # pixels below the last row
# One line of rows and one of plots: what is left of the page fits a screen.
HIDDEN = ".kinds, .facts, .notes, .plots > :nth-child(n+5), .card:nth-child(n+5 of :not([hidden]))"
STYLE = f"<style>{HIDDEN} {{ display: none; }}</style></head>"
VIEW = "list=changed2&result=wrong&result2=correct"  # what the second input won


@exits_with_message
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=Path("runs/demo/report.html"), help="of `vqa-sft report`")
    parser.add_argument("--view", default=VIEW, help="rows that are shown, as the address of the page has them")
    parser.add_argument("--output", type=Path, default=Path("docs/images/report.png"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        screenshot = take(args.page, args.view, Path(folder))
    for colours in (256, 128, 64):
        screenshot.quantize(colours).save(args.output, optimize=True)
        if args.output.stat().st_size <= MAX_BYTES:
            break
    print(
        f"Wrote {args.output}: {screenshot.width} x {screenshot.height} pixels, {args.output.stat().st_size:,} bytes."
    )


def take(page: Path, view: str, folder: Path) -> Image.Image:
    """A screenshot of the page, down to the end of what is on it. `folder` is for what the browser needs."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise InputError(f"no browser is installed: none of {', '.join(BROWSERS)}. Install chromium.")
    if not page.is_file():
        raise InputError(f"no such page: {page}. Write it: vqa-sft report, or make demo.")
    copy, taken = folder / "page.html", folder / "taken.png"
    copy.write_text(page.read_text(encoding="utf-8").replace("</head>", STYLE, 1), encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={folder / 'browser'}", f"--window-size={WIDTH},{MAX_HEIGHT}", f"--screenshot={taken}"]
    done = subprocess.run([*command, f"file://{copy}#{view}"], capture_output=True, text=True, timeout=120)
    if not taken.is_file():
        raise InputError(f"{browser} took no screenshot: {done.stderr.strip()[-300:]}")
    with Image.open(taken) as opened:
        whole = opened.convert("RGB")
    empty = Image.new("RGB", whole.size, whole.getpixel((0, 0)))
    bottom = ImageChops.difference(whole, empty).getbbox()[3]
    return whole.crop((0, 0, whole.width, min(whole.height, bottom + MARGIN)))


if __name__ == "__main__":
    main()
