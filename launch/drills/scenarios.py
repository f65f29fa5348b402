"""The drills: what is done to each run, and what attempts.jsonl has to say of it."""

from __future__ import annotations

import contextlib
import functools
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from cfmask.runtime.jsonl import read_lines
from launch.drills.environment import Drill, DrillEnvironment
from launch.drills.faults import (
    NO_LOCAL_DISK,
    QUOTA_EXCEEDED,
    SLOW_CHECKPOINTS,
    SLOW_SHARDS,
    UNREADABLE_CHECKPOINTS,
    Injection,
    fill_disk,
    interface_missing,
)
from launch.drills.handle import DrillFailed, Poll, RunHandle
from launch.drills.materials import MAKE_SHARDS
from launch.slurm.client import ask
from launch.slurm.control import cancel, requeue
from launch.slurm.submission import submit
from launch.state.ends import AT_TIME_LIMIT

EARLY, HALF = 25, 63
"""Steps at which runs are interrupted."""


def _undisturbed(run: RunHandle, env: DrillEnvironment) -> Poll:
    run.submit()
    yield from run.finish()


# --- requeues and preemptions -----------------------------------------------------------------------------------------


def _restarts_after(what: str, act: Callable[[str], None]) -> Callable[[RunHandle, DrillEnvironment], Poll]:
    """The scenario in which something is done to the job half way."""

    def scenario(run: RunHandle, env: DrillEnvironment) -> Poll:
        run.submit()
        yield from run.reach(HALF)
        run.record_fault(what)
        act(run.job)
        yield from run.restart()
        yield from run.finish()

    return scenario


def _time_limit(run: RunHandle, env: DrillEnvironment) -> Poll:
    run.submit("--time", "2")
    yield from run.reach(1)
    yield from run.restart()
    yield from run.finish(restarts=True)


def _chain(run: RunHandle, env: DrillEnvironment) -> Poll:
    """Jobs of a chain run into their time limits, until one finishes the run; those behind it have nothing to do."""
    run.submit("--time", "2", "--chain", "5")
    surplus = 0
    for job in list(run.jobs):
        finished = run.folder.results.exists()
        run.follow(job)
        yield from run.ended("COMPLETED")
        if run.job_field("Restarts") != "0":
            raise DrillFailed(f"job {job} of the chain was requeued")
        if finished:
            surplus += 1
            if "is finished" not in run.log(job):
                raise DrillFailed(f"the log of job {job} does not say that the run is finished")
    if not surplus:
        raise DrillFailed("the last job of the chain finished the run: none was left that has nothing to do")


def _preempt(run: RunHandle, env: DrillEnvironment) -> Poll:
    """Submit a job that takes the run's nodes; wait until the run's job runs again."""
    nodes = run.nodes()
    wanted = (f"--nodes={len(nodes)}", f"--nodelist={','.join(nodes)}", "--exclusive", "--time=5")
    script = run.folder.root.with_name(f".preempts-{uuid.uuid4().hex}.sh")
    script.write_text("#!/bin/sh\nsleep 1\n")
    run.record_fault("preempted")
    try:
        run.jobs.append(submit(script, "--job-name=cfmask-preempts", "--output=/dev/null", *wanted, *env.preempt_with))
    finally:
        script.unlink()  # Slurm has a copy
    yield from run.restart()


def _preempted(run: RunHandle, env: DrillEnvironment) -> Poll:
    run.submit()
    yield from run.reach(HALF)
    yield from _preempt(run, env)
    yield from run.finish()


def _preempted_five_times(run: RunHandle, env: DrillEnvironment) -> Poll:
    run.submit()
    yield from run.reach(EARLY)
    for _ in range(5):
        yield from run.reach(run.snapshot().step + 3)
        yield from _preempt(run, env)
    yield from run.finish()


def _preempted_unwarned(run: RunHandle, env: DrillEnvironment) -> Poll:
    assert env.cluster is not None
    with env.cluster.without_user_signal():
        yield from _preempted(run, env)


