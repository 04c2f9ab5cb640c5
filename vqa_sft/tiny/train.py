"""Trains a tiny base from nothing, on drawn pictures only.

    python -m vqa_sft.tiny train --output runs/tiny        # seven minutes on one H200 with 16 CPU cores
    python -m vqa_sft.tiny train --output runs/tiny_qwen3_5 --family qwen3_5 --seconds 300 --pictures 100000 \
        --kinds digit shape colour place

All pictures are drawn once by all CPU cores and stay on the device as bytes; every picture is there with one prompt per
task (tasks.py), so a step is a gather, a forward and a backward (forward.py). All have one shape.
"""

import copy
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from transformers import AutoProcessor, PreTrainedModel, ProcessorMixin

from vqa_sft.models.fast.graphs import CudaCapture
from vqa_sft.tiny.build import build_tokenizer
from vqa_sft.tiny.draw import KIND_NAMES, PICTURE_PX, draw_example, draw_examples, draw_kind
from vqa_sft.tiny.families import FAMILIES, build_model
from vqa_sft.tiny.forward import answer_logits
from vqa_sft.tiny.step import MAX_ANSWER_TOKENS, WARM_UP, answer_gradients, by_graph, use_short_chunks
from vqa_sft.tiny.tasks import TASKS, render_task

TRAIN_SEED, VALIDATION_SEED, TEST_SEED, WORDING_SEED, FONT_SEED = 1, 2, 3, 4, 5
MAX_TEXT_TOKENS = 95  # prompt and answer, without the picture's
CHUNK = 500  # examples that a process draws at a time
MAX_SHIFT_PX = 3
# Shares of the tasks from 60% of the schedule on; before, they move from the family's early ones to these.
LATE_SHARES = {"letter": 0.50, "variant": 0.32, "both": 0.05, "words": 0.08, "reading": 0.05}


@dataclass(frozen=True)
class Settings:
    """How a base is trained: the command's options."""

    family: str = "qwen2_5_vl"
    steps: int = 12_500
    seconds: float | None = None  # to train for, whatever `steps` is
    pictures: int = 480_000
    kinds: Sequence[str] = KIND_NAMES  # of questions
    batch_size: int = 512
    learning_rate: float | None = None  # the family's own
    workers: int | None = None  # that draw: all cores; 0 for this process
    seed: int = 0


@dataclass
class Pictures:
    """Drawn examples as arrays; the first axis is the example, P of TASKS the prompt."""

    pixels: torch.Tensor  # (N, 84, 84, 3) uint8
    kinds: torch.Tensor  # (N,) index into KIND_NAMES
    input_ids: torch.Tensor  # (N, P, T) int16, padded on the right to the longest
    image_starts: torch.Tensor  # (N, P) position of the first picture token
    answer_starts: torch.Tensor  # (N, P) position of the first answer token
    lengths: torch.Tensor  # (N, P)

    def to(self, device: torch.device) -> "Pictures":
        return Pictures(**{name: value.to(device) for name, value in vars(self).items()})


