"""Adapters of routed experts beside the products of their base, against PEFT, which adds them to it."""

import copy

import pytest
import torch
from families import skeleton
from gradients import assert_same, gradients_of
from peft import get_peft_model
from peft_calls import disable, merge, unload
from trl import ModelConfig

from vqa_sft.batch.collator import AnswerCollator
from vqa_sft.batch.prompts import Prompts
from vqa_sft.data.examples import load_examples
from vqa_sft.data.options import ReadOptions
from vqa_sft.models.fast.expert_lora import can_use, serves, speed_up_experts
from vqa_sft.models.load import load_model, load_processor
from vqa_sft.models.lora import lora_config
from vqa_sft.models.scoring import answer_logits, find_letter_ids


def adapted(folder, lora_r=4, **asked):
    args = ModelConfig(model_name_or_path=folder, use_peft=True, lora_r=lora_r, lora_dropout=0.0, dtype=None)
    base = load_model(args, "fp32")
    torch.manual_seed(0)
    model = get_peft_model(base, lora_config(args, base, **{"adapt_experts": True} | asked))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return model


@pytest.fixture
def rows_of(contest):
    """`rows_of(folder)`: a batch of rows, and the ids of the letters."""

    def batch(folder):
        processor = load_processor(folder)
        examples, _ = load_examples(str(contest / "train.csv"), ReadOptions(limit=3))
        return AnswerCollator(processor, Prompts(), 4)(list(examples)), find_letter_ids(processor, 4)

    return batch


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "traced"])
@pytest.mark.parametrize("family", ["qwen3_vl_moe", "qwen3_5_moe", "gemma4_moe"])
def test_adapted_experts_give_the_logits_and_gradients_of_peft(families, rows_of, family, compiled):
    model = adapted(families(family))
    batch, letter_ids = rows_of(families(family))
    plain = gradients_of(model, batch, letter_ids)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    decoder = model.get_base_model().get_decoder()
    num_mixtures = sum(hasattr(module, "experts") for module in decoder.modules())
    assert speed_up_experts(decoder) == num_mixtures > 0
    for module in decoder.modules():
        if compiled and hasattr(module, "experts"):
            module.experts.forward = torch.compile(module.experts.forward, backend="aot_eager", fullgraph=True)
    assert_same(gradients_of(model, batch, letter_ids), plain)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    with torch.no_grad():  # an optimiser's step is seen, and so is a copy of the model
        for weight in filter(lambda weight: weight.requires_grad, model.parameters()):
            weight.mul_(0.5)
        changed = answer_logits(model, batch)
        torch.testing.assert_close(answer_logits(copy.deepcopy(model), batch), changed)
        assert (changed - plain[0]).abs().max() > 1e-3


def set_another(model):
    torch.manual_seed(1)
    config = copy.copy(model.peft_config["default"])
    config.r, config.init_lora_weights = 8, False
    model.add_adapter("other", config)
    model.set_adapter("other")
    yield
    model.delete_adapter("default")
    yield


@torch.no_grad()
@pytest.mark.parametrize("ask", [disable, merge, set_another, unload])
def test_what_peft_is_asked_for_later_is_what_its_own_experts_give(families, rows_of, ask):
    model = adapted(families("qwen3_vl_moe"))
    batch, _ = rows_of(families("qwen3_vl_moe"))
    separate = copy.deepcopy(model)
    assert speed_up_experts(model.get_base_model().get_decoder())
    answer_logits(model, batch)
    for _ in zip(ask(separate), ask(model), strict=True):
        found, expected = (answer_logits(one, batch) for one in (model, separate))
        torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-4)


@pytest.mark.slow
def test_the_compiler_leaves_the_operands_of_products_in_the_order_that_these_want(families, rows_of):
    """It chooses the order of what it computes, and grouped_mm refuses another one, on CPUs too."""
    model = adapted(families("qwen3_vl_moe"), lora_r=8)
    for weight in model.parameters():
        weight.data = weight.data.to(torch.float32 if weight.requires_grad else torch.bfloat16)
    batch, letter_ids = rows_of(families("qwen3_vl_moe"))
    decoder = model.get_base_model().get_decoder()
    speed_up_experts(decoder)

    def found():
        with torch.autocast("cpu", torch.bfloat16):
            return gradients_of(model, batch, letter_ids)

    logits, gradients = found()
    for module in decoder.modules():
        if hasattr(module, "experts"):
            module.experts.forward = torch.compile(module.experts.forward, fullgraph=True, dynamic=True)
    compiled_logits, compiled = found()
    torch.testing.assert_close(compiled_logits, logits, atol=0.05, rtol=0.05)
    for name, gradient in gradients.items():
        assert (compiled[name] - gradient).norm() <= 0.1 * gradient.norm(), name


def test_no_second_copy_of_the_experts_is_kept_for_the_backward_pass(families, rows_of):
    model = adapted(families("qwen3_vl_moe"))
    batch, _ = rows_of(families("qwen3_vl_moe"))
    weights = [weight for name, weight in model.named_parameters() if name.endswith(("gate_up_proj", "down_proj"))]
    sizes, places = {weight.numel() for weight in weights}, {weight.data_ptr() for weight in weights}

    def num_copies():
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
        ):
            answer_logits(model, batch)
        return sum(tensor.numel() in sizes and tensor.data_ptr() not in places for tensor in kept)

    assert num_copies() > 0
    speed_up_experts(model.get_base_model().get_decoder())
    assert num_copies() == 0


OTHERS = [{"lora_r": 2}, {"adapt_experts": False}]


@pytest.mark.parametrize("how", OTHERS, ids=["a rank of few bytes", "no adapter of experts"])
def test_experts_of_another_kind_stay_as_they_are(families, how):
    model = adapted(families("qwen3_vl_moe"), **how)
    assert speed_up_experts(model.get_base_model().get_decoder()) == 0


def test_experts_of_which_one_parameter_is_adapted_stay_as_they_are(families):
    args = ModelConfig(model_name_or_path=families("qwen3_vl_moe"), use_peft=True, lora_r=4, lora_dropout=0.0)
    args.lora_target_parameters = ["mlp.experts.down_proj"]
    base = load_model(args, "fp32")
    model = get_peft_model(base, lora_config(args, base))
    assert speed_up_experts(model.get_base_model().get_decoder()) == 0


def test_experts_of_llama_4_have_no_products_of_their_own(families, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    gpu, args = torch.device("cuda"), ModelConfig(use_peft=True, lora_r=8, lora_dropout=0.0)
    for family, served in (("qwen3_vl_moe", True), ("gemma4_moe", True), ("llama4", False)):
        model = skeleton(families(family))
        config = lora_config(args, model, adapt_experts=True)
        assert serves(model, config, gpu, torch.bfloat16) == served
        assert not serves(model, config, gpu, torch.float16)


def test_gpus_before_ampere_and_fp16_have_no_such_products(monkeypatch):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert can_use(gpu, torch.bfloat16, 8) and not can_use(gpu, torch.float16, 8)
    assert not can_use(gpu, torch.bfloat16, 4) and can_use(cpu, torch.float32, 4)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not can_use(gpu, torch.bfloat16, 8)