def _preempted_while_writing(run: RunHandle, env: DrillEnvironment) -> Poll:
    """A checkpoint takes longer to write than Slurm waits before it kills."""
    slow = Injection(env.folder / "slow-checkpoints", SLOW_CHECKPOINTS)
    with slow.inherited():
        run.submit()
    yield from run.reach(EARLY)
    slow.mark.touch()
    try:
        for _ in run.until("a checkpoint is being written"):
            if any(run.folder.checkpoints.glob(".step-*")):
                break
            yield
        yield from _preempt(run, env)
    finally:
        slow.mark.unlink()
    yield from run.finish()


# --- jobs that end ----------------------------------------------------------------------------------------------------


def _ended(run: RunHandle, env: DrillEnvironment, state: str, *, within_s: float | None = None) -> Poll:
    """Wait until the job has ended for good; no process of it may be left, where that can be seen."""
    yield from run.ended(state, within_s=within_s, restarts=True)
    if env.cluster is not None:
        yield from run.wait(1)  # the last ones are about to end
        if left := env.cluster.processes(f"SLURM_JOB_ID={run.job}"):
            raise DrillFailed(f"job {run.job} is {state}, and its processes {left} are still there")


_SIGNAL_RANK = """
rank=
for each in /proc/[0-9]*; do
    variables=$(tr '\\0' '\\n' < $each/environ 2>/dev/null) || continue
    echo "$variables" | grep -qx SLURM_JOB_ID={job} || continue
    echo "$variables" | grep -qx SLURM_PROCID={rank} || continue
    tr '\\0' ' ' < $each/cmdline | grep -q submitit.core._submit && rank="$rank ${{each#/proc/}}"
done
for each in $rank; do
    parent=$(sed 's/.*) //' /proc/$each/stat | cut -d' ' -f2)
    case " $rank " in *" $parent "*) kill -{signal} $each ;; esac
done
"""
"""Of the two processes that a rank is (launch/ranks/supervisor.py), the child: it trains, and takes the memory."""


def _signal_last_rank(run: RunHandle, signal: str) -> None:
    last = int(read_lines(run.folder.attempts)[-1]["world_size"]) - 1
    there = (f"--jobid={run.job}", "--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={run.nodes()[-1]}")
    ask("srun", *there, "--input=none", "sh", "-c", _SIGNAL_RANK.format(job=run.job, rank=last, signal=signal))


def _rank_signalled(what: str, signal: str, *flags: str) -> Callable[[RunHandle, DrillEnvironment], Poll]:
    """The scenario in which the last rank gets a signal half way, and the job starts again."""

    def scenario(run: RunHandle, env: DrillEnvironment) -> Poll:
        run.submit(*flags)
        yield from run.reach(HALF)
        run.record_fault(what)
        _signal_last_rank(run, signal)
        yield from run.restart()
        yield from run.finish()

    return scenario


def _rank_killed_for_good(run: RunHandle, env: DrillEnvironment) -> Poll:
    run.submit("--retries", "0")
    yield from run.reach(HALF)
    run.record_fault("rank killed")
    _signal_last_rank(run, "KILL")
    yield from _ended(run, env, "FAILED", within_s=30)
    run.resume()
    yield from run.finish()


def _unhealthy_node(run: RunHandle, env: DrillEnvironment) -> Poll:
    """One of the job's nodes has no space on its local disk: the next start does not get it."""
    full = Injection(env.folder / "unhealthy", NO_LOCAL_DISK)
    full.mark.touch()
    with full.inherited():
        run.submit()
    run.record_fault("no local disk")
    yield from run.restart()
    [bad] = (path.name.removeprefix("mark.") for path in full.mark.parent.glob("mark.n*"))
    if bad in run.nodes():
        raise DrillFailed(f"the second start has {bad} again, which failed its check: {run.nodes()}")
    yield from run.finish()


def _scancel(run: RunHandle, env: DrillEnvironment) -> Poll:
    run.record_fault("scancel")
    cancel(run.job)
    yield from _ended(run, env, "CANCELLED")


def _cancelled(run: RunHandle, env: DrillEnvironment) -> Poll:
    run.submit()
    yield from run.reach(HALF)
    yield from _scancel(run, env)
    yield from run.wait(5)
    yield from run.ended("CANCELLED")  # it stays so
    run.resume()
    yield from run.finish()


