"""Run all steps on digits in two source trees, each a process, and compare what they write. Not a test of pytest.

    python tests/compare_behaviour.py be40872 HEAD --work /tmp/compare              # git revisions, or folders
    python tests/compare_behaviour.py be40872 . --work /tmp/compare --reuse         # the old tree is not run again

The steps run in DIR/old and DIR/new with the same relative paths, on a CPU and one thread each. Then the new tree reads
what the old one wrote: in DIR/cross-predict its runs, folds and a run stopped by SIGTERM, in DIR/cross-use its
prediction files. Weights, logits, keys and files must be equal to the bit. Words of messages, pages and model cards may
differ and are shown; the numbers in them may not. Ends with a table, and with exit code 1 where something differs.
"""

import argparse
import csv
import difflib
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from io import BytesIO
from itertools import zip_longest
from pathlib import Path

import pyarrow.parquet as pq
import torch
from safetensors import safe_open

# How a tree spells a command or an option where its help has the second name and not the first.
RENAMED = {
    "vqa-sft doubt": "vqa-sft uncertainty",
    "vqa-sft merge": "vqa-sft export",
}
# Keys of check.json that the new tree may have renamed; keys of all other files may not change.
RENAMED_KEYS = {"mend": "fix", "pictures": "images", "pictures_per_row": "images_per_row"}
# What is not compared, and why: keys of JSON and columns of CSV, and the number after them in texts.
MASKED = {
    "git_commit": "the trees are of two commits",
    "*_runtime": "time",
    "*_per_second": "time",
    "train_examples_per_s": "time",
}
# The mean loss since the process started, and the machine says at which step a SIGTERM reaches it.
MASKED_IF_RESUMED = ["train_loss"]
# Progress bars, and a line that DeepSpeed opens with the time of day.
MASKED_LINES = re.compile(r"\d+%\|| \[real_accelerator\.py")
TEXTS = (".out", ".err", ".md", ".html")
SHOWN_LINES, SHOWN_CHARACTERS = 12, 240

