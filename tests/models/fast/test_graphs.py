"""Graphs of shapes against the forward itself. A CPU has none: here a capture runs the same call again on the memory
that the graph would read and write, and refuses what a GPU could not capture."""

import pytest
import torch
from captures import Capture, NeverWaits
from gradients import road_of
from torch.testing import assert_close
from transformers.utils import import_utils

from vqa_sft.batch.collator import AnswerCollator
from vqa_sft.batch.prompts import Prompts
from vqa_sft.models.families import PACKED, tower_of
from vqa_sft.models.fast import attention, compilation, fused_lora, speedups
from vqa_sft.models.fast.graphs import MULTIPLE, CudaCapture, Graphed, use_graphs
from vqa_sft.models.scoring import answer_logits

FAMILIES = ["qwen2_5_vl", pytest.param("qwen3_vl", marks=pytest.mark.medium), "internvl"]


@pytest.fixture(params=FAMILIES)
def packed(request, families, contest):
    """A model that scores packed rows; `batch_of(rows, orders)`; rows."""
    model, processor, _, rows = road_of(families(request.param), contest)
    model.requires_grad_(False).eval()
    packer = speedups.pack_rows(speedups.base_of(model), "fp32")
    speedups.speed_up(model)

    def batch_of(rows, orders="identity"):
        return AnswerCollator(processor, Prompts(), 4, views=orders, packer=packer)(rows)

    return model, batch_of, rows


@torch.no_grad()
def logits_of(model, batch):
    return answer_logits(model, batch)


def test_a_graph_gives_the_logits_of_the_forward_for_other_rows_of_its_shapes(packed):
    model, batch_of, rows = packed
    # One text and one image each: all of them have the shapes of the first, filled up.
    batches = [batch_of([rows[0] | {"question": question}]) for question in ("What?", "Where?", "Who was it?", "When?")]
    assert len({batch["input_ids"].shape for batch in batches}) > 1
    expected = [logits_of(model, batch) for batch in batches]
    capture = Capture()
    assert use_graphs(speedups.base_of(model), capture)
    found = [logits_of(model, batch) for batch in batches]
    is_qwen = model.config.model_type != "internvl"
    assert capture.count == 1 + is_qwen  # the decoder's, and the tower's
    assert_close(found, expected, atol=2e-5, rtol=1e-5)
    assert not torch.allclose(expected[0], expected[2], atol=1e-3)


@pytest.mark.parametrize("orders", ["identity", "rotations"])
def test_rows_that_share_tokens_and_images_have_the_logits_of_the_forward(packed, orders):
    model, batch_of, rows = packed
    batches = [batch_of(part, orders) for part in (rows[:2], rows[2:3], rows[3:])]
    is_qwen = model.config.model_type != "internvl"
    assert any("shared_prefix" in batch for batch in batches) == (is_qwen or orders == "rotations")
    expected = [logits_of(model, batch) for batch in batches]
    capture = Capture()
    use_graphs(speedups.base_of(model), capture)
    for _ in range(3):
        assert_close([logits_of(model, batch) for batch in batches], expected, atol=2e-5, rtol=1e-5)
    assert capture.count >= 2


@pytest.mark.parametrize("orders", ["identity", "rotations"])
def test_images_of_one_size_have_one_graph_whatever_the_texts(packed, orders):
    model, batch_of, rows = packed
    base = speedups.base_of(model)
    use_graphs(base, Capture())
    for number in range(1, 9):
        logits_of(model, batch_of([rows[0] | {"question": "What is it? " * number}], orders))
    decoder = base.get_decoder().forward.args[1].graphs
    assert len(decoder) <= (3 if orders == "identity" else 6)
    if base.config.model_type != "internvl":  # whose tower has none
        assert len(tower_of(base).forward.args[0].graphs) == 1


@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
def test_adapters_that_take_turns_are_seen_by_a_graph(packed, fused):
    model, batch_of, rows = packed
    batch = batch_of(rows[:1])
    decoder = speedups.base_of(model).get_decoder()
    assert not fused or fused_lora.fuse(decoder) == (len(decoder.layers),) * 2
    assert not decoder._forward_pre_hooks  # what runs before the forward is in no graph
    use_graphs(speedups.base_of(model), Capture())
    for _ in range(2):
        before = logits_of(model, batch)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.mul_(-1)  # as Adapters.use writes those of another run
    after = logits_of(model, batch)
    assert not torch.allclose(before, after, atol=1e-3)
    with torch.enable_grad():  # the forward itself
        assert_close(after, answer_logits(model, batch).detach(), atol=2e-5, rtol=1e-5)


class Frozen(Capture):
    """As a GPU's graph, which sees what is written to weights and nothing of Python."""

    @staticmethod
    def replay(run, outputs):
        return outputs


@pytest.mark.parametrize("ask", ["disable_adapter_layers", "merge_adapter", "unload"])
def test_graphs_end_where_peft_is_asked_for_something_else(packed, capsys, ask):
    model, batch_of, rows = packed
    batch = batch_of(rows[:1])
    use_graphs(speedups.base_of(model), Frozen())
    before = [logits_of(model, batch) for _ in range(3)]
    assert_close(before[2], before[0])
    assert "no CUDA graphs" not in capsys.readouterr().out
    getattr(model.base_model, ask)()
    after = logits_of(model, batch)
    assert capsys.readouterr().out == "Speed: no CUDA graphs: adapters are disabled, merged or others than before.\n"
    with torch.enable_grad():  # the forward itself
        assert_close(after, answer_logits(model, batch).detach(), atol=2e-5, rtol=1e-5)
    assert torch.allclose(after, before[0], atol=1e-3) == (ask == "merge_adapter")


