"""A merged run against base and adapter: in plain transformers, and in predict; and what cannot be merged."""

import json
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace as Of

import pytest
import torch
from contest import write_hard_contest
from peft import LoraConfig, get_peft_model
from quantised import save_quantised
from safetensors.torch import load_file, save_file
from scripts import run_script
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import ModelConfig

from vqa_sft.batch.collator import AnswerCollator
from vqa_sft.batch.prompts import Prompts, render_messages, render_prompt
from vqa_sft.batch.template import answer_prefix
from vqa_sft.data.examples import load_examples
from vqa_sft.data.options import ReadOptions
from vqa_sft.errors import InputError
from vqa_sft.files import UNFINISHED
from vqa_sft.images import open_image
from vqa_sft.models.load import load_processor, load_trained
from vqa_sft.models.scoring import find_letter_ids, letter_logits
from vqa_sft.predictions.calibration import read_calibration
from vqa_sft.predictions.file import read_predictions
from vqa_sft.runs import export, folder as run_folder
from vqa_sft.runs.export import export_run
from vqa_sft.runs.soup import CONFIG, WEIGHTS, make_soup
from vqa_sft.tiny import TINY_PATH

pytestmark = pytest.mark.usefixtures("one_thread")
ADAPTED = ("tiny", "tiny tower", "qwen2_5_vl", "qwen3_vl", "llava", "smolvlm")


@pytest.fixture(scope="module")
def train(families, tmp_path_factory):
    """`train("llava", key=value)`: the folder of a short run on that family, trained once a module."""
    folder, done = tmp_path_factory.mktemp("merge"), {}
    contest = write_hard_contest(folder / "contest")

    def run(name, **own):
        if name not in done:
            family = name.split()[0]
            values = {"model_name_or_path": str(TINY_PATH) if family == "tiny" else families(family)}
            values |= {"train_data": contest / "train.csv", "output_dir": folder / name.replace(" ", "_")}
            values |= {"max_steps": 4, "learning_rate": 1e-2, "use_cpu": True, "dataloader_num_workers": 0}
            values |= {"per_device_train_batch_size": 8, "gradient_checkpointing": False, "disable_tqdm": True} | own
            if name == "tiny tower":
                values |= {"adapt_tower": True, "adapt_merger": True}
            run_script("sft", *(str(token) for key, value in values.items() for token in (f"--{key}", value)))
            done[name] = folder / name.replace(" ", "_")
        return done[name]

    run.contest = contest
    return run


def base_of(run):
    return run_folder.read_run(run).base_model


def rows_of(contest):
    return list(load_examples(str(contest / "train.csv"), ReadOptions(limit=3))[0])


@torch.no_grad()
def ours(run, contest, source="run"):
    """Letter logits (3, 4) of base and adapter, or of the base alone, in fp32, by the code that trains and predicts."""
    args = ModelConfig(model_name_or_path=base_of(run), dtype="float32")
    model = load_trained(str(run) if source == "run" else "none", args, "fp32").eval()
    processor = load_processor(str(run))
    batch = AnswerCollator(processor, Prompts(), 4)(rows_of(contest))
    return letter_logits(model, batch, find_letter_ids(processor, 4))


