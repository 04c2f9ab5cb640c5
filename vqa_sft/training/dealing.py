"""Which rows of a step each of several processes takes: packed ones are dealt evenly, because processes wait for the
one that has the most tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import DataLoader, Sampler


@dataclass(frozen=True)
class Order:
    """What training rows are ordered by, a value of each: with `lengths`, those of like length are in one batch; with
    `tokens`, the batches of several processes are even; with classes `balanced`, these are drawn equally often."""

    lengths: Sequence[int] | None = None
    tokens: Sequence[int] | None = None
    balanced: Sequence[int] | None = None


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
        for row in sorted(rows, key=self._num_tokens, reverse=True):
            open_ones = [place for place, batch in enumerate(batches) if len(batch) < self.batch_size]
            place = min(open_ones, key=totals.__getitem__)
            batches[place].append(row)
            totals[place] += self._num_tokens(row)
        return [row for batch in batches for row in batch]

    def _num_tokens(self, row: int) -> int:
        return self.tokens[row % len(self.tokens)]  # a repetition may have the number of its row and N, 2 N, ... more


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
