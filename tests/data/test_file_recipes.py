"""The recipes for sets that are files of a repository, each on a few rows with exactly their fields.

The rows are made up; where the fields were seen stands in the head of each recipe.
"""

import json

import pytest
from PIL import Image
from scripts import RECIPES

from vqa_sft.config.recipe import read_recipe
from vqa_sft.data.examples import read_examples
from vqa_sft.data.split import LEFT_OUT, choose_parts


@pytest.fixture
def loaded(tmp_path, monkeypatch):
    """`loaded(name, files)`: what a recipe reads where a clone holds these files and drawn images."""

    def read(name, files, images):
        monkeypatch.chdir(tmp_path)
        for path in [*files, *images]:
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        for path, text in files.items():
            (tmp_path / path).write_text(text)
        for number, path in enumerate(images):
            Image.effect_noise((64, 64), 40 + number).convert("RGB").save(tmp_path / path)
        arguments = read_recipe(["--config", str(RECIPES / f"{name}.yaml")]).arguments
        return arguments, read_examples(arguments.train_data, arguments.data_options)

    return read


def test_puzzlevqa_is_read_from_json_lines_with_numbers_for_options(loaded):
    def line(puzzle, number, options, answer):
        row = {"image": f"images/{puzzle}/{puzzle}_{number:04d}.png", "question": "What is the missing part?"}
        return row | {"options": options, "answer": answer, "caption": "c", "explanation": "e", "deduction": "d"}

    rows = {
        "grid_number": [line("grid_number", i, [6, 3, 4, 2], "6342"[i % 4]) for i in range(8)],
        "color_grid": [line("color_grid", i, ["red", "blue", "green", "pink"], "blue") for i in range(4)],
    }
    folder = "data/LLM-PuzzleTest/PuzzleVQA/data"
    files = {f"{folder}/{name}.json": "".join(json.dumps(row) + "\n" for row in lines) for name, lines in rows.items()}
    images = [f"{folder}/{row['image']}" for lines in rows.values() for row in lines]
    arguments, found = loaded("puzzlevqa", files, images)
    found.problems.raise_if_any(found.name)
    assert found.examples["answer"][:] == [1] * 4 + [0, 1, 2, 3] * 2  # files are read in the order of their names
    assert found.examples["choices"][4] == ["6", "3", "4", "2"]
    assert found.examples["id"][0] == "images/color_grid/color_grid_0000.png"
    parts = choose_parts([found], validation_fraction=arguments.validation_fraction)[0]
    assert parts.count("validation") == 1


def test_logicvista_is_read_from_one_object_whose_choices_stand_in_the_images(loaded):
    questions = [
        ("What choice (A, B, C, or D) should be in place of the question mark?", "C", "ABCD"),
        ("Which of the boxes comes next in the sequence? Select from A-E", "E", "ABCDE"),
        ("How many triangles will be in the 6th shape? Select answers from A-D. \n A) 10 B) 12 C) 14 D) 16", "B", None),
        ("Which choices in the image (A-D) belong to the green category?", "A, C", "ABCD"),
        ("Which is the correct answer according to the image? Select from 1-5", "3", "12345"),
        ("Which choice (A, B, C, or D) completes the series?", "A", "ABCD"),
    ]
    rows = {
        f"v1_{i}": {"imagename": f"v1_{i}.png", "question": question, "answer": answer, "reasoning": "Because."}
        | {"skill": ["inductive"], "capability": ["diagram", "ocr"], "imagesource": "x", "sourcelink": "https://x"}
        for i, (question, answer, _) in enumerate(questions)
    }
    folder = "data/LogicVista/data"
    images = [f"{folder}/images/{row['imagename']}" for row in rows.values()]
    arguments, found = loaded("logicvista", {f"{folder}/dataset.json": json.dumps(rows, indent=4)}, images)
    assert found.examples["id"][:] == [*rows]
    assert found.examples["choices"][:] == [
        [*choices] if choices else ["10", "12", "14", "16"] for _, _, choices in questions
    ]
    assert found.examples["answer"][:] == [2, 4, 1, None, None, 0]
    assert found.examples[1]["images"][0]["path"].endswith("data/images/v1_1.png")
    parts = choose_parts([found], on_bad_row=arguments.on_bad_row)[0]
    assert [row for row, part in enumerate(parts) if part == LEFT_OUT] == [3, 4]
