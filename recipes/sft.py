"""Fine-tune a vision-language model on visual multiple-choice questions.

    accelerate launch recipes/sft.py --config recipes/demo.yaml
    accelerate launch recipes/sft.py --config recipes/qwen7b.yaml --learning_rate 1e-4

Any field of the recipe can be given again on the command line. You will see the rows being read and checked, the loss
and the validation metrics while it trains, and at the end what was saved in `output_dir`. The same command goes on
where a killed run stopped. Mistakes in the recipe or the data end with exit code 2 before any weight is loaded (the
launcher itself then ends with 1); a SIGTERM saves and ends with 143.
"""

import contextlib
import functools
import gc
import math
import os
import signal
import sys
import time
from collections import Counter
from typing import Any

from vqa_sft.environment import set_library_defaults

set_library_defaults()

from vqa_sft.config.fields import describe_fields
from vqa_sft.config.recipe import Recipe, read_recipe
from vqa_sft.config.training import RecipeArguments
from vqa_sft.data.examples import Loaded, note_kept_orders, read_examples, stream_examples
from vqa_sft.data.split import TRAIN, VALIDATION, choose_parts, most_choices, read_parts, select, write_parts
from vqa_sft.errors import InputError, exits_with_message, explains, explains_breakdown
from vqa_sft.files import held
from vqa_sft.predictions.calibration import calibrate_new
from vqa_sft.runs import checkpoints, folder as run_folder
from vqa_sft.runs.out_of_fold import write_out_of_fold

STARTED_S = time.monotonic()


@exits_with_message
def main() -> None:
    if "--help" in sys.argv or "-h" in sys.argv:
        fields = describe_fields(RecipeArguments)
        print(f"{__doc__}\nOur fields, beside those of trl.SFTConfig and trl.ModelConfig:\n{fields}")
        return
    is_main = os.environ.get("RANK", "0") == "0"
    recipe = read_recipe(sys.argv[1:])
    runs = recipe.runs()
    folders = [run.values["output_dir"] for run in runs]
    # Of several processes of one launch the main one holds them for all.
    with held([recipe.values["output_dir"], *folders] if is_main else [], "output_dir"):
        train_runs(recipe, runs, folders, is_main)


def train_runs(recipe: Recipe, runs: list[Recipe], folders: list[str], is_main: bool) -> None:
    """One run after another; ends the process where a SIGTERM asked for it."""
    stop = checkpoints.SaveAndStop(3600 * (recipe.arguments.time_budget_h or math.inf), STARTED_S)
    is_stopped = False
    for number in range(len(runs)):
        if number:
            free_memory()
        if len(runs) > 1 and is_main:
            print(f"\nFold {number + 1} of {len(runs)}: {folders[number]}")
        goes_on = functools.partial(checkpoints.goes_on, folders[number])
        with explains_breakdown(f"for {folders[number]}", goes_on):
            while isinstance(ended := train(runs[number], is_main, stop, folders), dict):
                # The folds to come have the same GPU.
                runs[number:] = [run.retried(ended) for run in runs[number:]]
                free_memory()
        if not ended:
            why = "SIGTERM" if stop.got_sigterm else "Time is up"
            left = ", then " * (number + 1 < len(runs)) + ", ".join(folders[number + 1 :])
            how = " without --overwrite" * recipe.arguments.overwrite
            is_stopped = True
            if is_main:
                print(f"{why}. {folders[number]} goes on by the same command{how}{left}.")
            break
    else:
        if recipe.arguments.fold == "all" and is_main:
            print(write_out_of_fold(recipe.values["output_dir"], folders))
            print(calibrate_new(recipe.values["output_dir"]))
    from vqa_sft.models import processes

    processes.leave()
    if is_stopped and stop.got_sigterm:
        sys.exit(128 + signal.SIGTERM)  # as of a process that the signal ended


