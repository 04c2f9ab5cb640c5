"""rows -> batch: rendered prompts, pixels, and the letter that answers each row.

What a batch of two rows holds (T tokens of the longest prompt, L letters of the run):

    input_ids, attention_mask, pixel_values, ...    whatever the model's processor makes of the prompts
    ids                B texts  of the rows, to name them in messages
    answer_positions   (B,)     index of the last prompt token: the logits there belong to the letter
    answers            (B,)     index of the letter that answers the row, -1 where the answer is not known
    num_choices        (B,)     how many of the L letters the row uses
    groups             (B,)     which row of the batch it is, where rows are shown in several orders
    leaders            (B,)     for packed rows that are scored: the row with which it shares what both begin with, its
                                images included; itself where there is none
    orders             (B, L)   orders[b, i] = choice under letter i; beyond num_choices the identity
    targets            (B, L)   what each letter should have; in training, where the data have such a column
    end_positions      (B,)     index of the letter itself, where training rows carry it: the logits there belong to the
                                token that ends the turn

The prompt ends where the letter begins, so the letter needs no place in the input, and what is scored in training is
byte for byte what is scored in prediction: both render with `render_prompt`. A training row carries it all the same
where the end of the turn is supervised; what comes before looks at nothing that comes after.
"""

import functools
import hashlib
import random
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING

import datasets
import torch
from jinja2 import TemplateError
from PIL import Image, ImageOps
from transformers import ProcessorMixin
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from vqa_sft.batch.prompts import Prompts, render_messages
from vqa_sft.data.images import MAX_ASPECT, augment, digest_of, open_image
from vqa_sft.data.references import count_free
from vqa_sft.errors import InputError, name_rows
from vqa_sft.letters import LETTERS, choice_to_letter, draw_order, identity_order, view_orders

if TYPE_CHECKING:
    from vqa_sft.models.fast.feature_store import FeatureStore

_ANSWER = "Answer-of-a-row"  # stands in no template
BLANK_SIZE = (448, 448)  # pixels
BLANK_DIGEST = hashlib.sha256(f"blank {BLANK_SIZE}".encode()).hexdigest()
# Keys of a batch that are ours and not the model's.
TARGET_KEYS = ("answer_positions", "answers", "ids", "num_choices", "orders", "targets", "end_positions", "groups")


def render_prompt(processor: ProcessorMixin, row: dict, order: Sequence[int], prompts: Prompts) -> str:
    """The text that the model reads before the letter, generation prompt included."""
    messages = render_messages(row, order, prompts)
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return prompt + answer_prefix(processor)[0]


@functools.lru_cache
def answer_prefix(processor: ProcessorMixin) -> tuple[str, str]:
    """What the template puts between the generation prompt and the answer: (what belongs to the prompt, what belongs to
    the letter's token).

    Most put nothing: after "<|im_start|>assistant\\n" comes "A". After "Assistant:" comes " A", and " A" and "A" are
    different tokens. Templates of thinking models close an empty thought first ("\\n</think>\\n\\nA").

    Raises InputError where the template does not show the answer right after its own generation prompt.
    """
    prompt, whole = _show_answer(processor)
    start, found, _ = whole.rpartition(_ANSWER)
    if not found or not start.startswith(prompt):
        raise InputError(
            "the chat template of this model does not put the answer after its generation prompt, so the place of the "
            f"letter is not known. It ends a prompt with {prompt[-40:]!r} and a shown answer with {whole[-60:]!r}."
        )
    between = start[len(prompt) :]
    spaces = between[len(between.rstrip(" ")) :]  # a space before the letter is part of its token
    return between[: len(between) - len(spaces)], spaces


def answer_suffix(processor: ProcessorMixin) -> str:
    """What the template puts after the answer: "<|im_end|>\\n" for one, nothing for others."""
    return _show_answer(processor)[1].rpartition(_ANSWER)[2]


def _show_answer(processor: ProcessorMixin) -> tuple[str, str]:
    """A prompt, and what the template makes of it once it is answered."""
    question = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": _ANSWER}]}
    try:
        prompt = processor.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
        return prompt, processor.apply_chat_template([*question, answer], tokenize=False)
    except TemplateError as error:
        raise InputError(f"the chat template of this model refuses a question and its answer: {error}") from error


