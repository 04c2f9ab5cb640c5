"""Every speed-up against the library's own path, in fp32: same logits, same gradients."""

import copy

import pytest
import torch
from gradients import PACKED_FAMILIES, assert_same, compiler, gradients_of, road_of
from peft import get_peft_model
from transformers import AutoConfig
from trl import ModelConfig

from vqa_sft.batch.collator import AnswerCollator
from vqa_sft.batch.prompts import Prompts, render_prompt
from vqa_sft.models.families import PACKED, tower_of
from vqa_sft.models.fast import compilation, fused_lora, speedups, vision
from vqa_sft.models.load import load_model
from vqa_sft.models.lora import lora_config
from vqa_sft.models.scoring import answer_logits


@pytest.mark.parametrize("answers_only", [False, True], ids=["whole last layer", "last layer at the answers"])
def test_packed_rows_give_the_logits_and_gradients_of_padded_rows(road, answers_only):
    model, processor, letter_ids, rows = road
    plain = gradients_of(model, AnswerCollator(processor, Prompts(), 4)(rows), letter_ids)
    packer = speedups.pack_rows(model.get_base_model(), "fp32", answers_only=answers_only)
    batch = AnswerCollator(processor, Prompts(), 4, packer=packer)(rows)
    assert batch["input_ids"].shape[0] == 1 and "attention_mask" not in batch
    assert_same(gradients_of(model, batch, letter_ids), plain)


@pytest.mark.parametrize("family", PACKED_FAMILIES)
def test_every_family_has_the_logits_and_gradients_of_the_library(families, contest, family):
    model, processor, letter_ids, rows = road_of(families(family), contest)
    plain = gradients_of(model, AnswerCollator(processor, Prompts(), 4)(rows), letter_ids)
    packer = speedups.pack_rows(model.get_base_model(), "fp32")
    speedups.speed_up(model)
    batch = AnswerCollator(processor, Prompts(), 4, packer=packer)(rows)
    assert (batch["input_ids"].shape[0] == 1) == packer.packs_rows == (family not in ("qwen3_5", "qwen3_5_moe"))
    assert_same(gradients_of(model, batch, letter_ids), plain)


def test_tokens_that_all_rows_begin_with_stand_once(road):
    model, processor, letter_ids, rows = road
    plain = AnswerCollator(processor, Prompts(), 4)
    packed = AnswerCollator(processor, Prompts(), 4, packer=speedups.pack_rows(model.get_base_model(), "fp32"))
    system = processor.tokenizer(render_prompt(processor, rows[2], range(4), Prompts()).split(rows[2]["question"])[0])
    packed.shares_images = False  # as in training
    batch = packed(rows)
    places, own, copies = batch["shared_prefix"]
    # Up to the user's turn, for one of the rows has no image.
    assert copies.shape == (5, len(system["input_ids"])) and copies.shape[1] > 10
    assert batch["input_ids"].numel() == plain(rows)["attention_mask"].sum() - 4 * copies.shape[1]
    assert torch.equal(places[own], torch.arange(len(own)))
    # One prompt three times: shared up to its image, or else up to the answer position.
    up_to_image, up_to_answer = copies.shape[1] + 1, int(plain(rows[2:3])["answer_positions"])
    for same, num_shared in (([rows[0]] * 3, up_to_image), ([rows[2]] * 3, up_to_answer)):
        batch, padded = packed(same), plain(same)
        assert batch["shared_prefix"][2].shape == (3, num_shared)
        assert_same(gradients_of(model, batch, letter_ids), gradients_of(model, padded, letter_ids))
    assert "shared_prefix" not in packed(rows[:1])


def test_a_padded_mlp_gives_the_features_of_its_own_width(road):
    model, processor, _, rows = road
    base = model.get_base_model()
    tower, mlp = tower_of(base), PACKED[base.config.model_type].tower_mlp
    batch = AnswerCollator(processor, Prompts(), 4)(rows)
    images = batch["pixel_values"], batch["image_grid_thw"]
    with torch.no_grad():
        expected = tower(*images).pooler_output
        widths = [vision.pad_mlp(module, mlp) for module in tower.modules()]
        assert {None, (52, 64)} >= set(widths) and vision.embed_patches_by_product(tower)
        # Sums in another order: 1.2e-5 was seen on one processor.
        torch.testing.assert_close(tower(*images).pooler_output, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "traced"])
