import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from contest import noise, rows_of, write_contest, write_csv
from prediction_rows import drawn

from vqa_sft.cli.main import one_value_each
from vqa_sft.data.examples import read_examples
from vqa_sft.data.folds import read_folds
from vqa_sft.predictions.calibration import read_calibration
from vqa_sft.predictions.file import Predictions, write_predictions


@pytest.fixture
def clean(contest):
    """The contest with 24 images of which no two are alike."""
    for i, row in enumerate(rows_of(contest)):
        noise(contest / row["path"], i)
    return contest


@pytest.fixture
def faulty(clean):
    """Three rows that cannot be used."""
    rows = rows_of(clean)
    rows[1]["answer"], rows[2]["path"], rows[4]["id"] = "z", "images/nowhere.png", "row_003"
    write_csv(clean / "train.csv", rows)
    return clean


def write_recipe(folder, **values):
    defaults = {"model_name_or_path": "nowhere/model", "train_data": folder / "train.csv", "output_dir": folder / "run"}
    lines = [f"{key}: {json.dumps(value, default=str)}" for key, value in (defaults | values).items()]
    (folder / "recipe.yaml").write_text("\n".join(lines))
    return folder / "recipe.yaml"


# --- check ------------------------------------------------------------------------------------------------------------


def test_exit_codes_are_0_when_clean_1_with_errors_and_2_when_nothing_can_be_read(clean, faulty, run):
    code, out, _ = run("check", faulty / "test.csv")
    assert code == 2 and not out
    rows = rows_of(faulty)
    write_csv(faulty / "good.csv", [row for i, row in enumerate(rows) if i not in (1, 2, 4)])
    code, out, err = run("check", faulty / "good.csv")
    assert code == 0 and not err and "21 training rows, all of which can be used" in out
    code, out, _ = run("check", faulty / "train.csv")
    assert code == 1 and "24 training rows, of which 3 cannot be used" in out
    code, out, err = run("check", faulty / "nowhere.csv")
    assert code == 2 and not out and err.startswith("error: no such file")


def test_warnings_alone_are_clean(clean, run):
    write_csv(clean / "train.csv", [row | {"a": row["b"]} for row in rows_of(clean)])
    code, out, _ = run("check", clean / "train.csv")
    assert code == 0 and out.endswith("No row has an error; 24 rows with warnings.\n")


def test_json_replaces_the_table_or_goes_to_a_file(faulty, run):
    code, out, _ = run("check", faulty / "train.csv", "--json")
    assert code == 1 and json.loads(out)["data"][0]["usable_rows"] == 21
    code, table, _ = run("check", faulty / "train.csv", "--json", faulty / "report.json")
    assert "of which 3 cannot be used" in table
    assert json.loads((faulty / "report.json").read_text(encoding="utf-8")) == json.loads(out)
    assert run("check", faulty / "train.csv", "--json", faulty / "report.json")[0] == 1  # our own may be replaced


def test_the_page_is_written(faulty, run):
    assert run("check", faulty / "train.csv", "--html", faulty / "page.html")[0] == 1
    assert (faulty / "page.html").read_text(encoding="utf-8").count("<article") == 27


def test_nothing_of_others_is_overwritten(faulty, run):
    (faulty / "data.json").write_text('[{"a": 1}]')
    (faulty / "page.html").write_text("<!DOCTYPE html>mine")
    for option, name in (("--json", "data.json"), ("--html", "page.html")):
        before = (faulty / name).read_text()
        code, _, err = run("check", faulty / "train.csv", option, faulty / name)
        assert code == 2 and "is no report of `vqa-sft check`" in err and (faulty / name).read_text() == before
    code, _, err = run("check", faulty / "train.csv", "--json", faulty / "train.csv")
    assert code == 2 and "--json must end in .json" in err
    code, _, err = run("check", faulty / "train.csv", "--fix", faulty / "train.csv")
    assert code == 2 and "nothing is overwritten" in err