@functools.lru_cache
def control_tokens(processor: ProcessorMixin) -> re.Pattern:
    """Matches every control token of the model."""
    tokens = {token.content for token in processor.tokenizer.added_tokens_decoder.values() if token.special}
    return re.compile("|".join(re.escape(token) for token in sorted(tokens) if token.strip()) or r"(?!)")


def _texts_of(row: dict) -> str:
    return "\n".join([row["context"], row["question"], *row["choices"]])


def check_texts(processor: ProcessorMixin, examples: datasets.Dataset, prompts: Prompts) -> None:
    """Raises InputError for texts that hold a control token of this model ("<|image_pad|>", "<image>", "<|im_end|>"):
    the tokenizer would take it for the real one, and the row would be another prompt or none."""
    control = control_tokens(processor)
    own = control.search(prompts.all_texts)
    if own:
        raise InputError(f"the prompt holds {own.group()!r}, a control token of this model. Take it out.")
    found = [
        row["id"]
        for row in examples.select_columns(["id", "question", "context", "choices"])
        if control.search(_texts_of(row))
    ]
    if found:
        raise InputError(
            f"the question or a choice holds a control token of this model in {name_rows(found, len(examples))}. "
            "Take it out."
        )


class AnswerCollator:
    """For evaluation and prediction: every choice under its own letter.

    `num_letters` is fixed for a run, so that letter logits of all batches and processes have one shape. `blank` names
    images that are shown as a white square: row id -> positions among the row's images. `packer` makes one row
    without padding of the batch (packing.py). With `features`, images whose features are all stored are not opened:
    the batch holds `image_features` (cache.py) in place of pixels.

    With other `views` than "identity" (mcq.view_orders) the batch holds every row in several orders, one after another;
    a row whose choices refer to each other (references.py) in those that leave them in place.
    With a `packer` images are there once for all orders of a row, and for all rows whose prompts are the same up to
    their images and these; the packer is told so by `leaders`. With a `scale` other than 1, of packed rows alone,
    images have that times the sides that they would have.
    """

    shows_targets = False  # evaluations compare with the answers
    shares_images = True
    supervises_end = False

    def __init__(
        self,
        processor: ProcessorMixin,
        prompts: Prompts,
        num_letters: int,
        blank: Mapping[str, Sequence[int]] | None = None,
        packer: Callable[[dict], dict] | None = None,
        features: "FeatureStore | None" = None,
        views: str | int = "identity",
        scale: float = 1.0,
    ) -> None:
        self.processor = processor
        self.prompts = prompts
        self.num_letters = num_letters
        self.blank = blank or {}
        self.packer = packer
        self.features = features
        self.views, self.scale = views, scale

    def orders(self, row: dict) -> list[tuple[int, ...]]:
        if self.views == "identity":
            return [identity_order(len(row["choices"]))]
        return view_orders(len(row["choices"]), self.views, row["id"], count_free(row["question"], row["choices"]))

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        for row in rows:  # those of a stream were not checked before
            if control_tokens(self.processor).search(_texts_of(row)):
                raise InputError(f"the texts of row {row['id']} hold a control token of this model. Take it out.")
        shown = [(number, order) for number, row in enumerate(rows) for order in self.orders(row)]
        groups, orders = map(list, zip(*shown, strict=True))
        once, rows = rows, [rows[number] for number in groups]
        texts = [
            render_prompt(self.processor, row, order, self.prompts) for row, order in zip(rows, orders, strict=True)
        ]
        letters = [self.answer_letter(row, order) for row, order in zip(rows, orders, strict=True)]
        if self.supervises_end:
            spaces = answer_prefix(self.processor)[1]
            texts = [text + spaces + LETTERS[letter] for text, letter in zip(texts, letters, strict=True)]
        bos = self.processor.tokenizer.bos_token
        how = {"padding": True, "return_tensors": "pt"}
        # Some templates write the beginning-of-sequence token themselves; twice would be a different prompt.
        how["add_special_tokens"] = not (bos and texts[0].startswith(bos))
        first = [groups.index(number) for number in range(len(once))]  # of the orders of each row
        roots = self.roots(once, [texts[place] for place in first])
        seen = [row for number, row in enumerate(once) if roots[number] == number]  # whose images the batch holds
        is_shared = self.packer is not None and len(seen) < len(rows)
        vision_inputs = self.stored(seen if is_shared else rows)
        if vision_inputs is None and self.packer and (is_shared or self.scale != 1):
            vision_inputs = self.pixels(seen)
        if vision_inputs is not None:
            of_seen = vision_inputs["image_grid_thw"].split([len(row["images"]) for row in seen])
            grids = dict(zip(sorted(set(roots)), of_seen, strict=True))
            grids = torch.cat([grids[roots[number]] for number in groups])
            batch = self.tokenize(texts, grids, **how) | vision_inputs
            if is_shared:
                batch["grids_of_rows"] = grids
        else:
            images = [self.images(row) for row in rows]
            batch = self.processor(text=texts, images=images if any(images) else None, **how)
        # The last real token, whichever side is padded.
        last = (batch["attention_mask"] * torch.arange(batch["input_ids"].shape[1])).argmax(dim=1)
        batch = {
            # First, for libraries take the length of the first tensor for the number of rows.
            "answers": torch.tensor(letters),
            "ids": [row["id"] for row in rows],
            **batch,
            "answer_positions": last - int(self.supervises_end),
            "num_choices": torch.tensor([len(order) for order in orders]),
            "orders": torch.tensor([order + identity_order(self.num_letters)[len(order) :] for order in orders]),
        }
        if self.shows_targets and "targets" in rows[0]:
            batch["targets"] = torch.stack([self.targets(row, order) for row, order in zip(rows, orders, strict=True)])
        if self.supervises_end:
            batch["end_positions"] = last
        if len(rows) > len(once):
            batch["groups"] = torch.tensor(groups)
        if is_shared:
            leads = [first[roots[n] if place == first[n] else n] for place, n in enumerate(groups)]
            batch["leaders"] = torch.tensor(leads)
        return self.packer(batch) if self.packer else batch

    def roots(self, rows: list[dict], texts: list[str]) -> list[int]:
        """For each row the first one with the same images whose prompt is the same up to them; itself without."""
        if not self.packer or not self.shares_images:
            return [*range(len(rows))]
        found: dict[Hashable, int] = {}
        roots = []
        for number, (row, text) in enumerate(zip(rows, texts, strict=True)):
            before, _, _ = text.rpartition(self.processor.image_token)
            images = tuple(self.image_key(row, position) for position in range(len(row["images"])))
            roots.append(found.setdefault((before, *images) if images else number, number))
        return roots

    def image_key(self, row: dict, position: int) -> Hashable:
        """Equal for images that are the same, without opening them."""
        image = row["images"][position]
        return BLANK_DIGEST if self.is_blank(row, position) else (image["bytes"] or image["path"])

    def targets(self, row: dict, order: Sequence[int]) -> torch.Tensor:
        """What each letter should have, (L,): the row's targets, or all for its answer."""
        targets = torch.zeros(self.num_letters)
        if row["targets"] is None:
            targets[self.answer_letter(row, order)] = 1
        else:
            targets[: len(order)] = torch.tensor([row["targets"][choice] for choice in order])
        return targets

    def stored(self, rows: list[dict]) -> dict[str, torch.Tensor] | None:
        """Features of the rows' images and their grids; None where there are no images, or not all are stored."""
        if self.features is None or not self.features.is_filled:
            return None
        return self.features.find([self.digest(row, i) for row in rows for i in range(len(row["images"]))])

    def pixels(self, rows: list[dict]) -> dict[str, torch.Tensor] | None:
        """Pixels of the rows' images and their grids; None where there are no images."""
        images = [image for row in rows for image in self.images(row)]
        if not images:
            return None
        process = functools.partial(self.processor.image_processor, return_tensors="pt")
        if self.scale == 1:
            return dict(process(images))
        scaled = [self.scaled(image) for image in images]
        areas = [image.width * image.height for image in scaled]
        sizes = [dict.fromkeys(("shortest_edge", "longest_edge"), area) for area in areas]  # leave them as they are
        found = [process([image], size=size) for image, size in zip(scaled, sizes, strict=True)]
        return {name: torch.cat([of_image[name] for of_image in found]) for name in found[0]}

    def scaled(self, image: Image.Image) -> Image.Image:
        """The image with `scale` times the sides that the processor would give it, in whole tokens."""
        processor = self.processor.image_processor
        px, limits = processor.patch_size * processor.merge_size, processor.size
        sides = smart_resize(image.height, image.width, px, limits["shortest_edge"], limits["longest_edge"])
        height, width = (max(1, round(side * self.scale / px)) * px for side in sides)
        return image.resize((width, height), Image.Resampling.BICUBIC)

    def tokenize(self, texts: list[str], grids: torch.Tensor, **how: object) -> dict[str, torch.Tensor]:
        """As the processor does it for images that it sees, from their grids (images, 3) alone."""
        places = [self.processor.replace_image_token({"image_grid_thw": grids}, i) for i in range(len(grids))]
        texts, _ = self.processor.get_text_with_replacements(list(texts), places)
        tokens = self.processor.tokenizer(texts, **how)
        types = self.processor.create_mm_token_type_ids(tokens["input_ids"])
        kept = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        return kept | {"mm_token_type_ids": torch.tensor(types)}

    def images(self, row: dict) -> list[Image.Image]:
        """The row's images. Raises InputError for one that cannot be read, which a checked row does not have."""
        return [self.image(row, i) for i in range(len(row["images"]))]

    def is_blank(self, row: dict, position: int) -> bool:
        return position in self.blank.get(row["id"], ())

    def digest(self, row: dict, position: int) -> str | None:
        """The name of the image's features (cache.py); None for an image that cannot be read."""
        return BLANK_DIGEST if self.is_blank(row, position) else digest_of(row["images"][position])

    def image(self, row: dict, position: int) -> Image.Image:
        if self.is_blank(row, position):
            return Image.new("RGB", BLANK_SIZE, "white")
        try:
            image = open_image(row["images"][position])
            if max(image.size) > MAX_ASPECT * min(image.size):
                raise ValueError(f"more than {MAX_ASPECT} times as long as wide")
            return image
        except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, DecompressionBombError, ...
            raise InputError(
                f"the image of {name_rows([row['id']], 1)} cannot be read ({type(error).__name__}: {error}). "
                "`vqa-sft check` names every such row."
            ) from error

    @staticmethod
    def answer_letter(row: dict, order: Sequence[int]) -> int:
        return -1 if row["answer"] is None else choice_to_letter(row["answer"], order)


