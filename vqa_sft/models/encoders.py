"""Image encoders: one vector an image, of the base model's own vision tower or of any vision model of transformers.

    load_encoder("Qwen/Qwen2.5-VL-7B-Instruct", ...)      mean of what its merger or projector gives
    load_encoder("google/siglip2-base-patch16-384", ...)  the model's own pooled output, else the mean of its tokens

A worker makes `prepare(processor, is_batched, images)`, of which `encoder.encode(inputs)` makes (B, D) on its device.
"""

import copy
import hashlib
import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import PIL
import torch
import transformers
from PIL import Image
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from trl import ModelConfig

from vqa_sft.console import note
from vqa_sft.errors import InputError
from vqa_sft.models.load import DTYPES, LOADING_ERRORS, build_skeleton, load_model, load_processor
from vqa_sft.models.parts import decoder_name, names_beside_decoder
from vqa_sft.models.quantized import quantization_of

FORMAT = 1  # count up when features change
Inputs = list[dict[str, torch.Tensor]]  # one of a batch, or one an image
# Two images that processors which cut images into tiles would cut.
_TRIAL_PX = ((1200, 800), (800, 1200))


@dataclass
class Encoder(ABC):
    """A frozen model and its image processor. Workers get the processor alone."""

    name: str
    model: PreTrainedModel
    processor: Any  # of images
    precision: str
    is_batched: bool = True  # else images are encoded one by one

    @property
    @abstractmethod
    def modules(self) -> list[nn.Module]:
        """What an image passes through."""

    @abstractmethod
    def pool(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """(B, D) of one call of the model."""

    @torch.inference_mode()
    def encode(self, inputs: Inputs) -> torch.Tensor:
        """(B, D) float32, on the CPU."""
        return torch.cat([self.pool(self.placed(part)).float().cpu() for part in inputs])

    def placed(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """On the model's device and, what has a fraction, in its precision."""
        weight = next(self.modules[0].parameters())
        tensors = {name: value.to(weight.device) for name, value in inputs.items() if torch.is_tensor(value)}
        floats = {name: value.to(weight.dtype) for name, value in tensors.items() if value.is_floating_point()}
        return dict(inputs) | tensors | floats

    def key(self) -> str:
        """A digest of everything but the image that its features depend on."""
        digest = hashlib.sha256()
        for module in self.modules:
            for name, tensor in module.state_dict().items():
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        config = self.model.config.to_dict()
        config.pop("_name_or_path", None)
        versions = (FORMAT, PIL.__version__, transformers.__version__)
        settings = (versions, type(self).__name__, self.precision, config, self.processor.to_dict())
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
        return digest.hexdigest()[:32]

    def to(self, device: torch.device | str) -> "Encoder":
        for module in self.modules:
            module.to(device)
        return self

    def copies(self, devices: Sequence[torch.device]) -> "list[Encoder]":
        """One on each device; the first is this one."""
        return [self.to(devices[0]), *(copy.deepcopy(self).to(device) for device in devices[1:])]


def prepare(processor: Any, is_batched: bool, images: Sequence[Image.Image]) -> Inputs:
    """What `Encoder.encode` takes, of RGB images; runs in a worker."""
    parts = [list(images)] if is_batched else [[image] for image in images]
    return [dict(processor(images=part, return_tensors="pt")) for part in parts]


class TowerEncoder(Encoder):
    """The vision tower of a vision-language model, with its merger or projector: the mean of an image's tokens."""

    @property
    def modules(self) -> list[nn.Module]:
        parts = (name for name in names_beside_decoder(self.model) if "audio" not in name)
        return [self.model.get_submodule(name) for name in parts]

    def to(self, device: torch.device | str) -> "Encoder":
        parent = self.model.get_submodule(decoder_name(self.model).rpartition(".")[0])
        for weight in parent.parameters(recurse=False):  # what ends the lines of an image (LLaVA-NeXT)
            weight.data = weight.data.to(device)
        return super().to(device)

    def pool(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        tokens = self.tokens(inputs)
        if self.is_batched:
            return torch.stack([of_image.float().mean(dim=0) for of_image in tokens])
        return torch.cat([part.float().reshape(-1, part.shape[-1]) for part in tokens]).mean(dim=0, keepdim=True)

    def tokens(self, inputs: Mapping[str, Any]) -> Sequence[torch.Tensor]:
        """Tokens (T, D) of each image; of each tile or of all images, where the family gives no more."""
        method = self.model.get_image_features
        names = _arguments(method) or _arguments(self.model.base_model.get_image_features)
        return _pooled(method(**{name: value for name, value in inputs.items() if not names or name in names}))

    def finds_images(self) -> bool:
        """Whether a batch of images gives tokens image by image."""
        images = [Image.new("RGB", size, "grey") for size in _TRIAL_PX]
        with torch.inference_mode():
            (inputs,) = prepare(self.processor, True, images)
            return len(self.tokens(self.placed(inputs))) == len(images)


class NamedEncoder(Encoder):
    """A vision model, or a pair of image and text encoders."""

    takes_mean: bool = False  # the checkpoint has no weights for the pooling layer

    @property
    def modules(self) -> list[nn.Module]:
        return [self.model]

    def pool(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        if hasattr(self.model, "get_image_features"):
            names = _arguments(self.model.get_image_features)
            return _pooled(self.model.get_image_features(**{name: inputs[name] for name in inputs if name in names}))
        names = _arguments(self.model.forward)
        outputs = self.model(**{name: inputs[name] for name in inputs if name in names})
        pooled = getattr(outputs, "pooler_output", None)
        if pooled is not None and not self.takes_mean:
            return pooled.flatten(1)  # convolutions: (B, D, 1, 1)
        hidden = outputs.last_hidden_state
        return hidden.mean(dim=1) if hidden.ndim == 3 else hidden.flatten(2).mean(dim=2)

    @property
    def reads_text(self) -> bool:
        return hasattr(self.model, "get_text_features")

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str], batch_size: int = 256) -> torch.Tensor:
        """(texts, D) float32 of length 1, on the CPU; of an encoder that reads text."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.name)
        except LOADING_ERRORS as error:
            raise InputError(f"the tokenizer of {self.name} cannot be loaded: {_first_line(error)}") from error
        # SigLIP was trained with texts of full length.
        padding = "max_length" if self.model.config.model_type.startswith("siglip") else True
        names, found = _arguments(self.model.get_text_features), []
        for start in range(0, len(texts), batch_size):
            tokens = tokenizer(
                list(texts[start : start + batch_size]),
                padding=padding,
                truncation=True,
                max_length=self.model.config.text_config.max_position_embeddings,
                return_tensors="pt",
            )
            inputs = {name: value.to(self.model.device) for name, value in tokens.items() if name in names}
            found.append(_pooled(self.model.get_text_features(**inputs)).float().cpu())
        return nn.functional.normalize(torch.cat(found), dim=-1)


def load_encoder(
    name: str,
    precision: str,
    device: torch.device | str = "cpu",
    *,
    max_pixels: int | None = None,
    min_pixels: int | None = None,
    revision: str = "main",
    trust_remote_code: bool = False,
) -> Encoder:
    """The encoder on the device, in the precision. The limits of pixels are those of a vision-language model alone.

    Raises InputError where the model is not there, has no image processor, or misses weights.
    """
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except LOADING_ERRORS as error:
        raise _cannot_load(name, error) from error
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or trust_remote_code:
        options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        processor = load_processor(name, min_pixels=min_pixels, max_pixels=max_pixels, **options)
        model = _load_tower(name, precision, revision, trust_remote_code)
        tower = TowerEncoder(name, model, processor.image_processor, precision)
        tower.to(device)
        tower.is_batched = tower.finds_images()
        return tower
    return _load_named(name, precision, revision).to(device)


def _load_named(name: str, precision: str, revision: str) -> NamedEncoder:
    try:
        processor = AutoImageProcessor.from_pretrained(name, revision=revision)
        model, loaded = AutoModel.from_pretrained(
            name, revision=revision, dtype=DTYPES[precision], use_safetensors=True, output_loading_info=True
        )
    except LOADING_ERRORS as error:
        raise _cannot_load(name, error) from error
    missing = sorted(loaded["missing_keys"])
    lacks_pooler = bool(missing) and all("pooler." in weight or weight.startswith("head.") for weight in missing)
    if (missing and not lacks_pooler) or loaded["mismatched_keys"]:
        raise InputError(
            f"the checkpoint {name!r} does not hold the weights of {type(model).__name__}: {', '.join(missing[:3])}. "
            "Take another encoder."
        )
    encoder = NamedEncoder(name, model.eval(), processor, precision)
    encoder.takes_mean = lacks_pooler
    if lacks_pooler:
        note(f"{name} has no weights for its pooling layer: features are the mean of its tokens.")
    return encoder


def _load_tower(name: str, precision: str, revision: str, trust_remote_code: bool) -> PreTrainedModel:
    """A vision-language model whose language model has no weights (they stay on the meta device), unless the checkpoint
    is quantised."""
    dtype = str(DTYPES[precision]).removeprefix("torch.")
    args = ModelConfig(model_name_or_path=name, model_revision=revision, dtype=dtype)
    skeleton = build_skeleton(args, trust_remote_code=trust_remote_code)
    places: dict[str, Any] | None = {"": "cpu", decoder_name(skeleton): "meta"}
    if any(child == "lm_head" for child, _ in skeleton.named_children()):
        places["lm_head"] = "meta"
    if is_quantised := quantization_of(skeleton.config) is not None:
        places = None
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "unpacks_fp8": is_quantised}
    with _without_hooks():
        return load_model(args, precision, device_map=places, **options).eval()


@contextmanager
def _without_hooks() -> Iterator[None]:
    """transformers 5.23 takes weights on "meta" for offloaded ones: accelerate would move the others there too."""
    kept = transformers.modeling_utils.accelerate_dispatch
    transformers.modeling_utils.accelerate_dispatch = lambda *args, **kwargs: None
    try:
        yield
    finally:
        transformers.modeling_utils.accelerate_dispatch = kept


def _arguments(method: Any) -> set[str]:
    """The names that a method takes, but not those that it passes on."""
    found = inspect.signature(method).parameters.values()
    return {param.name for param in found if param.kind not in (param.VAR_KEYWORD, param.VAR_POSITIONAL)} - {"self"}


def _pooled(outputs: Any) -> Any:
    pooled = getattr(outputs, "pooler_output", outputs)
    return outputs.last_hidden_state if pooled is None else pooled


def _cannot_load(name: str, error: Exception) -> InputError:
    if "requires the timm library" in str(error):
        return InputError(f"the encoder {name!r} is one of timm. Install it: pip install timm.")
    return InputError(f"the encoder {name!r} cannot be loaded: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
