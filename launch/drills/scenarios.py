"""The drills: each is a scenario, registered with its fault and the ends that attempts.jsonl has to record.

The longest come first, so that the others run at the same time.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cfmask.runtime.jsonl import read_lines
from launch.drills.environment import Drill, DrillEnvironment, Scenario
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
from launch.slurm.control import cancel, requeue
from launch.state.ends import AT_TIME_LIMIT

EARLY, HALF = 25, 63
"""The steps at which faults are injected."""

# Why a start ended, as attempts.jsonl records it.
_REQUEUED = r"stopped at step \d+ \(requeue\)"
_AT_LIMIT = _REQUEUED + AT_TIME_LIMIT
_HANDED_OVER = rf"{_AT_LIMIT}; job \d+ resumes the run"
_STOPPED = r"stopped at step \d+ \((requeue|quit)\)"
_KILLED = "killed without notice"
_RETRIED = r"; starts again.* \(retry 1 of 3\)"
_LOST = rf"lost a rank without a report.*|{_KILLED}"

DRILLS: list[Drill] = []
"""All drills but ``UNDISTURBED``."""


def drill(name: str, what: str, ends: str = "", **options: Any) -> Callable[[Scenario], Scenario]:
    """Register a scenario as a drill; the arguments are the fields of ``Drill``."""

    def register(scenario: Scenario) -> Scenario:
        DRILLS.append(Drill(name, what, scenario, ends, **options))
        return scenario

    return register


def _undisturbed(run: RunHandle, env: DrillEnvironment) -> Poll:
    run.submit()
    yield from run.finish()


UNDISTURBED = Drill("undisturbed", "nothing: the others are compared with it", _undisturbed)


# --- parts of scenarios -----------------------------------------------------------------------------------------------


def _interrupted(what: str, inject: Callable[[RunHandle], object], *flags: str) -> Scenario:
    """The scenario in which a fault is injected half way, and the job starts again."""

    def scenario(run: RunHandle, env: DrillEnvironment) -> Poll:
        run.submit(*flags)
        yield from run.reach(HALF)
        run.record_fault(what)
        inject(run)
        yield from run.restart()
        yield from run.finish()

    return scenario


def _ended(run: RunHandle, env: DrillEnvironment, state: str, *, within_s: float | None = None) -> Poll:
    """Wait until the job has ended for good. On slurm/cluster.py's cluster, no process of it may be left."""
    yield from run.ended(state, within_s=within_s, restarts=True)
    if env.cluster is not None:
        yield from run.wait(1)  # its last processes are about to end
        if left := env.cluster.processes(f"SLURM_JOB_ID={run.job}"):
            raise DrillFailed(f"job {run.job} is {state}, and its processes {left} are still running")


def _scancel(run: RunHandle, env: DrillEnvironment) -> Poll:
    run.record_fault("scancel")
    cancel(run.job)
    yield from _ended(run, env, "CANCELLED")


# --- time limits ------------------------------------------------------------------------------------------------------


@drill("time-limit", "a time limit of two minutes", f"{_AT_LIMIT}(; {_AT_LIMIT})*", lasts_s=120)
def _time_limit(run: RunHandle, env: DrillEnvironment) -> Poll:
    run.submit("--time", "2")
    yield from run.reach(1)
    yield from run.restart()
    yield from run.finish(restarts=True)


@drill(
    "chain",
    "a chain of five jobs, each with a time limit of two minutes",
    f"{_HANDED_OVER}(; {_HANDED_OVER})*",
    lasts_s=100,
)
def _chain(run: RunHandle, env: DrillEnvironment) -> Poll:
    """Jobs run into their time limits until one finishes the run; the remaining jobs have nothing to do."""
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
            run.check_log("is finished", job=job)
    if not surplus:
        raise DrillFailed("the last job of the chain finished the run: no job was left with nothing to do")


# --- nodes ------------------------------------------------------------------------------------------------------------

_RESENT_S = 70.0
"""slurmctld repeats requests that a node did not answer after a minute. They name the job and not its start: a repeated
request to end the first start would end the second one. Slurm by itself holds a requeued job for longer."""


def _node_lost(which: int, settles_s: float) -> Scenario:
    def scenario(run: RunHandle, env: DrillEnvironment) -> Poll:
        assert env.cluster is not None
        run.submit()
        yield from run.reach(HALF)
        node = run.nodes()[which]
        run.record_fault("node lost")
        env.cluster.kill_node(node)
        try:
            yield from run.until(f"the job is requeued after {node} was lost", lambda: run.job_field("Restarts") == "1")
        finally:
            env.cluster.revive()
        yield from run.wait(settles_s)  # until the node knows that the job's first start is over
        yield from run.restart()
        yield from run.finish()

    return scenario


