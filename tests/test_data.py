import datasets
import pytest
from conftest import write_csv
from PIL import Image

from vqa_sft.data import Columns, load_examples
from vqa_sft.errors import InputError
from vqa_sft.images import open_image


def rows_of(contest):
    import csv

    with (contest / "train.csv").open() as file:
        return list(csv.DictReader(file))


def load(contest, **options):
    return load_examples(str(contest / "train.csv"), **options)


def test_a_csv_becomes_canonical_examples(contest):
    examples, columns = load(contest)
    row = rows_of(contest)[5]
    assert examples[5] == {
        "id": "row_005",
        "images": [{"bytes": None, "path": str(contest / "images/005.png")}],
        "question": "Which colour has the square?",
        "choices": [row[letter] for letter in "abcd"],
        "answer": "abcd".index(row["answer"]),
    }
    assert columns.choices == ("a", "b", "c", "d") and not columns.answers_are_upper


def test_a_choice_may_read_none_or_look_like_a_number(contest):
    rows = rows_of(contest)
    rows[0] |= {"a": "None", "b": "NA", "c": "007", "d": "1.0"}
    write_csv(contest / "train.csv", rows)
    assert load(contest)[0][0]["choices"] == ["None", "NA", "007", "1.0"]


def test_rows_may_have_fewer_choices_and_upper_case_answers(contest):
    rows = [row | {"answer": "B", "d": ""} for row in rows_of(contest)]
    write_csv(contest / "train.csv", rows)
    examples, columns = load(contest)
    assert len(examples[0]["choices"]) == 3 and examples[0]["answer"] == 1 and columns.answers_are_upper


def test_a_korean_csv_with_a_byte_order_mark_is_read(contest):
    text = (contest / "train.csv").read_text().replace("Which colour has the square?", "무슨 색인가요?")
    (contest / "train.csv").write_text(text, encoding="utf-8-sig")
    assert load(contest)[0][0]["question"] == "무슨 색인가요?"


def test_a_dataset_with_pictures_inside_gives_the_same_pixels(contest, tmp_path):
    examples, _ = load(contest)
    rows = [{key: row[key] for key in row if key != "path"} for row in rows_of(contest)]
    inside = datasets.Dataset.from_list(rows)
    inside = inside.add_column("image", [image[0]["path"] for image in examples["images"]])
    inside.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "saved")
    (tmp_path / "hub").mkdir()
    inside.cast_column("image", datasets.Image()).to_parquet(tmp_path / "hub" / "train.parquet")
    for source in ("saved", "hub"):
        loaded, columns = load_examples(str(tmp_path / source))
        assert columns.image == "image"
        assert loaded["choices"][:] == examples["choices"][:] and loaded["answer"][:] == examples["answer"][:]
        for i in (0, 7):
            ours, theirs = open_image(loaded[i]["images"][0]), open_image(examples[i]["images"][0])
            assert ours.tobytes() == theirs.tobytes()


def test_every_bad_row_is_named_at_once(contest):
    rows = rows_of(contest)
    rows[1]["answer"] = "z"
    rows[2]["answer"] = ""
    rows[4]["id"] = rows[3]["id"]
    rows[6]["path"] = "images/nowhere.png"
    (contest / "images/007.png").write_bytes(b"no picture")
    (contest / "images/008.png").write_bytes((contest / "images/008.png").read_bytes()[:90])
    rows[9]["path"] = "../../outside.png"
    rows[10] |= {"b": ""}
    rows[11] |= {"question": " "}
    rows[12] |= dict.fromkeys("abcd", "same")
    Image.new("RGB", (1, 300)).save(contest / "images/013.png")
    write_csv(contest / "train.csv", rows)
    with pytest.raises(InputError) as error:
        load(contest)
    message = str(error.value)
    for part in ("a, b, c, d; got another: rows row_001 ('z'), row_002 ('') (2 of 24)", "duplicate `id`: row row_003"):
        assert part in message
    for part in ("picture is missing: row", "row_006", "row_007", "row_008", "cannot be decoded", "leads out of"):
        assert part in message
    assert "an empty choice before a filled one: row row_010" in message
    for part in ("`question` is empty: row row_011", "all choices are equal: row row_012", "200 times as long"):
        assert part in message


def test_missing_columns_are_listed_with_the_ones_found(contest):
    write_csv(contest / "train.csv", [{"id": 1, "img": "x", "question": "?", "a": 1, "b": 2, "answer": "a"}])
    with pytest.raises(InputError, match="missing columns: path; found: id, img, question, a, b, answer"):
        load(contest)


def test_prediction_needs_no_answers_but_training_does(contest):
    test_file = str(contest / "test.csv")
    assert set(load_examples(test_file, answers="optional")[0]["answer"]) == {None}
    with pytest.raises(InputError, match="missing columns: answer"):
        load_examples(test_file)


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("nowhere.csv", None, "no such file"),
        ("empty.csv", b"", "cannot be read as CSV"),
        ("header.csv", b"id,path,question,a,b,answer\n", "has no rows"),
        ("korean.csv", "id,질문\n".encode("cp949"), "not UTF-8"),
        ("data.txt", b"x", "not a CSV file"),
        ("twice.csv", b"id,path,question,a,a,answer\n1,x,q,y,z,a\n", "more than one column 'a'"),
        ("gap.csv", b"id,path,question,a,b,d,answer\n1,x,q,y,z,w,a\n", "leave letters out"),
        ("semicolon.csv", b"id;path;question\n1;x;q\n", "separated by ;"),
        ("long.csv", b"id,path,question,a,b,answer\n1,x,q,y,z,a,\n2,x,q,y,z,a,\n", "rows longer than its header"),
    ],
)
def test_files_that_cannot_be_read_say_why(tmp_path, name, content, part):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=part):
        load_examples(str(tmp_path / name))


def test_a_name_that_is_nothing_says_what_it_could_be():
    with pytest.raises(InputError, match="neither a file, nor a folder"):
        load_examples("nobody/nothing")


def test_limit_takes_the_first_rows_only(contest):
    assert load(contest, limit=3)[0]["id"][:] == ["row_000", "row_001", "row_002"]


def test_other_column_names_can_be_given(contest):
    renamed = {"id": "key", "path": "img", "question": "q", "a": "o1", "b": "o2", "c": "o3", "d": "o4", "answer": "y"}
    write_csv(contest / "train.csv", [{renamed[name]: row[name] for name in row} for row in rows_of(contest)])
    columns = Columns("key", "img", "q", ("o1", "o2", "o3", "o4"), "y")
    assert load(contest, columns=columns)[0][0]["choices"] == [rows_of(contest)[0][f"o{i}"] for i in range(1, 5)]
