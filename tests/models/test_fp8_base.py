"""The frozen base in FP8, emulated: what a GPU multiplies, as fp32. Whether a GPU does the same is seen on one."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from gradients import gradients_of, road_of
from peft import get_peft_model
from quantised import save_quantised
from safetensors.torch import load_file
from scripts import run_script
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.integrations.finegrained_fp8 import FP8Linear as CheckpointLinear
from trl import ModelConfig

from vqa_sft.batch.collator import AnswerCollator
from vqa_sft.batch.prompts import Prompts
from vqa_sft.inference.scorer import groups_of
from vqa_sft.models import fp8_base
from vqa_sft.models.fast import fused_lora, speedups, vision
from vqa_sft.models.load import add_adapter, load_model
from vqa_sft.models.lora import lora_config
from vqa_sft.models.parts import decoder_layers
from vqa_sft.models.scoring import answer_logits
from vqa_sft.predictions.file import read_predictions
from vqa_sft.runs.folder import read_run
from vqa_sft.tiny import TINY_PATH


@pytest.fixture
def emulated(monkeypatch):
    monkeypatch.setattr(fp8_base, "why_not", lambda device: None)


def slowly_rounded(x):
    """(T, K) row by row: each value the nearest of all that a byte can say, times its row's scale."""
    values = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()
    values = values[values.isfinite()]
    rows = []
    for row in x.float():
        factor = 448 / row.abs().max()
        rows.append(torch.stack([values[(values - value).abs().argmin()] for value in row * factor]) / factor)
    return torch.stack(rows)


