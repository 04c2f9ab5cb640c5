"""`vqa-sft try`: a page on which one asks a run about an image. Needs the package gradio.

drop an image, type a question and options  ->  calibrated bars, the conformal set, the spread over permutations

`serve` is also all that app.py of a Space calls (runs/space.py).
"""

import os
import signal
import socket
import sys
import tempfile
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vqa_sft.config.packaged import find_base
from vqa_sft.data.problems import KINDS
from vqa_sft.errors import InputError, explains, printable, safe
from vqa_sft.images import examine, open_image, source_of
from vqa_sft.predictions.uncertainty import Threshold, conformal_set, measure_uncertainty, threshold_of_run
from vqa_sft.questions.letters import LETTERS, choices_to_letters, view_orders
from vqa_sft.questions.references import count_free

if TYPE_CHECKING:  # it loads torch
    from vqa_sft.inference.predictor import Predictor

INSTALL = 'pip install "gradio>=6.31"'
MOST_CHARACTERS = 20_000  # of a question with its options, as `vqa-sft check` warns of
LOOPBACK = ("127.0.0.1", "localhost")
MAX_UPLOAD = "64mb"

# The bar is the probability, the line under it the range over permutations; both are given as numbers too.
CSS = """
.answer table { width: 100%; table-layout: fixed; border-collapse: collapse; }
.answer caption { text-align: left; padding-bottom: 8px; }
.answer :is(th, td) { text-align: left; padding: 8px; vertical-align: top; }
.answer tr { border-bottom: 1px solid var(--border-color-primary); }
.answer tbody th { font-weight: normal; overflow-wrap: anywhere; }
.answer thead th:first-child { width: 42%; }
.answer .number { font-variant-numeric: tabular-nums; }
.answer p { padding: 8px 0; }
.answer .track { margin-top: 4px; background: var(--border-color-primary); }
.answer .track div { height: 10px; background: #2563eb; }
.answer .range { height: 3px; min-width: 2px; background: currentColor; }
.answer .error { border-left: 4px solid #dc2626; padding-left: 8px; overflow-wrap: anywhere; }
footer { display: none !important; }
"""


def serve(
    run: str | Path,
    *,
    host: str = LOOPBACK[0],
    port: int = 7860,
    coverage: float = 0.9,
    threshold: Threshold | None = None,
    model: str | None = None,
    use_cpu: bool = False,
    title: str | None = None,
) -> None:
    """Serve the page until Ctrl-C. The conformal set has `threshold`, by default that of the run's validation rows for
    this `coverage`. Raises InputError, before a model is loaded, for a missing gradio and a port in use."""
    if not 0 < coverage < 1:
        raise InputError(f"--coverage must be between 0 and 1; got {coverage}.")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    check_gradio()
    check_port(host, port)
    threshold = threshold or threshold_of_run(run, coverage)
    with tempfile.TemporaryDirectory(prefix="vqa_sft_try_") as folder:
        # What visitors upload is gone at the end, that of a service too.
        os.environ["GRADIO_TEMP_DIR"] = folder
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        from vqa_sft import Predictor

        predict = Predictor(run, use_cpu=use_cpu, model=model and find_base(model))
        try:
            examples = find_examples(run, Path(folder), predict.has_context)
        except InputError as error:
            examples = {}
            print(safe(f"No examples on the page: {error}"))
        page = build_page(predict, threshold, examples, title or f"vqa-sft: {Path(run).name}")
        launch(page, host, port)
        print(f"Open http://{host}:{port} (Ctrl-C ends it).", flush=True)
        if host not in LOOPBACK:
            print("Whoever reaches this machine can use the page: it has no password.", flush=True)
        page.block_thread()


def check_gradio() -> None:
    """Raises InputError where it is not installed."""
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise InputError(f"the page needs gradio, which cannot be imported ({error}). Install it: {INSTALL}") from error