class TrainCollator(AnswerCollator):
    """For training: with `shuffle_choices`, an order drawn for every row and epoch, and so are the changes of its
    images: `image_augmentation` is the strength of images.augment, `flip_images` mirrors half of them. With
    `supervises_end` rows carry their letter, that of the largest target where the data have no answer.

    Choices that refer to others keep their places (references.py). A stream has no epochs: with `counts_batches` what
    is drawn changes with every batch that a worker makes.
    """

    shows_targets = True
    shares_images = False  # rows that share more than their first words have no gradients

    def __init__(
        self,
        processor: ProcessorMixin,
        prompts: Prompts,
        num_letters: int,
        *,
        seed: int,
        shuffle_choices: bool = True,
        image_augmentation: float = 0.0,
        flip_images: bool = False,
        supervises_end: bool = False,
        counts_batches: bool = False,
        packer: Callable[[dict], dict] | None = None,
        features: "FeatureStore | None" = None,
    ) -> None:
        super().__init__(processor, prompts, num_letters, packer=packer, features=features)
        self.seed = seed
        self.shuffle_choices = shuffle_choices
        self.supervises_end = supervises_end
        self.image_augmentation, self.flip_images = image_augmentation, flip_images
        # Shared memory, because workers that are already running must see the new epoch.
        self.epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self.counts_batches = counts_batches
        self.num_batches = 0

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        self.num_batches += 1
        return super().__call__(rows)

    def orders(self, row: dict) -> list[tuple[int, ...]]:
        if not self.shuffle_choices:
            return super().orders(row)
        num_free = count_free(row["question"], row["choices"])
        return [draw_order(len(row["choices"]), self.seed, self._round(), row["id"], num_free)]

    def _round(self) -> int:
        return self.num_batches if self.counts_batches else int(self.epoch)

    def image(self, row: dict, position: int) -> Image.Image:
        image = super().image(row, position)
        # As draw_order: any worker, process or resumed run draws the same.
        rng = random.Random(f"{self.seed}/{self._round()}/{row['id']}/image {position}")
        if self.image_augmentation:
            image = augment(image, self.image_augmentation, rng)
        return ImageOps.mirror(image) if self.flip_images and rng.random() < 0.5 else image
