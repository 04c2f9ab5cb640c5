"""Fine-tune a vision-language model on visual multiple-choice questions.

    accelerate launch recipes/sft.py --config recipes/demo.yaml
    accelerate launch recipes/sft.py --config recipes/qwen7b.yaml --learning_rate 1e-4

Any field of the recipe can be given again on the command line; `--help` lists ours, beside those of trl.SFTConfig and
trl.ModelConfig. You will see the rows being read and checked, the loss and the validation metrics while it trains, and
at the end what was saved in `output_dir`. The same command resumes a run that was killed. Mistakes in the recipe or the
data end with exit code 2 before any weight is loaded (the launcher itself then ends with 1); a SIGTERM saves and ends
with 143.
"""

import signal
import sys
import time

STARTED_S = time.monotonic()  # from here the time budget counts

from vqa_sft.environment import set_library_defaults

set_library_defaults()

from accelerate import PartialState

from vqa_sft.config.fields import describe_fields
from vqa_sft.config.recipe import Recipe, read_recipe
from vqa_sft.config.training import RecipeArguments
from vqa_sft.console import is_main_process, note
from vqa_sft.errors import exits_with_message
from vqa_sft.files import held
from vqa_sft.models import processes
from vqa_sft.models.load import add_adapter, choose_precision, load_model
from vqa_sft.models.memory.fit import choose_batch
from vqa_sft.predictions.calibration import calibrate_new
from vqa_sft.report.report_page import report_new
from vqa_sft.runs import folder as run_folder
from vqa_sft.runs.out_of_fold import check_folds, write_out_of_fold
from vqa_sft.training.at_once import choose_devices, own_fold, train_at_once
from vqa_sft.training.build import build_trainer, prepare_model
from vqa_sft.training.folder import open_folder, push, write_results
from vqa_sft.training.rows import load_data, select_rows, split_data
from vqa_sft.training.saving import SaveAndStop
from vqa_sft.training.survive import Finished, Interrupted, Retry, fit, train_runs
from vqa_sft.training.validation import choose_weights


@exits_with_message
def main() -> None:
    if "--help" in sys.argv or "-h" in sys.argv:
        print(__doc__, describe_fields(RecipeArguments), sep="\n")
        return
    recipe = read_recipe(sys.argv[1:])
    runs, output_dir = recipe.runs(), recipe.values["output_dir"]  # a run for each fold of `fold: all`, else one
    if of_fold := own_fold(runs):  # one of several processes that `folds_at_once` has started
        run, started_s = of_fold
        with held(run.values["output_dir"], "output_dir"):
            leave(train_runs([run], train, started_s))
        return
    num_at_once = recipe.arguments.folds_at_once
    folders = [output_dir, *(runs[0].folders if num_at_once == 1 else [])]
    with held(folders if is_main_process() else [], "output_dir"):
        if recipe.arguments.fold == "all":
            check_folds(output_dir, runs[0].folders, recipe.arguments.folds_file, recipe.arguments.overwrite)
        if num_at_once == 1:
            ended = train_runs(runs, train, STARTED_S)
        else:
            devices = choose_devices(min(num_at_once, len(runs)), bool(recipe.values.get("use_cpu")))
            ended = train_at_once(runs, devices, STARTED_S)
        if isinstance(ended, Finished) and recipe.arguments.fold == "all" and is_main_process():
            print(write_out_of_fold(output_dir, runs[0].folders))
            print(calibrate_new(output_dir))
            print(report_new(output_dir))
            if recipe.values.get("push_to_hub"):
                for run in runs:
                    push(run)  # once more, with the temperature that the folds share
    leave(ended)


def leave(ended: Finished | Interrupted) -> None:
    """End this process, with 143 where a SIGTERM has ended the training."""
    ended_by_sigterm = isinstance(ended, Interrupted) and ended.by_sigterm
    processes.leave(128 + signal.SIGTERM if ended_by_sigterm else 0)  # as of a process that the signal ended


def train(recipe: Recipe, stop: SaveAndStop) -> Finished | Interrupted | Retry:
    """One run, from its rows to its folder."""
    args, output_dir = recipe.arguments, recipe.values["output_dir"]
    run_folder.check(output_dir, recipe.values, args.overwrite, inputs=recipe.inputs())
    if run_folder.is_finished(output_dir) and not args.overwrite:
        note(f"{output_dir} is finished. Give --overwrite to train it again.")
        return Finished()

    # Load and check the rows, before torch uses a device; the main process decodes the images for all.
    loaded = load_data(recipe)
    parts = split_data(recipe, loaded) if is_main_process() else None
    processes.check_processes(use_cpu=bool(recipe.values.get("use_cpu")))
    precision = choose_precision(recipe.values)
    training_args = recipe.training_args(precision)  # TRL's SFTConfig; starts the process group
    if stop.must_stop():
        return Interrupted(stop.got_sigterm)
    rows = select_rows(recipe, loaded, processes.from_main(parts), training_args)

    # Check processor, adapter, prompts and memory, before weights are loaded and the folder is touched.
    setup = prepare_model(recipe, rows, training_args, precision)
    if args.auto_batch:
        note(choose_batch(training_args, setup.needs))
    if is_main_process():
        open_folder(recipe, rows, setup.prompts)
    PartialState().wait_for_everyone()

    # Train, from the last complete checkpoint if there is one.
    trust = training_args.trust_remote_code
    model = load_model(recipe.model_args(), precision, device_map=processes.device_map(), trust_remote_code=trust)
    if args.init_adapter is not None:
        model = add_adapter(model, args.init_adapter, is_trainable=True)
    trainer = build_trainer(recipe, rows, training_args, setup, model, stop)  # TRL's SFTTrainer with our loss
    ended = fit(trainer, recipe, setup.needs)
    if not isinstance(ended, Finished):
        return ended

    # Keep the raw or the averaged weights, whichever validate better; save, calibrate, show, push.
    metrics = {"precision": precision} | trainer.speed.metrics()
    predictions, of_validation = choose_weights(trainer, rows.validation)
    trainer.save_model(output_dir)
    if is_main_process():
        print(write_results(recipe, rows, training_args, setup.prompts, predictions, metrics | of_validation))
        if predictions is not None and len(recipe.folders) == 1:  # folds are calibrated together
            print(calibrate_new(output_dir))
            print(report_new(output_dir, rows.loaded))
        if recipe.values.get("push_to_hub"):
            push(recipe)
    return Finished()


if __name__ == "__main__":
    main()
