"""Keeps quiet what the libraries say about themselves and no user can act on. Standard library only."""

import logging
import os
import warnings


def quiet() -> None:
    """Call before the libraries are imported."""
    # TRL and the Hub client send usage pings unless told not to; set the variable to 0 to send them.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # bitsandbytes misses an optional CPU kernel that it would download; without it 4 bit works, slowly.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # TRL 1.16 still uses the name that transformers 5.23 is about to drop.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing. is deprecated", category=FutureWarning)
