"""Layers compiled in the middle of a run. There is no GPU here: the compiler's first half (aot_eager) stands for it."""

import functools
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from contest import write_hard_contest
from gradients import road_of
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from trainers import build_trainer

from vqa_sft.batch.collator import AnswerCollator
from vqa_sft.batch.prompts import Prompts
from vqa_sft.models.fast import compilation
from vqa_sft.models.fast.compilation import Expected
from vqa_sft.models.scoring import answer_logits
from vqa_sft.tiny import TINY_PATH
from vqa_sft.training import build, callbacks, compile_later
from vqa_sft.training.callbacks import Speed
from vqa_sft.training.compile_later import CompileLater

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def first_half(monkeypatch, tmp_path):
    """Compilation that needs no C compiler, and a cache folder of its own."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    compile_layers = functools.partial(compilation.compile_layers, backend="aot_eager")
    monkeypatch.setattr(compilation, "compile_layers", compile_layers)
    monkeypatch.setattr(compilation, "can_compile", lambda: True)
    # One of them is one graph; the tower's blocks would be many on a CPU.
    monkeypatch.setattr(compile_later, "layers_to_compile", lambda base: [base.get_decoder().layers[0]])
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("recomputes", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["kept", "recomputed"])
def test_a_run_that_switches_has_the_losses_of_one_that_does_not(
    families, contest, tmp_path, monkeypatch, capsys, recomputes
):
    monkeypatch.setattr(compilation, "expect", lambda *args: Expected(0.0, 0.5))
    values = {"max_steps": 14, "per_device_train_batch_size": 3, "learning_rate": 1e-2, "logging_steps": 1}
    values |= {"gradient_checkpointing": recomputes, "save_strategy": "no"}
    losses, calls = {}, []
    for switches in (False, True):
        torch.manual_seed(0)
        trainer, _, _ = build_trainer(families("qwen2_5_vl"), contest, tmp_path / str(switches), num_rows=9, **values)
        layer = trainer.model.get_base_model().get_decoder().layers[0]
        layer.register_forward_hook(lambda *args, switches=switches: calls.append(switches))
        if switches:
            trainer.add_callback(CompileLater(trainer.model, 1.0, trainer.speed))
        assert not compilation.is_compiled(trainer.model)
        trainer.train()
        assert compilation.is_compiled(trainer.model) == switches
        losses[switches] = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert 0 < compilation.num_compilations() <= 3
    assert len(losses[False]) == 14 and max(losses[False]) - min(losses[False]) > 0.1
    assert losses[True] == pytest.approx(losses[False], abs=2e-4)
    assert calls.count(True) == calls.count(False)  # a hook stays
    assert trainer.speed.examples_per_s > 0 and trainer.speed.num_steps == 14 - 5
    said = capsys.readouterr().out
    assert "Speed: compiled from step 6 on: about 0 s of compilation (estimated) would save about" in said
    assert "compilation took" in said and "instead of" in said


@pytest.mark.slow
def test_layers_are_compiled_under_a_model_that_is_distributed_already(families, contest, tmp_path):
    losses = {}
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        for switches in (False, True):
            torch.manual_seed(0)
            model, processor, letter_ids, rows = road_of(families("qwen2_5_vl"), contest)
            batch = AnswerCollator(processor, Prompts(), 4)(rows)
            distributed = DistributedDataParallel(model.train())
            optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.05)
            losses[switches] = []
            for step in range(6):
                if switches and step == 2:
                    base = model.get_base_model()
                    compilation.compile_layers(base, [base.get_decoder().layers[0]], 1.0)
                optimizer.zero_grad()
                logits = answer_logits(distributed, batch)
                loss = nn.functional.cross_entropy(logits, letter_ids[batch["answers"]])
                loss.backward()
                optimizer.step()
                losses[switches].append(loss.item())
    finally:
        torch.distributed.destroy_process_group()
    assert compilation.num_compilations() > 0 and losses[False][0] - losses[False][-1] > 0.01
    assert losses[True] == pytest.approx(losses[False], abs=1e-4)


def test_cached_code_of_another_source_of_our_operator_is_not_taken(monkeypatch, tmp_path):
    ours = compilation._tag("")
    assert compilation._tag(ours) == ours and compilation._tag("theirs") == f"theirs {ours}"
    changed = tmp_path / "linear_attention.py"
    changed.write_text(Path(compilation.linear_attention.__file__).read_text() + "\n")
    monkeypatch.setattr(compilation.linear_attention, "__file__", str(changed))
    assert compilation._tag("") != ours


SWITCHING = """
import atexit, functools, os, runpy, sys
from vqa_sft.models.fast import compilation, speedups
from vqa_sft.training import build, callbacks, compile_later

