import csv
import warnings
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer
from transformers.models.qwen3_5 import modeling_qwen3_5

from vqa_sft.batch.prompts import Prompts, render_messages
from vqa_sft.questions.letters import LETTERS, identity_order
from vqa_sft.tiny import TINY_PATH
from vqa_sft.tiny.build import build_tokenizer
from vqa_sft.tiny.digits import write_digits
from vqa_sft.tiny.draw import KINDS, draw_example, draw_examples
from vqa_sft.tiny.evaluate import accuracy_by_kind, load_base, predict_answers
from vqa_sft.tiny.families import FAMILIES, build_model
from vqa_sft.tiny.forward import answer_logits, to_gemma_patches, to_patches
from vqa_sft.tiny.glyphs import PEN
from vqa_sft.tiny.numbers import write_numbers
from vqa_sft.tiny.step import answer_gradients, by_graph, use_short_chunks
from vqa_sft.tiny.tasks import TASKS, render_task
from vqa_sft.tiny.train import (
    TEST_SEED,
    Settings,
    draw_pictures,
    gather,
    parameter_groups,
    schedule_positions,
    tokenize_tasks,
    tokenizer_texts,
    train,
)


@pytest.fixture(scope="module")
def base():
    return load_base(TINY_PATH)


@pytest.fixture(scope="module", autouse=True)
def texts():
    """The tokenizer's, drawn once for the trainings of all families: that takes four seconds."""
    texts = tokenizer_texts()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vqa_sft.tiny.train.tokenizer_texts", lambda: texts)
        yield texts


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder)
    return folder


