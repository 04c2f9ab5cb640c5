"""A padded batch -> one row without padding, with everything that the model would else compute on the GPU.

    input_ids (B, T), attention_mask, mm_token_type_ids, pixel_values, image_grid_thw
        -> input_ids (1, N), position_ids (3, 1, N) or (1, N), cu_seq_lens_q, max_length_q, answer_positions (B,), ...
           pixel_values in the precision of the tower, and the tower's positions, windows and lengths

N is the number of tokens without padding, where those that all rows begin with (the system prompt) count once:

    rows  s s a a a | s s b b | s s c c c c   ->   s s a a a b b c c c c
    shared_prefix = places (M,), own (N,), copies (B, P)      M tokens in the rows written out, P of them shared

Where rows have `leaders`, what a row and its leader begin with is there once as well: the image and the question of the
orders of a row, the image of several questions about it. Such a batch is for scoring: without `copies` it has no
gradients. Attention alone sees the rows written out (attention.py), for which `cu_seq_lens_q` holds.

Made in the data loader's workers, by the library's own functions, so that no forward or copy waits for the GPU. Rows of
a model with linear attention or windows (Qwen3.5) stay padded, with the positions and what the tower needs.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig

from vqa_sft.batch.collator import supervised_positions
from vqa_sft.errors import InputError, name_rows
from vqa_sft.models.families import FAMILIES, round_up

# What the packed row makes needless.
DROPPED = ("attention_mask", "mm_token_type_ids", "grids_of_rows", "leaders")


def why_not(config: PreTrainedConfig) -> str | None:
    """Why rows of this model cannot be packed, if they cannot."""
    family = FAMILIES.get(config.model_type)
    if family is None or not (family.packed or family.packs_rows):
        return f"packing is not known for {config.model_type}"
    kinds = {*(getattr(config.text_config, "layer_types", None) or ())}
    has_windows = not kinds and getattr(config.text_config, "sliding_window", None) is not None  # Mistral
    if has_windows or kinds - {"full_attention"}:
        return f"packed rows know full attention alone; this model has {', '.join(sorted(kinds)) or 'sliding windows'}"
    if getattr(config.text_config, "attention_dropout", 0):
        return "packed rows know no attention_dropout, which this model has"
    return None


class Packer:
    """`Packer(config, dtype)(batch)`; `dtype` is that of the vision tower's weights. Images of families that are not
    `packed` stay as the processor gives them, and rows do not share them; without `packs_rows` rows stay padded.

    With `keeps_answers` the model's last layer looks for `keep_positions` and gives the answer positions alone.
    """

    def __init__(
        self, config: PreTrainedConfig, dtype: torch.dtype, *, packs_rows: bool = True, keeps_answers: bool = False
    ) -> None:
        packed = FAMILIES[config.model_type].packed
        self.packs_rows, self.has_grids = packs_rows, packed is not None
        self.shares_images = packs_rows and self.has_grids
        if packed is not None:
            # Only what `get_rope_index` asks of a model: no weights.
            shell = packed.model_class.__new__(packed.model_class)  # type: ignore[call-overload]
            nn.Module.__init__(shell)
            shell.config = config
            self.rope_index: Callable = shell.get_rope_index
            self.tower_inputs = partial(packed.tower_inputs, config.vision_config)
            self.patches_a_token = config.vision_config.spatial_merge_size**2
        self.dtype = dtype
        self.keeps_answers = keeps_answers
        self.image_token_id = config.image_token_id

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        is_token = batch["attention_mask"].bool()
        grid = batch.get("image_grid_thw")
        positions = batch["attention_mask"].cumsum(dim=1) - 1  # (B, T), of texts
        if self.has_grids:
            positions = positions.expand(3, -1, -1)
        if self.has_grids and grid is not None:
            positions, _ = self.rope_index(
                batch["input_ids"],
                batch["mm_token_type_ids"],
                image_grid_thw=batch.get("grids_of_rows", grid),
                attention_mask=is_token,
            )
        images = self.pack_images(batch["pixel_values"], grid) if self.has_grids and "pixel_values" in batch else {}
        if not self.packs_rows:
            kept = {"keep_positions": supervised_positions(batch)} if self.keeps_answers else {}
            # Padding is on the right, and no token looks at a later one: attention needs no mask.
            assert is_token[:, 0].all()
            self.check_images(batch, batch["input_ids"])
            padded = {key: value for key, value in batch.items() if key != "attention_mask"}
            return padded | {"position_ids": positions} | images | kept
        lengths = is_token.sum(dim=1)
        cu_seq_lens = F.pad(lengths.cumsum(dim=0, dtype=torch.int32), (1, 0))
        ends = int("end_positions" in batch)
        num_shared = self.num_shared(batch["input_ids"], lengths - ends)
        leaders = batch.get("leaders", torch.arange(len(lengths)))
        begins = _common_starts(batch["input_ids"], lengths, leaders)
        kept = is_token & (torch.arange(is_token.shape[1]) >= begins[:, None].clamp(min=num_shared))
        kept[0] = is_token[0]
        last = kept.sum(dim=1).cumsum(dim=0) - 1
        packed = {key: value for key, value in batch.items() if key not in DROPPED}
        packed |= {
            "input_ids": batch["input_ids"][kept][None],
            "position_ids": positions[..., kept].unsqueeze(-2),  # (3, 1, N) or (1, N)
            "answer_positions": last - ends,  # the prompt ends where the letter begins
            "cu_seq_lens_q": cu_seq_lens,
            "max_length_q": round_up(int(lengths.max())),
        }
        if ends:
            packed["end_positions"] = last
        if num_shared or begins.any():
            packed["shared_prefix"] = _shared_prefix(is_token, kept, cu_seq_lens[:-1], num_shared, leaders, begins)
        if self.keeps_answers:
            packed["keep_positions"] = supervised_positions(packed).flatten()
        self.check_images(batch, packed["input_ids"])
        return packed | images

    def check_images(self, batch: dict[str, Any], input_ids: torch.Tensor) -> None:
        """Raises InputError where image tokens and features are not as many: the GPU would know too late (vision.py).

        The collator writes as many tokens for an image of a prompt as its grid says, and texts hold no control tokens:
        left is a chat template that leaves images out.
        """
        if not self.has_grids:
            return
        num_features = 0
        if "image_features" in batch:
            num_features = batch["image_features"].shape[-2]
        elif "image_grid_thw" in batch:
            num_features = int(batch["image_grid_thw"].prod(dim=-1).sum()) // self.patches_a_token
        num_tokens = int((input_ids == self.image_token_id).sum())
        if num_tokens != num_features:
            ids = [*dict.fromkeys(batch["ids"])]
            raise InputError(
                f"image tokens and image features do not match in {name_rows(ids, len(ids))}: {num_tokens} tokens, "
                f"{num_features} features. Take a chat template that shows every image once."
            )

    def num_shared(self, input_ids: torch.Tensor, lengths: torch.Tensor) -> int:
        """How many tokens all rows begin with, before any image; 0 where it is not worth the trouble."""
        if len(input_ids) == 1:
            return 0
        differs = (input_ids != input_ids[0]).any(dim=0) | (input_ids == self.image_token_id).any(dim=0)
        differs[int(lengths.min()) - 1 :] = True  # every row keeps its answer position
        num_shared = int(differs.int().argmax())
        return num_shared if num_shared > 1 else 0

    def pack_images(self, pixel_values: torch.Tensor, grid: torch.Tensor) -> dict[str, Any]:
        """What the tower is given: pixels in its precision, positions, windows and lengths."""
        computed = {f"image_{name}": value for name, value in self.tower_inputs(grid).items()}
        return {"pixel_values": pixel_values.to(self.dtype)} | computed


def _common_starts(input_ids: torch.Tensor, lengths: torch.Tensor, leaders: torch.Tensor) -> torch.Tensor:
    """How many tokens a row begins with that its leader begins with too, (B,); 0 for one that leads itself, and never
    the answer position of either."""
    differs = input_ids != input_ids[leaders]
    differs |= torch.arange(input_ids.shape[1]) >= torch.minimum(lengths, lengths[leaders])[:, None] - 1
    return differs.int().argmax(dim=1) * (leaders != torch.arange(len(leaders)))


def _shared_prefix(
    is_token: torch.Tensor,
    kept: torch.Tensor,
    starts: torch.Tensor,
    num_shared: int,
    leaders: torch.Tensor,
    begins: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From masks (B, T) of the rows' tokens and of those that stand in the packed row, and where the rows written out
    start (B,): for each token written out, its place in the packed row; for each of the packed row, its (first) place
    in the rows written out; where the shared ones are."""
    shared = torch.arange(num_shared)
    place = (kept.flatten().cumsum(dim=0) - 1).view(kept.shape)
    place[:, :num_shared] = shared
    is_led = torch.arange(kept.shape[1]) < begins[:, None]
    for _ in range(2):  # a leader may have one that leads itself, whose places it takes first
        place = torch.where(is_led, place[leaders], place)
    written = (is_token.flatten().cumsum(dim=0) - 1).view(kept.shape)
    copies = starts.long()[:, None] + shared
    return place[is_token], written[kept], copies[:0] if begins.any() else copies
