"""The page in a browser: what its script does, and whether it fits a phone. Skipped where no Chromium is installed."""

import html
import json
import re
import shutil
import subprocess

import pytest
from test_report_page import HOSTILE, cards_of, hostile, page_of, scored  # noqa: F401

from vqa_sft.report.report_inputs import read_inputs
from vqa_sft.report.report_wall import rank_rows

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.medium, pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")]


@pytest.fixture
def browse(tmp_path):
    """`browse(page, "#search=cat", width=400)`: the document as the script left it."""

    def browse(page, address="", width=1280):
        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}"]
        command += [f"--window-size={width},900", "--virtual-time-budget=2000", "--dump-dom"]
        done = subprocess.run([*command, f"file://{page}{address}"], capture_output=True, text=True, timeout=120)
        return done.stdout

    return browse


def ids_shown(document):
    """In the order of the page."""
    return [row_id for row_id, card in cards_of(document).items() if not re.match(r"[^>]*\shidden=", card)]


def test_lists_filters_and_search_stand_in_the_address(contest, browse):
    files = [scored(contest), scored(contest, seed=1)]
    page_of(contest, *files)
    page = contest / "r.html"
    inputs = read_inputs([*map(str, files)], data=str(contest / "train.csv"))
    for ranked in rank_rows(inputs):
        assert ids_shown(browse(page, f"#list={ranked.key}")) == [inputs.ids[row] for row in ranked.rows]
    assert ids_shown(browse(page)) == [inputs.ids[row] for row in rank_rows(inputs)[0].rows]
    wrong = [row_id for i, row_id in enumerate(inputs.ids) if inputs.inputs[0].best[i] != inputs.answers[i]]
    second = inputs.inputs[1].best == inputs.answers
    won = [row_id for row_id, is_right in zip(inputs.ids, second, strict=True) if row_id in wrong and is_right]
    assert ids_shown(browse(page, "#result=wrong&result2=correct")) == won and won
    document = browse(page, "#result=wrong")
    assert ids_shown(document) == wrong and f"{len(wrong)} rows shown" in document
    assert len(ids_shown(browse(page, "#type=colour"))) == 24 and ids_shown(browse(page, "#type=nothing"))
    assert ids_shown(browse(page, "#search=ROW_01+colour")) == [f"row_01{i}" for i in range(10)]
    assert "0 rows shown" in browse(page, "#search=nowhere")


def test_hostile_texts_are_found_and_run_nothing(hostile, browse):  # noqa: F811
    page_of(hostile, scored(hostile))
    for name, word in (("script", "</script><script>"), ("svg", "onload"), ("emoji", "🇰🇷"), ("arabic", "المربع")):
        document = browse(hostile / "r.html", f"#search={word}")
        assert ids_shown(document) == [f"{name} {HOSTILE[name]}"]
    assert document.count("<script") == 1 and "<svg onload" not in document.replace('data-id="svg <svg onload', "")


# Put at the end of the page: presses the buttons and tells the frame around it what was copied.
SPY = """<script>
  const copied = [];
  Object.defineProperty(navigator, "clipboard", { value: { writeText: async () => { throw 1; } } });
  document.execCommand = () => copied.push(document.querySelector("textarea").value);
  find("copy").click();
  find("keep").click();
  URL.createObjectURL = (blob) => { blob.text().then((text) => copied.push(text)); return ""; };
  HTMLAnchorElement.prototype.click = () => {};
  find("download").click();
  setTimeout(() => parent.postMessage([innerWidth, document.documentElement.scrollWidth, copied], "*"), 100);
</script></body>"""
# A window is never as narrow as a phone; a frame is.
FRAME = """<iframe src="spied.html#search=row_00" width="400" height="900" style="border: 0"></iframe><pre></pre>
<script>onmessage = (event) => { document.querySelector("pre").textContent = JSON.stringify(event.data); };</script>"""


def test_nothing_is_wider_than_a_phone_and_buttons_give_the_ids(hostile, browse, run):  # noqa: F811
    page, _ = page_of(hostile, scored(hostile), scored(hostile, seed=1), scored(hostile, seed=2))
    page = re.sub(r"<meta http-equiv[^>]*>", "", page).replace("</body>", SPY)
    (hostile / "spied.html").write_text(page, encoding="utf-8")
    (hostile / "frame.html").write_text(FRAME, encoding="utf-8")
    document = browse(hostile / "frame.html")
    width, scroll_width, copied = json.loads(html.unescape(re.search(r"<pre>(.*?)</pre>", document)[1]))
    assert width == 400 and scroll_width <= width
    ids = [f"row_00{i}" for i in range(5, 10)]
    lines = "".join(f"{row_id}\n" for row_id in ids)
    (hostile / "ids.txt").write_text(copied[2], encoding="utf-8")
    run("check", hostile / "train.csv", "--only", hostile / "ids.txt", "--fix", hostile / "some.csv")
    assert [line[:7] for line in (hostile / "some.csv").read_text().splitlines()[1:]] == ["row_005", "row_009"]
    assert copied == [lines, "keep_rows: " + json.dumps({"id": ids}).replace(" ", "") + "\n", lines]
