"""A trainer over a few rows, and the prompts that it sees."""

import torch

from vqa_sft.batch.collator import AnswerCollator, Augmentation, TrainCollator
from vqa_sft.batch.prompts import Prompts
from vqa_sft.config.recipe import read_recipe
from vqa_sft.data.examples import load_examples
from vqa_sft.data.options import ReadOptions
from vqa_sft.models.load import load_model, load_processor
from vqa_sft.models.lora import lora_config
from vqa_sft.models.scoring import find_letter_ids
from vqa_sft.training.loss import LossSettings
from vqa_sft.training.trainer import AnswerTrainer

SPELLING = {"qwen2_5_vl": "{}", "llava": " {}", "qwen3_vl": "{}", "smolvlm": " {}"}


def build_trainer(folder, contest, output_dir, num_rows, shuffle_choices=True, own=None, **values):
    """A trainer over the first rows of the contest, whose adapter is random on both sides."""
    usual = {"model_name_or_path": folder, "output_dir": output_dir, "train_data": contest / "train.csv"}
    usual |= {"use_cpu": True, "disable_tqdm": True, "dataloader_num_workers": 0, "gradient_checkpointing": False}
    values = usual | values
    own = {"vocabulary_weight": 1.0} if own is None else dict(own)
    vision_learning_rate = own.pop("vision_learning_rate", None)
    recipe = read_recipe([token for key, value in values.items() for token in (f"--{key}", str(value))])
    examples, _ = load_examples(str(contest / "train.csv"), ReadOptions(limit=num_rows))
    processor = load_processor(folder)
    model = load_model(recipe.model_args(), "fp32")
    trainer = AnswerTrainer(
        model=model,
        args=recipe.training_args("fp32"),
        peft_config=lora_config(recipe.model_args(), model, **recipe.arguments.adapted_parts),
        train_dataset=examples,
        eval_dataset=examples,
        processing_class=processor,
        data_collator=TrainCollator(processor, Prompts(), 4, seed=42, augmentation=Augmentation(shuffle_choices)),
        eval_collator=AnswerCollator(processor, Prompts(), 4),
        loss=LossSettings(find_letter_ids(processor, 4), **own),
        vision_learning_rate=vision_learning_rate,
    )
    torch.manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return trainer, examples, processor


def prompt_bytes(processor, batch, i):
    ids = batch["input_ids"][i][batch["attention_mask"][i].bool()]
    return processor.tokenizer.decode(ids).encode()