def test_fused_adapters_give_the_logits_and_gradients_of_separate_ones(road, compiled):
    model, processor, letter_ids, rows = road
    batch = AnswerCollator(processor, Prompts(), 4)(rows)
    plain = gradients_of(model, batch, letter_ids)
    decoder = model.get_base_model().get_decoder()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert fused_lora.fuse(decoder) == (len(decoder.layers),) * 2
    for layer in decoder.layers[:1] if compiled else []:  # tracing takes three seconds a layer
        layer.forward = torch.compile(layer.forward, dynamic=True, backend="aot_eager", fullgraph=True)
    assert_same(gradients_of(model, batch, letter_ids), plain)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    # An optimiser's step is seen, and so is a copy of the model.
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter.mul_(0.5)
        changed = answer_logits(model, batch)
        torch.testing.assert_close(answer_logits(copy.deepcopy(model), batch), changed)
        assert (changed - plain[0]).abs().max() > 1e-3


def test_a_model_in_training_is_not_walked_over_again(families):
    args = ModelConfig(model_name_or_path=families("qwen2_5_vl"), use_peft=True, lora_r=4, dtype=None)
    base = load_model(args, "fp32")
    model = get_peft_model(base, lora_config(args, base))
    assert model.training and not base.training
    speedups.stay_in_training(model)
    for mode in (True, False, True):
        assert model.train(mode) is model
        assert {module.training for module in model.modules()} == {mode}
    layer = base.get_decoder().layers[0].eval()
    model.train()
    assert not layer.training  # nobody looked
    other = copy.deepcopy(model).eval()
    assert model.training and not other.training and other.train().training


@pytest.mark.parametrize("family", ["qwen2_5_vl", "lfm2_vl"])
def test_layers_that_are_not_compiled_say_why(families, family, capsys):
    args = ModelConfig(model_name_or_path=families(family), dtype=None)
    model = load_model(args, "fp32")
    speedups.pack_rows(model, "fp32")
    speedups.speed_up(model, compile_layers=True)
    assert "layers are not compiled: that needs a GPU of compute capability 8.0" in capsys.readouterr().out


def test_a_mixture_whose_configuration_asks_for_router_logits_gives_none(families):
    model = load_model(ModelConfig(model_name_or_path=families("qwen3_5_moe"), dtype=None), "fp32")
    model.config.text_config.output_router_logits = True
    assert speedups.pack_rows(model, "fp32").keeps_answers and not model.config.text_config.output_router_logits


def num_graphs_under_ddp():
    """Of one compiled layer that has two parameters, where DDP's buckets hold one each."""
    layer, graphs = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False)), []

    def count(graph, inputs, **kwargs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    layer.compile(backend=count)
    torch.nn.parallel.DistributedDataParallel(layer)(torch.ones(1, 2))
    return len(graphs)


def test_compiled_layers_stay_one_graph_each_under_ddp(families, monkeypatch):
    monkeypatch.setattr(compilation, "why_not", lambda base: None)
    monkeypatch.setattr(compilation, "can_compile", lambda: True)
    monkeypatch.setattr(torch.distributed, "_DEFAULT_FIRST_BUCKET_BYTES", 1)
    model = load_model(ModelConfig(families("qwen2_5_vl")), "fp32")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    with compiler():
        before = num_graphs_under_ddp()
        with monkeypatch.context() as patched:
            patched.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
            speedups.speed_up(model, compile_layers=True)
        assert (before, num_graphs_under_ddp()) == (2, 1)
    torch.distributed.destroy_process_group()


def test_many_packed_rows_are_compiled_and_padded_ones_where_the_recipe_asks(families):
    packed, padded = (AutoConfig.from_pretrained(families(name)) for name in ("qwen2_5_vl", "lfm2_vl"))
    assert speedups.pays_compilation(packed, 3000, None) and not speedups.pays_compilation(packed, 2999, None)
    assert not speedups.pays_compilation(padded, 10**6, None)
    for config in (packed, padded):
        assert speedups.pays_compilation(config, 10, True) and not speedups.pays_compilation(config, 10**6, False)


def test_everything_together_gives_the_logits_and_gradients_of_the_library(road):
    model, processor, letter_ids, rows = road
    plain = gradients_of(model, AnswerCollator(processor, Prompts(), 4)(rows), letter_ids)
    packer = speedups.pack_rows(model.get_base_model(), "fp32")
    speedups.speed_up(model)
    batch = AnswerCollator(processor, Prompts(), 4, packer=packer)(rows)
    assert_same(gradients_of(model, batch, letter_ids), plain)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert_same(gradients_of(model, batch, letter_ids), plain)


def test_the_first_layers_input_has_gradients_in_training_alone():
    class Decoder(torch.nn.Module):
        def forward(self, inputs_embeds=None):
            return inputs_embeds.requires_grad

    decoder, trained = Decoder(), torch.ones(2, requires_grad=True)
    decoder.register_forward_pre_hook(compilation._ask_for_gradients, with_kwargs=True)
    assert decoder(inputs_embeds=torch.ones(2)) and decoder(inputs_embeds=trained * 2)
    with torch.no_grad():
        assert not decoder(inputs_embeds=torch.ones(2))
    with torch.inference_mode():
        assert not decoder(inputs_embeds=torch.ones(2))
