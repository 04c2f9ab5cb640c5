"""Rows scored in several orders of their choices: the same numbers as one at a time, each image seen once."""

import math

import datasets
import pytest
import torch
from accelerate import PartialState
from families import FAMILIES
from PIL import Image
from torch import nn
from trl import ModelConfig

from vqa_sft.batch.collator import AnswerCollator
from vqa_sft.batch.image_size import scale_images
from vqa_sft.batch.prompts import Prompts
from vqa_sft.data.examples import load_examples
from vqa_sft.models.fast import speedups
from vqa_sft.models.load import load_model, load_processor
from vqa_sft.models.scoring import (
    LetterModel,
    average_views,
    find_letter_ids,
    plan_batches,
    score_batches,
    to_choice_logits,
)
from vqa_sft.questions.letters import choices_to_letters, view_orders

PACKED = ("qwen2_5_vl", "qwen3_vl")


class OneOrder(AnswerCollator):
    """Every row in its n-th order of `views`, alone."""

    def __init__(self, *args, number, rotations, **kwargs):
        super().__init__(*args, **kwargs)
        self.number, self.rotations = number, rotations

    def orders(self, row):
        orders = view_orders(len(row["choices"]), self.rotations, row["id"])
        return [orders[self.number % len(orders)]]


@pytest.fixture(params=FAMILIES)
def road(request, families, contest):
    folder = families(request.param)
    examples, _ = load_examples(str(contest / "train.csv"))
    rows = [examples[i] for i in range(6)]
    rows[1] |= {"question": "Which of these is the colour of the square that stands in the image?"}
    rows[2] |= {"choices": rows[2]["choices"][:2], "answer": None}
    if request.param in PACKED:
        rows[3] |= {"images": []}
        rows[4] |= {"images": rows[4]["images"] + rows[0]["images"]}
    processor = load_processor(folder)
    model = load_model(ModelConfig(model_name_or_path=folder, dtype=None), "fp32").eval()
    for name, parameter in model.named_parameters():  # random models hardly look at their prompt
        if "embed_tokens" in name:
            nn.init.normal_(parameter, std=0.5)
    return model, processor, find_letter_ids(processor, 4), [*rows], request.param in PACKED


class Rows(list):
    """What plan_batches and score_batches take of a dataset."""

    column_names = ("id", "question", "choices", "images", "answer")

    def select_columns(self, names):
        return Rows({name: row[name] for name in names} for row in self)

    def __getitem__(self, key):
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)


def score(road, collator, batch_size=8):
    """Choice logits of each row."""
    model, _, letter_ids, rows, _ = road
    PartialState(cpu=True)
    batches = plan_batches(Rows(rows), collator.views, batch_size)
    scored = score_batches(LetterModel(model, letter_ids, "fp32"), Rows(rows), batches, [collator])
    found = {row: of_runs[0] for batch in scored for row, of_runs in zip(batch.rows, batch.choice_logits, strict=True)}
    return [found[row] for row in range(len(rows))]


@pytest.mark.parametrize("views", ["rotations", 3])
def test_views_give_the_mean_of_what_each_order_gives_alone(road, views):
    model, processor, _, rows, is_packed = road
    # One order at a time, on the library's own path.
    alone = [score(road, OneOrder(processor, Prompts(), 4, number=n, rotations=views)) for n in range(4)]
    expected = []
    for i, row in enumerate(rows):
        num_views = len(view_orders(len(row["choices"]), views, row["id"]))
        probs = torch.tensor([alone[n][i] for n in range(num_views)]).exp().mean(dim=0)
        expected.append(probs.log())
    packer = speedups.pack_rows(model, "fp32") if is_packed else None
    found = score(road, AnswerCollator(processor, Prompts(), 4, packer=packer, views=views))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.tensor(ours), theirs, atol=1e-5, rtol=1e-5)
    spread = max((torch.tensor(alone[0][i]) - torch.tensor(alone[1][i])).abs().max() for i in range(6))
    assert spread > 1e-3  # the orders do differ


