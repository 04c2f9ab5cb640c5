"""Letter ids, letter logits and the loop that scores rows; the only module that undoes an order."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader
from transformers import ProcessorMixin

from vqa_sft.batch.collator import TARGET_KEYS, AnswerCollator, free_choices, supervised_positions
from vqa_sft.batch.count_tokens import relative_lengths
from vqa_sft.batch.prompts import Prompts, control_tokens, render_prompt
from vqa_sft.batch.template import answer_prefix, answer_suffix
from vqa_sft.console import progress
from vqa_sft.data.options import CANDIDATES
from vqa_sft.errors import InputError, explains
from vqa_sft.models.adapters import Adapters
from vqa_sft.models.fast.vision import encoder_outputs, run_tower, vision_inputs
from vqa_sft.models.load import DTYPES
from vqa_sft.questions.letters import LETTERS, view_orders

# A row whose image is shown as a white square.
_SAMPLE: dict[str, Any] = {"id": "sample", "question": "?", "context": "", "choices": ["x", "y"], "answer": None}
_SAMPLE["images"] = [None]


def find_letter_ids(processor: ProcessorMixin, num_letters: int, prompts: Prompts = Prompts()) -> torch.Tensor:
    """Token ids (L,) of the letters right after the prompt.

    Raises InputError when a letter is not one token there, or chat template or processor do not take the prompt.
    """
    tokenizer = processor.tokenizer
    prompt = _sample_prompt(processor, prompts)
    _check_batch(processor, prompts, prompt)
    spaces = answer_prefix(processor, prompts.template_options)[1]
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


def find_spellings(processor: ProcessorMixin, num_letters: int, prompts: Prompts = Prompts()) -> torch.Tensor:
    """Token ids (L, S) of all one-token spellings of the letters after the prompt: "A", "a", " A" and " a"; -1 where a
    letter has fewer. For a base model that nobody trained to one of them. Raises InputError as `find_letter_ids`."""
    letter_ids = find_letter_ids(processor, num_letters, prompts).tolist()
    tokenizer, prompt = processor.tokenizer, _sample_prompt(processor, prompts)
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    found: list[list[int]] = []
    for letter_id, letter in zip(letter_ids, LETTERS, strict=False):
        spelled = [space + case for space in ("", " ") for case in (letter, letter.lower())]
        tokens = [tokenizer(prompt + text, add_special_tokens=False)["input_ids"] for text in spelled]
        of_letter = [ids[-1] for ids in tokens if ids[:-1] == prompt_ids]
        found.append([*dict.fromkeys([letter_id, *of_letter])])
    # A token of two letters, as an unknown token is, counts for none.
    all_ids = [token for of_letter in found for token in of_letter]
    found = [[token for token in of_letter if all_ids.count(token) == 1] for of_letter in found]
    most = max(map(len, found))
    return torch.tensor([of_letter + [-1] * (most - len(of_letter)) for of_letter in found])


def _sample_prompt(processor: ProcessorMixin, prompts: Prompts) -> str:
    return render_prompt(processor, _SAMPLE, (0, 1), prompts)


def _check_batch(processor: ProcessorMixin, prompts: Prompts, prompt: str) -> None:
    """Raises InputError where the processor does not leave the end of the prompt as it is: the letter would come after
    something else. PaliGemma's adds a line end, and labels of its own."""
    with explains(Exception, "the processor of this model refuses a prompt with an image"):
        batch = AnswerCollator(processor, prompts, num_letters=2, blank={_SAMPLE["id"]: [0]})([_SAMPLE])
    own = processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    made = batch["input_ids"][0, : batch["answer_positions"][0] + 1].tolist()
    if made[-4:] != own[-4:] or "labels" in batch:
        texts = [processor.tokenizer.decode(ids[-8:]) for ids in (own, made)]
        raise InputError(
            f"{type(processor).__name__} does not leave prompts as they are: of {texts[0]!r} at the end it makes "
            f"{texts[1]!r}, so the place of the letter is not known. Use a model whose chat template writes the prompt."
        )


def find_end_of_turn(processor: ProcessorMixin, prompts: Prompts = Prompts()) -> int:
    """Id of the token that the chat template puts right after the answer. Raises InputError where it puts none."""
    options = prompts.template_options
    answered, suffix = _sample_prompt(processor, prompts), answer_suffix(processor, options)
    answered += answer_prefix(processor, options)[1] + LETTERS[0]
    texts = [answered, answered + suffix]
    answered_ids, ended_ids = processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
    after = processor.tokenizer.convert_ids_to_tokens(ended_ids[len(answered_ids) :])
    if ended_ids[: len(answered_ids)] != answered_ids or not after or not control_tokens(processor).fullmatch(after[0]):
        raise InputError(
            "the chat template of this model does not end a turn by a control token: after an answer it puts "
            f"{suffix[:20]!r}. Remove supervise_end_of_turn."
        )
    return ended_ids[len(answered_ids)]


