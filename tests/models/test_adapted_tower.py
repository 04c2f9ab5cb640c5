"""The vision tower and its merger, adapted beside the language model, with a learning rate of their own."""

import pytest
import torch
import torch.nn.functional as F
from gradients import assert_same
from trainers import build_trainer
from transformers import AutoConfig, AutoModelForImageTextToText

from vqa_sft.batch.collator import TrainCollator
from vqa_sft.batch.prompts import Prompts
from vqa_sft.errors import InputError
from vqa_sft.models.fast import speedups
from vqa_sft.models.parts import vision_layers
from vqa_sft.models.scoring import answer_logits

BOTH = {"adapt_tower": True, "adapt_merger": True}
SGD = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "max_steps": 1}
MERGERS = {
    "qwen2_5_vl": ["model.visual.merger.mlp.0", "model.visual.merger.mlp.2"],
    "qwen3_vl": [
        f"model.visual.{part}.linear_fc{i}"
        for part in ("merger", "deepstack_merger_list.0", "deepstack_merger_list.1")
        for i in (1, 2)
    ],
    "llava": ["model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"],
    "smolvlm": ["model.connector.modality_projection.proj"],
}
BLOCKS = {
    "qwen2_5_vl": (
        "model.visual.blocks.",
        2,
        ["attn.proj", "attn.qkv", "mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"],
    ),
    "qwen3_vl": ("model.visual.blocks.", 3, ["attn.proj", "attn.qkv", "mlp.linear_fc1", "mlp.linear_fc2"]),
}
CLIP = [*(f"self_attn.{name}_proj" for name in ("k", "out", "q", "v")), "mlp.fc1", "mlp.fc2"]
BLOCKS["llava"] = ("model.vision_tower.encoder.layers.", 2, sorted(CLIP))
BLOCKS["smolvlm"] = ("model.vision_model.encoder.layers.", 2, sorted(CLIP))


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def is_vision(name):
    return not ("language_model" in name or "text_model" in name or "lm_head" in name)


@pytest.mark.parametrize("family", MERGERS)
def test_layers_of_the_tower_and_of_what_follows_it_are_found(families, family):
    config = AutoConfig.from_pretrained(families(family))
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    prefix, depth, names = BLOCKS[family]
    tower, merger = vision_layers(model)
    assert sorted(tower) == [f"{prefix}{i}.{name}" for i in range(depth) for name in names]
    assert merger == MERGERS[family]


@pytest.mark.parametrize("part", ["adapt_tower", "adapt_merger"])
@pytest.mark.parametrize("family", MERGERS)
def test_what_is_asked_for_is_adapted_beside_the_language_model_and_nothing_else(
    families, contest, tmp_path, family, part
):
    plain, asked = (
        {
            name.split(".lora_")[0].removeprefix("base_model.model.")
            for name in trained(build_trainer(families(family), contest, tmp_path, 4, **values)[0].model)
        }
        for values in ({}, {part: True})
    )
    prefix, depth, names = BLOCKS[family]
    tower = [f"{prefix}{i}.{name}" for i in range(depth) for name in names]
    assert asked - plain == set(tower if part == "adapt_tower" else MERGERS[family]) and plain < asked


@pytest.mark.parametrize(
    ("family", "checkpoints"),
    [("qwen2_5_vl", False), ("qwen2_5_vl", True), ("qwen3_vl", False), ("llava", False), ("smolvlm", False)],
)
def test_a_step_is_the_librarys_gradient_times_the_learning_rate_of_each_part(
    families, contest, tmp_path, family, checkpoints
):
    own = {"vision_learning_rate": 0.25, "vocabulary_weight": 1.0}
    values = {"per_device_train_batch_size": 4, "save_strategy": "no"} | SGD | BOTH
    trainer, examples, processor = build_trainer(families(family), contest, tmp_path, 4, own=own, **values)
    batch = TrainCollator(processor, Prompts(), 4, seed=42)(list(examples))
    answers = trainer.letter_ids[batch["answers"]]
    F.cross_entropy(answer_logits(trainer.model, batch), answers).backward()
    gradients, before = {}, {}
    for name, parameter in trained(trainer.model).items():
        # LLaVA shows the language model the last layer but one: nothing reads the last.
        gradients[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        before[name] = parameter.detach().clone()
        assert gradients[name].abs().max() > 1e-6 or "vision_tower.encoder.layers.1." in name
    trainer.model.zero_grad()
    trainer.args.gradient_checkpointing = checkpoints
    if checkpoints:
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    trainer.data_collator.packer = speedups.pack_rows(trainer.model, "fp32")
    speedups.speed_up(trainer.model)
    trainer.train()
    moved = {name: before[name] - parameter.detach() for name, parameter in trained(trainer.model).items()}
    assert sum(map(is_vision, moved)) > 10
    expected = {name: gradient * (0.25 if is_vision(name) else 1.0) for name, gradient in gradients.items()}
    assert_same((torch.zeros(1), moved), (torch.zeros(1), expected))


@pytest.mark.parametrize("use_peft", [True, False])
def test_groups_keep_their_weight_decay_and_follow_the_schedule(families, contest, tmp_path, use_peft):
    parts = BOTH if use_peft else {}
    values = {"use_peft": use_peft, "learning_rate": 0.1, "weight_decay": 0.3, "max_steps": 4, "warmup_steps": 2}
    values |= {"lr_scheduler_type": "linear", "max_grad_norm": 0.0} | parts
    by_name = []
    for own in ({}, {"vision_learning_rate": 0.01}):
        trainer, _, _ = build_trainer(families("qwen2_5_vl"), contest, tmp_path, 4, own=own, **values)
        trainer.create_optimizer_and_scheduler(4)
        found, names = {}, {id(parameter): name for name, parameter in trainer.model.named_parameters()}
        trainer.optimizer.step()
        trainer.lr_scheduler.step()  # half of the warm-up
        for group in trainer.optimizer.param_groups:
            found |= {names[id(parameter)]: (group["weight_decay"], group["lr"]) for parameter in group["params"]}
        by_name.append(found)
    plain, ours = by_name
    assert plain.keys() == ours.keys() == trained(trainer.model).keys() and set(plain.values()) >= {(0.3, 0.05)}
    assert {decay for decay, _ in plain.values()} == ({0.3} if use_peft else {0.0, 0.3})
    assert ours == {name: (decay, 0.005 if is_vision(name) else 0.05) for name, (decay, _) in plain.items()}


def test_a_learning_rate_for_nothing_is_refused(families, contest, tmp_path):
    own = {"vision_learning_rate": 0.1}
    trainer, _, _ = build_trainer(families("qwen2_5_vl"), contest, tmp_path, 4, own=own, max_steps=1)
    with pytest.raises(InputError, match="nothing outside the language model is trained"):
        trainer.train()
