"""Other tools on the rows of the benchmark, each as a function that `benchmark.py` runs in a process of its own.

All train LoRA of rank 32 and alpha 64 on the seven usual layers, save and report nothing, and get the same question,
choices and letter. What is not installed is imported by nobody.
"""

import csv
import importlib.util
import json
import os
from pathlib import Path

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# peer -> module -> what pip installs, without what it depends on: ms-swift 4.6 asks for transformers before 5.20, TRL
# before 1.0, peft before 0.21 and datasets before 4.8.5, and trains Qwen2.5-VL with what vqa-sft asks for.
PACKAGES = {
    "swift": {
        "swift": "ms-swift==4.6.0",
        "modelscope": "modelscope==1.36.3",  # a later one asks for cryptography
        "dacite": "dacite",
        "json_repair": "json-repair",
        "qwen_vl_utils": "qwen-vl-utils",
        "pydantic": "pydantic",
        "pydantic_core": "pydantic-core",
        "annotated_types": "annotated-types",
        "typing_inspection": "typing-inspection",
    }
}


def missing_packages(peer: str) -> list[str]:
    """What pip must install, with --no-deps, before this peer can train; nothing is imported."""
    needed = PACKAGES.get(peer, {})
    return [package for module, package in needed.items() if importlib.util.find_spec(module) is None]


def read_rows(data: str) -> tuple[list[str], list[str], list[str]]:
    """Question with its choices, letter of the answer and path of the image, of each training row."""
    with (Path(data) / "train.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    texts = [row["question"] + "".join(f"\n{letter.upper()}. {row[letter]}" for letter in "abcd") for row in rows]
    return texts, [row["answer"].upper() for row in rows], [str(Path(data) / row["path"]) for row in rows]


def run_trl(model: str, data: str, batch_size: str, max_pixels: str, max_steps: str, lora: str) -> None:
    """TRL's SFTTrainer with its own collator and its defaults; `lora`: JSON of further arguments of LoraConfig."""
    import torch
    from datasets import Dataset, Features, Image, List, Value
    from peft import LoraConfig
    from transformers import AutoProcessor
    from trl import SFTConfig, SFTTrainer

    texts, answers, images = read_rows(data)
    message = [{"role": Value("string"), "content": Value("string")}]
    columns = {
        "prompt": [[{"role": "user", "content": text}] for text in texts],
        "completion": [[{"role": "assistant", "content": answer}] for answer in answers],
        "images": [[image] for image in images],
    }
    features = Features({"prompt": message, "completion": message, "images": List(Image())})
    processor = AutoProcessor.from_pretrained(model)
    if max_pixels != "null":
        processor.image_processor.size = {"shortest_edge": min(50176, int(max_pixels)), "longest_edge": int(max_pixels)}
    on_gpu = torch.cuda.is_available()
    args = SFTConfig(
        output_dir=str(Path(data).parent / "trl"),
        per_device_train_batch_size=int(batch_size),
        max_steps=int(max_steps),
        max_length=None,
        model_init_kwargs={"dtype": "bfloat16" if on_gpu else "float32"},
        bf16=on_gpu,
        use_cpu=not on_gpu,
        save_strategy="no",
        report_to="none",
    )
    trainer = SFTTrainer(
        model,
        args=args,
        train_dataset=Dataset.from_dict(columns, features=features),
        processing_class=processor,
        peft_config=LoraConfig(r=32, lora_alpha=64, target_modules=LAYERS, **json.loads(lora)),
    )
    trainer.train()


def run_swift(model: str, data: str, batch_size: str, max_pixels: str, max_steps: str, options: str) -> None:
    """ms-swift's `swift sft` on a Qwen2.5-VL, with its own template and collator; `options`: JSON of its arguments."""
    import torch

    os.environ |= {"MAX_PIXELS": max_pixels, "MIN_PIXELS": str(min(50176, int(max_pixels)))}
    from swift import sft_main
    from swift.template.templates.qwen import Qwen2VLTemplate
    from transformers import AutoTokenizer

    # It takes the number of the checkpoints' token; the random models have fewer tokens.
    Qwen2VLTemplate.image_token_id = AutoTokenizer.from_pretrained(model).convert_tokens_to_ids("<|image_pad|>")
    table = Path(data) / "train.swift.jsonl"
    with table.open("w", encoding="utf-8") as file:
        for text, answer, image in zip(*read_rows(data), strict=True):
            messages = [{"role": "user", "content": f"<image>{text}"}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages, "images": [str(Path(image).resolve())]}) + "\n")
    on_gpu = torch.cuda.is_available()
    named = {
        "model": model,
        "model_type": "qwen2_5_vl",
        "template": "qwen2_5_vl",
        "dataset": table,
        "split_dataset_ratio": 0,
        "output_dir": Path(data).parent / "swift",
        "tuner_type": "lora",
        "lora_rank": 32,
        "lora_alpha": 64,
        "target_modules": "all-linear",  # of the language model: the seven layers
        "freeze_vit": True,
        "freeze_aligner": True,
        "torch_dtype": "bfloat16" if on_gpu else "float32",
        "bf16": on_gpu,
        "fp16": False,
        "attn_impl": "sdpa",
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": 1,
        "max_steps": max_steps,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "check_model": False,
        "use_hf": True,
    }
    sft_main([token for name, value in (named | json.loads(options)).items() for token in (f"--{name}", str(value))])


PEERS = {"trl": run_trl, "swift": run_swift}