TREE = ("recipes", "vqa_sft", "accelerate_configs")  # what is copied of a tree
WRITTEN = ("data", "runs", "out", "home/vqa_sft")  # what steps write
PROGRAMS = {
    "sft": "recipes/sft.py --config data/digits.yaml",
    "predict": "recipes/predict.py --use_cpu --batch_size 64 --num_workers 0",
    "vqa-sft": "-m vqa_sft.cli",
    "tiny": "-m vqa_sft.tiny",
    "python": "",
}
PREDICTOR = """
import json, vqa_sft
images = [f"data/digits/images/{i:04d}.png" for i in (3, 5, 8)]
predict = vqa_sft.Predictor("runs/demo", use_cpu=True)
probs = predict(images, ["What digit is written here?"] * 3, [["1", "3"], ["5", "6", "7"], ["8", "2", "4", "0"]])
json.dump([row.tolist() for row in probs], open("out/predictor.json", "w"))
"""
LONG = "--limit 400 --max_steps 18 --eval_strategy steps --eval_steps 6 --save_strategy steps --save_steps 6"
LONG += " --logging_steps 1 --global_batch_size 16 --per_device_train_batch_size 16"
SHORT = "--max_steps 4 --validation_fraction 0 --save_strategy steps --save_steps 2 --per_device_train_batch_size 16"
NOISY = f"{SHORT} --train_data data/digits/noisy.csv"
OFTEN = "--eval_strategy steps --eval_steps 2"
SMALL = "--data data/digits/test_small.csv"
MAKE = {
    "digits": "tiny digits data/digits",
    "folds": "vqa-sft folds data/digits/noisy.csv --num-folds 2 --output data/folds.csv",
    "folds, one split": "vqa-sft folds data/digits/noisy.csv --holdout 0.2 --seed 7 --output data/holdout.csv",
    "check": "vqa-sft check data/digits.yaml --limit 200 --test data/digits/test_small.csv --html out/page.html",
    "check, json": "vqa-sft check data/digits/broken.csv --json out/check.json --html out/broken.html",
    "check, fix": "vqa-sft check data/digits/broken.csv --fix data/digits/clean.csv",
    "memory": "vqa-sft memory recipes/qwen3b_t4.yaml --gpu-gib 14",
    "train": f"sft {LONG} --output_dir runs/demo",
    "train, other recipe": f"sft {LONG} --output_dir runs/demo --learning_rate 1e-4",
    "train, stopped": f"sft {LONG} --output_dir runs/stopped",
    "train, folds, ema": f"sft {NOISY} {OFTEN} --folds_file data/folds.csv --fold all --averaging ema --ema_decay 0.5 "
    "--output_dir runs/folds",
    "train, tower, swa": f"sft {NOISY} {OFTEN} --folds_file data/holdout.csv --fold 0 --averaging swa --swa_start 1 "
    "--adapt_tower true --adapt_merger true --vision_learning_rate 1e-4 --image_augmentation 0.2 --flip_images true "
    "--letter_smoothing 0.1 --vocabulary_weight 0.5 --supervise_end_of_turn true --type_prompts builtin "
    "--prompt_language ko --gradient_checkpointing true --output_dir runs/tower",
    "train, plain path": f"sft {SHORT} --fast false --shuffle_choices false "
    "--train_data data/digits/clean.csv --output_dir runs/plain",
    "train, cache": f"sft {NOISY} {OFTEN} --cache_image_features true --validation_data data/digits/clean.csv "
    "--loss vocabulary --early_stopping_patience 1 --output_dir runs/cached",
    "train, all weights": f"sft {NOISY} --use_peft false --limit 60 --output_dir runs/whole",
}
PREDICT = {
    "resume": f"sft {LONG} --output_dir runs/stopped",
    "base": f"predict --run none --model vqa_sft/tiny/base {SMALL} --output out/base.csv",
    "identity": "predict --run runs/demo --data data/digits/test.csv --output out/demo.csv",
    "resumed": "predict --run runs/stopped --data data/digits/test.csv --output out/resumed.csv",
    "rotations": f"predict --run runs/demo --orders rotations {SMALL} --output out/rotations.csv",
    "orders, scales": f"predict --run runs/demo --orders 3 --scales 0.7,1.0 --average log {SMALL} --limit 60 --output "
    "out/scales.csv",
    "several runs": f"predict --run runs/folds --orders rotations {SMALL} --template data/template.csv --output "
    "out/folds.csv",
    "runs of two kinds": f"predict --run runs/tower runs/plain --average_runs mean {SMALL} --limit 40 --output "
    "out/two.csv",
    "all weights": f"predict --run runs/whole {SMALL} --streaming --limit 40 --output out/whole.csv",
    "validation": "predict --run runs/demo --part validation --scales 0.7,1.0 --output out/validation.csv",
    "out of fold": "predict --run runs/folds --part validation --orders rotations --output out/out_of_fold.csv",
    "bad rows": "predict --run runs/demo --data data/digits/broken_test.csv --on_bad_row guess --answer_format "
    "probabilities --output out/guessed.csv",
    "from Python": f"python -c {shlex.quote(PREDICTOR)}",
}
USE = {
    "score": "vqa-sft score out/base.parquet tuned=out/demo.parquet out/scales.parquet --answers "
    "data/digits/test_answers.csv",
    "score, folds": "vqa-sft score runs/demo/validation.parquet runs/folds/out_of_fold.parquet",
    "calibrate": "vqa-sft calibrate runs/demo",
    "calibrate, folds": "vqa-sft calibrate runs/folds --predictions out/out_of_fold.parquet",
    "calibrate, scales": "vqa-sft calibrate runs/demo --predictions out/validation.parquet",
    "calibrated": f"predict --run runs/folds --orders rotations {SMALL} --limit 60 --output out/calibrated.csv",
    "ensemble": "vqa-sft ensemble out/rotations.parquet out/base.parquet out/folds.parquet --output out/mean.parquet",
    "ensemble, vote": "vqa-sft ensemble out/folds.fold0.parquet out/folds.fold1.parquet --average vote --output "
    "out/vote.parquet",
    "ensemble, learned": "vqa-sft ensemble out/demo.parquet out/resumed.parquet --average log --weights learned "
    "--learn-on runs/demo/validation.parquet runs/stopped/validation.parquet --save-weights out/weights.json --output "
    "out/learned.parquet",
    "submit": "vqa-sft submit out/mean.parquet --output out/submit.csv --template data/template.csv",
    "submit, probabilities": "vqa-sft submit out/vote.parquet --output out/p.csv --answer-format probabilities",
    "diff": "vqa-sft diff out/base.csv out/rotations.csv --all --data data/digits/test_small.csv",
    "diff, predictions": "vqa-sft diff out/base.parquet out/folds.parquet --all",
    "doubt": "vqa-sft doubt out/demo.parquet --coverage 0.9 --calibrate-on runs/demo/validation.parquet --output "
    "out/doubt.csv",
    "doubt, folds": "vqa-sft doubt runs/folds/out_of_fold.parquet --output out/doubt_of_folds.csv",
    "soup": "vqa-sft soup runs/folds/fold0 runs/folds/fold1 --weights 0.7 0.3 --output runs/soup",
    "soup, predict": f"predict --run runs/soup {SMALL} --limit 40 --output out/soup.csv",
    "merge": "vqa-sft merge runs/tower runs/merged --dtype fp32",
}
# Out-of-fold files name their run by its whole path, which is another one where a copy of the old files is used.
NOT_COPIED = ("calibrate, folds", "calibrated")
PHASES = {"make": MAKE, "predict": PREDICT, "use": USE}
SIDES = {"new": [*PHASES], "cross-predict": ["predict"], "cross-use": ["use"]}  # what runs the new tree -> its phases
CODES = {"check, json": 1, "check, fix": 1, "train, other recipe": 2, "train, stopped": 143}  # of others 0
STOP_AT = {"train, stopped": "runs/stopped/checkpoint-6/complete"}  # SIGTERM as soon as this file is there


