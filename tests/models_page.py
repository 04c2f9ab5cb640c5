"""The table of docs/models.md, from the table of families and tiny models: `python tests/models_page.py` writes it."""

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from families import QUICK, TINY, save_family, skeleton
from measured_memory import within
from quantised import NOT_IN_FP8
from transformers import AutoConfig, PreTrainedModel
from trl import ModelConfig

from vqa_sft.batch.image_rules import sizes_of
from vqa_sft.errors import InputError
from vqa_sft.models.families import FAMILIES
from vqa_sft.models.fast.packing import why_not
from vqa_sft.models.load import load_processor
from vqa_sft.models.lora import lora_config

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
HEAD = ("family", "`model_type`", "for example", "an adapter goes to", "if asked", "image size", "rows", "tower")
HEAD += ("4 bit", "FP8", "memory", "tested in")
# What was run on a GPU as well, with random weights: 4 bit and FP8.
ON_H200: dict[str, tuple[str, ...]] = {"4 bit": (), "FP8": ("qwen3_vl", "qwen3_vl_moe")}
# Words of a label of batch/image_rules.py, and the rule.
IMAGE_RULES = {"px a token": "area", "max_soft_tokens": "token budget", "tiles": "tiles", "slices": "slices"}
IMAGE_RULES |= {"longest edge": "longest edge"}
# What a linear layer of the language model is, by its name; the first that fits.
KINDS = {
    "shared experts": r"shared_expert",
    "linear attention": r"linear_attn\.",
    "attention": r"(self_attn|attention)\.",
    "MLP": r"(mlp|feed_forward)\.\w+$",
    "convolution": r"conv\.",
    "per-layer embeddings": r"(per_layer|ple)",
    "hyper-connections": r"hyper_connection",
}


def write_table(folder: Callable[[str], str]) -> str:
    """`folder` gives that of a tiny family."""
    variants: dict[str, list[str]] = {}
    for name in TINY:
        variants.setdefault(AutoConfig.from_pretrained(folder(name)).model_type, []).append(name)
    lines = [HEAD, ("---",) * len(HEAD)]
    for model_type, family in FAMILIES.items():
        found, asked = {}, {}  # ordered sets
        for name in variants[model_type]:
            kinds, parts = _adapted(folder(name))
            found, asked = found | kinds, asked | parts
        is_quick = any(road.partition(" + ")[0] in variants[model_type] for road in QUICK)
        examples = ", ".join(f"[{name}](https://huggingface.co/{name})" for name in family.examples)
        label = family.label + (f" (needs `{family.package}`)" if family.package else "")
        is_padded = any(why_not(AutoConfig.from_pretrained(folder(name))) for name in variants[model_type])
        lines.append(
            (
                label,
                f"`{model_type}`",
                examples,
                ", ".join(found),
                ", ".join(asked),
                _image_rule(folder(variants[model_type][0])),
                "padded" if is_padded else "packed",
                "fast" if family.packed else "",
                _tested("4 bit", variants[model_type]),
                _tested("FP8", variants[model_type], but=NOT_IN_FP8),
                f"within {percent}%" if (percent := within(model_type)) else "counted",
                "make test" if is_quick else "make test-slow",
            )
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _tested(what: str, names: list[str], but: tuple[str, ...] = ()) -> str:
    """Where log-probabilities and gradients were compared with plain transformers' and PEFT's."""
    tested = [name for name in names if name not in but]
    where = ["CPU"] if tested else []
    if any(name in ON_H200[what] for name in tested):
        where.append("H200")
    if tested and tested != names:
        where.append("dense models")
    return ", ".join(where)


def _image_rule(folder: str) -> str:
    """What `max_pixels` becomes, from the words in which `check` says it."""
    sizes = sizes_of(load_processor(folder))
    label = sizes.now.label if sizes else ""
    return next((rule for words, rule in IMAGE_RULES.items() if words in label), "its own")


def _adapted(folder: str) -> tuple[dict[str, None], dict[str, None]]:
    """Kinds of layers that a default adapter goes to, and what the fields adapt_... would add."""
    model = skeleton(folder)
    pattern = re.compile(lora_config(ModelConfig(use_peft=True), model).target_modules)
    layers = [name for name, _ in model.named_modules() if pattern.fullmatch(name)]
    kinds = {_kind(name) for name in layers}
    parts = {part: None for part in ("tower", "merger", "experts") if can_adapt(model, f"adapt_{part}")}
    ordered = [*KINDS, *sorted(kinds - KINDS.keys())]
    return {kind: None for kind in ordered if kind in kinds}, parts


def can_adapt(model: PreTrainedModel, field: str) -> bool:
    """Whether a recipe may ask for it."""
    try:
        lora_config(ModelConfig(use_peft=True), model, **{field: True})
    except InputError:
        return False
    return True


def _kind(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), name.rpartition(".")[2])


def main() -> None:
    with tempfile.TemporaryDirectory() as root:
        table = write_table(lambda name: str(save_family(name, Path(root) / name)))
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(re.sub(r"^\| family \|.*(\n\|.*)*", lambda _: table, page, count=1, flags=re.M), encoding="utf-8")


if __name__ == "__main__":
    main()