def _resized(run: RunHandle, env: DrillEnvironment) -> Poll:
    run.submit()
    for step, nodes in ((EARLY, 1), (HALF, env.nodes)):
        yield from run.reach(step)
        yield from _scancel(run, env)
        run.resume("--nodes", str(nodes))
    yield from run.finish()
    had = [line["nodes"] for line in read_lines(run.folder.attempts)]
    if had != [env.nodes, 1, env.nodes]:
        raise DrillFailed(f"attempts.jsonl says that it had {had} nodes")


# --- nodes, networks, the controller ----------------------------------------------------------------------------------


_RESENT_S = 70.0
"""slurmctld sends what a node did not answer once more, a minute later. It names the job and not its start: the request
to end the first start would end the second one. By itself Slurm holds a requeued job for longer than that."""


def _node_lost(run: RunHandle, env: DrillEnvironment, which: int = -1, settles_s: float = _RESENT_S) -> Poll:
    """The job's batch script requeues it, while Slurm still waits for the node."""
    assert env.cluster is not None
    run.submit()
    yield from run.reach(HALF)
    node = run.nodes()[which]
    run.record_fault("node lost")
    env.cluster.kill_node(node)
    try:
        for _ in run.until(f"the job is requeued after {node} was lost"):
            if run.job_field("Restarts") == "1":
                break
            yield
    finally:
        env.cluster.revive()
    yield from run.wait(settles_s)  # until the node has heard that the job's first start is over
    yield from run.restart()
    yield from run.finish()


def _first_node_lost(run: RunHandle, env: DrillEnvironment) -> Poll:
    """The node on which the batch script runs: only Slurm is left to requeue the job, when it gives the node up."""
    yield from _node_lost(run, env, which=0, settles_s=5)


_NO_SUCH_INTERFACE = "cfmask0"


def _interface_missing(run: RunHandle, env: DrillEnvironment) -> Poll:
    """The job's second node has no interface of the name that it is given. No restart mends that."""
    missing = Injection(env.folder / "interface", interface_missing(1, _NO_SUCH_INTERFACE))
    missing.mark.touch()
    with missing.inherited():
        run.submit("--restarts-without-progress", "1")
    run.record_fault("interface missing")
    yield from _ended(run, env, "FAILED")
    if run.starts() > 2:
        raise DrillFailed(f"job {run.job} started {run.starts()} times: --restarts-without-progress 1 allows two")
    for name in (_NO_SUCH_INTERFACE, run.nodes()[1]):
        if name not in run.log():
            raise DrillFailed(f"the log does not name {name}")
    run.resume()
    yield from run.finish()


def _controller_restarted(run: RunHandle, env: DrillEnvironment) -> Poll:
    assert env.cluster is not None
    run.submit()
    yield from run.reach(HALF)
    run.record_fault("controller killed")
    env.cluster.kill("slurmctld")
    try:
        yield from run.wait(3)
    finally:
        env.cluster.revive()
    yield from run.finish()


# --- disks ------------------------------------------------------------------------------------------------------------


def _full_disk(run: RunHandle, env: DrillEnvironment) -> Poll:
    assert env.cluster is not None
    with env.cluster.small_disk(run.folder.root):
        run.submit()
        yield from run.reach(HALF)
        run.record_fault("disk full")
        filler = run.folder.root / ".filler"
        fill_disk(filler, leave=3 << 15)  # 96 kB: enough for logs, not for a checkpoint
        yield from _ended(run, env, "FAILED")
        for words in ("No space left on device", "Earlier checkpoints are intact"):
            if words not in run.log():
                raise DrillFailed(f"the log does not say {words!r}")
        filler.unlink()
        run.resume()
        yield from run.finish()


def _quota_at_warning(run: RunHandle, env: DrillEnvironment) -> Poll:
    """The checkpoint before a requeue cannot be written for three seconds."""
    exceeded = Injection(env.folder / "quota", QUOTA_EXCEEDED)
    with exceeded.inherited():
        run.submit()
    yield from run.reach(HALF)
    exceeded.mark.touch()
    run.record_fault("USR2, quota")
    cancel(run.job, signal="USR2")
    yield from run.wait(3)
    exceeded.mark.unlink()
    yield from run.restart()
    yield from run.finish()