def steps_of(side: str, phase: str) -> dict[str, str]:
    return {step: command for step, command in PHASES[phase].items() if side != "cross-use" or step not in NOT_COPIED}


class Side:
    """A folder in which the steps run: the copy of a tree, and what it writes."""

    def __init__(self, folder: Path, slots: threading.Semaphore) -> None:
        self.folder, self.slots, self.helps = folder, slots, {}
        self.owner: dict[str, str] = {}  # path -> the last step that wrote it
        self.codes: dict[str, int] = {}  # step -> exit code
        paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        own = {"PYTHONPATH": os.pathsep.join(paths), "HF_HOME": str(folder / "home"), "CUDA_VISIBLE_DEVICES": ""}
        own |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        own |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"}
        self.how = {"cwd": folder, "env": os.environ | own}

    def run(self, phase: str) -> None:
        (self.folder / "texts").mkdir(exist_ok=True)
        (self.folder / "out").mkdir(exist_ok=True)
        stamps = self.stamps()
        for name, command in steps_of(self.folder.name, phase).items():
            with self.slots:
                started_s = time.monotonic()
                self.codes[name] = self.run_step(name, self.argv(command))
            if name == "digits":
                write_tables(self.folder / "data")
            before, stamps = stamps, self.stamps()
            self.owner |= {path: name for path, stamp in stamps.items() if before.get(path) != stamp}
            print(f"{self.folder.name:14} {name:22} {time.monotonic() - started_s:6.1f} s", flush=True)
        (self.folder / "side.json").write_text(json.dumps([self.owner, self.codes]))

    def run_step(self, name: str, argv: list[str]) -> int:
        texts = self.folder / "texts"
        with (texts / f"{name}.out").open("wb") as out, (texts / f"{name}.err").open("wb") as err:
            process = subprocess.Popen(argv, stdout=out, stderr=err, **self.how)
            while name in STOP_AT and process.poll() is None:
                time.sleep(0.05)
                if (self.folder / STOP_AT[name]).exists():
                    process.send_signal(signal.SIGTERM)
                    break
            return process.wait()

    def argv(self, command: str) -> list[str]:
        words = command.split(" ")
        for before, after in RENAMED.items():
            (*program, old), new = before.split(), after.split()[-1]
            if words[: len(program)] == program and old in words and self.knows(program, new, old):
                words = [new if word == old else word for word in words]
        return [sys.executable, *shlex.split(PROGRAMS[words[0]]), *shlex.split(" ".join(words[1:]))]

    def knows(self, program: list[str], new: str, old: str) -> bool:
        """Whether the program's help has the new name, and not the old one."""
        if program[0] not in self.helps:
            command = [sys.executable, *shlex.split(PROGRAMS[program[0]]), *program[1:], "--help"]
            self.helps[program[0]] = subprocess.run(command, capture_output=True, text=True, **self.how).stdout
        has_new, has_old = (re.search(rf"(?<![\w-]){name}(?![\w-])", self.helps[program[0]]) for name in (new, old))
        return bool(has_new and not has_old)

    def stamps(self) -> dict[str, tuple[int, int]]:
        """When each file was written, and its size."""
        paths = [path for name in WRITTEN for path in (self.folder / name).rglob("*") if path.is_file()]
        paths = [path for path in paths if path.suffix != ".sqlite"]  # images by the times of their files
        return {str(path.relative_to(self.folder)): (path.stat().st_mtime_ns, path.stat().st_size) for path in paths}


