"""The client for Slurm's commands: environment, repetition, job states."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

from launch.slurm import client, control, queue, states, submission
from launch.slurm.client import SlurmError, SlurmMissing, SlurmUnavailable

REPO = Path(__file__).resolve().parents[1]

ENDED = "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED REVOKED TIMEOUT".split()
WAITING = "PENDING REQUEUED REQUEUE_FED REQUEUE_HOLD RESV_DEL_HOLD SPECIAL_EXIT".split()
RUNNING = "CONFIGURING EXPEDITING POWER_UP_NODE RESIZING RUNNING SIGNALING STOPPED SUSPENDED".split()
NEITHER = "COMPLETING STAGE_OUT LAUNCH_FAILED RECONFIG_FAIL UPDATE_DB TELEPORTING".split() + [""]


@pytest.mark.parametrize("state", [*ENDED, *WAITING, *RUNNING, *NEITHER])
def test_each_state_is_one_of_over_pending_running_or_undecided(state):
    judged = (states.is_over(state), states.is_pending(state), states.is_running(state))
    assert judged == (state in ENDED, state in WAITING, state in RUNNING)


@pytest.mark.parametrize(
    ("shown", "over", "pending", "running"),
    [
        ("CANCELLED by 1000", True, False, False),
        ("cancelled by 1000", True, False, False),
        ("CANCELLED+", True, False, False),
        ("OUT_OF_ME+", True, False, False),
        ("RUNNING,COMPLETING", False, False, False),
        ("COMPLETED,COMPLETING", False, False, False),
        ("PENDING,REQUEUE_HOLD", False, True, False),
        ("FAILED,LAUNCH_FAILED", True, False, False),
        ("CANCELLED,UPDATE_DB", True, False, False),
        ("RUNNING,SIGNALING", False, False, True),
        ("FAILED,TELEPORTING", False, False, False),
        ("CG", False, False, False),
        ("PD", False, True, False),
        ("OOM", True, False, False),
    ],
)
def test_states_as_the_commands_show_them(shown, over, pending, running):
    assert (states.is_over(shown), states.is_pending(shown), states.is_running(shown)) == (over, pending, running)


# --- the environment --------------------------------------------------------------------------------------------------

HOSTILE = {
    "SBATCH_PARTITION": "high",
    "SBATCH_TIMELIMIT": "1",
    "SBATCH_NO_REQUEUE": "1",
    "SBATCH_EXPORT": "NONE",
    "SLURM_EXPORT_ENV": "NONE",
    "SRUN_EXPORT_ENV": "NONE",
    "SLURM_WAIT": "1",
    "SLURM_KILL_BAD_EXIT": "0",
    "SLURM_TIME_FORMAT": "%s",
    "SQUEUE_STATES": "COMPLETED",
    "SQUEUE_FORMAT": "%j",
    "SQUEUE_FORMAT2": "Name",
    "SQUEUE_USERS": "nobody",
    "SQUEUE_PARTITION": "high",
    "SACCT_FORMAT": "JobName",
    "SINFO_FORMAT": "%P",
    "SCANCEL_STATE": "SUSPENDED",
    "SCANCEL_USER": "nobody",
    "SUBMITIT_EXECUTOR": "local",
    "SUBMITIT_LOCAL_GLOBALID": "3",
}
"""What a user's profile may set; each changes what a command does, or hides jobs from it."""


def test_options_in_the_environment_reach_no_command():
    base = {"HOME": "/h", "FOO": "bar", "LANG": "de_DE.UTF-8", "LC_TIME": "de_DE", "SLURM_CONF": "/c", "SLURM_JWT": "j"}
    assert client.environment({**base, **HOSTILE}) == {
        **{"HOME": "/h", "FOO": "bar", "SLURM_CONF": "/c", "SLURM_JWT": "j", "LC_ALL": "C"}
    }
    assert client.environment({**base, **HOSTILE}, for_job=True) == base


def test_submission_within_a_job_does_not_inherit_its_variables():
    outer = {"SLURM_JOB_ID": "12", "SLURM_NTASKS": "8", "PMIX_RANK": "3", "CUDA_VISIBLE_DEVICES": "1", "FOO": "bar"}
    assert client.environment(outer, for_job=True) == {"FOO": "bar"}
    assert client.environment({"CUDA_VISIBLE_DEVICES": "1"}, for_job=True) == {"CUDA_VISIBLE_DEVICES": "1"}


# --- what is repeated -------------------------------------------------------------------------------------------------


