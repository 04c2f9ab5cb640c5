"""The trainer of a recipe: processor, adapter and loss before the weights are loaded, `AnswerTrainer` after it."""

import functools
from dataclasses import dataclass

from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from transformers import EarlyStoppingCallback, ProcessorMixin
from trl import SFTConfig

from vqa_sft.batch.collator import AnswerCollator, Augmentation, TrainCollator
from vqa_sft.batch.count_tokens import relative_lengths, uneven_tokens
from vqa_sft.batch.draw_candidates import show_longest
from vqa_sft.batch.image_size import describe_images
from vqa_sft.batch.prompts import Prompts, check_names, check_texts, settle_prompts
from vqa_sft.config.recipe import Recipe
from vqa_sft.console import is_main_process, note
from vqa_sft.data.options import CLASS
from vqa_sft.errors import explains
from vqa_sft.models import fp8_base, processes
from vqa_sft.models.fast import expert_lora, speedups
from vqa_sft.models.fast.feature_store import fill_store, open_store
from vqa_sft.models.fast.speedups import MIN_ROWS_TO_COMPILE
from vqa_sft.models.load import DTYPES, build_skeleton, follow_processor, load_processor
from vqa_sft.models.lora import describe_experts, lora_config
from vqa_sft.models.memory.fit import fits
from vqa_sft.models.memory.needs import NUM_MEASURED, Plan, Shape, read_needs
from vqa_sft.models.parts import vision_parameters
from vqa_sft.models.scoring import find_end_of_turn, find_letter_ids
from vqa_sft.training.averaging import AdapterAverage
from vqa_sft.training.compile_later import CompileLater
from vqa_sft.training.curves import WriteCurves
from vqa_sft.training.dealing import Order
from vqa_sft.training.folder import kept_prompts
from vqa_sft.training.loss import LossSettings
from vqa_sft.training.rows import Rows
from vqa_sft.training.saving import SaveAndStop
from vqa_sft.training.trainer import AnswerTrainer


@dataclass(frozen=True)
class ModelSetup:
    """What a run knows of its model before the weights are loaded."""

    processor: ProcessorMixin
    prompts: Prompts  # as the chat template takes them
    adapter: LoraConfig | None  # None: all weights are trained, or those of `init_adapter`
    loss: LossSettings
    precision: str
    needs: functools.partial[tuple[Shape, Plan]]  # estimates what the run needs of a GPU's memory


def prepare_model(recipe: Recipe, rows: Rows, training_args: SFTConfig, precision: str) -> ModelSetup:
    """Processor, adapter and letters. Raises InputError for a model, an adapter or prompts that cannot be used, without
    loading a weight."""
    args, model_args = recipe.arguments, recipe.model_args()
    trust = {"trust_remote_code": training_args.trust_remote_code}
    processor = load_processor(
        model_args.model_name_or_path,
        min_pixels=args.min_pixels,
        max_pixels=args.max_pixels,
        revision=model_args.model_revision,
        **trust,
    )
    note(describe_images(processor, args.max_pixels))
    prompts = kept_prompts(recipe)
    if prompts is None:
        prompts, lines = settle_prompts(processor, args.prompts)
        for line in lines:
            note(line)
    skeleton, adapter = build_skeleton(model_args, device_map=processes.device_map(), **trust), None
    if args.base_precision == "fp8":
        fp8_base.check(model_args.model_name_or_path, skeleton.config)
    if args.init_adapter is None:
        adapter = lora_config(model_args, skeleton, **args.adapted_parts)
        device, fast = PartialState().device, args.fast and not processes.shards_weights()
        is_spared = training_args.gradient_checkpointing or adapter is None
        if not is_spared and fast and device.type == "cuda":
            is_spared = expert_lora.serves(skeleton, adapter, device, DTYPES[precision])
        if line := describe_experts(skeleton, adapter, is_kept=not is_spared):
            note(line)
    loss = LossSettings(
        letter_ids=find_letter_ids(processor, rows.num_letters, prompts),
        vocabulary_weight=args.vocabulary_weight,
        letter_smoothing=args.letter_smoothing,
        end_of_turn=find_end_of_turn(processor, prompts) if args.supervise_end_of_turn else None,
    )
    for part in rows.counted:
        check_texts(processor, part, prompts)
    shown = None if args.streaming else rows.train
    if rows.class_names is not None:  # of which other ones are drawn in every epoch
        check_names(processor, rows.class_names)
        longest = [show_longest(row, rows.class_names) for row in rows.train.take(NUM_MEASURED)]
        shown = Dataset.from_list(longest, features=rows.train.features)
    needs = functools.partial(
        read_needs,
        training_args,
        model_args,
        args,
        processor,
        shown,
        prompts,
        precision=precision,
        compiles=speedups.pays_compilation(skeleton.config, rows.num_seen(training_args), args.compile_layers),
    )
    return ModelSetup(processor, prompts, adapter, loss, precision, needs)


