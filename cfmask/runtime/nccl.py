"""How NCCL's watchdog and flight recorder are set: the only place that sets ``TORCH_NCCL_*``.

    TORCH_NCCL_ASYNC_ERROR_HANDLING  a rank whose peer is gone ends itself (SIGABRT), which the launcher understands
    TORCH_FR_BUFFER_SIZE             the last collectives of each rank, with their stacks, are kept in memory
    TORCH_NCCL_DUMP_ON_TIMEOUT       written to a file where a collective times out
    TORCH_NCCL_DEBUG_INFO_PIPE_FILE  and where the process that waits for a rank asks for it, because the rank hangs

The files are RUN/jobs/failures/123-0.nccl_RANK; `python -m torch.distributed.flight_recorder.fr_trace -j -p 123-0.nccl_
RUN/jobs/failures` compares them. What a user sets wins.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

_COLLECTIVES = 2000


def configure(folder: Path, attempt: str) -> None:
    """Called before the process group is made.

    Args:
        folder: for the flight recorder's files.
        attempt: names this start of the job.
    """
    dump = str(folder / f"{attempt}.nccl_")
    settings = {
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_ENABLE_MONITORING": "1",
        "TORCH_NCCL_DEBUG_INFO_PIPE_FILE": _pipe(attempt),
        # Names of torch 2.9 and later, and those before.
        **dict.fromkeys(("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"), str(_COLLECTIVES)),
        **dict.fromkeys(("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"), dump),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def dump_flight_recorder(attempt: str, rank: int) -> bool:
    """Ask a rank of this machine for its collectives; a thread of torch's writes them, whatever the rank hangs in.
    Without NCCL there is no such pipe.

    Returns:
        Whether it was asked.
    """
    with contextlib.suppress(OSError):
        pipe = os.open(f"{_pipe(attempt)}{rank}.pipe", os.O_WRONLY | os.O_NONBLOCK)
        try:
            os.write(pipe, b"1")
            return True
        finally:
            os.close(pipe)
    return False


def _pipe(attempt: str) -> str:
    """On this machine; torch appends the rank and ".pipe"."""
    return str(Path(tempfile.gettempdir()) / f"cfmask-nccl-{attempt}-")
