"""What the libraries' options and ours do to a run: each trains the tiny base for a few steps and shows its mark."""

import json
import math

import pytest
import torch
from contest import write_hard_contest
from safetensors.torch import load_file
from scripts import run_script
from torch.testing import assert_close

from vqa_sft.predictions.file import read_predictions
from vqa_sft.tiny import TINY_PATH

pytestmark = pytest.mark.usefixtures("one_thread")
LR = 1e-3
BASE = TINY_PATH / "model.safetensors"


@pytest.fixture(scope="module")
def contest(tmp_path_factory):
    return write_hard_contest(tmp_path_factory.mktemp("options") / "contest")


@pytest.fixture(scope="module")
def train(contest):
    """`train(key=value, ...)`: two steps of four rows; the run folder."""
    number = iter(range(100))

    def run(*, validates=False, **values):
        folder = contest.parent / str(next(number))
        given = {"model_name_or_path": TINY_PATH, "train_data": contest / "train.csv", "max_steps": 2, "lora_r": 16}
        given |= {"per_device_train_batch_size": 4, "learning_rate": LR, "dataloader_num_workers": 0, "use_cpu": True}
        given |= {"gradient_checkpointing": False, "disable_tqdm": True, "logging_steps": 1, "check_images": False}
        given |= {"lr_scheduler_type": "constant", "output_dir": folder}
        given |= {"validation_data": contest / "validation.csv"} if validates else {}
        given = {key: value for key, value in (given | values).items() if value is not None}
        run_script("sft", *(str(token) for key, value in given.items() for token in (f"--{key}", value)))
        return folder

    return run


@pytest.fixture(scope="module")
def plain(train):
    return train()


