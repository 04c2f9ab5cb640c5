import json
import os
import re
import time
import tracemalloc

import datasets
import pandas
import pytest
from PIL import Image

from vqa_sft.data.find_encoding import find_encoding
from vqa_sft.data.find_files import find_files
from vqa_sft.data.sources import open_source
from vqa_sft.errors import InputError
from vqa_sft.images import open_image

HEADER = "id,question,a,b\n"
KOREAN = "번호,질문\n1,사진 속 고양이는 무슨 색인가요?\n"


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def rows_of(source, **options):
    return [row for _, row in open_source(source, **options).rows()]


def error_of(source, **options):
    with pytest.raises(InputError) as error:
        rows_of(source, **options)
    return str(error.value)


# --- CSV and TSV


def test_every_cell_of_a_csv_stays_text(tmp_path):
    path = write(tmp_path / "x.csv", ' id ,a\n007,NA\n1.50,\n"x, ""y""\nz",=1+1\n')
    source = open_source(path)
    assert source.columns == ["id", "a"] and source.notes == [] and source.name == path
    assert (source.table, source.features) == (None, None)
    rows = [{"id": "007", "a": "NA"}, {"id": "1.50", "a": ""}, {"id": 'x, "y"\nz', "a": "=1+1"}]
    assert list(source.rows()) == [(str(tmp_path), row) for row in rows]
    assert list(source.rows()) == list(source.rows())


def test_blank_lines_and_any_line_end_are_fine(tmp_path):
    for end in ("\n", "\r\n", "\r"):
        path = write(tmp_path / "x.csv", end.join(["", "id,a", "1,x", "2,y", "", "  ", ""]))
        assert rows_of(path) == [{"id": "1", "a": "x"}, {"id": "2", "a": "y"}]


def test_the_separator_is_taken_from_the_header_and_said_when_it_is_unusual(tmp_path):
    rows = [{"id": "1", "a": "x, y"}]
    for name, text, note in (
        ("x.tsv", "id\ta\n1\tx, y\n", None),
        ("x.csv", 'id,a\n1,"x, y"\n', None),
        ("europe.csv", "id;a\n1;x, y\n", "separated by semicolons"),
        ("tabs.csv", "id\ta\n1\tx, y\n", "separated by tabs"),
        ("commas.tsv", 'id,a\n1,"x, y"\n', "separated by commas"),
    ):
        path = write(tmp_path / name, text)
        assert rows_of(path) == rows
        assert open_source(path).notes == ([f"{path}: {note}"] if note else [])


def test_all_rows_of_another_length_are_named_with_their_lines(tmp_path):
    text = HEADER + '1,"two\nlines",x,y\n2,who, me?,x,y\n3,q,x,y\n4,q\n' + "5,q,x\n" * 7
    message = error_of(write(tmp_path / "x.csv", text))
    assert "rows longer and shorter than its header (4 cells)" in message
    assert "rows on line 4 (5 cells), on line 6 (2 cells), on line 7 (3 cells), " in message
    assert "(9 of 11)" in message and "needs quotes" in message
    assert "rows longer than its header" in error_of(write(tmp_path / "x.csv", HEADER + "1,q,x,y,\n"))


def test_rows_before_the_first_bad_one_come(tmp_path):
    rows = open_source(write(tmp_path / "x.csv", "id\n1\n2,3\n4\n")).rows()
    assert next(rows) == (str(tmp_path), {"id": "1"})
    with pytest.raises(InputError, match="row on line 3"):
        next(rows)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("", ["cannot be read as CSV", "empty"]),
        ("\n \n", ["cannot be read as CSV", "empty"]),
        ("id,a,a,b,b\n", ["more than one column 'a', 'b'"]),
        ("id,a, a\n", ["more than one column 'a'"]),
        (",id,a\n0,1,x\n", ["column 1 has no name (line 1)", "index=False"]),
        (
            'id,a\n1,x\n2,"y\n3,z\n',
            ["cannot be read as CSV: unexpected end of data", "begins on line 3", "never closed"],
        ),
        ('id,a\n1,"x" y\n', ["cannot be read as CSV", "begins on line 2", "not doubled"]),
        ("id,a\n1,x\n2,y\0\n", ["null byte on line 3"]),
        (b"id,a\n" + bytes(3000), ["null byte on line 2"]),
    ],
)
def test_a_csv_that_cannot_be_read_says_why_and_where(tmp_path, content, parts):
    message = error_of(write(tmp_path / "x.csv", content))
    for part in ["x.csv", *parts]:
        assert part in message


