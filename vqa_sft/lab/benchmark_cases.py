"""The cases of the benchmark (benchmark.py): shape, recipe, rows a step, data."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vqa_sft.config.fields import read_yaml
from vqa_sft.errors import InputError
from vqa_sft.lab.watch import WARM_UP

FEW_ROWS, GRAPHS_WARM_UP = 4, 16  # which go by CUDA graphs, from step 9 on where layers are compiled at first
DDP_WARM_UP = 12  # it times its first ten steps itself, and waits for the GPU in each
QWEN_7B, QWEN_3B, QWEN3_8B = (f"Qwen/Qwen{name}-Instruct" for name in ("2.5-VL-7B", "2.5-VL-3B", "3-VL-8B"))
# label, shape, recipe, rows a step; TRL beside them
FAMILIES = (
    ("Qwen3.5-9B", "Qwen/Qwen3.5-9B", "qwen3_5_9b", 32),
    ("Gemma-4-12B", "google/gemma-4-12B-it", "gemma4_12b", 16),
    ("InternVL3.5-8B", "OpenGVLab/InternVL3_5-8B-HF", "internvl3_5_4b", 16),
    ("Qwen3-VL-30B-A3B", "Qwen/Qwen3-VL-30B-A3B-Instruct", "qwen3vl_30b_a3b", 16),
)
OTHER_FAMILIES = (  # on a CPU only
    ("Gemma-4-E4B", "google/gemma-4-E4B-it", "gemma4_e4b_t4"),
    ("Ministral-3-8B", "mistralai/Ministral-3-8B-Instruct-2512-BF16", "ministral3_8b"),
    ("Qwen3.5-35B-A3B", "Qwen/Qwen3.5-35B-A3B", "qwen3_5_35b_a3b"),
)
# What makes ms-swift faster where memory allows; without flash-attn it refuses `padding_free` and `packing`.
TUNED_SWIFT = {"gradient_checkpointing": False, "dataloader_num_workers": 8, "lora_dropout": 0}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# Images of 448 px a side and texts of about 174 tokens with the template: 430 tokens a row; then of 80 to 310 tokens.
# A word is one token of the random models.
FIXED = {"num_words": (95, 95), "side_px": (448, 448)}
MIXED = {"num_words": (5, 235), "side_px": (160, 1280)}
LARGE = FIXED | {"side_px": (768, 768)}
# Ten names of one to six words, and a short question that is the same for all rows of a classification.
CANDIDATES = {"num_words": (6, 6), "side_px": (448, 448), "num_choices": 10}


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    name: str
    kind: str  # "train", "trl", "swift", "score" or "latency"
    shape: str
    recipe: str = ""
    data: dict = field(default_factory=lambda: FIXED)
    batch_size: int = 16
    options: dict[str, Any] = field(default_factory=dict)  # of the recipe, of TRL's LoraConfig, or of ms-swift
    cap_gib: float | None = None
    baseline: str | None = None  # the case whose examples/s are 1.0
    scores: str = ""  # the case whose run is scored
    how: dict[str, Any] = field(default_factory=dict)  # arguments of predict.py
    num_views: int = 1  # of a row, among those that `batch_size` counts
    num_runs: int = 1  # as many copies of it, scored at once
    num_gpus: int = 1  # of one machine, by DDP, with `batch_size` rows each

    @property
    def warm_up(self) -> int:
        if self.num_gpus > 1:
            return DDP_WARM_UP
        return WARM_UP if self.batch_size > FEW_ROWS or self.kind != "train" else GRAPHS_WARM_UP


def standard_cases() -> list[Case]:
    cases = []
    for size, shape, recipe, rows in (
        ("7B", QWEN_7B, "qwen7b", 16),
        ("3B", QWEN_3B, "qwen7b", 32),
        ("Qwen3-VL-8B", QWEN3_8B, "qwen3vl8b_a100", 16),
    ):
        trl = f"{size} TRL by default"
        ours: dict[str, Any] = {"shape": shape, "recipe": f"recipes/{recipe}.yaml", "batch_size": rows, "baseline": trl}
        if shape == QWEN3_8B:
            ours["options"] = {"max_pixels": 200704}
        cases.append(Case(trl, "trl", shape, batch_size=8))
        cases.append(Case(f"{size} train", "train", **ours))
        if shape == QWEN_7B:
            swift: dict[str, Any] = {"kind": "swift", "shape": shape, "baseline": trl}
            cases.append(Case(f"{size} ms-swift by default", **swift, batch_size=8))
            swift["batch_size"] = 16
            cases.append(Case(f"{size} ms-swift, tuned", **swift, options=TUNED_SWIFT))
            compiled = TUNED_SWIFT | {"torch_compile": True}
            cases.append(Case(f"{size} ms-swift, tuned, compiled", **swift, options=compiled))
            cases.append(Case(f"{size} train, mixed sizes", "train", **ours | {"data": MIXED}))
            two: dict[str, Any] = ours | {"num_gpus": 2, "baseline": f"{size} train"}
            cases.append(Case(f"{size} train, two GPUs", "train", **two))
            two |= {"data": MIXED, "baseline": f"{size} train, mixed sizes"}
            cases.append(Case(f"{size} train, mixed sizes, two GPUs", "train", **two))
            large = {"data": LARGE, "batch_size": 8, "options": {"max_pixels": 768 * 768}}
            cases.append(Case(f"{size} train, 768 px", "train", **ours | large))
            four: dict[str, Any] = {"batch_size": 4}
            cases.append(Case(f"{size} train, four rows", "train", **ours | four))
            four |= {"options": {"compile_layers": False}}
            cases.append(Case(f"{size} train, four rows, uncompiled", "train", **ours | four))
            cached: dict[str, Any] = {"options": {"cache_image_features": True}, "batch_size": 32}
            cases.append(Case(f"{size} train, cached features", "train", **ours | cached))
            rounded = {"base_precision": "fp8"}
            cases.append(Case(f"{size} train, FP8 base", "train", **ours | {"options": rounded}))
            both = cached | {"options": cached["options"] | rounded}
            cases.append(Case(f"{size} train, FP8 base, cached features", "train", **ours | both))
            # Four rows fit without recomputing more, but leave a GPU of this kind waiting for Python.
            small: dict[str, Any] = {"options": {"activation_memory_budget": 0.2}, "batch_size": 12, "cap_gib": 24}
            cases.append(Case(f"{size} train, within 24 GiB", "train", **ours | small))
            score: dict[str, Any] = {"kind": "score", "shape": shape, "batch_size": 32, "scores": f"{size} train"}
            cases.append(Case(f"{size} score", **score))
            for trained in ("cached features", "FP8 base"):
                of_run = {"scores": f"{size} train, {trained}"}
                cases.append(Case(f"{size} score, {trained}", **score | of_run))
            turned = score | {"how": {"orders": "rotations"}, "num_views": 4, "batch_size": 64}
            turned |= {"baseline": f"{size} score"}
            cases.append(Case(f"{size} score, rotations", **turned))
            cases.append(Case(f"{size} score, ten candidates", **score | {"data": CANDIDATES}))
            cases.append(Case(f"{size} score, rotations, five runs", **turned | {"num_runs": 5}))
            one = score | {"kind": "latency", "batch_size": 1}
            cases.append(Case(f"{size} one row at a time", **one))
            cases.append(Case(f"{size} one row at a time, compiled", **one | {"how": {"compile_layers": True}}))
        if shape == QWEN_3B:
            cases.append(Case(f"{size} score", "score", shape, batch_size=32, scores=f"{size} train"))
    for family in FAMILIES:
        cases += family_cases(*family)
    return cases


def family_cases(label: str, shape: str, recipe: str, rows: int = 16) -> list[Case]:
    """TRL's and ours; for a mixture of experts with adapters on attention alone, then on the experts as well."""
    trl = Case(f"{label} TRL by default", "trl", shape, batch_size=8)
    # There is room for what the recipes recompute.
    whole = {"gradient_checkpointing": False}
    own: dict[str, Any] = {"recipe": f"recipes/{recipe}.yaml", "batch_size": rows, "options": whole}
    ours = Case(f"{label} train", "train", shape, **own, baseline=trl.name)
    if "A3B" not in shape:
        return [trl, ours]
    of_trl = replace(trl, name=f"{label} experts, TRL", options={"target_parameters": EXPERTS})
    # Recomputed, as the recipe has it.
    experts = replace(ours, name=f"{label} experts, train", options={"lora_target_parameters": EXPERTS})
    # A GPU of 80 GB has 79 GiB, less its context.
    return [trl, replace(ours, cap_gib=78), of_trl, replace(experts, baseline=of_trl.name)]


