import pytest
import yaml

from vqa_sft.batch.prompts import Prompts
from vqa_sft.config.fields import describe_fields
from vqa_sft.config.recipe import read_recipe
from vqa_sft.config.training import RecipeArguments
from vqa_sft.data.folds import write_folds
from vqa_sft.errors import InputError

NEEDED = {"model_name_or_path": "model", "train_data": "train.csv", "output_dir": "runs/x"}


def recipe_file(folder, text):
    path = folder / "recipe.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in NEEDED.items()) + text)
    return str(path)


def read(folder, text="", *arguments):
    return read_recipe(["--config", recipe_file(folder, text), *arguments])


def test_one_mapping_holds_our_fields_and_the_libraries(tmp_path):
    recipe = read(tmp_path, "lora_r: 8\nlearning_rate: 2e-4\nshuffle_choices: false\neval_strategy: no\n")
    assert recipe.arguments.shuffle_choices is False
    assert recipe.model_args().lora_r == 8 and recipe.model_args().lora_dropout == 0.0
    args = recipe.training_args("fp32")
    assert args.learning_rate == 2e-4 and args.remove_unused_columns is False and not args.bf16 and not args.fp16


def test_the_command_line_has_the_last_word_in_either_spelling(tmp_path):
    recipe = read(tmp_path, "lora_r: 8\n", "--lora_r", "4", "--learning-rate=1e-3", "--use_cpu", "--seed", "7")
    assert recipe.values["lora_r"] == 4 and recipe.values["learning_rate"] == 1e-3
    assert recipe.values["use_cpu"] is True and recipe.values["seed"] == 7


def test_lists_and_mappings_can_be_given_on_the_command_line(tmp_path):
    recipe = read(tmp_path, "", "--lora_target_modules", "q_proj", "v_proj", "--train_data", "1.csv", "2.csv")
    assert recipe.model_args().lora_target_modules == ["q_proj", "v_proj"]
    assert recipe.arguments.train_data == ["1.csv", "2.csv"]
    recipe = read(tmp_path, "", "--columns", "{choices: [o1, o2], id: null}")
    assert recipe.arguments.data_options.columns == {"choices": ["o1", "o2"], "id": None}


def test_a_prompt_on_the_command_line_need_not_be_yaml(tmp_path):
    recipe = read(tmp_path, "", "--user_prompt", "{question} {choices}", "--run_name", "[a")
    assert recipe.arguments.prompts.user == "{question} {choices}" and recipe.values["run_name"] == "[a"


