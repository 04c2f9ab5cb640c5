"""Attention and MLPs with fused adapters against PEFT's own, in fp32: outputs, gradients, and what is saved."""

import copy

import pytest
import torch
from gradients import PACKED_FAMILIES, assert_same, compiler, gradients_of, road_of
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft_calls import disable, merge, unload
from trl import ModelConfig

from vqa_sft.batch.collator import AnswerCollator
from vqa_sft.batch.prompts import Prompts
from vqa_sft.models.fast import compilation, fused_lora, speedups
from vqa_sft.models.load import load_model
from vqa_sft.models.scoring import answer_logits

LAYERS = [*fused_lora.ATTENTION, *fused_lora.MLP]


def adapted(families, family, **how):
    """A decoder whose adapters are no zeros."""
    base = load_model(ModelConfig(model_name_or_path=families(family), dtype=None), "fp32")
    names = rf".*language_model.*({'|'.join(how.pop('layers', LAYERS))})"
    return get_peft_model(base, LoraConfig(target_modules=names, init_lora_weights=False, **how)).get_base_model()


def results_of(attention, hidden, rotation, compiled):
    """Output, and gradients of its input and of all adapters."""
    hidden = hidden.clone().requires_grad_()
    attention.zero_grad()
    call = torch.compile(attention, backend="aot_eager", dynamic=True, fullgraph=True) if compiled else attention
    output, _ = call(hidden_states=hidden, position_embeddings=rotation, attention_mask=None)
    output.square().sum().backward()
    gradients = {name: weight.grad.clone() for name, weight in attention.named_parameters() if weight.requires_grad}
    return output.detach(), gradients | {"input": hidden.grad}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("ranks", [{}, {"q_proj": 3, "v_proj": 5}], ids=["one rank", "three ranks"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_attention_has_the_output_and_gradients_of_separate_adapters(families, family, ranks, compiled):
    torch.manual_seed(0)
    decoder = adapted(families, family, r=8, rank_pattern=ranks, lora_alpha=24).get_decoder()
    attention, text = decoder.layers[0].self_attn, decoder.config
    for name, bias in attention.named_parameters():
        if name.endswith("bias"):  # zeros in a new model
            torch.nn.init.normal_(bias)
    hidden = torch.randn(2, 7, text.hidden_size)
    rotation = 2 * (torch.randn(2, 7, attention.head_dim),)
    expected = results_of(attention, hidden, rotation, compiled=False)
    assert len(expected[1]) == 9 and all(gradient.abs().max() > 1e-3 for gradient in expected[1].values())
    weights = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    writes = fused_lora.Writes()
    assert fused_lora.fuse_attention(decoder.layers[0], writes)
    writes.write()
    output, gradients = results_of(attention, hidden, rotation, compiled)
    torch.testing.assert_close(output, expected[0], atol=1e-5, rtol=1e-4)
    assert gradients.keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (gradients[name] - gradient).abs().max() < 1e-5 * gradient.abs().max(), name
    assert not {*vars(attention)} & {"q", "k", "v"}  # nothing is left of the call
    for name, tensor in decoder.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    assert attention.wide_qkv.shape[1] % fused_lora.MULTIPLE == 0


@pytest.mark.parametrize("family", PACKED_FAMILIES)
def test_every_family_has_the_logits_and_gradients_of_separate_adapters(families, contest, family):
    model, processor, letter_ids, rows = road_of(families(family), contest)
    packer = speedups.pack_rows(model.get_base_model(), "fp32")
    batch = AnswerCollator(processor, Prompts(), 4, packer=packer)(rows)
    batch.pop("leaders", None)
    expected = gradients_of(model, batch, letter_ids)
    assert fused_lora.fuse(model.get_base_model().get_decoder())[1]
    assert_same(gradients_of(model, batch, letter_ids), expected)


def test_compiled_layers_share_one_graph_of_known_widths_and_numbers(families, contest):
    model, processor, letter_ids, rows = road_of(families("qwen3_vl"), contest)
    base, graphs = model.get_base_model(), []
    decoder = base.get_decoder()
    assert fused_lora.fuse(decoder) == (3, 3)

    def compile_graph(graph, inputs):
        values = [node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"]
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        unknown = [weight for weight in tensors if weight.ndim == 2 and not all(type(n) is int for n in weight.shape)]
        graphs.append(unknown + [value for value in tensors if value.ndim == 0])
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    with compiler():
        compilation.compile_layers(base, decoder.layers, 1.0, backend=compile_graph, fullgraph=True)
        for chosen in (rows, rows[:2]):
            gradients_of(model, AnswerCollator(processor, Prompts(), 4)(chosen), letter_ids)
    assert graphs == [[]]  # a number on the CPU would want C++ code in a GPU's graph


def test_layers_that_are_computed_again_and_ddp_have_the_same_gradients(road):
    model, processor, letter_ids, rows = road
    batch = AnswerCollator(processor, Prompts(), 4)(rows)
    expected = gradients_of(model, batch, letter_ids)
    assert all(fused_lora.fuse(model.get_base_model().get_decoder()))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert_same(gradients_of(model, batch, letter_ids), expected)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        logits, gradients = gradients_of(torch.nn.parallel.DistributedDataParallel(model), batch, letter_ids)
    finally:
        torch.distributed.destroy_process_group()
    assert_same((logits, {name.removeprefix("module."): gradient for name, gradient in gradients.items()}), expected)


def test_saved_adapters_and_merged_weights_are_those_of_separate_ones(road, tmp_path):
    model, *_ = road
    separate = copy.deepcopy(model)
    assert all(fused_lora.fuse(model.get_base_model().get_decoder()))
    for one, name in ((separate, "separate"), (model, "fused")):
        one.save_pretrained(tmp_path / name)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("separate", "fused")]
    assert files[0] == files[1]
    expected, found = (one.merge_and_unload().state_dict() for one in (separate, model))
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def merge_safely(model):
    model.merge_adapter(safe_merge=True)
    yield
    model.unmerge_adapter()
    yield


def set_another(model):
    add_adapter(model, "other")
    yield
    model.set_adapter("other")
    yield
    model.base_model.set_adapter(["default", "other"])
    yield
    model.set_adapter("default")
    yield


def delete(model):
    add_adapter(model, "other")
    model.delete_adapter("default")
    yield
    add_adapter(model, "default")  # not the one whose place is in the buffers
    model.set_adapter("default")
    yield


def scale(model):
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.scale_layer(0.5)
    yield


def merge_and_unload(model):
    model.merge_and_unload()
    yield


def add_adapter(model, name):
    torch.manual_seed(1)
    names = r".*language_model.*(q|k|v|o|gate|up|down)_proj"
    model.add_adapter(name, LoraConfig(r=3, target_modules=names, init_lora_weights=False))


@pytest.mark.parametrize("ask", [disable, merge, merge_safely, set_another, delete, scale, unload, merge_and_unload])
def test_what_peft_is_asked_for_later_is_what_separate_adapters_give(families, contest, ask):
    assert_gives_the_same(*road_of(families("qwen2_5_vl"), contest), ask)


@pytest.mark.parametrize("ask", [disable, merge])
def test_compiled_layers_do_what_peft_is_asked_for_later(families, contest, ask):
    with compiler():
        how = {"backend": "aot_eager", "fullgraph": True}
        assert_gives_the_same(*road_of(families("qwen3_vl"), contest), ask, **how)


@torch.no_grad()
def assert_gives_the_same(model, processor, _, rows, ask, **compiled):
    batch = AnswerCollator(processor, Prompts(), 4)(rows[:3])
    separate, base = copy.deepcopy(model), model.get_base_model()
    assert all(fused_lora.fuse(base.get_decoder()))
    if compiled:
        compilation.compile_layers(base, base.get_decoder().layers, 1.0, **compiled)
    answer_logits(model, batch)
    for _ in zip(ask(separate), ask(model), strict=True):
        found, expected = (answer_logits(one, batch) for one in (model, separate))
        torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-4)


def test_each_row_may_have_an_adapter_of_its_own(families, contest):
    model, *_ = road_of(families("qwen2_5_vl"), contest)
    add_adapter(model, "other")
    asked = {"input_ids": torch.arange(30).view(3, 10), "adapter_names": ["default", "other", "__base__"]}
    model.set_adapter("default")
    separate = copy.deepcopy(model.eval())
    model.delete_adapter("other")
    assert all(fused_lora.fuse(model.get_base_model().get_decoder()))
    add_adapter(model.eval(), "other")
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**asked).logits, separate(**asked).logits, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("how", "fused"),
    [
        ({"layers": fused_lora.ATTENTION}, (False, True)),
        ({"layers": fused_lora.MLP}, (True, False)),
        ({"layers": ["q_proj", "k_proj", "v_proj"]}, (False, False)),
        ({"layers": ["q_proj", "up_proj"]}, (False, False)),
        ({"layers": LAYERS, "bias": "lora_only"}, (True, False)),  # of which the MLP has none
        ({"layers": LAYERS, "lora_bias": True}, (False, False)),
        ({"layers": LAYERS, "lora_dropout": 0.1}, (False, False)),
        ({"layers": LAYERS, "use_dora": True}, (False, False)),
    ],
    ids=["attention", "MLP", "without o", "one of each", "trained biases", "biases of adapters", "dropout", "DoRA"],
)
def test_kinds_that_are_not_known_stay_as_they_are(families, how, fused):
    decoder = adapted(families, "qwen2_5_vl", **how).get_decoder()
    assert tuple(map(bool, fused_lora.fuse(decoder))) == fused


