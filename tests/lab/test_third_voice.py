"""The hidden states that the lab's third voice hears."""

import numpy as np
import torch
from PIL import Image
from trl import ModelConfig

from vqa_sft.lab.class_sets import QUESTIONS, read_rows, write_numbers
from vqa_sft.lab.third_voice import hidden_states
from vqa_sft.models.load import load_model, load_processor
from vqa_sft.tiny import TINY_PATH


def test_the_last_hidden_state_is_what_the_head_reads_where_the_answer_begins(tmp_path):
    write_numbers(tmp_path, num_train=100, num_test=4)
    rows = read_rows(tmp_path)[2]
    found = hidden_states(rows, QUESTIONS["numbers"], torch.device("cpu"))
    model = load_model(ModelConfig(model_name_or_path=str(TINY_PATH), dtype=None), "fp32").eval()
    processor = load_processor(str(TINY_PATH))
    content = [{"type": "image"}, {"type": "text", "text": QUESTIONS["numbers"]}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    for row, of_row in zip(rows, found, strict=True):
        inputs = processor(text=[prompt], images=[[Image.open(row.path).convert("RGB")]], return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits[0, -1]
            read = model.lm_head(torch.from_numpy(of_row[-1]))
        torch.testing.assert_close(read, logits, atol=1e-4, rtol=1e-4)
    assert np.abs(found[0] - found[1]).max() > 1e-3
