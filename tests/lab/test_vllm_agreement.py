"""Rows over chat completions, against a server that answers by the texts it is asked and knows nothing else of us."""

import base64
import io
import json
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from contest import rows_of, write_csv
from PIL import Image
from transformers import AutoProcessor

from vqa_sft.batch.prompts import Prompts
from vqa_sft.data.columns import Columns
from vqa_sft.errors import InputError
from vqa_sft.lab import vllm_agreement
from vqa_sft.lab.answers import difference
from vqa_sft.lab.vllm_agreement import ChatServer
from vqa_sft.predictions.file import Predictions, write_predictions
from vqa_sft.questions.letters import Views
from vqa_sft.runs.folder import PROCESSOR_FILES, RUN, read_run, write_json
from vqa_sft.tiny import TINY_PATH

LOGPROBS = {"red": -0.5, "green": -1.5, "blue": -2.5, "black": -3.5}
TEMPERATURE = 2.0


class Handler(BaseHTTPRequestHandler):
    """Gives each letter the log-probability of the colour beside it."""

    def do_GET(self):
        self.reply({"data": [{"id": name} for name in self.server.names]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        if self.server.refusal:
            self.reply({"error": self.server.refusal}, 400)
            return
        images, messages = [], body["messages"]
        for part in messages[-1]["content"]:
            if part["type"] == "image_url":
                data = part.pop("image_url")["url"].removeprefix("data:image/png;base64,")
                images.append(Image.open(io.BytesIO(base64.b64decode(data))))
                part["type"] = "image"
        self.server.images += images
        lines = messages[-1]["content"][-1]["text"].split("\n")[1:]
        entries = [{"token": line[0], "logprob": LOGPROBS[line[3:]]} for line in lines]
        reply = {"choices": [{"logprobs": {"content": [{"top_logprobs": entries}]}}]}
        if "logprob_token_ids" in body:
            for entry, token in zip(entries, body["logprob_token_ids"], strict=True):
                assert self.server.processor.tokenizer.decode([token]) == entry["token"]
                entry["token"] = f"token_id:{token}"
            text = self.server.processor.apply_chat_template(messages, add_generation_prompt=True)
            reply["prompt_token_ids"] = self.server.processor(text=[text], images=images)["input_ids"][0]
        self.reply(reply)

    def reply(self, content, status=200):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *_):
        pass


@contextmanager
def serving():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.names, server.asked, server.images, server.refusal = ["mine"], [], [], ""
    server.processor = AutoProcessor.from_pretrained(TINY_PATH)
    server.address = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def server():
    with serving() as server:
        yield server


@pytest.fixture
def run_folder(tmp_path):
    """A calibrated run of the tiny base, without weights."""
    folder = tmp_path / "run"
    folder.mkdir()
    for pattern in PROCESSOR_FILES:
        for path in TINY_PATH.glob(pattern):
            (folder / path.name).write_bytes(path.read_bytes())
    columns = Columns(id="id", image=["path"], question="question", choices=[*"abcd"], answer="answer")
    content = {"recipe": {"model_name_or_path": str(TINY_PATH)}, "prompts": vars(Prompts()), "num_letters": 4}
    write_json(folder / RUN, content | {"columns": vars(columns), "precision": "fp32"})
    write_json(folder / "calibration.json", {"orders identity": {"temperature": TEMPERATURE}})
    return folder


@pytest.fixture
def files(contest, run_folder, tmp_path):
    """What the command line takes, and what predict.py would have written of such a model."""
    rows = rows_of(contest)
    logits = [[LOGPROBS[row[letter]] for letter in "abcd"] for row in rows]
    logits = [(np.array(row) - np.log(np.exp(row).sum())).tolist() for row in logits]
    metadata = Views().metadata | {"calibration": {"temperature": TEMPERATURE}}
    predictions = Predictions([row["id"] for row in rows], logits, [None] * len(rows), metadata)
    write_predictions(tmp_path / "out.parquet", predictions)
    paths = {"run": run_folder, "data": contest / "test.csv", "predictions": tmp_path / "out.parquet"}
    return paths, predictions


@pytest.fixture
def ask(monkeypatch, capsys):
    """`ask(server, run=..., ...)`: exit code, what is printed, and what is said on stderr."""

    def ask(server, *flags, **options):
        tokens = [str(token) for name, value in options.items() for token in (f"--{name}", value)]
        monkeypatch.setattr(sys, "argv", ["vllm_agreement", server.address, *tokens, *flags])
        code = 0
        try:
            vllm_agreement.main()
        except SystemExit as end:
            code = end.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return ask


def test_a_server_of_the_same_model_agrees_on_probabilities_and_prompts(server, files, ask):
    paths, _ = files
    for flags, prompts in (((), "0 of 24"), (("--plain",), "not said")):
        code, out, err = ask(server, *flags, **paths)
        assert code == 0, err
        one, eight = (line.split("  ") for line in out.splitlines()[1:])
        for line in (one, eight):
            cells = [cell.strip() for cell in line if cell.strip()]
            assert float(cells[1]) < 1e-7 and float(cells[2]) < 1e-7
            assert cells[3:5] == ["0 of 24", prompts]
    assert {body["max_tokens"] for body in server.asked} == {1}
    assert "logprob_token_ids" not in server.asked[-1]  # --plain


def test_another_model_and_another_image_size_are_seen(server, files, ask):
    paths, predictions = files
    predictions.choice_logits[3] = [*np.log([0.1, 0.2, 0.3, 0.4])]
    write_predictions(paths["predictions"], predictions)
    server.processor.image_processor.size = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    _, out, _ = ask(server, **paths, clients=2)
    assert "1 of 24" in out and "24 of 24" in out


def test_images_are_sent_as_training_saw_them(server, run_folder, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (60, 90, 4), dtype=np.uint8)
    turned = Image.Exif()
    turned[274] = 6  # a quarter turn to the right
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=turned)
    row = {"id": "x", "images": [{"bytes": None, "path": str(tmp_path / "photo.png")}], "question": "Which?"}
    chat = ChatServer(server.address, read_run(run_folder))
    reply = chat.ask_row(row | {"choices": ["green", "red"], "context": "", "question_type": "general"})
    weights = np.exp(np.array([-1.5, -0.5]) / TEMPERATURE)
    np.testing.assert_allclose(reply.probs, weights / weights.sum())
    white = Image.new("RGBA", (90, 60), "white")
    white.alpha_composite(Image.fromarray(pixels))
    [sent] = server.images
    np.testing.assert_array_equal(np.asarray(sent), np.rot90(np.asarray(white.convert("RGB")), -1))


