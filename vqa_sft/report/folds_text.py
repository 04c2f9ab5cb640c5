"""What `vqa-sft folds` prints."""

from collections import Counter
from collections.abc import Sequence

from vqa_sft.console import table
from vqa_sft.data.folds import Deviation


def describe_folds(folds: Sequence[int], groups: Sequence[int], deviation: Deviation, plain: Deviation | None) -> str:
    """What `vqa-sft folds` prints; `plain` is the deviation of scikit-learn's folds on the same rows."""
    sizes_of_groups = Counter(groups).values()
    repeated = [size for size in sizes_of_groups if size > 1]
    counts = Counter(folds)
    held = {fold: len({group for group, of in zip(groups, folds, strict=True) if of == fold}) for fold in counts}
    rows = [[str(fold), f"{counts[fold]:,}", f"{held[fold]:,}"] for fold in sorted(counts, key=lambda f: (f < 0, f))]
    several = f"{len(repeated):,} have several rows, the largest {max(repeated):,}." if repeated else None
    lines = [table([["fold", "rows", "groups"], *rows], left=0, indent=2), ""]
    lines.append(
        f"{len(folds):,} rows in {len(sizes_of_groups):,} groups that show the same image, or nearly the same; "
        + (several or "every row is a group of its own.")
    )
    lines.append(f"Largest deviation from an even split: {_say_deviation(deviation)}.")
    if plain is not None:
        lines.append(f"scikit-learn's StratifiedGroupKFold on the same rows: {_say_deviation(plain)}.")
    return "\n".join(lines)


def _say_deviation(deviation: Deviation) -> str:
    return (
        f"{deviation.stratum:.1f} rows of a stratum (answer, question type and number of choices together), "
        f"{deviation.part:.1f} of one of them alone, {deviation.size:.1f} of all rows"
    )