pays = os.environ["PAYS"] == os.environ["RANK"]  # in that process alone
compilation.compile_layers = functools.partial(compilation.compile_layers, backend="aot_eager")
compilation.can_compile = lambda: True
compilation.expect = lambda *args: compilation.Expected(0.0 if pays else 1e9, 0.5)
compilation.remember = lambda *args: None
compile_later.layers_to_compile = lambda base: [base.get_decoder().layers[0]]
build.fits = lambda needs: (True, True)
speedups.may_compile_later = lambda trainer: True
speedups.pack_rows = lambda *args: None  # attention over packed rows is no graph on a CPU
atexit.register(lambda: print(f"process {os.environ['RANK']}: graphs {min(1, compilation.num_compilations())}"))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_the_processes_of_a_launch_switch_at_the_same_step(tmp_path):
    contest = write_hard_contest(tmp_path / "contest")
    values = {"model_name_or_path": TINY_PATH, "train_data": contest / "train.csv", "max_steps": 10, "use_cpu": True}
    values |= {"global_batch_size": 8, "per_device_train_batch_size": 2, "learning_rate": 3e-3, "logging_steps": 1}
    values |= {"adam_epsilon": 1e-3, "dataloader_num_workers": 0, "disable_tqdm": True, "eval_strategy": "no"}
    values |= {"gradient_checkpointing": False, "validation_fraction": 0, "load_best_model_at_end": False}
    (tmp_path / "switching.py").write_text(SWITCHING)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command += ["--config_file", "accelerate_configs/multi_gpu.yaml", "--num_processes", "2"]
    command += [str(tmp_path / "switching.py"), "recipes/sft.py"]
    losses = {}
    for pays, graphs in (("0", 1), ("1", 0)):  # the main process decides
        options = values | {"output_dir": tmp_path / pays}
        arguments = [token for name, value in options.items() for token in (f"--{name}", str(value))]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PAYS": pays}
        done = subprocess.run(
            [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("Speed: compiled from step 6 on") == graphs
        assert all(f"process {rank}: graphs {graphs}" in done.stdout for rank in range(2))
        state = json.loads((tmp_path / pays / "checkpoint-10" / "trainer_state.json").read_text())
        losses[pays] = [log["loss"] for log in state["log_history"] if "loss" in log]
    assert len(losses["1"]) == 10 and min(losses["1"]) < 0.5 * losses["1"][0]
    assert losses["0"] == pytest.approx(losses["1"], abs=1e-3)


class Run:
    """A run whose steps take what they are said to, on a clock of its own."""

    def __init__(self, monkeypatch, num_steps, step_s, compiled_s, compilation_s):
        self.layers, self.compiled, self.now = [nn.Linear(4, 4), nn.Linear(4, 4)], False, 0.0
        monkeypatch.setattr(compile_later, "base_of", lambda model: model)
        monkeypatch.setattr(compile_later, "layers_to_compile", lambda base: self.layers)
        monkeypatch.setattr(callbacks, "now_s", lambda: self.now)
        monkeypatch.setattr(compilation, "compile_layers", self.compile)
        self.graphs = None  # the step after which they begin
        start_graphs = lambda: setattr(self, "graphs", callback.num_steps)  # noqa: E731
        callback = CompileLater(None, 0.7, speed := Speed(), start_graphs=start_graphs)
        for step in range(1, num_steps + 1):
            if step in (4, 11):  # evaluations beside the steps that are measured
                self.now += 50
                speed.on_evaluate(None, None, None, metrics={"eval_runtime": 50})
            self.now += compiled_s if self.compiled else step_s
            if self.compiled == step:  # the first one that is compiled
                self.now += compilation_s
            callback.on_step_end(None, types.SimpleNamespace(global_step=step, max_steps=num_steps), None)
            self.compiled = self.compiled is True and step + 1 or self.compiled

    def compile(self, *args):
        self.compiled = True


def test_a_short_run_is_not_compiled_and_a_long_one_is(monkeypatch, capsys):
    # One kind of layer: 15 s, which save 0.3 of a step. 16 rows a step of 0.6 s: 89 steps, 1,400 rows.
    for num_steps, compiles in ((32, False), (88, False), (89, True), (5000, True)):
        run = Run(monkeypatch, num_steps, 0.6, 0.36, 20.0)
        assert bool(run.compiled) == compiles, num_steps
        said = capsys.readouterr().out
        assert ("layers are not compiled" in said) != compiles
        assert run.graphs == (13 if compiles else 5)
        if compiles:
            compilation._record(run.layers, 0.7).unlink()


def test_the_next_run_knows_what_compilation_took_on_this_machine(monkeypatch, capsys):
    run = Run(monkeypatch, 500, 0.6, 0.36, 20.0)
    assert "compilation took 20 s; a step takes 0.36 s instead of 0.6" in capsys.readouterr().out
    found = compilation.expect(run.layers, 0.7)
    assert found == Expected(pytest.approx(12), pytest.approx(0.4), is_measured=True)  # it finds what was compiled
    Run(monkeypatch, 70, 0.6, 0.36, 5.0)
    assert "about 12 s of compilation (as measured here before) would save about 16 s" in capsys.readouterr().out
    assert compilation.expect(run.layers, 0.7).seconds == pytest.approx(5)
    # Other layers, another budget, and recomputation are other code.
    assert not compilation.expect([nn.Linear(4, 5)], 0.7).is_measured
    assert not compilation.expect(run.layers, 1.0).is_measured
    run.layers[0].gradient_checkpointing = True
    assert not compilation.expect(run.layers, 0.7).is_measured
    run.layers[0].gradient_checkpointing = False
    assert compilation.expect(run.layers, 0.7).is_measured
    monkeypatch.setattr(torch, "__version__", "99")
    assert not compilation.expect(run.layers, 0.7).is_measured


def test_a_run_that_is_compiled_from_its_first_step_measures_compilation_too(monkeypatch, capsys):
    layers, now = [nn.Linear(4, 4)], [0.0]
    monkeypatch.setattr(compile_later, "base_of", lambda model: model)
    monkeypatch.setattr(compile_later, "layers_to_compile", lambda base: layers)
    monkeypatch.setattr(callbacks, "now_s", lambda: now[0])
    started = []
    callback = CompileLater(None, 0.7, Speed(), is_compiled=True, start_graphs=lambda: started.append(step))
    callback.on_train_begin()
    now[0] += 100  # until the first batch is there
    for step in range(1, 21):
        callback.on_step_begin(None, None, None)
        now[0] += 40.4 if step == 1 else 0.4
        callback.on_step_end(None, types.SimpleNamespace(global_step=step, max_steps=20), None)
    assert capsys.readouterr().out.splitlines() == [
        "Speed: the first steps hold about 15 s of compilation (estimated).",
        "Speed: compilation took 40 s; a step takes 0.4 s.",
    ]
    assert compilation.expect(layers, 0.7) == Expected(pytest.approx(24), 0.3, is_measured=True)
    assert started == [8]


# compile_layers, rows, whether it fits uncompiled and compiled -> compiled from the first step, measured for later
RULE = [
    (True, 10, (True, True), True, False),
    (False, 10**6, (True, True), False, False),
    (None, 10, (True, True), False, True),
    (None, 10**6, (True, True), False, True),
    (None, 10**6, (False, True), True, False),  # uncompiled steps would not fit
    (None, 10, (False, True), True, False),
    (None, 10, (False, False), False, False),
    (None, 10**6, (False, False), True, False),
    (None, 10**6, (True, False), False, False),
]


@pytest.mark.parametrize("asked, num_rows, fits, at_once, later", RULE)
def test_when_layers_are_compiled_depends_on_recipe_rows_and_memory(monkeypatch, asked, num_rows, fits, at_once, later):
    done = {}
    monkeypatch.setattr(build.speedups, "may_compile_later", lambda trainer: True)
    monkeypatch.setattr(
        build.speedups, "speed_up_training", lambda trainer, **how: done.update(how) or how["compile_layers"]
    )
    monkeypatch.setattr(build, "fits", lambda needs: fits)
    started = []
    monkeypatch.setattr(build.speedups, "prepare_graphs", lambda trainer: lambda: started.append(trainer))
    monkeypatch.setattr(build, "CompileLater", lambda *args, is_compiled, start_graphs: f"compiled: {is_compiled}")
    arguments = types.SimpleNamespace(compile_layers=asked, activation_memory_budget=0.7)
    recipe, callbacks = types.SimpleNamespace(arguments=arguments, values={}), []
    trainer = types.SimpleNamespace(model=None, speed=None, add_callback=callbacks.append)
    build._speed_up(trainer, recipe, num_rows, types.SimpleNamespace(needs=None))
    assert bool(started) == (not callbacks)  # else the callback starts the graphs
    assert done["compile_layers"] == at_once
    assert callbacks == [f"compiled: {at_once}"] * (at_once or later)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"seconds": "x", "share_saved": 1}'])
def test_a_broken_record_is_one_line_and_the_estimate(capsys, text):
    layers = [nn.Linear(4, 4), nn.Linear(4, 8)]
    record = compilation._record(layers, 0.7)
    record.parent.mkdir(parents=True)
    record.write_text(text)
    assert compilation.expect(layers, 0.7) == Expected(30.0, 0.3)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("Speed: what compilation took here before cannot be read")
    compilation.remember(layers, 0.7, Expected(40.0, -0.1), Expected(50.0, 0.3))
    assert compilation.expect(layers, 0.7) == Expected(24.0, compilation.LEAST_SHARE, is_measured=True)


def test_a_folder_that_cannot_be_written_is_one_line(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(compilation, "_record", lambda *args: tmp_path / "file" / "record.json")
    compilation.remember([nn.Linear(4, 4)], 0.7, Expected(40.0, 0.3), Expected(50.0, 0.3))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("Speed: what compilation took is not kept")