def test_what_cannot_be_asked_is_one_line(server, files, ask, contest):
    paths, predictions = files
    for change, words in [
        ({"names": ["base", "mine"]}, "serves base, mine. Name one: --model"),
        ({"refusal": "Per-request\nsettings are disabled"}, "answers 400: "),
        ({"address": "http://127.0.0.1:9/v1"}, "Is the server up?"),
    ]:
        before = {name: getattr(server, name) for name in change}
        vars(server).update(change)
        code, _, err = ask(server, **paths)
        vars(server).update(before)
        assert code == 2 and words in err and len(err.splitlines()) == 1, err
    assert ask(server, **paths, rows=0)[0] == 2
    write_csv(contest / "test.csv", [row | {"id": f"other_{row['id']}"} for row in rows_of(contest)])
    code, _, err = ask(server, **paths)
    assert code == 2 and "has no probabilities of rows other_row_000" in err
    predictions.metadata["orders"] = "rotations"
    write_predictions(paths["predictions"], predictions)
    assert "holds other views" in ask(server, **paths)[2]


def test_a_reply_without_a_letter_is_refused(server, run_folder, monkeypatch):
    chat = ChatServer(server.address, read_run(run_folder), is_plain=True)
    row = {"id": "x", "images": [], "question": "Which?", "choices": ["red", "blue"], "context": ""}
    for reply, words in [({}, "no log-probabilities"), ([{"token": "A", "logprob": -1}], "no log-probability of B")]:
        found = {"choices": [{"logprobs": {"content": [{"top_logprobs": reply}]}}]} if reply else {}
        monkeypatch.setattr(chat, "_ask", lambda path, body=None, found=found: {"data": [{"id": "m"}]} | found)
        chat.model = "m"
        with pytest.raises(InputError, match=words):
            chat.ask_row(row)


def test_the_difference_is_over_all_choices_of_all_rows():
    one, other = [np.array([0.9, 0.1]), np.array([0.5, 0.3, 0.2])], [np.array([0.4, 0.6]), np.array([0.5, 0.2, 0.3])]
    found = difference(one, other)
    assert found.largest == pytest.approx(0.5) and found.mean == pytest.approx(1.2 / 5) and found.num_answers == 1
    assert found.mean_largest == pytest.approx(0.3)
