"""Commands on prediction files."""

from functools import partial
from typing import Annotated, Literal

from typer import Argument, Option

from vqa_sft.cli.options import AnswerOptions, DataOptions, with_options
from vqa_sft.errors import InputError

File = Annotated[str, Argument(metavar="FILE", help="prediction file")]
Overwrite = Annotated[bool, Option("--overwrite", help="replace a file with other columns")]


def no_data(data: str | None) -> None:
    """Raises InputError for --data with class probabilities."""
    if data is not None:
        raise InputError("--data is for predictions of choices: of class probabilities, no questions are shown.")


@with_options(AnswerOptions)
def score(
    predictions: Annotated[list[str], Argument(metavar="FILE", help="FILE.parquet or NAME=FILE.parquet")],
    options: AnswerOptions,
    answers: Annotated[
        str | None,
        Option(
            metavar="FILE",
            help="ids and answers, or data with answers, read as the run's data are; default: those of the predictions",
        ),
    ] = None,
    data: Annotated[
        str | None,
        Option(metavar="TEST", help="the data that were predicted, where answers are written as texts"),
    ] = None,
) -> None:
    """Print accuracy, NLL, Brier score and ECE of prediction files.

    NLL is in nats; ECE has bins of equal width, and of equally many rows; each metric has the 95% interval of 1,000
    bootstrap resamples. A calibrated file has a line without its calibration and a line with it.

    Example: vqa-sft score runs/a/validation.parquet mine=runs/b/validation.parquet
    """
    from vqa_sft.predictions.class_scores import score_classes
    from vqa_sft.predictions.class_tables import are_class_tables
    from vqa_sft.predictions.score import score_table, split_name

    if are_class_tables([split_name(item)[1] for item in predictions]):
        no_data(data)
        print(score_classes(predictions, answers, **options.read()))
        return
    print(score_table(predictions, answers, data, **options.read()))


@with_options(AnswerOptions)
def report(
    inputs: Annotated[list[str], Argument(metavar="FILE", help="prediction file or run folder, or NAME=either")],
    options: AnswerOptions,
    answers: Annotated[
        str | None,
        Option(metavar="FILE", help="ids and answers, or data with answers; default: those of the predictions"),
    ] = None,
    data: Annotated[
        str | None,
        Option(metavar="DATA", help="the data that were predicted: questions, choices, images; default: the run's own"),
    ] = None,
    output: Annotated[str, Option(metavar="HTML", help="page to write")] = "report.html",
    rows: Annotated[int, Option(metavar="N", help="rows on the page, at most")] = 1000,
) -> None:
    """Write a page about runs or prediction files.

    It has metrics, calibration, accuracy by kind of question, training curves, and the rows worth a look: confident
    errors, uncertain answers, rows whose permutations or runs disagree. Of several files, how each differs from the
    first, with paired intervals, and the rows that changed. The page is one file of at most 10 MB and needs no network.

    Example: vqa-sft report before=runs/old after=runs/mine --output report.html
    """
    from vqa_sft.predictions.class_tables import are_class_tables
    from vqa_sft.predictions.score import split_name
    from vqa_sft.report.report_page import write_report

    if are_class_tables([split_name(item)[1] for item in inputs], "report"):
        from vqa_sft.report.report_classes import write_class_report

        no_data(data)
        print(write_class_report(inputs, answers, output=output, **options.read()))
        return
    print(write_report(inputs, answers, data, output=output, max_rows=rows, **options.read()))