def test_a_number_may_be_the_text_of_a_text_field(tmp_path):
    assert read(tmp_path, "", "--run_name", "5").values["run_name"] == "5"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("learnin_rate: 1\n", "unknown key `learnin_rate`. Did you mean `learning_rate`"),
        ("max_pixels: [1, 2]\n", "`max_pixels` must be a whole number; got [1, 2]"),
        ("per_device_train_batch_size: 2.5\n", "must be a whole number; got 2.5"),
        ("num_train_epochs: many\n", "must be a number; got 'many'"),
        ("shuffle_choices: 1\n", "must be true or false; got 1"),
        ("dtype: bf16\n", "must be one of auto, bfloat16, float16, float32; got 'bf16'"),
        ("lr_scheduler_type: sine\n", "must be one of linear, cosine"),
        ("loss: words\n", "must be 'letters' or 'vocabulary'; got 'words'"),
        ("lora_r: 8\nlora_r: 16\n", "'lora_r' is given more than once"),
        ("lora_r: [\n", "is not valid YAML"),
        (
            "label_smoothing_factor: 0.1\n",
            "vision models; use `letter_smoothing`",
        ),
        ("max_length: 512\n", "a prompt is never cut"),
        ("bf16: true\nfp16: true\n", "bf16 and fp16 are both set"),
        ("load_in_4bit: true\nuse_peft: false\n", "only be trained through an adapter"),
        ("early_stopping_patience: 2\n", "early_stopping_patience needs validation rows"),
        ("eval_strategy: epoch\n", "eval_strategy needs validation rows"),
        ("validation_fraction: 0.9\n", "between 0 and 0.5"),
        ("validation_fraction: 0.1\nvalidation_data: v.csv\n", "only one of validation_data, validation_fraction"),
        ("folds_file: folds.csv\n", "folds_file and fold go together"),
        ("folds_file: folds.csv\nfold: 0\nvalidation_fraction: 0.1\n", "only one of"),
        (
            "columns: {photo: x}\n",
            "columns knows id, image, question, choices, answer, context, targets; got photo",
        ),
        ("columns: path\n", "must be a mapping; got 'path'"),
        ("answer_format: number\n", "must be 'letter' or 'index_from_0' or 'index_from_1' or 'text'; got 'number'"),
        ("type_prompts: {shape: '{question} {choices}'}\n", "shape"),
        ("type_prompts: {colour: '{question}'}\n", "{choices}"),
        ("streaming: true\n", "streaming needs max_steps"),
        ("streaming: true\nmax_steps: 9\nvalidation_fraction: 0.1\n", "streaming cannot hold rows out"),
        ("on_bad_row: skip\ncheck_images: false\n", "on_bad_row: skip needs check_images"),
        ("loss: vocabulary\nvocabulary_weight: 0.5\n", "Keep one of the two"),
        ("letter_smoothing: 0.9\n", "letter_smoothing must be between 0 and 0.5"),
        ("image_augmentation: 0.6\n", "image_augmentation must be between 0 and 0.5"),
        (
            "image_augmentation: 0.1\ncache_image_features: true\n",
            "one set of features for an image; remove image_aug",
        ),
        ("flip_images: true\ncache_image_features: true\n", "one set of features for an image; remove image_augment"),
        ("adapt_tower: true\ncache_image_features: true\n", "tower and merger compute of an image; remove adapt_tower"),
        ("adapt_merger: true\ncache_image_features: true\n", "of an image; remove adapt_merger"),
        ("adapt_tower: true\nadapt_merger: true\nuse_peft: false\n", "adapt_tower and adapt_merger: full fine-tuning"),
        ("adapt_tower: true\nlora_target_modules: [qkv]\n", "adapt_tower: lora_target_modules names all layers"),
        ("adapt_tower: true\ninit_adapter: x\n", "adapt_tower cannot be set beside init_adapter"),
        ("vision_learning_rate: 1e-5\n", "nothing outside the language model is trained; set adapt_tower"),
        ("averaging: ema\nmetric_for_best_model: accuracy\n", "averaging chooses between raw and averaged"),
        ("fast: false\ncompile_layers: true\n", "compile_layers needs fast"),
        ("compile_layers: false\nactivation_memory_budget: 0.4\n", "are none with compile_layers: false. Remove"),
        ("fast: false\nactivation_memory_budget: 0.4\n", "there are none with fast: false. Remove one of the two"),
        ("load_in_4bit: true\nactivation_memory_budget: 0.4\n", "there are none with a quantised base"),
        ("base_precision: fp16\n", "`base_precision` must be 'fp8'; got 'fp16'"),
        ("base_precision: fp8\nuse_peft: false\n", "is of a base that is frozen; remove it, or use_peft: false"),
        ("base_precision: fp8\nload_in_8bit: true\n", "round the same weights. Keep one of the two"),
        ("base_precision: fp8\nuse_dora: true\n", "use_dora needs the base's whole weights"),
        ("base_precision: fp8\nbf16: false\n", "computes all else in bf16; remove fp16 and bf16: false"),
        ("activation_memory_budget: 1.5\n", "activation_memory_budget must be between 0 and 1"),
        ("accelerator_config: none.json\n", "accelerator_config: none.json cannot be read"),
        ("accelerator_config: {dispatch_batches: true}\n", "dispatch_batches cuts batches by rows"),
        ("on_bad_row: guess\n", "must be 'error' or 'skip'; got 'guess'"),
        ("global_batch_size: 12\n", "no multiple of per_device_train_batch_size 8 x 1 processes"),
        ("global_batch_size: 8\ngradient_accumulation_steps: 2\n", "both set"),
        ("save_total_limit: 1\n", "save_total_limit must be at least 2"),
        ("min_pixels: 9\nmax_pixels: 4\n", "larger than max_pixels"),
        ("user_prompt: hello\n", "`user` must contain"),
        ("per_device_train_batch_size: 0\nglobal_batch_size: 4\n", "must be at least 1; got 0"),
        ("learning_rate: .inf\n", "must be between 0 and 1000.0; got inf"),
        ("learning_rate: -1\n", "must be between 0 and"),
        ("lora_r: 0\n", "lora_r must be at least 1"),
        ("num_train_epochs: 0\n", "the run has no steps"),
        ("validation_fraction: 0.1\nmetric_for_best_model: f1\n", "one of nll_calibrated, nll, accuracy, ece, loss"),
        ("validation_data: train.csv\nvalidation_split: train\n", "validation_data is train_data"),
        ("logging_steps: .inf\n", "logging_steps must be between"),
        ("report_to: no_tracker\n", "no_tracker is not installed"),
        ("resume_from_checkpoint: x\n", "by itself"),
        ("user_prompt: '{choices} {choices} {question}'\n", "must contain {choices} once"),
    ],
)
def test_mistakes_are_named_before_anything_is_loaded(tmp_path, text, part):
    with pytest.raises(InputError) as error:
        read(tmp_path, text)
    assert part in str(error.value)


