import pytest

from vqa_sft import benchmark
from vqa_sft.config import read_recipe
from vqa_sft.model import load_processor, load_trained
from vqa_sft.scoring import find_letter_ids


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen3-VL-8B-Instruct"])
def test_random_models_of_a_true_shape_load_as_the_real_ones_do(tmp_path, monkeypatch, name):
    # The same keys with small numbers: the true ones fill a GPU.
    small = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 1, "num_key_value_heads": 1}
    small |= {"intermediate_size": 64, "vocab_size": 2000, "head_dim": 128}
    family, text, vision = benchmark.SHAPES[name]
    vision = vision | {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 128}
    if family == "qwen3_vl":
        vision |= {"deepstack_visual_indexes": [0, 1]}
    monkeypatch.setitem(benchmark.SHAPES, name, (family, text | small, vision))
    folder = benchmark.save_random_model(name, tmp_path / "model")
    processor = load_processor(str(folder), max_pixels=200704)
    assert len(find_letter_ids(processor, 4)) == 4
    values = {"model_name_or_path": str(folder), "train_data": "x", "output_dir": "y", "dtype": "float32"}
    recipe = read_recipe([token for key, value in values.items() for token in (f"--{key}", value)])
    assert load_trained("none", recipe.model_args(), "fp32").config.model_type == family


def test_the_table_has_a_line_for_every_recipe_failed_or_not():
    done = {"precision": "fp16", "train_examples_per_s": 3.14, "peak_memory_gib": 12.3}
    assert benchmark.table([("a", done), ("b", {"failed": 2})]).splitlines()[2:] == [
        "| a | fp16 | 3.1 | 12.3 |",
        "| b | failed with exit code 2 | | |",
    ]
