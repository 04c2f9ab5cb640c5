"""What a server answers against what predict.py answers: the probabilities of a file's rows over chat completions.

    python recipes/predict.py --run runs/digits --data data/digits/test.csv --output runs/digits/submission.csv
    vqa-sft export runs/digits runs/digits_merged --dtype fp32
    vllm serve runs/digits_merged --served-model-name mine --host 127.0.0.1 --generation-config vllm --dtype float32
    python -m vqa_sft.lab.vllm_agreement http://127.0.0.1:8000/v1 --run runs/digits --data data/digits/test.csv \\
        --predictions runs/digits/submission.parquet --model mine

Prints a table: the largest and the mean difference of a probability, how many answers differ, how many prompts were
other tokens than ours (an image at another size is more or fewer of them), and questions a second. It needs no vLLM
and loads no weights: the server has an environment of its own, or is another one of the same protocol (`--plain`: none
of vLLM's fields is sent, and the letters have to be among the 20 most probable tokens).

Each request is one question in the order of the data: the run's messages, its images as PNG in data URLs, one token,
and the log-probabilities of the letters' tokens, whose softmax at the run's temperature are the probabilities.
"""

import argparse
import base64
import io
import json
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from vqa_sft.batch.prompts import render_messages
from vqa_sft.batch.template import answer_prefix
from vqa_sft.config.prediction import PredictionArguments
from vqa_sft.console import table
from vqa_sft.environment import set_library_defaults
from vqa_sft.errors import InputError, exits_with_message, name_rows, printable
from vqa_sft.images import open_image
from vqa_sft.inference.rows import read_rows
from vqa_sft.lab.answers import ask_server, difference
from vqa_sft.predictions.calibration import Calibration, read_calibration
from vqa_sft.predictions.file import Predictions, read_predictions
from vqa_sft.predictions.metrics import softmax
from vqa_sft.questions.letters import LETTERS, Views, identity_order
from vqa_sft.runs.folder import Run, read_run

if TYPE_CHECKING:
    from transformers import ProcessorMixin

MOST_PLAIN = 20  # log-probabilities of one token that the protocol knows
IDENTITY = Views().metadata


@dataclass(frozen=True)
class Reply:
    """What a server said of one row."""

    probs: np.ndarray  # (C,) of the choices, at the run's temperature
    prompt_ids: list[int] | None  # of the prompt as the server read it, images included; None where it does not say