def relative(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_layer_and_its_gradient_are_products_of_what_was_rounded():
    linear, x, grad = nn.Linear(48, 32), random(3, 4, 48).requires_grad_(), random(3, 4, 32, seed=1)
    layer = fp8_base.FP8Linear.of(linear)
    y = layer(x)
    y.backward(grad)
    weight = slowly_rounded(linear.weight.data)
    expected = slowly_rounded(x.detach().view(12, 48)) @ weight.T + linear.bias
    torch.testing.assert_close(y, expected.view(3, 4, 32), atol=1e-5, rtol=1e-5)
    scale = linear.weight.abs().amax(1) / 448  # of every output: it goes into the gradient before that is rounded
    expected = slowly_rounded(grad.view(12, 32) * scale) @ (weight / scale[:, None])
    torch.testing.assert_close(x.grad, expected.view(3, 4, 48), atol=1e-5, rtol=1e-5)
    assert layer.weight.dtype == torch.uint8 and layer.weight.shape == (32, 48)
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_errors_of_products_are_those_of_three_bits_of_mantissa():
    weight, x, grad = 0.02 * random(512, 1024), random(256, 1024, seed=1).requires_grad_(), random(256, 512, seed=2)
    linear = nn.Linear(1024, 512, bias=False)
    linear.weight.data = weight
    y = fp8_base.FP8Linear.of(linear)(x)
    y.backward(grad)
    assert 0.03 < relative(y, x @ weight.T) < 0.04
    assert 0.03 < relative(x.grad, grad @ weight) < 0.04
    # Gradients of tokens whose sizes differ by thousands; in e5m2 they would be worse.
    sizes = (4 * random(256, 1, seed=3)).exp()
    product = fp8_base.Product.apply(x, *fp8_base.FP8Linear.of(linear).parameters())
    (of_x,) = torch.autograd.grad(product, x, grad * sizes)
    assert relative(of_x / sizes, grad @ weight) < 0.04
    scale = weight.abs().amax(1) / 448
    folded = grad * scale
    wide = folded.abs().amax(1, keepdim=True) / torch.finfo(torch.float8_e5m2).max
    in_e5m2 = (folded / wide).to(torch.float8_e5m2).float() * wide
    assert relative(in_e5m2 @ (slowly_rounded_weight(weight) / scale[:, None]), grad @ weight) > 0.05


def slowly_rounded_weight(weight):
    scale = weight.abs().amax(1, keepdim=True) / 448
    return (weight / scale).to(torch.float8_e4m3fn).float() * scale


def test_rows_of_zeros_give_zeros_and_what_is_not_finite_stays_so():
    layer = fp8_base.FP8Linear.of(nn.Linear(16, 16, bias=False))
    x = torch.zeros(3, 16)
    x[1] = 1e-30
    x[2, 3] = torch.inf
    y = layer(x)
    assert torch.equal(y[0], torch.zeros(16)) and y[1].isfinite().all() and not y[2].isfinite().any()
    zero = fp8_base.FP8Linear.of(nn.Linear(16, 16, bias=False).requires_grad_(False))
    zero.weight.zero_()
    assert torch.equal(zero(torch.ones(1, 16)), torch.zeros(1, 16))


def test_the_kernel_is_given_what_torch_takes_on_a_gpu_for_any_number_of_tokens():
    """Shapes, strides and precisions are checked without a GPU; a kernel for a CPU gives the emulation's numbers."""
    for tokens in (1, 7, 6448):
        with FakeTensorMode():
            x, grad = (torch.empty(tokens, width, device="cuda", dtype=torch.bfloat16) for width in (96, 64))
            weight, scale = torch.empty(64, 96, device="cuda", dtype=torch.uint8), torch.empty(64, 1, device="cuda")
            context = SimpleNamespace(save_for_backward=lambda *kept: None, saved_tensors=(weight, scale))
            y = fp8_base.Product.forward(context, x, weight, scale)
            of_x, *others = fp8_base.Product.backward(context, grad.T.contiguous().T)
        assert (y.shape, y.dtype, of_x.shape, of_x.dtype) == (grad.shape, grad.dtype, x.shape, x.dtype)
        assert others == [None, None]
    (left, scales), (right, of_right) = fp8_base.quantise(random(7, 96)), fp8_base.quantise(random(64, 96))
    how = {"scale_a": scales, "scale_b": of_right.T, "out_dtype": torch.bfloat16, "use_fast_accum": True}
    try:
        product = torch._scaled_mm(left, right.T, **how)
    except (RuntimeError, NotImplementedError):
        pytest.skip("this torch has no such product for a CPU")
    expected = fp8_base.multiply(left, scales, right.view(torch.uint8), of_right.T, torch.bfloat16)
    torch.testing.assert_close(product, expected, atol=1e-2, rtol=1e-2)


def test_a_compiled_layer_is_one_graph_and_keeps_no_copy_of_a_weight():
    """Of any number of tokens; what is kept for the backward pass beside the weights has as many rows as there are."""
    gate, up, down = (fp8_base.FP8Linear.of(nn.Linear(*shape)) for shape in ((64, 96), (64, 96), (96, 64)))

    def mlp(x):
        return x + down(F.silu(gate(x)) * up(x))

    compiled, kept = torch.compile(mlp, backend="aot_eager_decomp_partition", dynamic=True, fullgraph=True), []
    own = {weight.data_ptr() for layer in (gate, up, down) for weight in layer.parameters()}

    def keep(tensor):
        kept.append(tensor)
        return tensor

    for tokens in (40, 56):
        x = random(1, tokens, 64).bfloat16().requires_grad_()
        kept.clear()
        keeping = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with keeping, torch.autocast("cpu", torch.bfloat16):
            y = compiled(x)
        y.sum().backward()
        plain = x.detach().clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            expected = mlp(plain)
        expected.sum().backward()
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(x.grad, plain.grad)
        shapes = [tensor.shape for tensor in kept if tensor.data_ptr() not in own]
        assert shapes and all(tokens in shape for shape in shapes), shapes


# --- models -----------------------------------------------------------------------------------------------------------


def test_the_decoders_frozen_layers_are_rounded_and_all_else_stays(emulated, contest, capsys):
    model, processor, letter_ids, rows = road_of(str(TINY_PATH), contest)
    base, batch = model.get_base_model(), AnswerCollator(processor, Prompts(), 4)(rows)
    plain = gradients_of(model, batch, letter_ids)
    others = {name: tensor.clone() for name, tensor in model.state_dict().items() if "base_layer" not in name}
    assert fp8_base.round_base(base) == 7 * len(base.get_decoder().layers)
    assert "35 linear layers multiply in FP8, 0.01 GiB became 0.00" in capsys.readouterr().out
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in others.items())
    rounded = {name for name, module in model.named_modules() if isinstance(module, fp8_base.FP8Linear)}
    assert len(rounded) == 35 and all(".language_model.layers." in name for name in rounded)
    assert not any(vision.is_plain(model.get_submodule(name)) for name in rounded)
    assert fused_lora.fuse(base.get_decoder()) == (0, 0)
    ours = gradients_of(model, batch, letter_ids)
    assert 1e-4 < relative(ours[0], plain[0]) < 0.1
    assert ours[1].keys() == plain[1].keys()
    # Of all trained weights together, as an optimiser sees them.
    ours, plain = (torch.cat([gradient.flatten() for gradient in of.values()]) for of in (ours[1], plain[1]))
    assert 1e-4 < relative(ours, plain) < 0.3 and F.cosine_similarity(ours, plain, dim=0) > 0.97
    model.to(torch.bfloat16)
    assert model.get_submodule(min(rounded)).weight.dtype == torch.uint8


