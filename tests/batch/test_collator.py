import itertools
import random

import pytest
import torch
from PIL import ImageOps
from tokenizers.processors import TemplateProcessing
from trainers import prompt_bytes

from vqa_sft.batch.augment import augment
from vqa_sft.batch.collator import AnswerCollator, Augmentation, TrainCollator
from vqa_sft.batch.prompts import Prompts, render_prompt
from vqa_sft.data.examples import load_examples
from vqa_sft.images import open_image
from vqa_sft.models.load import load_processor
from vqa_sft.questions.letters import draw_order


@pytest.fixture
def examples(contest):
    return load_examples(str(contest / "train.csv"))[0]


@pytest.fixture
def processor(families):
    return load_processor(families("qwen2_5_vl"))


def test_the_prompt_in_training_is_the_prompt_in_prediction_byte_for_byte(processor, examples):
    rows = [examples[i] for i in range(6)]
    train = TrainCollator(processor, Prompts(), 4, seed=3)
    drawn = [draw_order(4, 3, 0, row["id"]) for row in rows]
    # The slow reference: the rows with their choices really put into the drawn order, as prediction shows them.
    shuffled = [row | {"choices": [row["choices"][c] for c in order]} for row, order in zip(rows, drawn, strict=True)]
    training, prediction = train(rows), AnswerCollator(processor, Prompts(), 4)(shuffled)
    for i in range(6):
        assert prompt_bytes(processor, training, i) == prompt_bytes(processor, prediction, i)
    assert torch.equal(training["input_ids"], prediction["input_ids"])


def test_the_prompt_ends_where_the_letter_begins_and_never_holds_the_answer(processor, examples):
    text = render_prompt(processor, examples[0], (0, 1, 2, 3), Prompts())
    assert text.endswith("<|im_start|>assistant\n")
    other = examples[0] | {"answer": (examples[0]["answer"] + 1) % 4}
    assert render_prompt(processor, other, (0, 1, 2, 3), Prompts()) == text


def test_the_supervised_letter_is_the_one_the_answer_stands_under(processor, examples):
    rows = [examples[i] for i in range(12)]
    batch = TrainCollator(processor, Prompts(), 4, seed=0)(rows)
    for i, row in enumerate(rows):
        letter = "ABCD"[batch["answers"][i]]
        assert f"\n{letter}. {row['choices'][row['answer']]}" in prompt_bytes(processor, batch, i).decode()
        assert batch["orders"][i][batch["answers"][i]] == row["answer"]


def test_orders_change_with_the_epoch_and_stay_without_shuffling(processor, examples):
    rows = [examples[i] for i in range(8)]
    collator = TrainCollator(processor, Prompts(), 4, seed=0)
    first, again = collator(rows)["orders"], collator(rows)["orders"]
    collator.epoch.fill_(1)
    assert torch.equal(first, again) and not torch.equal(first, collator(rows)["orders"])
    plain = TrainCollator(processor, Prompts(), 4, seed=0, augmentation=Augmentation(shuffle_choices=False))(rows)
    assert plain["orders"].tolist() == [[0, 1, 2, 3]] * 8


def test_images_are_changed_by_seed_epoch_row_and_place_alone(processor, examples):
    rows = [examples[i] for i in range(4)]
    rows[1] = rows[1] | {"images": [rows[0]["images"][0]] * 2}
    both = Augmentation(image_augmentation=0.2, flip_images=True)
    collator = TrainCollator(processor, Prompts(), 4, seed=5, augmentation=both)

    def changed(collator):
        return [image for row in rows for image in collator.images(row)]

    first = changed(collator)
    collator([rows[2]])  # whatever other batches it made
    again = TrainCollator(processor, Prompts(), 4, seed=5, augmentation=both)
    assert changed(collator) == changed(again) == first
    again.epoch.fill_(1)
    other = TrainCollator(processor, Prompts(), 4, seed=6, augmentation=both)
    one = first + changed(again) + changed(other)  # images 0, 1 and 2 were one
    assert not any(a == b for i, a in enumerate(one) for b in one[:i])
    for plain in (TrainCollator(processor, Prompts(), 4, seed=5), AnswerCollator(processor, Prompts(), 4)):
        assert plain.images(rows[1]) == [open_image(rows[0]["images"][0])] * 2


def test_a_run_of_an_earlier_version_draws_the_same_changes_of_images(processor, examples):
    both = Augmentation(image_augmentation=0.2, flip_images=True)
    collator = TrainCollator(processor, Prompts(), 4, seed=5, augmentation=both)
    for epoch, row in itertools.product(range(2), [examples[i] for i in range(4)]):
        collator.epoch.fill_(epoch)
        rng = random.Random(f"5/{epoch}/{row['id']}/picture 0")
        image = augment(open_image(row["images"][0]), 0.2, rng)
        assert collator.images(row) == [ImageOps.mirror(image) if rng.random() < 0.5 else image]


