"""Ranks wait together for a checkpoint that rank 0 writes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch.distributed as dist

from cfmask.checkpoint.writer import CheckpointNotWritten, CheckpointWriter
from cfmask.runtime.heartbeat import CHECKPOINT, beat
from cfmask.runtime.rendezvous import COLLECTIVE_TIMEOUT

logger = logging.getLogger(__name__)

_MARGIN_S = 10.0
"""Kept free at the end of what a launcher leaves after a stop was asked for: to say why, and to requeue."""
_INSIST_S = 600.0
"""The longest that a checkpoint is tried again for before a stop, where nobody sets a deadline."""


def wait_for_checkpoint(writer: CheckpointWriter | None) -> CheckpointNotWritten | None:
    """Wait on all ranks until the checkpoint that is being written is whole: until then none of them ends or asks for a
    requeue, and a launcher that ends a job with its first rank does not cut the checkpoint off.

    Args:
        writer: rank 0's; None on the others.

    Returns:
        Why the latest checkpoint was not written, on every rank; None if it was.
    """
    beat(CHECKPOINT)
    outcome = [writer.wait() if writer is not None else None]
    dist.broadcast_object_list(outcome)
    return outcome[0]


def insist_on_checkpoint(
    writer: CheckpointWriter | None, seconds_left: Callable[[], float]
) -> CheckpointNotWritten | None:
    """``wait_for_checkpoint``, and try again while there is time: a quota that is used up, or a file server that is
    restarted, is often so for seconds.

    Args:
        seconds_left: asked on rank 0 when the first try has failed.
    """
    beat(CHECKPOINT)
    if writer is not None and writer.wait() is not None:
        # The other ranks wait in a collective meanwhile.
        most_s = min(_INSIST_S, COLLECTIVE_TIMEOUT.total_seconds() / 2)
        give_up_at = time.monotonic() + min(most_s, seconds_left() - _MARGIN_S)
        pause_s = 1.0
        while writer.wait() is not None and time.monotonic() + pause_s < give_up_at:
            time.sleep(pause_s)
            pause_s = min(10.0, 2 * pause_s)
            logger.info("trying again to write the checkpoint")
            writer.retry()
    return wait_for_checkpoint(writer)
