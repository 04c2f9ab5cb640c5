"""The forward of training: pictures of one size, so that a batch is one call of every layer.

It gives the numbers of the library's own forward, which loops over pictures or over their windows (Qwen), or drops
padding by a mask whose shape nobody knows in advance (Gemma).
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from vqa_sft.tiny.draw import PICTURE_PX

PATCH_PX, MERGE = 14, 2  # of Qwen
GRID = PICTURE_PX // PATCH_PX  # 6 patches
NUM_PATCHES, NUM_TOKENS = GRID**2, (GRID // MERGE) ** 2
# Gemma's smallest budget is 70 tokens: a square picture becomes 8 x 8 of them, each of 2 x 2 patches.
GEMMA_PATCH_PX, GEMMA_POOLING, GEMMA_GRID = 6, 2, 16
GEMMA_PATCHES, GEMMA_TOKENS = GEMMA_GRID**2, (GEMMA_GRID // GEMMA_POOLING) ** 2


def picture_span(image_starts: torch.Tensor, num_tokens: int, num_picture_tokens: int) -> tuple[torch.Tensor, ...]:
    """Of every token, (B, T) each: its place after the first picture token, and whether it is one of the picture."""
    offset = torch.arange(num_tokens, device=image_starts.device) - image_starts[:, None]
    return offset, (offset >= 0) & (offset < num_picture_tokens)


# ---- Qwen2.5-VL and Qwen3.5


def to_patches(pixels: torch.Tensor) -> torch.Tensor:
    """(B, 84, 84, 3) bytes -> (B, 36, 1176) normalised patches in the processor's order: four of one token together."""
    # OpenAI CLIP's mean and deviation, as in the saved processor.
    mean = _filled(pixels, 0.48145466, 0.4578275, 0.40821073)
    deviation = _filled(pixels, 0.26862954, 0.26130258, 0.27577711)
    x = ((pixels.float() / 255 - mean) / deviation).permute(0, 3, 1, 2)
    side = GRID // MERGE
    x = x.reshape(len(x), 3, side, MERGE, PATCH_PX, side, MERGE, PATCH_PX).permute(0, 2, 5, 3, 6, 1, 4, 7)
    # A still picture is shown twice: the tower's patches are two frames deep.
    return x.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, 2, -1, -1).reshape(len(pixels), NUM_PATCHES, -1)


def _filled(like: torch.Tensor, *values: float) -> torch.Tensor:
    """The values, made on the device of `like`: a CUDA graph cannot hold a copy from the CPU."""
    return torch.stack([torch.full((), value, device=like.device) for value in values])


