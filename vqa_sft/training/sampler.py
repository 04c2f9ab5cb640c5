"""The order of training rows where batches are padded: random batches of rows of like length."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

NUM_SORTED = 50  # batches whose rows are sorted together; fewer where there are less than four times as many


class LengthSampler(Sampler[int]):
    """Rows are drawn in a random order, a share of them at a time is sorted and cut into batches, and the batches are
    drawn in a random order again. By the seed and the epoch alone: a resumed run and every process have the same."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
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
        drawn = torch.randperm(num_rows, generator=generator).tolist()
        for start in range(0, num_rows, share):
            drawn[start : start + share] = sorted(drawn[start : start + share], key=self.lengths.__getitem__)
        batches = [drawn[start : start + size] for start in range(0, num_rows, size)]
        # One that is not whole stays last: rows are taken from one batch after another.
        last = [batches.pop()] if num_rows % size else []
        order = torch.randperm(len(batches), generator=generator).tolist()
        return iter([row for batch in [*(batches[i] for i in order), *last] for row in batch])