def test_changed_images_leave_the_texts_as_they_are(processor, examples):
    rows = [examples[i] for i in range(6)]
    plain = TrainCollator(processor, Prompts(), 4, seed=5)(rows)
    changed = TrainCollator(processor, Prompts(), 4, seed=5, augmentation=Augmentation(image_augmentation=0.4))(rows)
    assert not torch.equal(plain["image_grid_thw"], changed["image_grid_thw"])  # more or fewer tokens
    drawn_image = processor.image_token.encode()
    for i in range(6):
        ours, theirs = (prompt_bytes(processor, batch, i).replace(drawn_image, b"") for batch in (changed, plain))
        assert ours == theirs
    assert torch.equal(plain["answers"], changed["answers"]) and torch.equal(plain["orders"], changed["orders"])


def test_half_of_the_images_are_mirrored(processor, examples):
    collator = TrainCollator(processor, Prompts(), 4, seed=0, augmentation=Augmentation(flip_images=True))
    mirrored = []
    for epoch in range(10):
        collator.epoch.fill_(epoch)
        for row in examples:
            drawn_image = open_image(row["images"][0])  # its square stands left of the middle
            assert collator.images(row)[0] in (drawn_image, ImageOps.mirror(drawn_image))
            mirrored.append(collator.images(row)[0] != drawn_image)
    assert 90 < sum(mirrored) < 150  # of 240


def test_a_worker_that_already_runs_sees_the_next_epoch(processor, examples):
    collator = TrainCollator(processor, Prompts(), 4, seed=0)
    loader = torch.utils.data.DataLoader(
        examples.select(range(4)), batch_size=4, collate_fn=collator, num_workers=1, persistent_workers=True
    )
    orders = []
    for epoch in range(2):
        collator.epoch.fill_(epoch)
        orders.append(next(iter(loader))["orders"].tolist())
    assert orders == [[list(draw_order(4, 0, epoch, f"row_00{i}")) for i in range(4)] for epoch in range(2)]


def test_training_leaves_choices_that_refer_to_others_where_they_are(processor, examples):
    both, above, letters, plain = (
        ["cat", "dog", "Both A and B", "fox"],
        ["cat", "dog", "fox", "정답 없음"],
        list("ABCD"),
        None,
    )
    rows = [
        examples[i] | {"choices": choices or examples[i]["choices"]}
        for i, choices in enumerate((both, above, letters, plain))
    ]
    collator = TrainCollator(processor, Prompts(), 4, seed=0)
    drawn = []
    for epoch in range(12):
        collator.epoch.fill_(epoch)
        batch = collator(rows)
        drawn.append(batch["orders"].tolist())
        for order, answer, row in zip(drawn[-1], batch["answers"].tolist(), rows, strict=True):
            assert order[answer] == row["answer"]
    for of_epoch in drawn:
        assert of_epoch[0] == of_epoch[2] == [0, 1, 2, 3] and of_epoch[1][3] == 3
    assert len({tuple(of_epoch[1]) for of_epoch in drawn}) > 2
    # Rows that refer to nothing are drawn as they always were.
    assert [of_epoch[3] for of_epoch in drawn] == [list(draw_order(4, 0, epoch, "row_003")) for epoch in range(12)]
    assert "\nA. cat\nB. dog\nC. Both A and B\nD. fox" in prompt_bytes(processor, batch, 0).decode()


@pytest.mark.parametrize("side", ["left", "right"])
def test_answer_positions_point_at_the_last_prompt_token(processor, examples, side):
    processor.tokenizer.padding_side = side
    rows = [examples[0], examples[1] | {"question": "What is the colour of the square in this image, please?"}]
    batch = AnswerCollator(processor, Prompts(), 4)(rows)
    assert batch["attention_mask"].sum(1).unique().numel() == 2  # one of the two is padded
    for i in range(2):
        last = max(t for t in range(batch["input_ids"].shape[1]) if batch["attention_mask"][i, t])
        assert batch["answer_positions"][i] == last


def test_a_template_that_writes_the_first_token_itself_gets_it_once(families, examples):
    processor = load_processor(families("llava"))
    tokenizer = processor.tokenizer
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    first = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = first  # as Llama's tokenizer: every text gets it
    for template in (processor.chat_template, "<s>" + processor.chat_template):
        processor.chat_template = template
        ids = AnswerCollator(processor, Prompts(), 4)([examples[0]])["input_ids"][0].tolist()
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1


def test_rows_with_fewer_choices_and_without_an_answer_fit_into_the_same_batch(processor, examples):
    rows = [examples[0], examples[1] | {"choices": ["x", "y"], "answer": None}]
    batch = AnswerCollator(processor, Prompts(), 4)(rows)
    assert batch["num_choices"].tolist() == [4, 2] and batch["answers"][1] == -1
    assert batch["orders"].tolist() == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava", "smolvlm"])
def test_rows_without_or_with_several_images_are_collated(families, examples, family):
    drawn_image = examples[0]["images"][0]
    rows = [examples[0] | {"images": []}, examples[0] | {"images": [drawn_image, drawn_image]}, examples[1]]
    processor = load_processor(families(family))
    batch = AnswerCollator(processor, Prompts(), 4)(rows)
    image_id = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    counts = (batch["input_ids"] == image_id).sum(1).tolist()
    assert counts[0] == 0 and counts[1] == 2 * (batch["input_ids"][1] == image_id).sum() // 2 > 0 < counts[2]