def check_port(host: str, port: int) -> None:
    """Raises InputError where nothing can listen there."""
    if not 1 <= port <= 65535:
        raise InputError(f"--port must be from 1 to 65535; got {port}.")
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (")[0].lower()
        raise InputError(f"cannot listen on {host}, port {port} ({reason}). Give another --port or --host.") from error


def launch(page: Any, host: str, port: int) -> None:
    """Start to serve in a thread: no share link, no history, no service worker."""
    import gradio as gr

    never = ("share", "show_error", "enable_monitoring", "run_history", "ssr_mode", "pwa", "mcp_server")
    # The fonts of the machine: no files to load, and bold ones that match.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    how = {"theme": theme, "css": CSS, "footer_links": [], "max_file_size": MAX_UPLOAD} | dict.fromkeys(never, False)
    with explains(OSError, f"cannot listen on {host}, port {port}"):
        page.launch(server_name=host, server_port=port, quiet=True, prevent_thread_lock=True, **how)


def build_page(predict: "Predictor", threshold: Threshold | None, examples: dict[str, list[str]], title: str) -> Any:
    """gradio.Blocks; `examples` as `find_examples` gives them."""
    import gradio as gr

    def ask(image: str | None, question: str, options: str, context: str = "") -> str:
        try:
            return answer(predict, threshold, image, question, options, context)
        except InputError as error:
            line = " ".join(safe(str(error)).split())
            line = escape(line[:1].upper() + line[1:])
            return f'<div class="answer"><p class="error" role="alert">{line}</p></div>'

    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(f"# {escape(title)}")
        with gr.Row():
            with gr.Column(min_width=300):
                # As in training the file is opened by images.py, which knows what cannot be used.
                image = gr.Image(label="Image", type="filepath", sources=["upload", "clipboard"], height=260)
                image.preprocess = lambda data: data and data.path
                question = gr.Textbox(label="Question", lines=2, max_lines=6, submit_btn=False)
                most = predict.num_choices
                options = gr.Textbox(label=f"Options (2 to {most}, one per line)", lines=min(4, most), max_lines=12)
                context = gr.Textbox(label="Context", lines=2, visible=predict.has_context)
                button = gr.Button("Ask", variant="primary")
            with gr.Column(min_width=300):
                said = f'<div class="answer"><p>{escape(describe_run(predict, threshold))}</p></div>'
                result = gr.HTML(said, apply_default_css=False)
        asked = [image, question, options, *([context] if predict.has_context else [])]
        if examples:
            # With labels they are buttons, which a keyboard reaches; a table of them has rows to click on.
            gr.Examples([*examples.values()], asked, label="Validation rows", example_labels=[*examples])
        button.click(ask, asked, result, api_name="ask", concurrency_limit=1)
    return page.queue(max_size=32)


def answer(
    predict: "Predictor", threshold: Threshold | None, image: str | None, question: str, options: str, context: str
) -> str:
    """What the page shows of a question, as HTML. Raises InputError for what cannot be asked."""
    given = "".join([question or "", options or "", context or ""])
    if len(given) > MOST_CHARACTERS:
        raise InputError(
            f"question and options have {len(given):,} characters; at most {MOST_CHARACTERS:,} are read. Shorten them."
        )
    if not image:
        raise InputError("there is no image. Drop one, or choose a file.")
    if problem := examine(source_of(image), miniature=False).problem:
        raise InputError(f"{KINDS[problem].what}. {KINDS[problem].fix}")
    choices = [line.strip() for line in (options or "").splitlines() if line.strip()]
    if not 2 <= len(choices) <= predict.num_choices:
        raise InputError(
            f"a question needs 2 to {predict.num_choices} options, as in training, one per line; got {len(choices)}."
        )
    probs = score_rotations(predict, image, question or "", choices, context if predict.has_context else None)
    return describe_answer(choices, probs, threshold, describe_run(predict, threshold))


def score_rotations(
    predict: "Predictor", image: str, question: str, choices: list[str], context: str | None
) -> np.ndarray:
    """Probabilities (V, C) of the choices, in the order given, under each permutation of `view_orders`' rotations; the
    first row is that of the choices as they stand."""
    orders = view_orders(len(choices), "rotations", num_free=count_free(question, choices))
    shown = [choices_to_letters(choices, order) for order in orders]
    num = len(orders)
    by_letter = predict([image] * num, [question] * num, shown, [context] * num)
    probs = np.empty((num, len(choices)))
    for row, order, of_letters in zip(probs, orders, by_letter, strict=True):
        row[list(order)] = of_letters
    return probs


def describe_answer(choices: list[str], probs: np.ndarray, threshold: Threshold | None, about: str) -> str:
    """A table of the options with their bars, as HTML; `probs` (V, C) as `score_rotations` gives them."""
    first, best = probs[0], int(probs[0].argmax())
    lows, highs = probs.min(axis=0), probs.max(axis=0)
    inside = conformal_set(first, threshold.value) if threshold else []
    rows = "".join(
        _row(LETTERS[i], choices[i], first[i], (lows[i], highs[i]), i in inside) for i in range(len(choices))
    )
    said = [f"Answer: <strong>{LETTERS[best]}. {escape(choices[best])}</strong>, {_percent(first[best])}."]
    if threshold:
        letters = ", ".join(LETTERS[i] for i in inside)
        said.append(f"Conformal set for {threshold.coverage:.0%}: <strong>{letters}</strong>.")
    num, agree = len(probs), int((probs.argmax(axis=1) == best).sum())
    moved = float((highs - lows).max())
    if num > 1:
        said.append(
            f"{agree} of {num} rotations of the options give this answer. Ranges are over "
            f"these permutations; a probability moves by up to {100 * moved:.1f} points."
        )
    else:
        said.append("These options refer to letters or places, and are not permuted.")
    head = "".join(f'<th scope="col">{name}</th>' for name in ("Option", "Probability (range)"))
    table = f"<table><caption>{' '.join(said)}</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<div class="answer" role="status">{table}<p>{escape(about)}</p></div>'


def _row(letter: str, choice: str, prob: float, spread: tuple[float, float], is_inside: bool) -> str:
    low, high = spread
    mark = " <strong>(in the set)</strong>" if is_inside else ""
    bar = f'<div style="width: {100 * prob:.1f}%"></div>'
    line = f'<div class="range" style="margin-left: {100 * low:.1f}%; width: {100 * (high - low):.1f}%"></div>'
    return (
        f'<tr><th scope="row">{letter}. {escape(choice)}{mark}</th>'
        f'<td><span class="number">{_percent(prob)} ({100 * low:.1f} to {_percent(high)})</span>'
        f'<div aria-hidden="true"><div class="track">{bar}</div>{line}</div></td></tr>'
    )


def _percent(prob: float) -> str:
    return f"{100 * prob:.1f}%"


def describe_run(predict: "Predictor", threshold: Threshold | None) -> str:
    """What the numbers of the page are, in words."""
    temperatures = [f"{about['calibration']['temperature']:.2f}" for about in predict.metadata]
    of = f"Probabilities at the run's temperature, {', '.join(temperatures)}."
    if all(temperature == "1.00" for temperature in temperatures):
        of = "The run has no temperature but 1: probabilities are as they are scored."
    if threshold is None:
        return f"{of} There is no conformal set: no validation rows of this one run are known."
    least = _percent(max(0.0, 1 - threshold.value))
    return (
        f"{of} The conformal set holds the answer in {threshold.coverage:.0%} of rows like the {threshold.num_rows:,} "
        f"validation rows of the run: options of at least {least}, else the best alone."
    )


def find_examples(run: str | Path, folder: Path, has_context: bool) -> dict[str, list[str]]:
    """Of the run's validation rows with one image the most certain, the median and the least certain one, by a label:
    path of the image, which is written into the folder, question, options and perhaps context. Empty where the run has
    no such rows. Raises InputError where they cannot be read."""
    from vqa_sft.config.prediction import PredictionArguments
    from vqa_sft.inference.rows import read_rows
    from vqa_sft.predictions.file import read_predictions
    from vqa_sft.runs.folder import VALIDATION, read_run

    if not (Path(run) / VALIDATION).is_file():
        return {}
    rows = read_rows(PredictionArguments(run=[str(run)], output="", part="validation"), [read_run(run)]).of_run[0]
    uncertainty = measure_uncertainty(read_predictions(Path(run) / VALIDATION))
    margin_of = dict(zip(uncertainty.ids, uncertainty.margin, strict=True))
    ids = zip(rows["id"], rows["images"], strict=True)
    margins = {i: margin_of[row_id] for i, (row_id, images) in enumerate(ids) if len(images) == 1}
    numbers = sorted(margins, key=lambda i: -margins[i])
    examples = {}
    for kind, place in (("most certain", 0), ("median", len(numbers) // 2), ("least certain", -1)):
        if len(numbers) < 3:
            break
        row, path = rows[numbers[place]], folder / f"{kind}.png"
        with explains((OSError, ValueError), "an image of a validation row cannot be read"):
            open_image(row["images"][0]).save(path)
        texts = [row["question"], "\n".join(row["choices"]), *([row["context"] or ""] if has_context else [])]
        examples[f"The {kind}; answer: {printable(row['choices'][row['answer']], 40)}"] = [str(path), *texts]
    return examples
