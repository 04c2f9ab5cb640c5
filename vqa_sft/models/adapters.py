"""Adapters of several runs that take turns in one model: the base is loaded once.

Each run's weights lie on the device (80 MB for rank 16 of a 7B model in bf16) and are copied into the one adapter that
the model has, so packed rows, fused adapters and compiled layers hold for all of them.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file

from vqa_sft.errors import InputError
from vqa_sft.models.parts import names_beside_decoder

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What says where an adapter comes from, not what it is.
_ORIGIN = ("base_model_name_or_path", "revision", "inference_mode", "task_type", "peft_version", "auto_mapping")


def kind_of(folder: str | Path) -> str | None:
    """Equal for adapters that can take turns; None for a folder without one. Raises InputError for a damaged one."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kept = {name: value for name, value in config.items() if name not in _ORIGIN}
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({type(error).__name__}). Train the run again.") from error
    # Layers are saved in any order.
    return json.dumps({name: sorted(v) if isinstance(v, list) else v for name, v in kept.items()}, sort_keys=True)


class Adapters:
    """`folders` are runs of one `kind_of`, the first of which `model` has loaded, on its device."""

    def __init__(self, model: PeftModel, folders: Sequence[str]) -> None:
        self.base = model.get_base_model()
        self._own = get_peft_model_state_dict(model, save_embedding_layers=False)  # the weights themselves, not copies
        self._runs = [self._read(folder) for folder in folders]
        self._used: int | None = None
        beside = tuple(f"base_model.model.{part}." for part in names_beside_decoder(self.base))
        self.share_tower = not any(name.startswith(beside) for name in self._own)

    def use(self, run: int) -> None:
        """Let the model be that of a run until the next call: threads hold a lock until the end of their forward."""
        if run == self._used:
            return
        with torch.no_grad():
            for name, tensor in self._runs[run].items():
                self._own[name].copy_(tensor)
        self._used = run

    def _read(self, folder: str) -> dict[str, torch.Tensor]:
        try:
            tensors = load_file(Path(folder) / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise InputError(f"the adapter in {folder} cannot be read: {error}. Train the run again.") from error
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        if shapes != {name: tensor.shape for name, tensor in self._own.items()}:
            raise InputError(f"the adapter in {folder} has other weights than its {CONFIG} says. Train the run again.")
        return {name: tensor.to(self._own[name]) for name, tensor in tensors.items()}
