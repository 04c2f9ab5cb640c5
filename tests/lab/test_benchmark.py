import pytest
import torch

from vqa_sft.config.recipe import read_recipe
from vqa_sft.lab import benchmark
from vqa_sft.models import shapes
from vqa_sft.models.load import load_processor, load_trained
from vqa_sft.models.scoring import find_letter_ids


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen3-VL-8B-Instruct"])
def test_random_models_of_a_true_shape_load_as_the_real_ones_do(tmp_path, monkeypatch, name):
    # The same keys with small numbers: the true ones fill a GPU.
    small = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 1, "num_key_value_heads": 1}
    small |= {"intermediate_size": 64, "vocab_size": 2000, "head_dim": 128}
    family, text, vision = shapes.SHAPES[name]
    vision = vision | {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 128}
    if family == "qwen3_vl":
        vision |= {"deepstack_visual_indexes": [0, 1]}
    monkeypatch.setitem(shapes.SHAPES, name, (family, text | small, vision))
    folder = benchmark.save_random_model(name, tmp_path / "model")
    processor = load_processor(str(folder), max_pixels=200704)
    assert len(find_letter_ids(processor, 4)) == 4
    values = {"model_name_or_path": str(folder), "train_data": "x", "output_dir": "y", "dtype": "float32"}
    recipe = read_recipe([token for key, value in values.items() for token in (f"--{key}", value)])
    assert load_trained("none", recipe.model_args(), "fp32").config.model_type == family


def test_the_table_has_a_line_for_every_case_failed_or_not():
    cases = [benchmark.Case(name, "train", "tiny", baseline="a") for name in "abc"]
    done = {"examples_per_s": 3.14, "rows_a_step": 16, "peak_gib": 12.3, "compilations": 6, "idle": 0.04, "tflop": 10}
    results = {"a": done, "b": {"failed": 2}, "c": done | {"examples_per_s": 31.4}}
    assert benchmark.table(cases, results, 785).splitlines()[2:] == [
        "| a | 16 | 3.1 | 1.0 | 12.3 | 4% | 6 | 4% |",
        "| b | | failed with exit code 2 | | | | | |",
        "| c | 16 | 31.4 | 10.0 | 12.3 | 40% | 6 | 4% |",
    ]


def test_needed_work_is_that_of_the_weights_a_token_meets():
    """Against the weights of a real model, counted one by one."""
    from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

    _, text, vision = shapes.SHAPES["tiny"]
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config).model
    layers = model.language_model.layers
    linear = [sum(w.numel() for w in part.parameters() if w.ndim > 1) for part in (layers[0].self_attn, layers[0].mlp)]
    num_tokens = 100
    weights = num_tokens * (2 * linear[0] + linear[1]) + linear[1] + 128 * 2000
    pairs = num_tokens**2 / 2 * 2  # causal, two layers
    decoder = 2 * weights + 4 * pairs * 128
    assert benchmark.needed_tflop(config, num_tokens, 0, trains=False) * 1e12 == pytest.approx(decoder, rel=1e-6)
    assert benchmark.needed_tflop(config, num_tokens, 0, trains=True) * 1e12 == pytest.approx(2 * decoder, rel=1e-6)
    tower = sum(w.numel() for w in model.visual.parameters() if w.ndim > 1)
    merger = sum(w.numel() for w in model.visual.merger.parameters() if w.ndim > 1)
    per_patch = 2 * (tower - merger + merger / 4) + 4 * 32 * (64 + 64)  # one block sees a window, one the image
    with_image = benchmark.needed_tflop(config, num_tokens, 64, trains=False) * 1e12
    assert with_image - decoder == pytest.approx(64 * per_patch, rel=1e-6)


@pytest.mark.slow
def test_every_kind_of_case_runs_on_a_cpu(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("sys.argv", ["benchmark", "--tiny", "--steps", "2", "--work", str(tmp_path)])
    benchmark.main()
    lines = [line.split("|") for line in capfd.readouterr().out.splitlines() if line.startswith("|")][2:]
    scored = ["score", "rotations", "five runs", "one row at a time"]
    assert [line[1].strip() for line in lines] == ["TRL", "train", "cached features", *scored]
    assert all(float(line[3]) > 0 for line in lines)