def patch_places(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of each patch in the processor's order, (36,) each."""
    side = GRID // MERGE
    rows = torch.arange(GRID, device=device)[:, None].expand(GRID, GRID)

    def by_token(grid: torch.Tensor) -> torch.Tensor:
        return grid.reshape(side, MERGE, side, MERGE).permute(0, 2, 1, 3).flatten()

    return by_token(rows), by_token(rows.T)


def qwen_features(model: PreTrainedModel, pixels: torch.Tensor) -> torch.Tensor:
    """What the library's picture tower gives, (B, 9, D), with every window of the batch in one attention call."""
    visual, patches = model.model.visual, to_patches(pixels)
    rows, columns = patch_places(patches.device)
    head_dim = visual.config.hidden_size // visual.config.num_heads
    frequencies = 10000 ** -(torch.arange(0, head_dim // 2, 2, device=patches.device) / (head_dim // 2))
    angles = torch.cat([rows[:, None] * frequencies, columns[:, None] * frequencies], -1).repeat(1, 2)  # (36, head_dim)
    masks = [None] * visual.config.depth
    if model.config.model_type == "qwen2_5_vl":
        window_patches = visual.config.window_size // PATCH_PX
        window = rows // window_patches * GRID + columns // window_patches
        same_window = window[:, None] == window[None, :]  # (36, 36)
        full = visual.config.fullatt_block_indexes
        masks = [None if i in full else same_window for i in range(visual.config.depth)]

    x = F.linear(patches, visual.patch_embed.proj.weight.flatten(1), visual.patch_embed.proj.bias)
    if model.config.model_type == "qwen3_5":
        x = x + visual.pos_embed(rows * GRID + columns)  # its grid is that of the pictures
    for block, mask in zip(visual.blocks, masks, strict=True):
        x = x + _attend(block.attn, block.norm1(x), angles.cos(), angles.sin(), mask)
        x = x + block.mlp(block.norm2(x))
    return visual.merger(x).view(len(patches), NUM_TOKENS, -1)


def _attend(
    attention: torch.nn.Module, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    q, k, v = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, 36, d)
    q, k = _rotate(q, cos, sin).to(v.dtype), _rotate(k, cos, sin).to(v.dtype)
    return attention.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def qwen_positions(model: PreTrainedModel, image_starts: torch.Tensor, num_tokens: int) -> dict[str, Any]:
    """Time, row and column of every token, (3, B, T): the nine picture tokens take three steps, text takes one each."""
    side = GRID // MERGE
    offset, inside = picture_span(image_starts, num_tokens, NUM_TOKENS)
    steps = torch.arange(num_tokens, device=image_starts.device)
    text = torch.where(offset >= NUM_TOKENS, steps - NUM_TOKENS + side, steps)
    start = image_starts[:, None].expand_as(offset)
    places = (start, start + offset // side, start + offset % side)
    return {"position_ids": torch.stack([torch.where(inside, place, text) for place in places])}


# ---- Gemma 4


def to_gemma_patches(pixels: torch.Tensor) -> torch.Tensor:
    """(B, 84, 84, 3) bytes -> (B, 256, 108) of 0 to 1, row by row, from pictures enlarged as the processor does it."""
    x = pixels.permute(0, 3, 1, 2).float()
    x = F.interpolate(x, size=GEMMA_GRID * GEMMA_PATCH_PX, mode="bicubic", antialias=True)
    x = x.round().clamp(0, 255) / 255
    x = x.reshape(len(x), 3, GEMMA_GRID, GEMMA_PATCH_PX, GEMMA_GRID, GEMMA_PATCH_PX)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(len(x), GEMMA_PATCHES, -1)


def gemma_features(model: PreTrainedModel, pixels: torch.Tensor) -> torch.Tensor:
    """What the library's picture tower gives, (B, 64, D); no patch is padding."""
    tower, patches = model.model.vision_tower, to_gemma_patches(pixels)
    steps = torch.arange(GEMMA_GRID, device=pixels.device)
    places = torch.cartesian_prod(steps, steps).flip(-1).expand(len(patches), -1, -1)  # column and row, (B, 256, 2)
    padding = torch.zeros(places.shape[:2], dtype=torch.bool, device=pixels.device)
    x = tower.patch_embedder(patches, places, padding)
    x = tower.encoder(inputs_embeds=x, attention_mask=None, pixel_position_ids=places).last_hidden_state
    x, _ = tower.pooler(x, places, padding, GEMMA_TOKENS)
    return model.model.embed_vision(x)


def gemma_masks(model: PreTrainedModel, image_starts: torch.Tensor, num_tokens: int) -> dict[str, Any]:
    """In layers with a window, tokens of the picture see each other in both directions; (B, 1, T, T)."""
    _, inside = picture_span(image_starts, num_tokens, GEMMA_TOKENS)
    steps = torch.arange(num_tokens, device=image_starts.device)
    seen = (steps[None, :] <= steps[:, None]) | (inside[:, :, None] & inside[:, None, :])
    near = steps[None, :] > steps[:, None] - model.config.text_config.sliding_window
    return {"attention_mask": {"full_attention": None, "sliding_attention": (seen & near)[:, None]}}


# ---- all


def answer_logits(
    model: PreTrainedModel,
    pixels: torch.Tensor,
    input_ids: torch.Tensor,
    image_starts: torch.Tensor,
    answer_starts: torch.Tensor,
    num_answer_tokens: int,
) -> torch.Tensor:
    """Logits of the answer's tokens, (B, num_answer_tokens, V). Padding is on the right, so no mask is needed."""
    get_features, get_inputs = FORWARDS[model.config.model_type]
    embeds = model.get_input_embeddings()(input_ids)
    features = get_features(model, pixels)  # (B, N, D)
    batch, width = len(input_ids), embeds.shape[-1]
    at = image_starts[:, None] + torch.arange(features.shape[1], device=pixels.device)
    embeds = embeds.scatter(1, at[..., None].expand(-1, -1, width), features.to(embeds.dtype))
    hidden = model.model.language_model(
        inputs_embeds=embeds, use_cache=False, **get_inputs(model, image_starts, input_ids.shape[1])
    ).last_hidden_state
    before = answer_starts[:, None] - 1 + torch.arange(num_answer_tokens, device=pixels.device)
    before = before.clamp(max=input_ids.shape[1] - 1)
    return model.lm_head(hidden.gather(1, before[..., None].expand(batch, -1, width)))


# Of a model type: the picture's tokens, and what else its language model takes.
FORWARDS = {
    "qwen2_5_vl": (qwen_features, qwen_positions),
    "qwen3_5": (qwen_features, qwen_positions),
    "gemma4": (gemma_features, gemma_masks),
}
