"""What a run survives: it ends in one line, and the same command then ends as the run that was not disturbed."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import threading
from types import SimpleNamespace

import pytest
import torch
from contest import write_hard_contest
from safetensors import SafetensorError
from safetensors.torch import load_file
from scripts import run_script
from torch.testing import assert_close

from vqa_sft.errors import ProcessError, explains_breakdown
from vqa_sft.models.scoring import supervised_logits
from vqa_sft.predictions.file import read_predictions
from vqa_sft.runs import checkpoints, folder as run_folder
from vqa_sft.tiny import TINY_PATH
from vqa_sft.training import saving, trainer
from vqa_sft.training.loss import answer_loss
from vqa_sft.training.trainer import AnswerTrainer

ADAPTER = "adapter_model.safetensors"
ZIP = "[enforce fail at inline_container.cc:671] . unexpected pos 576 vs 534"
SERIALIZE = "Error while serializing: I/O error: No space left on device (os error 28)"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """`train(output_dir, key=value, ...)`: 24 rows, two epochs of 3 steps of 2 x 4 rows, in this process."""
    contest = write_hard_contest(tmp_path_factory.mktemp("survives") / "contest")
    data = {"train_data": contest / "train.csv", "validation_data": contest / "validation.csv"}
    recipe = {"model_name_or_path": TINY_PATH, "num_train_epochs": 2, "global_batch_size": 8, "learning_rate": 1e-2}
    recipe |= {"per_device_train_batch_size": 4, "dataloader_num_workers": 0, "logging_steps": 1, "use_cpu": True}
    recipe |= {"gradient_checkpointing": False, "disable_tqdm": True, "cache_image_features": False}

    def run(output_dir, **values):
        values = recipe | data | {"output_dir": output_dir} | values
        run_script("sft", *(token for key, value in values.items() for token in (f"--{key}", value)))
        return output_dir

    return run


@pytest.fixture(scope="module")
def undisturbed(train, tmp_path_factory):
    """The folder of a run that was not disturbed, and the rows of its micro-batches."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.AnswerTrainer, "training_step", record_ids(seen))
        return train(tmp_path_factory.mktemp("whole") / "run"), seen


@pytest.fixture(scope="module")
def whole(undisturbed):
    """What a run that was not disturbed has learnt."""
    return result(undisturbed[0])


def result(run):
    """The adapter in bytes, and what it answers."""
    validation = read_predictions(run / run_folder.VALIDATION)
    return (run / ADAPTER).read_bytes(), validation.ids, validation.choice_logits


@pytest.fixture
def at_loss(monkeypatch):
    """`at_loss(number, act)`: before the training's loss of that number, counted from 1, `act(trainer, inputs)`."""

    def patch(number, act):
        compute_loss, calls = AnswerTrainer.compute_loss, []

        def patched(self, model, inputs, *args, **kwargs):
            if self.model.training:
                calls.append(1)
                if len(calls) == number:
                    act(self, inputs)
            return compute_loss(self, model, inputs, *args, **kwargs)

        monkeypatch.setattr(AnswerTrainer, "compute_loss", patched)

    return patch


def send_sigterm(trainer, inputs):
    """As a scheduler does it that signals all processes, and then signals again."""
    pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    for _ in range(2):  # by another process: a worker takes its parent's for an order to end
        subprocess.run(["kill", "-TERM", *map(str, pids)], check=True)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_sigterm_ends_a_run_after_the_step_at_hand(train, whole, at_loss, tmp_path, capsys, num_workers):
    run, before = tmp_path / "run", signal.getsignal(signal.SIGTERM)
    at_loss(3, send_sigterm)  # the first half of the second step
    with pytest.raises(SystemExit) as stop:
        train(run, dataloader_num_workers=num_workers)
    assert stop.value.code == 143 and signal.getsignal(signal.SIGTERM) == before
    said = capsys.readouterr()
    assert f"SIGTERM. {run} resumes with the same command.\n" in said.out and "Traceback" not in said.err
    assert checkpoints.last_whole_checkpoint(run) == str(run / "checkpoint-2")
    assert not run_folder.is_finished(run)
    assert result(train(run, dataloader_num_workers=num_workers)) == whole
    state = json.loads((run / "checkpoint-6" / "trainer_state.json").read_text())
    # None in the middle of an epoch, which might choose other weights.
    assert [entry["epoch"] for entry in state["log_history"] if "eval_nll" in entry] == [1, 2]