def _unreadable_at_resume(run: RunHandle, env: DrillEnvironment) -> Poll:
    """Checkpoints cannot be read when the job comes back: first for good, then for some seconds."""
    unreadable = Injection(env.folder / "unreadable", UNREADABLE_CHECKPOINTS)
    run.submit()
    yield from run.reach(HALF)
    yield from _scancel(run, env)
    kept = (run.folder.log.read_bytes(), run.folder.receipts.read_bytes())
    unreadable.mark.touch()
    run.record_fault("EIO")
    with unreadable.inherited():
        run.resume("--restarts-without-progress", "1")
    yield from _ended(run, env, "FAILED")
    if kept != (run.folder.log.read_bytes(), run.folder.receipts.read_bytes()):
        raise DrillFailed("the start that could not read its checkpoint has changed log.jsonl or receipts.jsonl")
    if "Input/output error" not in run.log(run.job):
        raise DrillFailed("the log does not say 'Input/output error'")
    with unreadable.inherited():
        run.resume()
    for _ in run.until("a start has failed to read its checkpoint"):
        if "Input/output error" in run.log(run.job):
            break
        yield
    yield from run.wait(3)
    unreadable.mark.unlink()
    yield from run.finish()


# --- conversion -------------------------------------------------------------------------------------------------------


def _conversion_preempted(run: RunHandle, env: DrillEnvironment) -> Poll:
    """A task of a conversion's array is preempted; the shards are those of a conversion in one process."""
    folder = run.folder.root
    folder.mkdir()
    images = env.folder / "materials/images"
    command = [*MAKE_SHARDS, "folder", "--source", images, "--samples-per-shard", "4", "--split", "train"]
    on_slurm = ("--executor", "slurm", "--array", "2", "--cpus-per-task", "1", "--time", "30")
    slow = Injection(env.folder / "slow-shards", SLOW_SHARDS)
    slow.mark.touch()
    with contextlib.ExitStack() as stack:
        with slow.inherited():
            converting = stack.enter_context(_command(folder, *command, "--out", folder / "out", *on_slurm))
        for _ in run.until("the array is in the queue"):
            if run.job or converting.poll() is not None:
                break
            run.follow_job_of(folder)
            yield
        for _ in run.until("both tasks write shards"):
            if len(list(folder.glob("out/train/*.tar"))) >= 8 or converting.poll() is not None:
                break
            yield
        yield from _preempt(run, env)
        slow.mark.unlink()
        for _ in run.until("the conversion has finished"):
            if converting.poll() is not None:
                break
            yield
    if converting.returncode:
        raise DrillFailed(f"make_shards.py failed: {(folder / 'said.txt').read_text()[-500:]}")
    with _command(folder, *command, "--out", folder / "alone", "--workers", "1") as alone:
        for _ in run.until("the conversion in one process has finished"):
            if alone.poll() is not None:
                break
            yield
    ours, theirs = (_contents(folder / name) for name in ("out", "alone"))
    if ours != theirs or not ours:
        differing = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        raise DrillFailed(f"the files {', '.join(differing[:3])} are not those of a conversion in one process")