def write_tables(data: Path) -> None:
    """Rows that are harder than the digits, rows with mistakes, of their images, and one recipe for both trees."""
    shutil.copy(Path(__file__).parents[1] / "vqa_sft/lab/digits.yaml", data)
    header, *train = [line.split(",") for line in (data / "digits/train.csv").read_text().splitlines()]
    noisy, broken = train[:240], train[300:364]
    for number, row in enumerate(noisy):
        if number % 7 == 3:  # wrong answers, so that a temperature has something to do
            row[7] = "abcd"["abcd".index(row[7]) - 1]
        if row[7] != "d" and number % 5 < 2:
            row[6] = ["", "None of the above"][number % 5]
    broken[3][1], broken[5][7], broken[7][2], broken[9][0] = "images/none.png", "z", "", broken[8][0]
    broken[11][4], broken[13][1], broken[15][3:7] = broken[11][3], broken[12][1], ["7", "", "", ""]
    write_csv(data / "digits/noisy.csv", [header, *noisy])
    write_csv(data / "digits/broken.csv", [header, *broken])
    test = [line.split(",") for line in (data / "digits/test.csv").read_text().splitlines()[1:121]]
    write_csv(data / "digits/test_small.csv", [header[:-1], *test])
    write_csv(data / "template.csv", [["id", "label"], *([row[0], "A"] for row in reversed(test))])
    test[3][1], test[5][2], test[7][3:] = "images/none.png", "", ["7", "", "", ""]
    write_csv(data / "digits/broken_test.csv", [header[:-1], *test[:30]])


def write_csv(path: Path, rows: list[list[str]]) -> None:
    path.write_text("".join(",".join(row) + "\n" for row in rows))


