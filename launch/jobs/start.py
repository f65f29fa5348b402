"""The first thing that runs on every rank: makes the code that this file is part of the code of the job, and has the
rank looked after (last_words.py).

    python -u RUN/code/0123456789ab/launch/jobs/start.py -u -m submitit.core._submit RUN/jobs

What submitit would run by itself begins with -m, for which Python looks into the working directory first: a job that is
requeued next week would import what the repository holds by then.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

CODE = Path(__file__).resolve().parents[2]


def main() -> None:
    module = sys.argv.index("-m") + 1
    # The folder of this file stands there, and is no place to import from.
    sys.path = [str(CODE), *(entry for entry in sys.path if entry and Path(entry).resolve() != CODE / "launch/jobs")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(CODE), os.environ.get("PYTHONPATH")]))
    sys.argv = sys.argv[module:]
    from launch.jobs.failures import supervise
    from launch.jobs.gpus import show_to_rank

    show_to_rank()
    sys.exit(supervise(lambda: runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True), run=CODE.parents[1]))


if __name__ == "__main__":
    main()
