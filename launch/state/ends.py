"""How to read the recorded reason of a start's end: ``why`` in ended.json, ``why_last_ended`` in attempts.jsonl."""

from __future__ import annotations

FINISHED = "finished"
KILLED = "killed without notice"
"""The reason of a start that has recorded none."""
AT_TIME_LIMIT = ", at the time limit"
"""The end of the reason if a start stopped for its time limit, which tells it from a preempted one."""


def is_stopped(why: str) -> bool:
    """Whether the start ended on request: by a signal, a preemption, or its time limit."""
    return why.startswith("stopped")


def is_given_up(why: str) -> bool:
    return "given up: " in why


def comes_back(why: str) -> bool:
    """Whether the start ended in order to be repeated."""
    repeated = "requeue" in why or why.startswith("lost a rank") or "starts again" in why or "resumes the run" in why
    return repeated and not is_given_up(why)


def cause_of_requeue(why: str) -> str:
    """What ended a start that is to be repeated, in a word or two: "preempted", "time limit", "node failed"."""
    if why.endswith(AT_TIME_LIMIT):
        return "time limit"
    if is_stopped(why) and "requeue" in why:
        return "preempted"
    if why.startswith("lost a rank"):
        return "lost a rank"
    return "killed" if why == KILLED else why.removeprefix("killed: ") if why.startswith("killed: ") else "requeued"
