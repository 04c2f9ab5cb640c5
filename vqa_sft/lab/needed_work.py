"""What a model must compute for one example, in floating-point operations: never padding, nor anything twice.

    what                                    operations, forward
    a weight                                2 a token that meets it: experts those of the chosen ones, a tower's its
                                            patches, a projector's the tokens of images; the answer alone those of
                                            `lm_head`, of the last layer's MLP, and of layers that take keys and values
                                            of an earlier one (Gemma 4 E); tables that are looked up: none
    attention, n tokens of d (all heads)    2 n^2 d: half of all pairs, for the products with keys and with values
    the same with a window of w < n         4 (w n - w^2 / 2) d
    gated delta rule, a token and head      6 k v: the state of k x v is read by the key, changed, read by the query
    attention of a tower, n patches of d    4 n^2 d for each image, window or tile that sees itself

Nothing for norms, activations, rotations and gates. Training adds the gradient of the decoder's activations, as much
again as its forward; the tower is frozen. LoRA (1%) is left out.
"""

from dataclasses import dataclass, field

import torch
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel, ProcessorMixin

from vqa_sft.models.parts import decoder_name

_TABLES = ("position_embedding", "pos_emb", "position_embeddings")
_OF_TOKENS = ("merger", "projector", "embed_vision")  # of a tower's parts: what meets tokens rather than patches


@dataclass
class Work:
    """Counted once a model. `decoder` and `tower` give the operations of an example."""

    config: PreTrainedConfig
    weights: float = 0.0  # that every token meets
    answer_weights: float = 0.0  # that the answer alone must meet
    tower_weights: float = 0.0  # that every patch meets
    projector_weights: float = 0.0  # that every token of an image meets
    # Of a layer: width of all heads, window, whether the answer alone must see the others.
    attention: list[tuple[int, int | None, bool]] = field(default_factory=list)
    states: float = 0.0  # k x v of all heads and layers of the gated delta rule

    def decoder(self, num_tokens: int, num_spared: float = 0.0, *, is_plain: bool = False) -> float:
        """Another row has computed `num_spared` of the tokens; attention meets them all the same. `is_plain`: what a
        forward does that knows neither that pairs are causal nor what the answer alone needs."""
        computed = num_tokens - num_spared
        weights = computed * self.weights + (computed if is_plain else 1) * self.answer_weights
        total = 2 * weights + 6 * computed * self.states
        for width, window, of_answer in self.attention:
            seen = min(window or num_tokens, num_tokens)
            pairs = seen if of_answer else seen * num_tokens - seen**2 / 2
            total += 4 * width * (num_tokens**2 if is_plain else pairs)
        return total

    def tower(self, num_patches: int) -> float:
        """Of one image, or of the tiles of one."""
        vision = self.config.vision_config
        num_tokens = num_patches / self.patches_a_token
        total = 2 * (num_patches * self.tower_weights + num_tokens * self.projector_weights)
        layers = getattr(vision, "num_hidden_layers", 0)  # Gemma 4 12B has none
        if not layers or not num_patches:
            return total
        seen = float(layers * num_patches)  # by a patch, in all layers
        if self.config.model_type == "internvl":
            seen = layers * (self.patches_a_tile + 1)
        elif self.config.model_type == "qwen2_5_vl":
            whole = len(vision.fullatt_block_indexes)
            seen = whole * num_patches + (layers - whole) * vision.window_size**2 / vision.patch_size**2
        return total + 4 * num_patches * seen * vision.hidden_size

    def num_patches(self, processor: ProcessorMixin, height: int, width: int) -> int:
        """Of an image as the processor shows it. Ministral's line breaks count as tokens of the image."""
        counted = processor._get_num_multimodal_tokens(image_sizes=[(height, width)])
        if self.config.model_type == "internvl":
            return counted.num_image_patches[0] * self.patches_a_tile  # its "patches" are tiles
        if self.config.model_type.startswith("qwen"):
            return counted.num_image_patches[0]
        return counted.num_image_tokens[0] * self.patches_a_token

    @property
    def patches_a_tile(self) -> int:
        vision = self.config.vision_config
        return (vision.image_size[0] // vision.patch_size[0]) * (vision.image_size[1] // vision.patch_size[1])

    @property
    def patches_a_token(self) -> int:
        """A patch of Gemma 4 12B is a token: nothing sees it smaller."""
        if self.config.model_type == "gemma4_unified":
            return 1
        if self.config.model_type == "internvl":
            return round(self.config.downsample_ratio**-2)
        vision = self.config.vision_config
        own = getattr(vision, "spatial_merge_size", None) or getattr(vision, "pooling_kernel_size", None)
        return (own or self.config.spatial_merge_size) ** 2


def count_work(config: PreTrainedConfig) -> Work:
    """Count the weights of the model on the meta device."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    text = config.get_text_config()
    work = Work(config, answer_weights=text.hidden_size * text.vocab_size)
    decoder = f"{decoder_name(model)}."
    last, shared = text.num_hidden_layers - 1, _first_shared(text)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding) or "audio" in name or name == "lm_head":
            continue
        for weight_name, weight in module.named_parameters(recurse=False):
            if weight.ndim < 2 or any(table in f"{name}.{weight_name}" for table in _TABLES):
                continue
            size: float = weight.numel()
            if "experts" in name and weight.ndim == 3:
                size *= _num_chosen(text) / weight.shape[0]
            if name.startswith(decoder):
                place = name.removeprefix(decoder).split(".")
                layer = int(place[1]) if place[0] == "layers" else -1
                if layer >= shared or layer == last and "attn" not in place[2]:
                    work.answer_weights += size
                else:
                    work.weights += size
            elif any(part in name for part in _OF_TOKENS):
                work.projector_weights += size
            else:
                work.tower_weights += size
    _count_attention(work, model)
    return work


def _first_shared(text: PreTrainedConfig) -> int:
    """The first layer that has no keys and values of its own, as have those after it."""
    return text.num_hidden_layers - (getattr(text, "num_kv_shared_layers", 0) or 0)


def _num_chosen(text: PreTrainedConfig) -> int:
    return getattr(text, "num_experts_per_tok", None) or text.top_k_experts


def _count_attention(work: Work, model: PreTrainedModel) -> None:
    text = work.config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    for i, (layer, kind) in enumerate(zip(model.get_decoder().layers, kinds, strict=True)):
        if kind == "linear_attention":
            delta = layer.linear_attn
            work.states += delta.num_v_heads * delta.head_k_dim * delta.head_v_dim
        else:
            window = text.sliding_window if kind == "sliding_attention" else None
            work.attention.append((layer.self_attn.o_proj.in_features, window, i >= _first_shared(text)))
