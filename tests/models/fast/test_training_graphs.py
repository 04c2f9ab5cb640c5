"""Graphs of forward and backward against both as they are. A CPU has none: tests/captures.py stands for them."""

import copy

import pytest
import torch
from captures import Capture
from gradients import assert_same, compiler, gradients_of, road_of
from test_graphs import NeverWaits
from torch import nn
from torch.testing import assert_close
from torch.utils._pytree import tree_map_only
from transformers.utils import import_utils

from vqa_sft.batch.collator import AnswerCollator
from vqa_sft.batch.prompts import Prompts
from vqa_sft.models.families import PACKED, tower_of
from vqa_sft.models.fast import attention, compilation, fused_lora, graphs, speedups, training_graphs
from vqa_sft.models.fast.graphs import MULTIPLE, CudaCapture
from vqa_sft.models.fast.training_graphs import KeptGraphed, use_training_graphs
from vqa_sft.models.scoring import answer_logits


@pytest.fixture(params=["qwen2_5_vl", "qwen3_vl", pytest.param("internvl", marks=pytest.mark.slow)])
def packed(request, families, contest):
    """A model that trains on packed rows; `batch_of(rows)` as in training; rows; letter ids."""
    model, processor, letter_ids, rows = road_of(families(request.param), contest)
    packer = speedups.pack_rows(speedups.base_of(model), "fp32")
    packer.shares_images = False
    speedups.speed_up(model)
    model.train()
    return model, AnswerCollator(processor, Prompts(), 4, packer=packer), rows, letter_ids


def start_graphs(model, new_capture=Capture):
    """Those of the decoder."""
    base = speedups.base_of(model)
    use_training_graphs(base, new_capture)()
    return base.get_decoder().forward.args[1]


def loss_of(model, batch, letter_ids):
    return nn.functional.cross_entropy(answer_logits(model, batch), letter_ids[batch["answers"]], reduction="sum")


@pytest.mark.parametrize("how", ["separate", "fused", "trained embeddings"])
def test_graphs_give_the_logits_and_gradients_of_the_forward_and_the_backward(packed, how):
    model, batch_of, rows, letter_ids = packed
    base = speedups.base_of(model)
    assert how != "fused" or fused_lora.fuse(base.get_decoder())
    # The decoder's own, though it is given what they make: then its input has gradients, and they have none inside.
    base.get_input_embeddings().weight.requires_grad_(how == "trained embeddings")
    batches = [batch_of(part) for part in (rows[:3], rows[3:], rows[1:2])]
    is_qwen = base.config.model_type != "internvl"
    assert ["shared_prefix" in batch for batch in batches] == [is_qwen, is_qwen, False]
    plain = [gradients_of(model, batch, letter_ids) for batch in batches]
    graphed = start_graphs(model)
    for _ in range(3):
        for batch, expected in zip(batches, plain, strict=True):
            assert_same(gradients_of(model, batch, letter_ids), expected)
    assert graphed.is_able and graphed.capture.count == 3
    # An optimiser's step is seen.
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter.mul_(0.5)
    found = gradients_of(model, batches[0], letter_ids)
    graphed.is_able = False
    assert_same(found, gradients_of(model, batches[0], letter_ids))
    assert not torch.allclose(found[0], plain[0][0], atol=1e-3)


def test_two_micro_batches_of_a_step_give_the_sum_of_their_gradients(packed):
    model, batch_of, rows, letter_ids = packed
    batches = [batch_of(rows[:2]), batch_of(rows[2:4])]
    plain = [gradients_of(model, batch, letter_ids)[1] for batch in batches]
    graphed = start_graphs(model)
    for _ in range(3):
        model.zero_grad()
        for batch in batches:
            loss_of(model, batch, letter_ids).backward()
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            assert_close(weight.grad, plain[0][name] + plain[1][name], atol=5e-5, rtol=1e-4, msg=name)
    # Autograd takes none of the buffers for itself: the next micro-batch would write over what it has added up.
    assert len(graphed.gradients) == len(plain[0])
    assert not {buffer.data_ptr() for buffer in graphed.gradients.values()} & {
        weight.grad.data_ptr() for weight in graphed.gradients
    }


def test_backward_comes_once_and_before_the_next_forward(packed):
    model, batch_of, rows, letter_ids = packed
    batches = [batch_of(rows[:2]), batch_of(rows[2:4])]
    graphed = start_graphs(model)
    for batch in batches * 2:
        loss_of(model, batch, letter_ids).backward()
    assert graphed.capture.count == 2
    first, second = (loss_of(model, batch, letter_ids) for batch in batches)
    with pytest.raises(RuntimeError, match="Call backward once, and before the next forward"):
        first.backward()
    second.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="Call backward once"):
        second.backward()
    # An evaluation between them, which the graphs do not see, is none of those.
    loss = loss_of(model, batches[0], letter_ids)
    with torch.no_grad():
        loss_of(model, batches[1], letter_ids)
    loss.backward()