# On a CPU attention over packed rows is no graph, so what stands around it is compiled.
COMPILED = {"packed": [], "padded and compiled": [""]}
COMPILED |= {"packed and compiled": ["self_attn.q_proj", "self_attn.o_proj", "mlp"]}


@pytest.mark.parametrize("how", COMPILED)
def test_a_model_learns(emulated, contest, how):
    model, processor, letter_ids, rows = road_of(str(TINY_PATH), contest)
    base = model.get_base_model()
    packer = speedups.pack_rows(base, "fp32") if "packed" in how else None
    fp8_base.round_base(base)
    assert fused_lora.fuse(base.get_decoder()) == (0, 0)
    batch = AnswerCollator(processor, Prompts(), 4, packer=packer)(rows)
    assert (batch["input_ids"].shape[0] == 1) == ("packed" in how)
    expected = gradients_of(model, batch, letter_ids)
    for layer in base.get_decoder().layers[:1]:
        for name in COMPILED[how]:
            layer.get_submodule(name).compile(backend="aot_eager", dynamic=True, fullgraph=True)
    torch.testing.assert_close(gradients_of(model, batch, letter_ids)[0], expected[0], atol=1e-4, rtol=1e-4)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = F.cross_entropy(answer_logits(model, batch), letter_ids[batch["answers"]])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses


def test_recomputed_layers_give_the_same_gradients(emulated, contest):
    model, processor, letter_ids, rows = road_of(str(TINY_PATH), contest)
    fp8_base.round_base(model.get_base_model())
    batch = AnswerCollator(processor, Prompts(), 4)(rows)
    plain = gradients_of(model, batch, letter_ids)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    recomputed = gradients_of(model, batch, letter_ids)
    for name, gradient in plain[1].items():
        torch.testing.assert_close(recomputed[1][name], gradient, msg=name)


def test_a_saved_adapter_gives_the_same_logits_again(emulated, contest, tmp_path):
    model, processor, _, rows = road_of(str(TINY_PATH), contest)
    batch = AnswerCollator(processor, Prompts(), 4)(rows)
    fp8_base.round_base(model.get_base_model())
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved and all("lora_" in name for name in saved)
    args = ModelConfig(model_name_or_path=str(TINY_PATH), dtype=None)
    again = add_adapter(load_model(args, "fp32"), str(tmp_path)).requires_grad_(False)
    fp8_base.round_base(again.get_base_model())
    names = [name for name, module in again.named_modules() if isinstance(module, fp8_base.FP8Linear)]
    assert names and all(name.endswith("base_layer") for name in names)  # adapters are frozen here as well
    with torch.no_grad():
        assert torch.equal(answer_logits(model.eval(), batch), answer_logits(again.eval(), batch))
        assert torch.equal(answer_logits(copy.deepcopy(again), batch), answer_logits(again, batch))