@contextlib.contextmanager
def _command(folder: Path, *command: object) -> Iterator[subprocess.Popen]:
    """A command that runs in this folder, and writes what it prints to said.txt; ended with the context."""
    with open(folder / "said.txt", "ab") as said:
        process = subprocess.Popen(
            list(map(str, command)), cwd=folder, stdout=said, stderr=said, stdin=subprocess.DEVNULL
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait()


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- all of them ------------------------------------------------------------------------------------------------------

_CAME_BACK = r"stopped at step \d+ \(requeue\)"
_AT_LIMIT = _CAME_BACK + AT_TIME_LIMIT
_STOPPED = r"stopped at step \d+ \((requeue|quit)\)"
_HANDED_OVER = rf"{_AT_LIMIT}; job \d+ resumes the run"
_KILLED = "killed without notice"
_AGAIN = r"; starts again.* \(retry 1 of 3\)"
_LOST = rf"lost a rank without a report.*|{_KILLED}"
UNDISTURBED = Drill("undisturbed", "nothing: the others are compared with it", _undisturbed)
DRILLS = (
    # The longest first: others are done beside them. Not both that lose a node: who revives one revives the other.
    Drill("time-limit", "a time limit of two minutes", _time_limit, f"{_AT_LIMIT}(; {_AT_LIMIT})*", lasts_s=120),
    Drill(
        name="chain",
        what="a chain of five jobs, each with a time limit of two minutes",
        scenario=_chain,
        ends=f"{_HANDED_OVER}(; {_HANDED_OVER})*",
        lasts_s=100,
    ),
    Drill("first-node-lost", "the job's first node dies", _first_node_lost, _LOST, "cluster", nodes=2),
    Drill(
        name="preempted-5-times",
        what="preempted five times",
        scenario=_preempted_five_times,
        ends="; ".join([_STOPPED] * 5),
        needs="preempt",
    ),
    Drill(
        name="warned",
        what="USR2, as before a preemption or the time limit",
        scenario=_restarts_after("USR2", functools.partial(cancel, signal="USR2")),
        ends=_CAME_BACK,
    ),
    Drill("requeued", "scontrol requeue", _restarts_after("requeue", requeue), _STOPPED),
    Drill(
        name="rank-killed",
        what="SIGKILL of one rank, as when memory runs out",
        scenario=_rank_signalled("rank killed", "KILL"),
        ends=rf"failed: rank \d+ was killed .*{_AGAIN}",
    ),
    Drill("rank-killed-for-good", "the same with --retries 0; --resume", _rank_killed_for_good, "failed.*"),
    Drill(
        name="rank-hung",
        what="SIGSTOP of one rank",
        scenario=_rank_signalled("rank stopped", "STOP", "--hang-timeout", "0.2"),
        ends=rf"failed: rank \d+ hung.*is stopped.*{_AGAIN}",
    ),
    Drill(
        name="node-unhealthy",
        what="no space on the local disk of one node; the next start does not get the node",
        scenario=_unhealthy_node,
        ends=r"failed: rank \d+: NodeUnhealthy.*; starts again, without \S+ \(retry 1 of 3\)",
        nodes=2,
    ),
    Drill("cancelled", "scancel; it has to stay away; --resume", _cancelled, _STOPPED),
    Drill(
        name="resized",
        what="scancel, --resume on one node; the same, on all",
        scenario=_resized,
        ends=f"{_STOPPED}; {_STOPPED}",
        nodes=2,
        same_ranks=False,
    ),
    Drill(
        name="interface-missing",
        what="a network interface that one node does not have; --resume with one that it has",
        scenario=_interface_missing,
        ends="(failed|not started).*",
        nodes=2,
    ),
    Drill("node-lost", "another of its nodes dies", _node_lost, _LOST, "cluster", nodes=2),
    Drill(
        name="unreadable-at-resume",
        what="EIO from its checkpoints: for good, and for some seconds; --resume",
        scenario=_unreadable_at_resume,
        ends=rf"{_STOPPED}; failed.*Input/output error.*",
    ),
    Drill(
        name="quota-at-warning",
        what="USR2, and a quota that is exceeded for 3 s",
        scenario=_quota_at_warning,
        ends=_CAME_BACK,
    ),
    Drill(
        name="conversion-preempted",
        what="a task of make_shards.py's array is preempted",
        scenario=_conversion_preempted,
        needs="preempt",
        trains=False,
    ),
    Drill("preempted", "preempted by a job with higher priority", _preempted, _STOPPED, "preempt"),
    Drill(
        name="preempted-at-once",
        what="preempted without a grace time",
        scenario=_preempted,
        ends=_STOPPED,
        needs="cluster",
        flags=("--partition", "abrupt"),
    ),
    Drill(
        name="preempted-while-writing",
        what="preempted, and killed in the middle of a checkpoint",
        scenario=_preempted_while_writing,
        ends=_KILLED,
        needs="cluster",
        flags=("--partition", "abrupt"),
    ),
    Drill(
        name="full-disk",
        what="no space for checkpoints; space again; --resume",
        scenario=_full_disk,
        ends="failed.*No space left.*",
        needs="cluster",
    ),
    Drill(
        name="preempted-unwarned",
        what="preempted by TERM, and KILL at the end of the grace time",
        scenario=_preempted_unwarned,
        ends=_STOPPED,
        needs="cluster",
        alone=True,
    ),
    Drill(
        name="controller-restarted",
        what="slurmctld dies, and is back after 3 s",
        scenario=_controller_restarted,
        needs="cluster",
        alone=True,
    ),
)
