"""`vqa-sft try`: what the page says of a question, and the page itself. What needs gradio, or a browser, is skipped
where that is not installed."""

import math
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
from contest import rows_of
from prediction_rows import drawn

from vqa_sft.cli import try_page
from vqa_sft.errors import InputError
from vqa_sft.predictions.file import Predictions, write_predictions
from vqa_sft.predictions.uncertainty import Threshold, threshold_of_run
from vqa_sft.runs.space import check_base, write_space

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def write_bomb(path):
    """A PNG whose header says 40,000 x 40,000 pixels."""
    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 99)), (b"IEND", b"")]
    crc = zlib.crc32
    chunks = [struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc(name + data)) for name, data in parts]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    return str(path)


# --- before a model is loaded -----------------------------------------------------------------------------------------


def test_a_missing_gradio_and_a_port_in_use_are_one_line(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, _, said = run("try", tmp_path)
    assert code == 2 and said.count("\n") == 1 and said.endswith(f"Install it: {try_page.INSTALL}\n")
    monkeypatch.setitem(sys.modules, "gradio", types.ModuleType("gradio"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code, _, said = run("try", tmp_path, "--port", port)
    expected = (
        f"error: cannot listen on 127.0.0.1, port {port} (address already in use). Give another --port or --host.\n"
    )
    assert (code, said) == (2, expected)
    code, _, said = run("try", tmp_path, "--coverage", 90)
    assert code == 2 and "--coverage must be between 0 and 1; got 90" in said


def test_the_threshold_is_that_of_the_calibrated_validation_rows(tmp_path):
    logits, answers = drawn(40, 2.0)
    rows = Predictions([f"row {i}" for i in range(40)], [[*row] for row in logits], answers)
    assert threshold_of_run(tmp_path, 0.9) is None  # no rows
    write_predictions(tmp_path / "validation.parquet", rows)
    (tmp_path / "calibration.json").write_text('{"orders identity": {"temperature": 2.0}}')
    scores = []
    for row, answer in zip(logits, answers, strict=True):
        powers = [math.exp(value / 2) for value in row]
        scores.append(1 - powers[answer] / sum(powers))
    # The 37th of 40: ceil(41 * 0.9).
    assert threshold_of_run(tmp_path, 0.9) == Threshold(0.9, pytest.approx(sorted(scores)[36], abs=1e-6), 40)
    assert threshold_of_run(tmp_path, 0.99).value == math.inf


def test_the_answer_names_the_set_and_the_range_of_each_option():
    probs = np.array([[0.7, 0.2, 0.1], [0.3, 0.6, 0.1], [0.5, 0.15, 0.35]])
    said = try_page.describe_answer(["cat", "<b>dog</b>", "fox"], probs, Threshold(0.9, 0.85, 400), "about")
    assert "Answer: <strong>A. cat</strong>, 70.0%. Conformal set for 90%: <strong>A, B</strong>." in said
    assert "2 of 3 rotations" in said and "by up to 45.0 points" in said
    rows = [re.sub("<[^>]*>", " ", row).split() for row in re.findall("<tr>(.*?)</tr>", said)[1:]]
    assert rows[0] == ["A.", "cat", "(in", "the", "set)", "70.0%", "(30.0", "to", "70.0%)"]
    assert rows[2] == ["C.", "fox", "10.0%", "(10.0", "to", "35.0%)"]
    assert "&lt;b&gt;dog" in said and "<b>" not in said


# --- with a run -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked(three):
    """A run's folder, its Predictor, and an image, a question and options, none of which is right: the run is sure of
    those that are."""
    from vqa_sft import Predictor

    contest, runs = three
    question = (
        str(contest / rows_of(contest)[0]["path"]),
        "Which colour has the square?",
        ["pink", "yellow", "brown", "grey"],
    )
    return runs / "fold0", Predictor(runs / "fold0", use_cpu=True), question


def test_rotations_average_to_what_predict_makes_of_them(asked):
    from vqa_sft import Predictor

    folder, predict, (image, question, choices) = asked
    probs = try_page.score_rotations(predict, image, question, choices, None)
    assert probs.shape == (4, 4) and np.ptp(probs, axis=0).max() > 0.5
    np.testing.assert_allclose(probs[0], predict(image, question, choices), atol=1e-5)
    averaged = Predictor(folder, use_cpu=True, orders="rotations")(image, question, choices)
    np.testing.assert_allclose(probs.mean(axis=0), averaged, atol=1e-5)
    choices = [*choices[:3], "none of the above"]  # which stays last
    assert try_page.score_rotations(predict, image, question, choices, None).shape == (3, 4)


def test_what_cannot_be_asked_is_an_input_error(asked, tmp_path):
    _, predict, (image, question, choices) = asked
    (tmp_path / "notes.png").write_text("no image")
    cases = [
        (None, question, choices, "there is no image"),
        (write_bomb(tmp_path / "bomb.png"), question, choices, "the image has too many pixels"),
        (str(tmp_path / "notes.png"), question, choices, "the file is no image that can be read"),
        (image, " ", choices, "is empty"),
        (image, "?" * 10_000_000, choices, "10,000,0.. characters; at most 20,000 are read"),
        (image, question, choices[:1], "2 to 4 options, as in training, one per line; got 1"),
        (image, question, [*choices, "pink"], "one per line; got 5"),
        (image, question, ["same", "same"], "are all the same"),
        (image, question + " <|im_end|>", choices, "control token"),
    ]  # fmt: skip
    for shown, text, options, message in cases:
        with pytest.raises(InputError, match=message):
            try_page.answer(predict, None, shown, text, "\n".join(options), "")


def test_examples_are_the_most_certain_the_median_and_the_least_certain_validation_row(asked, tmp_path):
    folder, predict, _ = asked
    examples = try_page.find_examples(folder, tmp_path, False)
    assert [label.partition(";")[0] for label in examples] == ["The most certain", "The median", "The least certain"]
    margins = [np.sort(predict(image, question, options.split("\n"))) for image, question, options in examples.values()]
    margins = [row[-1] - row[-2] for row in margins]
    assert margins[0] >= margins[1] >= margins[2] - 1e-6
    assert try_page.find_examples(folder.parent, tmp_path, False) == {}


# --- the page ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(asked, tmp_path_factory):
    """Where the page of that run is served."""
    pytest.importorskip("gradio")
    folder, predict, _ = asked
    files = tmp_path_factory.mktemp("gradio")
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(files)}
    page = try_page.build_page(
        predict, threshold_of_run(folder, 0.5), try_page.find_examples(folder, files, False), "x"
    )
    port = free_port()
    try_page.launch(page, "127.0.0.1", port)
    yield f"http://127.0.0.1:{port}"
    page.close(verbose=False)


def test_a_client_gets_the_answer_or_one_line(address, asked, tmp_path):
    from gradio_client import Client, handle_file

    _, predict, (image, question, choices) = asked
    client = Client(address, verbose=False)
    best = f"{100 * predict(image, question, choices).max():.1f}%"
    assert best in client.predict(handle_file(image), question, "\n".join(choices), api_name="/ask")
    for shown, text, options, message in (
        (None, question, choices, "There is no image"),
        (handle_file(write_bomb(tmp_path / "bomb.png")), question, choices, "The image has too many pixels"),
        (handle_file(image), "?" * 10_000_000, choices, "at most 20,000 are read"),
        (handle_file(image), question, choices * 2, "one per line; got 8"),
    ):
        said = client.predict(shown, text, "\n".join(options), api_name="/ask")
        assert message in said and 'role="alert"' in said and "\n" not in said
    assert best in client.predict(handle_file(image), question, "\n".join(choices), api_name="/ask")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_in_a_browser_one_uploads_asks_and_reads_the_bars(address, asked):
    sync_api = pytest.importorskip("playwright.sync_api")
    _, predict, (image, question, choices) = asked
    probs = predict(image, question, choices)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        for width in (1280, 400):
            page, requested = browser.new_page(viewport={"width": width, "height": 900}), []
            page.on("request", lambda request, requested=requested: requested.append(request.url))
            page.goto(address)
            page.get_by_role("button", name="Ask").click()
            assert page.get_by_role("alert").inner_text() == "There is no image. Drop one, or choose a file."
            page.locator("input[type=file]").first.set_input_files(image)
            page.get_by_role("button", name="Remove Image").wait_for()
            page.get_by_label("Question").fill(question)
            page.get_by_label("Options").fill("\n".join(choices))
            page.get_by_role("button", name="Ask").press("Enter")
            page.locator(".answer table").wait_for()
            shown = [float(text.partition("%")[0]) for text in page.locator(".answer .number").all_inner_texts()]
            np.testing.assert_allclose(shown, 100 * probs, atol=0.06)
            drawn = page.locator(".answer .track").evaluate_all(
                "all => all.map((one) => one.firstChild.offsetWidth / one.offsetWidth)"
            )
            np.testing.assert_allclose(drawn, probs, atol=0.02)
            page.get_by_role("button", name="The least certain").press("Enter")
            page.wait_for_function(
                "old => document.querySelectorAll('textarea')[1].value != old", arg="\n".join(choices)
            )
            assert page.evaluate("document.documentElement.scrollWidth") == width
            assert all(url.startswith((address, "blob:", "data:")) for url in requested)
            page.close()
        browser.close()


# --- beside the model on the Hub --------------------------------------------------------------------------------------


def test_a_space_holds_the_page_and_no_row(asked, three, tmp_path, monkeypatch):
    from vqa_sft.runs import space

    folder, _, (_, question, _) = asked
    write_space(folder, tmp_path, "user/model")
    assert {"app.py", "requirements.txt", "README.md", "vqa_sft"} == {path.name for path in tmp_path.iterdir()}
    texts = "".join((tmp_path / name).read_text() for name in ("app.py", "requirements.txt", "README.md"))
    assert question not in texts and "Threshold(0.9, float(" in texts and "models:\n- user/model" in texts
    assert re.search(r"^torch>=", texts, re.MULTILINE) and "pytest" not in texts and f"gradio=={space.GRADIO}" in texts
    with pytest.raises(InputError, match="folder of this machine .* which a Space cannot load. Merge the run"):
        check_base(folder)

    class Hub:
        def create_repo(self, name, **_):
            return types.SimpleNamespace(repo_id=name)

        def upload_folder(self, repo_id, repo_type, folder_path):
            assert (repo_id, repo_type) == ("user/page", "space")
            assert "MODEL = 'user/model'" in Path(folder_path, "app.py").read_text()
            raise OSError("no network")

    monkeypatch.setattr(space, "HfApi", Hub)
    with pytest.raises(InputError, match="user/model is pushed, but not the Space user/page: no network"):
        space.push_space(folder, "https://huggingface.co/user/model", "user/page")


def test_the_app_of_a_space_answers_from_its_folder(asked, tmp_path):
    client = pytest.importorskip("gradio_client")
    folder, predict, (image, question, choices) = asked
    write_space(folder, tmp_path, str(folder))
    port = free_port()
    environment = os.environ | {"GRADIO_SERVER_PORT": str(port), "GRADIO_SERVER_NAME": "127.0.0.1", "PYTHONPATH": ""}
    app = subprocess.Popen([sys.executable, "app.py"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        said = ""
        while "Open http" not in said:
            line = app.stdout.readline()
            assert line, said
            said += line
        page = client.Client(f"http://127.0.0.1:{port}", verbose=False)
        found = page.predict(client.handle_file(image), question, "\n".join(choices), api_name="/ask")
        assert f"{100 * predict(image, question, choices).max():.1f}%" in found
    finally:
        app.terminate()
        app.wait(30)
    assert app.returncode == 143
