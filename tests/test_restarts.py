"""The restart policy: the budget of starts without progress, and who requeues a job, on records of several versions of
Slurm."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from cfmask.runtime.attempts import AttemptLog
from cfmask.runtime.logging import message_of
from launch.restarts import policy as restart_policy
from launch.restarts import slurm_record
from launch.restarts.batch_script_end import LOGGED, batch_script_end
from launch.restarts.policy import (
    REQUEUE_IF_PREEMPTED,
    REQUEUE_ME,
    STOPPED,
    Cause,
    GivenUp,
    JobStart,
    Restarts,
    Verdict,
    starts_without_progress,
    verdict,
)
from launch.restarts.slurm_record import JobRecord, seconds_left
from launch.slurm.client import SlurmError, SlurmUnavailable
from launch.slurm.texts import parse_records

# --- the budget -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("starts", "restart", "progress", "idle"),
    [
        ([], 0, 0, 0),
        ([], 4, 0, 4),
        ([(0, 0), (1, 0), (2, 0)], 3, 0, 3),
        ([(0, 0)], 4, 0, 4),
        ([(0, 0)], 1, 50, 0),
        ([(0, 0)], 4, 50, 3),
        ([(0, 0), (1, 50), (2, 50)], 3, 50, 2),
        ([(0, 0), (1, 50), (5, 60)], 6, 60, 1),
        ([(0, 0), (1, 50), (2, 40), (3, 40)], 4, 40, 3),
        ([(7, 0)], 8, 0, 1),
    ],
    ids=[
        "the first",
        "no start was recorded",
        "all were recorded",
        "three died before they were recorded",
        "the last one got on",
        "the last recorded one got on, later ones died unrecorded",
        "since progress was made",
        "progress resets the count",
        "a damaged checkpoint is no progress",
        "restarted before this log was kept",
    ],
)
def test_starts_without_progress(starts, restart, progress, idle):
    assert starts_without_progress([JobStart(*start) for start in starts], restart, progress) == idle


def policy(folder: Path, restart: int | None = 0, *, limit: int = 3, job: str = "12") -> Restarts:
    return Restarts(AttemptLog(folder), job, restart, limit, resume="submit.py --resume RUN")


def begins(folder: Path, restart: int | None, progress: int, why: str, **more) -> None:
    """A start, from its check to its end."""
    here = policy(folder, restart, **more)
    here.check_start(progress)
    here.begin(progress)
    here.log.end_attempt(why)


@pytest.mark.parametrize("limit", [0, 1, 3])
@pytest.mark.parametrize("slurm", [True, False], ids=["slurm", "local"])
def test_so_many_restarts_without_progress_and_no_more(tmp_path, limit, slurm):
    for restart in range(limit + 1):
        begins(tmp_path, restart if slurm else None, 50, f"failed: no. {restart % 2}", limit=limit)
        spent = restart == limit
        try:
            policy(tmp_path, restart if slurm else None, limit=limit).check_restart(50)
            assert not spent
        except GivenUp:
            assert spent
    with pytest.raises(GivenUp) as given_up:
        policy(tmp_path, limit + 1 if slurm else None, limit=limit).check_start(50)
    said = str(given_up.value)
    assert f"--restarts-without-progress allows {limit}" in said and "beyond step 50" in said
    assert f"failed: no. {limit % 2}" in said and said.endswith("submit.py --resume RUN")
    policy(tmp_path, limit + 1 if slurm else None, limit=limit).check_start(51)


def test_a_job_that_gets_on_is_restarted_for_ever(tmp_path):
    for restart in range(100):
        begins(tmp_path, restart, restart, "stopped", limit=0)
        policy(tmp_path, restart, limit=0).check_restart(restart + 1)


def test_a_new_submission_has_a_budget_of_its_own(tmp_path):
    for restart in range(4):
        begins(tmp_path, restart, 50, "failed")
    with pytest.raises(GivenUp):
        policy(tmp_path, 4).check_start(50)
    policy(tmp_path, 0, job="13").check_start(50)
    begins(tmp_path, 0, 50, "failed", job="13")
    policy(tmp_path, 1, job="13").check_start(50)


def test_a_local_job_whose_number_comes_again_has_a_fresh_budget(tmp_path):
    for job in ("7", "8", "7"):
        for _ in range(4):
            begins(tmp_path, None, 50, "failed", job=job)


def test_array_tasks_have_budgets_of_their_own(tmp_path):
    for restart in range(4):
        begins(tmp_path, restart, 0, "failed", job="12_1")
    policy(tmp_path, 4, job="12_2", limit=4).check_start(0)
    with pytest.raises(GivenUp, match="job 12_1 "):
        policy(tmp_path, 4, job="12_1").check_start(0)


# --- who requeues -----------------------------------------------------------------------------------------------------

SHOWN = (
    "JobId=4711 JobName=cfmask-run UserId=me(1000) GroupId=me(1000) MCS_label=N/A Priority=4294901757 Nice=0 "
    "Account=(null) QOS=normal JobState={state} Reason={reason} Dependency=(null) Requeue=1 Restarts=0 BatchFlag=1 "
    "Reboot=0 ExitCode=0:0 RunTime=00:00:20 TimeLimit=00:30:00 TimeMin=N/A SubmitTime=2026-11-24T12:00:00 "
    "EligibleTime=2026-11-24T12:00:00 AccrueTime=2026-11-24T12:00:00 StartTime=2026-11-24T12:00:01 "
    "EndTime=2026-11-24T12:10:00 Deadline=N/A PreemptEligibleTime=2026-11-24T12:00:01 PreemptTime={preempted} "
    "SuspendTime=None SecsPreSuspend=0 Partition=low AllocNode:Sid=login:1 NodeList=n[1-2]"
)
OLD, NEW = [(22, 5), (23, 2), (23, 11)], [(24, 5), (24, 11), (26, 5)]


def record(state="RUNNING", preempted=False, slurm=(22, 5), preempt_mode="REQUEUE", reason="None") -> JobRecord:
    text = SHOWN.format(state=state, reason=reason, preempted="2026-11-24T12:05:00" if preempted else "None")
    [shown] = parse_records(text, first="JobId")
    return JobRecord.of(shown, slurm=slurm, preempt_mode=preempt_mode)


@pytest.mark.parametrize("cause", Cause)
@pytest.mark.parametrize("slurm", OLD)
def test_until_23_11_a_preempted_job_requeues_itself(cause, slurm):
    assert verdict(cause, record(preempted=True, slurm=slurm)) is Verdict.REQUEUE


@pytest.mark.parametrize("cause", Cause)
@pytest.mark.parametrize("slurm", NEW)
def test_from_24_05_slurm_requeues_a_preempted_job_where_that_is_its_mode(cause, slurm):
    for mode in ("REQUEUE", "GANG,REQUEUE", "requeue"):
        assert verdict(cause, record(preempted=True, slurm=slurm, preempt_mode=mode)) is Verdict.SLURM_DECIDES
    assert verdict(cause, record(preempted=True, slurm=slurm, preempt_mode="CANCEL")) is Verdict.REQUEUE


@pytest.mark.parametrize("slurm", OLD + NEW)
def test_a_job_that_runs_and_is_not_preempted_comes_back_if_it_was_warned_or_lost_a_node(slurm):
    job = record(slurm=slurm)
    assert verdict(Cause.WARNED, job) is verdict(Cause.NODE_LOST, job) is Verdict.REQUEUE
    assert verdict(Cause.TERMINATED, job) is Verdict.END


@pytest.mark.parametrize("cause", Cause)
@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "PENDING", "REQUEUED", "PREEMPTED", "NODE_FAIL", ""])
def test_a_job_that_slurm_is_ending_is_left_to_it(cause, state):
    for preempted in (False, True):
        assert verdict(cause, record(state, preempted=preempted)) is Verdict.SLURM_DECIDES


def test_without_an_answer_a_warned_job_asks_for_a_requeue_and_a_terminated_one_waits():
    assert verdict(Cause.WARNED, None) is verdict(Cause.NODE_LOST, None) is Verdict.REQUEUE
    assert verdict(Cause.TERMINATED, None) is Verdict.UNKNOWN


def test_seconds_left():
    job = record()
    now = job.end_time - 100
    assert seconds_left(job, now) == 100, "the time limit, or the end of the grace time"
    assert seconds_left(job, job.end_time + 1) == 0
    ending = record("COMPLETING")
    assert seconds_left(ending, ending.end_time + 10, kill_wait_s=30) == 20, "KillWait begins at the end time"
    assert seconds_left(ending, ending.end_time - 100, kill_wait_s=30) == 30, "clocks of nodes differ"
    assert seconds_left(None, now, kill_wait_s=30) == 30


# --- acting -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def slurm(monkeypatch) -> list[tuple[str, ...]]:
    """Slurm's commands, recorded; each answer is the next of ``slurm.answers``' records, None for none."""

    class Asked(list):
        answers: list = []

    asked = Asked()

    def answer(job: str) -> JobRecord | None:
        asked.append(("show", job))
        given = asked.answers.pop(0) if len(asked.answers) > 1 else asked.answers[0]
        if isinstance(given, Exception):
            raise given
        return given

    def requeue(job: str, **given) -> None:
        asked.append(("scontrol", "requeue", job))

    monkeypatch.setattr(restart_policy, "slurm_record", answer)
    monkeypatch.setattr(restart_policy, "requeue", requeue)
    monkeypatch.setattr(restart_policy.shutil, "which", lambda name: "/usr/bin/" + name)
    monkeypatch.setattr(restart_policy, "_ASK_AGAIN_S", 0.0)
    monkeypatch.setattr(restart_policy, "_SETTLED_S", 0.2)
    return asked


REQUEUE = ("scontrol", "requeue", "12")


@pytest.mark.parametrize(
    ("cause", "answers", "code", "requeues"),
    [
        (Cause.WARNED, [record()], 0, True),
        (Cause.WARNED, [record(preempted=True)], 0, True),
        (Cause.WARNED, [record(preempted=True, slurm=(24, 11))], STOPPED, False),
        (Cause.WARNED, [None], 0, True),
        (Cause.TERMINATED, [record()], STOPPED, False),
        (Cause.TERMINATED, [record(), record(preempted=True)], 0, True),
        (Cause.TERMINATED, [record(preempted=True, slurm=(24, 11))], STOPPED, False),
        (Cause.TERMINATED, [record(), record("COMPLETING")], STOPPED, False),
        (Cause.TERMINATED, [None, None, record(preempted=True)], 0, True),
    ],
)
def test_rank_0_requeues_or_leaves_it_to_slurm(tmp_path, slurm, cause, answers, code, requeues):
    slurm.answers = answers
    policy(tmp_path).begin(0)
    assert policy(tmp_path).after_stop(cause, progress=10) == code
    assert (REQUEUE in slurm) == requeues


@pytest.mark.parametrize(
    ("cause", "code"), [(Cause.TERMINATED, REQUEUE_IF_PREEMPTED), (Cause.WARNED, 0)], ids=lambda value: str(value)
)
def test_the_batch_script_asks_where_commands_of_slurm_fail(tmp_path, slurm, monkeypatch, cause, code):
    """A container may have the commands and not the keys: nobody would end a rank that waits for an answer."""
    monkeypatch.setattr(restart_policy, "_REQUEUE_PATIENCE_S", 0.2)
    slurm.answers = [SlurmError("`scontrol show job` failed: Protocol authentication error")]
    policy(tmp_path).begin(0)
    assert policy(tmp_path).after_stop(cause, progress=10) == code
    slurm.answers = [SlurmError("once"), record(preempted=True)]
    assert policy(tmp_path).after_stop(cause, progress=10) == 0 and REQUEUE in slurm


def test_a_cancelled_run_ends_whatever_slurm_says(tmp_path, slurm):
    slurm.answers = [None]
    looks = iter([False, False, True])
    assert policy(tmp_path).after_stop(Cause.TERMINATED, 10, lambda: next(looks, True)) == 0
    assert policy(tmp_path).after_stop(Cause.WARNED, 10, lambda: True) == 0
    assert REQUEUE not in slurm


def test_no_requeue_is_asked_for_that_would_only_be_given_up(tmp_path, slurm, monkeypatch):
    slurm.answers = [record()]
    for restart in range(4):
        begins(tmp_path, restart, 50, "stopped at step 55, its checkpoint could not be written")
    with pytest.raises(GivenUp, match=r"could not be written \(4 times\)"):
        policy(tmp_path, 3).after_stop(Cause.WARNED, progress=50)
    monkeypatch.setattr(restart_policy.shutil, "which", lambda name: None)
    with pytest.raises(GivenUp):
        policy(tmp_path, 3).after_stop(Cause.WARNED, progress=50)
    assert REQUEUE not in slurm
    assert policy(tmp_path, 3).after_stop(Cause.WARNED, progress=55) == REQUEUE_ME


def test_a_requeue_that_slurm_does_not_take_is_the_batch_scripts(tmp_path, slurm, monkeypatch):
    slurm.answers = [record()]

    def away(job: str, **given) -> None:
        raise SlurmUnavailable("away")

    monkeypatch.setattr(restart_policy, "requeue", away)
    assert policy(tmp_path).after_stop(Cause.WARNED, progress=10) == REQUEUE_ME


def test_in_a_container_without_scontrol_the_batch_script_is_asked(tmp_path, slurm, monkeypatch):
    monkeypatch.setattr(restart_policy.shutil, "which", lambda name: None)
    assert policy(tmp_path).after_stop(Cause.WARNED, progress=10) == REQUEUE_ME
    assert policy(tmp_path).after_stop(Cause.TERMINATED, progress=10) == REQUEUE_IF_PREEMPTED


def test_on_this_machine_the_controller_is_asked_or_nobody(tmp_path):
    assert policy(tmp_path, None).after_stop(Cause.WARNED, progress=10) == REQUEUE_ME
    assert policy(tmp_path, None).after_stop(Cause.TERMINATED, progress=10) == STOPPED


# --- the batch script -------------------------------------------------------------------------------------------------

SCONTROL = """#!/bin/sh
case "$*" in
--version) echo "slurm-wlm $SLURM_VERSION_SHOWN" ;;
*"show job"*) cat "$SHOWN" ;;
*"show config"*) printf 'PreemptMode             = %s\n' "$MODE_OF_CLUSTER"; echo "PreemptType = $PREEMPT_TYPE" ;;
*"show partition"*) echo "PartitionName=low-REQUEUE QoS=N/A PreemptMode=$MODE State=UP" ;;
*) echo "$@" >> "$ASKED" ;;
esac
"""


@pytest.mark.parametrize("version", ["22.05.8", "23.11.10", "24.05.0"])
@pytest.mark.parametrize("mode", ["REQUEUE", "CANCEL"])
@pytest.mark.parametrize("preempted", [False, True])
@pytest.mark.parametrize("state", ["RUNNING", "COMPLETING"])
@pytest.mark.parametrize(
    ("code", "lost"),
    [(0, True), (1, False), (1, True), (REQUEUE_ME, False), (REQUEUE_IF_PREEMPTED, False), (STOPPED, False)],
)
def test_the_batch_script_decides_as_python_does(tmp_path, version, mode, preempted, state, code, lost):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/scontrol").write_text(SCONTROL)
    (tmp_path / "bin/scontrol").chmod(0o755)
    (tmp_path / "shown").write_text(
        SHOWN.format(state=state, reason="None", preempted="2026-11-24T12:05:00" if preempted else "None")
    )
    (tmp_path / "12-1.txt").write_text("rank 1 failed first\n")
    if lost:
        (tmp_path / "12-1.restart").touch()
    script = "\n".join([LOGGED, f"status={code}", *batch_script_end(str(tmp_path))])
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        **{"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "1", "SLURM_VERSION_SHOWN": version},
        **{"SHOWN": str(tmp_path / "shown"), "ASKED": str(tmp_path / "asked")},
        **{"PREEMPT_TYPE": "preempt/partition_prio", "MODE": mode, "MODE_OF_CLUSTER": "OFF"},
    }
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == code
    assert [message_of(line) for line in done.stdout.splitlines()] == ["rank 1 failed first"] * (code != 0)
    cause = {REQUEUE_ME: Cause.WARNED, REQUEUE_IF_PREEMPTED: Cause.TERMINATED}.get(code)
    if code and lost:
        cause = Cause.NODE_LOST
    number = tuple(int(part) for part in version.split(".")[:2])
    decided = verdict(cause, record(state, preempted, number, mode)) if cause else Verdict.END
    assert (tmp_path / "asked").exists() == (decided is Verdict.REQUEUE)


@pytest.mark.parametrize(
    ("kind", "of_qos", "of_partition", "of_cluster", "comes_back_by_itself"),
    [
        ("preempt/qos", "requeue", "CANCEL", "CANCEL", True),
        ("preempt/qos", "cancel", "REQUEUE", "REQUEUE", False),
        ("preempt/qos", "cluster", "CANCEL", "GANG,REQUEUE", True),
        ("preempt/partition_prio", "requeue", "GANG,CANCEL", "REQUEUE", False),
        ("preempt/partition_prio", "requeue", "", "REQUEUE", True),
    ],
)
def test_the_batch_script_finds_the_preempt_mode(
    tmp_path, kind, of_qos, of_partition, of_cluster, comes_back_by_itself
):
    """Of a preempted job on Slurm 24.05, whose ranks are in a container."""
    (tmp_path / "bin").mkdir()
    for name, text in (("scontrol", SCONTROL), ("sacctmgr", f"#!/bin/sh\necho {of_qos}\n")):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "shown").write_text(SHOWN.format(state="RUNNING", reason="None", preempted="2026-11-24T12:05:00"))
    script = "\n".join([LOGGED, f"status={REQUEUE_IF_PREEMPTED}", *batch_script_end(str(tmp_path))])
    environment = {
        **{"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "12", "SLURM_VERSION_SHOWN": "24.05.1"},
        **{"SHOWN": str(tmp_path / "shown"), "ASKED": str(tmp_path / "asked")},
        **{"PREEMPT_TYPE": kind, "MODE": of_partition, "MODE_OF_CLUSTER": of_cluster},
    }
    subprocess.run(["bash", "-u", "-c", f"SLURM_JOB_QOS=q SLURM_JOB_PARTITION=low\n{script}"], env=environment)
    assert (tmp_path / "asked").exists() != comes_back_by_itself


@pytest.mark.parametrize(
    ("config", "answers", "mode"),
    [
        ({"PreemptType": "preempt/qos"}, {"sacctmgr": "cancel\n"}, "cancel"),
        ({"PreemptType": "preempt/qos"}, {"sacctmgr": "cluster\n"}, "SUSPEND"),
        ({"PreemptType": "preempt/qos"}, {}, "SUSPEND"),
        ({"PreemptType": "preempt/partition_prio"}, {"scontrol": "PartitionName=low PreemptMode=REQUEUE"}, "REQUEUE"),
        ({"PreemptType": "preempt/partition_prio"}, {"scontrol": "PartitionName=low State=UP"}, "SUSPEND"),
        ({"PreemptType": "preempt/partition_prio"}, {"scontrol": ""}, "SUSPEND"),
    ],
)
def test_the_preempt_mode_is_that_of_the_jobs_qos_or_partition_else_the_sites(monkeypatch, config, answers, mode):
    def ask(command: str, *words: str, patience_s: float) -> str:
        assert words[-1] == "low" or "low" in words
        if command not in answers:
            raise SlurmError("no database")
        return answers[command]

    monkeypatch.setattr(slurm_record, "read_config", lambda patience_s: {"PreemptMode": "SUSPEND", **config})
    monkeypatch.setattr(slurm_record, "ask", ask)
    assert slurm_record._preempt_mode({"QOS": "low", "Partition": "low"}, 0) == mode