def logged(run, name):
    log = json.loads((next(run.glob("checkpoint-*")) / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in log if name in entry]


def adapter(run):
    return load_file(run / "adapter_model.safetensors")


def config(run):
    return json.loads((run / "adapter_config.json").read_text())


def moved(run, part=""):
    """The weights of a run that began with zeros, in one row."""
    found = [weight.flatten() for name, weight in sorted(adapter(run).items()) if "lora_B" in name and part in name]
    return torch.cat(found)


def assert_scores_as_it_trained(run, contest):
    """Loaded again, the run gives the validation rows what it gave them at its end."""
    output = run / "again.csv"
    given = {"run": run, "data": contest / "validation.csv", "output": output, "num_workers": 0}
    run_script("predict", "--use_cpu", *(str(token) for key, value in given.items() for token in (f"--{key}", value)))
    ours, again = (read_predictions(path) for path in (run / "validation.parquet", output.with_suffix(".parquet")))
    assert list(ours.ids) == list(again.ids)
    assert_close(torch.tensor(again.choice_logits), torch.tensor(ours.choice_logits), atol=1e-4, rtol=1e-4)


SCHEDULES = {
    "linear": [0, 0.5, 1, 2 / 3, 1 / 3],
    "cosine": [0, 0.5, 1, (1 + math.cos(math.pi / 3)) / 2, (1 + math.cos(2 * math.pi / 3)) / 2],
    "constant_with_warmup": [0, 0.5, 1, 1, 1],
}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_learning_rate_follows_its_schedule(train, kind):
    run = train(lr_scheduler_type=kind, warmup_steps=2, max_steps=5)
    assert logged(run, "learning_rate") == pytest.approx([LR * factor for factor in SCHEDULES[kind]])


def test_gradients_are_clipped_to_a_norm_over_all_weights(train):
    run = train(optim="sgd", learning_rate=1, max_grad_norm=0.01, max_steps=1)
    assert logged(run, "grad_norm")[0] > 0.1  # before
    assert moved(run).norm().item() == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_every_optimiser_takes_adams_steps(train, plain, optim):
    run = train(optim=optim)
    state = torch.load(run / "checkpoint-2" / "optimizer.pt")["state"].values()
    state = [of_weight.get("__bnb_optimizer_quant_state__", of_weight) for of_weight in state]
    kinds = {of_weight["state1" if "8bit" in optim else "exp_avg"].dtype for of_weight in state}
    # bitsandbytes keeps tensors of less than 4,096 numbers in 32 bits.
    assert kinds == ({torch.float32, torch.uint8} if "8bit" in optim else {torch.float32})
    tolerance = 0.1 if "8bit" in optim else 1e-4
    assert (moved(run) - moved(plain)).norm() < tolerance * moved(plain).norm()


def check_rslora(run, plain):
    # The same weights with another factor (32 / sqrt(16) for 32 / 16): other logits, and so other gradients.
    assert adapter(run).keys() == adapter(plain).keys() and config(run)["use_rslora"]
    assert logged(run, "grad_norm")[0] == pytest.approx(math.sqrt(16) * logged(plain, "grad_norm")[0], rel=1e-4)


def check_dora(run, plain):
    new = adapter(run).keys() - adapter(plain).keys()
    assert len(new) == len(adapter(plain)) / 2 and all("lora_magnitude_vector" in name for name in new)


def check_modules_to_save(run, plain):
    base = {f"base_model.model.model.{name}": weight for name, weight in load_file(BASE).items()}
    new = {name: adapter(run)[name] for name in adapter(run).keys() - adapter(plain).keys()}
    assert new.keys() == {name for name in base if "visual.merger" in name}
    for name, weight in new.items():
        assert 0 < (weight - base[name].float()).abs().max() <= 2.01 * LR


def check_tower(run, plain):
    new = adapter(run).keys() - adapter(plain).keys()
    assert new and all("visual.blocks" in name for name in new) and moved(run, "visual").abs().max() > LR


def check_merger(run, plain):
    new = adapter(run).keys() - adapter(plain).keys()
    assert len(new) == 4 and all("visual.merger" in name for name in new) and moved(run, "visual").abs().max() > LR


def check_vision_learning_rate(run, plain):
    assert LR / 10 < moved(run, "visual").abs().max() <= 0.201 * LR < LR < moved(run, "language").abs().max()


def check_init_adapter(run, plain):
    first, second = adapter(plain), adapter(run)
    assert all(0 < (second[name] - first[name]).abs().max() <= 2.01 * LR for name in first)


def changed(run):
    base, trained = load_file(BASE), load_file(run / "model.safetensors")
    assert base.keys() == trained.keys()
    return {name for name in base if (trained[name].float() - base[name].float()).abs().max() > 0}


def check_full(run, plain):
    assert len(changed(run)) > 0.9 * len(load_file(BASE)) and "visual.patch_embed.proj.weight" in changed(run)


def check_full_but_vision(run, plain):
    assert changed(run) == {name for name in load_file(BASE) if "visual" not in name}


def check_image_augmentation(run, plain):
    assert abs(logged(run, "loss")[0] - logged(plain, "loss")[0]) > 1e-4


def check_end_of_turn(run, plain):
    assert logged(run, "loss")[0] > logged(plain, "loss")[0] and logged(run, "accuracy") == logged(plain, "accuracy")


OPTIONS = {
    "use_rslora": ({"use_rslora": True}, check_rslora),
    "use_dora": ({"use_dora": True}, check_dora),
    "lora_modules_to_save": ({"lora_modules_to_save": "merger"}, check_modules_to_save),
    "adapt_tower": ({"adapt_tower": True}, check_tower),
    "adapt_merger": ({"adapt_merger": True}, check_merger),
    "vision_learning_rate": ({"adapt_tower": True, "vision_learning_rate": LR / 10}, check_vision_learning_rate),
    "init_adapter": ({"lora_r": None}, check_init_adapter),
    "use_peft: false": ({"use_peft": False}, check_full),
    "use_peft: false, vision_learning_rate": ({"use_peft": False, "vision_learning_rate": 0}, check_full_but_vision),
    "image_augmentation": ({"image_augmentation": 0.3, "flip_images": True}, check_image_augmentation),
    "supervise_end_of_turn": ({"supervise_end_of_turn": True}, check_end_of_turn),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_shows_in_what_is_saved_and_the_run_scores_as_it_trained(train, plain, contest, name):
    values, check = OPTIONS[name]
    if name == "init_adapter":
        values = values | {"init_adapter": plain}
    run = train(validates=True, **values)
    check(run, plain)
    assert_scores_as_it_trained(run, contest)
