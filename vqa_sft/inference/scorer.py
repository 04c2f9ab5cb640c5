"""One model that scores rows as the runs on it do: what passes.py and `vqa_sft.Predictor` load.

base model            loaded once
adapters of R runs    take turns in it (adapters.py), where they are of one kind
processor, prompts    of the run folder: what was scored in training is scored here
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
from accelerate import PartialState
from transformers import ProcessorMixin

from vqa_sft.batch.collator import AnswerCollator
from vqa_sft.batch.control import Control
from vqa_sft.batch.prompts import Prompts, check_texts, settle_prompts
from vqa_sft.config.recipe import Recipe
from vqa_sft.console import note
from vqa_sft.errors import InputError
from vqa_sft.models import fp8_base, load as models, processes, scoring
from vqa_sft.models.adapters import Adapters, kind_of
from vqa_sft.models.fast import speedups
from vqa_sft.models.fast.feature_store import FeatureStore, fill_store, open_store
from vqa_sft.models.fast.packing import Packer
from vqa_sft.questions.letters import Views
from vqa_sft.runs.folder import Run

# What of a recipe makes the base another one.
_OF_BASE = ("model_name_or_path", "model_revision", "dtype", "attn_implementation", "load_in_4bit", "load_in_8bit")
_OF_BASE += ("bnb_4bit_quant_type", "use_bnb_nested_quant", "trust_remote_code", "fast", "cache_image_features")
_OF_BASE += ("base_precision",)
_OF_IMAGES = ("*processor*.json", "chat_template*")


@dataclass
class Group:
    """Runs that one model can score at once, in this precision."""

    runs: list[Run]
    precision: str


def groups_of(runs: Sequence[Run], use_cpu: bool) -> list[Group]:
    """The runs, those together that have the same base, prompts, letters, images, precision and kind of adapter. The
    prompts of a base model are settled for it, as training did it for a run. Raises InputError."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        run = run if run.folder else _settle_base(run)
        parts = [run.num_letters, vars(run.prompts), run.precision, *(run.recipe.get(name) for name in _OF_BASE)]
        if run.folder is not None:
            parts.append(kind_of(run.folder) or run.folder)
            files = [path for pattern in _OF_IMAGES for path in sorted(Path(run.folder).glob(pattern))]
            # Damaged ones are found where they are loaded.
            parts += [path.read_text("utf-8", "replace") for path in files if path.is_file()]
        groups.setdefault(json.dumps(parts, sort_keys=True, default=str), []).append(run)
    return [Group(of_group, _precision_of(of_group[0], use_cpu)) for of_group in groups.values()]


def _settle_base(run: Run) -> Run:
    processor = models.load_processor(run.base_model, trust_remote_code=bool(run.recipe.get("trust_remote_code")))
    prompts, lines = settle_prompts(processor, run.prompts)
    for line in lines:
        note(line)
    return replace(run, prompts=prompts)


def _precision_of(run: Run, use_cpu: bool) -> str:
    """That of the training where this device computes in it."""
    return models.choose_precision(run.recipe | {"use_cpu": use_cpu}, trained=run.precision)


@dataclass(kw_only=True)
class Scorer(scoring.LetterModel):
    """The model of a group of runs, and what makes batches for it."""

    processor: ProcessorMixin
    prompts: Prompts
    num_letters: int
    packer: Packer | None
    store: FeatureStore | None

    def collators(
        self, views: Views, blank: Mapping | None = None, control: Control | None = None
    ) -> list[AnswerCollator]:
        """One for each scale of the images; `blank` are images that cannot be used: row id -> their positions, and
        `control` says what is shown in place of all."""
        if not (self.packer and self.packer.has_grids) and [*views.scales] != [1.0]:
            raise InputError("--scales: this model, or `fast: false`, shows images at one scale. Remove --scales.")
        common = (self.processor, self.prompts, self.num_letters, blank, self.packer)
        # Features are those of the images as they are.
        stores = [self.store if scale == 1 and control is None else None for scale in views.scales]
        each = zip(stores, views.scales, strict=True)
        return [AnswerCollator(*common, store, views.orders, scale, control) for store, scale in each]

    def fill_store(
        self, collators: Sequence[AnswerCollator], examples: datasets.Dataset, batch_size: int, num_workers: int
    ) -> None:
        """Compute the features of the rows' images that are not stored yet, where the runs cache them."""
        for collator in collators:
            if collator.features is not None:
                fill_store(self.model, collator, [examples], self.precision, batch_size, num_workers)


def load(
    group: Group,
    *,
    most_choices: int,
    examples: datasets.Dataset | None = None,
    views_a_row: int = 1,
    compile_layers: bool | None = None,
) -> Scorer:
    """The scorer of a group of runs, or of a base model, for rows of `most_choices`. The texts of `examples` are
    checked before weights are loaded, and their number says whether compilation pays, where `compile_layers` does not.
    Raises InputError.
    """
    runs, precision = group.runs, group.precision
    run, is_base = runs[0], runs[0].folder is None
    num_letters = max(run.num_letters or 0, most_choices)
    model_args = Recipe(run.recipe, arguments=None).model_args()
    trust: dict[str, Any] = {"trust_remote_code": bool(run.recipe.get("trust_remote_code"))}
    # A run's processor knows its image size, and one spelling of its letters; a base may prefer any.
    pixels: dict[str, Any] = {name: run.recipe.get(name) if is_base else None for name in ("min_pixels", "max_pixels")}
    processor = models.load_processor(run.folder or run.base_model, **pixels, **trust)
    find_ids = scoring.find_spellings if is_base else scoring.find_letter_ids
    letter_ids = find_ids(processor, num_letters, run.prompts)
    if examples is not None:
        check_texts(processor, examples, run.prompts)
    model = models.load_trained(run.folder or "none", model_args, precision, device_map=processes.device_map(), **trust)
    models.follow_processor(model, processor)
    model.to(PartialState().device).eval().requires_grad_(False)
    if run.recipe.get("base_precision") == "fp8":
        fp8_base.round_base(speedups.base_of(model))
    packer = store = None
    adapters = Adapters(model, [other.folder for other in runs]) if len(runs) > 1 else None
    if run.recipe.get("fast", True):
        packer = speedups.pack_rows(model, precision)
        if run.recipe.get("cache_image_features"):
            store = open_store(model, processor, packer, precision)
        num_views = len(examples or ()) * views_a_row * len(runs)
        compiles = speedups.pays_compilation(speedups.base_of(model).config, num_views, compile_layers)
        speedups.speed_up(model, compile_layers=compiles)
    return Scorer(
        model=model,
        processor=processor,
        prompts=run.prompts,
        num_letters=num_letters,
        letter_ids=letter_ids.to(PartialState().device),
        precision=precision,
        packer=packer,
        adapters=adapters,
        store=store,
    )