def test_what_the_orders_of_a_row_begin_with_stands_once_and_its_image_too(road):
    model, processor, _, rows, is_packed = road
    if not is_packed:
        pytest.skip("of packed rows")
    packer = speedups.pack_rows(model, "fp32")
    one = AnswerCollator(processor, Prompts(), 4, packer=packer)(rows)
    four = AnswerCollator(processor, Prompts(), 4, packer=packer, views="rotations")(rows)
    torch.testing.assert_close(four["pixel_values"], one["pixel_values"])
    assert torch.equal(four["image_grid_thw"], one["image_grid_thw"])
    image = model.config.image_token_id
    assert (four["input_ids"] == image).sum() == (one["input_ids"] == image).sum() > 0
    assert four["groups"].tolist() == [0] * 4 + [1] * 4 + [2] * 2 + [3] * 4 + [4] * 4 + [5] * 4
    padded = AnswerCollator(processor, Prompts(), 4, views="rotations")(rows)
    places, own, copies = four["shared_prefix"]
    written_out = four["input_ids"][0][places]
    assert torch.equal(written_out, padded["input_ids"][padded["attention_mask"].bool()])  # nothing is lost
    assert torch.equal(places[own], torch.arange(len(own))) and not len(copies)
    # Every order adds its choices and the prompt's end, and nothing of what stands before.
    ends = [len(processor.tokenizer(str(row["choices"]))["input_ids"]) + 60 for row in rows]
    assert four["input_ids"].numel() - one["input_ids"].numel() < 3 * sum(ends)
    with pytest.raises(RuntimeError, match="no gradients"):
        hidden = model.get_input_embeddings()(four["input_ids"])
        assert hidden.requires_grad
        from vqa_sft.models.fast.attention import WriteOut

        WriteOut.apply(hidden[:, None], places, own, copies).sum().backward()


@pytest.mark.parametrize("views", ["identity", "rotations"])
def test_several_questions_about_one_image_share_it(road, views):
    """And give what each gives in a batch of its own on the library's path."""
    model, processor, letter_ids, rows, is_packed = road
    if not is_packed:
        pytest.skip("of packed rows")
    asked = [rows[0], rows[1] | {"images": rows[0]["images"]}, rows[3], rows[5]]
    asked.append(rows[4] | {"id": "two images, again", "question": "Which?"})
    asked += [rows[4], rows[2] | {"images": rows[0]["images"]}]
    road = model, processor, letter_ids, asked, is_packed
    alone = score(road, AnswerCollator(processor, Prompts(), 4, views=views), batch_size=1)
    packer = speedups.pack_rows(model, "fp32")
    collator = AnswerCollator(processor, Prompts(), 4, packer=packer, views=views)
    together = score(road, collator, batch_size=7 * 4)
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=1e-5, rtol=1e-5)
    batch = collator(asked)
    # One image of the first row, one of the sixth question, two of the two-image rows.
    assert len(batch["image_grid_thw"]) == 4
    num_tokens = int(batch["image_grid_thw"].prod(dim=1).sum()) // 4
    assert int((batch["input_ids"] == model.config.image_token_id).sum()) == num_tokens


# Rows that refer: what is in them, and how many rotations they have.
REFERRING = [
    (["cat", "dog", "Both A and B", "fox"], 1),
    (["cat", "dog", "fox", "None of the above"], 3),
    (["A", "B", "C", "D"], 1),
    (["고양이", "개", "모두 정답", "정답 없음"], 2),
    (["cat", "dog", "fox", "owl"], 4),
]


def test_choices_that_refer_to_others_stay_in_every_view_and_score_beside_others_as_alone(road):
    model, processor, letter_ids, rows, is_packed = road
    asked = [rows[0] | {"id": f"asked {i}", "choices": choices} for i, (choices, _) in enumerate(REFERRING)]
    asked[3] |= {"images": rows[5]["images"]}
    road = model, processor, letter_ids, asked, is_packed
    shown = [[(0, 1, 2, 3)], [(0, 1, 2, 3), (2, 0, 1, 3), (1, 2, 0, 3)], [(0, 1, 2, 3)], [(0, 1, 2, 3), (1, 0, 2, 3)]]
    shown += [[(0, 1, 2, 3), (3, 0, 1, 2), (2, 3, 0, 1), (1, 2, 3, 0)]]

    class Literal(AnswerCollator):
        def orders(self, row):
            of_row = shown[asked.index(row)]
            return [of_row[self.number % len(of_row)]]

    alone = Literal(processor, Prompts(), 4)
    by_view = []
    for alone.number in range(12):  # each of a row's orders as often as its others
        by_view.append(torch.tensor(score(road, alone, batch_size=1)).exp())
    expected = torch.stack(by_view).mean(dim=0).log()
    packer = speedups.pack_rows(model, "fp32") if is_packed else None
    collator = AnswerCollator(processor, Prompts(), 4, packer=packer, views="rotations")
    torch.testing.assert_close(torch.tensor(score(road, collator, batch_size=16)), expected, atol=1e-5, rtol=1e-5)
    batch = collator(asked)
    assert batch["orders"].tolist() == [[*order] for of_row in shown for order in of_row]
    assert batch["groups"].bincount().tolist() == [count for _, count in REFERRING]


