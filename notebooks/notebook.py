# %% [markdown] tags=["kaggle"]
# # Visual multiple-choice questions on Kaggle: from a CSV to a submission
#
# Fine-tunes a vision-language model with **vqa-sft** on the two T4s of a Kaggle session, and writes `submission.csv`
# with calibrated probabilities beside it. Choose *Accelerator: GPU T4 x2*, attach your contest's data, fill in the
# next cell, run all.
#
# `QUICK = True` trains on a few hundred rows within a time limit and goes the whole way to a submission. Run it
# first.

# %% [markdown] tags=["colab"]
# # Visual multiple-choice questions on Colab: from a CSV to a submission
#
# Fine-tunes a vision-language model with **vqa-sft** on the GPU of a Colab session, and writes `submission.csv` with
# calibrated probabilities beside it. Choose *Runtime > Change runtime type > T4 GPU*, fill in the next cell, run all.
#
# `QUICK = True` trains on a few hundred rows within a time limit and goes the whole way to a submission. Run it
# first.

# %% tags=["kaggle", "parameters"]
QUICK = True
DATA = "/kaggle/input/my-contest"  # a folder with train.csv, test.csv and the images that they name
CODE = "/kaggle/input/vqa-sft"  # this repository as a dataset, or a git address: git+https://...
WHEELS = ""  # with the internet off: a dataset of wheels, see "Install"
SAVE_WHEELS = False
MODEL = ""  # with the internet off: the folder of the model; empty: the recipe's, from the Hub
RECIPE = "qwen7b_2xt4.yaml"
LAUNCH = "dual_t4"
RUN = "/kaggle/working/run"
EARLIER = ""  # the folder of an interrupted run, attached as a dataset: /kaggle/input/my-output/run
HOURS = 8.5  # training stops in time and saves; a session of Kaggle ends after 12
FOLDS = 3  # 0: one run with a tenth of the rows for validation
OPTIONS = ""  # more fields of the recipe: "--num_train_epochs 2 --learning_rate 1e-4"
PREDICT_OPTIONS = ""  # more options of the prediction: "--batch_size 8"

# %% tags=["colab", "parameters"]
QUICK = True
DATA = "/content/drive/MyDrive/my-contest"  # a folder with train.csv, test.csv and the images that they name
CODE = "/content/drive/MyDrive/vqa-sft"  # a copy of this repository, or a git address: git+https://...
WHEELS = ""  # without a network: a folder of wheels, see "Install"
SAVE_WHEELS = False
MODEL = ""  # without a network: the folder of the model; empty: the recipe's, from the Hub
RECIPE = "qwen3b_t4.yaml"
LAUNCH = "single_t4"
RUN = "/content/drive/MyDrive/runs/mine"  # on Drive it outlives the session
EARLIER = ""
HOURS = 3.0  # training stops in time and saves; the same cell goes on where it stopped
FOLDS = 0  # 3: three folds
OPTIONS = ""  # more fields of the recipe: "--num_train_epochs 2 --learning_rate 1e-4"
PREDICT_OPTIONS = ""  # more options of the prediction: "--batch_size 8"

# %% tags=["colab"]
from pathlib import Path

if not Path(DATA).exists():
    from google.colab import drive

    drive.mount("/content/drive")

# %% [markdown]
# ## Install
#
# Versions are those of constraints.txt, which were tested together. What this machine ships for CUDA (torch,
# torchvision) and NumPy stay as they are where they are new enough.
#
# **With the internet off**: run the first cells once with it on and `SAVE_WHEELS = True`. The folder `wheels` then has
# what this machine lacks. Save it as a version, attach that as a dataset, and set `WHEELS` to it. The model's folder
# likewise:
#
#     hf download Qwen/Qwen2.5-VL-7B-Instruct --local-dir model

# %%
import json
import os
from pathlib import Path

from IPython import get_ipython


def run(command):
    """Run a command in a shell, as `!command` does, and stop the notebook where it fails."""
    get_ipython().system(command)
    if get_ipython().user_ns["_exit_code"]:
        raise RuntimeError(f"failed: {command}")


if WHEELS:
    run(f"pip install -q --no-deps {WHEELS}/*.whl")
elif CODE:
    Path("pins.txt").write_text("")
    source = CODE
    if Path(CODE).is_dir():
        source = "/tmp/vqa-sft"  # an attached dataset cannot be written to, and a build writes beside its source
        run(f"rm -rf {source} && cp -r {CODE} {source}")
        pins = Path(f"{source}/constraints.txt").read_text().splitlines()
        shipped = ("torch==", "torchvision==", "numpy==")
        Path("pins.txt").write_text("\n".join(pin for pin in pins if not pin.startswith(shipped)))
    if SAVE_WHEELS:
        run(f"pip install -q --dry-run --report all.json -c pins.txt {source}")
        found = [package["metadata"] for package in json.loads(Path("all.json").read_text())["install"]]
        names = [f"{package['name']}=={package['version']}" for package in found if package["name"] != "vqa-sft"]
        run(f"pip wheel -q --no-deps --wheel-dir wheels {source} {' '.join(names)}")
    run(f"pip install -q -c pins.txt {source}")