@dataclass(eq=False)
class ChatServer:
    """An OpenAI-compatible server of a run's model, asked as the run was trained.

    `address` ends with /v1; `model` is what the server calls the model, needed where it has several, as a base with
    adapters. `is_plain` sends no field but those of the protocol. Raises InputError where the run's prompt cannot be
    sent in messages.
    """

    address: str
    run: Run
    model: str | None = None
    is_plain: bool = False
    processor: "ProcessorMixin" = field(init=False, repr=False)
    letter_ids: list[int] = field(init=False, repr=False)
    letters: dict[str, int] = field(init=False, repr=False)  # what replies call a token -> which letter it is
    calibration: Calibration = field(init=False, repr=False)

    def __post_init__(self) -> None:
        from vqa_sft.models.load import load_processor
        from vqa_sft.models.scoring import find_letter_ids

        run = self.run
        processor = load_processor(str(run.folder))
        before, _ = answer_prefix(processor, run.prompts.template_options)
        if before:
            raise InputError(
                f"the chat template of this model puts {before!r} between its generation prompt and an answer, which "
                "chat completions do not send. Serve it with a template whose generation prompt ends with that text."
            )
        ids = find_letter_ids(processor, run.num_letters or len(LETTERS), run.prompts).tolist()
        names = [processor.tokenizer.decode([i]) if self.is_plain else f"token_id:{i}" for i in ids]
        self.processor, self.letter_ids = processor, ids
        self.letters = {name: i for i, name in enumerate(names)}
        self.calibration = read_calibration(str(run.folder), IDENTITY) or Calibration()

    @cached_property
    def name(self) -> str:
        """What the server calls the model. Raises InputError where it has several and none was named."""
        names = [self.model] if self.model else [str(model["id"]) for model in self._ask("models")["data"]]
        if len(names) != 1:
            raise InputError(f"{self.address} serves {', '.join(names) or 'no model'}. Name one: --model.")
        return names[0]

    def ask_rows(self, rows: Iterable[dict], num_clients: int = 1) -> Iterator[Reply]:
        """The replies, in the order of the rows, `num_clients` asking at the same time. Raises InputError."""
        self.name  # noqa: B018  once, before threads ask
        with ThreadPoolExecutor(num_clients) as pool:
            yield from pool.map(self.ask_row, rows)

    def ask_row(self, row: dict) -> Reply:
        """One request. Raises InputError where it fails, or the reply lacks a letter of the row."""
        ids = self.letter_ids[: len(row["choices"])]
        body: dict[str, Any] = {"model": self.name, "messages": chat_messages(row, self.run)}
        body |= {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": MOST_PLAIN}
        if not self.is_plain:
            body |= {"top_logprobs": len(ids), "logprob_token_ids": ids, "allowed_token_ids": ids}
            body |= {"return_tokens_as_token_ids": True, "return_token_ids": True}
            body |= {"chat_template_kwargs": self.run.prompts.template_options}
        reply = self._ask("chat/completions", body)
        try:
            entries = reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            known = [entry for entry in entries if entry["token"] in self.letters]
            found = {self.letters[entry["token"]]: entry["logprob"] for entry in known}
        except (KeyError, IndexError, TypeError) as error:
            raise InputError(f"the server returns no log-probabilities: {printable(json.dumps(reply), 300)}") from error
        missing = [LETTERS[i] for i in range(len(ids)) if i not in found]
        if missing:
            hint = " Ask vLLM without --plain." if self.is_plain else ""
            raise InputError(f"the server gives no log-probability of {', '.join(missing)} for row {row['id']}.{hint}")
        logits = [found[i] for i in range(len(ids))]
        [probs] = softmax([logits], self.calibration.temperature, self.calibration.bias)
        return Reply(probs, reply.get("prompt_token_ids"))

    def prompt_ids(self, row: dict) -> list[int]:
        """The tokens of the row's prompt as predict.py reads them."""
        from vqa_sft.batch.collator import AnswerCollator

        batch = AnswerCollator(self.processor, self.run.prompts, len(self.letter_ids))([row])
        return batch["input_ids"][0].tolist()

    def _ask(self, path: str, body: dict | None = None) -> dict:
        return ask_server(f"{self.address.rstrip('/')}/{path}", body)


def chat_messages(row: dict, run: Run) -> list[dict]:
    """The run's messages for a row in the order of the data, images in them. They are sent as we open them, as PNG:
    turned as the camera meant it, transparent parts on white, 16 bits made 8, whatever the server would do."""
    messages = render_messages(row, identity_order(len(row["choices"])), run.prompts)
    images = iter(row["images"])
    for part in messages[-1]["content"]:
        if part["type"] == "image":
            buffer = io.BytesIO()
            open_image(next(images)).save(buffer, "PNG", compress_level=1)
            url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
            part.clear()
            part |= {"type": "image_url", "image_url": {"url": url}}
    return messages


@exits_with_message
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server", help="address of the server, with /v1")
    parser.add_argument("--run", required=True, help="folder of the run, merged or not: its prompts and its tokenizer")
    parser.add_argument("--data", required=True, help="rows to ask for")
    parser.add_argument("--predictions", required=True, help="prediction file of the same rows, by predict.py")
    parser.add_argument("--model", help="what the server calls the model; needed where it has several")
    parser.add_argument("--image_root", help="folder that image paths are relative to; default: that of the data")
    parser.add_argument("--rows", type=int, default=200, help="how many of the first rows")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8], help="that ask at the same time; a line each")
    parser.add_argument("--plain", action="store_true", help="send no field but those of the protocol")
    args = parser.parse_args()
    if args.rows < 1 or min(args.clients) < 1:
        raise InputError(f"--rows and --clients must be at least 1; got {args.rows} and {min(args.clients)}.")
    set_library_defaults()
    reference, run = read_predictions(args.predictions), read_run(args.run)
    server = ChatServer(args.server, run, args.model, args.plain)
    rows = read_first_rows(args, run)
    expected = match_rows(reference, rows, args)
    lines = [["clients", "largest", "mean", "answers that differ", "prompts that differ", "questions/s"]]
    for num_clients in args.clients:
        started = time.perf_counter()
        replies = [*server.ask_rows(rows, num_clients)]
        took_s = time.perf_counter() - started
        gaps = difference([reply.probs for reply in replies], expected)
        prompts = other_prompts(server, rows, replies)
        cells = [f"{num_clients}", f"{gaps.largest:.1e}", f"{gaps.mean:.1e}", f"{gaps.num_answers} of {len(rows)}"]
        lines.append([*cells, prompts, f"{len(rows) / took_s:.1f}"])
    print(table(lines))


def read_first_rows(args: argparse.Namespace, run: Run) -> list[dict]:
    """As predict.py reads them."""
    fields = {"run": args.run, "output": "-", "data": args.data, "limit": args.rows, "image_root": args.image_root}
    return [*read_rows(PredictionArguments(**fields), [run]).of_run[0]]


def match_rows(reference: Predictions, rows: list[dict], args: argparse.Namespace) -> list[np.ndarray]:
    """Probabilities of the rows in the prediction file. Raises InputError where it lacks one, or has other views."""
    views = {name: reference.metadata.get(name) for name in IDENTITY}
    if views != IDENTITY or reference.shown:
        raise InputError(
            f"{args.predictions} holds other views than a server is asked for: {views}{reference.shown}. Predict again "
            "without --orders, --scales and --images."
        )
    known = dict(zip(reference.ids, reference.probs, strict=True))
    missing = [row["id"] for row in rows if len(known.get(row["id"], ())) != len(row["choices"])]
    if missing:
        raise InputError(f"{args.predictions} has no probabilities of {name_rows(missing, len(rows))} of {args.data}.")
    return [known[row["id"]] for row in rows]


def other_prompts(server: ChatServer, rows: list[dict], replies: list[Reply]) -> str:
    """How many prompts the server read as other tokens than predict.py."""
    if any(reply.prompt_ids is None for reply in replies):
        return "not said"
    num = sum(server.prompt_ids(row) != reply.prompt_ids for row, reply in zip(rows, replies, strict=True))
    return f"{num} of {len(rows)}"


if __name__ == "__main__":
    main()
