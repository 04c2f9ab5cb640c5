"""The loss of one step and its gradients: compiled, and by a CUDA graph on a GPU."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from vqa_sft.models.fast.graphs import Capture
from vqa_sft.tiny.forward import FORWARDS, answer_logits

MAX_ANSWER_TOKENS = 8
END_WEIGHT = 0.2  # of the end-of-turn token, beside 1 for every other token of an answer
COMPILED = 3  # steps, until what is compiled on a GPU was


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


def compile_loss(model: PreTrainedModel) -> Callable[..., torch.Tensor]:
    """`answer_loss` in one graph. The eight layers of Qwen3.5 take more than four minutes in one: there each layer is a
    graph (those of a kind share it), and the picture tower another."""
    if model.config.model_type != "qwen3_5":
        return torch.compile(answer_loss)
    features, inputs = FORWARDS["qwen3_5"]
    FORWARDS["qwen3_5"] = torch.compile(features), inputs
    for layer in model.model.language_model.layers:
        layer.compile()
    return answer_loss


def answer_gradients(
    model: PreTrainedModel, loss_function: Callable[..., torch.Tensor], batch: Sequence[torch.Tensor]
) -> torch.Tensor:
    """The loss of a batch, under bf16 on a GPU; its gradients take the place of the last ones."""
    model.zero_grad()
    device = batch[0].device.type
    # One state of autocast, with and without a graph: what is compiled holds for one.
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda", cache_enabled=False):
        loss = loss_function(model, *batch)
    loss.backward()
    return loss.detach()


def by_graph(
    gradients: Callable[[Sequence[torch.Tensor]], torch.Tensor], batch: Sequence[torch.Tensor], capture: Capture
) -> Callable[[Sequence[torch.Tensor]], torch.Tensor]:
    """`gradients` by one CUDA graph: of so small a model Python takes longer to launch the kernels of a step than they
    take. All batches have the shape of the given one. Says where it cannot be captured."""
    own = [tensor.clone() for tensor in batch]
    try:
        replay = capture(lambda: [gradients(own)])
    except RuntimeError as error:
        print(f"no CUDA graph: {error}", flush=True)
        return gradients

    def replayed(batch: Sequence[torch.Tensor]) -> torch.Tensor:
        for tensor, given in zip(own, batch, strict=True):
            tensor.copy_(given)
        return replay()[0].clone()

    return replayed
