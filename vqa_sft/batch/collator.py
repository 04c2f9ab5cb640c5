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
    weights            (B,)     how much the row counts in the loss; in training, where it is weighted by its class
    end_positions      (B,)     index of the letter itself, where training rows carry it: the logits there belong to the
                                token that ends the turn

The prompt ends where the letter begins: what is scored in training is byte for byte what is scored in prediction. A
training row carries its letter only where the end of the turn is supervised; nothing before it looks at it.
"""

import hashlib
import random
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from PIL import Image, ImageOps
from transformers import ProcessorMixin

from vqa_sft.batch.augment import augment
from vqa_sft.batch.control import BLANK, BLURRED, Control, blur
from vqa_sft.batch.draw_candidates import draw_candidates
from vqa_sft.batch.image_size import scale_images
from vqa_sft.batch.prompts import Prompts, has_control_token, render_prompt
from vqa_sft.batch.template import answer_prefix
from vqa_sft.data.class_probs import NONE_OF_THESE
from vqa_sft.data.options import CANDIDATES
from vqa_sft.errors import InputError, name_rows
from vqa_sft.images import MAX_ASPECT, digest_of, open_image
from vqa_sft.questions.letters import LETTERS, choice_to_letter, draw_order, identity_order, view_orders
from vqa_sft.questions.references import count_free

BLANK_SIZE = (448, 448)  # pixels
BLANK_DIGEST = hashlib.sha256(f"blank {BLANK_SIZE}".encode()).hexdigest()
HALF = (torch.bfloat16, torch.float16)
# Keys of a batch that are ours and not the model's.
TARGET_KEYS = ("answer_positions", "answers", "ids", "num_choices", "orders", "targets", "end_positions", "groups")
TARGET_KEYS += ("weights",)
WEIGHT = "weight"  # a column of training rows
REPETITION = "repetition"  # how often the epoch has shown the training row before


class Packer(Protocol):
    """What makes one row without padding of a batch (models/fast/packing.py)."""

    shares_images: bool  # whether images may be there once for several rows
    has_grids: bool  # whether an image is a grid of patches, of which its tokens follow

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]: ...


class Features(Protocol):
    """What a collator asks of image features on disk (models/fast/feature_store.py)."""

    is_filled: bool

    def find(self, digests: Sequence[str | None]) -> dict[str, torch.Tensor] | None:
        """`image_features` and `image_grid_thw` of all these images; None where one is not stored."""


def free_choices(row: Mapping[str, Any]) -> int:
    """How many of the row's choices, from the first one on, may be permuted. Names of classes stand for themselves,
    whatever they look like."""
    if CANDIDATES in row:
        return sum(number != NONE_OF_THESE for number in row[CANDIDATES])
    return count_free(row["question"], row["choices"])


def supervised_positions(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Where a batch is supervised: (B, 1), or (B, 2) where rows carry their letter."""
    return torch.stack([batch[name] for name in ("answer_positions", "end_positions") if name in batch], dim=1)