def test_rows_are_scored_together_by_the_views_that_they_have():
    def plan(rows, views):
        examples = Rows({"question": "Which?", "choices": choices, "images": []} for choices, _ in rows)
        return [len(batch) for batch in plan_batches(examples, views, 8)]

    kept = [REFERRING[0], REFERRING[2]] * 8
    assert plan(kept, "rotations") == plan(kept, "all") == plan(kept, 5) == [8, 8]
    assert plan([*kept, REFERRING[3]], "rotations") == [4, 4, 4, 4, 1]
    assert plan([*kept, REFERRING[4]], "rotations") == [2] * 8 + [1]
    assert plan(kept, "identity") == plan([REFERRING[4]] * 16, "identity") == [8, 8]


@pytest.mark.parametrize("choices", [choices for choices, _ in REFERRING])
def test_an_oracle_is_right_under_every_view_of_choices_that_refer_to_others(choices):
    for views in ("identity", "rotations", "all", 7):
        collator = AnswerCollator(None, Prompts(), 4, views=views)
        orders = collator.orders({"id": "row", "question": "Which?", "choices": choices})
        for answer in range(4):
            scores = [5.0 if choice == answer else 0.0 for choice in range(4)]
            letters = torch.tensor([choices_to_letters(scores, order) for order in orders])
            logits = to_choice_logits(letters, torch.tensor(orders), torch.full((len(orders),), 4))
            averaged, agreement = average_views(logits)
            torch.testing.assert_close(torch.tensor(averaged), torch.tensor(scores).log_softmax(0))
            assert agreement == 1


def test_an_oracle_is_right_under_every_view():
    """It says the letter under which the answer stands, whatever the order."""
    for views in ("identity", "rotations", "all", 7):
        orders = view_orders(4, views, "row")
        letters = torch.tensor([choices_to_letters([5.0, 0.0, -1.0, -2.0], order) for order in orders])
        logits = to_choice_logits(letters, torch.tensor(orders), torch.full((len(orders),), 4))
        averaged, agreement = average_views(logits)
        torch.testing.assert_close(torch.tensor(averaged), torch.tensor([5.0, 0, -1, -2]).log_softmax(0))
        assert agreement == 1


def test_averages_are_of_probabilities_or_of_their_logarithms():
    views = [[math.log(0.9), math.log(0.1)], [math.log(0.3), math.log(0.7)], [math.log(0.6), math.log(0.4)]]
    mean, agreement = average_views(views)
    assert [math.exp(value) for value in mean] == pytest.approx([0.6, 0.4])
    assert agreement == pytest.approx(2 / 3)
    geometric = [(0.9 * 0.3 * 0.6) ** (1 / 3), (0.1 * 0.7 * 0.4) ** (1 / 3)]
    found, _ = average_views(views, "log")
    assert [math.exp(value) for value in found] == pytest.approx([value / sum(geometric) for value in geometric])
    one = [math.log(0.2), math.log(0.5), math.log(0.3)]
    assert average_views([one]) == (pytest.approx(one), 1.0)


@pytest.mark.parametrize("family", PACKED)
def test_a_scale_changes_the_sides_that_a_image_has_within_the_limits(families, family):
    processor = load_processor(families(family), min_pixels=64 * 64, max_pixels=320 * 320)
    px = processor.image_processor.patch_size * processor.image_processor.merge_size

    def sides_px(size, scale):
        _, high, wide = scale_images(processor, [Image.new("RGB", size)], scale)["image_grid_thw"][0].tolist()
        return high * px // 2, wide * px // 2  # two patches a token

    for size in ((640, 640), (128, 256), (32, 32), (300, 200)):
        whole = sides_px(size, 1)
        for scale in (0.5, 0.9, 1.1, 1.5):
            expected = tuple(max(1, round(side / px * scale)) * px for side in whole)
            assert sides_px(size, scale) == expected
    # Nine and eleven tenths of ten tokens, and not eleven of both.
    assert [sides_px((10 * px, 10 * px), scale)[0] // px for scale in (0.9, 1, 1.1)] == [9, 10, 11]


def test_padded_rows_of_like_length_are_scored_together_the_longest_first():
    texts = ["a" * length for length in (3, 90, 20, 4, 80, 21)]
    rows = [{"question": text, "choices": ["x", "y"], "context": None, "images": [{"path": "a.png"}]} for text in texts]
    rows[3]["images"] *= 2
    examples = datasets.Dataset.from_list(rows)
    assert plan_batches(examples, "identity", 2, packs_rows=False) == [[3, 1], [4, 5], [2, 0]]
    assert plan_batches(examples, "rotations", 4, packs_rows=False) == [[3, 1], [4, 5], [2, 0]]
