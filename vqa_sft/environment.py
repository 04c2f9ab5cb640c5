"""The process before the libraries are imported: which of a launch it is, what they find set. Standard library only."""

import os


def set_library_defaults() -> None:
    """No usage pings, memory of a GPU in pieces that grow, no warnings that a user cannot act on. Call it before the
    libraries are imported; what the user has set is kept."""
    import logging
    import warnings

    # TRL and the Hub client send usage pings unless told not to; set the variable to 0 to send them.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # Packed rows are of many lengths; pieces of fixed size would leave much of a GPU's memory reserved and unused.
    if "PYTORCH_ALLOC_CONF" not in os.environ:  # the newer name, which torch ignores where both are set
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    # bitsandbytes misses an optional CPU kernel that it would download; without it 4 bit works, slowly.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # TRL 1.16 still uses the name that transformers 5.23 is about to drop.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing. is deprecated", category=FutureWarning)


def is_main_process() -> bool:
    """Whether this is the only process or, of a launch, the one with rank 0."""
    return os.environ.get("RANK", "0") == "0"