def test_a_run_is_scored_on_the_base_that_it_was_trained_on(monkeypatch, emulated, contest, sft, tmp_path, capsys):
    how = {"validation_fraction": 0.5, "max_steps": 4, "learning_rate": 1e-2}
    run = sft(TINY_PATH, tmp_path / "run", base_precision="fp8", **how)
    assert read_run(run).recipe["base_precision"] == "fp8"
    assert "35 linear layers multiply in FP8" in capsys.readouterr().out

    def scored(name):
        arguments = ["--run", run, "--part", "validation", "--output", tmp_path / name, "--num_workers", 0]
        run_script("predict", *arguments, "--use_cpu")
        return torch.tensor(read_predictions((tmp_path / name).with_suffix(".parquet")).choice_logits)

    found = scored("fp8.csv")
    in_training = torch.tensor(read_predictions(run / "validation.parquet").choice_logits)
    torch.testing.assert_close(found, in_training, atol=1e-4, rtol=1e-4)
    assert "35 linear layers multiply in FP8" in capsys.readouterr().out
    monkeypatch.setattr(fp8_base, "why_not", lambda device: "that needs a GPU")
    whole = scored("whole.csv")
    assert "no layer is rounded, that needs a GPU" in capsys.readouterr().out
    assert 1e-3 < (whole - found).abs().max() < 1


def test_runs_of_other_bases_take_no_turns_in_one_model(contest, sft, tmp_path):
    runs = [
        read_run(sft(TINY_PATH, tmp_path / str(number), max_steps=1, **more))
        for number, more in enumerate([{}, {"base_precision": "fp8"}])
    ]
    assert [len(group.runs) for group in groups_of(runs, use_cpu=True)] == [1, 1]
    assert [len(group.runs) for group in groups_of(runs[1:] * 2, use_cpu=True)] == [2]


def test_what_cannot_be_rounded_is_said_in_a_line(emulated, families, capsys):
    args = ModelConfig(model_name_or_path=families("qwen2_5_vl"), dtype=None, use_peft=True, lora_dropout=0.0)
    base = load_model(args, "fp32")
    get_peft_model(base, lora_config(args, base))
    first = decoder_layers(base.get_decoder())[0]
    first.mlp.up_proj.base_layer = nn.Linear(32, 40, bias=False).requires_grad_(False)
    first.mlp.gate_proj.base_layer.weight.requires_grad_()
    first.mlp.down_proj.lora_variant["default"] = "DoRA"
    num = sum(1 for name, _ in base.get_decoder().named_modules() if name.endswith("base_layer"))
    capsys.readouterr()
    assert fp8_base.round_base(base) == num - 3
    said = capsys.readouterr().out
    for reason in ("a width is no multiple of 16", "they are trained", "their adapter needs whole weights"):
        assert f"1 linear layers stay as they are: {reason}." in said


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "qwen3_5", "gemma4_moe"])
def test_routers_and_routed_experts_stay(emulated, families, family):
    base = load_model(ModelConfig(model_name_or_path=families(family), dtype=None), "fp32").requires_grad_(False)
    before = {name: type(module) for name, module in base.named_modules()}
    assert fp8_base.round_base(base)
    changed = [name for name, module in base.named_modules() if type(module) is not before.get(name)]
    assert changed and not any(part in name.split(".") for name in changed for part in ("gate", "router", "lm_head"))


def test_without_a_gpu_nothing_is_rounded_and_a_line_says_why(contest, capsys):
    model, *_ = road_of(str(TINY_PATH), contest)
    capsys.readouterr()
    assert fp8_base.round_base(model.get_base_model()) == 0
    assert capsys.readouterr().out.strip() == "base_precision: fp8: no layer is rounded, that needs a GPU."
    assert not any(isinstance(module, fp8_base.FP8Linear) for module in model.modules())


