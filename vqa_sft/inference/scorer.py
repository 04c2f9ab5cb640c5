"""One model that scores rows as the runs on it do: what predict.py and `vqa_sft.Predictor` load.

base model            loaded once
adapters of R runs    take turns in it (adapters.py), where they are of one kind
processor, prompts    of the run folder: what was scored in training is scored here
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from transformers import ProcessorMixin

from vqa_sft.batch.collator import AnswerCollator
from vqa_sft.batch.prompts import Prompts
from vqa_sft.batch.template import check_texts
from vqa_sft.config.recipe import Recipe
from vqa_sft.errors import InputError
from vqa_sft.models import load as models, processes as launch, scoring
from vqa_sft.models.adapters import Adapters, kind_of
from vqa_sft.models.fast import feature_store as cache, speedups as speed
from vqa_sft.models.fast.packing import Packer

BASE = "none"  # in place of a run: the base model as it is
# What of a recipe makes the base another one.
_OF_BASE = ("model_name_or_path", "model_revision", "dtype", "attn_implementation", "load_in_4bit", "load_in_8bit")
_OF_BASE += ("bnb_4bit_quant_type", "use_bnb_nested_quant", "trust_remote_code", "fast", "cache_image_features")


def groups_of(runs: Mapping[str, dict[str, Any]]) -> list[list[str]]:
    """The folders of the runs, those together that one model can score at once: same base, prompts, letters, images,
    precision and kind of adapter. `runs` maps a folder to its run.json."""
    groups: dict[str, list[str]] = {}
    for folder, run in runs.items():
        kind = None if folder == BASE else kind_of(folder)
        parts = [kind or folder, run["num_letters"], run["prompts"], run.get("precision")]
        parts += [run["recipe"].get(name) for name in _OF_BASE]
        for name in ("*processor*.json", "chat_template*"):  # damaged ones are found where they are loaded
            parts += [path.read_text("utf-8", "replace") for path in sorted(Path(folder).glob(name)) if path.is_file()]
        groups.setdefault(json.dumps(parts, sort_keys=True, default=str), []).append(folder)
    return [*groups.values()]


def precision_of(run: dict[str, Any], use_cpu: bool) -> str:
    """That of the training where this device computes in it."""
    return models.choose_precision(run["recipe"] | {"use_cpu": use_cpu}, trained=run.get("precision"))


@dataclass
class Scorer:
    """The model of one of the groups; `runs` of it are scored at once, in the order of its folders."""

    model: torch.nn.Module
    processor: ProcessorMixin
    prompts: Prompts
    num_letters: int
    letter_ids: torch.Tensor
    precision: str
    packer: Packer | None
    adapters: Adapters | None
    store: cache.FeatureStore | None

    def collators(
        self, views: str | int = "identity", scales: Sequence[float] = (1.0,), blank: Mapping | None = None
    ) -> list[AnswerCollator]:
        """One for each scale of the images."""
        if self.packer is None and [*scales] != [1.0]:
            raise InputError("--scales needs rows without padding, which this model or `fast: false` does not have.")
        # Stored features are those of the images as they are.
        common = (self.processor, self.prompts, self.num_letters, blank, self.packer)
        return [AnswerCollator(*common, self.store if scale == 1 else None, views, scale) for scale in scales]

    def fill_store(
        self, collators: Sequence[AnswerCollator], examples: datasets.Dataset, batch_size: int, num_workers: int
    ) -> None:
        """Compute the features of the rows' images that are not stored yet, where the runs cache them."""
        for collator in collators:
            if collator.features is not None:
                cache.fill_store(self.model, collator, [examples], self.precision, batch_size, num_workers)


def load(
    folders: Sequence[str],
    run: dict[str, Any],
    *,
    most_choices: int,
    examples: datasets.Dataset | None = None,
    views_a_row: int = 1,
    precision: str | None = None,
    use_cpu: bool = False,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    compile_layers: bool | None = None,
) -> Scorer:
    """The scorer of runs of one group, or of a base model (`BASE`), for rows of `most_choices`; `run` is the run.json
    of the first. The texts of `examples` are checked before weights are loaded, and their number says whether
    compilation pays, where `compile_layers` does not. Raises InputError.
    """
    first, prompts = folders[0], Prompts(**run["prompts"])
    num_letters = max(run["num_letters"] or 0, most_choices)
    recipe = Recipe(run["recipe"], arguments=None)
    model_args, trust = recipe.model_args(), {"trust_remote_code": bool(run["recipe"].get("trust_remote_code"))}
    source = model_args.model_name_or_path if first == BASE else first
    processor = models.load_processor(source, min_pixels=min_pixels, max_pixels=max_pixels, **trust)
    # A run knows one spelling of its letters; a base may prefer any.
    find_ids = scoring.find_spellings if first == BASE else scoring.find_letter_ids
    letter_ids = find_ids(processor, num_letters, prompts)
    if examples is not None:
        check_texts(processor, examples, prompts)
    precision = precision or precision_of(run, use_cpu)
    model = models.load_trained(first, model_args, precision, device_map=launch.device_map(), **trust)
    model.to(PartialState().device).eval().requires_grad_(False)
    packer = store = None
    adapters = Adapters(model, folders) if len(folders) > 1 else None
    if run["recipe"].get("fast", True):
        packer = speed.pack_rows(model, precision)
        if run["recipe"].get("cache_image_features"):
            store = cache.open_store(model, processor, packer, precision)
        num_views = len(examples or ()) * views_a_row * len(folders)
        speed.speed_up(model, compile_layers=speed.pays_compilation(num_views, compile_layers))
    return Scorer(
        model=model,
        processor=processor,
        prompts=prompts,
        num_letters=num_letters,
        letter_ids=letter_ids,
        precision=precision,
        packer=packer,
        adapters=adapters,
        store=store,
    )