def supervised_logits(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits (B, 1, V), float32, at the last prompt position; (B, 2, V) where rows carry their letter, with those at
    the letter. Only these positions go through `lm_head`."""
    inputs = {key: value for key, value in batch.items() if key not in TARGET_KEYS}
    if "image_features" in inputs:  # from the cache, in place of pixels
        inputs["mm_encoder_outputs"] = {"image": encoder_outputs(inputs.pop("image_features"))}
    positions = supervised_positions(batch)  # (B, 1 or 2)
    is_packed, is_kept = "cu_seq_lens_q" in batch, "keep_positions" in batch
    if is_packed or is_kept:  # packed rows: the answers are in one row
        keep = 0 if is_kept else positions.flatten()[None]
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
    """Logits (B, L) of the letters at the last prompt position; letters that a row does not use are not masked. Of
    spellings (L, S) the logarithm of the summed exponentials, so that their probabilities are summed."""
    logits = answer_logits(model, batch)
    if letter_ids.ndim == 1:
        return logits[:, letter_ids]
    spelled = logits[:, letter_ids.clamp(min=0)].masked_fill(letter_ids < 0, -torch.inf)
    return spelled.logsumexp(dim=-1)


def to_choice_logits(letter_logits: torch.Tensor, orders: torch.Tensor, num_choices: torch.Tensor) -> list[list[float]]:
    """Log-probabilities of the choices of each row, in dataset order: letters beyond the row's own are dropped,
    the order is undone. `letter_logits` (B, L), `orders` (B, L), `num_choices` (B,) -> B lists of num_choices."""
    by_choice = torch.empty_like(letter_logits).scatter_(1, orders, letter_logits)
    return [row[:count].log_softmax(dim=0).tolist() for row, count in zip(by_choice, num_choices.tolist(), strict=True)]


def average_views(views: Sequence[Sequence[float]], how: str = "mean") -> tuple[list[float], float]:
    """Log-probabilities of a row's choices from those of its views, and the share of the views whose likeliest choice
    is theirs: the logarithm of the mean probability, or with `how` "log" the mean logarithm, normalised (the geometric
    mean)."""
    logits = torch.tensor(views)  # (views, C)
    if len(logits) == 1:
        return logits[0].tolist(), 1.0
    mean = (logits.mean(dim=0) if how == "log" else logits.logsumexp(dim=0)).log_softmax(dim=0)
    return mean.tolist(), float((logits.argmax(dim=1) == mean.argmax()).float().mean())


@dataclass
class ScaleLogits:
    """Letter logits of some rows at one image scale: V views of them, by R runs, on the device."""

    rows: list[int]  # (V,) the row of each view, counted from 0
    letter_logits: list[torch.Tensor]  # R times (V, L)
    orders: torch.Tensor  # (V, L)
    num_choices: torch.Tensor  # (V,)


@dataclass
class Scored:
    """Some rows of the data, scored by R runs: their numbers there, of each row R lists of choice logits in dataset
    order, averaged over its views, R shares of the views that agree with them, and of several image scales R times S
    lists of choice logits, averaged over the views of each; of one none."""

    rows: list[int]
    choice_logits: list[list[list[float]]]
    agreement: list[list[float]]
    scale_logits: list[list[list[list[float]]]]


def plan_batches(
    examples: datasets.Dataset, views: str | int, batch_size: int, *, packs_rows: bool = True
) -> list[list[int]]:
    """Numbers of rows that are scored together, `batch_size` views of rows of the most views. Packed rows with one
    image are neighbours, for they share it; padded ones of like length are, the longest first."""
    num_rows = max(1, batch_size // _most_views(examples, views))
    if packs_rows:
        order = same_images_together(examples)
    else:
        lengths = relative_lengths(examples)
        order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    return [order[start : start + num_rows] for start in range(0, len(order), num_rows)]


def _most_views(examples: datasets.Dataset, views: str | int) -> int:
    """In how many orders a row is scored, at most."""
    if views == "identity":
        return 1
    names = ["question", "choices", *([CANDIDATES] if CANDIDATES in examples.column_names else [])]
    kinds = {(len(row["choices"]), free_choices(row)) for row in examples.select_columns(names)}
    counts = [len(view_orders(num_choices, views, num_free=num_free)) for num_choices, num_free in kinds]
    return max(counts, default=1)


def same_images_together(examples: datasets.Dataset) -> list[int]:
    """Numbers of the rows, those with the same image paths after the first of them, else in their order."""
    first: dict[tuple, int] = {}
    places = []
    for number, images in enumerate(examples["images"]):
        if any(image["bytes"] is not None for image in images):
            return [*range(len(examples))]  # to compare bytes means to read them all
        key = tuple(image["path"] for image in images)
        places.append(first.setdefault(key, number) if key else number)
    return sorted(range(len(places)), key=places.__getitem__)


@dataclass
class LetterModel:
    """A model whose letters are scored; of several runs the `adapters` take turns in it."""

    model: torch.nn.Module
    letter_ids: torch.Tensor  # (L,), or (L, S) of letters with several spellings; on the model's device
    precision: str
    adapters: Adapters | None = None

    def letter_logits(self, batch: dict[str, Any], runs: Sequence[int]) -> list[torch.Tensor]:
        """(B, L) by each of the runs with these numbers; images go through a tower that they share once."""
        has_grids = "cu_seq_lens_q" in batch and "image_cu_seqlens" in batch
        if has_grids and self.adapters is not None and len(runs) > 1 and self.adapters.share_tower:
            inputs = vision_inputs(batch)
            batch = {name: value for name, value in batch.items() if name not in inputs}
            batch["image_features"] = run_tower(self.adapters.base, inputs, self.precision)
            batch["image_grid_thw"] = inputs["image_grid_thw"]
        found = []
        device = batch["orders"].device
        for run in runs:
            if self.adapters is not None:
                self.adapters.use(run)
            with torch.autocast(device.type, DTYPES[self.precision], enabled=self.precision != "fp32"):
                found.append(letter_logits(self.model, batch, self.letter_ids))
        return found


@torch.no_grad()
def score_batches(
    scorer: LetterModel,
    examples: datasets.Dataset,
    batches: Sequence[Sequence[int]],
    collators: Sequence[AnswerCollator],
    *,
    average: str = "mean",
    num_workers: int = 0,
    runs: Sequence[int] = (0,),
) -> Iterator[Scored]:
    """What this process scores of the `batches` of row numbers, each as soon as the device has it. Each of the
    `collators` shows the images at one scale. Batches are cut before they are dealt to processes, so any number of
    processes scores the same ones."""
    state = PartialState()
    own = batches[state.process_index :: state.num_processes]
    loader = DataLoader(
        examples,
        batch_sampler=own,
        collate_fn=partial(_collate_all, collators),
        num_workers=num_workers,
        pin_memory=state.device.type == "cuda",
    )
    waiting: list[tuple[Sequence[int], list[ScaleLogits]]] = []
    bar = progress(total=sum(map(len, batches)), desc="Scoring", unit=" questions", in_logs=True)
    for rows, of_scales in zip(own, loader, strict=True):
        waiting.append((rows, score_scales(scorer, of_scales, runs)))
        # The last batches are computed while the next is made ready.
        if len(waiting) > 2:
            yield undo_orders(*waiting.pop(0), average)
        bar.update(min(len(rows) * state.num_processes, bar.total - bar.n))
    for left in waiting:
        yield undo_orders(*left, average)
    bar.close()


def _collate_all(collators: Sequence[AnswerCollator], rows: list[dict]) -> list[dict[str, Any]]:
    return [collator(rows) for collator in collators]


def score_scales(scorer: LetterModel, of_scales: Sequence[dict[str, Any]], runs: Sequence[int]) -> list[ScaleLogits]:
    """The letter logits of rows that were collated at several scales. Does not wait for the device."""
    device, scales = PartialState().device, []
    for batch in of_scales:
        rows = batch.get("groups", torch.arange(len(batch["answers"]))).tolist()
        batch = send_to_device(batch, device, non_blocking=device.type == "cuda")
        logits = scorer.letter_logits(batch, runs)
        scales.append(ScaleLogits(rows, logits, batch["orders"], batch["num_choices"]))
    return scales


def undo_orders(rows: Sequence[int], scales: Sequence[ScaleLogits], average: str) -> Scored:
    """Undo the orders, and average over the views of each row."""
    num_runs = len(scales[0].letter_logits)
    choice_logits, agreement, scale_logits = [[] for _ in rows], [[] for _ in rows], [[] for _ in rows]
    for run in range(num_runs):
        views: list[list[list[list[float]]]] = [[[] for _ in scales] for _ in rows]
        for number, scale in enumerate(scales):
            of_scale = (scale.letter_logits[run], scale.orders, scale.num_choices)
            of_views = to_choice_logits(*(tensor.cpu() for tensor in of_scale))
            for row, of_view in zip(scale.rows, of_views, strict=True):
                views[row][number].append(of_view)
        for row, of_scales in enumerate(views):
            mean, share = average_views([view for of_scale in of_scales for view in of_scale], average)
            choice_logits[row].append(mean)
            agreement[row].append(share)
            alone = [average_views(of_scale, average)[0] for of_scale in of_scales] if len(scales) > 1 else []
            scale_logits[row].append(alone)
    return Scored([*rows], choice_logits, agreement, scale_logits)
