"""Score the letters of every question with fine-tuned runs, or with a base model, and write a submission.

    accelerate launch recipes/predict.py --run runs/demo --data data/numbers/test.csv --output runs/demo/submission.csv
    accelerate launch recipes/predict.py --run runs/fold0 runs/fold1 --orders rotations --data test.csv --output out.csv
    accelerate launch recipes/predict.py --run runs/demo --part validation --orders rotations --output validation.csv
    accelerate launch recipes/predict.py --run none --model Qwen/Qwen2.5-VL-7B-Instruct --max_pixels 200704 \\
        --data test.csv --output zero_shot/submission.csv
    accelerate launch recipes/predict.py --config predict.yaml --batch_size 8

Any field can be in a yaml, and be given again on the command line. One forward a batch, the letters' logits at the last
prompt position. Beside the submission (id and answer letter, in the data's own format) a prediction file is written,
submission.parquet, with log-probabilities of every choice. Of several runs each has a prediction file too, and the
submission is of their average.

Scores are saved in submission.csv.parts/ as they are computed: the same command resumes after an interruption.
"""

import shutil
import signal
import sys
from pathlib import Path

from vqa_sft.environment import set_library_defaults

set_library_defaults()

from vqa_sft.config.fields import describe_fields
from vqa_sft.config.prediction import PredictionArguments, read_prediction
from vqa_sft.console import is_main_process, note
from vqa_sft.errors import exits_with_message, explains_breakdown
from vqa_sft.files import held
from vqa_sft.inference.plan import describe_plan, find_runs, plan_passes
from vqa_sft.inference.results import check_outputs, describe_answers, describe_run, style_of, write_results
from vqa_sft.inference.rows import find_blank, read_rows
from vqa_sft.predictions.calibration import worth_of_scales
from vqa_sft.predictions.check_file import ANSWERS
from vqa_sft.predictions.file import classes_as
from vqa_sft.runs.folder import Run


@exits_with_message
def main() -> None:
    if "--help" in sys.argv or "-h" in sys.argv:
        print(f"{__doc__}\nFields:\n{describe_fields(PredictionArguments)}")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what is scored is written first

    # What to score, and how: all of it is in the run folders.
    args = read_prediction(sys.argv[1:])
    runs = find_runs(args)
    for each in args.apart:
        check_outputs(each, runs)
    # Of several processes of one launch the main one holds it for all.
    outputs = [args.output, *(each.output for each in args.apart)]
    with held(outputs if is_main_process() else [], "--output"):
        predict(args, runs)
    from vqa_sft.models import processes

    processes.leave()


def predict(args: PredictionArguments, runs: list[Run]) -> None:
    # Rows. A template of other rows, a damaged calibration and bad images are found before anything is scored.
    rows = read_rows(args, runs)
    style = style_of(args, rows)
    about = [{run.folder: describe_run(each, run) for run in runs} for each in args.apart]
    notes = [*rows.notes, *style.notes]
    if args.part == "all":
        notes += worth_of_scales([run.folder for run in runs if run.folder], args.views.metadata)
    for text in dict.fromkeys(notes):
        note(text)
    args.views.check(rows.num_choices)
    # Training looked at the images of its own rows; those of a stream are looked at block by block.
    looks_now = is_main_process() and args.part == "all" and not args.streaming
    blank = find_blank(rows.sources[0], args.on_bad_row) if looks_now else {}

    from vqa_sft.inference.passes import join_processes, open_parts, score_passes
    from vqa_sft.inference.scorer import groups_of
    from vqa_sft.models import processes

    join_processes(args.use_cpu)
    blank = processes.from_main(blank)

    # Plan: which runs one model scores together, and what an interrupted prediction with the same plan has scored.
    groups = groups_of(runs, args.use_cpu)
    for group in groups[1:]:
        names = ", ".join(run.folder for run in group.runs)
        note(f"Speed: the base is loaded again for {names}: another base, prompt, image size or adapter.")
    passes = plan_passes(groups, runs, rows, args.images)
    with explains_breakdown(f"for {args.output}", lambda: "resumes with what was scored."):
        plan = describe_plan(args, groups, rows) if is_main_process() else {}
        opened = open_parts(Path(args.output), plan) if is_main_process() else None
        parts, is_resumed = processes.from_main(opened)
        if is_resumed:
            note(f"Resuming with what {parts} holds.")

        # Score
        score_passes(args, rows, passes, parts, blank)

        # Write
        if is_main_process():
            written_as = describe_answers(args, rows)
            for each, of_runs in zip(args.apart, about, strict=True):
                metadata = [
                    of_runs[run.folder]
                    | {"prompts_digest": run.prompts.digest, "precision": group.precision, ANSWERS: written_as}
                    | classes_as(rows.sources[-1])
                    for group in groups
                    for run in group.runs
                ]
                own = [number for number, of_pass in enumerate(passes) if [of_pass.images] == each.images]
                print(write_results(each, rows, style, metadata, parts, own))
            shutil.rmtree(parts)


if __name__ == "__main__":
    main()
