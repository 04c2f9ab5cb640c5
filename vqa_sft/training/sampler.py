"""The order of training rows where batches are padded, random batches of rows of like length; where the classes of a
classification are balanced; and where several processes have packed rows, the same steps, dealt evenly."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import DataLoader, Sampler

NUM_SORTED = 50  # batches whose rows are sorted together; fewer where there are less than four times as many


@dataclass(frozen=True)
class Order:
    """What training rows are ordered by, a value of each: with `lengths`, those of like length are in one batch; with
    `tokens`, the batches of several processes are even; with classes `balanced`, these are drawn equally often."""

    lengths: Sequence[int] | None = None
    tokens: Sequence[int] | None = None
    balanced: Sequence[int] | None = None


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


class EvenSampler(Sampler[int]):
    """The rows of another sampler, step by step: those of each step are dealt to its `num_batches` batches so that
    these have about as many `tokens`. Processes wait for the one that has the most."""

    def __init__(self, sampler: Sampler[int], tokens: Sequence[int], batch_size: int, num_batches: int) -> None:
        self.sampler, self.tokens, self.batch_size, self.num_batches = sampler, tokens, batch_size, num_batches

    def set_epoch(self, epoch: int) -> None:
        """accelerate calls it."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        rows = [*self.sampler]
        size = self.batch_size * self.num_batches
        for start in range(0, len(rows), size):
            step = rows[start : start + size]
            # The last step of an epoch may not be whole, and accelerate adds rows to it.
            yield from self._deal(step) if len(step) == size else step

    def _deal(self, rows: list[int]) -> list[int]:
        """The longest first, each to the batch with the fewest tokens among those that have room."""
        batches: list[list[int]] = [[] for _ in range(self.num_batches)]
        totals = [0] * self.num_batches
        for row in sorted(rows, key=self.tokens.__getitem__, reverse=True):
            open_ones = [place for place, batch in enumerate(batches) if len(batch) < self.batch_size]
            place = min(open_ones, key=totals.__getitem__)
            batches[place].append(row)
            totals[place] += self.tokens[row]
        return [row for batch in batches for row in batch]


def order_for_processes(loader: DataLoader, num_batches: int, tokens: Sequence[int] | None = None) -> None:
    """Complete a `loader` that accelerate made for one of several processes, each of which takes every so many-th
    batch: with `tokens` of the rows, the `num_batches` of a step are even."""
    shard = loader.batch_sampler
    if not isinstance(shard, BatchSamplerShard):
        return
    batches = shard.batch_sampler
    if tokens is not None and not shard.split_batches:
        batches.sampler = EvenSampler(batches.sampler, tokens, batches.batch_size, num_batches)
    # Where accelerate 1.15 looks for what to tell the epoch to, when that is resumed in its middle. It puts none but
    # its own sampler there.
    shard.sampler = batches.sampler


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
