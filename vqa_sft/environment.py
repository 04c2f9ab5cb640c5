"""What must be set before the libraries are imported, above all what they would say of themselves. Standard library
only."""

import logging
import os
import warnings


def quiet() -> None:
    """Call before the libraries are imported."""
    # TRL and the Hub client send usage pings unless told not to; set the variable to 0 to send them.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # Packed rows are of many lengths; pieces of fixed size would leave much of a GPU's memory reserved and unused.
    if "PYTORCH_ALLOC_CONF" not in os.environ:  # the newer name, which torch would pass over if both were set
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    # bitsandbytes misses an optional CPU kernel that it would download; without it 4 bit works, slowly.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # TRL 1.16 still uses the name that transformers 5.23 is about to drop.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing. is deprecated", category=FutureWarning)