def test_nothing_that_is_captured_waits_for_the_gpu(packed, monkeypatch):
    model, batch_of, rows = packed
    model.bfloat16()
    for module in model.modules():
        if hasattr(module, "num_key_value_groups"):
            module.use_varlen = True
    # With a stream that captures, the library looks at no values either.
    monkeypatch.setattr(import_utils, "is_cuda_stream_capturing", lambda: True)
    # Stands for the kernel, which takes lengths from the GPU's memory.
    monkeypatch.setattr(attention, "varlen_attn", lambda q, k, v, *args, **kwargs: torch.zeros_like(q))
    capture = Capture()

    def capture_strictly(*runs):
        with NeverWaits():
            return capture(*runs)

    use_graphs(speedups.base_of(model), capture_strictly)
    for batch in (batch_of(rows[:1]), batch_of(rows[3:4], "rotations")):
        if "pixel_values" in batch:
            batch["pixel_values"] = batch["pixel_values"].bfloat16()
        for _ in range(2):
            logits_of(model, batch)
    assert capture.count >= 2


def test_shapes_that_come_once_are_not_captured_and_old_ones_are_forgotten(monkeypatch):
    monkeypatch.setattr("vqa_sft.models.fast.graphs.MAX_GRAPHS", 3)
    capture = Capture()
    double = Graphed(lambda x, factor: x * factor, capture)

    def seen(length, factor=2):
        x = torch.rand(length)
        with torch.no_grad():
            assert torch.equal(double(x, factor=factor), x * factor)
        return capture.count

    assert [seen(n) for n in (1, 2, 3)] == [0, 0, 0]
    assert [seen(n) for n in (1, 2, 3, 1)] == [1, 2, 3, 3]
    assert [seen(4), seen(2), seen(4)] == [3, 3, 4]  # 2 was not used for longest
    assert seen(4, factor=3) == 4
    x = torch.rand(4, requires_grad=True)
    double(x, factor=2).sum().backward()
    assert torch.equal(x.grad, torch.full((4,), 2.0)) and capture.count == 4


def test_rows_are_filled_up_to_a_multiple_of_64(packed):
    model, batch_of, rows = packed
    lengths = []
    decoder = speedups.base_of(model).get_decoder()
    forward = decoder.forward
    decoder.forward = lambda **kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]) or forward(**kwargs)
    use_graphs(speedups.base_of(model), Capture())
    for part in (rows[:1], rows[1:2]):
        logits_of(model, batch_of(part))
    assert lengths and all(length % MULTIPLE == 0 for length in lengths)


def test_an_8_bit_base_has_no_graphs_and_a_line_says_why(packed, capsys):
    model, *_ = packed
    base = speedups.base_of(model)
    base.get_decoder().use_varlen = base.is_loaded_in_8bit = True
    assert not speedups.use_graphs(model)
    assert "Speed: no CUDA graphs: products of an 8-bit base wait for the GPU" in capsys.readouterr().out


def test_what_cannot_be_captured_goes_on_without(capsys):
    def refuse(*runs):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    double = Graphed(lambda x: 2 * x, refuse)
    with torch.no_grad():
        assert [double(torch.tensor(number)).item() for number in (1, 2, 3)] == [2, 4, 6]
    said = "Speed: no CUDA graphs: operation not permitted when stream is capturing.\n"
    assert capsys.readouterr().out == said


@pytest.mark.gpu
def test_a_gpu_goes_on_after_a_capture_that_failed(capsys):
    multiply = Graphed(lambda x: x * x.sum().item(), CudaCapture())
    with torch.no_grad():
        assert [multiply(torch.full((2,), float(n), device="cuda"))[0].item() for n in (1, 2, 3)] == [2, 8, 18]
    assert "Speed: no CUDA graphs" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_cuda_graph_gives_the_logits_of_the_forward(packed, compiled):
    model, batch_of, rows = packed
    base = speedups.base_of(model)
    has_tower = base.config.model_type in PACKED  # of its own
    model.cuda().bfloat16()
    for module in model.modules():
        if hasattr(module, "num_key_value_groups"):
            module.use_varlen = True

    def on_gpu(batch):
        moved = torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: x.cuda(), batch)
        return moved | {"pixel_values": moved["pixel_values"].bfloat16()}

    batches = [on_gpu(batch_of([rows[i]], orders)) for i in (0, 1, 3) for orders in ("identity", "rotations")]
    with torch.autocast("cuda", torch.bfloat16):
        if compiled:  # before: compiled layers round otherwise in bf16
            compilation.compile_layers(base, speedups.layers_to_compile(base), 1.0)
        expected = [logits_of(model, batch) for batch in batches]
        use_graphs(base, CudaCapture())
        for _ in range(3):
            found = [logits_of(model, batch) for batch in batches]
            assert_close(found, expected, atol=2e-2, rtol=2e-2)
    for graphed in (base.get_decoder().forward.args[1], *([tower_of(base).forward.args[0]] if has_tower else [])):
        assert graphed.is_able and any(graphed.graphs.values())