def test_a_recipe_that_is_missing_or_says_too_little_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no such yaml"):
        read_recipe(["--config", str(tmp_path / "none.yaml")])
    with pytest.raises(InputError, match="`train_data` is not set"):
        read_recipe(["--model_name_or_path", "x", "--output_dir", "y"])
    with pytest.raises(InputError, match="expected --key value; got 'recipe.yaml'"):
        read_recipe(["recipe.yaml"])


def test_accumulation_follows_from_the_global_batch(tmp_path, monkeypatch):
    text = "global_batch_size: 32\nper_device_train_batch_size: 4\n"
    assert read(tmp_path, text).training_args("fp32").gradient_accumulation_steps == 8
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InputError, match="4 x 3 processes = 12"):
        read(tmp_path, text)
    monkeypatch.setenv("WORLD_SIZE", "16")  # each has two rows of the step
    args = read(tmp_path, text).training_args("fp32")
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (2, 1)


@pytest.mark.parametrize(
    ("text", "searches"),
    [("", False), ("use_peft: false\n", True), ("lora_target_modules: [fc1]\n", True), ("adapt_merger: true\n", True)],
)
def test_weights_that_a_row_may_not_reach_are_searched_for(tmp_path, text, searches):
    assert read(tmp_path, text).training_args("fp32").ddp_find_unused_parameters in (
        (None, True) if searches else (False,)
    )


def test_a_stream_keeps_what_accelerate_is_told_in_a_file(tmp_path):
    (tmp_path / "accelerate.json").write_text('{"even_batches": false, "split_batches": true}')
    stream = f"streaming: true\nmax_steps: 9\naccelerator_config: {tmp_path / 'accelerate.json'}\n"
    config = read(tmp_path, stream).training_args("fp32").accelerator_config
    assert (config.even_batches, config.split_batches, config.dispatch_batches) == (False, False, False)


def test_validation_rows_switch_on_evaluation_and_the_best_checkpoint(tmp_path):
    args = read(tmp_path, "validation_fraction: 0.1\n").training_args("fp32")
    assert args.eval_strategy == "epoch" and args.load_best_model_at_end
    assert args.metric_for_best_model == "nll_calibrated" and args.greater_is_better is False
    assert read(tmp_path).training_args("fp32").eval_strategy == "no"


def test_accuracy_chooses_the_largest_and_nll_the_smallest(tmp_path):
    for metric in ("accuracy", "eval_accuracy", "nll", "nll_calibrated", "ece"):
        greater = metric.endswith("accuracy")
        text = f"validation_fraction: 0.1\nmetric_for_best_model: {metric}\n"
        assert read(tmp_path, text).training_args("fp32").greater_is_better is greater


def test_null_means_the_default(tmp_path):
    assert read(tmp_path, "report_to: null\nmetric_for_best_model: null\n").values["report_to"] is None


def test_one_file_cannot_be_training_and_validation_data(tmp_path):
    (tmp_path / "train.csv").write_text("id\n")
    names = ["--train_data", str(tmp_path / "train.csv"), "--validation_data", f"{tmp_path}/./train.csv"]
    with pytest.raises(InputError, match="validation_data is train_data"):
        read(tmp_path, "", *names)


