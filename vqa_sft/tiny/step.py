"""The loss of one step and its gradients, on a GPU by a CUDA graph."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.models.qwen3_5 import modeling_qwen3_5

from vqa_sft.models.fast.graphs import Capture
from vqa_sft.tiny.forward import answer_logits

MAX_ANSWER_TOKENS = 8
END_WEIGHT = 0.2  # of the end-of-turn token, beside 1 for every other token of an answer
WARM_UP = 3  # steps before one is captured


def answer_loss(
    model: PreTrainedModel,
    pixels: torch.Tensor,
    input_ids: torch.Tensor,
    image_starts: torch.Tensor,
    answer_starts: torch.Tensor,
    lengths: torch.Tensor,
) -> torch.Tensor:
    """Weighted mean cross-entropy over the answers' tokens."""
    logits = answer_logits(model, pixels, input_ids, image_starts, answer_starts, MAX_ANSWER_TOKENS)
    at = answer_starts[:, None] + torch.arange(MAX_ANSWER_TOKENS, device=pixels.device)
    targets = input_ids.gather(1, at.clamp(max=input_ids.shape[1] - 1))
    weights = (at < lengths[:, None] - 1).float() + END_WEIGHT * (at == lengths[:, None] - 1)
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


def use_short_chunks() -> None:
    """Linear attention of Qwen3.5 solves a triangular system for each chunk of a row: of 16 tokens in place of 64, with
    the same result, in half the time on a CPU."""
    whole = modeling_qwen3_5.torch_chunk_gated_delta_rule
    modeling_qwen3_5.torch_chunk_gated_delta_rule = partial(whole, chunk_size=16)


def answer_gradients(model: PreTrainedModel, batch: Sequence[torch.Tensor]) -> torch.Tensor:
    """The loss of a batch, under bf16 on a GPU; its gradients take the place of the last ones."""
    model.zero_grad()
    device = batch[0].device.type
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        loss = answer_loss(model, *batch)
    loss.backward()
    return loss.detach()


def by_graph(
    gradients: Callable[[Sequence[torch.Tensor]], torch.Tensor], batch: Sequence[torch.Tensor], capture: Capture
) -> Callable[[Sequence[torch.Tensor]], torch.Tensor]:
    """`gradients` by one CUDA graph, in place of kernels that Python launches one by one. All batches have the shape of
    the given one. Prints why where it cannot be captured."""
    own = [tensor.clone() for tensor in batch]
    try:
        (replay,) = capture(lambda: [gradients(own)])
    except RuntimeError as error:
        print(f"no CUDA graph: {error}", flush=True)
        return gradients

    def replayed(batch: Sequence[torch.Tensor]) -> torch.Tensor:
        for tensor, given in zip(own, batch, strict=True):
            tensor.copy_(given)
        return replay()[0].clone()

    return replayed
