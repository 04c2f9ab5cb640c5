"""What the files in accelerate_configs/ and deepspeed_configs/ promise, with two processes of one machine's CPU."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from contest import write_hard_contest
from safetensors.torch import load_file, save_file
from scripts import run_forked, run_script, train
from torch.testing import assert_close

from vqa_sft.config.checks import CHOSEN_BY
from vqa_sft.config.recipe import read_recipe
from vqa_sft.data.examples import load_examples
from vqa_sft.errors import InputError
from vqa_sft.models import processes
from vqa_sft.predictions.file import read_predictions
from vqa_sft.runs import folder as run_folder
from vqa_sft.tiny import TINY_PATH

ROOT = Path(__file__).parents[2]
LAUNCHES = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
ZEROS = sorted((ROOT / "deepspeed_configs").glob("*.json"))
pytestmark = pytest.mark.usefixtures("one_thread")
MODEL = TINY_PATH
# 24 rows to train on: 3 steps of 8 rows, on one process 4 x 2, on two 2 x 2 x 2; 2 epochs.
RECIPE = {"model_name_or_path": MODEL, "num_train_epochs": 2, "global_batch_size": 8}
RECIPE |= {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1, "use_cpu": True}
RECIPE |= {"gradient_checkpointing": True, "dataloader_num_workers": 0, "disable_tqdm": True}
# Without that epsilon Adam's first steps are as long for a gradient of rounding as for any other.
RECIPE |= {"adam_epsilon": 1e-3, "image_augmentation": 0.1}
# Runs a script under `accelerate launch` and says how many processes really worked together. DeepSpeed's CPU backend
# compiles an all-reduce of its own when it may; gloo's does as well and needs no compiler. What processes exchange in
# the forward and backward of a step, beside the gradients, is counted too.
COUNTED = """
import atexit, os, runpy, sys
import torch.distributed
from accelerate import PartialState
from transformers import Trainer

if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {}

@atexit.register
def count():
    if PartialState().is_main_process:
        print("processes that worked together:", PartialState().num_processes)
        print("exchanged within steps:", exchanged)

exchanged, is_within = [], []

def within(method):
    def run(*args, **kwargs):
        is_within.append(True)
        try:
            return method(*args, **kwargs)
        finally:
            is_within.pop()
    return run

def counting(name, function):
    def run(*args, **kwargs):
        if is_within:
            exchanged.append(name)
        return function(*args, **kwargs)
    return run

def build(self, *args, build=Trainer.__init__, **kwargs):
    build(self, *args, **kwargs)
    self.get_batch_samples, self.training_step = within(self.get_batch_samples), within(self.training_step)

Trainer.__init__ = build
for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "_broadcast_coalesced", "barrier"):
    setattr(torch.distributed, name, counting(name, getattr(torch.distributed, name)))

class TornDown:
    def __del__(self, abort=os.abort):
        abort()  # as a thread of gloo's does now and then, when Python tears down around it

if os.environ.get("WORLD_SIZE", "1") != "1":
    torn_down = TornDown()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def parse_launch(*arguments):
    """The arguments of `accelerate launch`, as it sees them after it has read the yaml."""
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(list(arguments)))
    return args


def test_rows_without_a_image_are_refused_where_weights_are_spread(contest, monkeypatch):
    examples, _ = load_examples(str(contest / "train.csv"))
    bare = examples.map(lambda row, i: {"images": row["images"] if i % 8 else []}, with_indices=True)
    processes.check_images([bare])
    processes.check_images([bare], trains_vision=True)
    monkeypatch.setattr(processes, "is_sharded", lambda: True)
    processes.check_images([bare])
    with pytest.raises(InputError, match="stage 2 where the vision tower or its merger is trained"):
        processes.check_images([bare], trains_vision=True)
    monkeypatch.setattr(processes, "shards_weights", lambda: True)
    processes.check_images([examples])
    with pytest.raises(InputError, match=r"an image in every row; there is none in rows row_000, row_008"):
        processes.check_images([examples, bare])


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda path: path.stem)
def test_every_launch_file_opens_with_a_line_that_launches_a_recipe(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (line,) = [line for line in path.read_text().splitlines() if line.startswith("# accelerate launch ")]
    args = parse_launch(*line.split()[3:])
    assert (args.config_file, args.training_script) == (f"accelerate_configs/{path.name}", "recipes/sft.py")
    monkeypatch.setenv("WORLD_SIZE", str(args.num_processes))
    recipe = read_recipe(args.training_script_args)  # an InputError where the global batch does not divide
    assert recipe.arguments.global_batch_size


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda path: path.stem)
def test_launch_files_say_how_processes_are_launched_and_nothing_else(path):
    content = yaml.safe_load(path.read_text())
    assert content.keys() <= {"distributed_type", "num_processes", "gpu_ids", "use_cpu", "fsdp_config"} | {
        "deepspeed_config"
    }
    assert content.get("deepspeed_config", {}).keys() <= {"deepspeed_config_file"}