if MODEL:
    os.environ["HF_HUB_OFFLINE"] = "1"

# %% [markdown]
# ## Look at the data
#
# Every row and every image is read before a GPU is used. The page below says which column was read as what, and names
# every row that cannot be used. `--columns '{question: query}'` and other fields go into `OPTIONS`: see docs/data.md.

# %%
from IPython.display import HTML, display

NEW_MODEL = f"--model_name_or_path {MODEL}" if MODEL else ""
RECIPE_AND_DATA = f"--train_data {DATA}/train.csv {NEW_MODEL} {OPTIONS}"
Path(RUN).mkdir(parents=True, exist_ok=True)
run(f"vqa-sft check {RECIPE} {RECIPE_AND_DATA} --test {DATA}/test.csv --html {RUN}/check.html")

# %%
import matplotlib.pyplot as plt

from vqa_sft.data.examples import load_examples
from vqa_sft.images import open_image

examples, _ = load_examples(f"{DATA}/train.csv")
figure, axes = plt.subplots(1, 4, figsize=(16, 5))
for axis, row in zip(axes, examples.select(range(4)), strict=False):
    if row["images"]:
        axis.imshow(open_image(row["images"][0]))
    letters = [f"{'> ' if number == row['answer'] else ''}{text}" for number, text in enumerate(row["choices"])]
    axis.set_title("\n".join([row["question"], *letters]), fontsize=8)
    axis.axis("off")

# %% [markdown]
# ## Train
#
# Run this cell again after an interruption: it goes on from the last checkpoint, and does nothing where the training
# has ended. Settings other than those of the interrupted run are refused, with their names.

# %% [markdown] tags=["kaggle"]
# A session that ended keeps its output if it was *saved as a version*. Attach that output as a dataset, and set
# `EARLIER`.

# %% [markdown] tags=["colab"]
# After a disconnect: reconnect, *Run all*. The run is on Drive.

# %%
TRAINED = f"{RUN}/quick" if QUICK else f"{RUN}/full"
if EARLIER and not Path(TRAINED).exists():
    run(f"cp -r {EARLIER}/{Path(TRAINED).name} {TRAINED}")
if QUICK:
    HOW = "--limit 400 --num_train_epochs 1 --time_budget_h 0.2"
elif FOLDS:
    run(f"vqa-sft folds {RECIPE} {RECIPE_AND_DATA} --num-folds {FOLDS} --output {RUN}/folds.csv")
    HOW = f"--fold all --folds_file {RUN}/folds.csv --validation_fraction 0 --time_budget_h {HOURS}"
else:
    HOW = f"--time_budget_h {HOURS}"
run(f"vqa-sft train --accelerate_config {LAUNCH} --config {RECIPE} {RECIPE_AND_DATA} {HOW} --output_dir {TRAINED}")

# %% [markdown]
# ## How good is it?
#
# Validation rows only: of folds, each row by the run that was not trained on it.

# %%
VALIDATION = f"{TRAINED}/out_of_fold.parquet" if FOLDS and not QUICK else f"{TRAINED}/validation.parquet"
run(f"vqa-sft score {VALIDATION}")

# %% [markdown]
# ## Predict
#
# `rotations` shows every choice once under every letter and averages: more accurate, and without a preference for a
# letter. The validation rows are scored the same way first, so that the probabilities of the average can be
# calibrated. An interrupted prediction goes on where it stopped.

# %%
PREDICT = f"vqa-sft predict --accelerate_config {LAUNCH} --run {TRAINED} --orders rotations {PREDICT_OPTIONS}"
run(f"{PREDICT} --part validation --output {RUN}/validation.csv")
run(f"vqa-sft calibrate {TRAINED} --predictions {RUN}/validation.parquet")
run(f"{PREDICT} --data {DATA}/test.csv --output {RUN}/submission.csv")

# %% [markdown]
# ## Several models
#
# Averages the calibrated probabilities of several runs, say of two models, from their prediction files. With one run
# there is nothing to do. `vqa-sft ensemble --help` has learned weights too.

# %%
OTHERS = []  # prediction files of the same test rows by other runs: ["/kaggle/input/.../submission.parquet"]
BEST = f"{RUN}/submission.parquet"
if OTHERS:
    files = " ".join([BEST, *OTHERS])
    run(f"vqa-sft ensemble {files} --output {RUN}/ensemble.parquet")
    BEST = f"{RUN}/ensemble.parquet"

# %% [markdown]
# ## Submission
#
# In the format of your own answers, or of the contest's `sample_submission.csv` where there is one.

# %%
template = Path(DATA) / "sample_submission.csv"
TEMPLATE = f"--template {template}" if template.exists() else ""
run(f"vqa-sft submit {BEST} {TEMPLATE} --output submission.csv --overwrite")
run("head -5 submission.csv")

# %% [markdown]
# ## Look at what it does
#
# One page: calibration, accuracy by kind of question, the most confident errors and the least certain rows with their
# images.

# %%
from html import escape

run(f"vqa-sft report {VALIDATION} --output {RUN}/report.html")
page = escape(Path(f"{RUN}/report.html").read_text(encoding="utf-8"))
display(HTML(f'<iframe srcdoc="{page}" width="100%" height="900"></iframe>'))