class FakeSlurm:
    """Commands with prepared answers, one line of shell for each call (the last one is repeated); records the calls."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def will(self, command: str, *answers: str) -> None:
        cases = "".join(f"{number}) {answer} ;;\n" for number, answer in enumerate(answers[:-1], 1))
        path, calls = self.folder / command, self.folder / "calls"
        kept = calls.read_text().splitlines() if calls.exists() else []
        calls.write_text("".join(f"{line}\n" for line in kept if not line.startswith(f"{command} ")))
        path.write_text(
            f'#!/bin/bash\necho {command} "$@" >> {self.folder}/calls\nenv > {self.folder}/{command}.env\n'
            f"case $(grep -c '^{command} ' {self.folder}/calls) in\n{cases}*) {answers[-1]} ;;\nesac\n"
        )
        path.chmod(0o755)

    def calls(self, command: str) -> list[str]:
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if line.startswith(f"{command} ")]

    def environment(self, command: str) -> dict[str, str]:
        lines = (self.folder / f"{command}.env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)


@pytest.fixture
def fake(tmp_path, monkeypatch) -> FakeSlurm:
    slurm = FakeSlurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{slurm.folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(client, "_REPEAT_AFTER_S", 0.05)
    monkeypatch.setattr(submission, "_SETTLES_S", 0.05)
    return slurm


TIMED_OUT = "echo 'error: Batch job submission failed: Socket timed out on send/recv operation' >&2; exit 1"
AWAY = "echo 'error: Unable to contact slurm controller (connect failure)' >&2; exit 1"
SCRIPT = Path("/runs/a/jobs/.submission_file_0123.sh")


def test_a_job_whose_acceptance_was_not_answered_is_found_and_not_sent_again(fake):
    fake.will("sbatch", TIMED_OUT)
    fake.will("squeue", "echo '12|/runs/b/jobs/x.sh'", f"echo '11|/x.sh'; echo '13|{SCRIPT}'; echo '13|{SCRIPT}'")
    assert submission.submit(SCRIPT) == "13"
    assert len(fake.calls("sbatch")) == 1
    assert "--states=all" in fake.calls("squeue")[0], "it may have started, or ended, by now"


def test_a_job_that_was_not_accepted_is_sent_again(fake):
    fake.will("sbatch", TIMED_OUT, "echo Submitted batch job 14")
    fake.will("squeue", "true", "true", f"echo '14|{SCRIPT}'")
    assert submission.submit(SCRIPT) == "14"
    assert len(fake.calls("sbatch")) == 2


def test_late_duplicate_job_is_cancelled(fake):
    fake.will("sbatch", TIMED_OUT, "echo Submitted batch job 15")
    fake.will("squeue", "true", "true", f"echo '14|{SCRIPT}'; echo '15|{SCRIPT}'")
    fake.will("scancel", "true")
    assert submission.submit(SCRIPT) == "15"
    assert fake.calls("scancel") == ["scancel 14"]


def test_whether_it_was_accepted_may_stay_unknown(fake):
    fake.will("sbatch", TIMED_OUT)
    fake.will("squeue", AWAY)
    with pytest.raises(submission.SubmissionUnknown, match="unknown whether the job was accepted.*0123"):
        submission.submit(SCRIPT, patience_s=0.2)
    assert len(fake.calls("sbatch")) == 1


def test_refusal_after_a_lost_answer_finds_the_first_job(fake):
    """The first job has used up the limit, so the second is refused."""
    limit = "echo 'sbatch: error: Batch job submission failed: Job violates accounting/QOS policy' >&2; exit 1"
    fake.will("sbatch", TIMED_OUT, limit)
    fake.will("squeue", "true", "true", f"echo '14|{SCRIPT}'")
    assert submission.submit(SCRIPT) == "14"
    fake.will("sbatch", TIMED_OUT, limit)
    fake.will("squeue", "true", "true", AWAY)
    with pytest.raises(submission.SubmissionUnknown, match="violates.*unknown whether"):
        submission.submit(SCRIPT, patience_s=2)


def test_accepted_job_without_an_id_is_not_sent_again(fake):
    fake.will("sbatch", "true")
    for answer in ("true", AWAY, "echo 'Protocol authentication error' >&2; exit 1"):
        fake.will("squeue", answer)
        with pytest.raises(submission.SubmissionUnknown, match="does not say which job"):
            submission.submit(SCRIPT, patience_s=2)
    assert len(fake.calls("sbatch")) == 3
    fake.will("sbatch", TIMED_OUT, "echo Submitted batch job 15")
    fake.will("squeue", "true", "true", AWAY)
    assert submission.submit(SCRIPT, patience_s=2) == "15"


def test_names_in_any_encoding_are_read(fake):
    fake.will("squeue", f"printf '11|/runs/\\351t\\351/x.sh\\n12|{SCRIPT}\\n'")
    assert submission.submitted(SCRIPT) == ["12"]


def test_request_that_was_not_sent_is_repeated_at_once(fake):
    fake.will("sbatch", AWAY, AWAY, "echo Submitted batch job 7")
    fake.will("squeue", "false")
    assert submission.submit(SCRIPT) == "7"
    assert fake.calls("squeue") == []


def test_a_refusal_is_not_repeated(fake):
    fake.will("sbatch", "echo 'sbatch: error: Batch job submission failed: Invalid qos' >&2; exit 1")
    with pytest.raises(SlurmError, match="does not take the job: Batch job submission failed: Invalid qos"):
        submission.submit(SCRIPT)
    assert len(fake.calls("sbatch")) == 1


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("Batch job submission failed: Invalid wckey specification", "--wckey NAME.*sacctmgr show wckey"),
        ("Batch job submission failed: Invalid account or account/partition combination specified", "--account NAME"),
        ("Batch job submission failed: Invalid qos specification", "--qos NAME"),
        ("invalid partition specified: nope", "--partition NAME.*sinfo"),
        ("Batch job submission failed: Invalid feature specification", "--constraint"),
        ("Batch job submission failed: Job violates accounting/QOS policy", "policy$"),
    ],
)
def test_refused_setting_is_named_with_its_flag(fake, said, remedy):
    for command in ("submit", "test_only"):
        fake.will("sbatch", f"echo 'sbatch: error: {said}' >&2; exit 1")
        with pytest.raises(SlurmError, match=f"does not take the job: {said}.*{remedy}|{said}$"):
            submission.submit(SCRIPT) if command == "submit" else submission.test_only("#!/bin/sh")


@pytest.mark.parametrize(
    ("printed", "job"),
    [
        ("Submitted batch job 12", "12"),
        ("Submitted batch job 12 on cluster c", "12"),
        ("3 jobs of 10 allowed\nSubmitted batch job 12\nsee job 99 of the manual", "12"),
        ("12", "12"),
        ("12;c", "12"),
    ],
)
def test_the_id_in_what_sbatch_or_a_wrapper_prints(fake, printed, job):
    fake.will("sbatch", f"echo '{printed}'")
    assert submission.submit(SCRIPT) == job


def test_job_of_a_silent_sbatch_is_found_in_the_queue(fake):
    fake.will("sbatch", "true")
    fake.will("squeue", f"echo '12|{SCRIPT}'")
    assert submission.submit(SCRIPT) == "12"


def job_record(state: str, restarts: int) -> str:
    return f"echo 'JobId=12 JobState={state} Restarts={restarts}'"


def test_a_requeue_whose_answer_was_lost_is_not_given_twice(fake):
    """Calls of scontrol: a query, the requeue, a query."""
    fake.will("scontrol", job_record("RUNNING", 1), TIMED_OUT, job_record("COMPLETING", 2))
    control.requeue("12")
    assert [call.split()[1] for call in fake.calls("scontrol")] == ["--oneliner", "requeue", "--oneliner"]


def test_a_requeue_that_was_not_carried_out_is_given_again(fake):
    fake.will("scontrol", job_record("RUNNING", 1), TIMED_OUT, job_record("RUNNING", 1), "true")
    control.requeue("12")
    assert [call.split()[1] for call in fake.calls("scontrol")].count("requeue") == 2


def test_a_requeue_that_is_refused_says_so(fake):
    fake.will("scontrol", job_record("RUNNING", 0), "echo 'Access/permission denied for job 12' >&2; exit 1")
    with pytest.raises(SlurmError, match="permission denied"):
        control.requeue("12")
    assert len(fake.calls("scontrol")) == 2


QUEUED = "echo '12|{state}|N/A|N/A|{restarts}|None|n1|'"


def test_a_cancel_whose_answer_was_lost_is_repeated_only_while_the_job_is_there(fake):
    fake.will("scancel", TIMED_OUT)
    fake.will("squeue", QUEUED.format(state="CANCELLED", restarts=0))
    control.cancel("12")
    assert len(fake.calls("scancel")) == 1
    fake.will("squeue", QUEUED.format(state="RUNNING", restarts=0))
    fake.will("scancel", TIMED_OUT, TIMED_OUT, "true")
    control.cancel("12")
    assert len(fake.calls("scancel")) == 3


NOT_NOW = "echo 'scancel: error: Kill job error on job id 12: Job can not be altered now, try again later' >&2; exit 1"


@pytest.mark.parametrize("signal", [None, "USR2"])
def test_a_cancel_that_slurm_puts_off_is_repeated_while_the_job_is_there(fake, signal):
    """Nothing was done, so the job has to be cancelled again."""
    fake.will("squeue", QUEUED.format(state="RUNNING", restarts=0))
    fake.will("scancel", NOT_NOW, NOT_NOW, "true")
    control.cancel("12", signal=signal)
    assert len(fake.calls("scancel")) == 3
    fake.will("scancel", NOT_NOW)
    with pytest.raises(SlurmUnavailable, match="can not be altered now") as refusal:
        control.cancel("12", signal=signal, patience_s=0.2)
    assert not refusal.value.sent


def test_a_signal_is_not_repeated_for_a_job_that_has_been_requeued_since(fake):
    fake.will("squeue", QUEUED.format(state="RUNNING", restarts=0), QUEUED.format(state="RUNNING", restarts=1))
    fake.will("scancel", TIMED_OUT)
    control.cancel("12", signal="USR2")
    assert len(fake.calls("scancel")) == 1


def test_cancelling_an_ended_job_succeeds(fake):
    fake.will("scancel", "echo 'Kill job error on job id 12: Invalid job id specified' >&2; exit 1")
    control.cancel("12")
    fake.will("scancel", "echo 'Kill job error on job id 12: Access/permission denied' >&2; exit 1")
    with pytest.raises(SlurmError, match="denied"):
        control.cancel("12")


def test_command_that_fails_silently_is_reported_with_its_exit_status(fake):
    fake.will("squeue", "echo")
    fake.will("scancel", "exit 1")
    with pytest.raises(SlurmError, match=r"^`scancel 7` failed: exit status 1$"):
        control.cancel("7")


def test_unavailable_slurm_is_not_an_empty_queue(fake, monkeypatch):
    fake.will("squeue", AWAY)
    with pytest.raises(SlurmUnavailable):
        queue.queue(["12"], patience_s=0)
    fake.will("squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert queue.queue(["12"]) == {}
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SlurmMissing, match="There is no squeue on this machine"):
        queue.queue(["12"])


def test_jobs_that_are_over_are_not_in_the_queue_and_unknown_states_are(fake):
    rows = [("12_0", "COMPLETED"), ("12_1", "TELEPORTING"), ("12_2", "REQUEUE_HOLD"), ("12_3", "COMPLETING")]
    fake.will("squeue", "; ".join(f"echo '{id}|{state}|N/A|N/A|0|None||'" for id, state in rows))
    assert list(queue.queue(["12"])) == ["12_1", "12_2", "12_3"]


def test_hanging_command_times_out(fake):
    fake.will("squeue", "exec sleep 30")
    with pytest.raises(SlurmUnavailable, match="does not answer within 0 s"):
        queue.queue(["12"], patience_s=0, answer_s=0.2)


def test_every_command_gets_the_clean_environment(fake, monkeypatch):
    for name, value in HOSTILE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LANG", "de_DE.UTF-8")
    for command, answer in (
        ("sbatch", "echo Submitted batch job 1"),
        *((each, "true") for each in ("squeue", "sacct")),
    ):
        fake.will(command, answer)
    fake.will("scontrol", "true")
    fake.will("scancel", "true")
    submission.submit(SCRIPT)
    submission.test_only("#!/bin/sh")
    queue.queue(["1"])
    queue.history(["1"])
    control.requeue("1")
    control.cancel("1", signal="TERM")
    for command in ("sbatch", "squeue", "sacct", "scontrol", "scancel"):
        got = fake.environment(command)
        assert not HOSTILE.keys() & got.keys(), command
        assert got.get("LC_ALL") == (None if command == "sbatch" else "C") or "LC_ALL" in os.environ


# --- one client -------------------------------------------------------------------------------------------------------

COMMANDS = {"sacct", "sacctmgr", "salloc", "sbatch", "scancel", "scontrol", "sinfo", "squeue", "srun", "sstat"}


def stray_calls(source: str) -> list[str]:
    """Lines on which a module starts one of Slurm's commands by itself: a call of subprocess or os with its name, or a
    list that begins with it."""
    found = []
    for node in ast.walk(ast.parse(source)):
        words: list[ast.expr] = []
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith(("subprocess.", "os.")):
            words = [each for argument in node.args for each in [argument, *getattr(argument, "elts", [])[:1]]]
        elif isinstance(node, ast.List):
            words = node.elts[:1]
        texts = [word.value for word in words if isinstance(word, ast.Constant) and isinstance(word.value, str)]
        if any(text.split()[:1] and text.split()[0] in COMMANDS for text in texts):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def test_only_the_client_starts_commands_of_slurm():
    planted = "import subprocess\nsubprocess.run(['scontrol', 'requeue'])\nsubprocess.call('squeue -h', shell=True)\n"
    assert len(stray_calls(planted + "command = ['sacct', '-X']\nos.system('scancel 12')\n")) == 5
    stray = {
        str(path.relative_to(REPO)): calls
        for part in ("launch", "tools", "cfmask")
        for path in sorted((REPO / part).rglob("*.py"))
        if not path.is_relative_to(REPO / "launch/slurm") and (calls := stray_calls(path.read_text()))
    }
    assert not stray, stray
