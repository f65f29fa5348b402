"""The end of a batch script, in sh: prints the failure report of the rank that failed first, and requeues the job where
Python has decided so but cannot do it: after the loss of a node, and for ranks in a container without scontrol.

The variable $status has the exit code of srun, and ``LOGGED`` stands at the beginning of the script. It follows
``policy.verdict``; tests/test_restarts.py compares the two.
"""

from __future__ import annotations

from launch.restarts.policy import REQUEUE_IF_PREEMPTED, REQUEUE_ME
from launch.restarts.slurm_record import REQUEUES_PREEMPTED

LOGGED = """logged() { sed "s/^/$(date '+%Y-%m-%d %H:%M:%S') $1 batch ${SLURMD_NODENAME:-$(uname -n)} | /"; }"""
"""Defines `echo text | logged ERROR` in sh, with time, level and node as in cfmask/runtime/logging.py."""


def batch_script_end(failures: str) -> list[str]:
    """The last lines of a batch script.

    Args:
        failures: RUN/jobs/failures, quoted for the shell.
    """
    major, minor = REQUEUES_PREEMPTED
    return [
        "attempt=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
        "-${SLURM_RESTART_COUNT:-0}",
        f'report={failures}/"$attempt"',
        'if [ "$status" -ne 0 -a -e "$report.txt" ]; then logged ERROR <"$report.txt"; fi',
        "requeue=",
        f'if [ "$status" -eq {REQUEUE_ME} ] || [ "$status" -ne 0 -a -e "$report.restart" ]; then requeue=1; fi',
        f'if [ "$status" -eq {REQUEUE_IF_PREEMPTED} ] || [ -n "$requeue" ]; then',
        '    job=$(scontrol --oneliner show job "$SLURM_JOB_ID")',
        "    slurm=$(scontrol --version | tr . ' ' | while read -r _ a b _; do echo $((a * 100 + ${b#0})); done)",
        '    case "$job" in *" PreemptTime="[0-9]*)',
        "        requeue=1",
        f'        if [ "${{slurm:-0}}" -ge {100 * major + minor} ]; then',
        "            config=$(scontrol show config)",
        '            case "$config" in',
        '                *preempt/qos*) mode=$(sacctmgr -nP show qos "$SLURM_JOB_QOS" format=PreemptMode) ;;',
        '                *) mode=$(scontrol --oneliner show partition "$SLURM_JOB_PARTITION")',
        "                   mode=$(echo \"$mode\" | sed -n 's/.*PreemptMode=\\([^ ]*\\).*/\\1/p') ;;",
        "            esac",
        '            case "$mode" in "" | [Cc]luster | CLUSTER)',
        "                mode=$(echo \"$config\" | sed -n 's/^PreemptMode *= *//p') ;;",
        "            esac",
        '            case "$mode" in *REQUEUE* | *requeue*) requeue= ;; esac',
        "        fi ;;",
        "    esac",
        '    case "$job" in *" JobState=RUNNING "* | "") ;; *) requeue= ;; esac  # else Slurm is ending it already',
        "fi",
        # The requeue ends this script with TERM, then KILL after KillWait. Only a pending job can be updated.
        "trap '' TERM",
        'for again in ${requeue:+1 2 3 4 5 6}; do scontrol requeue "$SLURM_JOB_ID" && break; sleep 10; done',
        'if [ -n "$requeue" -a -s "$report.exclude" ]; then',
        "    for again in 1 2 3 4 5; do",
        '        scontrol update "jobid=$SLURM_JOB_ID" "ExcNodeList=$(cat "$report.exclude")" && break; sleep 1',
        "    done",
        "fi",
        'exit "$status"',
    ]