def test_fix_writes_a_clean_copy_and_lists_what_it_left_out(faulty, run):
    code, out, _ = run("check", faulty / "train.csv", "--fix", faulty / "fixed.csv")
    assert code == 1
    assert out.split("warnings.\n")[1].splitlines() == [
        f"Wrote {faulty}/fixed.csv: 21 rows, 3 left out.",
        "  duplicate id (1): row_003",
        "  the answer is none of the choices (1): row_001 ('z')",
        "  the image is missing (1): row_002 (images/nowhere.png)",
    ]
    assert run("check", faulty / "fixed.csv")[0] == 0
    with (faulty / "fixed.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == [row for i, row in enumerate(rows_of(faulty)) if i not in (1, 2, 4)]


def test_a_copy_in_another_folder_says_where_its_images_are(faulty, run, tmp_path):
    (tmp_path / "fixed").mkdir()
    _, out, _ = run("check", faulty / "train.csv", "--fix", tmp_path / "fixed/train.csv")
    assert f"read it with `image_root: {faulty}`" in out
    assert run("check", tmp_path / "fixed/train.csv", "--image-root", faulty)[0] == 0
    assert run("check", tmp_path / "fixed/train.csv")[0] == 1


def test_fix_is_not_had_with_a_limit(faulty, run):
    code, _, err = run("check", faulty / "train.csv", "--limit", 5, "--fix", faulty / "fixed.csv")
    assert code == 2 and "limit checks its first rows only" in err


def test_a_copy_by_a_list_of_ids_needs_one_list_of_these_data(clean, run):
    ids = clean / "ids.txt"
    ids.write_text("row_003\nrow_1\n")
    fix = ("--fix", clean / "fixed.csv")
    for options, says in (
        (("--only", ids), "give --fix OUT too"),
        (("--only", ids, "--without", ids, *fix), "Give one of them"),
        (("--without", ids, *fix), f"{clean}/train.csv lacks row row_1 (1 of 2) of {ids}"),
        (("--only", clean / "nowhere.txt", *fix), "nowhere.txt cannot be read as a list of ids"),
        (("--only", clean / "images/000.png", *fix), "cannot be read as a list of ids"),
    ):
        code, out, err = run("check", clean / "train.csv", *options)
        assert code == 2 and not out and says in err and len(err.splitlines()) == 1, err
    ids.write_text("\n")
    assert "names no row" in run("check", clean / "train.csv", "--only", ids, *fix)[2]
    ids.write_text("\n".join(row["id"] for row in rows_of(clean)))
    _, out, err = run("check", clean / "train.csv", "--without", ids, *fix, "--json", "-")
    assert json.loads(out) and err == f"No row is left, so {clean}/fixed.csv was not written.\n"
    assert not (clean / "fixed.csv").exists()


def test_a_data_file_takes_the_options_that_say_how_it_is_read(clean, run):
    rows = [
        {"key": r["id"], "photo": r["path"], "ask": r["question"], "x": "1", "y": "2", "z": "3", "gold": "3"}
        for r in rows_of(clean)
    ]
    write_csv(clean / "other.csv", rows)
    columns = "{id: key, image: photo, question: ask, choices: [x, y, z], answer: gold}"
    options = ("--columns", columns, "--answer-format", "index_from_1", "--limit", 6)
    code, out, err = run("check", clean / "other.csv", *options)
    assert code == 0 and "6 training rows" in out and "answer: gold (index_from_1)" in out and "C: 6 (100.0%)" in out
    code, _, err = run("check", clean / "other.csv", "--columns", "{ask: question}")
    assert code == 2 and "columns knows id" in err
    code, _, err = run("check", clean / "train.csv", "--learning_rate", "1e-4")
    assert code == 2 and "--learning_rate is no option for a data file; only a recipe has more fields than " in err
    code, _, err = run("check", clean / "train.csv", "--answer-format", "roman")
    assert code == 2 and "'letter' or 'index_from_0'" in err


def test_a_recipe_brings_its_data_and_says_why_tokens_were_not_counted(clean, run):
    write_csv(clean / "validation.csv", rows_of(clean)[:5])
    write_csv(clean / "train.csv", rows_of(clean)[5:])
    recipe = write_recipe(clean, validation_data=clean / "validation.csv")
    code, out, _ = run("check", recipe, "--test", clean / "test.csv", "--distance", "null")
    assert code == 0
    assert "19 training rows" in out and "5 validation rows" in out and "24 test rows" in out
    assert "tokens          not counted: the model 'nowhere/model' cannot be loaded" in out
    assert "the image is also in the training set: rows row_005 (row_005 there)" in out
    assert "(19 of 24)" in out  # the other five are those of the validation rows


def test_a_recipes_tokens_are_counted_at_its_pixel_limits_which_may_be_overridden(clean, families, run):
    recipe = write_recipe(clean, model_name_or_path=families("qwen2_5_vl"), max_pixels=56 * 56, min_pixels=28 * 28)
    longest = []
    for override in ((), ("--max_pixels", 112 * 112)):
        _, out, _ = run("check", recipe, "--json", "--max-length", 40, *override)
        tokens = json.loads(out)["data"][0]["tokens"]
        assert tokens["rows"] == 24 and tokens["max_length"] == 40 and tokens["cut_share"] == tokens["cut_rows"] / 24
        longest.append(tokens["max"])
    assert longest[0] < longest[1]
    _, out, _ = run("check", recipe)
    assert "images: at most 3,136 pixels, 4 tokens each (Qwen2_5_VL: 28 px a token)" in out


def test_a_streaming_recipe_says_how_it_is_checked(clean, run):
    recipe = write_recipe(clean, streaming=True, max_steps=5)
    code, _, err = run("check", recipe)
    assert code == 2 and "--streaming false" in err
    assert run("check", recipe, "--streaming", "false", "--limit", 5)[0] == 0


# --- folds ------------------------------------------------------------------------------------------------------------


def test_folds_are_written_shown_and_read_again(clean, run):
    out_file = clean / "folds.csv"
    code, out, _ = run("folds", clean / "train.csv", "--num-folds", 3, "--output", out_file)
    assert code == 0 and "24 rows in 24 groups" in out and "StratifiedGroupKFold" in out
    assert out.endswith(f"  folds_file: {out_file}\n  fold: 0\n")
    ids = [row["id"] for row in rows_of(clean)]
    folds = read_folds(out_file, ids)
    assert sorted(folds) == [0] * 8 + [1] * 8 + [2] * 8
    # The same again is no other; other folds are not written over these unless that is asked for.
    assert run("folds", clean / "train.csv", "--num-folds", 3, "--output", out_file)[0] == 0
    code, _, err = run("folds", clean / "train.csv", "--num-folds", 4, "--output", out_file)
    assert code == 2 and "holds other folds" in err and read_folds(out_file, ids) == folds
    assert run("folds", clean / "train.csv", "--num-folds", 4, "--output", out_file, "--overwrite")[0] == 0
    assert set(read_folds(out_file, ids)) == {0, 1, 2, 3} and not list(clean.glob("*.new"))


def test_rows_with_one_image_share_a_fold_and_the_seed_counts(clean, run):
    rows = rows_of(clean)
    for row, other in zip(rows[12:], rows, strict=False):
        row["path"] = other["path"]
    write_csv(clean / "train.csv", rows)
    found = []
    for seed in (1, 2):
        out_file = clean / f"folds_{seed}.csv"
        _, out, _ = run("folds", clean / "train.csv", "--num-folds", 2, "--output", out_file, "--seed", seed)
        assert "24 rows in 12 groups" in out and "12 have several rows, the largest 2." in out
        found.append(read_folds(out_file, [row["id"] for row in rows]))
        assert found[-1][:12] == found[-1][12:]
    assert found[0] != found[1]


def test_a_hold_out_is_fold_0_and_the_rest_is_always_trained_on(clean, run):
    code, out, _ = run("folds", write_recipe(clean, seed=7), "--holdout", 0.25, "--output", clean / "folds.csv")
    assert code == 0
    folds = read_folds(clean / "folds.csv", [row["id"] for row in rows_of(clean)])
    assert sorted(folds) == [-1] * 18 + [0] * 6
    assert [line.split() for line in out.splitlines()[1:4]] == [
        ["fold", "rows", "groups"],
        ["0", "6", "6"],
        ["-1", "18", "18"],
    ]


def test_rows_with_errors_get_no_folds(faulty, run):
    code, _, err = run("folds", faulty / "train.csv", "--num-folds", 2, "--output", faulty / "folds.csv")
    assert code == 2 and "has rows that cannot be used" in err and "row_001 ('z')" in err
    assert not (faulty / "folds.csv").exists()


def test_folds_do_not_replace_what_is_none(clean, run):
    for name, says in (("train.csv", "is no file of `vqa-sft folds`"), ("folds.txt", "--output must end in .csv")):
        options = ("--num-folds", 2, "--output", clean / name, "--overwrite")
        code, _, err = run("folds", clean / "train.csv", *options)
        assert code == 2 and says in err
    assert len(read_examples(str(clean / "train.csv")).examples) == 24
    code, _, err = run("folds", clean / "train.csv", "--num-folds", 2, "--output", clean / "f.csv", "--seed", -1)
    assert code == 2 and "seed must be between 0 and" in err


def test_a_command_refuses_options_that_it_does_not_have(tmp_path, run):
    write_contest(tmp_path, num_rows=2)
    code, _, err = run("score", "a.parquet", "--fast")
    assert code == 2 and err == (
        "error: No such option: --fast (Possible options: --data, --split). See `vqa-sft score --help`.\n"
    )


def test_a_wrong_use_is_told_in_one_line(run):
    for arguments, says in (
        ((), "Missing command. See `vqa-sft --help`."),
        (("chekc", "train.csv"), "No such command 'chekc'. Did you mean 'check'? See `vqa-sft --help`.\n"),
        (("score",), "Missing argument 'FILE'. See `vqa-sft score --help`."),
        (("ensemble", "a", "b", "--output"), "Option '--output' requires an argument."),
        (("export", "a", "b", "--dtype", "fp8"), "'--dtype': 'fp8' is not one of 'bf16', 'fp16', 'fp32'. See"),
        (("soup", "a", "--output", "o", "--weights", "x"), "'--weights': must be a number; got 'x'. See `vqa-sft soup"),
        (("folds", "a.csv", "--output", "f", "--num-folds", "2.5"), "must be a whole number; got '2.5'. See"),
        (("folds", "train.csv", "--output", "f.csv"), "give --num-folds N or --holdout SHARE"),
        (("memory", "recipe.yaml", "--images", 0), "--images must be above 0; got 0"),
    ):
        code, out, err = run(*arguments)
        assert code == 2 and not out and err.startswith("error: ") and says in err and err.count("\n") == 1, err


@pytest.mark.parametrize("name", ["train", "predict"])
def test_train_and_predict_are_the_scripts_of_recipes(name, run):
    script = {"train": "sft", "predict": "predict"}[name]
    code, out, _ = run(name, "--help")
    assert code == 0 and out.startswith("--accelerate_config NAME_OR_FILE") and f"recipes/{script}.py" in out
    code, _, err = run(name, "--config", "nowhere.yaml")
    assert code == 2 and err == "error: no such yaml: nowhere.yaml.\n"
    code, _, err = run(name, "--num-processes", 2)
    assert code == 2 and "--num_processes goes with --accelerate_config" in err


def test_options_are_spelt_with_hyphens_or_underscores_and_take_several_values():
    names, several = {"--learn-on", "--output", "--json", "--max-length", "--use-cpu"}, {"--learn-on"}
    for given, plain in (
        ("--learn_on a b --output c", "--learn-on=a --learn-on=b --output c"),
        ("x --learn-on=a b", "x --learn-on=a b"),
        ("--json --max_length=3", "--json=- --max-length=3"),
        ("--json", "--json=-"),
        ("--json - --json a_b.json", "--json - --json a_b.json"),
        ("--max_pixels 3 --keep_rows={a_b: --c_d}", "--max_pixels 3 --keep_rows={a_b: --c_d}"),
        ("--learn-on --output", "--learn-on --output"),
        ("--use-cpu data --use_cpu", "--use-cpu data --use-cpu"),
        ("a --use_cpu true b --use_cpu=true", "a --use-cpu b --use-cpu"),
        ("a --use_cpu false --use-cpu=false", "a"),
    ):
        assert one_value_each(given.split(" "), names, several, {"--use-cpu"}) == plain.split(" ")


def test_the_help_and_every_command_of_it_import_no_package_that_they_do_not_need(run):
    code, out, _ = run("--help")
    commands = [line.split()[0] for line in out.partition("Commands:\n")[2].splitlines()]
    assert code == 0 and len(commands) == 20 and {"train", "uncertainty", "memory"} <= {*commands}
    check = "import sys; from vqa_sft.cli.main import main\ntry: main()\nexcept SystemExit: pass\n"
    check += "sys.exit(str([m for m in sys.modules if m.split('.')[0] in ('torch', 'numpy', 'datasets', 'rich')]))"
    for command in ("score", "check"):
        done = subprocess.run([sys.executable, "-c", check, command, "--help"], capture_output=True, text=True)
        assert done.stderr == "[]\n" and f"Usage: vqa-sft {command}" in done.stdout


# --- after predicting -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        "score",
        "report",
        "calibrate",
        "ensemble",
        "submit",
        "diff",
        "uncertainty",
        "label-errors",
        "blind",
        "candidates",
        "fuse",
    ],
)
def test_help_says_what_a_command_does_with_an_example(command, run):
    code, out, _ = run(command, "--help")
    assert code == 0 and f"Example: vqa-sft {command} " in " ".join(out.split()) and "%%" not in out


