"""Settings of NCCL's watchdog and flight recorder: the only module that sets ``TORCH_NCCL_*``.

    TORCH_NCCL_ASYNC_ERROR_HANDLING  a rank whose peer is gone ends with SIGABRT, which the launcher recognises
    TORCH_FR_BUFFER_SIZE             keep the last collectives of each rank, with their stacks, in memory
    TORCH_NCCL_DUMP_ON_TIMEOUT       write them to a file if a collective times out
    TORCH_NCCL_DEBUG_INFO_PIPE_FILE  write them on request of the supervising process, if the rank hangs

The files are RUN/jobs/failures/123-0.nccl_RANK; `python -m torch.distributed.flight_recorder.fr_trace -j -p 123-0.nccl_
RUN/jobs/failures` compares them. Variables that the user has set are not changed.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

_COLLECTIVES = 2000


def configure(folder: Path, attempt: str) -> None:
    """Set the variables. Called before the process group is initialized.

    Args:
        folder: of the flight recorder's files.
        attempt: name of this start of the job.
    """
    dump = str(folder / f"{attempt}.nccl_")
    settings = {
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_ENABLE_MONITORING": "1",
        "TORCH_NCCL_DEBUG_INFO_PIPE_FILE": _pipe(attempt),
        # The names since torch 2.9, and the earlier ones.
        **dict.fromkeys(("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"), str(_COLLECTIVES)),
        **dict.fromkeys(("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"), dump),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def dump_flight_recorder(attempt: str, rank: int) -> bool:
    """Ask a rank of this machine to write its collectives. A torch thread does so even if the rank hangs.

    Returns:
        Whether the rank has a pipe for such requests; without NCCL it has none.
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
    """Path on this machine, to which torch appends the rank and ".pipe"."""
    return str(Path(tempfile.gettempdir()) / f"cfmask-nccl-{attempt}-")
