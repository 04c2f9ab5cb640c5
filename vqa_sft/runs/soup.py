"""`vqa-sft soup`: one adapter from several runs, the mean of their changes to the base (Wortsman et al. 2022).

A layer's change is s B A. The mean of changes is not the product of the mean B and the mean A: two runs may have
learned the same with other signs. Here it is the mean of the changes themselves, written as B A again: the factors are
concatenated, and the singular value decomposition of their product never needs the (N, K) matrix. The rank is as small
as the mean allows; `rank` cuts the smallest parts, and the share that is kept is reported.

Not PEFT's `add_weighted_adapter` (0.21): it needs the base in memory, decomposes the (N, K) matrix (51 s for 3,584 x
3,584 on one core, here 0.05 s), cuts to the largest rank of the runs without reporting how much is lost, ignores DoRA's
magnitudes, and refuses modules_to_save.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vqa_sft.errors import InputError
from vqa_sft.files import held, whole_folder
from vqa_sft.runs import folder as run_folder

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ZERO = 1e-6  # singular values below this share of the largest are rounding errors
# Ways to adapt that are not s B A, or not with one s: a mean of theirs is not known.
VARIANTS = (
    "lora_bias", "target_parameters", "use_dora", "use_bdlora", "alora_invocation_tokens", "arrow_config",
    "velora_config", "kasa_config", "alpha_pattern",
)  # fmt: skip

# What of a recipe makes the base another one, or its images.
_OF_BASE = ("model_name_or_path", "model_revision", "base_precision", "load_in_4bit", "load_in_8bit")
_OF_BASE += ("min_pixels", "max_pixels")

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]  # layer -> s B (N, r) and A (r, K)
Tensors = dict[str, torch.Tensor]


def make_soup(
    folders: Sequence[str], output: str, *, weights: Sequence[float] | None = None, rank: int | None = None
) -> str:
    """Write the mean of the runs' adapters to `output`, a run folder for predict; a summary, as text.

    `weights` are those of the runs, by default equal; they are divided by their sum. Raises InputError.
    """
    with held(output, "--output"):
        return _make_soup(folders, output, weights, rank)


def _make_soup(folders: Sequence[str], output: str, weights: Sequence[float] | None, rank: int | None) -> str:
    weights = _shares(folders, weights)
    if Path(output).exists() and (not Path(output).is_dir() or any(Path(output).iterdir())):
        raise InputError(f"{output} exists. Name another folder with --output.")
    runs = [run_folder.read_run(folder) for folder in folders]
    _check_same(folders, runs)
    adapters = [read_adapter(Path(folder)) for folder in folders]
    layers = {frozenset(factors) for factors, _ in adapters}
    others = {frozenset(tensors) for _, tensors in adapters}
    if len(layers) > 1 or len(others) > 1:
        raise InputError("the runs adapt different layers. Give runs with the same lora_target_modules.")
    factors, kept = mean_factors([factors for factors, _ in adapters], weights, rank)
    new_rank = next(iter(factors.values()))[1].shape[0]
    tensors = {f"{name}.lora_B.weight": b for name, (b, _) in factors.items()}
    tensors |= {f"{name}.lora_A.weight": a for name, (_, a) in factors.items()}
    for name in next(iter(others)):  # modules_to_save
        tensors[name] = sum(w * other[name].float() for w, (_, other) in zip(weights, adapters, strict=True))

    first = Path(folders[0])
    config = json.loads((first / CONFIG).read_text(encoding="utf-8"))
    config |= {"r": new_rank, "lora_alpha": new_rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    of = {str(folder): weight for folder, weight in zip(folders, weights, strict=True)}
    recipe = {name: value for name, value in runs[0].recipe.items() if name not in ("push_to_hub", "hub_model_id")}
    content = runs[0].content | {"recipe": recipe | {"output_dir": str(output)}, "soup_of": of}
    with whole_folder(output) as part:
        run_folder.copy_files(first, part, run_folder.PROCESSOR_FILES)
        run_folder.write_json(part / CONFIG, config)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part / WEIGHTS, {"format": "pt"})
        run_folder.write_json(part / run_folder.RUN, content)
    return f"Wrote {output}: {len(factors)} layers of rank {new_rank}, with {kept:.2%} of the mean change."


def _shares(folders: Sequence[str], weights: Sequence[float] | None) -> list[float]:
    weights = [1.0] * len(folders) if weights is None else list(weights)
    if len(weights) != len(folders):
        raise InputError(f"there are {len(folders)} runs and {len(weights)} weights. Give one for each.")
    if not all(0 <= weight < float("inf") for weight in weights) or not sum(weights):
        raise InputError(f"weights must be 0 or more, and not all 0; got {' '.join(map(str, weights))}.")
    return [weight / sum(weights) for weight in weights]


def _check_same(folders: Sequence[str], runs: Sequence[run_folder.Run]) -> None:
    """Raises InputError for runs on other bases, or with other prompts, pixels or letters."""

    def facts(run: run_folder.Run) -> dict[str, Any]:
        own = {name: run.recipe.get(name) or None for name in _OF_BASE}
        return own | {"num_letters": run.num_letters, "prompts": vars(run.prompts)}

    first = facts(runs[0])
    for folder, run in zip(folders, runs, strict=True):
        for name, value in facts(run).items():
            if value != first[name]:
                raise InputError(f"{name} of {folder} is {value!r}, and of {folders[0]} {first[name]!r}.")
        if {*(run.classes.names if run.classes else ())} != {*(runs[0].classes.names if runs[0].classes else ())}:
            raise InputError(f"{folder} is of other classes than {folders[0]}. Average runs of the same classes.")


def read_adapter(folder: Path) -> tuple[Factors, Tensors]:
    """The factors of an adapter's layers, with the scaling in B, and its other tensors."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{folder} holds no adapter: {error}") from error
    found = [name for name in VARIANTS if config.get(name)]
    if config.get("peft_type") != "LORA" or found or any("lora_embedding" in name for name in tensors):
        raise InputError(f"{folder} is no plain LoRA of linear layers ({', '.join(found) or config.get('peft_type')}).")
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise InputError(f"the adapter in {folder} holds NaN or infinite numbers: that run has diverged.")
    factors = {}
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        layer = name.removesuffix(".lora_A.weight")
        a, b = tensors.pop(name), tensors.pop(f"{layer}.lora_B.weight")
        rank = a.shape[0]
        scaling = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
        factors[layer] = scaling * b.double(), a.double()
    return factors, tensors