def read_csv(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- the base


def test_the_base_is_small_and_loads_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, model = load_base(TINY_PATH)
    assert 2e6 <= model.num_parameters() <= 5e6
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert sum(path.stat().st_size for path in TINY_PATH.iterdir()) <= 12e6


def test_the_base_answers_held_out_drawn_images(base):
    # 60 of each kind: a kind that scores 0.96 or better falls below 0.90 once in a hundred draws, and these are fixed.
    examples = [example for kind in KINDS for example in draw_examples(60, TEST_SEED, kind)]
    scores = accuracy_by_kind(examples, predict_answers(*base, examples))
    assert scores["all"][0] >= 0.95, scores
    assert all(accuracy >= 0.90 for accuracy, _ in scores.values()), scores


def test_the_base_says_the_letter_and_stops_when_it_generates(base):
    processor, model = base
    example = draw_example(TEST_SEED, 0, "digit")
    row = {"question": example["question"], "choices": example["choices"], "images": [example["image"]]}
    messages = render_messages(row, range(len(row["choices"])), Prompts())
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=[prompt], images=[[example["image"]]], return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(output) == LETTERS[example["answer"]] + "<|im_end|>"


@pytest.mark.parametrize("size", [(28, 28), (50, 50), (84, 84), (97, 97), (100, 100), (1000, 1000)])
def test_a_square_image_of_any_size_becomes_nine_tokens(base, size):
    grid = base[0].image_processor(Image.new("RGB", size), return_tensors="pt")["image_grid_thw"]
    assert grid.tolist() == [[1, 6, 6]]


# ---- tokenizer and template


def test_the_template_renders_the_bytes_of_qwen2_5_vl(base):
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?\nA. 1"}]}
    rendered = base[0].apply_chat_template([user], add_generation_prompt=True)
    assert rendered == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Which?\nA. 1<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    system, assistant = {"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "A"}
    assert base[0].apply_chat_template([system, user, assistant]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Which?\nA. 1<|im_end|>\n"
        "<|im_start|>assistant\nA<|im_end|>\n"
    )


def test_every_letter_is_one_token_where_the_answer_stands(base):
    tokenizer = base[0].tokenizer
    prompt = tokenizer("<|im_start|>assistant\n")["input_ids"]
    for letter in LETTERS:
        assert tokenizer(f"<|im_start|>assistant\n{letter}<|im_end|>")["input_ids"] == [
            *prompt, tokenizer.convert_tokens_to_ids(letter), tokenizer.eos_token_id,
        ]  # fmt: skip
        assert len(tokenizer(f" {letter}")["input_ids"]) == 1
        assert tokenizer.convert_ids_to_tokens(tokenizer(f"\n{letter}. x")["input_ids"])[1] == letter


def test_any_text_survives_the_tokenizer(base):
    text = "사진 속 동물은 몇 마리인가요? 뷁 ½ 🦊 naïve\tA) x"
    assert base[0].tokenizer.decode(base[0].tokenizer(text)["input_ids"]) == text


def test_the_code_builds_the_tokenizer_of_the_base(base, texts):
    assert build_tokenizer(texts).get_vocab() == base[0].tokenizer.get_vocab()


# ---- drawing


@pytest.mark.parametrize("kind", KINDS)
def test_drawing_depends_on_nothing_but_seed_and_index(kind):
    one, same, other = (draw_example(seed, 3, kind) for seed in (5, 5, 6))
    assert one["image"].tobytes() == same["image"].tobytes() != other["image"].tobytes()
    assert {**one, "image": None} == {**same, "image": None}


def test_a_drawn_question_has_two_to_six_different_choices_one_of_them_right():
    examples = draw_examples(300, seed=8)
    for example in examples:
        assert 2 <= len(set(example["choices"])) == len(example["choices"]) <= 6
        assert example["choices"][example["answer"]] == example["answer_text"]
    assert {example["question_type"] for example in examples} == set(KINDS)
    assert len({len(example["choices"]) for example in examples}) == 5


def test_held_out_wordings_are_not_among_those_of_training():
    seen = {example["question"] for example in draw_examples(2000, seed=8)}
    assert not seen & {example["question"] for example in draw_examples(200, seed=8, held_out="wordings")}


def test_pen_strokes_exist_for_every_digit_and_letter():
    assert "".join(PEN) == "0123456789" + LETTERS


# ---- training


@pytest.mark.parametrize("family", FAMILIES)
def test_the_training_forward_equals_the_library(base, family):
    processor, model = base
    if family != "qwen2_5_vl":
        processor = FAMILIES[family].build_processor(AutoTokenizer.from_pretrained(TINY_PATH))
        model = build_model(family, processor.tokenizer).eval()
    for i, task in enumerate(TASKS):
        example = draw_example(9, i)
        messages, answer = render_task(task, example, np.random.default_rng(i))
        row = tokenize_tasks(processor, FAMILIES[family].picture, [(messages, answer)])[0]
        ids, image_start, answer_start, _ = row
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor(text=[prompt], images=[[example["image"]]], return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == ids[:answer_start]

        pixels = torch.from_numpy(np.array(example["image"]))[None]
        patches = to_gemma_patches(pixels) if family == "gemma4" else to_patches(pixels)
        shown = inputs["pixel_values"].view(-1, patches.shape[-1])[: patches.shape[1]]
        # Gemma's processor enlarges bytes, first rows and then columns: single pixels are off by some shades.
        torch.testing.assert_close(patches[0], shown, atol=0.06 if family == "gemma4" else 1e-5, rtol=0)
        shown.copy_(patches[0])
        padded = torch.tensor([ids + [processor.tokenizer.pad_token_id] * 7])
        with torch.no_grad():
            ours = answer_logits(model, pixels, padded, torch.tensor([image_start]), torch.tensor([answer_start]), 1)
            theirs = model(**inputs, logits_to_keep=1).logits
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)


def test_the_real_task_is_the_default_prompt_of_the_project():
    example = draw_example(9, 0, "shape")
    example |= {"choices": ["star"], "answer": 0}  # one choice: every order is the identity
    row = {"question": example["question"], "choices": ["star"], "images": [example["image"]]}
    expected = render_messages(row, identity_order(1), Prompts())
    assert render_task("letter", example, np.random.default_rng(0)) == (expected, "A")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_few_steps_from_nothing_write_a_folder_that_loads(tmp_path, family, whole_chunks):
    train(tmp_path, Settings(family, steps=2, pictures=8, batch_size=4, workers=0))
    processor, model = load_base(tmp_path)
    answers = predict_answers(processor, model, draw_examples(2, TEST_SEED))
    assert len(answers) == 2


class NothingFromTheCpu(TorchDispatchMode):
    """Refuses what a CUDA graph cannot hold: values that Python reads, tensors that it makes of its own."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not any(name in str(function) for name in ("local_scalar", "lift_fresh", "nonzero")), function
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_by_graph_is_the_step_without_and_reads_nothing(tmp_path, monkeypatch, texts, family):
    # That of torch looks at its values, on a CPU alone.
    monkeypatch.setattr(F, "one_hot", lambda places, size: (places[..., None] == torch.arange(size)).long())
    settings = Settings(family, pictures=12, batch_size=4, workers=0)
    processor = FAMILIES[family].build_processor(build_tokenizer(texts))
    processor.save_pretrained(tmp_path)
    pictures, _ = draw_pictures(tmp_path, settings)
    rows = torch.arange(12).split(4)
    first, second, third = (gather(pictures, of_batch, of_batch % len(TASKS)) for of_batch in rows)
    model = build_model(family, processor.tokenizer)
    gradients = partial(answer_gradients, model)
    expected = [gradients(third), [weight.grad for weight in model.parameters()]]

    def capture(run):
        run()
        return [run]

    replayed = by_graph(gradients, first, capture)
    replayed(second)
    with NothingFromTheCpu():
        found = [replayed(third), [weight.grad for weight in model.parameters()]]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.fixture
def whole_chunks(monkeypatch):
    """Linear attention with the library's chunks, and again after the test."""
    name = "torch_chunk_gated_delta_rule"
    monkeypatch.setattr(modeling_qwen3_5, name, getattr(modeling_qwen3_5, name))


def test_short_chunks_of_linear_attention_change_nothing(whole_chunks):
    processor = FAMILIES["qwen3_5"].build_processor(AutoTokenizer.from_pretrained(TINY_PATH))
    model = build_model("qwen3_5", processor.tokenizer)
    batch = torch.zeros(1, 84, 84, 3, dtype=torch.uint8), torch.arange(104)[None], torch.tensor([9]), torch.tensor([90])
    with torch.no_grad():
        expected = answer_logits(model, *batch, num_answer_tokens=3)
        use_short_chunks()
        assert modeling_qwen3_5.torch_chunk_gated_delta_rule.keywords == {"chunk_size": 16}
        torch.testing.assert_close(answer_logits(model, *batch, num_answer_tokens=3), expected, atol=1e-5, rtol=1e-5)


def test_a_step_that_cannot_be_captured_is_made_without_a_graph(capsys):
    def capture(run):
        raise RuntimeError("no room")

    assert by_graph(len, [torch.ones(1)], capture) is len and "no room" in capsys.readouterr().out


def test_a_schedule_in_seconds_begins_after_the_first_steps_and_ends_in_time(monkeypatch):
    clock = iter([0.0, 70.0, 70.0, 72.0, 79.9, 80.0])  # captured in 70 s
    monkeypatch.setattr("vqa_sft.tiny.train.time.perf_counter", lambda: next(clock))
    assert list(schedule_positions(1000, seconds=10)) == [0, 0, 0, 0, 0, 200, 990]
    assert list(schedule_positions(4, seconds=None)) == [0, 1, 2, 3]


@pytest.mark.parametrize(("family", "rate", "patch_rate"), [("qwen2_5_vl", 1e-3, 1e-3), ("gemma4", 4e-4, 8e-5)])
def test_a_family_has_a_learning_rate_and_one_for_its_patches(base, family, rate, patch_rate):
    processor = FAMILIES[family].build_processor(AutoTokenizer.from_pretrained(TINY_PATH))
    model = build_model(family, processor.tokenizer)
    others, patches = parameter_groups(model, Settings(family))
    assert (others["lr"], patches["lr"]) == pytest.approx((rate, patch_rate))
    assert len(others["params"]) + len(patches["params"]) == len(list(model.parameters())) and patches["params"]


def test_only_the_kinds_that_were_asked_for_are_drawn():
    settings = Settings(pictures=60, kinds=("shape", "place"), workers=0)
    pictures, _ = draw_pictures(TINY_PATH, settings)
    assert {list(KINDS)[kind] for kind in pictures.kinds} == {"shape", "place"}


@pytest.mark.medium
def test_workers_draw_what_this_process_draws():
    drawn = [draw_pictures(TINY_PATH, Settings(pictures=10, workers=workers)) for workers in (0, 2)]
    for alone, by_workers in zip(*drawn, strict=True):
        assert all(torch.equal(value, vars(by_workers)[name]) for name, value in vars(alone).items())


# ---- the data of the demo, and of the ablations


def test_the_numbers_are_a_contest_whose_files_share_no_digit(tmp_path):
    write_numbers(tmp_path)
    files = {name: read_csv(tmp_path / f"{name}.csv") for name in ("train", "validation", "test", "test_answers")}
    assert {name: len(rows) for name, rows in files.items()} == {
        "train": 1200, "validation": 300, "test": 500, "test_answers": 500,
    }  # fmt: skip
    columns = ["id", "path", "question", "a", "b", "c", "d"]
    assert [*files["train"][0]] == [*files["validation"][0]] == [*columns, "answer"]
    assert [*files["test"][0]] == columns and [*files["test_answers"][0]] == ["id", "answer"]
    assert [row["id"] for row in files["test"]] == [row["id"] for row in files["test_answers"]]
    digits = {}
    for name in ("train", "validation", "test"):
        pages = [np.asarray(Image.open(tmp_path / row["path"])) for row in files[name]]
        digits[name] = {half.tobytes() for page in pages for half in (page[:, :48], page[:, 48:])}
    assert all(len(found) >= 250 for found in digits.values())
    assert not digits["train"] & digits["validation"] and not digits["test"] & (digits["train"] | digits["validation"])


def test_the_digits_are_a_contest_with_every_letter_right_equally_often(digits):
    rows, test_rows, answers = (read_csv(digits / name) for name in ("train.csv", "test.csv", "test_answers.csv"))
    assert list(rows[0]) == ["id", "path", "question", "a", "b", "c", "d", "answer"]
    assert list(test_rows[0]) == ["id", "path", "question", "a", "b", "c", "d"]
    assert list(answers[0]) == ["id", "answer"]
    assert (len(rows), len(test_rows)) == (1300, 497)
    assert [row["id"] for row in test_rows] == [row["id"] for row in answers]
    assert not {row["path"] for row in rows} & {row["path"] for row in test_rows}
    for part in (rows, answers):
        counts = Counter(row["answer"] for row in part)
        assert set(counts) == set("abcd")
        assert max(counts.values()) - min(counts.values()) <= 1


def test_the_digits_are_split_in_the_same_shares_and_shown_dark_on_white(digits):
    rows = read_csv(digits / "train.csv")
    counts = Counter(row[row["answer"]] for row in rows)
    assert set(counts) == set("0123456789")
    assert max(counts.values()) - min(counts.values()) <= 8  # load_digits itself has 174 to 183 of each
    assert all(len({row[letter] for letter in "abcd"}) == 4 for row in rows)
    pixels = np.asarray(Image.open(digits / rows[0]["path"]))
    assert pixels.shape == (96, 96) and np.median(pixels) > 200


def test_writing_the_digits_twice_gives_the_same_bytes(digits, tmp_path):
    write_digits(tmp_path)
    assert files_of(tmp_path) == files_of(digits)
