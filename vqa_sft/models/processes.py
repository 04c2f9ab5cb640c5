"""How this process was launched, and on which device it loads."""

import atexit
import os
import sys
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, broadcast_object_list
from datasets import Dataset
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.deepspeed import deepspeed_config

from vqa_sft.errors import InputError, ProcessError, name_rows, printable


def check_processes(use_cpu: bool) -> None:
    """Raises InputError where one process sees several GPUs, or several processes would not know of each other."""
    try:
        rank, num_processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        int(os.environ.get("LOCAL_RANK", "0"))
        is_one_of_them = 0 <= rank < num_processes
    except ValueError:
        is_one_of_them = False
    if not is_one_of_them:
        given = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name in os.environ}
        said = printable(", ".join(f"{name}={value}" for name, value in given.items()))
        raise ProcessError(
            f"the environment says {said}, which no launcher does. Unset them, or use accelerate launch."
        )
    num_gpus = 0 if use_cpu else torch.cuda.device_count()
    if num_processes > 1 and not use_cpu and not torch.accelerator.is_available():
        # accelerate then gives every process a world of its own: each would train alone, in the same folder.
        raise InputError(
            f"{num_processes} processes were launched and no GPU is visible. Launch one, or say that the CPU is meant: "
            "--use_cpu true."
        )
    if num_gpus > 1 and num_processes == 1:
        raise InputError(
            f"{num_gpus} GPUs are visible and one process was launched. Use all of them:\n"
            f"  accelerate launch --multi_gpu --num_processes {num_gpus} recipes/sft.py --config ...\n"
            "or one of them:\n"
            "  CUDA_VISIBLE_DEVICES=0 accelerate launch --num_processes 1 recipes/sft.py --config ..."
        )


def is_sharded() -> bool:
    """Whether FSDP or DeepSpeed deals with the weights."""
    # They announce themselves to `PartialState` only later; the launcher's variables come first.
    named = any(os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED"))
    return named or PartialState().distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)


def shards_weights() -> bool:
    """Whether each process holds a part of the weights alone: FSDP, or DeepSpeed's stage 3. Known once the training
    arguments are built."""
    return is_sharded() and (os.environ.get("ACCELERATE_USE_FSDP") == "true" or is_deepspeed_zero3_enabled())


def has_own_optimizer() -> bool:
    """Whether DeepSpeed's configuration names an optimizer, which is then not the recipe's."""
    return "optimizer" in (deepspeed_config() or {})


def check_images(parts: Iterable[Dataset], *, trains_vision: bool = False) -> None:
    """Raises InputError where rows have no image and weights are spread over processes: a process whose rows have none
    would not fetch the vision tower's, nor send its gradients where it is trained, and the others would wait."""
    if not (shards_weights() or (trains_vision and is_sharded())):
        return
    for part in parts:
        rows = part.with_format(None).select_columns(["id", "images"])
        bare = [row["id"] for row in rows if not row["images"]]
        if bare:
            raise InputError(
                "FSDP and DeepSpeed's stage 3 (stage 2 where the vision tower or its merger is trained) need an "
                f"image in every row; there is none in {name_rows(bare, len(part))}. Take "
                "accelerate_configs/multi_gpu.yaml, or leave those rows out."
            )


def device_map() -> dict[str, int] | None:
    """This process's own GPU, so that weights are loaded right onto it; None where sharding or a CPU decides."""
    state = PartialState()
    if state.device.type != "cuda" or is_sharded():
        return None
    return {"": state.local_process_index}


def spare_ddp(accelerator: Accelerator, model: torch.nn.Module, sends_buffers: bool | None = None) -> None:
    """Tell DistributedDataParallel, which is built later, what it need not do: copy gradients out of its buckets again,
    and, unless `sends_buffers`, send before each forward what none of them changes, after a walk over all modules."""
    if (settings := accelerator.ddp_handler) is None:
        return
    settings.gradient_as_bucket_view = True
    if sends_buffers is None:
        # Tables of rotations are the same everywhere; running means are not, and are the main process's.
        settings.broadcast_buffers = any(getattr(module, "track_running_stats", False) for module in model.modules())


def from_main(value: Any) -> Any:
    """The main process's value, in every process; waits for it."""
    values = [value]
    broadcast_object_list(values, from_process=0)
    return values[0]


def leave(exit_code: int = 0) -> None:
    """End this process in good order; the last call of a script.

    Where several processes were launched it ends without Python's teardown. DistributedDataParallel never lets go of
    its process group (torch 2.15), whose threads run on while the interpreter is taken down: now and then one aborts,
    and with it the whole launch, after everything was saved.
    """
    launched = PartialState().num_processes > 1
    PartialState().destroy_process_group()
    if launched:
        atexit._run_exitfuncs()  # trackers write their last values
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    if exit_code:
        sys.exit(exit_code)