def mean_factors(
    adapters: Sequence[Factors], weights: Sequence[float], rank: int | None = None
) -> tuple[Factors, float]:
    """The weighted mean change of every layer as factors of one rank, and the share of it that they keep (by the
    Frobenius norm over all layers)."""
    layers = {}
    for name in adapters[0]:
        pairs = [factors[name] for factors in adapters]
        left = torch.cat([weight * b for weight, (b, _) in zip(weights, pairs, strict=True)], dim=1)  # (N, R)
        right = torch.cat([a for _, a in pairs])  # (R, K)
        (left, inner_left), (right, inner_right) = torch.linalg.qr(left), torch.linalg.qr(right.T)
        u, values, v = torch.linalg.svd(inner_left @ inner_right.T, full_matrices=False)
        layers[name] = left @ u, values, v @ right.T
    needed = max(int((values > ZERO * values.max()).sum()) for _, values, _ in layers.values())
    size = max(1, needed if rank is None else min(rank, needed))
    all_squares = sum(values.square().sum() for _, values, _ in layers.values())
    squares = sum(values[:size].square().sum() for _, values, _ in layers.values())
    factors = {}
    for name, (left, values, right) in layers.items():
        root = values[:size].sqrt()
        missing = size - len(root)  # a layer may have fewer dimensions than the others' rank
        b, a = (left[:, :size] * root).float(), (root[:, None] * right[:size]).float()
        factors[name] = F.pad(b, (0, missing)), F.pad(a, (0, 0, 0, missing))
    return factors, float((squares / all_squares).sqrt()) if all_squares else 1.0