# The batch script runs on the first node: only Slurm can requeue the job, when it gives the node up.
# This drill and node-lost are far apart: reviving one's node revives the other's as well.
drill("first-node-lost", "the job's first node dies", _LOST, needs="cluster", nodes=2)(_node_lost(0, 5))


@drill("preempted-5-times", "preempted five times", "; ".join([_STOPPED] * 5), needs="preempt")
def _preempted_five_times(run: RunHandle, env: DrillEnvironment) -> Poll:
    run.submit()
    yield from run.reach(EARLY)
    for _ in range(5):
        yield from run.reach(run.snapshot().step + 3)
        yield from run.preempt(env.preempt_with)
    yield from run.finish()


# --- requeues, signals, cancellation ----------------------------------------------------------------------------------

drill("warned", "USR2, as before a preemption or the time limit", _REQUEUED)(
    _interrupted("USR2", lambda run: cancel(run.job, signal="USR2"))
)
drill("requeued", "scontrol requeue", _STOPPED)(_interrupted("requeue", lambda run: requeue(run.job)))
drill("rank-killed", "SIGKILL of one rank, as when memory runs out", rf"failed: rank \d+ was killed .*{_RETRIED}")(
    _interrupted("rank killed", lambda run: run.signal_last_rank("KILL"))
)


@drill("rank-killed-for-good", "the same with --retries 0; --resume", "failed.*")
def _rank_killed_for_good(run: RunHandle, env: DrillEnvironment) -> Poll:
    run.submit("--retries", "0")
    yield from run.reach(HALF)
    run.record_fault("rank killed")
    run.signal_last_rank("KILL")
    yield from _ended(run, env, "FAILED", within_s=30)
    run.resume()
    yield from run.finish()


drill("rank-hung", "SIGSTOP of one rank", rf"failed: rank \d+ hung.*is stopped.*{_RETRIED}")(
    _interrupted("rank stopped", lambda run: run.signal_last_rank("STOP"), "--hang-timeout", "0.2")
)


@drill(
    "node-unhealthy",
    "no space on the local disk of one node; the next start excludes the node",
    r"failed: rank \d+: NodeUnhealthy.*; starts again, without \S+ \(retry 1 of 3\)",
    nodes=2,
)
def _unhealthy_node(run: RunHandle, env: DrillEnvironment) -> Poll:
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


@drill("cancelled", "scancel; the job has to stay cancelled; --resume", _STOPPED)
def _cancelled(run: RunHandle, env: DrillEnvironment) -> Poll:
    run.submit()
    yield from run.reach(HALF)
    yield from _scancel(run, env)
    yield from run.wait(5)
    yield from run.ended("CANCELLED")
    run.resume()
    yield from run.finish()


@drill(
    "resized", "scancel, --resume on one node; the same, on all", f"{_STOPPED}; {_STOPPED}", nodes=2, same_ranks=False
)
def _resized(run: RunHandle, env: DrillEnvironment) -> Poll:
    run.submit()
    for step, nodes in ((EARLY, 1), (HALF, env.nodes)):
        yield from run.reach(step)
        yield from _scancel(run, env)
        run.resume("--nodes", str(nodes))
    yield from run.finish()
    had = [line["nodes"] for line in read_lines(run.folder.attempts)]
    if had != [env.nodes, 1, env.nodes]:
        raise DrillFailed(f"attempts.jsonl records {had} nodes")


# --- networks, nodes, disks -------------------------------------------------------------------------------------------

_NO_SUCH_INTERFACE = "cfmask0"


@drill(
    "interface-missing",
    "a network interface that one node does not have; --resume with one that it has",
    "(failed|not started).*",
    nodes=2,
)
def _interface_missing(run: RunHandle, env: DrillEnvironment) -> Poll:
    """The interface that the job's second node is to use does not exist. No restart can fix that."""
    missing = Injection(env.folder / "interface", interface_missing(1, _NO_SUCH_INTERFACE))
    missing.mark.touch()
    with missing.inherited():
        run.submit("--restarts-without-progress", "1")
    run.record_fault("interface missing")
    yield from _ended(run, env, "FAILED")
    if run.starts() > 2:
        raise DrillFailed(f"job {run.job} started {run.starts()} times: --restarts-without-progress 1 allows two")
    run.check_log(_NO_SUCH_INTERFACE, run.nodes()[1])
    run.resume()
    yield from run.finish()


# The job's batch script requeues it, while Slurm still waits for the node.
drill("node-lost", "another of its nodes dies", _LOST, needs="cluster", nodes=2)(_node_lost(-1, _RESENT_S))