@torch.no_grad()
def plain(folder, contest):
    """The same of a merged folder, by transformers alone and row by row."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    found = []
    for row in rows_of(contest):
        messages = render_messages(row, (0, 1, 2, 3), Prompts())
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        inputs = processor(text=[text], images=[open_image(row["images"][0])], return_tensors="pt")
        spaces = answer_prefix(processor, {})[1]
        ids = [processor.tokenizer(spaces + letter, add_special_tokens=False)["input_ids"][-1] for letter in "ABCD"]
        found.append(model(**inputs).logits[0, -1, ids])
    return torch.stack(found)


def predict(run, contest, output):
    arguments = ["--run", run, "--data", contest / "test.csv", "--output", output, "--limit", 12]
    run_script("predict", *arguments, "--use_cpu", "--num_workers", 0)
    return read_predictions(output.with_suffix(".parquet")).choice_logits


def copy_of(run, folder):
    return shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoint-*"))


def set_recipe(run, **values):
    content = json.loads((run / run_folder.RUN).read_text())
    content["recipe"] |= values
    (run / run_folder.RUN).write_text(json.dumps(content))


@pytest.mark.parametrize("name", ADAPTED)
def test_a_merged_run_scores_the_letters_in_plain_transformers_as_base_and_adapter_do(train, tmp_path, name):
    run = train(name)
    said = export_run(str(run), str(tmp_path / "out"), dtype="fp32")
    assert "fp32" in said and not (tmp_path / "out" / CONFIG).exists()
    merged, expected = plain(tmp_path / "out", train.contest), ours(run, train.contest)
    assert_close(merged, expected, atol=1e-4, rtol=0)
    assert (expected - ours(run, train.contest, source="base")).abs().max() > 0.1  # there is something to merge


@pytest.mark.parametrize("name", ["tiny", "llava"])
def test_predict_gives_the_same_answers_for_the_run_and_for_what_it_was_merged_to(train, tmp_path, name):
    run = copy_of(train(name), tmp_path / "run")
    calibration = {"orders identity": {"temperature": 1.5, "bias": None}}
    (run / "calibration.json").write_text(json.dumps(calibration))
    export_run(str(run), str(tmp_path / "out"), dtype="fp32")
    assert json.loads((tmp_path / "out" / "calibration.json").read_text()) == calibration
    assert (tmp_path / "out" / "rows.csv").read_bytes() == (run / "rows.csv").read_bytes()
    before = predict(run, train.contest, tmp_path / "run.csv")
    after = predict(tmp_path / "out", train.contest, tmp_path / "out.csv")
    assert_close(torch.tensor(after), torch.tensor(before), atol=1e-4, rtol=0)
    assert (tmp_path / "out.csv").read_text() == (tmp_path / "run.csv").read_text()


@pytest.mark.parametrize(
    "how", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": []}]
)
def test_input_and_output_embeddings_part_where_an_adapter_changes_one_of_them(train, tmp_path, how):
    """The tiny base has one matrix for both."""
    run = copy_of(train("tiny"), tmp_path / "run")
    base = AutoModelForImageTextToText.from_pretrained(TINY_PATH, dtype=torch.float32)
    torch.manual_seed(0)
    adapted = get_peft_model(base, LoraConfig(**{"target_modules": ["q_proj"]} | how, init_lora_weights=False))
    for name, weight in adapted.named_parameters():
        if weight.requires_grad and "modules_to_save" in name:
            weight.data += 0.02 * torch.randn_like(weight)
    adapted.save_pretrained(run)
    export_run(str(run), str(tmp_path / "out"), dtype="fp32")
    assert_close(plain(tmp_path / "out", train.contest), ours(run, train.contest), atol=1e-4, rtol=0)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    is_tied = how == {"modules_to_save": []}
    assert config["tie_word_embeddings"] is is_tied and config["text_config"]["tie_word_embeddings"] is is_tied
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) is not is_tied


def test_weights_have_the_dtype_of_the_base_or_that_which_is_asked_for(train, families, tmp_path):
    for name, asked, expected in (("tiny", None, "bfloat16"), ("llava", None, "float32"), ("tiny", "fp16", "float16")):
        out = tmp_path / f"{name}_{asked}"
        export_run(str(train(name)), str(out), dtype=asked)
        assert {str(w.dtype) for w in load_file(out / "model.safetensors").values()} == {f"torch.{expected}"}
        assert json.loads((out / "config.json").read_text())["dtype"] == expected
    rounded = plain(tmp_path / "tiny_None", train.contest)
    assert_close(rounded, ours(train("tiny"), train.contest), atol=0.3, rtol=0)


def test_weights_are_cut_into_shards(train, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "SHARD", "4MB")
    export_run(str(train("tiny")), str(tmp_path / "out"), dtype="fp32")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    assert_close(plain(tmp_path / "out", train.contest), ours(train("tiny"), train.contest), atol=1e-4, rtol=0)


def test_an_adapter_of_a_4_bit_base_is_merged_into_the_unquantised_one_with_a_note(train, tmp_path, capsys):
    run = train("tiny 4 bit", load_in_4bit=True)
    export_run(str(run), str(tmp_path / "out"), dtype="fp32")
    assert "in 4 bit and goes with its unquantised weights now: probabilities may differ" in capsys.readouterr().out
    # `ours` loads the base unquantised: that is what the adapter was merged into.
    assert_close(plain(tmp_path / "out", train.contest), ours(run, train.contest), atol=1e-4, rtol=0)
    assert "load_in_4bit" not in run_folder.read_run(tmp_path / "out").recipe
    assert len(predict(tmp_path / "out", train.contest, tmp_path / "out.csv")) == 12


def test_an_adapter_of_an_fp8_base_is_merged_into_the_whole_one_with_a_note(train, tmp_path, capsys):
    run = train("tiny fp8", base_precision="fp8")
    export_run(str(run), str(tmp_path / "out"), dtype="fp32")
    assert "in FP8 and goes with its unquantised weights now: probabilities may differ" in capsys.readouterr().out
    assert "base_precision" not in run_folder.read_run(tmp_path / "out").recipe


def test_whole_weights_are_exported_as_they_are(train, tmp_path):
    export_run(str(train("tiny")), str(tmp_path / "out"), dtype="fp32")
    export_run(str(tmp_path / "out"), str(tmp_path / "again"))
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert (tmp_path / "again" / "decision.json").is_file()


def test_a_soup_is_merged_as_a_run_is(train, tmp_path):
    make_soup([str(train("tiny")), str(train("tiny"))], str(tmp_path / "soup"))
    export_run(str(tmp_path / "soup"), str(tmp_path / "out"), dtype="fp32")
    assert_close(plain(tmp_path / "out", train.contest), ours(train("tiny"), train.contest), atol=1e-4, rtol=0)


def test_the_command_writes_a_folder_with_a_card_and_replaces_only_its_own(train, tmp_path, run):
    trained, out = train("tiny"), tmp_path / "out"
    out.mkdir()  # an empty folder will do
    code, printed, _ = run("export", trained, out, "--dtype", "bf16")
    assert code == 0 and f"Wrote {out}" in printed
    assert "AutoModelForImageTextToText.from_pretrained(folder)" in (out / "README.md").read_text()
    code, _, error = run("export", trained, out)
    assert code == 2 and "holds an earlier export" in error and "--overwrite" in error and "Traceback" not in error
    export_run(str(trained), str(out), dtype="fp32", overwrite=True)
    assert {weight.dtype for weight in load_file(out / "model.safetensors").values()} == {torch.float32}
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_merged_fold_has_the_temperature_of_all_folds(train, tmp_path):
    fold = copy_of(train("tiny"), tmp_path / "run" / "fold1")
    (tmp_path / "run" / "out_of_fold.parquet").touch()
    of_all = {"orders identity": {"temperature": 1.5, "bias": None}, "orders all": {"temperature": 2.0, "bias": None}}
    (tmp_path / "run" / "calibration.json").write_text(json.dumps(of_all))
    (fold / "calibration.json").write_text('{"orders all": {"temperature": 3.0, "bias": null}}')
    export_run(str(fold), str(tmp_path / "out"))
    for views, temperature in (("identity", 1.5), ("all", 3.0)):
        for folder in (fold, tmp_path / "out"):
            assert read_calibration(folder, {"orders": views}).temperature == temperature


def refused(match, run, out, **how):
    """Nothing is left where something is refused, and what was there is as it was."""
    before = {path: path.read_bytes() for path in out.parent.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=match):
        export_run(str(run), str(out), **how)
    assert {path: path.read_bytes() for path in out.parent.rglob("*") if path.is_file()} == before
    assert not out.with_name(f"{out.name}.part").exists()


def test_what_cannot_be_merged_is_an_error_and_an_earlier_merge_stays(train, families, tmp_path, monkeypatch):
    run, out = train("tiny"), tmp_path / "here" / "out"
    export_run(str(run), str(out))
    refused("no such run folder", tmp_path / "nowhere", out, overwrite=True)
    refused("holds an earlier export", run, out)
    refused("already holds full weights and no adapter", out, out.parent / "new", adapter=True)

    bare = copy_of(run, tmp_path / "bare")
    (bare / CONFIG).unlink()
    refused("holds no adapter", bare, out, overwrite=True)

    diverged = copy_of(run, tmp_path / "diverged")
    save_file({n: w * float("nan") for n, w in load_file(run / WEIGHTS).items()}, diverged / WEIGHTS)
    refused("has diverged", diverged, out, overwrite=True)
    save_file(dict(list(load_file(run / WEIGHTS).items())[2:]), diverged / WEIGHTS)
    refused("does not load on", diverged, out, overwrite=True)

    elsewhere = copy_of(run, tmp_path / "elsewhere")
    set_recipe(elsewhere, model_name_or_path=str(tmp_path / "gone"))
    refused("cannot be loaded; check the network, or give --model", elsewhere, out, overwrite=True)
    set_recipe(elsewhere, model_name_or_path=families("llava"))
    refused("does not load on", elsewhere, out, overwrite=True)
    set_recipe(elsewhere, model_name_or_path=str(out))
    refused("holds what is read", elsewhere, out, overwrite=True)

    set_recipe(elsewhere, model_name_or_path=str(tmp_path / "gone"))
    export_run(str(elsewhere), str(tmp_path / "found"), model=str(TINY_PATH))
    refused("has no adapter and needs no base", out, tmp_path / "found", overwrite=True, model="x")
    weights = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "found"))
    assert all(torch.equal(one, other) for one, other in zip(*(each.values() for each in weights), strict=True))

    (out.parent / "file").write_text("mine")
    refused("is a file", run, out.parent / "file")
    refused("cannot be written", run, out.parent / "file" / "out")
    refused("is not empty and holds no earlier export", run, out.parent, overwrite=True)
    (out.parent / "new.part").mkdir()
    (out.parent / "new.part" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="is none of ours"):
        export_run(str(run), str(out.parent / "new"))
    assert (out.parent / "new.part" / "mine.txt").read_text() == "mine"

    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    room = "take 0.01 GiB in fp32, and 0.00 GiB are free .* or give --dtype bf16"
    refused(room, run, out, overwrite=True, dtype="fp32")


@pytest.mark.parametrize("inside_text", [False, True])
@pytest.mark.parametrize(("kind", "said"), [("awq", "awq, 4 bit"), ("bitsandbytes 8 bit", "8 bit")])
def test_a_quantised_base_is_not_merged_and_the_unquantised_one_can_be_given(
    train, families, tmp_path, kind, said, inside_text
):
    base = save_quantised(families("llava"), kind, tmp_path / "base", inside_text=inside_text)
    run, out = copy_of(train("llava"), tmp_path / "run"), tmp_path / "here" / "out"
    set_recipe(run, model_name_or_path=base)
    out.parent.mkdir()
    refused(rf"is quantised itself \(.*{said}\).* give --model", run, out)
    export_run(str(run), str(out), dtype="fp32", model=families("llava"))
    assert_close(plain(out, train.contest), ours(train("llava"), train.contest), atol=1e-4, rtol=0)


@pytest.mark.parametrize("inside_text", [False, True])
def test_an_fp8_base_is_unpacked_and_merged_whole(train, families, tmp_path, capsys, inside_text):
    base = save_quantised(families("llava"), "fp8", tmp_path / "base", inside_text=inside_text)
    run, out = copy_of(train("llava"), tmp_path / "run"), tmp_path / "out"
    set_recipe(run, model_name_or_path=base)
    export_run(str(run), str(out), dtype="fp32")
    assert "is quantised itself (fp8): its weights are unpacked, and written whole" in capsys.readouterr().out
    assert "quantization_config" not in (out / "config.json").read_text()
    assert_close(plain(out, train.contest), ours(run, train.contest), atol=1e-4, rtol=0)


def test_a_merge_that_is_interrupted_leaves_what_was_there(train, tmp_path, monkeypatch):
    run, out = train("tiny"), tmp_path / "here" / "out"
    export_run(str(run), str(out))
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "_describe", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_run(str(run), str(out), overwrite=True)
    assert [*out.parent.iterdir()] == [out] and {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_folder_that_a_killed_merge_left_is_no_obstacle(train, tmp_path):
    part = tmp_path / "out.part"
    part.mkdir()
    for name in (UNFINISHED, "model.safetensors"):
        (part / name).write_text("half")
    export_run(str(train("tiny")), str(tmp_path / "out"))
    assert not part.exists() and (tmp_path / "out" / "run.json").is_file()


@pytest.mark.parametrize(("name", "letters"), [("tiny", list("ABCD")), ("llava", [" A", " B", " C", " D"])])
def test_what_the_docs_send_to_a_server_is_the_prompt_of_the_run(train, tmp_path, monkeypatch, name, letters):
    """Their Python block, with a server that answers with probabilities of the tokens that it is asked for, and one
    that was sampled."""
    sent = {}

    def create(**request):
        sent.update(request)
        asked = request["extra_body"]["logprob_token_ids"]
        top = [Of(token=f"token_id:{token}", logprob=-n) for n, token in enumerate([*asked[1:], 0, asked[0]])]
        return Of(choices=[Of(logprobs=Of(content=[Of(top_logprobs=top)]))])

    openai = ModuleType("openai")
    openai.OpenAI = lambda **options: Of(chat=Of(completions=Of(create=create)))
    monkeypatch.setitem(sys.modules, "openai", openai)
    (tmp_path / "runs").mkdir()
    copy_of(train(name), tmp_path / "runs" / "mine")
    (tmp_path / "photo.png").write_bytes(b"pixels")
    monkeypatch.chdir(tmp_path)
    docs = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    (block,) = (found for found in re.findall(r"```python\n(.*?)```", docs, re.DOTALL) if "OpenAI" in found)
    exec(block, found := {})

    asked = sent["extra_body"]
    assert found["before"] == "" and asked["chat_template_kwargs"] == {} and asked["return_tokens_as_token_ids"]
    assert asked["logprob_token_ids"] == asked["allowed_token_ids"]
    expected = torch.tensor([-4.0, 0.0, -1.0, -2.0]).softmax(0).tolist()
    assert found["probs"] == pytest.approx(expected)
    # The server calls an image by the name that templates know.
    for message in sent["messages"]:
        for part in message["content"]:
            part["type"] = part["type"].removesuffix("_url")
    processor = load_processor("runs/mine")
    assert [processor.tokenizer.decode([token]) for token in asked["allowed_token_ids"]] == letters
    text = processor.apply_chat_template(sent["messages"], add_generation_prompt=True, tokenize=False)
    assert text == render_prompt(processor, found["row"], (0, 1, 2, 3), Prompts())
