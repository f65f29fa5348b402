"""The batch script of a job: what sbatch and srun are asked for, and what the script does before and after its ranks.

#SBATCH …                 the allocation
(                         a shell of its own, so that nothing in the cluster file's setup (set -e, exit, a trap,
                          exec) can keep the last lines from running
  exit, if it is done     in a job of a chain
  setup
  . JOBS/environment.sh   [environment] of the cluster file; mode 600, because tokens are kept there
  srun … start.py         the ranks
)
why it ended              the failure report of the rank that died first, and a requeue if the job needs one
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from launch.allocation.resolve import Allocation
from launch.restarts.batch_script_end import batch_script_end
from launch.restarts.chain import VARIABLE as CHAIN

NOTICE_S = 120
"""How long before the time limit Slurm sends USR2, where that is not more than a tenth of it. It may be half a minute
earlier: Slurm looks that often."""
ENVIRONMENT = "environment.sh"
"""In a job's folder jobs/."""
NO_LIMIT_MIN = 525_600
"""Where a number has to be given, and there is no time limit: a year."""
_ALL_MEMBERS = 1_000_000_000
"""Of an array: so many may run at once."""
_RANKS_ENDED_WELL = 99
"""Exit code of the inner shell after ranks that all exited with 0: a setup that exits with 0 ends it with 0."""


def slurm_parameters(allocation: Allocation, name: str, jobs: str) -> dict[str, Any]:
    """What submitit's SlurmExecutor takes.

    Args:
        jobs: the run's jobs/, as a word of the shell.
    """
    a = allocation
    given = {
        "partition": a.partition,
        "account": a.account,
        "qos": a.qos,
        "wckey": a.wckey,
        "constraint": a.constraint,
        "mem": a.memory,
        "exclude": a.exclude,
        "dependency": a.dependency,
    }
    sbatch = {name.replace("_", "-"): value for name, value in a.sbatch.items()}
    if a.wckey is not None:
        sbatch.pop("wckey", None)  # cluster files may have it under [sbatch]; the flag and the key come first
    container = [f"--container-image={a.image}"] if a.image else []
    container += [f"--container-mounts={','.join(a.mounts)}"] if a.mounts else []
    return {
        "job_name": name,
        "nodes": a.nodes,
        "ntasks_per_node": a.tasks_per_node,
        "cpus_per_task": a.cpus_per_task,
        # submitit computes with this number, and always writes a limit: additional_parameters has the one that counts.
        "time": a.time_min or NO_LIMIT_MIN,
        "signal_delay_s": NOTICE_S if a.time_min is None else min(NOTICE_S, 6 * a.time_min),
        "stderr_to_stdout": True,
        "array_parallelism": a.array_parallelism or _ALL_MEMBERS,  # submitit's default is 256
        # srun does not inherit sbatch's --cpus-per-task. One dead rank must end the job; one that has ended well must
        # not (a site's WaitTime), while rank 0 writes the results.
        "srun_args": [
            f"--cpus-per-task={a.cpus_per_task}",
            "--kill-on-bad-exit=1",
            "--wait=0",
            # By itself srun takes TYPE:1 from the job, which Slurm 22.05 does not bind to tasks.
            *(["--gpus-per-task=1"] if a.gpus_from == "gpus_per_task" else []),
            *container,
            *a.srun_args,
        ],
        "additional_parameters": {"requeue": True, "time": a.time, **sbatch, **_gpu_request(a, sbatch.get("gres"))},
        # "": the last line of a setup may end with a backslash.
        "setup": ["(", *_unless_done(a, jobs), *a.setup, "", *_before_ranks(a, jobs)],
        "teardown": [*_after_ranks(), ")", *_end(jobs)],
        **{key: value for key, value in given.items() if value is not None},
    }