@drill(
    "unreadable-at-resume",
    "EIO from its checkpoints: permanently, and for some seconds; --resume",
    rf"{_STOPPED}; failed.*Input/output error.*",
)
def _unreadable_at_resume(run: RunHandle, env: DrillEnvironment) -> Poll:
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
    run.check_log("Input/output error", job=run.job)
    with unreadable.inherited():
        run.resume()
    yield from run.until("a start has failed to read its checkpoint", lambda: "Input/output error" in run.log(run.job))
    yield from run.wait(3)
    unreadable.mark.unlink()
    yield from run.finish()


@drill("quota-at-warning", "USR2, and a quota that is exceeded for 3 s", _REQUEUED)
def _quota_at_warning(run: RunHandle, env: DrillEnvironment) -> Poll:
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


# --- a conversion -----------------------------------------------------------------------------------------------------


@drill("conversion-preempted", "a task of make_shards.py's array is preempted", needs="preempt", trains=False)
def _conversion_preempted(run: RunHandle, env: DrillEnvironment) -> Poll:
    """The shards have to be those of a conversion in one process."""
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

        def ended() -> bool:
            return converting.poll() is not None

        def is_queued() -> bool:
            run.follow_job_of(folder)
            return bool(run.job)

        yield from run.until("the array is in the queue", lambda: ended() or is_queued())
        yield from run.until("tasks write shards", lambda: ended() or len(list(folder.glob("out/train/*.tar"))) >= 8)
        yield from run.preempt(env.preempt_with)
        slow.mark.unlink()
        yield from run.until("the conversion has finished", ended)
    if converting.returncode:
        raise DrillFailed(f"make_shards.py failed: {(folder / 'said.txt').read_text()[-500:]}")
    with _command(folder, *command, "--out", folder / "alone", "--workers", "1") as alone:
        yield from run.until("the conversion in one process has finished", lambda: alone.poll() is not None)
    ours, theirs = (_contents(folder / name) for name in ("out", "alone"))
    if ours != theirs or not ours:
        differing = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        raise DrillFailed(f"the files {', '.join(differing[:3])} differ from those of a conversion in one process")


@contextlib.contextmanager
def _command(folder: Path, *command: object) -> Iterator[subprocess.Popen]:
    """A command that runs in this folder, with its output in said.txt. It is terminated when the context ends."""
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


# --- preemptions, and faults that take an administrator ---------------------------------------------------------------

_ABRUPT = ("--partition", "abrupt")


@drill("preempted-at-once", "preempted without a grace time", _STOPPED, needs="cluster", flags=_ABRUPT)
@drill("preempted", "preempted by a job with higher priority", _STOPPED, needs="preempt")
def _preempted(run: RunHandle, env: DrillEnvironment) -> Poll:
    run.submit()
    yield from run.reach(HALF)
    yield from run.preempt(env.preempt_with)
    yield from run.finish()


@drill(
    "preempted-while-writing",
    "preempted, and killed in the middle of a checkpoint",
    _KILLED,
    needs="cluster",
    flags=_ABRUPT,
)
def _preempted_while_writing(run: RunHandle, env: DrillEnvironment) -> Poll:
    """Writing a checkpoint takes longer than Slurm waits before it kills."""
    slow = Injection(env.folder / "slow-checkpoints", SLOW_CHECKPOINTS)
    with slow.inherited():
        run.submit()
    yield from run.reach(EARLY)
    slow.mark.touch()
    try:
        yield from run.until("a checkpoint is being written", lambda: any(run.folder.checkpoints.glob(".step-*")))
        yield from run.preempt(env.preempt_with)
    finally:
        slow.mark.unlink()
    yield from run.finish()


@drill("full-disk", "no space for checkpoints; space again; --resume", "failed.*No space left.*", needs="cluster")
def _full_disk(run: RunHandle, env: DrillEnvironment) -> Poll:
    assert env.cluster is not None
    with env.cluster.small_disk(run.folder.root):
        run.submit()
        yield from run.reach(HALF)
        run.record_fault("disk full")
        filler = run.folder.root / ".filler"
        fill_disk(filler, leave=3 << 15)  # 96 kB: enough for logs, not for a checkpoint
        yield from _ended(run, env, "FAILED")
        run.check_log("No space left on device", "Earlier checkpoints are intact")
        filler.unlink()
        run.resume()
        yield from run.finish()


@drill(
    "preempted-unwarned",
    "preempted by TERM, and KILL at the end of the grace time",
    _STOPPED,
    needs="cluster",
    alone=True,
)
def _preempted_unwarned(run: RunHandle, env: DrillEnvironment) -> Poll:
    assert env.cluster is not None
    with env.cluster.without_user_signal():
        yield from _preempted(run, env)


@drill("controller-restarted", "slurmctld dies, and is back after 3 s", needs="cluster", alone=True)
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