def test_older_gpus_and_weights_that_are_dealt_out_have_no_layer_rounded(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    assert "8.9 or newer" in fp8_base.why_not(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    assert fp8_base.why_not(torch.device("cuda")) is None
    monkeypatch.setattr(fp8_base.processes, "is_sharded", lambda: True)
    assert "FSDP and DeepSpeed" in fp8_base.why_not(torch.device("cuda"))


# --- FP8 checkpoints --------------------------------------------------------------------------------------------------


def test_numbers_of_a_checkpoint_with_one_scale_a_layer_are_taken_as_they_are():
    layer = CheckpointLinear(48, 32, block_size=None, activation_scheme="static")
    layer.weight.data = random(32, 48).to(torch.float8_e4m3fn)
    layer.weight_scale_inv.data.fill_(0.25)
    rounded = fp8_base.FP8Linear.of(layer)
    assert torch.equal(rounded.weight, layer.weight.data.view(torch.uint8))
    assert torch.equal(rounded.scale, torch.full((32, 1), 0.25))
    x = random(5, 48)
    torch.testing.assert_close(rounded(x), slowly_rounded(x) @ (layer.weight.float() * 0.25).T, atol=1e-5, rtol=1e-5)


def test_blocks_of_a_checkpoint_are_rounded_again_for_their_rows():
    layer = CheckpointLinear(32, 32, block_size=(16, 16))
    layer.weight.data = (100 * random(32, 32)).to(torch.float8_e4m3fn)
    layer.weight_scale_inv.data = torch.tensor([[0.01, 0.03], [0.002, 0.05]])
    whole = layer.weight.float() * layer.weight_scale_inv.repeat_interleave(16, 0).repeat_interleave(16, 1)
    rounded = fp8_base.FP8Linear.of(layer)
    numbers = rounded.weight.view(torch.float8_e4m3fn).float() * rounded.scale
    torch.testing.assert_close(numbers, slowly_rounded(whole.detach()), atol=1e-6, rtol=1e-5)
    assert 0 < relative(numbers, whole) < 0.04


def test_checkpoints_that_are_rounded_in_another_way_are_refused(families, tmp_path, sft, capsys):
    folder = save_quantised(families("qwen2_5_vl"), "compressed fp8", tmp_path / "base")
    with pytest.raises(SystemExit) as stop:
        sft(folder, tmp_path / "run", base_precision="fp8")
    assert stop.value.code == 2 and "cannot be rounded again. Remove base_precision" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 7, 6448])
@pytest.mark.parametrize(("inputs", "outputs"), [(3584, 512), (3584, 18944), (18944, 3584)])
def test_a_gpu_multiplies_what_is_emulated(inputs, outputs, num_tokens):
    how = {"device": "cuda", "dtype": torch.bfloat16}
    layer = fp8_base.FP8Linear.of(nn.Linear(inputs, outputs, bias=False, **how).requires_grad_(False))
    x, grad = torch.randn(num_tokens, inputs, **how).requires_grad_(), torch.randn(num_tokens, outputs, **how) * 1e-4
    y = layer(x)
    (of_x,) = torch.autograd.grad(y, x, grad)
    numbers = layer.weight.view(fp8_base.FP8)
    folded = fp8_base.quantise(grad * layer.scale.T)
    expected = fp8_base.emulate(*fp8_base.quantise(x.detach()), numbers, layer.scale.T)
    turned = layer.weight.T.contiguous().view(fp8_base.FP8)
    of_expected = fp8_base.emulate(*folded, turned, torch.ones(1, inputs, device="cuda"))
    assert relative(y.float(), expected) < 5e-3 and relative(of_x.float(), of_expected) < 5e-3  # bf16: about 2e-3
