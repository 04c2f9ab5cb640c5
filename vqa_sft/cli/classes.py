"""Commands on class probabilities."""

from typing import Annotated

from typer import Argument, Option


def fuse(
    predictions: Annotated[
        list[str],
        Argument(metavar="TEST", help="prediction files of one set of rows, with candidates; several are averaged"),
    ],
    output: Annotated[str, Option(metavar="OUT", help="file of class probabilities to write (.parquet)")],
    prior: Annotated[
        str | None,
        Option(metavar="FILE", help="class probabilities of these rows; default: those that gave their candidates"),
    ] = None,
    fit: Annotated[
        list[str] | None,
        Option(
            metavar="FILE...",
            help="prediction files with labels, of rows that the runs were not trained on, or run folders; default: "
            "the out-of-fold or validation rows of the runs. Those of the same rows are averaged",
        ),
    ] = None,
    fit_prior: Annotated[
        str | None,
        Option(
            metavar="FILE",
            help="class probabilities of the rows of --fit, out of fold; default: those that gave their candidates",
        ),
    ] = None,
) -> None:
    """Fuse a model's choices among candidates with the classifier that gave them.

    Writes the probabilities of all classes. How much each counts is fitted on rows with labels, in a 5-fold
    cross-validation; where fusing is no better than the classifier or the model alone, the better of these is used.

    Example: vqa-sft fuse runs/mine/test.parquet --output fused.parquet
    """
    from vqa_sft.predictions.fuse import fuse_files

    print(fuse_files(predictions, prior=prior, fit=fit or [], fit_prior=fit_prior, output=output))
