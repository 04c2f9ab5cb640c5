import csv
import shutil

import pytest
from PIL import Image

from vqa_sft.runs import folder as run_folder
from vqa_sft.tiny import TINY_PATH
from vqa_sft.training.curves import by_step, draw


def test_a_run_leaves_its_log_and_a_plot_also_when_it_was_stopped_between(families, sft, tmp_path):
    values = {"max_steps": 4, "logging_steps": 1, "save_steps": 2, "save_strategy": "steps", "save_total_limit": 5}
    values |= {"validation_fraction": 0.25, "eval_strategy": "steps", "eval_steps": 2}
    run = sft(families("qwen2_5_vl"), tmp_path / "run", **values)

    def log():
        with (run / "log.csv").open() as file:
            return list(csv.DictReader(file))

    whole = log()
    assert [row["step"] for row in whole] == ["1", "2", "3", "4"]
    assert all(float(row["loss"]) > 0 and 0 <= float(row["accuracy"]) <= 1 for row in whole)
    assert [bool(row["eval_nll"]) for row in whole] == [False, True, False, True]
    with Image.open(run / "log.png") as plot:
        assert plot.width > 1000
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "loss by step" in page and page.count("<svg") == page.count("</svg>") >= 4 and "<path" in page

    (run / run_folder.RUN).unlink()
    shutil.rmtree(run / "checkpoint-4")
    sft(families("qwen2_5_vl"), run, **values)
    assert [row["loss"] for row in log()] == [row["loss"] for row in whole]


def test_what_is_logged_apart_is_one_line_a_step(tmp_path):
    history = [{"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": 2.0}, {"step": 1, "loss": 3.0}]
    assert by_step(history) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 1.0, "eval_loss": 2.0}]
    draw(tmp_path / "none.png", [{"step": 1, "train_runtime": 3.0}])
    assert not (tmp_path / "none.png").exists()


def test_a_run_begins_with_the_adapter_of_another(families, sft, contest, tmp_path, capsys):
    base = families("qwen2_5_vl")
    first = sft(base, tmp_path / "first", max_steps=2, lora_r=4)
    before = (first / "adapter_model.safetensors").read_bytes()
    # A learning rate of 0 leaves it as it is.
    second = sft(base, tmp_path / "second", max_steps=1, init_adapter=first, learning_rate=0)
    assert (second / "adapter_model.safetensors").read_bytes() == before
    third = sft(base, tmp_path / "third", max_steps=1, init_adapter=first)
    assert (third / "adapter_model.safetensors").read_bytes() != before
    for how, says in (
        ({"init_adapter": first, "lora_r": 8}, "lora_r cannot be set beside init_adapter"),
        ({"init_adapter": contest}, "there is no adapter_config.json"),
        ({"init_adapter": first, "model": TINY_PATH}, "does not load on"),
    ):
        with pytest.raises(SystemExit) as stop:
            sft(how.pop("model", base), tmp_path / "wrong", max_steps=1, **how)
        assert stop.value.code == 2 and says in capsys.readouterr().err