def copy_tree(tree: str, folder: Path) -> None:
    """Copy what runs, of a folder or of a revision of the repository that this file lies in."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if Path(tree).is_dir():
        for name in TREE:
            shutil.copytree(Path(tree) / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        return
    command = ["git", "archive", tree, *TREE]
    archive = subprocess.run(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, check=True).stdout
    with tarfile.open(fileobj=BytesIO(archive)) as file:
        file.extractall(folder, filter="data")


def copy_written(source: Path, target: Path) -> None:
    for name in WRITTEN:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, dirs_exist_ok=True)  # with the times of the files


# --- Comparison: a file as lines, in which all that counts is exact ---


def lines_of(path: Path, name: str) -> list[str]:
    masked = [*MASKED, *(MASKED_IF_RESUMED if name.startswith("runs/stopped") else [])]
    if path.suffix in TEXTS:
        return lines_of_text(path.read_text(encoding="utf-8", errors="replace"))
    if path.suffix == ".json":
        return json.dumps(without(json.loads(path.read_text()), masked), indent=1, ensure_ascii=False).splitlines()
    if path.suffix == ".csv":
        rows = list(csv.reader(path.read_text().splitlines()))
        kept = [i for i, column in enumerate(rows[0]) if not any(fnmatch(column, mask) for mask in masked)]
        return [repr([row[i] for i in kept]) for row in rows]
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        metadata = {key.decode(): json.loads(value) for key, value in (table.schema.metadata or {}).items()}
        lines = json.dumps(without(metadata, masked), indent=1).splitlines()
        return lines + str(table.schema.remove_metadata()).splitlines() + [repr(row) for row in table.to_pylist()]
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in sorted(file.keys())}
            # safetensors writes its metadata in an order that changes from process to process.
            return [repr(sorted((file.metadata() or {}).items())), *lines_of_value(tensors)]
    if path.suffix in (".pt", ".pth", ".bin"):
        return lines_of_value(torch.load(path, weights_only=False))
    return [hashlib.sha256(path.read_bytes()).hexdigest()]


def lines_of_text(text: str) -> list[str]:
    for name in MASKED:
        text = re.sub(rf"({name.replace('*', '[a-z]+')}'?:? '?)[0-9.e+-]+", r"\1...", text)
    return [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip() and not MASKED_LINES.search(line)]


def lines_of_value(value: object) -> list[str]:
    """What torch saved, a line a number or a tensor."""
    if isinstance(value, torch.Tensor):
        bits = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        mean = value.double().mean().item() if value.numel() else 0
        return [f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(bits).hexdigest()[:16]} mean {mean:.9g}"]
    if isinstance(value, dict):
        return [f"{key}: {line}" for key in value for line in lines_of_value(value[key])]
    if isinstance(value, list | tuple):
        return [line for item in value for line in lines_of_value(item)]
    if hasattr(value, "__dict__") and not isinstance(value, type):
        return lines_of_value(vars(value))
    return [repr(value)]


def without(value: object, masked: list[str]) -> object:
    if isinstance(value, dict):
        kept = [key for key in value if not any(fnmatch(key, mask) for mask in masked)]
        return {key: without(value[key], masked) for key in kept}
    return [without(item, masked) for item in value] if isinstance(value, list) else value


def compare(name: str, old: Path, new: Path) -> tuple[str, str]:
    """equal, reworded or differs, and the lines that differ."""
    paths = old / name, new / name
    if not all(path.is_file() for path in paths):
        return "differs", f"only in {old.name if paths[0].is_file() else new.name}"
    if paths[0].read_bytes() == paths[1].read_bytes():
        return "equal", ""
    # Some metadata and messages hold whole paths.
    folder = re.compile(re.escape(str(old.parent)) + r"/(old|new|cross-predict|cross-use)\b")
    before, after = ([folder.sub("FOLDER", line) for line in lines_of(path, name)] for path in paths)
    if name == "out/check.json":
        for key, renamed in RENAMED_KEYS.items():
            if any(f'"{renamed}":' in line for line in after):
                before = [line.replace(f'"{key}":', f'"{renamed}":') for line in before]
    if before == after:
        return "equal", ""
    has_words = Path(name).suffix in TEXTS or name == "out/check.json"
    has_layout = Path(name).suffix in (".html", ".err")  # whose numbers may be those of a style, or of a traceback
    same_numbers = has_layout or numbers_of(before) == numbers_of(after)
    diff = [line[:SHOWN_CHARACTERS] for line in list(difflib.unified_diff(before, after, lineterm="", n=0))[2:]]
    sides = [line for line in diff if line[0] == "-"], [line for line in diff if line[0] == "+"]
    diff = [line for pair in zip_longest(*sides) for line in pair if line is not None]
    more = [f"... and {len(diff) - SHOWN_LINES} lines more"] if len(diff) > SHOWN_LINES else []
    return "reworded" if has_words and same_numbers else "differs", "\n".join(diff[:SHOWN_LINES] + more)


def numbers_of(lines: list[str]) -> list[str]:
    return re.findall(r"(?<![\w.])-?\d[\d,.]*\b", "\n".join(lines))


def report(sides: dict[str, Side]) -> tuple[int, int]:
    """Print what differs and the table; the number of steps that differ, and of texts that were reworded."""
    old, table, num_reworded = sides["old"], [], 0
    for name, side in sides.items():
        owner = side.owner | old.owner
        for step in [step for phase in SIDES.get(name, []) for step in steps_of(name, phase)]:
            files = sorted(path for path in owner if owner[path] == step)
            files = [path for path in files if (old.folder / path).is_file() or (side.folder / path).is_file()]
            files += [f"texts/{step}.out", f"texts/{step}.err"]
            found = {path: compare(path, old.folder, side.folder) for path in files}
            for path, (verdict, detail) in found.items():
                if verdict != "equal":
                    print(f"\n{name} / {step} / {path}: {verdict}\n{detail}")
            counts = [[verdict for verdict, _ in found.values()].count(v) for v in ("equal", "reworded", "differs")]
            codes, expected = (old.codes[step], side.codes[step]), CODES.get(step, 0)
            if codes != (expected, expected):
                counts[2] += 1
                said = (side.folder / f"texts/{step}.err").read_text(errors="replace")[-1500:]
                print(f"\n{name} / {step}: exit codes {codes[0]} and {codes[1]}, not {expected}\n{said}")
            num_reworded += counts[1]
            table.append((name, step, len(files), *counts))
    for name in [
        name for name in sides if name != "cross-use" and "resume" in PREDICT
    ]:  # the weights of the run that was stopped, and of the one that was not
        paths = [sides[name].folder / f"runs/{run}/adapter_model.safetensors" for run in ("demo", "stopped")]
        is_equal = all(path.is_file() for path in paths) and paths[0].read_bytes() == paths[1].read_bytes()
        table.append((name, "resumed = not stopped", 1, int(is_equal), 0, int(not is_equal)))
    print(f"\n{'old against':14}{'step':23}{'files':>7}{'equal':>7}{'reworded':>10}{'differ':>8}")
    for name, step, *counts in table:
        print(f"{name:14}{step:23}{counts[0]:7}{counts[1]:7}{counts[2]:10}{counts[3]:8}")
    return sum(row[-1] > 0 for row in table), num_reworded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", help="folder or git revision")
    parser.add_argument("new", help="folder or git revision")
    parser.add_argument("--work", type=Path, required=True, help="folder for both trees and what they write")
    parser.add_argument("--reuse", action="store_true", help="take what the old tree wrote there in an earlier call")
    parser.add_argument("--texts", action="store_true", help="fail on reworded texts too")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, help="what to compare with the old tree")
    parser.add_argument("--steps", default="", metavar="REGEX", help="run only these, and compare what they write")
    parser.add_argument("--jobs", type=int, default=2, help="steps at once")
    args = parser.parse_args()
    for steps in PHASES.values():
        for name in [name for name in steps if not re.search(args.steps, name)]:
            del steps[name]
    started_s, work, slots = time.monotonic(), args.work.resolve(), threading.Semaphore(args.jobs)
    sides = {name: Side(work / name, slots) for name in ("old", *args.sides)}
    runs_old = not (args.reuse and (work / "old/side.json").is_file())
    if runs_old:
        for name in ("old", *(f"old-{phase}" for phase in PHASES)):
            shutil.rmtree(work / name, ignore_errors=True)
    for name in [*args.sides, *(["old"] if runs_old else [])]:
        copy_tree(args.old if name == "old" else args.new, work / name)
    is_done = {phase: threading.Event() for phase in PHASES}  # by the old tree

    def run_old() -> None:
        try:
            for phase in PHASES:
                if runs_old:
                    sides["old"].run(phase)
                    copy_written(work / "old", work / f"old-{phase}")
                is_done[phase].set()
        finally:
            for event in is_done.values():
                event.set()

    def run_side(name: str) -> None:
        for phase in SIDES[name]:
            if name != "new":
                before = {"predict": "make", "use": "predict"}[phase]
                is_done[before].wait()
                copy_written(work / f"old-{before}", work / name)
            sides[name].run(phase)

    with ThreadPoolExecutor(len(sides)) as pool:
        running = [pool.submit(run_old), *(pool.submit(run_side, name) for name in args.sides)]
        for future in running:
            future.result()
    sides["old"].owner, sides["old"].codes = json.loads((work / "old/side.json").read_text())
    failed, reworded = report(sides)
    took_s = time.monotonic() - started_s
    print(f"\n{args.old} and {args.new}: {failed} steps differ, {reworded} texts were reworded; {took_s:.0f} s.")
    sys.exit(int(failed > 0 or (args.texts and reworded > 0)))


if __name__ == "__main__":
    main()