def train(recipe: Recipe, is_main: bool, stop: checkpoints.SaveAndStop, folders: list[str]) -> bool | dict[str, Any]:
    """One run from its data to its folder; whether it is finished, and not only stopped. Where the GPU's memory ran
    out, settings with which it goes on. `folders` are those of all runs of this launch, which an overwriting one moves
    aside."""
    # The recipe and the data are checked before torch touches a device.
    args, output_dir = recipe.arguments, recipe.values["output_dir"]
    run_folder.check(output_dir, recipe.values, args.overwrite, inputs=recipe.inputs())
    if run_folder.is_finished(output_dir) and not args.overwrite:
        print(f"{output_dir} is finished. Give --overwrite to train it again.")
        return True
    loaded = load_data(recipe, is_main)
    # One process looks at the images and splits the rows; the others are told.
    parts = split(recipe, loaded, folders) if is_main else None

    import datasets
    import torch
    from accelerate import PartialState
    from transformers import EarlyStoppingCallback

    from vqa_sft.batch.collator import AnswerCollator, Augmentation, TrainCollator
    from vqa_sft.batch.template import check_texts
    from vqa_sft.models import load as models, processes
    from vqa_sft.models.fast import speedups
    from vqa_sft.models.fast.feature_store import open_store
    from vqa_sft.models.fast.fill_store import fill_store
    from vqa_sft.models.lora import lora_config
    from vqa_sft.models.memory.fit import choose_batch
    from vqa_sft.models.memory.needs import read_needs
    from vqa_sft.models.memory.out_of_memory import explains_out_of_memory, halve_batch
    from vqa_sft.models.parts import vision_parameters
    from vqa_sft.models.scoring import find_end_of_turn, find_letter_ids
    from vqa_sft.predictions.file import ANSWERS, answers_as, write_predictions
    from vqa_sft.runs import hub
    from vqa_sft.training import averaging, curves
    from vqa_sft.training.trainer import AnswerTrainer, predict_examples

    processes.check_processes(use_cpu=bool(recipe.values.get("use_cpu")))
    precision = models.choose_precision(recipe.values)
    training_args, model_args = recipe.training_args(precision), recipe.model_args()
    if stop.must_stop():
        return False
    parts = processes.from_main(parts)
    train, validation = select(loaded, parts, TRAIN), select(loaded, parts, VALIDATION)
    if args.streaming:
        # Without an end, so that no process runs out of rows before the others; max_steps ends the training.
        train = train.shuffle(seed=training_args.seed).repeat(None)
    most = most_choices(loaded, parts)
    num_letters = args.max_choices or most
    if most > num_letters:
        raise InputError(f"max_choices is {args.max_choices}, and the data have rows of {most} choices. Raise it.")

    if args.averaging and processes.shards_weights():
        raise InputError("averaging needs whole weights on every process: launch by DDP or ZeRO-2, or remove it.")
    if args.vision_learning_rate is not None and processes.has_own_optimizer():
        raise InputError("DeepSpeed's configuration names an optimizer, which has one learning rate: remove it there.")
    known = [part for part in (train, validation) if isinstance(part, datasets.Dataset)]
    processes.check_images(known)
    rows_a_step = training_args.per_device_train_batch_size * training_args.world_size
    if training_args.dataloader_drop_last and not args.streaming and len(train) < rows_a_step:
        raise InputError(f"dataloader_drop_last drops all {len(train)} rows: a step takes {rows_a_step}. Remove it.")
    num_rows = training_args.max_steps * rows_a_step * training_args.gradient_accumulation_steps
    if num_rows <= 0:
        num_rows = len(train) * training_args.num_train_epochs

    # Model
    trust = {"trust_remote_code": training_args.trust_remote_code}
    processor = models.load_processor(
        model_args.model_name_or_path,
        min_pixels=args.min_pixels,
        max_pixels=args.max_pixels,
        revision=model_args.model_revision,
        **trust,
    )
    adapter = None
    skeleton = models.build_skeleton(model_args, device_map=processes.device_map(), **trust)
    if args.init_adapter is None:
        adapter = lora_config(model_args, skeleton, **args.adapted_parts)
    letter_ids = find_letter_ids(processor, num_letters, args.prompts)
    end_of_turn = find_end_of_turn(processor, args.prompts) if args.supervise_end_of_turn else None
    for part in [validation] * (validation is not None) + [train] * (not args.streaming):
        check_texts(processor, part, args.prompts)
    needs = functools.partial(
        read_needs,
        training_args,
        model_args,
        args,
        processor,
        None if args.streaming else train,
        precision=precision,
        compiles=speedups.pays_compilation(num_rows, args.compile_layers),
    )
    if args.auto_batch:
        chosen = choose_batch(training_args, needs)
        if is_main:
            print(chosen)
    if is_main:
        for folder in folders * args.overwrite:
            run_folder.put_aside(folder)
        keeps_parts = checkpoints.last_whole_checkpoint(output_dir) is not None and not args.overwrite
        run_folder.start(output_dir, recipe.values, args.overwrite)
        if not keeps_parts:  # of a run that is resumed, its rows as they were say more than as they are
            write_parts(output_dir, loaded, parts)
    PartialState().wait_for_everyone()
    model = models.load_model(model_args, precision, device_map=processes.device_map(), **trust)
    if args.init_adapter is not None:
        model = models.add_adapter(model, args.init_adapter, is_trainable=True)
    packer = speedups.pack_rows(model, precision) if args.fast else None
    # Now, for the tower's weights change their shapes when it is sped up.
    features = open_store(model, processor, packer, precision) if args.cache_image_features else None

    # Trainer
    average = None
    if args.averaging:
        average = averaging.AdapterAverage(args.averaging, decay=args.ema_decay, start=args.swa_start)
    callbacks = [curves.WriteCurves()] + [average] * (average is not None)
    marks = checkpoints.MarkWholeCheckpoints()
    callbacks += [stop, marks]  # the marker after what else is saved
    if args.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(args.early_stopping_patience))
    with explains(ValueError, "the recipe does not fit the model"):
        trainer = AnswerTrainer(
            model=model,
            args=training_args,
            peft_config=adapter,
            train_dataset=train,
            eval_dataset=validation,
            processing_class=processor,
            data_collator=TrainCollator(
                processor,
                args.prompts,
                num_letters,
                seed=training_args.seed,
                augmentation=Augmentation(
                    args.shuffle_choices, args.image_augmentation, args.flip_images, counts_batches=args.streaming
                ),
                supervises_end=args.supervise_end_of_turn,
                packer=packer,
                features=features,
            ),
            eval_collator=AnswerCollator(processor, args.prompts, num_letters, packer=packer, features=features),
            letter_ids=letter_ids,
            vocabulary_weight=args.vocabulary_weight,
            letter_smoothing=args.letter_smoothing,
            end_of_turn=end_of_turn,
            vision_learning_rate=args.vision_learning_rate,
            callbacks=callbacks,
            average=average,
            stop=stop,
        )
    trains_vision = any(p.requires_grad for p in vision_parameters(speedups.base_of(trainer.model)))
    processes.check_images(known, trains_vision=trains_vision)
    if args.fast:
        budget = args.activation_memory_budget
        if "activation_memory_budget" in recipe.values and not speedups.pays_compilation(num_rows, args.compile_layers):
            speedups.say("layers are not compiled for so few rows, and keep all; compile_layers: true compiles them")
        speedups.speed_up_training(trainer, num_rows, compile_layers=args.compile_layers, memory_budget=budget)
    if features is not None:
        seen = [rows for rows in (train, validation) if rows is not None]
        batch_size, num_workers = training_args.per_device_eval_batch_size, training_args.dataloader_num_workers
        fill_store(trainer.model, trainer.eval_collator, seen, precision, batch_size, num_workers)

    # Train, from the last whole checkpoint if there is one
    checkpoint = checkpoints.last_whole_checkpoint(output_dir)
    if checkpoint is not None and is_main:
        print(f"Going on from {checkpoint}.")
    if checkpoint is not None and args.early_stopping_patience is not None:
        training_args.max_steps = (
            checkpoints.stopped_early(checkpoint, args.early_stopping_patience) or training_args.max_steps
        )
    of_batch = {"states_global_batch": args.global_batch_size is not None, "auto_batch": args.auto_batch}
    smaller, ran_out = halve_batch(training_args, **of_batch), False
    with (
        explains_out_of_memory(
            training_args,
            needs,
            is_evaluating=lambda: not trainer.model.training,
            resumes=functools.partial(checkpoints.goes_on, output_dir),
            **of_batch,
        ),
        stop.listening(),
    ):
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except torch.cuda.OutOfMemoryError:
            if smaller is None or not trainer.model.training:
                raise
            ran_out = True
    if ran_out:
        trainer.model.zero_grad()
        free_memory()  # the error is gone by now, and what it held on to
        with stop.listening(), contextlib.suppress(torch.cuda.OutOfMemoryError):
            marks.save_finished_step(trainer)
        print(
            f"The GPU's memory ran out at {training_args.per_device_train_batch_size} rows at a time. Going on with "
            f"{smaller['per_device_train_batch_size']}; the rows of a step stay."
        )
        return smaller
    if stop.has_stopped:
        return False

    # Evaluate and save
    metrics = {"precision": precision} | trainer.speed.metrics()
    if validation is not None:
        predictions, validation_metrics = predict_examples(trainer, validation)
        if average is not None:
            average.best = average.best or average.weights  # no evaluation may have met it
            if not average.best and is_main:
                print("There is no average: the training ended before it began. The raw weights are kept.")
        if average is not None and average.best:
            with averaging.swapped(trainer.model, average.best):
                averaged = predict_examples(trainer, validation)
            nlls = {"raw": validation_metrics["nll_calibrated"], "average": averaged[1]["nll_calibrated"]}
            metrics |= {f"nll_calibrated_{name}": value for name, value in nlls.items()}
            if nlls["average"] < nlls["raw"]:
                averaging.put(trainer.model, average.best)
                predictions, validation_metrics = averaged
        metrics |= validation_metrics
    elif average is not None and average.weights:
        averaging.put(trainer.model, average.weights)
    metrics = {name: round(value, 6) if isinstance(value, float) else value for name, value in metrics.items()}
    trainer.save_model(output_dir)
    if trainer.is_world_process_zero():
        if validation is not None:
            predictions.metadata |= {"run": output_dir, "prompts_digest": args.prompts.digest, "split": "validation"}
            predictions.metadata |= {ANSWERS: answers_as(loaded[0].columns)}
            write_predictions(f"{output_dir}/{run_folder.VALIDATION}", predictions)
        run_folder.write_metrics(output_dir, metrics)
        run_folder.describe(
            run_folder.Run(output_dir, recipe.values, args.prompts, num_letters, loaded[0].columns, precision),
            num_rows={"train": None if args.streaming else len(train), "validation": len(validation or [])},
            num_processes=training_args.world_size,
            micro_batch=training_args.per_device_train_batch_size,
            accumulation=training_args.gradient_accumulation_steps,
        )
        hub.write_card(output_dir)
        print(f"Saved to {output_dir}: " + ", ".join(f"{name} {value}" for name, value in metrics.items()))
        if validation is not None and len(folders) == 1:  # folds are calibrated together
            print(calibrate_new(output_dir))

        if recipe.values.get("push_to_hub"):
            push(recipe)
    return True


