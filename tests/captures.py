"""What stands for a CUDA graph where there is no GPU, and what refuses to wait for one."""

from functools import partial

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vqa_sft.models.fast import attention
from vqa_sft.models.fast.graphs import without_cache

aten = torch.ops.aten
WAITS = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.unique_dim, aten._unique2)
WAITS += (aten.masked_scatter_backward,)  # which selects by a mask inside


class NeverWaits(TorchDispatchMode):
    """Raises where Python would wait for a GPU to know a number or a shape."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in WAITS, f"{func} waits"
        if func.overloadpacket in (aten.index, aten.index_put_):
            assert not any(index is not None and index.dtype == torch.bool for index in args[1]), f"{func} waits"
        return func(*args, **(kwargs or {}))


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