def test_prompts_follow_language_and_type_and_can_be_overridden(tmp_path):
    prompts = read(tmp_path, "prompt_language: ko\ntype_prompts: builtin\nsystem_prompt: S\n").arguments.prompts
    assert prompts.system == "S" and "세어" in prompts.types["counting"]
    own = read(tmp_path, "type_prompts: {ocr: 'Read. {question} {choices}'}\n").arguments.prompts
    assert own.types == {"ocr": "Read. {question} {choices}"} and own.user == Prompts().user
    assert read(tmp_path, "").arguments.prompts == Prompts()


@pytest.mark.parametrize("given", ["system_prompt: ''\n", 'system_prompt: ""\n', "", "system_prompt: S\n"])
def test_an_empty_system_prompt_is_one_in_the_yaml_and_on_the_command_line(tmp_path, given):
    if given.startswith("system_prompt: S") or not given:
        assert read(tmp_path, given, "--system_prompt", "").arguments.prompts.system == ""
        assert read(tmp_path, given, "--system_prompt=").arguments.prompts.system == ""
    else:
        assert read(tmp_path, given).arguments.prompts.system == ""
    assert read(tmp_path, "system_prompt: null\n").arguments.prompts == Prompts()


def test_options_of_the_chat_template_are_a_mapping_of_any_values(tmp_path):
    given = "template_options: {enable_thinking: off, effort: low, depth: 2, x: null}\n"
    expected = {"enable_thinking": False, "effort": "low", "depth": 2, "x": None}
    assert read(tmp_path, given).arguments.prompts.template_options == expected
    read_again = read(tmp_path, given, "--template_options", "{effort: high}").arguments.prompts
    assert read_again.template_options == {"effort": "high"} and read(tmp_path).arguments.prompts == Prompts()
    with pytest.raises(InputError, match="template_options must be plain values"):
        read(tmp_path, "template_options: {since: 2026-11-29}\n")


def test_help_shows_every_field_of_ours():
    text = describe_fields(RecipeArguments)
    assert "--train_data" in text and "--max_pixels" in text and "(required)" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("candidates: c.parquet\nnum_candidates: 5\n", "candidates, num_candidates: of a classification"),
        ("absent: drop\n", "absent: of a classification"),
        ("class_balance: weight\n", "class_balance: of a classification"),
        ("task: classification\nnum_candidates: 27\n", "num_candidates must be between 2 and 26"),
        ("task: classification\nnum_candidates: 6\ncandidate_pool: 5\n", "candidate_pool 5 is smaller"),
        ("task: classification\nvalidation_candidates: v.parquet\n", "validation_data, which is not set"),
        ("task: classification\nabsent: ignore\n", "`absent` must be"),
        ("task: classification\ncandidates: c.parquet\nshuffle_choices: false\n", "would learn that letter"),
    ],
)
def test_fields_of_a_classification_are_checked(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        read(tmp_path, text)


def test_rows_are_read_with_the_candidates_of_the_recipe_where_it_is_a_classification(tmp_path):
    text = (
        "task: classification\ncandidates: c.parquet\nnum_candidates: 5\nabsent: none_of_these\nprompt_language: ko\n"
    )
    own = read(tmp_path, text).arguments
    assert own.data_options.candidates is None  # as `vqa-sft check` and `vqa-sft candidates` read them
    options = own.with_candidates(own.data_options)
    assert (options.candidates, options.num_candidates) == ("c.parquet", 5)
    assert options.none_of_these == "해당하는 것 없음"
    usual = read(tmp_path, "").arguments
    assert usual.with_candidates(usual.data_options) == usual.data_options


def test_the_recipe_of_a_fold_that_was_trained_with_others_at_once_trains_it_alone(tmp_path):
    write_folds(tmp_path / "folds.csv", [*"abc"], [0, 1, -1])
    folds = f"folds_file: {tmp_path / 'folds.csv'}\nfold: all\n"
    one, at_once = read(tmp_path, folds).runs(), read(tmp_path, folds + "folds_at_once: 2\n").runs()
    assert [run.values for run in at_once] == [run.values for run in one]
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(at_once[1].values))
    alone = read_recipe(["--config", str(tmp_path / "own.yaml")])
    assert alone.values == at_once[1].values and alone.arguments == at_once[1].arguments
