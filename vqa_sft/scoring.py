"""Letter ids and letter logits, used by the trainer and by predict; the only module that undoes an order."""

import itertools

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, send_to_device
from jinja2 import TemplateError
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import ProcessorMixin

from vqa_sft.cache import encoder_outputs
from vqa_sft.collator import TARGET_KEYS, AnswerCollator, answer_prefix, answer_suffix, control_tokens, render_prompt
from vqa_sft.errors import InputError, explains
from vqa_sft.mcq import LETTERS, view_orders
from vqa_sft.model import DTYPES
from vqa_sft.packing import supervised_positions
from vqa_sft.prompts import Prompts


def find_letter_ids(processor: ProcessorMixin, num_letters: int, prompts: Prompts = Prompts()) -> torch.Tensor:
    """Token ids (L,) of the letters as they stand right after the prompt.

    Raises InputError when a letter is not one token there, or the chat template refuses the prompt.
    """
    tokenizer = processor.tokenizer
    prompt = _sample_prompt(processor, prompts)
    spaces = answer_prefix(processor)[1]
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = []
    for letter in LETTERS[:num_letters]:
        answer_ids = tokenizer(prompt + spaces + letter, add_special_tokens=False)["input_ids"]
        if answer_ids[:-1] != prompt_ids or answer_ids[-1] in ids:
            raise InputError(
                f"the letter {letter!r} is not one token after this model's prompt; its tokens there: "
                f"{tokenizer.convert_ids_to_tokens(answer_ids[-3:])}. Rows need at most {max(len(ids), 1)} choices, or "
                "another model."
            )
        ids.append(answer_ids[-1])
    return torch.tensor(ids)


def _sample_prompt(processor: ProcessorMixin, prompts: Prompts) -> str:
    row = {"question": "?", "choices": ["x", "y"], "images": [None]}
    with explains(TemplateError, "the chat template of this model refuses the prompt; try an empty system_prompt"):
        return render_prompt(processor, row, (0, 1), prompts)


def find_end_of_turn(processor: ProcessorMixin, prompts: Prompts = Prompts()) -> int:
    """Id of the token that the chat template puts right after the answer. Raises InputError where it puts none."""
    answered = _sample_prompt(processor, prompts) + answer_prefix(processor)[1] + LETTERS[0]
    texts = [answered, answered + answer_suffix(processor)]
    answered_ids, ended_ids = processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
    after = processor.tokenizer.convert_ids_to_tokens(ended_ids[len(answered_ids) :])
    if ended_ids[: len(answered_ids)] != answered_ids or not after or not control_tokens(processor).fullmatch(after[0]):
        raise InputError(
            "the chat template of this model does not end a turn by a control token: after an answer it puts "
            f"{answer_suffix(processor)[:20]!r}. Remove supervise_end_of_turn."
        )
    return ended_ids[len(answered_ids)]