def build_trainer(
    recipe: Recipe, rows: Rows, training_args: SFTConfig, setup: ModelSetup, model: nn.Module, stop: SaveAndStop
) -> AnswerTrainer:
    args, processor = recipe.arguments, setup.processor
    follow_processor(model, processor)
    packer = speedups.pack_rows(model, setup.precision) if args.fast else None
    # Opened now, because the shapes of the tower's weights change when it is sped up.
    features = open_store(model, processor, packer, setup.precision) if args.cache_image_features else None
    train_collator = TrainCollator(
        processor,
        setup.prompts,
        rows.num_letters,
        seed=training_args.seed,
        augmentation=Augmentation(
            args.shuffle_choices, args.image_augmentation, args.flip_images, counts_batches=args.streaming
        ),
        supervises_end=args.supervise_end_of_turn,
        packer=packer,
        features=features,
        classes=rows.class_names,
    )
    average, callbacks = None, [WriteCurves()]
    if args.averaging:
        average = AdapterAverage(args.averaging, decay=args.ema_decay, start=args.swa_start)
    if args.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(args.early_stopping_patience))
    with explains(ValueError, "the recipe does not fit the model"):
        trainer = AnswerTrainer(
            model=model,
            args=training_args,
            peft_config=setup.adapter,
            train_dataset=rows.train,
            eval_dataset=rows.validation,
            processing_class=processor,
            data_collator=train_collator,
            eval_collator=AnswerCollator(processor, setup.prompts, rows.num_letters, packer=packer, features=features),
            loss=setup.loss,
            vision_learning_rate=args.vision_learning_rate,
            average=average,
            stop=stop,
            callbacks=callbacks,
            order=_order_of(recipe, rows, setup, packs=packer is not None and packer.packs_rows),
        )
    if args.base_precision == "fp8":
        fp8_base.round_base(speedups.base_of(trainer.model))
    vision = vision_parameters(speedups.base_of(trainer.model))
    processes.check_images(rows.counted, trains_vision=any(weight.requires_grad for weight in vision))
    if args.fast:
        _speed_up(trainer, recipe, rows.num_seen(training_args), setup)
    if features is not None:
        batch_size, num_workers = training_args.per_device_eval_batch_size, training_args.dataloader_num_workers
        fill_store(trainer.model, trainer.eval_collator, rows.counted, setup.precision, batch_size, num_workers)
    return trainer


def _order_of(recipe: Recipe, rows: Rows, setup: ModelSetup, *, packs: bool) -> Order:
    args = recipe.arguments
    balanced = rows.train[CLASS][:] if args.class_balance == "sample" else None
    if args.streaming or not args.fast:
        return Order(balanced=balanced)
    if not packs:
        return Order(balanced=balanced, lengths=relative_lengths(rows.train))
    tokens = None
    if PartialState().num_processes > 1:  # the main process reads the headers of the images for all
        options = setup.prompts.template_options
        tokens = uneven_tokens(setup.processor, rows.train, options) if is_main_process() else None
        tokens = processes.from_main(tokens)
    return Order(balanced=balanced, tokens=tokens)


def _speed_up(trainer: AnswerTrainer, recipe: Recipe, num_rows: int, setup: ModelSetup) -> None:
    asked, budget = recipe.arguments.compile_layers, recipe.arguments.activation_memory_budget
    is_open = asked is None and speedups.may_compile_later(trainer)
    fits_uncompiled, fits_compiled = fits(setup.needs) if is_open else (True, True)
    # A run that fits with compiled layers alone has no uncompiled steps; one that may not fit at all has those that
    # need less, if it is long.
    compiles = bool(asked) or (not fits_uncompiled and (fits_compiled or num_rows >= MIN_ROWS_TO_COMPILE))
    later = is_open and fits_uncompiled and fits_compiled
    if "activation_memory_budget" in recipe.values and not compiles:
        when = " at first" if later else ""
        speedups.say(f"layers are not compiled{when}, and keep all; compile_layers: true compiles them")
    if is_open and fits_uncompiled and not fits_compiled:
        speedups.say("layers are not compiled: by estimate they would not fit the GPU's memory")
    is_compiled = speedups.speed_up_training(trainer, compile_layers=compiles, memory_budget=budget)
    start_graphs = speedups.prepare_graphs(trainer)
    if is_compiled or later:  # later, all processes of a launch decide together
        trainer.add_callback(
            CompileLater(trainer.model, budget, trainer.speed, is_compiled=is_compiled, start_graphs=start_graphs)
        )
    else:
        start_graphs()