def test_a_sigterm_at_the_end_of_an_epoch_saves_once_after_its_evaluation(train, whole, at_loss, tmp_path, monkeypatch):
    done, evaluate, save = [], AnswerTrainer.evaluate, AnswerTrainer._save_checkpoint

    def noting(name, do):
        return lambda self, *args, **kwargs: done.append((name, self.state.global_step)) or do(self, *args, **kwargs)

    monkeypatch.setattr(AnswerTrainer, "evaluate", noting("evaluate", evaluate))
    monkeypatch.setattr(AnswerTrainer, "_save_checkpoint", noting("save", save))
    at_loss(5, send_sigterm)  # in the third step of three
    with pytest.raises(SystemExit):
        train(tmp_path / "run")
    assert done == [("evaluate", 3), ("save", 3)]
    assert result(train(tmp_path / "run")) == whole


def test_a_sigterm_in_any_process_stops_them_all(monkeypatch):
    stop = saving.SaveAndStop()
    assert not stop.must_stop()
    monkeypatch.setattr(saving, "gather_object", lambda own: [*own, (False, True, 0.0)])
    assert stop.must_stop() and stop.got_sigterm


def test_several_processes_look_after_every_step_only_where_steps_are_slow(monkeypatch):
    args, control = SimpleNamespace(world_size=2), SimpleNamespace()
    stop, now_s, looks = saving.SaveAndStop(), [0.0], []
    monkeypatch.setattr(saving, "gather_object", lambda own: looks.append(step) or own)
    monkeypatch.setattr(saving.time, "monotonic", lambda: now_s[0])
    for step in range(1, 41):
        now_s[0] += 2.0 if step < 5 else 0.1
        stop.on_step_end(args, SimpleNamespace(global_step=step, max_steps=100), control)
    assert looks == [1, 2, 3, 4, 5, 10, 20, 30, 40]  # at multiples, where steps are logged


def stopped_at(monkeypatch, steps_s, compiling, *, budget_s):
    """The time at which a training with steps of so many seconds stops; those of `compiling`, from 1, compile."""
    now_s, num_graphs, stop = [0.0], [0], saving.SaveAndStop(budget_s)
    args, control = SimpleNamespace(world_size=1), SimpleNamespace(should_training_stop=False)
    monkeypatch.setattr(saving.time, "monotonic", lambda: now_s[0])
    monkeypatch.setattr(saving.compilation, "num_compilations", lambda: num_graphs[0])
    stop.on_train_begin(args, None, control)
    for step, step_s in enumerate(steps_s, start=1):
        now_s[0] += step_s
        num_graphs[0] += 2 * (step in compiling)
        stop.on_step_end(args, SimpleNamespace(global_step=step, max_steps=1000), control)
        if control.should_training_stop:
            return now_s[0]
    return None


def test_a_compilation_in_a_step_is_not_what_the_budget_leaves_for_the_last_one(monkeypatch):
    switches = [2.0] * 5 + [25.0] + [1.0] * 200  # of 100 s, 10 are reserved
    assert stopped_at(monkeypatch, switches, {6}, budget_s=100) == 89.0  # one more step of 2 s may be too long
    assert stopped_at(monkeypatch, switches, set(), budget_s=100) == 66.0  # a step that is long without one counts
    # Until a step without one is known, those with one count.
    assert stopped_at(monkeypatch, [30.0] * 9, set(range(1, 10)), budget_s=100) == 90.0


def test_a_training_in_another_thread_leaves_signals_alone():
    stop, before, found = saving.SaveAndStop(), signal.getsignal(signal.SIGTERM), []

    def listen():
        with stop.listening():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert found == [before]


@pytest.fixture
def spoil(at_loss, monkeypatch):
    """`spoil(number, spoiled)`: the losses (B,) of that number are `spoiled(losses)`."""

    def patch(number, spoiled):
        def act(model, inputs):
            with_next = iter([spoiled])
            monkeypatch.setattr(trainer, "answer_loss", lambda *args: next(with_next, lambda x: x)(answer_loss(*args)))

        at_loss(number, act)

    return patch


def second_is_nan(losses):
    return losses * torch.tensor([1.0, float("nan")] + [1.0] * (len(losses) - 2))