def test_evaluation_many_tokens_and_what_has_not_started_go_as_they_are(packed, monkeypatch):
    model, batch_of, rows, letter_ids = packed
    base, batch = speedups.base_of(model), batch_of(rows[:2])
    decoder, lengths = base.get_decoder(), []
    forward = decoder.forward
    decoder.forward = lambda **kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]) or forward(**kwargs)
    start = use_training_graphs(base, Capture)
    num_tokens = batch["input_ids"].shape[1]
    loss_of(model, batch, letter_ids)
    start()
    with torch.no_grad():
        loss_of(model, batch, letter_ids)
    monkeypatch.setattr(graphs, "MAX_TOKENS", num_tokens - 1)
    loss_of(model, batch, letter_ids)
    assert lengths == [num_tokens] * 3 and num_tokens % MULTIPLE
    monkeypatch.setattr(graphs, "MAX_TOKENS", num_tokens)
    loss_of(model, batch, letter_ids)
    assert lengths[-1] > num_tokens and lengths[-1] % MULTIPLE == 0


def test_what_cannot_be_captured_goes_on_without(packed, capsys):
    model, batch_of, rows, letter_ids = packed
    batch = batch_of(rows[:2])
    plain = gradients_of(model, batch, letter_ids)

    class Refusing(Capture):
        def __call__(self, *runs):
            super().__call__(*runs)
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    graphed = start_graphs(model, Refusing)
    for _ in range(3):
        assert_same(gradients_of(model, batch, letter_ids), plain)
    assert capsys.readouterr().out.count("Speed: no CUDA graphs: operation not permitted") >= 1
    assert not graphed.is_able and not graphed.graphs and not graphed.gradients


def test_graphs_end_where_another_adapter_is_trained(packed, capsys):
    model, batch_of, rows, letter_ids = packed
    batch = batch_of(rows[:2])
    graphed = start_graphs(model)
    for _ in range(3):
        loss_of(model, batch, letter_ids).backward()
    assert graphed.capture.count == 1
    config = copy.copy(model.peft_config["default"])
    config.init_lora_weights = False
    model.add_adapter("other", config)
    model.set_adapter("other")
    found = gradients_of(model, batch, letter_ids)
    assert capsys.readouterr().out.endswith("no CUDA graphs: adapters are disabled, merged or others than before.\n")
    assert not graphed.is_able and not graphed.graphs and all(".other." in name for name in found[1])
    assert_same(found, gradients_of(model, batch, letter_ids))


def test_graphs_are_never_replaced_and_as_many_as_there_is_room_for(monkeypatch, capsys):
    monkeypatch.setattr(training_graphs, "MAX_GRAPHS", 3)
    double = KeptGraphed(lambda x: 2 * x, Capture())

    def seen(length):
        x = torch.rand(length)
        with torch.no_grad():
            assert torch.equal(double(x), 2 * x)
        return double.capture.count

    assert [seen(n) for n in (1, 1, 2, 3, 2)] == [0, 1, 1, 1, 2]
    has_room = [True, False]
    monkeypatch.setattr(double, "has_room", lambda: has_room.pop(0))
    assert [seen(n) for n in (3, 4, 4, 4, 1, 5, 5)] == [3] * 7  # three of them
    assert has_room == [False] and not capsys.readouterr().out
    double.most = 4
    assert [seen(n) for n in (4, 5, 1)] == [3] * 3
    assert capsys.readouterr().out.startswith("Speed: CUDA graphs of 3 shapes and no more: the GPU's memory")


def test_nothing_that_is_captured_waits_for_the_gpu(packed, monkeypatch):
    model, batch_of, rows, letter_ids = packed
    for weight in model.parameters():
        if not weight.requires_grad:
            weight.data = weight.data.bfloat16()
    for module in model.modules():
        if hasattr(module, "num_key_value_groups"):
            module.use_varlen = True
    # With a stream that captures, the library looks at no values either.
    monkeypatch.setattr(import_utils, "is_cuda_stream_capturing", lambda: True)
    # Stands for the kernel, which takes lengths from the GPU's memory.
    monkeypatch.setattr(attention, "varlen_attn", lambda q, k, v, *args, **kwargs: q + (k.sum() + v.sum()))

    class Strict(Capture):
        def __call__(self, *runs):
            with NeverWaits():
                return super().__call__(*runs)

    graphed = start_graphs(model, Strict)
    batch = batch_of(rows[:3])
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].bfloat16()
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, batch, letter_ids)
        loss.backward()
    assert graphed.is_able and graphed.capture.count == 1