def free_memory() -> None:
    """Before the next fold, what the last one left."""
    import torch

    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def load_data(recipe: Recipe, is_main: bool) -> list[Loaded]:
    """The training rows and, where the recipe names data for it, the validation rows; texts only."""
    args = recipe.arguments
    read = stream_examples if args.streaming else read_examples
    loaded = [read(args.train_data, args.data_options)]
    if args.validation_data is not None:
        # Few rows may not tell how their answers are written; the training rows have told.
        options = args.options_for_other_data(loaded[0].columns)
        loaded.append(read_examples(args.validation_data, options))
    for data in loaded:
        needless = [] if args.shuffle_choices else note_kept_orders(data.name, data.problems)
        for note in data.notes * is_main:
            if note not in needless:
                print(note)
        data.problems.raise_if_any(data.name, args.on_bad_row)
    return loaded


def split(recipe: Recipe, loaded: list[Loaded], folders: list[str]) -> list[list[str] | None]:
    """Which rows are trained on, validated on and left out; a run that goes on keeps its rows."""
    args, output_dir = recipe.arguments, recipe.values["output_dir"]
    names = ("check_images", "on_bad_row", "validation_fraction", "folds_file", "fold", "duplicate_distance", "limit")
    how = {name: getattr(args, name) for name in names}
    parts = choose_parts(loaded, seed=recipe.values.get("seed", 42), **how)
    if checkpoints.last_whole_checkpoint(output_dir) and not args.overwrite:
        parts = read_parts(output_dir, loaded)
    for folder in [] if args.overwrite else folders:
        if run_folder.is_finished(folder):  # a fold of the same data
            read_parts(folder, loaded)
    counts = Counter(part for data_parts in filter(None, parts) for part in data_parts)
    print("Rows: " + ", ".join(f"{count:,} {part}" for part, count in counts.items()))
    return parts


def push(recipe: Recipe) -> None:
    """Push the finished run; when that fails, say how to do it later."""
    from vqa_sft.runs.hub import push_run

    values = recipe.values
    try:
        print(push_run(values["output_dir"], private=values.get("hub_private_repo"), token=values.get("hub_token")))
    except InputError as error:  # the run is whole; that it was not pushed is no failure of it
        print(f"warning: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