def calibrate(
    run_folder: Annotated[str, Argument(metavar="RUN", help="folder of a finished run, or of all its folds")],
    predictions: Annotated[
        str | None,
        Option(
            metavar="FILE",
            help="prediction file of this run with answers; default: out_of_fold.parquet in RUN, else "
            "validation.parquet",
        ),
    ] = None,
    output: Annotated[
        str | None, Option(metavar="OUT", help="where RUN is a file of class probabilities: the file to write")
    ] = None,
) -> None:
    """Fit a run's temperature on rows that it was not trained on.

    A bias of the letters is fitted too where it lowers the NLL of other rows, and of images at several scales the
    weight of each. All of it is written to calibration.json in RUN; later predictions with the same orders and scales
    use it. Prints NLL, Brier score and ECE before and after. Of class probabilities, which vqa-sft fuse writes, the
    temperature of --predictions goes to --output.

    Example: vqa-sft calibrate runs/mine
    """
    from vqa_sft.predictions.calibration import calibrate_run
    from vqa_sft.predictions.class_ensemble import calibrate_classes
    from vqa_sft.predictions.class_tables import are_class_tables

    if are_class_tables([run_folder]):
        print(calibrate_classes(run_folder, predictions, output))
        return
    if output is not None:
        raise InputError("--output is for class probabilities; the calibration of a run is written into its folder.")
    print(calibrate_run(run_folder, predictions))


def ensemble(
    predictions: Annotated[list[str], Argument(metavar="FILE", help="prediction files; the first gives the order")],
    output: Annotated[str, Option(metavar="OUT", help="prediction file to write (.parquet)")],
    average: Annotated[
        Literal["mean", "log", "vote"],
        Option(
            help="of probabilities, of their logarithms (the geometric mean), or of best choices: 0.99 of a vote goes "
            "to its choice, the rest to all"
        ),
    ] = "mean",
    weights: Annotated[
        str,
        Option(metavar="W", help="mean (equal), learned, numbers such as 0.6,0.4, or a file of --save-weights"),
    ] = "mean",
    learn_on: Annotated[
        list[str] | None,
        Option(
            metavar="FILE...",
            help="prediction files with answers, one for each FILE in their order, of rows that the runs were not "
            "trained on; learned weights that do no better there than equal ones are not used",
        ),
    ] = None,
    save_weights: Annotated[str | None, Option(metavar="JSON", help="write the weights, for --weights")] = None,
) -> None:
    """Write one prediction file from several.

    It holds a weighted mean of their calibrated probabilities. The files are of the same rows, aligned by id.

    Example: vqa-sft ensemble a/test.parquet b/test.parquet --output both.parquet --weights learned --learn-on
    a/out_of_fold.parquet b/out_of_fold.parquet
    """
    from vqa_sft.predictions.class_ensemble import ensemble_classes
    from vqa_sft.predictions.class_tables import are_class_tables
    from vqa_sft.predictions.ensemble import write_ensemble

    write = ensemble_classes if are_class_tables([*predictions, *(learn_on or [])], "ensemble") else write_ensemble
    ensemble = write(
        predictions, output, average=average, weights=weights, learn_on=learn_on or [], save_weights=save_weights
    )
    print(ensemble)