def supervised_logits(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits (B, 1, V), float32, at the last prompt position; (B, 2, V) where rows carry their letter, with those at
    the letter. Only these positions go through `lm_head`."""
    inputs = {key: value for key, value in batch.items() if key not in TARGET_KEYS}
    if "image_features" in inputs:  # from the cache, in place of pixels
        inputs["mm_encoder_outputs"] = {"image": encoder_outputs(inputs.pop("image_features"))}
    positions = supervised_positions(batch)  # (B, 1 or 2)
    if "cu_seq_lens_q" in batch:  # packed rows: the answers stand in one row
        keep = 0 if "keep_positions" in batch else positions.flatten()[None]
        logits = model(**inputs, logits_to_keep=keep, use_cache=False).logits
        return logits.view(*positions.shape, -1).float()
    logits = model(**inputs, logits_to_keep=positions, use_cache=False).logits
    if logits.ndim != 3 or logits.shape[:2] != positions.shape:
        # A family whose `logits_to_keep` does not take positions per row: all logits, then ours. Some give all of
        # them whatever was asked for.
        if logits.ndim != 3 or logits.shape[:2] != inputs["input_ids"].shape:
            logits = model(**inputs, use_cache=False).logits
        logits = logits.gather(1, positions[..., None].expand(-1, -1, logits.shape[-1]))
    return logits.float()


def answer_logits(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits (B, V), float32, at the last prompt position."""
    return supervised_logits(model, batch)[:, 0]


def letter_logits(model: torch.nn.Module, batch: dict[str, torch.Tensor], letter_ids: torch.Tensor) -> torch.Tensor:
    """Logits (B, L) of the letters at the last prompt position; letters that a row does not use are not masked."""
    return answer_logits(model, batch)[:, letter_ids]


def to_choice_logits(letter_logits: torch.Tensor, orders: torch.Tensor, num_choices: torch.Tensor) -> list[list[float]]:
    """Log-probabilities of the choices of each row, in dataset order: letters beyond the row's own are dropped,
    the order is undone. `letter_logits` (B, L), `orders` (B, L), `num_choices` (B,) -> B lists of num_choices."""
    by_choice = torch.empty_like(letter_logits).scatter_(1, orders, letter_logits)
    return [row[:count].log_softmax(dim=0).tolist() for row, count in zip(by_choice, num_choices.tolist(), strict=True)]


def average_views(choice_logits: list[list[float]], groups: list[int], how: str = "mean") -> list[list[float]]:
    """Log-probabilities of the choices of each group (row), from those of its views: the logarithm of the mean
    probability, or with `how` "log" the mean logarithm, normalised (the geometric mean)."""
    averaged = []
    for _, views in itertools.groupby(zip(groups, choice_logits, strict=True), key=lambda view: view[0]):
        logits = torch.tensor([row for _, row in views])  # (views, C)
        mean = logits.mean(dim=0) if how == "log" else logits.logsumexp(dim=0)
        averaged.append(mean.log_softmax(dim=0).tolist() if len(logits) > 1 else logits[0].tolist())
    return averaged


@torch.no_grad()
def score_examples(
    model: torch.nn.Module,
    examples: datasets.Dataset,
    collator: AnswerCollator,
    letter_ids: torch.Tensor,
    batch_size: int,
    precision: str,
    num_workers: int,
    state: PartialState,
    average: str = "mean",
) -> list[list[float]]:
    """Choice logits of all examples, in their order, on every process: those of the collator's views, averaged.

    `batch_size` counts views. Batches are cut before they are dealt out to processes, so any number of processes scores
    the same batches.
    """
    most = max(examples["choices"], key=len, default=[])
    num_rows = max(1, batch_size // len(view_orders(len(most), collator.views)))
    starts = range(0, len(examples), num_rows)
    batches = [list(range(start, min(start + num_rows, len(examples)))) for start in starts]
    own = range(state.process_index, len(batches), state.num_processes)
    on_gpu = state.device.type == "cuda"
    loader = DataLoader(
        examples,
        batch_sampler=[batches[i] for i in own],
        collate_fn=collator,
        num_workers=num_workers,
        pin_memory=on_gpu,
    )
    letter_ids = letter_ids.to(state.device)
    autocast = torch.autocast(state.device.type, DTYPES[precision], enabled=precision != "fp32")
    scored, waiting = {}, []

    def read(limit: int) -> None:
        """Read what the GPU has done, but for the last batches: it computes them while the next is made ready."""
        while len(waiting) > limit:
            i, groups, *values = waiting.pop(0)
            choice_logits = to_choice_logits(*(value.cpu() for value in values))
            scored[i] = average_views(choice_logits, groups.tolist(), average)

    for i, batch in zip(own, tqdm(loader, desc="Scoring", disable=not state.is_main_process), strict=True):
        groups = batch.get("groups", torch.arange(len(batch["answers"])))
        batch = send_to_device(batch, state.device, non_blocking=on_gpu)
        with autocast:
            logits = letter_logits(model, batch, letter_ids)
        waiting.append((i, groups, logits, batch["orders"], batch["num_choices"]))
        read(limit=2)
    read(limit=0)
    for other in gather_object([scored]):
        scored |= other
    return [row for i in range(len(batches)) for row in scored[i]]