def test_compiled_layers_are_compiled_before_a_capture_and_never_inside(packed):
    model, batch_of, rows, letter_ids = packed
    base = speedups.base_of(model)
    batches = [batch_of(part) for part in (rows[:2], rows[2:4], rows[3:])]
    plain = [gradients_of(model, batch, letter_ids) for batch in batches]

    class Watching(Capture):
        def __call__(self, *runs):
            before = compilation.num_compilations()
            replays = super().__call__(*runs)
            assert compilation.num_compilations() == before > 0
            return replays

    with compiler():
        # The MLPs alone: on a CPU attention over rows of different lengths is no graph.
        mlps = [layer.mlp for layer in base.get_decoder().layers]
        compilation.compile_layers(base, mlps, 1.0, backend="aot_eager")
        graphed = start_graphs(model, Watching)
        for _ in range(3):
            for batch, expected in zip(batches, plain, strict=True):
                assert_same(gradients_of(model, batch, letter_ids), expected)
        assert graphed.is_able and graphed.capture.count == len(graphed.graphs) >= 2


@pytest.fixture
def on_gpu(packed):
    """The same in bf16 on a GPU, with adapters in fp32; `batches_of(rows, ...)`; rows; letter ids."""
    model, batch_of, rows, letter_ids = packed
    for weight in model.cuda().parameters():
        if not weight.requires_grad:
            weight.data = weight.data.bfloat16()
    for module in model.modules():
        if hasattr(module, "num_key_value_groups"):
            module.use_varlen = True
    fused_lora.fuse(speedups.base_of(model).get_decoder())

    def batches_of(*parts):
        batches = tree_map_only(torch.Tensor, lambda x: x.cuda(), [batch_of(part) for part in parts])
        for batch in batches:
            if "pixel_values" in batch:
                batch["pixel_values"] = batch["pixel_values"].bfloat16()
        return batches

    return model, batches_of, rows, letter_ids.cuda()


def train_steps(model, batches, letter_ids, num_steps=5):
    """Losses of every micro-batch and the trained weights; one step is all `batches`. Then weights are as before."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    before, losses = [weight.detach().clone() for weight in trained], []
    optimizer = torch.optim.SGD(trained, lr=0.002)
    for _ in range(num_steps):
        for batch in batches:
            with torch.autocast("cuda", torch.bfloat16):
                loss = loss_of(model, batch, letter_ids)
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    after = [weight.detach().clone() for weight in trained]
    with torch.no_grad():
        torch._foreach_copy_(trained, before)
    return torch.stack(losses), after, before


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_cuda_graphs_train_as_the_forward_and_the_backward_do(on_gpu, compiled):
    model, batches_of, rows, letter_ids = on_gpu
    base, batches = speedups.base_of(model), batches_of(rows[:3], rows[3:], rows[1:2])
    losses, weights, before = train_steps(model, batches, letter_ids)
    if compiled:
        compilation.compile_layers(base, speedups.layers_to_compile(base), 1.0)
    graphed = start_graphs(model, CudaCapture)
    found_losses, found_weights, _ = train_steps(model, batches, letter_ids)
    assert graphed.is_able and len(graphed.graphs) == 3 and all(graphed.graphs.values())
    if base.config.model_type in PACKED:
        of_tower = tower_of(base).forward.args[0]
        assert of_tower.is_able and any(of_tower.graphs.values())
    # On a CPU bf16 differs from fp32 by 2% of these losses, and 12% of what training changes in all.
    assert_close(found_losses, losses, atol=5e-2, rtol=4e-2)
    changed = torch.cat([(new - old).flatten() for new, old in zip(weights, before, strict=True)])
    found = torch.cat([(new - old).flatten() for new, old in zip(found_weights, before, strict=True)])
    assert losses[0] - losses[-3] > 0.5 and (found - changed).norm() < 0.2 * changed.norm()
    # A GPU that comes late to a backward is told so too.
    with torch.autocast("cuda", torch.bfloat16):
        first, second = (loss_of(model, batch, letter_ids) for batch in batches[:2])
    with pytest.raises(RuntimeError, match="Call backward once"):
        first.backward()
    second.backward()


@pytest.mark.gpu
def test_a_gpu_trains_on_after_a_capture_that_failed(on_gpu, capsys):
    model, batches_of, rows, letter_ids = on_gpu
    layer, batches = speedups.base_of(model).get_decoder().layers[0], batches_of(rows[:3])
    losses, *_ = train_steps(model, batches, letter_ids)
    forward = layer.forward
    layer.forward = lambda hidden_states, **kwargs: forward(hidden_states * (hidden_states.sum().item() != 1), **kwargs)
    graphed = start_graphs(model, CudaCapture)
    found, *_ = train_steps(model, batches, letter_ids)
    assert not graphed.is_able and not graphed.graphs
    assert "Speed: no CUDA graphs" in capsys.readouterr().out
    assert_close(found, losses, atol=5e-2, rtol=4e-2)
