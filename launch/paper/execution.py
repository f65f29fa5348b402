"""Submits the missing jobs of a plan to Slurm, or runs them on this machine."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace

from cfmask.errors import UserError
from cfmask.evaluation_spec import Evaluation
from launch.allocation.resolve import Allocation
from launch.paper.plan import DONE, QUEUED, WAITING, PlanNode, arrays, awaited, to_submit
from launch.paper.progress import NodeStatus, count_jobs, states_of
from launch.paper.reproduction import Reproduction
from launch.slurm.control import cancel
from launch.submission.dependencies import after_success
from launch.submission.planning import PlannedJob, claim_run_folders
from launch.submission.submit import check_with_slurm, enqueue_all, run_one_here


def submit_jobs(reproduction: Reproduction, statuses: Mapping[str, NodeStatus]) -> int:
    """Submit a job for each node that needs one, with a dependency on the jobs whose models it reads. Nodes that wait
    for the same jobs form an array.

    Returns:
        The exit code, 0.

    Raises:
        UserError: Slurm does not answer, or rejects a job. Jobs that were submitted before stay in the queue.
    """
    states = states_of(statuses)
    unknown = [name for name, each in statuses.items() if each.status.state == "unknown"]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise UserError(
            f"squeue does not answer: the state of {unknown[0]}{more} is unknown, and nothing was submitted. Repeat "
            "the command when it answers."
        )
    jobs = {name: each.jobs[-1].id for name, each in statuses.items() if each.jobs and each.state in (QUEUED, WAITING)}
    chosen = to_submit(reproduction.plan, states)
    if not chosen:
        print("Nothing to submit: another command has submitted the jobs since.")
        return 0
    first = PlannedJob(reproduction.folder(chosen[0].name), chosen[0].work)
    check_with_slurm([first], replace(reproduction.allocation, dependency=None))
    submitted = 0
    for group in arrays(chosen, states):
        waits = awaited(group[0], states)
        if elsewhere := [name for name in waits if name not in jobs]:
            raise UserError(
                f"{elsewhere[0]} runs outside Slurm ({statuses[elsewhere[0]].status.state}), so that a job of "
                f"{group[0].name} cannot wait for it. Repeat the command when it has ended."
            )
        for node in group:
            before = statuses[node.name]
            if before.job is not None:
                print(f"{node.name}: job {before.job.id} is cancelled: it waits for a job that no longer exists")
                cancel(*(job.id for job in before.jobs))
            elif why := _why_repeated(before):
                print(f"{node.name} {why}: submitted again")
        planned = _prepare(reproduction, group, statuses)
        allocation = reproduction.allocation
        if isinstance(group[0].work, Evaluation):
            allocation = _on_one_node(allocation)
        if waits:  # those jobs have waited for --dependency already
            allocation = after_success(replace(allocation, dependency=None), [jobs[name] for name in waits])
        try:
            for part in enqueue_all(planned, allocation):
                for each, job in part:
                    name = each.run.root.name
                    jobs[name] = job.job_id
                    print(f"{name}: job {job.job_id}" + (f" after {', '.join(waits)}" if waits else ""))
                submitted += len(part)
        except UserError as error:
            raise UserError(
                f"{error} {submitted} of {count_jobs(len(chosen))} have been submitted; the same command submits the "
                "rest."
            ) from None
    folder = shlex.quote(str(reproduction.setup.folder))
    print(
        f"{count_jobs(len(chosen))} submitted on {reproduction.allocation}. The same command shows the table as it "
        f"grows, and submits what has failed; python launch/status.py {folder} shows the jobs."
    )
    return 0


def run_here(reproduction: Reproduction, statuses: Mapping[str, NodeStatus]) -> int:
    """Run the jobs one after the other on this machine. A job that needs the model of a failed one is skipped.

    Returns:
        The exit code: 0, 1 if a job failed or was skipped, 128 + the number of the signal that ended the command.
    """
    states = states_of(statuses)
    chosen = to_submit(reproduction.plan, states)
    failed = []
    for number, node in enumerate(chosen, 1):
        if lacking := [name for name in node.after if states[name] != DONE]:
            print(f"{node.name} is skipped: it needs {', '.join(lacking)}")
            failed.append(node.name)
            continue
        before = statuses[node.name]
        why = _why_repeated(before)
        print(f"\n{number} of {len(chosen)}: {node.name}" + (f" ({why}: resumed)" if why else ""), flush=True)
        [planned] = _prepare(reproduction, [node], statuses)
        code = run_one_here(planned, reproduction.allocation, follow=True)
        if code > 128:  # a signal ends the whole command
            return code
        if code:
            failed.append(node.name)
        else:
            states[node.name] = DONE
    if failed:
        print(f"{len(failed)} of {count_jobs(len(chosen))} are not done: {', '.join(failed)}")
    return 1 if failed else 0


def _prepare(
    reproduction: Reproduction, nodes: Sequence[PlanNode], statuses: Mapping[str, NodeStatus]
) -> list[PlannedJob]:
    """Claim the run folders of the nodes, and remove results of models that have been replaced."""
    planned = claim_run_folders([PlannedJob(reproduction.folder(node.name), node.work) for node in nodes])
    for node in nodes:
        if statuses[node.name].status.state == "finished":
            reproduction.folder(node.name).drop_results()
    return planned


def _why_repeated(before: NodeStatus) -> str | None:
    """Why a node that has started before is submitted again; None if it has not."""
    if before.status.state == "never started":
        return None
    if before.status.state == "finished":
        return "used models that have been replaced since"
    return f"is {before.status.state}" + (f" ({before.status.last_end})" if before.status.last_end else "")


def _on_one_node(allocation: Allocation) -> Allocation:
    """The allocation of an evaluation: one node suffices, and the result does not depend on the number of nodes."""
    return replace(allocation, nodes=1, again={**allocation.again, "nodes": 1})


def describe_arrays(groups: Sequence[Sequence[PlanNode]]) -> str:
    """The end of a sentence: how many of the jobs are members of arrays."""
    sizes = [len(group) for group in groups if len(group) > 1]
    return f", {sum(sizes)} of them in {len(sizes)} array" + ("s" if len(sizes) > 1 else "") if sizes else ""