def train(output: Path, settings: Settings) -> None:
    """Draw, build, train, save to `output` as bfloat16 safetensors."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start_s = time.perf_counter()
    processor = FAMILIES[settings.family].build_processor(build_tokenizer(tokenizer_texts()))
    processor.save_pretrained(output)
    pictures, validation = (drawn.to(device) for drawn in draw_pictures(output, settings))
    print(f"{settings.pictures} pictures drawn in {time.perf_counter() - start_s:.0f} s", flush=True)

    model = build_model(settings.family, processor.tokenizer, settings.seed).to(device)
    if settings.family == "qwen3_5":
        use_short_chunks()
    print(f"{model.num_parameters():,} parameters", flush=True)
    run_steps(model, pictures, validation, settings, output)


def tokenizer_texts() -> list[str]:
    """What the tokenizer learns its merges from: prompts and answers of a few thousand drawn examples."""
    texts = ["system\n", "user\n", "assistant\n", "You are a helpful assistant."] * 500
    for example in draw_examples(3000, seed=TRAIN_SEED):
        rng = np.random.default_rng([TRAIN_SEED, len(texts)])
        for task in TASKS:
            messages, answer = render_task(task, example, rng)
            texts.extend(_text_of(message) for message in messages)
            texts.append(answer)
    return texts


def _text_of(message: dict) -> str:
    if isinstance(message["content"], str):
        return message["content"]
    return "".join(part.get("text", "") for part in message["content"])


# ---- pictures and prompts, drawn by all cores


def draw_pictures(processor_path: Path, settings: Settings) -> list[Pictures]:
    """Examples to train on and up to 2,000 held-out ones, drawn and tokenized by the workers."""
    sizes = {TRAIN_SEED: settings.pictures, VALIDATION_SEED: min(2000, settings.pictures)}
    jobs = {
        seed: [(settings, str(processor_path), seed, i, min(i + CHUNK, size)) for i in range(0, size, CHUNK)]
        for seed, size in sizes.items()
    }
    if settings.workers == 0:
        return [_join([_draw_chunk(job) for job in jobs[seed]]) for seed in sizes]
    # A fork of a process that has used CUDA or torch's threads may hang; workers that each import all of this are slow
    # to start. So they are forks of a fresh process that has imported it.
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with context.Pool(settings.workers) as pool:
        parts = {seed: pool.map_async(_draw_chunk, jobs[seed], chunksize=1) for seed in sizes}
        return [_join(part.get()) for part in parts.values()]


def _join(parts: list[tuple[np.ndarray, ...]]) -> Pictures:
    pictures = Pictures(*(torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*parts, strict=True)))
    longest = _round_up(int(pictures.lengths.max()))
    pictures.input_ids = pictures.input_ids[..., :longest].contiguous()
    return pictures


def _round_up(num_tokens: int) -> int:
    """Attention kernels want masks whose rows are a multiple of 8."""
    return -(-num_tokens // 8) * 8


def _draw_chunk(job: tuple[Settings, str, int, int, int]) -> tuple[np.ndarray, ...]:
    settings, processor_path, seed, start, stop = job
    processor, picture = _load_processor(processor_path), FAMILIES[settings.family].picture
    max_tokens = _round_up(MAX_TEXT_TOKENS + picture.count(processor.image_token))
    num = stop - start
    pixels = np.empty((num, PICTURE_PX, PICTURE_PX, 3), np.uint8)
    kinds = np.empty(num, np.int16)
    input_ids = np.full((num, len(TASKS), max_tokens), processor.tokenizer.pad_token_id, np.int16)
    spans = np.empty((3, num, len(TASKS)), np.int16)  # image start, answer start, length
    for i in range(num):
        kind = None if set(settings.kinds) == set(KIND_NAMES) else draw_kind(seed, start + i, settings.kinds)
        example = draw_example(seed, start + i, kind)
        pixels[i], kinds[i] = np.asarray(example["image"]), KIND_NAMES.index(example["question_type"])
        rng = np.random.default_rng([seed, start + i, 1])
        tokenized = tokenize_tasks(processor, picture, [render_task(task, example, rng) for task in TASKS])
        for j, (ids, *span) in enumerate(tokenized):
            input_ids[i, j, : len(ids)], spans[:, i, j] = ids, span
    return pixels, kinds, input_ids, *spans


@lru_cache(maxsize=1)
def _load_processor(path: str) -> ProcessorMixin:
    # One process per core is parallel enough.
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return AutoProcessor.from_pretrained(path)


def tokenize_tasks(
    processor: ProcessorMixin, picture: str, renderings: list[tuple[list[dict], str]]
) -> list[tuple[list[int], int, int, int]]:
    """Of each (messages, answer): ids of prompt, answer and end of turn; where picture and answer start; the length.

    `picture` is the text that the processor puts into the place of the picture."""
    prompts = processor.apply_chat_template([messages for messages, _ in renderings], add_generation_prompt=True)
    prompts = [prompt.replace(processor.image_token, picture) for prompt in prompts]
    # An answer is tokenized alone: what is scored later is a token right after the prompt.
    answers = [answer + "<|im_end|>" for _, answer in renderings]
    ids = processor.tokenizer(prompts + answers)["input_ids"]
    return [_join_answer(processor, *pair) for pair in zip(ids[: len(prompts)], ids[len(prompts) :], strict=True)]


def _join_answer(
    processor: ProcessorMixin, prompt_ids: list[int], answer_ids: list[int]
) -> tuple[list[int], int, int, int]:
    ids = prompt_ids + answer_ids
    num_text = len(ids) - ids.count(processor.image_token_id)
    if len(answer_ids) > MAX_ANSWER_TOKENS or num_text > MAX_TEXT_TOKENS:
        raise ValueError(
            f"an example must have at most {MAX_TEXT_TOKENS} tokens of text, {MAX_ANSWER_TOKENS} of them its answer; "
            f"got {num_text} and {len(answer_ids)}: {processor.tokenizer.decode(ids)!r}"
        )
    return ids, prompt_ids.index(processor.image_token_id), len(prompt_ids), len(ids)


# ---- training


def run_steps(
    model: PreTrainedModel, pictures: Pictures, validation: Pictures, settings: Settings, output: Path
) -> None:
    """AdamW, one cycle, bf16 on a GPU; every 500 steps prints the loss and the accuracy on validation pictures, and
    saves: whoever stops the training has those weights."""
    on_gpu = pictures.pixels.is_cuda
    gradients = partial(answer_gradients, model)
    groups = parameter_groups(model, settings)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.05, fused=on_gpu)
    rates = [group["lr"] for group in groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=settings.steps, pct_start=0.1)
    generator = torch.Generator(pictures.pixels.device).manual_seed(settings.seed)
    start_s, losses = time.perf_counter(), []
    for step, (position, rows, tasks) in enumerate(draw_batches(pictures, settings, generator)):
        while schedule.last_epoch < position:
            schedule.step()
        pixels, *prompts = gather(pictures, rows, tasks)
        batch = [shift(pixels, generator), *prompts]
        if on_gpu and step == WARM_UP:
            gradients = by_graph(gradients, batch, CudaCapture())
        loss = gradients(batch)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss)
        if (step + 1) % 500 == 0:
            report(model, validation, step + 1, losses, start_s)
            save(model, output)
            losses = []
    if losses:
        report(model, validation, step + 1, losses, start_s)
    save(model, output)


def report(
    model: PreTrainedModel, validation: Pictures, num_steps: int, losses: list[torch.Tensor], start_s: float
) -> None:
    """Print the mean of `losses`, and the accuracy by kind after `num_steps`."""
    found = quick_accuracy(model, validation)
    accuracies = " ".join(f"{kind} {value:.2f}" for kind, value in found.items())
    mean_loss, elapsed_s = torch.stack(losses).mean().item(), time.perf_counter() - start_s
    print(f"step {num_steps} {elapsed_s:.0f} s loss {mean_loss:.3f} | {accuracies}", flush=True)


def parameter_groups(model: PreTrainedModel, settings: Settings) -> list[dict]:
    """The patch embedding learns at a rate of its own."""
    family = FAMILIES[settings.family]
    rate = settings.learning_rate or family.learning_rate
    patches = [value for name, value in model.named_parameters() if "patch_embed" in name]
    others = [value for name, value in model.named_parameters() if "patch_embed" not in name]
    return [{"params": others, "lr": rate}, {"params": patches, "lr": family.patch_rate * rate}]


def schedule_positions(num_steps: int, seconds: float | None) -> Iterator[int]:
    """Where in a schedule of `num_steps` each step stands: at one after the other; or, for so many `seconds`, where the
    clock is, which starts after the first steps: one of them is captured."""
    if seconds is None:
        yield from range(num_steps)
        return
    begin_s = time.perf_counter()
    yield from [0] * (WARM_UP + 1)
    start_s = time.perf_counter()
    print(f"the first {WARM_UP + 1} steps took {start_s - begin_s:.0f} s; the schedule begins", flush=True)
    while (elapsed_s := time.perf_counter() - start_s) < seconds:
        yield int(elapsed_s / seconds * num_steps)


def draw_batches(
    pictures: Pictures, settings: Settings, generator: torch.Generator
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Place in the schedule, rows and tasks of each step: pictures in a new order every epoch, easy tasks first."""
    device = pictures.pixels.device
    early = torch.tensor([FAMILIES[settings.family].early_shares[task] for task in TASKS], device=device)
    late = torch.tensor([LATE_SHARES[task] for task in TASKS], device=device)
    pool = torch.empty(0, dtype=torch.long, device=device)
    for position in schedule_positions(settings.steps, settings.seconds):
        while len(pool) < settings.batch_size:
            pool = torch.cat([pool, torch.randperm(len(pictures.pixels), generator=generator, device=device)])
        rows, pool = pool[: settings.batch_size], pool[settings.batch_size :]
        shares = torch.lerp(early, late, min(1.0, position / (0.6 * settings.steps)))
        yield position, rows, torch.multinomial(shares, settings.batch_size, replacement=True, generator=generator)


