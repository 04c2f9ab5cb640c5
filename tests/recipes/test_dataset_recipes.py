"""The recipes for published datasets, each on a few rows with exactly the fields, types, splits and configs of its set.

The rows are made up; where the fields were seen stands in the head of each recipe.
"""

import io
from dataclasses import dataclass, replace

import datasets
import pytest
import yaml
from datasets import Features, List, Value
from PIL import Image
from scripts import RECIPES

from vqa_sft.batch.collator import AnswerCollator
from vqa_sft.batch.prompts import check_texts
from vqa_sft.config.recipe import read_recipe
from vqa_sft.data.examples import load_examples, read_examples
from vqa_sft.models.load import load_processor

TEXT, TEXTS, PICTURE = Value("string"), List(Value("string")), datasets.Image()


def drawn_image(number):
    """An image as Parquet holds it; another number is another image."""
    file = io.BytesIO()
    Image.new("RGB", (56 + 28 * (number % 3), 56), (20 * number, 255 - 20 * number, 90)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


@dataclass
class Published:
    """`parts`: config -> split -> rows; `expected`: split -> what the recipe makes of its rows, as (id, images,
    question, choices, answer, context); `without_answers`: the split whose answers are not published."""

    features: Features
    parts: dict
    expected: dict
    without_answers: str | None = None


# --- ScienceQA: rows with and without an image; two to five choices; no id -------------------------------------------


def science_row(image, question, choices, answer, hint):
    about = {"task": "closed choice", "grade": "grade4", "subject": "natural science", "topic": "physics"}
    about |= {"category": "Heat", "skill": "Compare", "lecture": "Heat is energy.", "solution": "It is hot."}
    return {"image": image, "question": question, "choices": choices, "answer": answer, "hint": hint} | about


SCIENCEQA = Published(
    Features(
        {"image": PICTURE, "question": TEXT, "choices": TEXTS, "answer": Value("int8"), "hint": TEXT}
        | {name: TEXT for name in ("task", "grade", "subject", "topic", "category", "skill", "lecture", "solution")}
    ),
    {
        "default": {
            "train": [
                science_row(drawn_image(0), "Which is hotter?", ["ice", "steam"], 1, ""),
                science_row(None, "Which is a noun?", ["run", "cat", "blue"], 1, "Nouns name things."),
                science_row(drawn_image(1), "Which state is shown?", ["Ohio", "Iowa", "Utah", "Maine", "Texas"], 4, ""),
                science_row(None, "Is water wet?", ["yes", "no"], 0, ""),
            ],
            "validation": [science_row(drawn_image(2), "What melts?", ["stone", "ice"], 1, "It is warm\nand sunny.")],
            "test": [science_row(None, "What burns?", ["wood", "water"], 0, "")],
        }
    },
    {
        "train": [
            ("0", [0], "Which is hotter?", ["ice", "steam"], 1, ""),
            ("1", [], "Which is a noun?", ["run", "cat", "blue"], 1, "Nouns name things."),
            ("2", [1], "Which state is shown?", ["Ohio", "Iowa", "Utah", "Maine", "Texas"], 4, ""),
            ("3", [], "Is water wet?", ["yes", "no"], 0, ""),
        ],
        "validation": [("0", [2], "What melts?", ["stone", "ice"], 1, "It is warm\nand sunny.")],
    },
)


# --- A-OKVQA: other answers stand beside the choices; the answers of test are not published ---------------------------


def okvqa_row(number, question, choices, answer):
    row = {"image": drawn_image(number), "question_id": f"22jbM6gD{number}", "question": question, "choices": choices}
    row |= {"correct_choice_idx": answer, "difficult_direct_answer": False}
    known = answer is not None
    return row | {"direct_answers": "['bus', 'bus', 'tram']" if known else None, "rationales": ["It is."] * known}


AOKVQA = Published(
    Features(
        {"image": PICTURE, "question_id": TEXT, "question": TEXT, "choices": TEXTS, "correct_choice_idx": Value("int8")}
        | {"direct_answers": TEXT, "difficult_direct_answer": Value("bool"), "rationales": TEXTS}
    ),
    {
        "default": {
            "train": [
                okvqa_row(0, "What is the man awaiting?", ["skateboarder", "train", "delivery", "cab"], 3),
                okvqa_row(1, "How many wheels has it?", ["1", "2", "3", "4"], 1),
                okvqa_row(2, "What is in his mouth?", ["toothpick", "food", "a straw", "nothing"], 0),
            ],
            "validation": [okvqa_row(3, "Why is it wet?", ["rain", "snow", "paint", "sea"], 0)],
            "test": [okvqa_row(4, "Who drives?", ["man", "woman", "boy", "nobody"], None)],
        }
    },
    {
        "train": [
            ("22jbM6gD0", [0], "What is the man awaiting?", ["skateboarder", "train", "delivery", "cab"], 3, ""),
            ("22jbM6gD1", [1], "How many wheels has it?", ["1", "2", "3", "4"], 1, ""),
            ("22jbM6gD2", [2], "What is in his mouth?", ["toothpick", "food", "a straw", "nothing"], 0, ""),
        ],
        "validation": [("22jbM6gD3", [3], "Why is it wet?", ["rain", "snow", "paint", "sea"], 0, "")],
        "test": [("22jbM6gD4", [4], "Who drives?", ["man", "woman", "boy", "nobody"], None, "")],
    },
    without_answers="test",
)


# --- AI2D: the answer is an index in a text, also where the choices are letters or numbers ----------------------------

AI2D = Published(
    Features({"question": TEXT, "options": TEXTS, "answer": TEXT, "image": PICTURE}),
    {
        "default": {
            "test": [
                {"question": question, "options": options, "answer": answer, "image": drawn_image(number)}
                for question, options, answer, number in (
                    ("What eats the fly?", ["frog", "grass", "sun", "hawk"], "0", 0),
                    ("Which label is the root?", ["A", "B", "C", "D"], "3", 1),
                    ("How many stages are shown?", ["3", "1", "2", "0"], "1", 1),
                    ("What does a frog become?", ["egg", "tadpole", "adult", "stone"], "2", 2),
                )
            ]
        }
    },
    {
        "test": [
            ("0", [0], "What eats the fly?", ["frog", "grass", "sun", "hawk"], 0, ""),
            ("1", [1], "Which label is the root?", ["A", "B", "C", "D"], 3, ""),
            ("2", [1], "How many stages are shown?", ["3", "1", "2", "0"], 1, ""),
            ("3", [2], "What does a frog become?", ["egg", "tadpole", "adult", "stone"], 2, ""),
        ]
    },
)


# --- MMBench: null or "nan" where there is no hint, C or D; the turns of a question have their own index --------------


def bench_row(index, number, question, choices, answer, hint):
    row = {"index": index, "question": question, "hint": hint, "answer": answer} | dict(
        zip("ABCD", choices, strict=True)
    )
    row |= {"category": "ocr", "image": drawn_image(number), "source": "made up", "L2-category": "perception"}
    return row | {"comment": "nan", "split": "dev"}


MMBENCH = Published(
    Features(
        {"index": TEXT, "question": TEXT, "hint": TEXT, "answer": TEXT, "A": TEXT, "B": TEXT, "C": TEXT, "D": TEXT}
        | {"category": TEXT, "image": PICTURE, "source": TEXT, "L2-category": TEXT, "comment": TEXT, "split": TEXT}
    ),
    {
        "cn": {"dev": [bench_row("7", 5, "这是什么?", ["猫", "狗", "鱼", "鸟"], "B", "nan")]},
        "en": {
            "dev": [
                bench_row("241", 0, "Which is right?", ["yes", "no", "nan", "nan"], "A", "The passage below."),
                bench_row("1000241", 0, "Which is right?", ["no", "yes", "nan", "nan"], "B", "The passage below."),
                bench_row("252", 1, "What is it?", ["cat", "dog", "fox", None], "C", None),
                bench_row("253", 2, "What does it say?", ["STOP", "GO", "WAIT", "nan"], "A", "nan"),
                bench_row("254", 3, "How many are there?", ["1", "2", "3", "4"], "D", "nan"),
            ],
            "test": [bench_row("9", 4, "What is next?", ["a car", "a bus", "nan", "nan"], "nan", "nan")],
        },
    },
    {
        "dev": [
            ("241", [0], "Which is right?", ["yes", "no"], 0, "The passage below."),
            ("1000241", [0], "Which is right?", ["no", "yes"], 1, "The passage below."),
            ("252", [1], "What is it?", ["cat", "dog", "fox"], 2, ""),
            ("253", [2], "What does it say?", ["STOP", "GO", "WAIT"], 0, ""),
            ("254", [3], "How many are there?", ["1", "2", "3", "4"], 3, ""),
        ],
        "test": [("9", [4], "What is next?", ["a car", "a bus"], None, "")],
    },
    without_answers="test",
)


# --- MMMU: a config a subject, choices as a Python list in a text, up to seven images, open questions ---------------


def college_row(row_id, numbers, question, options, answer, kind="multiple-choice"):
    row = {"id": row_id, "question": question, "options": options, "explanation": ""}
    row |= {f"image_{place}": None for place in range(1, 8)}
    row |= {f"image_{place}": drawn_image(number) for place, number in enumerate(numbers, 1)}
    row |= {"img_type": "['Tables']", "answer": answer, "topic_difficulty": "Easy", "question_type": kind}
    return row | {"subfield": "Other"}


MMMU = Published(
    Features(
        {"id": TEXT, "question": TEXT, "options": TEXT, "explanation": TEXT}
        | {f"image_{place}": PICTURE for place in range(1, 8)}
        | {name: TEXT for name in ("img_type", "answer", "topic_difficulty", "question_type", "subfield")}
    ),
    {
        "Accounting": {
            "dev": [
                college_row("dev_Accounting_1", [0], "<image 1> What is due?", "['$6', '$7', '$8', '$9']", "B"),
                college_row("dev_Accounting_2", [1], "How much is <image 1>?", "[]", "8.4", "open"),
                college_row("dev_Accounting_3", [2, 3, 4, 5, 6, 7, 8], "Sort them.", "['by size', 'by age']", "A"),
            ],
            "validation": [college_row("validation_Accounting_1", [9], "<image 1> Which?", "['x', 'y', 'z']", "C")],
            "test": [college_row("test_Accounting_1", [10], "<image 1> Which?", "['x', 'y']", "?")],
        },
        "Music": {
            "dev": [
                college_row("dev_Music_1", [4, 5], "Which is Bach?", "['<image 1>', '<image 2>', \"It's none\"]", "C"),
                college_row("dev_Music_2", [6], "What is <image 1>?", '["B, or \'C\'", "E\\u266d", "F"]', "B"),
            ],
            "validation": [college_row("validation_Music_1", [11], "Key?", "[]", "C", "open")],
            "test": [college_row("test_Music_1", [1], "Key?", "[]", "?", "open")],
        },
    },
    {
        "dev": [
            ("dev_Accounting_1", [0], "<image 1> What is due?", ["$6", "$7", "$8", "$9"], 1, ""),
            ("dev_Accounting_3", [2, 3, 4, 5, 6, 7, 8], "Sort them.", ["by size", "by age"], 0, ""),
            ("dev_Music_1", [4, 5], "Which is Bach?", ["<image 1>", "<image 2>", "It's none"], 2, ""),
            ("dev_Music_2", [6], "What is <image 1>?", ["B, or 'C'", "E♭", "F"], 1, ""),
        ],
        "validation": [("validation_Accounting_1", [9], "<image 1> Which?", ["x", "y", "z"], 2, "")],
        "test": [("test_Accounting_1", [10], "<image 1> Which?", ["x", "y"], None, "")],
    },
    without_answers="test",
)


# --- SEED-Bench: a list of images, which are the frames of a video in some rows -------------------------------------


def seed_row(question_id, numbers, question, choices, answer, kind="image"):
    names = [f"choice_{letter}" for letter in "abcd"]
    row = {"answer": answer} | dict(zip(names, choices, strict=True)) | {"data_id": "2096_1", "data_type": kind}
    row |= {"question": question, "question_id": question_id, "question_type_id": 10 if kind == "video" else 1}
    return row | {"image": [drawn_image(number) for number in numbers], "segment": [0, 8] if kind == "video" else None}


SEED_BENCH = Published(
    Features(
        {"answer": TEXT, "choice_a": TEXT, "choice_b": TEXT, "choice_c": TEXT, "choice_d": TEXT, "data_id": TEXT}
        | {"data_type": TEXT, "question": TEXT, "question_id": TEXT, "question_type_id": Value("int16")}
        | {"image": List(PICTURE), "segment": List(Value("int64"))}
    ),
    {
        "default": {
            "test": [
                seed_row("101669", [0], "How many towels are there?", ["One", "Two", "Three", "Four"], "A"),
                seed_row("101670", [0], "Where is the sink?", ["left", "right", "middle", "nowhere"], "D"),
                seed_row("v1", [1, 2, 3, 4], "What is done?", ["cut", "fold", "push", "pull"], "C", "video"),
                seed_row("76712", [5], "What does it say?", ["EXIT", "OPEN", "NONE", "N/A"], "C"),
            ]
        }
    },
    {
        "test": [
            ("101669", [0], "How many towels are there?", ["One", "Two", "Three", "Four"], 0, ""),
            ("101670", [0], "Where is the sink?", ["left", "right", "middle", "nowhere"], 3, ""),
            ("76712", [5], "What does it say?", ["EXIT", "OPEN", "NONE", "N/A"], 2, ""),
        ]
    },
)

PUBLISHED = {"scienceqa": SCIENCEQA, "aokvqa": AOKVQA, "ai2d": AI2D}
PUBLISHED |= {"mmbench": MMBENCH, "mmmu": MMMU, "seed_bench": SEED_BENCH}


# --- What is asked of each --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=PUBLISHED)
def tried(request, tmp_path_factory):
    """(the recipe, turned to a local copy of its Hub repository; the published rows)"""
    name = request.param
    published, folder = PUBLISHED[name], tmp_path_factory.mktemp(name)
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    write_repository(folder, published)
    argv = ["--config", RECIPES / f"{name}.yaml", "--train_data", folder, "--use_cpu"]
    own = read_recipe(["--config", str(RECIPES / f"{name}.yaml")]).arguments
    argv += ["--validation_data", folder] * (own.validation_data is not None)
    argv += ["--data_config", *published.parts] * isinstance(own.data_config, list)  # two subjects of the thirty
    yield read_recipe([str(token) for token in argv]), published
    patch.undo()


def write_repository(folder, published):
    """Parquet files and a card that says which of them are which config and split, as on the Hub."""
    card = []
    for config, splits in published.parts.items():
        files = []
        for split, rows in splits.items():
            path = folder / ("data" if config == "default" else config) / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(exist_ok=True)
            datasets.Dataset.from_list(rows, features=published.features).to_parquet(path)
            files.append({"split": split, "path": f"{path.parent.name}/{split}-*"})
        card.append({"config_name": config, "data_files": files})
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': card})}---\n")


def splits_of(recipe):
    own = recipe.arguments
    return [own.train_split] + ([own.validation_split] if own.validation_data else [])


def as_expected(examples):
    images = {drawn_image(number)["bytes"]: number for number in range(12)}
    return [
        (row["id"], [images[image["bytes"]] for image in row["images"]])
        + (row["question"], row["choices"], row["answer"], row["context"])
        for row in examples
    ]


def load_split(recipe, split, **options):
    return load_examples(recipe.arguments.train_data, replace(recipe.arguments.data_options, split=split, **options))[0]


def test_rows_with_the_published_fields_become_examples(tried):
    recipe, published = tried
    for split in splits_of(recipe):
        assert as_expected(load_split(recipe, split)) == published.expected[split]


def test_test_rows_without_answers_can_be_predicted(tried):
    recipe, published = tried
    if split := published.without_answers:
        assert as_expected(load_split(recipe, split, answers="optional")) == published.expected[split]


def test_rows_that_are_left_out_are_counted(tried):
    recipe, published = tried
    split = recipe.arguments.train_split
    of_configs = recipe.arguments.data_config or "default"
    configs = [of_configs] if isinstance(of_configs, str) else of_configs
    left_out = sum(len(published.parts[config][split]) for config in configs) - len(published.expected[split])
    notes = read_examples(recipe.arguments.train_data, replace(recipe.arguments.data_options, split=split)).notes
    assert left_out == (1 if recipe.arguments.keep_rows else 0)
    assert any(f"({left_out} left out by keep_rows)" in note for note in notes) == bool(left_out)


def test_examples_reach_the_model_as_a_prompt_with_their_images(tried, families):
    recipe, published = tried
    examples = load_split(recipe, recipe.arguments.train_split)
    processor, prompts = load_processor(families("qwen2_5_vl")), recipe.arguments.prompts
    check_texts(processor, examples, prompts)
    batch = AnswerCollator(processor, prompts, num_letters=5)(list(examples))
    starts = processor.tokenizer.convert_tokens_to_ids("<|vision_start|>")
    for i, expected in enumerate(published.expected[recipe.arguments.train_split]):
        _, images, question, choices, answer, context = expected
        ids = batch["input_ids"][i]
        prompt = processor.tokenizer.decode(ids[batch["attention_mask"][i].bool()])
        lines = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCDE", choices, strict=False))
        assert context in prompt and question in prompt and prompt.index(question) < prompt.index(lines)
        assert (ids == starts).sum() == len(images)
        assert batch["answers"][i] == answer and batch["num_choices"][i] == len(choices)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_says_where_its_fields_were_seen_and_what_the_set_is_for(name):
    text = (RECIPES / f"{name}.yaml").read_text()
    head = " ".join(line.removeprefix("#").strip() for line in text.partition("\n\n")[0].splitlines())
    own = read_recipe(["--config", str(RECIPES / f"{name}.yaml")]).arguments
    assert own.train_data in head and "Fields from" in head and "huggingface.co/datasets/" in head
    assert "sed for" in head and ("licence" in head or "CC BY" in head or "MIT" in head or "Apache" in head)


def test_mmmu_names_its_thirty_subjects():
    subjects = read_recipe(["--config", str(RECIPES / "mmmu.yaml")]).arguments.data_config
    assert len(set(subjects)) == len(subjects) == 30 and set(MMMU.parts) <= set(subjects)
