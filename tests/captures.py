"""What stands for a CUDA graph where there is no GPU."""

from functools import partial

import torch

from vqa_sft.models.fast import attention
from vqa_sft.models.fast.graphs import without_cache


class Capture:
    """Counts captures; a replay runs the call on its own memory and writes over the same outputs."""

    def __init__(self):
        self.count = 0

    def __call__(self, *runs):
        self.count += 1
        with without_cache():  # as there
            return [partial(self.replay, run, run()) for run in runs]

    @staticmethod
    def replay(run, outputs):
        attention._lengths.clear()  # a GPU's kernel reads them anew
        for own, new in zip(outputs, run(), strict=True):
            if isinstance(own, torch.Tensor):
                own.copy_(new)
        return outputs