def tiny_cases() -> list[Case]:
    from vqa_sft.lab.random_models import small_shape

    data = {"num_words": (5, 20), "side_px": (60, 120)}
    of_families = [case for row in FAMILIES for case in family_cases(*row)]
    of_families += [case for row in OTHER_FAMILIES for case in family_cases(*row) if case.kind == "train"]
    small = [
        replace(case, shape=small_shape(case.shape), data=data, batch_size=2, cap_gib=None) for case in of_families
    ]
    ours: dict[str, Any] = {
        "shape": "tiny",
        "recipe": "vqa_sft/lab/digits.yaml",
        "data": data,
        "batch_size": 4,
        "baseline": "TRL",
    }
    few = {"dataloader_num_workers": 1}
    return [
        Case("TRL", "trl", "tiny", data=data, batch_size=4),
        Case("ms-swift", "swift", "tiny", data=data, batch_size=4, baseline="TRL"),
        Case("ms-swift, tuned", "swift", "tiny", data=data, batch_size=4, baseline="TRL", options=TUNED_SWIFT | few),
        Case("train", "train", **ours),
        Case("train, two GPUs", "train", **ours | {"num_gpus": 2, "baseline": "train"}),
        Case("cached features", "train", **ours | {"options": {"cache_image_features": True}}),
        Case("FP8 base", "train", **ours | {"options": {"base_precision": "fp8"}}),  # whole, which is said
        Case("score", "score", "tiny", data=data, batch_size=4, scores="train"),
        Case("score, FP8 base", "score", "tiny", data=data, batch_size=4, scores="FP8 base"),
        Case(
            "rotations",
            "score",
            "tiny",
            data=data,
            batch_size=8,
            scores="train",
            how={"orders": "rotations"},
            num_views=4,
        ),
        Case("five runs", "score", "tiny", data=data, batch_size=4, scores="train", num_runs=5),
        Case("one row at a time", "latency", "tiny", data=data, batch_size=1, scores="train"),
        *small,
    ]


def case_of_recipe(recipe: str, *, is_tiny: bool) -> Case:
    """A recipe as it stands, on images of mixed sizes; on a CPU with a small model of its family."""
    from vqa_sft.lab.random_models import small_shape
    from vqa_sft.models.shapes import SHAPES

    shape = read_yaml(recipe).get("model_name_or_path")
    if shape not in SHAPES:
        raise InputError(f"{recipe} is of the model {shape}; shapes are known of: {', '.join(SHAPES)}.")
    data = {"num_words": (10, 60), "side_px": (60, 120) if is_tiny else (320, 1280)}
    return Case(Path(recipe).stem, "train", small_shape(shape) if is_tiny else shape, recipe, data, batch_size=0)
