"""Commands on class probabilities."""

from typing import Annotated

from typer import Argument, Option


def fuse(
    predictions: Annotated[
        list[str],
        Argument(metavar="TEST", help="prediction files of one set of rows, with candidates; several are averaged"),
    ],
    prior: Annotated[str, Option(metavar="FILE", help="class probabilities of these rows, which gave the candidates")],
    fit: Annotated[
        list[str],
        Option(
            metavar="FILE...",
            help="prediction files with labels, of rows that the runs were not trained on: validation or out-of-fold "
            "rows. Those of the same rows are averaged",
        ),
    ],
    fit_prior: Annotated[str, Option(metavar="FILE", help="class probabilities of the rows of --fit, out of fold")],
    output: Annotated[str, Option(metavar="OUT", help="file of class probabilities to write (.parquet)")],
) -> None:
    """Fuse a model's choices among candidates with the classifier that gave them.

    Writes the probabilities of all classes. How much each counts is fitted on rows with labels, in a 5-fold
    cross-validation; where fusing is no better than the classifier or the model alone, the better of these is used.

    Example: vqa-sft fuse preds/test.parquet --prior cands/test.parquet --fit preds/oof.parquet --fit-prior
    cands/train.parquet --output fused.parquet
    """
    from vqa_sft.predictions.fuse import fuse_files

    print(fuse_files(predictions, prior=prior, fit=fit, fit_prior=fit_prior, output=output))
