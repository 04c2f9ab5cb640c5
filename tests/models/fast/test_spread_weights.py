"""The speed-ups of a model whose weights FSDP2 spreads over two processes: torch's own, for accelerate's would silently
be DDP on a CPU."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from gradients import road_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from vqa_sft.batch.collator import AnswerCollator
from vqa_sft.batch.prompts import Prompts
from vqa_sft.models import processes
from vqa_sft.models.families import tower_of
from vqa_sft.models.fast import speedups
from vqa_sft.models.scoring import answer_logits


def compare_gradients(rank, contest, model_folder, adapts_experts, folder):
    """Writes how far the gradients of spread weights are from those of whole ones, as a share of the largest, and how
    often a block of the tower ran backward."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    model, processor, letter_ids, rows = road_of(model_folder, contest, adapt_experts=adapts_experts)
    model.enable_input_require_grads()  # as gradient checkpointing does, for the tower's embedding too
    base, processes.shards_weights = model.get_base_model(), lambda: True
    packer = speedups.pack_rows(base, "fp32")
    collator = AnswerCollator(processor, Prompts(), 4, packer=packer)
    shares = [collator(rows[:2]), collator(rows[3:])]  # every row has an image

    def backward(batch):
        answer_logits(model, batch)[:, letter_ids].log_softmax(dim=1)[:, 0].sum().backward()

    for share in shares:
        backward(share)
    whole = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}
    model.zero_grad()
    speedups.speed_up_training(SimpleNamespace(model=model), compile_layers=True)
    blocks, num_backward = tower_of(base).blocks, []
    blocks[0].register_full_backward_hook(lambda *_: num_backward.append(1))
    mesh = init_device_mesh("cpu", (2,))
    for unit in [*blocks, *base.get_decoder().layers, model]:
        fully_shard(unit, mesh=mesh)
    backward(shares[rank])
    far = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:  # FSDP takes the mean of the two processes
            far[name] = (2 * weight.grad.full_tensor() - whole[name]).abs().max() / whole[name].abs().max()
    if rank == 0:
        torch.save((max(far.values()).item(), len(far), len(num_backward)), folder / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(("family", "adapts_experts"), [("qwen2_5_vl", False), ("qwen3_vl_moe", True)])
def test_packed_rows_and_a_tower_without_gradients_have_the_gradients_of_whole_weights(
    families, contest, tmp_path, family, adapts_experts
):
    arguments = (contest, families(family), adapts_experts, tmp_path)
    torch.multiprocessing.spawn(compare_gradients, arguments, nprocs=2)
    far, num_weights, num_backward = torch.load(tmp_path / "found.pt")
    assert far < 1e-5 and num_weights > 10 and num_backward == 0