def test_a_loss_that_is_no_number_ends_the_run_and_names_its_row(train, spoil, whole, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    spoil(8, second_is_nan)  # in the fourth step; looked at when the fifth is saved, after two bad ones
    seen = []
    monkeypatch.setattr(trainer.AnswerTrainer, "training_step", record_ids(seen))
    with pytest.raises(SystemExit) as stop:
        train(run, logging_steps=100)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in error
    assert f"error: The loss of step 4 is nan or infinite in row {seen[7][1]}." in error
    assert f"the same command resumes from {run / 'checkpoint-3'} (without --overwrite)." in error
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-3"]
    assert result(train(run, logging_steps=100)) == whole


def record_ids(seen):
    training_step = trainer.AnswerTrainer.training_step

    def patched(self, model, inputs, *args, **kwargs):
        seen.append(inputs["ids"])
        return training_step(self, model, inputs, *args, **kwargs)

    return patched


class NanGradient(torch.autograd.Function):
    """Its result is its argument, its gradient is no number."""

    @staticmethod
    def forward(ctx, losses):
        return losses.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


def test_weights_that_are_no_numbers_are_never_saved(train, spoil, tmp_path, capsys):
    spoil(6, NanGradient.apply)  # the last before the first checkpoint, whose losses are all numbers
    with pytest.raises(SystemExit) as stop:
        train(tmp_path / "run")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "error: The gradient of step 3 is nan or infinite in rows row_" in error
    assert "starts again from the base model: no checkpoint is complete yet" in error
    assert not [*(tmp_path / "run").glob("**/*.safetensors")]


def test_gradients_that_overflow_under_a_scaler_stop_nothing(train, spoil, tmp_path, monkeypatch, capsys):
    create = AnswerTrainer.create_accelerator_and_postprocess

    def with_scaler(self):  # as fp16 has it, which needs a GPU
        create(self)
        self.accelerator.scaler = torch.amp.GradScaler("cpu")

    monkeypatch.setattr(AnswerTrainer, "create_accelerator_and_postprocess", with_scaler)
    spoil(4, NanGradient.apply)  # in the second step; without a scaler it would be the end of the weights
    run = train(tmp_path / "run")
    assert capsys.readouterr().out.count("'grad_norm': 'nan'") == 1
    assert all(weight.isfinite().all() for weight in load_file(run / ADAPTER).values())


def test_answers_that_are_no_numbers_end_an_evaluation_and_name_their_rows(train, tmp_path, capsys, monkeypatch):
    def logits(model, inputs):
        found = supervised_logits(model, inputs)
        return found if model.training else found * float("nan")

    monkeypatch.setattr(trainer, "supervised_logits", logits)
    with pytest.raises(SystemExit) as stop:
        train(tmp_path / "run")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in error
    assert "The loss in the evaluation after step 3 is nan or infinite in rows row_024, row_025," in error


def test_a_training_whose_memory_runs_out_goes_on_with_half_the_micro_batch(
    train, undisturbed, tmp_path, capsys, monkeypatch
):
    def compute_loss(self, model, inputs, *args, **kwargs):
        rows, step = inputs["ids"], self.state.global_step
        if self.model.training and (len(rows) > 2 or step == 1 and len(rows) > 1 and steps.get(step)):
            steps.pop(step, None)  # its micro-batches so far are lost
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        if self.model.training:
            steps.setdefault(step, []).append(rows)
        return true_compute_loss(self, model, inputs, *args, **kwargs)

    run, steps, true_compute_loss = tmp_path / "run", {}, AnswerTrainer.compute_loss
    whole_run, seen = undisturbed
    monkeypatch.setattr(AnswerTrainer, "compute_loss", compute_loss)
    train(run)
    said = capsys.readouterr().out
    # At 4 rows before any step is finished, at 2 rows in the second micro-batch of the second step.
    assert said.count("The GPU's memory ran out") == 2 and "at 2 rows at a time. Resuming with 1;" in said
    assert f"Resuming from {run / 'checkpoint-1'}." in said
    assert [len(steps[step][0]) for step in range(6)] == [2, 1, 1, 1, 1, 1]
    flat = [row for step in range(6) for rows in steps[step] for row in rows]
    assert flat == [row for rows in seen for row in rows]
    assert sorted(flat[:24]) == sorted(flat[24:]) == sorted(set(flat))
    before, after = load_file(whole_run / ADAPTER), load_file(run / ADAPTER)
    assert_close(after, before, rtol=1e-3, atol=1e-3)
    assert json.loads((run / run_folder.RUN).read_text())["micro_batch"] == 1
    assert "per_device_train_batch_size: 1\n" in (run / run_folder.RECIPE).read_text()


def test_a_step_that_broke_off_in_the_optimiser_is_not_saved(tmp_path):
    marks, saved = saving.MarkWholeCheckpoints(), []
    handler = SimpleNamespace(on_save=lambda *args: None)
    state, args = SimpleNamespace(global_step=3), SimpleNamespace(output_dir=tmp_path)
    broken = SimpleNamespace(state=state, args=args, model=None, control=None, callback_handler=handler)
    broken._save_checkpoint = lambda *args, **kwargs: saved.append(state.global_step)
    marks.on_train_begin(args, state, None)
    marks.on_pre_optimizer_step(args, state, None)
    marks.save_finished_step(broken)
    assert saved == []
    marks.on_step_end(args, state, None)
    marks.save_finished_step(broken)
    assert saved == [3]


def full_disk(error):
    def save(*args, **kwargs):
        raise error

    return save


@pytest.mark.parametrize(
    ("place", "error", "saved"),
    [
        # Each library's own words, as they came from a tmpfs that was full.
        ((AnswerTrainer, "_save_optimizer_and_scheduler"), RuntimeError(ZIP), []),
        ((saving.MarkWholeCheckpoints, "on_save"), OSError(errno.ENOSPC, "No space left on device"), []),
        ((AnswerTrainer, "_save"), SafetensorError(SERIALIZE), []),
        ((run_folder, "describe"), OSError(errno.EDQUOT, "Disk quota exceeded"), [3, 6]),
    ],
)
def test_a_full_disk_ends_a_run_in_one_line(train, whole, tmp_path, capsys, monkeypatch, place, error, saved):
    run = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(*place, full_disk(error))
        train(run)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in said
    assert f"error: no room is left for {run} (" in said and "Make room" in said
    resumes_from = (
        f"resumes from {run / 'checkpoint-6'} (without --overwrite)."
        if saved
        else "starts again from the base model: no checkpoint is complete yet."
    )
    assert said.endswith(f"The same command {resumes_from}\n")
    assert not run_folder.is_finished(run)
    assert result(train(run)) == whole


def test_a_checkpoint_that_broke_takes_no_older_one_with_it(train, tmp_path, monkeypatch):
    def on_save(self, args, state, control, **kwargs):
        if state.global_step == 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        return true_on_save(self, args, state, control, **kwargs)

    run, true_on_save = tmp_path / "run", saving.MarkWholeCheckpoints.on_save
    monkeypatch.setattr(saving.MarkWholeCheckpoints, "on_save", on_save)
    with pytest.raises(SystemExit):  # at a rate of 0 the first evaluation stays the best, whose checkpoint is kept
        train(run, num_train_epochs=3, learning_rate=0, save_total_limit=2)
    assert sorted(path.parent.name for path in run.glob("*/complete")) == ["checkpoint-3", "checkpoint-6"]


@pytest.fixture
def disk(tmp_path):
    """`disk(kib)`: a folder on a disk of that size; again, the same one with another size."""
    folder = tmp_path / "disk"

    def mount(kib):
        how = [f"size={kib}k"]
        if folder.exists():
            how = ["remount", *how]
        folder.mkdir(exist_ok=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(how), "none", folder], capture_output=True)
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.decode().strip()}")
        return folder

    yield mount
    subprocess.run(["umount", "--lazy", folder], capture_output=True, check=False)


