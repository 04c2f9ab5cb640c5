"""The order of training rows where batches are padded, random batches of rows of like length, or where the classes of a
classification are balanced."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

NUM_SORTED = 50  # batches whose rows are sorted together; fewer where there are less than four times as many


class LengthSampler(Sampler[int]):
    """Rows are drawn in a random order, a share of them at a time is sorted and cut into batches, and the batches are
    drawn in a random order again. By the seed and the epoch alone: a resumed run and every process have the same. With
    the `classes` of all rows they are drawn by `draw_balanced`."""

    def __init__(
        self, lengths: Sequence[int], batch_size: int, seed: int, classes: Sequence[int] | None = None
    ) -> None:
        self.lengths, self.batch_size, self.seed, self.classes = lengths, batch_size, seed, classes
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """accelerate calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        size, num_rows = self.batch_size, len(self)
        share = size * max(1, min(NUM_SORTED, num_rows // (4 * size)))
        if self.classes is None:
            drawn = torch.randperm(num_rows, generator=generator).tolist()
        else:
            drawn = draw_balanced(self.classes, generator)
        for start in range(0, num_rows, share):
            drawn[start : start + share] = sorted(drawn[start : start + share], key=self.lengths.__getitem__)
        batches = [drawn[start : start + size] for start in range(0, num_rows, size)]
        # One that is not whole stays last: rows are taken from one batch after another.
        last = [batches.pop()] if num_rows % size else []
        order = torch.randperm(len(batches), generator=generator).tolist()
        return iter([row for batch in [*(batches[i] for i in order), *last] for row in batch])


class BalancedSampler(Sampler[int]):
    """Rows in the order of `draw_balanced`, by the seed and the epoch alone."""

    def __init__(self, classes: Sequence[int], seed: int) -> None:
        self.classes, self.seed, self.epoch = classes, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """accelerate calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.classes)

    def __iter__(self) -> Iterator[int]:
        return iter(draw_balanced(self.classes, torch.Generator().manual_seed(self.seed + self.epoch)))


def draw_balanced(classes: Sequence[int], generator: torch.Generator) -> list[int]:
    """As many rows as there are, in a random order, those of each class equally often, give or take one: of a rare
    class each row several times, of a frequent one some of them."""

    def shuffled(items: list[int]) -> list[int]:
        return [items[place] for place in torch.randperm(len(items), generator=generator).tolist()]

    rows_of: dict[int, list[int]] = {}
    for row, place in enumerate(classes):
        rows_of.setdefault(place, []).append(row)
    each, more = divmod(len(classes), len(rows_of))
    drawn: list[int] = []
    for number, place in enumerate(shuffled([*rows_of])):
        wanted, own = each + (number < more), rows_of[place]
        rows = own * (wanted // len(own)) + shuffled(own)[: wanted % len(own)]
        drawn += rows
    return shuffled(drawn)