def test_every_command_of_the_docs_exists_with_its_options(run):
    texts = [path.read_text(encoding="utf-8") for path in (Path(__file__).parents[2] / "docs").rglob("*.md")]
    lines = [line.strip() for text in texts for line in text.replace("\\\n", " ").splitlines()]
    commands = [line.split() for line in lines if line.startswith("vqa-sft ") and line.split()[1] != "COMMAND"]
    assert {"score", "calibrate", "ensemble", "submit", "diff", "uncertainty", "export"} <= {w[1] for w in commands}
    for words in commands:
        _, shown, _ = run(words[1], "--help")
        assert all(word in shown for word in words if word.startswith("--")), words


def test_from_validation_to_submission(tmp_path, run):
    """Calibrate, ensemble, submit, diff and uncertainty, each on what the one before it wrote."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    logits, answers = drawn(100, 2.0)
    validation = Predictions([f"v{i}" for i in range(100)], logits, answers, {"run": str(folder)})
    write_predictions(folder / "validation.parquet", validation)
    code, out, _ = run("calibrate", folder)
    assert code == 0 and out.split()[:5] == ["accuracy", "nll", "brier", "ece", "ece_equal_mass"]
    metadata = {"calibration": read_calibration(folder, {}).as_dict}
    ids = [f"t{i}" for i in range(100)]
    for name, seed in (("a", 1), ("b", 2)):
        predictions = Predictions(ids, drawn(100, 2.0, seed)[0], [None] * 100, metadata)
        predictions.choice_logits = [[*row[:2]] for row in predictions.choice_logits]
        write_predictions(tmp_path / f"{name}.parquet", predictions)
    a, b, both = (tmp_path / f"{name}.parquet" for name in ("a", "b", "both"))
    assert run("ensemble", a, b, "--output", both, "--weights", "3,1", "--average", "log")[0] == 0
    assert run("submit", both, "--output", tmp_path / "s.csv")[0] == 0
    code, out, _ = run("diff", both, tmp_path / "s.csv")
    assert code == 0 and "0 of 100 answers changed" in out
    code, out, _ = run("diff", a, both, "--all")
    assert code == 0 and "Largest change of a probability" in out
    options = ("--coverage", 0.8, "--calibrate-on", folder / "validation.parquet", "--output", tmp_path / "d.csv")
    code, out, _ = run("uncertainty", a, *options)
    assert code == 0 and "Sets for a coverage of 80%" in out and len((tmp_path / "d.csv").read_text().split()) == 101


@pytest.mark.parametrize(
    "arguments",
    [
        ("score", "nowhere.parquet"),
        ("report", "nowhere.parquet"),
        ("calibrate", "nowhere"),
        ("ensemble", "nowhere.parquet", "nothing.parquet", "--output", "out.parquet"),
        ("submit", "nowhere.parquet", "--output", "s.csv"),
        ("diff", "nowhere.csv", "nowhere.csv"),
        ("uncertainty", "nowhere.parquet"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(tmp_path, monkeypatch, run, arguments):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments)
    assert code == 2 and not out and err.startswith("error: no such ") and len(err.splitlines()) == 1
    assert not [*tmp_path.iterdir()]


def test_answers_beside_predictions_take_the_options_of_data(tmp_path, run):
    predictions = Predictions(["x", "y", "z"], [[-0.1, -2.0], [-2.0, -0.1], [-0.1, -2.0]], [None] * 3)
    write_predictions(tmp_path / "p.parquet", predictions)
    (tmp_path / "a.csv").write_text("key;right;part\nx;1;test\ny;2;test\nz;1;test\n")
    named = ("--columns", "{id: key, answer: right}", "--answer-format", "index_from_1")
    code, out, _ = run("score", tmp_path / "p.parquet", "--answers", tmp_path / "a.csv", *named)
    assert code == 0 and "1.0000" in out
    code, _, error = run("score", tmp_path / "p.parquet", "--answers", tmp_path / "a.csv")
    assert code == 2 and "--columns '{id: ..., answer: ...}'" in error
    code, _, error = run("score", tmp_path / "p.parquet", "--answers", tmp_path / "a.csv", *named[:3], "roman")
    assert code == 2 and "must be 'letter' or" in error
    code, _, error = run("score", tmp_path / "p.parquet", "--answers", tmp_path / "a.csv", "--columns", "{ids: key}")
    assert code == 2 and "columns knows id" in error
    (tmp_path / "t.csv").write_text(
        "key;path;question;one;two;part\n"
        + "".join(
            f"{i};{i}.png;Which?;cat;dog;{part}\n"
            for i, part in (("x", "test"), ("x", "old"), ("y", "test"), ("z", "test"))
        ),
        encoding="utf-16",
    )
    how = ("--columns", "{choices: [one, two], id: key}", "--keep-rows", "{part: test}", "--encoding", "utf-16")
    submit = ("submit", tmp_path / "p.parquet", "--output", tmp_path / "s.csv", "--answer-format", "text")
    code, _, error = run(*submit, "--data", tmp_path / "t.csv", *how)
    assert run(*submit[:4], "--answer-format", "probabilities", "--overwrite")[0] == 0
    (tmp_path / "s.csv").unlink()
    code, _, error = run(*submit, "--data", tmp_path / "t.csv", *how)
    assert (code, error) == (0, "") and (tmp_path / "s.csv").read_text() == "id,answer\nx,cat\ny,dog\nz,cat\n"