@dataclass(eq=False, repr=False)
class AnswerCollator:
    """For evaluation and prediction: every choice under its own letter.

    With other `views` than "identity" (letters.view_orders) the batch holds every row in several orders, one after
    another; a row whose choices refer to each other (questions/references.py) in those that leave them in place. With a
    `packer` images are there once for all orders of a row, and for all rows whose prompts are the same up to their
    images and these, by `leaders`. With a `scale` other than 1, of packed rows alone, images have that times the sides
    that they would have. With a `control` rows show something else than their images (control.py).
    """

    shows_targets: ClassVar[bool] = False  # evaluations compare with the answers
    shares_images: ClassVar[bool] = True

    processor: ProcessorMixin
    prompts: Prompts
    num_letters: int  # fixed for a run, so that letter logits of all batches and processes have one shape
    blank: Mapping[str, Sequence[int]] | None = None  # row id -> which of its images are shown as white squares
    packer: Packer | None = None
    features: Features | None = None  # images whose features are all stored are not opened
    views: str | int = "identity"
    scale: float = 1.0
    control: Control | None = None
    supervises_end: bool = field(default=False, kw_only=True)  # rows carry their letter

    def orders(self, row: dict) -> list[tuple[int, ...]]:
        if self.views == "identity":
            return [identity_order(len(row["choices"]))]
        return view_orders(len(row["choices"]), self.views, row["id"], free_choices(row))

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        self.check(rows)
        shown = [(number, order) for number, row in enumerate(rows) for order in self.orders(row)]
        groups, orders = map(list, zip(*shown, strict=True))
        views = [(rows[number], order) for number, order in shown]
        letters = [self.answer_letter(row, order) for row, order in views]
        texts = self.texts(views, letters)
        first = [groups.index(number) for number in range(len(rows))]  # of the orders of each row
        roots = self.roots(rows, [texts[place] for place in first])
        is_shared = bool(self.packer and self.packer.shares_images) and len(set(roots)) < len(groups)
        inputs = self.model_inputs(rows, texts, groups, roots, is_shared)
        # The last real token, whichever side is padded.
        last = (inputs["attention_mask"] * torch.arange(inputs["input_ids"].shape[1])).argmax(dim=1)
        batch = {
            # First, for libraries take the length of the first tensor for the number of rows.
            "answers": torch.tensor(letters),
            "ids": [row["id"] for row, _ in views],
            **inputs,
            "answer_positions": last - int(self.supervises_end),
            "num_choices": torch.tensor([len(order) for order in orders]),
            "orders": torch.tensor([order + identity_order(self.num_letters)[len(order) :] for order in orders]),
        }
        batch |= self.supervision(views)
        if self.supervises_end:
            batch["end_positions"] = last
        if len(groups) > len(rows):
            batch["groups"] = torch.tensor(groups)
        if is_shared:
            leads = [first[roots[n] if place == first[n] else n] for place, n in enumerate(groups)]
            batch["leaders"] = torch.tensor(leads)
        return self.packer(batch) if self.packer else batch

    def supervision(self, views: list[tuple[dict, tuple[int, ...]]]) -> dict[str, torch.Tensor]:
        """The columns of training rows, where the data have them: `targets` and `weights`."""
        found = {}
        if self.shows_targets and "targets" in views[0][0]:
            found["targets"] = torch.stack([self.targets(row, order) for row, order in views])
        if self.shows_targets and WEIGHT in views[0][0]:
            found["weights"] = torch.tensor([row[WEIGHT] for row, _ in views])
        return found

    def check(self, rows: list[dict]) -> None:
        """Raises InputError for a control token in a text: rows of a stream were not checked before."""
        for row in rows:
            if has_control_token(self.processor, row):
                raise InputError(f"the texts of row {row['id']} hold a control token of this model. Take it out.")

    def texts(self, views: list[tuple[dict, tuple[int, ...]]], letters: list[int]) -> list[str]:
        """The prompts, with their letters where the end of the turn is supervised."""
        texts = [render_prompt(self.processor, row, order, self.prompts) for row, order in views]
        if not self.supervises_end:
            return texts
        spaces = answer_prefix(self.processor, self.prompts.template_options)[1]
        return [text + spaces + LETTERS[letter] for text, letter in zip(texts, letters, strict=True)]

    def model_inputs(
        self, rows: list[dict], texts: list[str], groups: list[int], roots: list[int], is_shared: bool
    ) -> Mapping[str, torch.Tensor]:
        """What the model is given of each view: `texts`, which row it is (`groups`), and of each row whose images
        stand for its own (`roots`)."""
        bos = self.processor.tokenizer.bos_token
        how = {"padding": True, "return_tensors": "pt"}
        # Some templates write the beginning-of-sequence token themselves; twice would be a different prompt.
        how["add_special_tokens"] = not (bos and texts[0].startswith(bos))
        # The rows whose images the batch holds.
        seen = sorted(set(roots)) if is_shared else groups
        vision_inputs = self.stored([rows[number] for number in seen])
        if vision_inputs is None:
            opened = {number: self.images(rows[number]) for number in dict.fromkeys(seen)}
            images = [opened[number] for number in seen]
            if not (self.packer and self.packer.has_grids and any(images)):
                inputs = self.processor(text=texts, images=images if any(images) else None, **how)
                # Llama 4's processor gives pixels in bf16, which a model in fp32 does not take; autocast takes both.
                half = [name for name, value in inputs.items() if getattr(value, "dtype", None) in HALF]
                return inputs | {name: inputs[name].float() for name in half}
            # The processor's two halves, as where features are stored or images shared.
            flat = [image for of_row in images for image in of_row]
            if self.scale == 1:
                vision_inputs = dict(self.processor.image_processor(flat, return_tensors="pt"))
            else:
                vision_inputs = scale_images(self.processor, flat, self.scale)
        grids = vision_inputs["image_grid_thw"]
        if not is_shared:
            return self.tokenize(texts, grids, **how) | vision_inputs
        grids_of_rows = dict(zip(seen, grids.split([len(rows[number]["images"]) for number in seen]), strict=True))
        grids = torch.cat([grids_of_rows[roots[number]] for number in groups])
        return self.tokenize(texts, grids, **how) | vision_inputs | {"grids_of_rows": grids}

    def roots(self, rows: list[dict], texts: list[str]) -> list[int]:
        """For each row the first one with the same images whose prompt is the same up to them; itself without."""
        if not self.packer or not self.packer.shares_images or not self.shares_images:
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
        image = self.source(row, position)
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

    def tokenize(self, texts: list[str], grids: torch.Tensor, **how: object) -> dict[str, torch.Tensor]:
        """As the processor does it for images that it sees, from their grids (images, 3) alone. Raises InputError for a
        template that shows an image twice: the processor (transformers 5.23) would raise StopIteration, which ends an
        epoch."""
        if sum(text.count(self.processor.image_token) for text in texts) > len(grids):
            raise InputError("the chat template shows images more than once. Take one that shows every image once.")
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
        return self.shows(BLANK) or position in (self.blank or {}).get(row["id"], ())

    def shows(self, kind: str) -> bool:
        return self.control is not None and self.control.kind == kind

    def source(self, row: dict, position: int) -> dict:
        """The {bytes, path} of the image."""
        return self.control.source(row, position) if self.control else row["images"][position]

    def digest(self, row: dict, position: int) -> str | None:
        """The name of the image's features; None for an image that cannot be read."""
        return BLANK_DIGEST if self.is_blank(row, position) else digest_of(self.source(row, position))

    def image(self, row: dict, position: int) -> Image.Image:
        if self.is_blank(row, position):
            return Image.new("RGB", BLANK_SIZE, "white")
        try:
            image = open_image(self.source(row, position))
            if max(image.size) > MAX_ASPECT * min(image.size):
                raise ValueError(f"more than {MAX_ASPECT} times as long as wide")
            return blur(image) if self.shows(BLURRED) else image
        except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, DecompressionBombError, ...
            raise InputError(
                f"the image of {name_rows([row['id']], 1)} cannot be read ({type(error).__name__}: {error}). "
                "`vqa-sft check` names every such row."
            ) from error

    @staticmethod
    def answer_letter(row: dict, order: Sequence[int]) -> int:
        return -1 if row["answer"] is None else choice_to_letter(row["answer"], order)