def shift(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Every picture moved by a few pixels, its border repeated: pictures come back every few epochs."""
    device = pixels.device
    moves = torch.randint(-MAX_SHIFT_PX, MAX_SHIFT_PX + 1, (2, len(pixels), 1), generator=generator, device=device)
    rows, columns = (torch.arange(PICTURE_PX, device=device) + moves).clamp(0, PICTURE_PX - 1)  # (B, 84) each
    return pixels[torch.arange(len(pixels), device=device)[:, None, None], rows[:, :, None], columns[:, None, :]]


def gather(pictures: Pictures, rows: torch.Tensor, tasks: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Pixels, ids, image starts, answer starts and lengths of one batch, on the device."""
    return (
        pictures.pixels[rows],
        pictures.input_ids[rows, tasks].long(),
        pictures.image_starts[rows, tasks].long(),
        pictures.answer_starts[rows, tasks].long(),
        pictures.lengths[rows, tasks].long(),
    )


@torch.no_grad()
def quick_accuracy(model: PreTrainedModel, pictures: Pictures) -> dict[str, float]:
    """Accuracy per kind with the project's prompt, over the whole vocabulary: for the log only."""
    device = pictures.pixels.device
    right = []
    for rows in torch.arange(len(pictures.pixels), device=device).split(500):
        tasks = torch.full_like(rows, TASKS.index("letter"))
        pixels, input_ids, image_starts, answer_starts, _ = gather(pictures, rows, tasks)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = answer_logits(model, pixels, input_ids, image_starts, answer_starts, 1)
        right.append(logits[:, 0].argmax(-1) == input_ids.gather(1, answer_starts[:, None])[:, 0])
    right = torch.cat(right).float()
    kinds = {kind: right[pictures.kinds == i] for i, kind in enumerate(KIND_NAMES)}
    return {kind: values.mean().item() for kind, values in kinds.items() if len(values)} | {"all": right.mean().item()}


def save(model: PreTrainedModel, output: Path) -> None:
    """bfloat16 halves the file; the card's score is that of the rounded weights."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(output)