def test_launch_files_start_as_many_processes_as_they_promise(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name in ("cpu", "single_t4", "a100", "dual_t4"):
        args = parse_launch("--config_file", f"accelerate_configs/{name}.yaml", "x.py")
        assert args.num_processes == (2 if name == "dual_t4" else 1)
        assert args.use_cpu == (name == "cpu")
        assert args.gpu_ids == ("0" if name in ("single_t4", "a100") else "all")
    for name in ("multi_gpu", "fsdp2", "zero2", "zero3"):
        with pytest.raises(ValueError, match="--num_processes"):
            parse_launch("--config_file", f"accelerate_configs/{name}.yaml", "x.py")
    offload = "deepspeed_configs/zero3_offload.json"
    args = parse_launch(
        "--config_file", "accelerate_configs/zero3.yaml", "--num_processes", "2",
        "--deepspeed_config_file", offload, "x.py",
    )  # fmt: skip
    assert args.deepspeed_config_file == offload


@pytest.mark.parametrize("path", ZEROS, ids=lambda path: path.stem)
def test_deepspeed_takes_every_value_that_the_trainer_owns_from_the_recipe(path, tmp_path):
    from deepspeed.runtime.config import DeepSpeedConfig
    from transformers import AutoConfig
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig, unset_hf_deepspeed_config

    values = RECIPE | {"train_data": "x", "output_dir": tmp_path, "global_batch_size": 6, "max_grad_norm": 0.5}
    recipe = read_recipe([f"--{key}={value}" for key, value in values.items()])
    try:
        config = HfTrainerDeepSpeedConfig(json.loads(path.read_text()))
        args = recipe.training_args("fp32")
        config.trainer_config_process(args)
        model = type("Model", (), {"config": AutoConfig.from_pretrained(MODEL)})
        config.trainer_config_finalize(args, model, num_training_steps=6)
    finally:
        unset_hf_deepspeed_config()  # or every later model of this session would be sharded
    assert "auto" not in str(config.config)
    accepted = DeepSpeedConfig(config.config)
    assert (accepted.train_batch_size, accepted.train_micro_batch_size_per_gpu) == (6, 2)
    assert (accepted.gradient_accumulation_steps, accepted.gradient_clipping) == (3, 0.5)
    assert accepted.zero_config.stage == int(path.stem[4])
    assert (accepted.zero_config.offload_param is not None) == ("offload" in path.stem)


def losses(run):
    """The loss of every optimiser step, as the last checkpoint tells it."""
    last = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    log = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


@pytest.fixture(scope="module")
def contest(tmp_path_factory):
    return write_hard_contest(tmp_path_factory.mktemp("launch") / "contest")


AVERAGED = {"ema": {"averaging": "ema", "ema_decay": 0.6}, "swa": {"averaging": "swa", "swa_start": 0}}


def data(contest):
    return {"train_data": contest / "train.csv", "validation_data": contest / "validation.csv"}


def prediction(run, contest):
    # Batches of 5 of the 32 rows: neither the batches nor the rows divide by two.
    return {"run": run, "data": contest / "test.csv", "batch_size": 5, "num_workers": 0}


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    path = tmp_path_factory.mktemp("counted") / "counted.py"
    path.write_text(COUNTED)
    return path


@pytest.fixture(scope="module")
def launch(counted):
    """`launch("zero2", 2, "sft", key=value, ...)` runs a recipe by `accelerate launch` and asserts that the number of
    processes worked together, or that it ended with a message that `says` so; there is no compiler."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CC": "/no/compiler", "CXX": "/no/compiler"}
    environment |= {"TORCH_EXTENSIONS_DIR": str(counted.parent)}

    def run(name, num_processes, recipe, says=None, **values):
        command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
        command += ["--config_file", f"accelerate_configs/{name}.yaml", "--num_processes", str(num_processes)]
        command += [str(counted), f"recipes/{recipe}.py"]
        for key, value in values.items():
            command += [f"--{key}"] if value is True else [f"--{key}", str(value)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        if says is not None:
            assert done.returncode and says in done.stderr, done.stdout + done.stderr
            return
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"processes that worked together: {num_processes}" in done.stdout
        return done.stdout

    return run


@pytest.fixture(scope="module")
def one_process(contest):
    run = contest.parent / "one"
    train(**RECIPE, **data(contest), output_dir=run)
    return run


@pytest.fixture(scope="module")
def one_process_predictions(contest, one_process):
    output = contest.parent / "one.csv"
    arguments = prediction(one_process, contest) | {"output": output, "use_cpu": True}
    run_script("predict", *(token for key, value in arguments.items() for token in (f"--{key}", value)))
    return output


def test_training_on_two_processes_is_training_on_one(contest, launch, one_process):
    run = contest.parent / "two"
    said = launch("multi_gpu", 2, "sft", **RECIPE, **data(contest), output_dir=run, **AVERAGED["ema"])
    assert "exchanged within steps: []" in said
    reference = losses(one_process)
    assert len(reference) == 6 and reference[-1] < 0.5 * reference[0]
    assert losses(run) == pytest.approx(reference, abs=1e-5)
    assert_close(adapter(run), adapter(one_process), atol=1e-5, rtol=0)
    # The first moments are means of the gradients of all steps.
    ours, theirs = (torch.load(path / "checkpoint-6" / "optimizer.pt")["state"] for path in (run, one_process))
    assert max(state["exp_avg"].abs().max() for state in theirs.values()) > 1e-2
    for number, state in theirs.items():
        assert_close(ours[number]["exp_avg"], state["exp_avg"], atol=1e-6, rtol=1e-4)
    assert_close_average(run, contest, "ema")


@pytest.mark.slow
def test_a_run_that_two_processes_began_goes_on_with_one(contest, launch, one_process, tmp_path, capsys):
    run = tmp_path / "run"
    launch("multi_gpu", 2, "sft", **RECIPE, **data(contest), output_dir=run)
    shutil.rmtree(run / "checkpoint-6")
    (run / run_folder.RUN).unlink()
    train(**RECIPE, **data(contest), output_dir=run)
    assert f"Resuming from {run}/checkpoint-3" in capsys.readouterr().out
    assert losses(run) == pytest.approx(losses(one_process), abs=1e-5)
    assert_close(adapter(run), adapter(one_process), atol=1e-5, rtol=0)


def adapter(run):
    """The weights after the last step; a run may end with those of another, or with an average."""
    return load_file(run / "checkpoint-6" / "adapter_model.safetensors")


def assert_close_average(run, contest, kind):
    """The average is that of one process, of other weights than the last, and is scored the same."""
    one = run.with_name(f"one_{kind}")
    train(**RECIPE, **data(contest), **AVERAGED[kind], output_dir=one)
    ours, theirs = (load_file(path / "checkpoint-6" / "average.safetensors") for path in (run, one))
    assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert max((adapter(one)[name.replace(".default", "")] - theirs[name]).abs().max() for name in theirs) > 1e-3
    ours, theirs = (json.loads((path / "metrics.json").read_text()) for path in (run, one))
    average, other = (metrics["nll_calibrated_average"] for metrics in (ours, theirs))
    assert average == pytest.approx(other, abs=1e-4)


def assert_same_files(output, expected):
    for suffix in (".csv", ".parquet"):
        assert output.with_suffix(suffix).read_bytes() == expected.with_suffix(suffix).read_bytes()
    assert len(read_predictions(output.with_suffix(".parquet")).ids) == 32


def test_prediction_on_two_processes_writes_the_same_bytes(
    contest, counted, one_process, one_process_predictions, tmp_path
):
    """Two processes with what a launcher tells them, which need not import all that again."""
    arguments = prediction(one_process, contest) | {"output": tmp_path / "two.csv", "use_cpu": True}
    command = [counted, "recipes/predict.py", *(f"--{key}={value}" for key, value in arguments.items())]
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    place |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    group = [(command, place | {"RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    [[(code, said, error), (other, _, its_error)]] = run_forked([group], tmp_path)
    assert code == other == 0 and "processes that worked together: 2" in said, error + its_error
    assert_same_files(tmp_path / "two.csv", one_process_predictions)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "num_processes"), [("cpu", 1), ("multi_gpu", 2)])
def test_a_launched_prediction_writes_the_same_bytes(
    contest, launch, one_process, one_process_predictions, tmp_path, name, num_processes
):
    arguments = prediction(one_process, contest) | {"output": tmp_path / "out.csv", "use_cpu": True}
    launch(name, num_processes, "predict", **arguments)
    assert_same_files(tmp_path / "out.csv", one_process_predictions)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_zero_trains_as_plain_ddp_and_saves_an_adapter(
    contest, launch, one_process, one_process_predictions, tmp_path, stage
):
    run = tmp_path / stage
    # Stage 3 cannot average; a run that does may end with the average, on two processes as on one.
    averaged = AVERAGED["swa"] if stage == "zero2" else {}
    said = launch(stage, 2, "sft", **RECIPE, **data(contest), output_dir=run, **averaged)
    assert "no gradients" in said  # of the frozen vision tower
    if averaged:
        assert_close_average(run, contest, "swa")
    assert losses(run) == pytest.approx(losses(one_process), abs=1e-5)
    assert_close(adapter(run), adapter(one_process), atol=1e-5, rtol=0)
    outputs = {run: tmp_path / "out.csv"} | ({tmp_path / "one_swa": tmp_path / "one.csv"} if averaged else {})
    for folder, output in outputs.items():
        arguments = prediction(folder, contest) | {"output": output}
        tokens = (token for key, value in arguments.items() for token in (f"--{key}", value))
        run_script("predict", "--use_cpu", *tokens)
    reference = tmp_path / "one.csv" if averaged else one_process_predictions
    ours, theirs = (read_predictions(path.with_suffix(".parquet")) for path in (outputs[run], reference))
    assert_close(ours.choice_logits, theirs.choice_logits, atol=1e-2, rtol=0)


@pytest.mark.slow
def test_a_mixture_of_experts_trains_on_two_processes_as_on_one(contest, launch, families, tmp_path):
    """Weights as the Hub has them: their experts are transposed as they are loaded, by ZeRO-3 too."""
    model = shutil.copytree(families("qwen3_vl_moe"), tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights = {name: w.transpose(1, 2).contiguous() if ".experts." in name else w for name, w in weights.items()}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    values = RECIPE | data(contest) | {"model_name_or_path": model, "adapt_experts": True}
    train(**values, output_dir=tmp_path / "one")
    reference = losses(tmp_path / "one")
    assert len(reference) == 6
    for name in ("multi_gpu", "zero3"):
        launch(name, 2, "sft", **values, output_dir=tmp_path / name)
        assert losses(tmp_path / name) == pytest.approx(reference, abs=1e-5)
        assert any(".experts." in weight for weight in adapter(tmp_path / name))
        assert_close(adapter(tmp_path / name), adapter(tmp_path / "one"), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_two_processes_share_a_stream_whose_rows_do_not_divide_and_which_comes_round_again(contest, launch, tmp_path):
    # 23 rows among sixteen parts, 24 rows a process: one of them would run out first, were there an end.
    lines = (contest / "train.csv").read_text().splitlines(keepends=True)
    (contest / "odd.csv").write_text("".join(lines[:24]))
    values = RECIPE | {"num_train_epochs": 1, "max_steps": 6, "streaming": True}
    values |= {"save_strategy": "steps", "save_steps": 3}
    launch("multi_gpu", 2, "sft", **values, train_data=contest / "odd.csv", output_dir=tmp_path / "run")
    found = losses(tmp_path / "run")
    assert len(found) == 6 and min(found[3:]) < found[0]  # the same rows again and again are learned


def evaluation(run):
    """What the last evaluation found of the raw and of the averaged weights, but for how long it took."""
    last = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    log = json.loads((last / "trainer_state.json").read_text())["log_history"]
    found = {name: value for entry in log for name, value in entry.items() if name.startswith("eval_")}
    return {name: value for name, value in found.items() if not name.endswith(("runtime", "per_second"))}


@pytest.mark.slow
@pytest.mark.parametrize("num_rows", [7, 5])
def test_an_evaluation_on_two_processes_counts_every_row_once(contest, launch, tmp_path, num_rows):
    """Seven rows in batches of 2 on two processes: accelerate shows one of them twice. Five: three of them."""
    lines = (contest / "validation.csv").read_text().splitlines(keepends=True)
    (contest / f"validation_{num_rows}.csv").write_text("".join(lines[: num_rows + 1]))
    values = RECIPE | data(contest) | AVERAGED["ema"] | {"per_device_eval_batch_size": 2, "num_train_epochs": 1}
    values |= {"validation_data": contest / f"validation_{num_rows}.csv", "output_dir": tmp_path / "one"}
    train(**values)
    launch("multi_gpu", 2, "sft", **values | {"output_dir": tmp_path / "two"})
    one, two = evaluation(tmp_path / "one"), evaluation(tmp_path / "two")
    names = {f"eval_{name}" for name in (*CHOSEN_BY, "letters_mass", "average_loss", "average_letters_mass")}
    assert names <= one.keys() == two.keys()
    assert two == pytest.approx(one, abs=1e-4)


@pytest.mark.slow
def test_layers_without_a_gradient_are_left_out_or_refused_on_two_processes(contest, launch, families, tmp_path):
    values = RECIPE | {"model_name_or_path": families("qwen4_exp"), "train_data": contest / "train.csv", "max_steps": 2}
    launch("multi_gpu", 2, "sft", **values, output_dir=tmp_path / "default")
    # What chooses the tokens that attention sees, which the default leaves out.
    asked = {"lora_target_modules": r".*(self_attn\.q_proj|index_qk_proj)", "ddp_find_unused_parameters": "false"}
    says = "trained weights have no gradient"
    launch("multi_gpu", 2, "sft", says=says, **values, **asked, output_dir=tmp_path / "asked")
