"""Commands on runs: train them, predict with them, combine and publish them, and what memory a recipe needs."""

import contextlib
import sys
from typing import Annotated, Literal

from typer import Argument, Context, Option

from vqa_sft.cli.options import check_positive, is_recipe
from vqa_sft.errors import InputError

AccelerateConfig = Annotated[
    str | None,
    Option(
        metavar="NAME_OR_FILE",
        help="start it with `accelerate launch` and this configuration, such as cpu, multi_gpu or zero3",
    ),
]

NumProcesses = Annotated[int | None, Option(metavar="N", help="processes to start, in place of the configuration's")]


def train(context: Context, accelerate_config: AccelerateConfig = None, num_processes: NumProcesses = None) -> None:
    """Train a run of a recipe: vqa-sft train --config demo.yaml.

    The same as recipes/sft.py, whose options it takes.
    """
    from vqa_sft.cli.scripts import run_script

    run_script("sft", context.args, accelerate_config, num_processes)


def predict(context: Context, accelerate_config: AccelerateConfig = None, num_processes: NumProcesses = None) -> None:
    """Predict with a run: vqa-sft predict --run runs/demo --help.

    The same as recipes/predict.py, whose options it takes.
    """
    from vqa_sft.cli.scripts import run_script

    run_script("predict", context.args, accelerate_config, num_processes)


def blind(
    context: Context,
    run_folder: Annotated[
        str, Argument(metavar="RUN", help="folder of a finished run, or of all its folds; none with --model NAME")
    ],
    output: Annotated[str | None, Option(metavar="JSON", help="the table as JSON; default: blind.json in RUN")] = None,
    images: Annotated[str, Option(help="what is compared with the images as they are")] = "blank,swapped,blurred",
    accelerate_config: AccelerateConfig = None,
    num_processes: NumProcesses = None,
) -> None:
    """See whether a run looks at the images.

    Scores the run's validation rows, or those of --data, with their images as they are, blank (white), swapped with
    those of other rows, and blurred to rough colours. Prints what accuracy, NLL and confidence become of it. More
    options are those of predict: --data, --model, --max_pixels, --orders, --batch_size, --use_cpu.

    Example: vqa-sft blind runs/mine --data test.csv
    """
    from vqa_sft.cli.blind import score_blind

    # `--run none --model NAME`, as predict takes it, begins with an option.
    named = [run_folder] if run_folder.startswith("--") else ["--run", run_folder]
    print(score_blind([*named, *context.args], output, images, accelerate_config, num_processes))


def soup(
    run_folders: Annotated[list[str], Argument(metavar="RUN", help="folders of finished runs on one base")],
    output: Annotated[str, Option(metavar="FOLDER", help="a new run folder, for predict")],
    weights: Annotated[list[float] | None, Option(metavar="W...", help="of the runs; default: equal")] = None,
    rank: Annotated[int | None, Option(metavar="R", help="at most; default: as many as the mean has")] = None,
) -> None:
    """Average the adapters of several runs.

    Writes one adapter: the mean of what they change in the base.
    """
    from vqa_sft.runs.soup import make_soup

    if rank is not None and rank < 1:
        raise InputError(f"--rank must be at least 1; got {rank}.")
    print(make_soup(run_folders, output, weights=weights or None, rank=rank))


def export(
    run_folder: Annotated[str, Argument(metavar="RUN", help="folder of a finished run, or of a soup")],
    output: Annotated[str, Argument(metavar="OUT", help="a new folder")],
    adapter: Annotated[bool, Option("--adapter", help="base and adapter side by side, in place of one model")] = False,
    plain: Annotated[bool, Option("--plain", help="weights and processor alone: no decision model")] = False,
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32"] | None, Option(help="default: that of the base's checkpoint")
    ] = None,
    model: Annotated[str | None, Option(help="where the base is now, if not where it was in training")] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="replace an earlier export in OUT")] = False,
) -> None:
    """Write a run as whole weights that serve elsewhere.

    The adapter is merged. transformers' pipeline("decision") and `transformers serve` answer with the run's own prompt,
    letters and temperature; plain transformers and vLLM load the same folder, PEFT what --adapter writes.
    """
    from vqa_sft.runs.export import export_run

    how = {"adapter": adapter, "plain": plain, "overwrite": overwrite}
    print(export_run(run_folder, output, dtype=dtype, model=model, **how))


def push(
    run_folder: Annotated[str, Argument(metavar="RUN", help="folder of a finished run")],
    repo: Annotated[
        str | None, Option(help="user/name; default: hub_model_id of the recipe, else the folder's name")
    ] = None,
    private: Annotated[bool, Option("--private", help="make the repository private")] = False,
    space: Annotated[
        str | None, Option(metavar="USER/NAME", help="also upload a Space with the page of vqa-sft try")
    ] = None,
) -> None:
    """Upload a finished run to the Hub.

    The files of a decision model are written beside its weights first, where the run can be one.
    """
    from vqa_sft.runs.hub import push_run
    from vqa_sft.runs.space import check_base, push_space

    if space is not None:
        check_base(run_folder)
    address = push_run(run_folder, repo, private=private or None)
    print(address)
    if space is not None:
        print(push_space(run_folder, address, space, private=private or None))


def try_run(
    run_folder: Annotated[str, Argument(metavar="RUN", help="folder of a finished run, or of all its folds")],
    host: Annotated[str, Option(help="address to listen on; 0.0.0.0: all of this machine")] = "127.0.0.1",
    port: Annotated[int, Option(metavar="N", help="to listen on")] = 7860,
    coverage: Annotated[float, Option(metavar="P", help="with which the conformal set holds the answer")] = 0.9,
    model: Annotated[str | None, Option(help="where the base is now, if not where it was in training")] = None,
    use_cpu: Annotated[bool, Option("--use-cpu", help="do not use the GPU")] = False,
) -> None:
    """Ask a run about your own images, on a page in the browser.

    Drop an image, type a question and options: you see calibrated bars, the conformal set, and how far permutations of
    the options move the probabilities. Needs the package gradio.
    """
    from vqa_sft.cli.try_page import serve

    serve(run_folder, host=host, port=port, coverage=coverage, model=model, use_cpu=use_cpu)


def memory(
    context: Context,
    source: Annotated[str, Argument(metavar="RECIPE", help="a recipe; its fields may follow as --key value")],
    gpu_gib: Annotated[float | None, Option(metavar="GIB", help="a GPU's memory: say whether and what fits")] = None,
    text_tokens: Annotated[int, Option(metavar="N", help="of a row, with the template")] = 160,
    images: Annotated[int, Option(metavar="N", help="of a row, each of max_pixels")] = 1,
) -> None:
    """Estimate the GPU memory that a recipe needs.

    The shape of the model is enough: no weights are loaded, and no GPU is needed. Exit code: 0, or 1 where it does not
    fit --gpu-gib, 2 where it cannot be said.
    """
    check_positive(gpu_gib=gpu_gib, text_tokens=text_tokens, images=images)
    if not is_recipe(source):
        raise InputError(f"memory needs a recipe (.yaml); got {source}.")
    from vqa_sft.config.recipe import read_recipe
    from vqa_sft.models.memory.describe import describe_recipe

    with contextlib.redirect_stdout(sys.stderr):  # where libraries may print what they like
        recipe = read_recipe(["--config", source, *context.args])
        text, fits = describe_recipe(recipe, text_tokens=text_tokens, images=images, gpu_gib=gpu_gib)
    print(text)
    sys.exit(int(not fits))