def test_a_module_beside_the_projections_or_a_second_adapter_keeps_attention_as_it_is(families):
    base = adapted(families, "qwen3_vl")
    first, second, *_ = base.get_decoder().layers
    first.self_attn.indexer = torch.nn.Identity()
    second.self_attn.k_proj.update_layer("other", r=4, lora_alpha=4, config=LoraConfig())
    assert not any(fused_lora.fuse_attention(layer, fused_lora.Writes()) for layer in (first, second))


def test_an_mlp_of_the_same_layers_and_another_forward_keeps_its_forward():
    """As MLPs that clamp, scale or drop: their layers are those of every other one."""
    torch.manual_seed(0)
    layer = torch.nn.Module()
    layer.mlp = Clamping()
    model = get_peft_model(layer, LoraConfig(r=4, target_modules=[*fused_lora.MLP], init_lora_weights=False))
    x = (3 * torch.randn(5, 8)).requires_grad_()
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]

    def results():
        model.zero_grad()
        output = layer.mlp(x)
        output.square().sum().backward()
        return [output.detach(), *(model.get_parameter(name).grad.clone() for name in names)]

    expected, writes = results(), fused_lora.Writes()
    assert fused_lora.fuse_mlp(layer, writes)
    writes.write()
    torch.testing.assert_close(results(), expected, atol=1e-4, rtol=1e-4)


class Clamping(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = torch.nn.Linear(8, 16, bias=False), torch.nn.Linear(8, 16, bias=False)
        self.down_proj, self.act_fn = torch.nn.Linear(16, 8, bias=False), torch.nn.SiLU()

    def forward(self, x):
        gate, up = self.gate_proj(x).clamp(max=1), self.up_proj(x).clamp(-1, 1)
        return self.down_proj(self.act_fn(gate) * (up + 1)) * 0.5


def test_a_projection_of_another_tensor_is_computed(families):
    decoder = adapted(families, "qwen2_5_vl").get_decoder()
    attention = decoder.layers[0].self_attn
    one, other = torch.randn(2, 1, 3, decoder.config.hidden_size)
    expected = attention.k_proj(other)
    fused_lora.fuse_attention(decoder.layers[0], writes := fused_lora.Writes())
    writes.write()
    known = {"k_proj": torch.zeros(1)}
    stand_in = fused_lora._StandIn(attention, one, known, {})
    assert stand_in.k_proj(one) is known["k_proj"]
    torch.testing.assert_close(stand_in.k_proj(other), expected, atol=1e-5, rtol=1e-5)