def test_a_header_alone_gives_no_rows(tmp_path):
    source = open_source(write(tmp_path / "x.csv", HEADER))
    assert source.columns == ["id", "question", "a", "b"] and list(source.rows()) == []


def test_endless_cells_rows_and_files_end_quickly(tmp_path, monkeypatch):
    million = 2**20
    monkeypatch.setattr("vqa_sft.data.read_text.MAX_CELL", 2 * million)
    monkeypatch.setattr("vqa_sft.data.read_text.MAX_ROW", 8 * million)
    for begin, chunk, part in (
        ("id,a\n1,", "x" * million, "larger than 8 MiB"),
        ('id,a\n1,"', "x\n" * (million // 2), "limit (2097152), in the row that begins on line 2"),
        ("", "x" * million, "larger than 8 MiB"),
        ("id,a\n", "x," * (million // 2), "larger than 8 MiB"),
        ('id,a\n"', '","\n' * (million // 4), "larger than 8 MiB"),
    ):
        path = tmp_path / "x.csv"
        with path.open("w") as file:
            file.write(begin)
            for _ in range(16):
                file.write(chunk)
        start = time.process_time()
        assert part in error_of(str(path))
        assert time.process_time() - start < 5


@pytest.mark.medium
def test_rows_are_read_without_holding_the_file(tmp_path):
    path = write(tmp_path / "x.csv", HEADER + "".join(f"{i},{'q' * 300},x,y\n" for i in range(30_000)))
    write(tmp_path / "x.jsonl", "".join(json.dumps({"id": i, "question": "q" * 300}) + "\n" for i in range(30_000)))
    for source in (path, str(tmp_path / "x.jsonl")):
        assert os.path.getsize(source) > 9e6
        tracemalloc.start()
        assert sum(1 for _ in open_source(source).rows()) == 30_000
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 5e6  # a chunk as bytes and as text, and what belongs to it


# --- Encodings


@pytest.mark.parametrize(
    ("encoding", "note"),
    [
        ("utf-8", None),
        ("utf-8-sig", None),
        ("utf-16", "UTF-16 text"),
        ("utf-16-le", "UTF-16-LE text"),
        ("utf-16-be", "UTF-16-BE text"),
        ("cp949", "CP949 text"),
    ],
)
def test_encodings_are_recognised_and_said(tmp_path, encoding, note):
    expected = [{"번호": "1", "질문": "사진 속 고양이는 무슨 색인가요?"}]
    for name, text in (("x.csv", KOREAN), ("x.jsonl", json.dumps(expected[0], ensure_ascii=False) + "\n")):
        path = write(tmp_path / name, text.encode(encoding))
        source = open_source(path)
        assert [row for _, row in source.rows()] == expected
        assert source.notes == ([f"{path}: {note}"] if note else [])


def test_big_endian_with_a_mark_and_the_commonest_syllable_are_read(tmp_path):
    # U+AC00 is a null byte on the other side.
    text = "id,question\n" + "1,가 나 가 나 가\n" * 5
    for encoding, mark in (("utf-16-be", b"\xfe\xff"), ("utf-16-le", b"\xff\xfe"), ("utf-16-le", b"")):
        path = write(tmp_path / "x.csv", mark + text.encode(encoding))
        assert rows_of(path) == [{"id": "1", "question": "가 나 가 나 가"}] * 5


def test_letters_cut_by_a_chunk_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("vqa_sft.data.find_encoding._CHUNK", 7)
    for encoding in ("utf-8", "utf-16", "cp949"):
        assert len(rows_of(write(tmp_path / "x.csv", (KOREAN + "2,가나다\n" * 9).encode(encoding)))) == 10


def test_the_first_bytes_that_are_no_text_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("vqa_sft.data.find_encoding._CHUNK", 8)
    content = KOREAN.encode() + b"2,\xff\n"
    place = content.index(b"\xff")
    message = error_of(write(tmp_path / "x.csv", content))
    assert f"not UTF-8 text (byte {place}): the file is damaged there" in message and "`encoding`" in message
    assert "not UTF-16 text" in error_of(write(tmp_path / "x.csv", "id\n1\n".encode("utf-16")[:-1]))


# Short and long texts of ten languages; the long ones of Korean, Chinese and Japanese are sure.
TEXTS = {
    "ko": (
        "고양이",
        "사진 속 고양이는 무슨 색인가요? 빨강, 노랑, 파랑, 초록. 탁자 위에 컵이 몇 개 있습니까? 왼쪽에 있는 표지판에는 "
        "무엇이라고 쓰여 있습니까? 다음 중 그래프에서 가장 높은 값을 가진 해는 언제인가?",
    ),
    "zh": (
        "红黄蓝绿",
        "这张图片里有多少只猫在桌子上面睡觉？左边的牌子上写着什么？下面哪一个是图中最高的建筑物？红色，黄色，蓝色，绿色。"
        "请问照片里的人正在做什么运动？他们穿的衣服是什么颜色的？河边停着几辆自行车？",
    ),
    "zh_tw": (
        "紅黃藍綠",
        "這張圖片裡有多少隻貓在桌子上面睡覺？左邊的牌子上寫著什麼？下面哪一個是圖中最高的建築物？紅色，黃色，藍色，綠色。"
        "請問照片裡的人正在做什麼運動？他們穿的衣服是什麼顏色的？河邊停著幾輛自行車？",
    ),
    "ja": (
        "赤青",
        "ねこはどんないろですか。この写真には何匹の犬が写っていますか。テーブルの上にあるカップの数を答えてください。"
        "左側の看板には何と書かれていますか。次のうち、グラフで最も高い値を示す年はどれですか。",
    ),
    "de": (
        "Ärger, 5°C",
        "Wie viele Bücher stehen über der Tür? Größer, kürzer, schöner, süßer. Übung für die Schüler. " * 9,
    ),
    "fr": ("José", "Où est le garçon à côté de la fenêtre ? Il a été déjà là, près de l'hôtel où l'on mange. " * 9),
    "pl": ("Łódź", "Ile kotów śpi na żółtej kanapie? Książka leży pod łóżkiem, a źrebię stoi obok gęsi. " * 9),
    "ru": ("кот", "Сколько кошек на картинке? Какого цвета машина слева от дома? Красная, жёлтая или синяя. " * 9),
    "el": ("γάτα", "Πόσες γάτες υπάρχουν στην εικόνα; Τι χρώμα έχει το αυτοκίνητο δίπλα στο σπίτι; " * 9),
    "th": ("แมว", "มีแมวกี่ตัวในภาพนี้ รถที่อยู่ข้างบ้านสีอะไร ผู้ชายคนนี้กำลังทำอะไรอยู่ " * 9),
}
WRITTEN = [
    *(("ko", "cp949"), ("zh", "gb18030"), ("zh_tw", "cp950"), ("zh_tw", "gb18030"), ("ja", "cp932"), ("ja", "euc_jp")),
    *(("de", "cp1252"), ("de", "mac_roman"), ("de", "cp850"), ("fr", "latin-1"), ("pl", "cp1250"), ("pl", "iso8859_2")),
    *(("ru", "cp1251"), ("ru", "koi8_r"), ("ru", "cp866"), ("el", "cp1253"), ("th", "cp874")),
]


@pytest.mark.parametrize(("language", "encoding"), WRITTEN)
@pytest.mark.parametrize("length", ["short", "long", "one row in a hundred thousand"])
def test_an_encoding_is_found_or_asked_for_and_never_mistaken(tmp_path, language, encoding, length):
    text = TEXTS[language][length != "short"]
    rows = ["ascii, only"] * (100_000 if "thousand" in length else 0) + [text]
    path = write(tmp_path / "x.csv", ("id,a\n" + "".join(f'1,"{row}"\n' for row in rows)).encode(encoding))
    assert [row["a"] for row in rows_of(path, encoding=encoding)] == rows
    if length != "short" and language in ("ko", "zh", "zh_tw", "ja"):
        source = open_source(path)
        assert [row["a"] for _, row in source.rows()] == rows and source.notes == [f"{path}: {encoding.upper()} text"]
    else:
        message = error_of(path)
        assert "what it is instead is not sure. Set `encoding` to the one that reads right: " in message
        readings = dict(re.findall(r"(\S+) reads '([^']*)", message))
        # Named, unless too short a word reads well in many encodings.
        word = next(word for word in text.split() if not word.isascii())[:8]
        assert word in readings.get(encoding, "") or word in " ".join(readings.values()) or length == "short"
    write(tmp_path / "x.csv", text)
    assert find_encoding(tmp_path / "x.csv") == "utf-8"


def test_candidates_are_named_with_what_they_read(tmp_path):
    message = error_of(write(tmp_path / "x.csv", "id,a\n1,红\n2,绿\n".encode("gbk")))
    assert "gb18030 reads '1,红'" in message and "cp949 reads '1,븐'" in message
    message = error_of(write(tmp_path / "x.csv", "id,a\n1,José Müller\n".encode("latin-1")))
    assert message.endswith("to the one that reads right: cp1252 reads '1,José Müller'. Or save it as UTF-8.")


def test_a_few_korean_syllables_are_enough_and_chinese_after_them_is_not_korean(tmp_path):
    korean = "id,a\n1,이 동물은 무엇인가요?\n".encode("cp949")
    assert rows_of(write(tmp_path / "x.csv", korean))[0]["a"] == "이 동물은 무엇인가요?"
    both = korean + f"2,{TEXTS['zh'][1]}\n".encode("gbk")
    assert "is not sure" in error_of(write(tmp_path / "x.csv", both))
    # After more than a part of the file, and more letters than anyone would look at.
    both = f"id,a\n1,{TEXTS['ko'][1]}\n".encode("cp949") * 5_000 + f"2,{TEXTS['zh'][1]}\n".encode("gbk") * 5_000
    assert "is not sure" in error_of(write(tmp_path / "x.csv", both))


def test_the_encoding_of_a_large_file_is_found_without_holding_it(tmp_path):
    for text in (TEXTS["ko"][1].encode("cp949"), TEXTS["zh"][1].encode("gbk")):
        path = write(tmp_path / "x.csv", b"id,a\n" + b"1,ascii\n" * 400_000 + (b"2," + text + b"\n") * 20_000)
        assert os.path.getsize(path) > 6e6
        tracemalloc.start()
        find_encoding(tmp_path / "x.csv")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 16e6  # two parts as bytes and as text


def test_a_wrong_encoding_is_an_error(tmp_path):
    path = write(tmp_path / "x.csv", "id,a\n1,é\n")
    assert "'klingon' is not known" in error_of(path, encoding="klingon")
    assert "'base64' is not known" in error_of(path, encoding="base64")
    assert "is not ascii text (byte 7)" in error_of(path, encoding="ascii")
    assert "is not utf-16 text (byte 0)" in error_of(path, encoding="utf-16")
    assert rows_of(write(tmp_path / "x.csv", KOREAN.encode("utf-8-sig")), encoding="utf-8")[0]["번호"] == "1"


# --- JSONL and JSON


def test_json_values_stay_values_and_missing_keys_give_none(tmp_path):
    rows = [{"id": 1, "choices": ["x", 2.5]}, {"id": "2", "hint": None}, {"choices": {"A": "x"}, "late": True}]
    expected = [{"id": None, "choices": None, "hint": None, "late": None} | row for row in rows]
    lines = "\n".join(map(json.dumps, rows))
    for name, text in (
        ("x.jsonl", f"{lines}\n\n"),
        ("x.json", f"\n{lines}"),
        ("list.json", json.dumps(rows)),
        ("list.json", json.dumps(rows, indent=2)),
    ):
        source = open_source(write(tmp_path / name, text))
        assert source.columns == ["id", "choices", "hint", "late"]
        assert list(source.rows()) == [(str(tmp_path), row) for row in expected] == list(source.rows())


def test_all_lines_that_are_no_objects_are_named(tmp_path):
    lines = ['{"id": 1}', '{"id": }', "[1]", '"x"', '{"id": NaN}', '{"id": -Infinity}', "[" * 100_000, '{"id": 2}']
    path = write(tmp_path / "x.jsonl", "\n".join(lines))
    message = error_of(path)
    for part in (
        "no JSON objects: rows on line 2 (Expecting value at character 8), on line 3 (list), on line 4 (str)",
        "on line 5 (NaN is no JSON; write null), on line 6 (-Infinity",
        ", ... (6 of 8)",
    ):
        assert part in message
    write(tmp_path / "x.jsonl", "[" * 100_000 + "\n")
    assert "nested too deeply" in error_of(path)
    write(tmp_path / "x.jsonl", '{"id": ' + "9" * 5_000 + "}\n")
    assert "on line 1 (Exceeds the limit" in error_of(path)


def test_a_json_list_that_cannot_be_read_says_why(tmp_path, monkeypatch):
    for text, part in (
        ('[{"id": 1},\n{"id": 2}', "cannot be read as JSON: Expecting ',' delimiter: line 2"),
        ('[{"id": 1}, 7, "x"]', "rows number 1 (int), number 2 (str) (2 of 3)"),
        ('[{"id": NaN}]', "NaN is no JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "has no rows"),
        ("{}", "has no rows"),
        ('{\n"id" 1\n}', "cannot be read as JSON: Expecting ':'"),
    ):
        assert part in error_of(write(tmp_path / "x.json", text))
    monkeypatch.setattr("vqa_sft.data.read_json.MAX_JSON_LIST", 10)
    assert "Write it as JSONL" in error_of(write(tmp_path / "x.json", json.dumps([{"id": 1}] * 10)))


def test_rows_under_their_ids_under_a_key_or_alone_are_found_and_said(tmp_path):
    rows = [{"question": f"Which, {i}?", "choices": ["x", "y"], "answer": i % 2} for i in range(3)]
    keyed = {f"k{i}": row for i, row in enumerate(rows)}
    with_keys = [row | {"id": key} for key, row in keyed.items()]
    own = {str(i): row | {"qid": f"q{i}"} for i, row in enumerate(rows)}
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    under_key = "one JSON object with a row under each key"
    for value, expected, note in (
        (keyed, with_keys, f"{under_key}, which is its id"),
        (own, list(own.values()), f"{under_key}, which is not its 'qid': ids are the latter"),
        ({row["qid"]: row for row in own.values()}, list(own.values()), under_key),
        (
            {"a": rows[0], "b": rows[1] | {"id": "x"}},
            [rows[0] | {"id": "a"}, rows[1] | {"id": "b"}],
            f"{under_key}, which is its id, as not every row has a 'id' of its own",
        ),
        ({"version": 1, "questions": rows}, rows, "rows are those under 'questions', without 'version'"),
        ({"info": {"by": "us"}, "data": rows, "tags": ["x"], "errors": []}, rows, None),
        ({"annotations": keyed}, with_keys, f"rows are those under 'annotations'; {under_key}, which is its id"),
        ({"data": own, "size": 3}, list(own.values()), None),
        (rows[0], rows[:1], "one JSON object, read as one row"),
        (rows[0] | {"options": [{"label": "A", "text": "x"}]}, None, "one JSON object, read as one row"),
        (columns, rows, "one JSON object of columns"),
        ({name: dict(enumerate(cells)) for name, cells in columns.items()}, rows, "one JSON object of columns"),
    ):
        path = write(tmp_path / "x.json", json.dumps(value, indent=1))
        source = open_source(path)
        expected = [value] if expected is None else expected
        names = list(dict.fromkeys(name for row in expected for name in row))
        assert sorted(source.columns) == sorted(names)
        assert [row for _, row in source.rows()] == [dict.fromkeys(names) | row for row in expected]
        assert note is None or source.notes == [f"{path}: {note}"]
        # The same in one line, and in a file that is said to hold lines.
        assert list(open_source(write(tmp_path / "x.json", json.dumps(value))).rows()) == list(source.rows())
        write(tmp_path / "x.jsonl", json.dumps(value, indent=1))
        assert list(open_source(str(tmp_path / "x.jsonl")).rows()) == list(source.rows())


def test_lists_and_lines_are_told_apart_whatever_the_suffix(tmp_path):
    rows = [{"id": 1, "a": "x"}, {"id": 2, "a": "y"}]
    lines, as_list = "\n".join(map(json.dumps, rows)), json.dumps(rows)
    for name, text, note in (
        ("x.json", f"\n{lines}\n", "one JSON object a line"),
        ("x.json", as_list, None),
        ("x.jsonl", as_list, "one JSON list"),
        ("x.ndjson", json.dumps(rows, indent=2), "one JSON list"),
        ("x.ndjson", lines, None),
        ("x.jsonl", f"[{json.dumps(rows[0])},\n{json.dumps(rows[1])}]", "one JSON list"),
    ):
        path = write(tmp_path / name, text)
        source = open_source(path)
        assert [row for _, row in source.rows()] == rows
        assert source.notes == ([f"{path}: {note}"] if note else [])
    # One line alone is a row where lines are promised, whatever its keys.
    odd = {"text": "Which?", "votes": [{"by": "me"}]}
    path = write(tmp_path / "x.jsonl", json.dumps(odd))
    assert rows_of(path) == [odd] and open_source(path).notes == []
    # A damaged first line is one row of several.
    assert "row on line 1 (Expecting" in error_of(write(tmp_path / "x.jsonl", '{"id": }\n{"id": 2}\n'))


def test_objects_that_hold_rows_in_several_places_are_refused_with_their_names(tmp_path):
    rows = [{"question": "Which?"}]
    for value, part in (
        ({"train": rows, "test": rows}, "under each of 'train', 'test'"),
        ({"images": [{"id": 1}], "annotations": rows, "info": {}}, "under each of 'images', 'annotations'"),
        ({"train": {"1": rows[0]}, "test": {"2": rows[0]}}, "under each of 'train', 'test'"),
        ({"prompt": "Answer.", "data": rows}, "may be one row, or hold its rows under 'data'"),
        ({"1": rows[0], "2": rows[0], "3": None}, "row under '3' (NoneType)"),
    ):
        assert part in error_of(write(tmp_path / "x.json", json.dumps(value)))


# --- Several files


def test_several_files_come_in_the_order_given_and_globs_sorted(tmp_path):
    for i, folder in ((2, "b"), (1, "b"), (3, "a")):
        (tmp_path / folder).mkdir(exist_ok=True)
        # A column may stand elsewhere.
        write(tmp_path / folder / f"part-{i}.csv", f"id,a\n{i},x\n" if i > 1 else f"a,id\nx,{i}\n")
    names = [str(tmp_path / name) for name in ("a/part-3.csv", "b/part-*.csv")]
    source = open_source(names)
    folders = [str(tmp_path / folder) for folder in "abb"]
    expected = [{"id": str(i), "a": "x"} for i in (3, 1, 2)]
    assert list(source.rows()) == list(zip(folders, expected, strict=True))
    assert source.columns == ["id", "a"] and source.name == f"{names[0]} and 2 more"
    assert [row["id"] for row in rows_of(str(tmp_path / "**" / "*.csv"))] == ["3", "1", "2"]


def test_files_with_other_columns_are_an_error_that_shows_the_difference(tmp_path):
    first, second = write(tmp_path / "1.csv", "id,a,b\n"), write(tmp_path / "2.csv", "id,c,b\n")
    assert f"{second} has 'c' and lacks 'a', unlike {first}" in error_of([first, second])


def test_notes_of_several_files_are_one(tmp_path):
    for i in range(3):
        write(tmp_path / f"{i}.csv", KOREAN.encode("cp949"))
    assert open_source(str(tmp_path / "*.csv")).notes == [f"{tmp_path / '0.csv'} and 2 more: CP949 text"]


def test_names_that_lead_nowhere_say_so(tmp_path):
    csv, jsonl = write(tmp_path / "x.csv", HEADER), write(tmp_path / "x.jsonl", "{}")
    (tmp_path / "folder").mkdir()
    for source, part in (
        (str(tmp_path / "nowhere.csv"), "no such file"),
        ([csv, str(tmp_path / "nowhere.csv")], "no such file"),
        (str(tmp_path / "part-*.csv"), "no file matches"),
        ([csv, jsonl], "must have one format; got .csv, .jsonl"),
        ([csv, str(tmp_path / "folder")], "is no file. A list"),
        (write(tmp_path / "x.txt", "x"), "not a CSV file"),
        (write(tmp_path / "empty.parquet", ""), "cannot be read as Parquet: it is empty"),
        ([], "no data is named"),
        ("", "no data is named"),
        ("nobody/nothing", "neither a file, nor a folder"),
        (str(tmp_path / "folder"), "neither a file, nor a folder"),
        ("null\0byte", "holds a null byte"),
    ):
        assert part in error_of(source)


def test_a_mistyped_path_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **how: pytest.fail("the Hub was asked"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    write(tmp_path / "data/train.csv", HEADER)
    for name in (
        "data/x",
        "./x",
        "../x",
        "a/b/c",
        str(tmp_path / "x"),
        "~/x",
        "data\\x",
        "x.zip",
        "a/x.XLSX",
        "a b",
        "훈련",
    ):
        assert error_of(name).startswith(f"no such file or folder: {name}. Check the path"), name
        assert ("launch where no folder is called data" in error_of(name)) == (name == "data/x")
    assert "There is data/train.csv." in error_of("data/train")


def test_names_that_the_hub_may_have_are_looked_for_there(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *args, **how: asked.append(name) or 1 / 0)
    monkeypatch.chdir(tmp_path)
    for name in ("squad", "derek-thomas/ScienceQA", "some_one/A.b-c_1.0"):
        assert "neither a file, nor a folder" in error_of(name) and asked.pop() == name


def test_a_name_with_the_marks_of_a_glob_is_a_file_first(tmp_path):
    write(tmp_path / "x[1].csv", "id\n7\n")
    datasets.Dataset.from_dict({"id": ["8"]}).to_parquet(tmp_path / "x[1].parquet")
    assert rows_of(str(tmp_path / "x[1].csv")) == [{"id": "7"}]
    assert rows_of(str(tmp_path / "x[1].parquet")) == [{"id": "8"}]


# --- Parquet, saved datasets, the Hub


@pytest.fixture
def images(tmp_path):
    """Three rows with images of every kind that a dataset may hold."""
    names = [str(tmp_path / f"{i}.png") for i in range(3)]
    for name in names:
        Image.new("RGB", (4, 4), "red").save(name)
    columns = {
        "id": ["1", "2", "3"],
        "label": [0, 1, 0],
        "path": names,
        "one": names,
        "many": [names[:i] for i in (0, 1, 2)],
    }
    columns |= {"raw": [b"x"] * 3, "pair": [{"bytes": b"x", "path": None}] * 3}
    features = {
        "id": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["cat", "dog"]),
        "path": datasets.Value("string"),
        "one": datasets.Image(),
        "many": datasets.List(datasets.Image()),
        "raw": datasets.Value("binary"),
        "pair": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
    }
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "saved", "saved splits", "hub"])
def test_rows_come_without_images_and_the_table_with_them_undecoded(tmp_path, images, kind, streaming):
    path = tmp_path / "hub" / "train.parquet"
    if kind == "saved":
        images.with_format("numpy").save_to_disk(tmp_path / "hub")
    elif kind == "saved splits":
        datasets.DatasetDict({"train": images, "test": images}).save_to_disk(tmp_path / "hub")
    else:
        path.parent.mkdir()
        images.to_parquet(path)
    source = open_source(str(path if kind == "parquet" else path.parent), streaming=streaming)
    assert source.columns == images.column_names and source.notes == []
    assert source.features["label"].names == ["cat", "dog"]
    rows = list(source.rows())
    expected = [{"id": row["id"], "label": row["label"], "path": row["path"]} for row in images]
    assert rows == [(str(path.parent) if kind == "parquet" else None, row) for row in expected] == list(source.rows())
    if kind.startswith("saved") and not streaming:  # nothing is copied to the cache
        assert all(file["filename"].startswith(str(tmp_path)) for file in source.table.cache_files)
    for row, full in zip(expected, source.table, strict=True):
        assert full["id"] == row["id"] and open_image(full["one"]).size == (4, 4)
        assert full["one"].keys() == {"bytes", "path"}
        assert len(full["many"]) == int(row["id"]) - 1 and all(
            item.keys() == {"bytes", "path"} for item in full["many"]
        )


def test_several_parquet_files_know_their_folders(tmp_path):
    names = []
    for folder, ids in (("b", ["1", "2"]), ("a", ["3"])):
        (tmp_path / folder).mkdir()
        names.append(str(tmp_path / folder / "x.parquet"))
        datasets.Dataset.from_dict({"id": ids}).to_parquet(names[-1])
    for streaming in (False, True):
        found = [
            (os.path.basename(folder), row["id"]) for folder, row in open_source(names, streaming=streaming).rows()
        ]
        assert found == [("b", "1"), ("b", "2"), ("a", "3")]
    datasets.Dataset.from_dict({"key": ["1"]}).to_parquet(names[1])
    assert "has 'key' and lacks 'id'" in error_of(names)


def test_a_parquet_file_that_changes_is_read_again(tmp_path):
    path = str(tmp_path / "x.parquet")
    for value in ("1", "2"):
        pandas.DataFrame({"id": [value]}).to_parquet(path)
        assert rows_of(path) == [{"id": value}]


def test_damaged_parquet_files_are_errors(tmp_path):
    path = tmp_path / "x.parquet"
    assert "cannot be read as Parquet" in error_of(write(path, b"id,a\n1,x\n" * 10))
    datasets.Dataset.from_dict({"id": [str(i * 7919) for i in range(5_000)]}).to_parquet(path)
    content = path.read_bytes()
    assert "cannot be read as Parquet" in error_of(write(path, content[:-100]))
    damaged = write(path, content[:200] + b"x" * 4_000 + content[4_200:])
    assert "cannot be read as Parquet: Corrupt snappy" in error_of(damaged)
    assert "cannot be read" in error_of(damaged, streaming=True)


@pytest.fixture
def hub(tmp_path):
    """A local copy of a Hub dataset with two configs of two splits each."""
    lines = ["---", "configs:"]
    for config in ("art", "law"):
        lines += [f"- config_name: {config}", "  data_files:"]
        (tmp_path / config).mkdir()
        for split in ("dev", "validation"):
            lines += [f"  - split: {split}", f"    path: {config}/{split}.parquet"]
            datasets.Dataset.from_dict({"id": [f"{config}_{split}"]}).to_parquet(tmp_path / config / f"{split}.parquet")
    (tmp_path / "README.md").write_text("\n".join([*lines, "---"]))
    return str(tmp_path)


@pytest.mark.parametrize("streaming", [False, True])
def test_splits_add_up_and_configs_follow_one_another(hub, streaming):
    def ids(**options):
        return [row["id"] for row in rows_of(hub, streaming=streaming, **options)]

    assert ids(config="law", split="dev") == ["law_dev"]
    assert ids(config="law", split="dev+validation") == ["law_dev", "law_validation"]
    assert ids(config=["law", "art"], split="dev") == ["law_dev", "art_dev"]


def test_missing_configs_and_splits_show_what_there_is(hub, tmp_path):
    assert "['art', 'law']" in error_of(hub, split="dev")
    assert "['art', 'law']" in error_of(hub, split="dev", config=["art", "music"])
    assert "['dev', 'validation']" in error_of(hub, config="art")
    saved = datasets.DatasetDict({name: datasets.Dataset.from_dict({"id": [name]}) for name in ("dev", "test")})
    saved.save_to_disk(tmp_path / "saved")
    assert "it has no split train, but dev, test" in error_of(str(tmp_path / "saved"))
    assert rows_of(str(tmp_path / "saved"), split="test+dev") == [{"id": "test"}, {"id": "dev"}]


def test_csv_files_of_a_hub_dataset_are_read_with_a_note_that_types_are_guessed(tmp_path):
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.csv", "id,a\n007,NA\n")
    write(tmp_path / "set" / "README.md", "---\nlicense: mit\n---\n")
    source = open_source(str(tmp_path / "set"))
    assert next(source.rows())[1] == {"id": 7, "a": None}
    assert "guesses the types" in source.notes[0]


# --- What people give in place of a file


def test_the_one_file_of_data_in_a_folder_is_read_and_several_are_named(tmp_path):
    folder = tmp_path / "set"
    (folder / "images").mkdir(parents=True)
    write(folder / "README.md", "# My data\n")
    path = write(folder / "rows.ndjson", '{"id": "007"}\n{"id": "008"}\n')
    source = open_source(str(folder))
    assert list(source.rows()) == [(str(folder), {"id": "007"}), (str(folder), {"id": "008"})]
    assert source.notes == [f"{folder}: the one file of data in it is rows.ndjson"]
    assert find_files([str(folder)]) == [folder / "rows.ndjson"]
    write(folder / "test.csv", HEADER)
    assert "a folder with 2 files of data: rows.ndjson, test.csv. Name the one" in error_of(str(folder))
    assert rows_of(path) == [{"id": "007"}, {"id": "008"}]


def test_archives_and_spreadsheets_say_what_makes_data_of_them(tmp_path):
    for name, part in (
        ("x.csv.gz", "gunzip -k "),
        ("my data.zip", "unzip '"),
        ("x.tar.gz", "tar -xf "),
        ("x.tgz", "tar -xf "),
        ("x.json.zst", "unzstd "),
        ("x.xlsx", "is a spreadsheet. Save it as CSV (UTF-8)"),
        ("X.ODS", "is a spreadsheet"),
    ):
        path = write(tmp_path / name, b"PK\x03\x04")
        message = error_of(path)
        assert part in message and path in message
        assert part in error_of([path])


def test_a_file_that_is_not_there_names_what_is_there_instead(tmp_path):
    write(tmp_path / "train.csv.gz", "x")
    assert "no such file" in error_of(str(tmp_path / "train.csv"))
    assert "gunzip -k" in error_of(str(tmp_path / "train.csv"))
    write(tmp_path / "Test.jsonl", "{}")
    assert f"There is {tmp_path / 'Test.jsonl'}" in error_of(str(tmp_path / "test.csv"))
    assert "relative to where you launched" in error_of(str(tmp_path / "nowhere" / "test.csv"))