def _gpu_request(allocation: Allocation, other_gres: str | None) -> dict[str, Any]:
    """Options of sbatch.

    Args:
        other_gres: what [sbatch] asks for beside GPUs.
    """
    a = allocation
    kind = f"{a.gpu_type}:" if a.gpu_type else ""
    if a.gpus_from == "exclusive":
        return {"exclusive": True}
    if not a.gpus_per_node:
        return {}
    if a.gpus_from == "gres":
        return {"gres": ",".join(filter(None, [f"gpu:{kind}{a.gpus_per_node}", other_gres]))}
    if a.gpus_from == "gpus_per_task":
        return {"gpus-per-task": f"{kind}1"}
    return {"gpus-per-node": f"{kind}{a.gpus_per_node}"}


def _unless_done(allocation: Allocation, jobs: str) -> list[str]:
    """A job of a chain whose run is finished or cancelled ends here, in a second and on one node: ranks would find out
    only when all of them have imported torch."""
    if allocation.chain is None:
        return []
    lines = []
    for mark, what in (("results.json", "finished"), ("cancelled.json", "cancelled")):
        lines.append(f"if [ -e {jobs}/../{mark} ]; then")
        lines += [f'    echo "not started: the run is {what}"', f"    exit {_RANKS_ENDED_WELL}", "fi"]
    return lines


def _before_ranks(allocation: Allocation, jobs: str) -> list[str]:
    """The setup's shell options end with it: they would decide about lines that are not the user's, and -x would print
    what is exported."""
    lines = ["{ set +efnuvx; set +o pipefail; } 2>/dev/null"]
    if allocation.gpus_from == "exclusive" and allocation.gpus_per_node:
        # Where Slurm manages the GPUs, the job has all of them, and a step those that it asks for.
        lines.append(f'if [ -n "$SLURM_GPUS_ON_NODE" ]; then export SLURM_GRES=gpu:{allocation.gpus_per_node}; fi')
    if allocation.chain is not None:
        lines.append(f"export {CHAIN}={','.join(allocation.chain)}")
    if allocation.environment:
        lines.append(f". {jobs}/{ENVIRONMENT} || exit 1")
    return lines


def _after_ranks() -> list[str]:
    return [
        "status=$?",
        f'if [ "$status" -eq 0 ]; then exit {_RANKS_ENDED_WELL}; fi',
        'exit "$status"',
    ]


def _end(jobs: str) -> list[str]:
    """The last lines of the batch script: the failure report of the rank that failed first, and the requeue."""
    return [
        "status=$?",
        'if [ "$status" -eq 0 ]; then',
        '    echo "error: setup in the cluster file ended the batch script with exit 0 before its ranks were started."',
        "    status=1",
        f'elif [ "$status" -eq {_RANKS_ENDED_WELL} ]; then',
        "    status=0",
        "fi",
        *batch_script_end(f"{jobs}/failures"),
    ]


def write_environment(allocation: Allocation, jobs: Path) -> None:
    """The file that the batch script takes [environment] from; only its owner can read it."""
    if not allocation.environment:
        return
    path = jobs / ENVIRONMENT
    aside = path.with_name(f".{ENVIRONMENT}.{os.getpid()}")
    lines = [f"export {name}={_in_shell(value)}\n" for name, value in allocation.environment.items()]
    try:
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def rank_command(python: str, code: str) -> str:
    """What starts a rank, as submitit's ``python``: the code's own start.py, with this code first on PYTHONPATH.

    A signal that comes in the first second, while Python imports and there is no handler, would end the rank, and with
    it the job; sh ignores it, and passes that on. Nothing is lost by not hearing it: there is nothing to save yet.

    Args:
        python, code: as words of a shell, a command and a folder.
    """
    ignore, path = 'trap "" USR2 TERM', 'export PYTHONPATH="$0${PYTHONPATH:+:$PYTHONPATH}"'
    return f"""sh -c '{ignore}; {path}; exec "$@"' {code} {python} -u {code}/launch/ranks/start.py"""


def set_environment(allocation: Allocation) -> None:
    """For ranks that are this process's children, or itself."""
    for name, value in allocation.environment.items():
        os.environ[name] = os.path.expandvars(value)


def _in_shell(value: str) -> str:
    """In double quotes, where $NAME and ${NAME} mean what they do on the node."""
    return '"' + re.sub(r'([\\"`]|\$(?![A-Za-z_]|\{[A-Za-z_]\w*\}))', r"\\\1", value) + '"'