@with_options(DataOptions)
def submit(
    predictions: File,
    options: DataOptions,
    output: Annotated[str, Option(metavar="CSV", help="submission to write")],
    template: Annotated[
        str | None,
        Option(
            metavar="CSV",
            help="sample submission: a column with the ids of FILE, and one for the answer or one for the probability "
            "of each choice, or class",
        ),
    ] = None,
    answer_format: Annotated[
        Literal["letter", "index_from_0", "index_from_1", "text", "probabilities"] | None,
        Option(help="how answers are written; default: as in the template, else as in the run's data"),
    ] = None,
    data: Annotated[
        str | None,
        Option(
            metavar="TEST",
            help="the data that were predicted, for answers and columns that are texts of choices",
        ),
    ] = None,
    classes: Annotated[
        str | None,
        Option(metavar="FILE", help="of class probabilities: the list of classes, where a template uses other names"),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a submission from a prediction file.

    It has id and answer letter, or columns, rows and format of a template. Of class probabilities, it has one column a
    class, matched by name, or the name of the most likely class.

    Example: vqa-sft submit both.parquet --output submission.csv --template sample_submission.csv
    """
    from vqa_sft.predictions.class_submission import submit_classes
    from vqa_sft.predictions.class_tables import are_class_tables
    from vqa_sft.predictions.submission import submit as write_submission

    are_classes = are_class_tables([predictions], "submit")
    if are_classes:
        no_data(data)
    elif classes is not None:
        raise InputError("--classes is for class probabilities, which vqa-sft fuse writes.")
    own = partial(write_submission, data=data, **options.read())
    write = partial(submit_classes, classes=classes) if are_classes else own
    print(write(predictions, output, template=template, answer_format=answer_format, overwrite=overwrite))


@with_options(AnswerOptions)
def diff(
    before: Annotated[str, Argument(metavar="A")],
    after: Annotated[str, Argument(metavar="B")],
    options: AnswerOptions,
    data: Annotated[
        str | None, Option(metavar="TEST", help="the data: show the question and both choices of a changed row")
    ] = None,
    all_rows: Annotated[bool, Option("--all", help="name all changed rows, not the first 20")] = False,
) -> None:
    """Print which answers differ between two files.

    They are submissions (.csv) or prediction files (.parquet), and are aligned by id.

    Example: vqa-sft diff old.csv new.csv --data test.csv
    """
    from vqa_sft.predictions.class_scores import diff_classes
    from vqa_sft.predictions.class_tables import are_class_tables
    from vqa_sft.predictions.compare import describe

    if are_class_tables([before, after], "diff"):
        no_data(data)
        print(diff_classes(before, after, show_all=all_rows))
        return
    print(describe(before, after, data=data, show_all=all_rows, **options.read()))


def label_errors(
    predictions: Annotated[str, Argument(metavar="FILE", help="prediction file, or a run folder")],
    output: Annotated[str | None, Option(metavar="CSV", help="write a line for every row with an answer")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Print the rows whose given answer is improbable, which may be wrong.

    The model must not have been trained on the rows: of a run folder, they are the out-of-fold rows of `fold: all`, or
    the validation rows. They are ranked by the probability of their answer. A row is a likely error where another
    choice is better, and at least as probable as given answers are on average (confident learning).

    Example: vqa-sft label-errors runs/folds --output suspects.csv
    """
    from vqa_sft.predictions.label_errors import write_label_errors

    print(write_label_errors(predictions, output, overwrite=overwrite))


def uncertainty(
    predictions: File,
    coverage: Annotated[
        float | None, Option(metavar="SHARE", help="give sets of choices that hold the answer in this share of rows")
    ] = None,
    calibrate_on: Annotated[
        str | None,
        Option(
            metavar="HELD_OUT",
            help="prediction file with answers, scored as FILE is and with none of its rows, from which the size of "
            "the sets is learned: validation or out-of-fold rows, which share none with test rows",
        ),
    ] = None,
    output: Annotated[str | None, Option(metavar="CSV", help="write a line for every row")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Print how uncertain each answer is.

    Uncertainty is probability, margin over the second choice, and entropy. With --coverage, also sets of choices that
    hold the answer as often as asked. Where answers are known, also the error rate that is left when the most uncertain
    rows go to somebody else.

    Example: vqa-sft uncertainty test.parquet --coverage 0.9 --calibrate-on runs/mine/validation.parquet --output
    uncertainty.csv
    """
    from vqa_sft.predictions.class_scores import describe_uncertainty
    from vqa_sft.predictions.class_tables import are_class_tables
    from vqa_sft.predictions.uncertainty import describe

    if are_class_tables([predictions], "uncertainty"):
        with_sets = coverage is not None or calibrate_on is not None
        print(describe_uncertainty(predictions, with_sets=with_sets, output=output, overwrite=overwrite))
        return
    print(describe(predictions, coverage=coverage, calibrate_on=calibrate_on, output=output, overwrite=overwrite))
