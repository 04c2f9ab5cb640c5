"""The ways out of a run: what somebody else's code makes of an exported folder, one question at a time.

Each is a context that gives a function: a row, as data/ reads it -> probabilities of its choices, in their order.
"""

import base64
import importlib.util
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor, DecisionConfig, pipeline
from transformers.decision import label_token_ids

from vqa_sft.batch.prompts import render_prompt
from vqa_sft.errors import InputError
from vqa_sft.images import open_image
from vqa_sft.inference.predictor import Predictor
from vqa_sft.lab.answers import ask_server
from vqa_sft.models.load import DTYPES
from vqa_sft.questions.letters import identity_order
from vqa_sft.runs.folder import Run

Ask = Callable[[dict], list[float]]
START_S = 300  # a server may take that long to load its weights


@dataclass(frozen=True)
class Exported:
    """A run, and what `vqa-sft export` made of it in one dtype."""

    run: Run
    merged: Path
    adapter: Path
    dtype: str


def request_of(row: dict, run: Run) -> dict[str, Any]:
    """A row as a System One request. Choices are named by their numbers: two of them may say the same."""
    assets = {f"image-{n}": _asset(image) for n, image in enumerate(row["images"], start=1)}
    state: dict[str, Any] = {"images": [*assets]}
    if run.has_context:
        state["context"] = row["context"]
    criteria = {str(number): text for number, text in enumerate(row["choices"])}
    question = {"type": "choice", "instructions": row["question"], "criteria": criteria}
    return {"state": state, "questions": {"question": question}, "assets": assets}


def _asset(image: dict) -> dict[str, str]:
    return {"type": "image", "data_base64": base64.b64encode(_bytes(image)).decode()}


def _bytes(image: dict) -> bytes:
    return Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]


def probs_of(answers: dict[str, Any]) -> list[float]:
    return [*answers["question"]["probabilities"].values()]


@contextmanager
def predictor(exported: Exported) -> Iterator[Ask]:
    predict = Predictor(str(exported.run.folder), use_cpu=not torch.cuda.is_available())
    yield lambda row: probs_of(predict.decide(request_of(row, exported.run)))


@contextmanager
def decision_pipeline(exported: Exported, *, merged: bool = True) -> Iterator[Ask]:
    decide = pipeline("decision", model=str(exported.merged if merged else exported.adapter))
    yield lambda row: probs_of(decide(request_of(row, exported.run)))


@contextmanager
def adapter_pipeline(exported: Exported) -> Iterator[Ask]:
    with decision_pipeline(exported, merged=False) as ask:
        yield ask


@contextmanager
def plain_transformers(exported: Exported) -> Iterator[Ask]:
    model = AutoModelForImageTextToText.from_pretrained(exported.merged)
    yield _plain(model, AutoProcessor.from_pretrained(exported.merged), exported)


@contextmanager
def plain_peft(exported: Exported) -> Iterator[Ask]:
    """The base as it was published, and the adapter of the run's own folder."""
    run = exported.run
    base = AutoModelForImageTextToText.from_pretrained(run.base_model, dtype=DTYPES[exported.dtype])
    yield _plain(PeftModel.from_pretrained(base, run.folder), AutoProcessor.from_pretrained(run.folder), exported)


def _plain(model: torch.nn.Module, processor: Any, exported: Exported) -> Ask:
    config = DecisionConfig.from_pretrained(exported.merged)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device).eval()
    ids = label_token_ids(processor.tokenizer, tuple(config.labels["choice"]))

    @torch.no_grad()
    def ask(row: dict) -> list[float]:
        text = render_prompt(processor, row, identity_order(len(row["choices"])), exported.run.prompts)
        images = [open_image(image) for image in row["images"]] or None
        bos = processor.tokenizer.bos_token
        adds = not (bos and text.startswith(bos))
        inputs = processor(text=[text], images=images, return_tensors="pt", add_special_tokens=adds).to(device)
        logits = model(**inputs).logits[0, -1, ids[: len(row["choices"])]].float()
        return (logits / config.temperature["choice"]).softmax(dim=0).tolist()

    return ask


@contextmanager
def transformers_serve(exported: Exported) -> Iterator[Ask]:
    with served(exported.merged) as (url, _):
        yield lambda row: probs_of(ask_server(f"{url}/v1/systemone", request_of(row, exported.run))["answers"])


@contextmanager
def served(folder: str | Path) -> Iterator[tuple[str, int]]:
    """The address of `transformers serve FOLDER`, on loopback, and its process id, while this lasts. Raises
    InputError."""
    if missing := [name for name in ("fastapi", "uvicorn", "openai") if importlib.util.find_spec(name) is None]:
        raise InputError(f"transformers serve needs {', '.join(missing)}: pip install 'transformers[serving]'.")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    start = "import sys; sys.argv[0] = 'transformers'; from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", start, "serve", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait_for(server, url, log)
            yield url, server.pid
        finally:
            server.terminate()
            server.wait()


def _wait_for(server: subprocess.Popen, url: str, log: Any) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until and server.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/health").read()
        except OSError:
            time.sleep(0.2)
        else:
            return
    log.seek(0)
    last = log.read().decode(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
    raise InputError(f"transformers serve did not start: {last[0]}")