def size_kib(folder):
    return sum(path.stat().st_size + 2048 for path in folder.rglob("*") if path.is_file()) // 1024


def test_a_run_on_a_disk_that_is_full_goes_on_once_there_is_room(train, whole, tmp_path, disk, capsys):
    train(tmp_path / "measured")
    checkpoint, all_of_it = size_kib(tmp_path / "measured" / "checkpoint-3"), size_kib(tmp_path / "measured")
    run = disk(checkpoint * 3 // 2) / "run"  # no room for the second
    with pytest.raises(SystemExit) as stop:
        train(run)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in error
    assert f"resumes from {run / 'checkpoint-3'} (without --overwrite)." in error and (run / "checkpoint-6").is_dir()
    disk(all_of_it - 8)  # nearly all
    with pytest.raises(SystemExit):
        train(run)
    said = capsys.readouterr()
    assert "checkpoint-6 was not finished when the run stopped; it is removed" in said.out
    assert f"resumes from {run / 'checkpoint-6'} (without --overwrite)." in said.err
    disk(2 * all_of_it)
    assert result(train(run)) == whole


def test_a_worker_that_is_killed_ends_a_run_in_one_line(train, whole, at_loss, tmp_path, capsys):
    def kill_workers(trainer, inputs):
        for worker in multiprocessing.active_children():
            worker.kill()
            worker.join()

    run, loader = tmp_path / "run", {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 1}
    at_loss(8, kill_workers)  # in the second epoch
    with pytest.raises(SystemExit) as stop:
        train(run, **loader)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in error
    assert "error: a worker of the data loader is lost (RuntimeError: DataLoader worker (pid" in error
    assert f"The same command resumes from {run / 'checkpoint-3'} (without --overwrite)." in error
    assert result(train(run, **loader)) == whole


def test_a_connection_that_a_killed_worker_broke_counts_as_its_end():
    def _try_get_data():
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

    lost = pytest.raises(ProcessError, match="a worker of the data loader is lost .*starts again")
    with lost, explains_breakdown("here", lambda: "starts again."):
        _try_get_data()
    with pytest.raises(ConnectionResetError), explains_breakdown("here", lambda: "starts again."):
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