@dataclass(frozen=True)
class Augmentation:
    """What training changes of a row, drawn by seed, epoch and row id: the order of its choices, and its images."""

    shuffle_choices: bool = True
    image_augmentation: float = 0.0  # strength of augment.augment
    flip_images: bool = False  # mirrors half of them
    counts_batches: bool = False  # draws for every batch that a worker makes: a stream has no epochs


@dataclass(eq=False, repr=False)
class TrainCollator(AnswerCollator):
    """For training. Choices that refer to others keep their places (questions/references.py); the letter of a row
    without an answer is that of its largest target. With the names of all `classes`, the candidates of every row are
    drawn again in every epoch (draw_candidates.py). Each repetition of a row in an epoch has draws of its own."""

    shows_targets = True
    shares_images = False  # rows that share more than their first words have no gradients

    seed: int = field(kw_only=True)
    augmentation: Augmentation = Augmentation()
    classes: Sequence[str] | None = None
    # Shared memory, because workers that are already running must see the new epoch.
    epoch: torch.Tensor = field(init=False, default_factory=lambda: torch.zeros(1, dtype=torch.int64).share_memory_())
    num_batches: int = field(init=False, default=0)

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        self.num_batches += 1
        if self.classes is not None:
            rows = [draw_candidates(row, self.classes, self.seed, self._round(row)) for row in rows]
        return super().__call__(rows)

    def orders(self, row: dict) -> list[tuple[int, ...]]:
        if not self.augmentation.shuffle_choices:
            return super().orders(row)
        return [draw_order(len(row["choices"]), self.seed, self._round(row), row["id"], free_choices(row))]

    def _round(self, row: dict) -> str:
        number = self.num_batches if self.augmentation.counts_batches else int(self.epoch)
        return f"{number} again {row[REPETITION]}" if row.get(REPETITION) else str(number)

    def image(self, row: dict, position: int) -> Image.Image:
        image = super().image(row, position)
        # As draw_order: any worker, process or resumed run draws the same, one that an earlier version began too.
        rng = random.Random(f"{self.seed}/{self._round(row)}/{row['id']}/picture {position}")
        if self.augmentation.image_augmentation:
            image = augment(image, self.augmentation.image_augmentation, rng)
        return ImageOps.mirror(image) if self.augmentation.flip_images and rng.random() < 0.5 else image
