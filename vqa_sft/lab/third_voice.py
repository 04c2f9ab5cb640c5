"""Many classes: does the hidden state at the answer position say what classifier and model do not?

    python -m vqa_sft.lab.classification --set drawn --priors cnn --use_cpu     # first
    python -m vqa_sft.lab.third_voice --set drawn --prior cnn --use_cpu

The base reads every image with the question alone, without candidates. Its hidden state where the answer would begin is
what a linear probe learns from, out of fold; training rows choose the layer. (arXiv 2603.24181 takes attention heads,
few-shot.) The probe's table and that of the classifier are averaged, with weights that training rows choose, and the
average takes the classifier's place in the fusion.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from trl import ModelConfig

from vqa_sft.console import progress
from vqa_sft.data.class_probs import ClassProbs, keep_likely, read_class_probs, write_class_probs
from vqa_sft.errors import exits_with_message
from vqa_sft.lab.class_sets import QUESTIONS, ClassRow, read_rows
from vqa_sft.lab.classification import METRICS, PRIORS, difference_to, markdown, run_command, with_labels
from vqa_sft.models.load import load_model, load_processor
from vqa_sft.models.probe import LinearProbe, cross_fit
from vqa_sft.predictions.class_ensemble import fit_temperature, learn, mean_of, tempered
from vqa_sft.predictions.class_metrics import losses_of, with_intervals
from vqa_sft.predictions.metrics import describe
from vqa_sft.tiny import TINY_PATH

BATCH_SIZE = 50


@exits_with_message
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=[*QUESTIONS], required=True)
    parser.add_argument("--prior", choices=[*PRIORS], required=True)
    parser.add_argument("--work", type=Path, help="that of lab.classification; default: runs/classification/SET")
    parser.add_argument("--way", choices=["one", "all"], default="all", help="of one fold in one order, or of all")
    parser.add_argument("--use_cpu", action="store_true", help="do not use the GPU")
    args = parser.parse_args()
    work = args.work or Path("runs/classification") / args.set
    device = torch.device("cuda" if torch.cuda.is_available() and not args.use_cpu else "cpu")
    names, train, test = read_rows(work / "data")
    labels = [{row.row_id: row.label for row in rows} for rows in (train, test)]

    hidden = hear_hidden_states(names, [train, test], QUESTIONS[args.set], device)
    files = [work / args.prior / f"{part}.parquet" for part in ("train", "test")]
    prior = [with_labels(read_class_probs(file), names, own) for file, own in zip(files, labels, strict=True)]
    prior = at_temperature(*prior)
    weights, *_ = learn([prior[0], hidden[0]])
    shares = [0.5, 0.5] if weights is None else [*map(float, weights)]
    both = [mean_of([one, other], shares) for one, other in zip(prior, hidden, strict=True)]

    folder = work / args.prior
    own = read_class_probs(folder / f"{args.way}_fused.parquet")
    files = [folder / f"both_{part}.parquet" for part in ("train", "test")]
    for file, part, table in zip(files, both, prior, strict=True):
        write_class_probs(file, replace(part, metadata=table.metadata))
    options = {"prior": files[1], "fit": folder / f"{args.way}_held_out.parquet", "fit_prior": files[0]}
    fused = folder / f"{args.way}_fused_with_hidden.parquet"
    fused.unlink(missing_ok=True)
    run_command("fuse", options | {"output": fused}, [folder / f"{args.way}_test.parquet"])

    without, with_hidden = (with_labels(table, names, labels[1]) for table in (own, read_class_probs(fused)))
    tables = {"hidden state alone": hidden[1], f"{PRIORS[args.prior]} alone": prior[1], "both": both[1]}
    tables |= {"fused": without, "fused, with the hidden state": with_hidden}
    lines = [["", *METRICS.values(), "log loss - fused without it"]]
    for way, table in tables.items():
        lines.append([way, *describe(with_intervals(table), [*METRICS]), difference_to(without, table)])
    share = f"The hidden state's share of the average: {shares[1]:.2f}, by training rows out of fold."
    print(f"{markdown(lines)}\n\n{share}")


def hear_hidden_states(
    names: Sequence[str], parts: Sequence[Sequence[ClassRow]], question: str, device: torch.device
) -> list[ClassProbs]:
    """Tables of a linear probe on the hidden states of the best layer: training rows out of fold, test rows."""
    features = [hidden_states(part, question, device) for part in parts]  # (N, layers, D)
    train, test = parts
    labels, folds = [row.label for row in train], [row.fold for row in train]
    best: tuple[float, list[ClassProbs]] | None = None
    for layer in range(features[0].shape[1]):
        fitted = cross_fit(LinearProbe(), features[0][:, layer], labels, folds, len(names), device)
        found = [fitted.out_of_fold, fitted.predict(features[1][:, layer])]
        tables = [
            replace(
                keep_likely([row.row_id for row in part], names, probs, source="the probe"),
                labels=np.array([row.label for row in part], np.int32),
            )
            for part, probs in zip(parts, found, strict=True)
        ]
        loss = float(losses_of(tables[0]).mean())
        print(f"layer {layer}: log loss {loss:.3f} of training rows, out of fold")
        if best is None or loss < best[0]:
            best = loss, tables
    assert best is not None
    return best[1]


@torch.inference_mode()
def hidden_states(rows: Sequence[ClassRow], question: str, device: torch.device) -> np.ndarray:
    """(N, layers + 1, D) float32 of the base, at the last token of the prompt. The images are of one size, so no row is
    padded."""
    processor = load_processor(str(TINY_PATH))
    args = ModelConfig(model_name_or_path=str(TINY_PATH), dtype=None)
    model = load_model(args, "fp32").to(device).eval()
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    found = []
    for start in progress(range(0, len(rows), BATCH_SIZE), desc="Hidden states"):
        images = [[Image.open(row.path).convert("RGB")] for row in rows[start : start + BATCH_SIZE]]
        inputs = processor(text=[prompt] * len(images), images=images, return_tensors="pt").to(device)
        assert bool(inputs["attention_mask"].all())
        hidden = model(**inputs, output_hidden_states=True, logits_to_keep=1).hidden_states
        found.append(torch.stack([layer[:, -1] for layer in hidden], dim=1).float().cpu().numpy())
    return np.concatenate(found)


def at_temperature(train: ClassProbs, test: ClassProbs) -> list[ClassProbs]:
    """Both tables at the temperature that suits the training rows."""
    temperature = fit_temperature(train)
    return [tempered(table, temperature) for table in (train, test)]


if __name__ == "__main__":
    main()
