#!/usr/bin/env python3
"""Interrupt small training runs in every way that a cluster can, and see that each ends with the weights of one that
was left alone, bit for bit.

    python launch/drill.py --nodes 2                                   all that a user may do on this cluster
    python launch/drill.py --nodes 2 --preempt-with='--partition=high' and real preemptions, by a job submitted so
    python launch/drill.py --drills requeued rank-killed               these
    python launch/drill.py --list                                      what there is

All other flags are submit.py's, and so is the cluster file. On the Slurm of slurm/cluster.py the drills that take an
administrator are done as well: nodes and the controller are killed, a disk is filled.

Exit codes: 0 every drill that was done went as it has to, 1 one did not, 2 refused, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from tqdm import tqdm  # noqa: E402

from cfmask.errors import UserError, exits_cleanly  # noqa: E402
from cfmask.runs import RunFolder, read_lines  # noqa: E402
from launch.drills.cluster import Box, fill_disk, slow_disk  # noqa: E402
from launch.drills.handle import Act, Stage, Trouble, slurm  # noqa: E402
from launch.drills.materials import make_materials  # noqa: E402
from launch.jobs.allocation import resolve_allocation  # noqa: E402
from launch.jobs.cluster_file import load_cluster_file  # noqa: E402
from launch.jobs.training import add_submit_arguments  # noqa: E402

STEPS = 120  # 4 epochs of 480 images, 16 a step
EARLY, HALF = 25, 63
_RECIPE = (
    *("--epochs", "4", "--batch-size", "16", "--lanes", "16", "--warmup-steps", "2", "--lr", "1e-3"),
    *("--checkpoint-steps", "20", "--keep-checkpoints", "999", "--log-steps", "1"),
)


# --- drills ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drill:
    """One way to interrupt a run.

    what: is done, in words. act: does it. story: a pattern of what attempts.jsonl says of why its starts ended, all but
    the last, joined by "; ". needs: what not every user has ("preempt": a job that preempts, "box": to administer the
    cluster). nodes: at least. flags: of submit.py. lasts_s: how long the run is to train undisturbed, in place of what
    --pace says. same: it ends with the very weights, which another number of ranks does not. alone: nothing else may
    run meanwhile.
    """

    name: str
    what: str
    act: Callable[[Stage, Scene], Act]
    story: str = ""
    needs: str = ""
    nodes: int = 1
    flags: tuple[str, ...] = ()
    lasts_s: float | None = None
    same: bool = True
    alone: bool = False


@dataclass(frozen=True)
class Scene:
    """Where drills are done. flags: of submit.py. nodes: of a run. box: the cluster, if it is slurm/cluster.py's.
    preempt_with: arguments of sbatch for a job that preempts these; empty if there is no such right. pace_s: how long a
    run stays at each step. patience_s: how long anything may take that is waited for."""

    folder: Path
    flags: tuple[str, ...]
    nodes: int
    box: Box | None
    preempt_with: tuple[str, ...]
    pace_s: float
    patience_s: float

    def stage(self, drill: Drill) -> Stage:
        pace_s = self.pace_s if drill.lasts_s is None else drill.lasts_s / STEPS
        flags = (*self.flags, *drill.flags)
        return Stage(self.folder / drill.name, flags, pace_s=pace_s, patience_s=self.patience_s)

    def lacks(self, drill: Drill) -> str | None:
        """Why a drill cannot be done here; None if it can."""
        if drill.nodes > self.nodes:
            return f"needs --nodes {drill.nodes}"
        if drill.needs == "preempt" and not self.preempt_with:
            return "needs --preempt-with"
        return "needs the cluster of slurm/cluster.py" if drill.needs == "box" and self.box is None else None


def _undisturbed(stage: Stage, scene: Scene) -> Act:
    stage.submit()
    yield from stage.finish()


def _comes_back_after(what: str, *command: str) -> Callable[[Stage, Scene], Act]:
    """The act in which one of Slurm's commands is given for the job, half way."""

    def act(stage: Stage, scene: Scene) -> Act:
        stage.submit()
        yield from stage.reach(HALF)
        stage.disturb(what)
        slurm(*command, stage.job)
        yield from stage.restart()
        yield from stage.finish()

    return act


def _time_limit(stage: Stage, scene: Scene) -> Act:
    stage.submit("--time", "2")
    yield from stage.reach(1)
    yield from stage.restart()
    yield from stage.finish(restarts=True)  # over as many starts as it takes


def _preempt(stage: Stage, scene: Scene) -> Act:
    """Once, by a job that wants the same nodes; until the run's job has come back."""
    nodes = stage.nodes()
    wanted = (f"--nodes={len(nodes)}", f"--nodelist={','.join(nodes)}", "--exclusive", "--time=5")
    stage.disturb("preempted")
    job = slurm(
        *("sbatch", "--parsable", "--job-name=cfmask-preempts", "--output=/dev/null", *wanted, *scene.preempt_with),
        "--wrap=sleep 1",
    )
    stage.jobs.append(job)
    yield from stage.restart()


def _preempted(stage: Stage, scene: Scene) -> Act:
    stage.submit()
    yield from stage.reach(HALF)
    yield from _preempt(stage, scene)
    yield from stage.finish()


def _preempted_five_times(stage: Stage, scene: Scene) -> Act:
    stage.submit()
    yield from stage.reach(EARLY)
    for _ in range(5):
        yield from stage.reach(stage.look().step + 3)
        yield from _preempt(stage, scene)
    yield from stage.finish()


def _preempted_unwarned(stage: Stage, scene: Scene) -> Act:
    assert scene.box is not None
    with scene.box.without_user_signal():
        yield from _preempted(stage, scene)


def _preempted_while_writing(stage: Stage, scene: Scene) -> Act:
    """The disk takes longer to write than Slurm does to kill."""
    with slow_disk(scene.folder / "slow-disk") as slow:
        stage.submit()
    yield from stage.reach(EARLY)
    slow.touch()
    try:
        for _ in stage.until("a checkpoint is being written"):
            if any(stage.run.checkpoints.glob(".step-*")):
                break
            yield
        yield from _preempt(stage, scene)
    finally:
        slow.unlink()
    yield from stage.finish()


def _gone(stage: Stage, scene: Scene, state: str, *, within_s: float | None = None) -> Act:
    """Until the job has ended so, for good; and no process of it is left, where that can be seen."""
    yield from stage.gone(state, within_s=within_s)
    if scene.box is not None:
        yield from stage.wait(1)  # the last ones are on their way
        if left := scene.box.processes(f"SLURM_JOB_ID={stage.job}"):
            raise Trouble(f"job {stage.job} is {state}, and its processes {left} are still there")


_KILL_RANK = """
rank=
for each in /proc/[0-9]*; do
    words=$(tr '\\0' '\\n' < $each/environ 2>/dev/null) || continue
    echo "$words" | grep -qx SLURM_JOB_ID={job} || continue
    echo "$words" | grep -qx SLURM_PROCID={rank} || continue
    tr '\\0' ' ' < $each/cmdline | grep -q submitit.core._submit && rank="$rank ${{each#/proc/}}"
done
for each in $rank; do
    parent=$(sed 's/.*) //' /proc/$each/stat | cut -d' ' -f2)
    case " $rank " in *" $parent "*) kill -9 $each ;; esac
done
"""
"""Of the two processes that a rank is (last_words.py), the one that trains, which is the one that takes the memory."""


def _rank_killed(stage: Stage, scene: Scene) -> Act:
    stage.submit()
    yield from stage.reach(HALF)
    last = int(read_lines(stage.run.attempts)[-1]["world_size"]) - 1
    there = (f"--jobid={stage.job}", "--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={stage.nodes()[-1]}")
    stage.disturb("rank killed")
    slurm("srun", *there, "--input=none", "sh", "-c", _KILL_RANK.format(job=stage.job, rank=last))
    yield from _gone(stage, scene, "FAILED", within_s=30)
    stage.resume()
    yield from stage.finish()


def _scancel(stage: Stage, scene: Scene) -> Act:
    """Once, until the job is gone."""
    stage.disturb("scancel")
    slurm("scancel", stage.job)
    yield from _gone(stage, scene, "CANCELLED")


def _cancelled(stage: Stage, scene: Scene) -> Act:
    stage.submit()
    yield from stage.reach(HALF)
    yield from _scancel(stage, scene)
    yield from stage.wait(5)
    yield from stage.gone("CANCELLED")  # and stays so
    stage.resume()
    yield from stage.finish()


def _resized(stage: Stage, scene: Scene) -> Act:
    stage.submit()
    for step, nodes in ((EARLY, 1), (HALF, scene.nodes)):
        yield from stage.reach(step)
        yield from _scancel(stage, scene)
        stage.resume("--nodes", str(nodes))
    yield from stage.finish()
    had = [line["nodes"] for line in read_lines(stage.run.attempts)]
    if had != [scene.nodes, 1, scene.nodes]:
        raise Trouble(f"attempts.jsonl says that it had {had} nodes")


def _node_lost(stage: Stage, scene: Scene, which: int = -1) -> Act:
    assert scene.box is not None
    stage.submit()
    yield from stage.reach(HALF)
    node = stage.nodes()[which]
    stage.disturb("node lost")
    scene.box.kill_node(node)
    try:
        for _ in stage.until(f"the job is requeued after {node} has gone"):
            if stage.job_field("Restarts") == "1":
                break
            yield
    finally:
        scene.box.revive()
    yield from stage.wait(5)  # until the node has heard that the job's first life is over
    yield from stage.restart()
    yield from stage.finish()


def _first_node_lost(stage: Stage, scene: Scene) -> Act:
    """The one on which the batch script runs: Slurm alone is left to requeue the job."""
    yield from _node_lost(stage, scene, which=0)


def _controller_restarted(stage: Stage, scene: Scene) -> Act:
    assert scene.box is not None
    stage.submit()
    yield from stage.reach(HALF)
    stage.disturb("controller killed")
    scene.box.kill("slurmctld")
    try:
        yield from stage.wait(3)
    finally:
        scene.box.revive()
    yield from stage.finish()


def _full_disk(stage: Stage, scene: Scene) -> Act:
    assert scene.box is not None
    with scene.box.small_disk(stage.run.root):
        stage.submit()
        yield from stage.reach(HALF)
        stage.disturb("disk full")
        filler = stage.run.root / ".filler"
        fill_disk(filler, leave=3 << 15)  # 96 kB: enough for logs, and not for a checkpoint
        yield from _gone(stage, scene, "FAILED")
        logs = "".join(path.read_text(errors="replace") for path in (stage.run.root / "jobs").glob("*_0_log.out"))
        if "No space left on device" not in logs or "Earlier checkpoints are intact" not in logs:
            raise Trouble("its log says nothing of a full disk")
        filler.unlink()
        stage.resume()
        yield from stage.finish()


_CAME_BACK = r"stopped at step \d+ \(requeue\)"
_STOPPED = r"stopped at step \d+ \((requeue|quit)\)"
_KILLED = "killed without notice"
_LOST = rf"lost a rank without a word.*|{_KILLED}"
UNDISTURBED = Drill("undisturbed", "nothing: the others are compared with it", _undisturbed)
DRILLS = (
    # The longest first: others are done beside them, and a node that is lost is not revived by the next that is.
    Drill("time-limit", "a time limit of two minutes", _time_limit, f"{_CAME_BACK}(; {_CAME_BACK})*", lasts_s=120),
    Drill("first-node-lost", "the job's first node dies", _first_node_lost, _LOST, "box", nodes=2),
    Drill(
        name="preempted-5-times",
        what="preempted five times",
        act=_preempted_five_times,
        story="; ".join([_STOPPED] * 5),
        needs="preempt",
    ),
    Drill(
        name="warned",
        what="USR2, as before a preemption or the time limit",
        act=_comes_back_after("USR2", "scancel", "--signal=USR2"),
        story=_CAME_BACK,
    ),
    Drill("requeued", "scontrol requeue", _comes_back_after("requeue", "scontrol", "requeue"), _STOPPED),
    Drill("rank-killed", "SIGKILL of one rank, as when memory runs out; --resume", _rank_killed, "failed.*"),
    Drill("cancelled", "scancel; it has to stay away; --resume", _cancelled, _STOPPED),
    Drill(
        name="resized",
        what="scancel, --resume on one node; the same, on all",
        act=_resized,
        story=f"{_STOPPED}; {_STOPPED}",
        nodes=2,
        same=False,
    ),
    Drill("preempted", "preempted by a job that matters more", _preempted, _STOPPED, "preempt"),
    Drill(
        name="preempted-at-once",
        what="preempted without a grace time",
        act=_preempted,
        story=_STOPPED,
        needs="box",
        flags=("--partition", "abrupt"),
    ),
    Drill(
        name="preempted-while-writing",
        what="preempted, and killed in the middle of a checkpoint",
        act=_preempted_while_writing,
        story=_KILLED,
        needs="box",
        flags=("--partition", "abrupt"),
    ),
    Drill("node-lost", "another of its nodes dies", _node_lost, _LOST, "box", nodes=2),
    Drill("full-disk", "no space for checkpoints; space again; --resume", _full_disk, "failed.*No space left.*", "box"),
    Drill(
        name="preempted-unwarned",
        what="preempted by TERM, and KILL at the end of the grace time",
        act=_preempted_unwarned,
        story=_STOPPED,
        needs="box",
        alone=True,
    ),
    Drill(
        name="controller-restarted",
        what="slurmctld dies, and is back after 3 s",
        act=_controller_restarted,
        needs="box",
        alone=True,
    ),
)


# --- playing --------------------------------------------------------------------------------------------------------


@dataclass
class Played:
    """A drill that was done. trouble: what kept it from its end, or went wrong; took_s: how long it took."""

    drill: Drill
    stage: Stage
    trouble: list[str] = field(default_factory=list)
    took_s: float = 0.0


def play(drills: Sequence[Drill], scene: Scene, *, at_once: int) -> list[Played]:
    """Do them, so many at once, after or beside an undisturbed run; judged, in the order given, that one first.

    What they have submitted is cancelled if it is interrupted.

    Raises:
        UserError: the undisturbed run does not come to its end.
    """
    waiting = sorted([UNDISTURBED, *drills], key=lambda drill: drill.alone)
    under_way: list[tuple[Played, Act, float]] = []
    played: list[Played] = []
    with tqdm(
        total=len(waiting), unit="drill", dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 15
    ) as bar:
        try:
            while waiting or under_way:
                while waiting and len(under_way) < (1 if waiting[0].alone else at_once):
                    if under_way and under_way[0][0].drill.alone:
                        break
                    drill = waiting.pop(0)
                    stage = scene.stage(drill)
                    under_way.append((Played(drill, stage), drill.act(stage, scene), time.monotonic()))
                for each in list(under_way):
                    done, act, began = each
                    if not _goes_on(done, act):
                        done.took_s = time.monotonic() - began
                        under_way.remove(each)
                        played.append(done)
                        bar.update()
                        if done.trouble and done.drill is UNDISTURBED:
                            raise UserError(f"The run that nothing is done to does not end: {done.trouble[0]}")
                bar.set_description(", ".join(f"{d.drill.name} {d.stage.step}/{STEPS}" for d, _, _ in under_way), False)
                bar.update(0)
                time.sleep(0.05)
        finally:
            for done, act, _ in under_way:
                act.close()  # type: ignore[attr-defined]
                _cancel(done.stage)
    order = [UNDISTURBED, *drills]
    played.sort(key=lambda each: order.index(each.drill))
    for done in played[1:]:
        done.trouble += [] if done.trouble else judge(done, played[0])
    return played


def _goes_on(played: Played, act: Act) -> bool:
    """Give an act its turn; whether it wants another one."""
    try:
        played.stage.look()
        next(act)
        return True
    except StopIteration:
        return False
    except (Trouble, OSError) as trouble:
        played.trouble.append(str(trouble))
        _cancel(played.stage)
        return False


def _cancel(stage: Stage) -> None:
    with contextlib.suppress(Trouble):
        if stage.jobs:
            slurm("scancel", *stage.jobs)


def judge(played: Played, alone: Played) -> list[str]:
    """What is not as it has to be, by what the two runs have left; nothing if all is."""
    ours, theirs = played.stage.run, alone.stage.run
    wrong = []
    whys = "; ".join(str(line["why_last_ended"]) for line in read_lines(ours.attempts)[1:])
    if not re.fullmatch(played.drill.story, whys, re.DOTALL):
        wrong.append(f"attempts.jsonl tells another story: {whys or 'no second start'}")
    if read_lines(ours.receipts) != read_lines(theirs.receipts):
        wrong.append("its receipts are not those of the undisturbed run: other samples were trained on")
    if played.drill.same:
        wrong += different_tensors(ours.checkpoints / f"step-{STEPS:08d}", theirs.checkpoints / f"step-{STEPS:08d}")
    elif differing := different_losses(ours, theirs, tolerance=1e-3):
        wrong.append(differing)
    return wrong


def different_tensors(ours: Path, theirs: Path) -> list[str]:
    """Tensors of weights and moments that are not equal, bit for bit, in two checkpoints."""
    import torch
    from safetensors.torch import load_file

    found = []
    for file in ("model.safetensors", "optimizer.safetensors"):
        a, b = load_file(ours / file), load_file(theirs / file)
        found += [f"{name} of {file}" for name in a.keys() ^ b.keys()]
        found += [f"{name} of {file}" for name in a.keys() & b.keys() if not torch.equal(a[name], b[name])]
    return [f"{len(found)} tensors differ: {', '.join(sorted(found)[:3])}"] if found else []


def different_losses(ours: RunFolder, theirs: RunFolder, *, tolerance: float) -> str:
    """Where the logged losses of two runs are further apart than so much of themselves; "" if nowhere."""
    a, b = ({x["step"]: x["loss"] for x in read_lines(run.log) if "loss" in x} for run in (ours, theirs))
    if a.keys() != b.keys():
        return "other steps are logged than in the undisturbed run"
    apart = [step for step in a if abs(a[step] - b[step]) > tolerance * max(abs(b[step]), 1e-3)]
    return f"the loss of step {apart[0]} is {a[apart[0]]:g}, undisturbed {b[apart[0]]:g}" if apart else ""


# --- showing --------------------------------------------------------------------------------------------------------


def table(played: Sequence[Played], left_out: Sequence[tuple[Drill, str]]) -> str:
    """Markdown: a row a drill."""
    header = (
        *("drill", "what was done", "starts", "steps lost", "to checkpoint (s)", "start to first step (s)"),
        *("took (s)", "verdict"),
    )
    rows: list[Sequence[str]] = []
    for each in played:
        stage = each.stage
        verdict = "; ".join(each.trouble) or ("same to the bit" if each.drill.same else "same samples, same loss")
        rows.append(
            (
                *(each.drill.name, each.drill.what, str(len(read_lines(stage.run.attempts))), str(stage.steps_lost())),
                *(_span(stage.seconds_to_checkpoint()), _span(stage.first_steps), f"{each.took_s:.0f}"),
                "–" if each.drill is UNDISTURBED and not each.trouble else verdict,
            )
        )
    rows += [(drill.name, drill.what, *[""] * 5, f"not done: {why}") for drill, why in left_out]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows))


def _span(seconds: Sequence[float | None]) -> str:
    """The least and the most; "–" for what there was none of."""
    known = [f"{s:.1f}" for s in sorted(s for s in seconds if s is not None)]
    return "–" if not known else known[0] if known[0] == known[-1] else f"{known[0]} … {known[-1]}"


def draw(played: Sequence[Played], path: Path) -> None:
    """Steps over time, a panel a drill: where it was disturbed, and where its checkpoints are."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(3, len(played))
    rows = -(-len(played) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 2.4 * rows), squeeze=False, sharey=True)
    for axis, each in zip(axes.flat, played, strict=False):
        moments = each.stage.moments
        began = moments[0].time
        times = [moment.time - began for moment in moments]
        axis.fill_between(times, [moment.saved for moment in moments], step="post", alpha=0.25, label="saved")
        axis.plot(times, [moment.step for moment in moments], drawstyle="steps-post", label="step", linewidth=1.2)
        for disturbance in each.stage.disturbances:
            axis.axvline(disturbance.time - began, color="tab:red", linewidth=1, linestyle="--")
            axis.text(
                disturbance.time - began, STEPS, disturbance.what, color="tab:red", fontsize=6, rotation=90, va="top"
            )
        axis.set_title(each.drill.name + (" ✗" if each.trouble else ""), fontsize=9)
        axis.tick_params(labelsize=7)
    for axis in list(axes.flat)[len(played) :]:
        axis.axis("off")
    figure.supxlabel("seconds", fontsize=8)
    axes[0][0].legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


# --- the command ----------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    names = [drill.name for drill in DRILLS]
    p.add_argument("--drills", nargs="+", choices=names, metavar="NAME", help="these (default: all that can be done)")
    p.add_argument("--list", action="store_true", help="say what there is, and do nothing")
    p.add_argument(
        "--folder",
        type=Path,
        metavar="DIR",
        help="a new folder that all nodes see, for runs, table and picture (default: drills/<time>)",
    )
    p.add_argument(
        "--preempt-with",
        type=shlex.split,
        metavar="ARGS",
        help="sbatch arguments of a job that preempts these runs, as in --preempt-with='--partition=high'",
    )
    p.add_argument(
        "--pace",
        type=float,
        default=0.25,
        metavar="S",
        help=f"seconds that a run stays at each of its {STEPS} steps, to be disturbed meanwhile (default: 0.25)",
    )
    p.add_argument(
        "--at-once", type=int, default=1, metavar="N", help="drills that are done at the same time (default: 1)"
    )
    p.add_argument(
        "--patience", type=float, default=15, metavar="MIN", help="how long anything is waited for (default: 15)"
    )
    return p


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    arguments, rest = parser().parse_known_args(argv)
    if arguments.list:
        for drill in DRILLS:
            needs = {"preempt": " (--preempt-with)", "box": " (slurm/cluster.py)"}.get(drill.needs, "")
            print(f"{drill.name:25}{drill.what}{needs}")
        return 0
    nodes = _checked_nodes(rest)
    box = Box.find()
    preempt_with = tuple(arguments.preempt_with or (["--partition=high"] if box else []))
    folder = (arguments.folder or Path("drills") / time.strftime("%Y%m%d-%H%M%S")).resolve()
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty. Give a new folder with --folder.")
    scene = Scene(folder, (), nodes, box, preempt_with, arguments.pace, 60 * arguments.patience)
    asked = [drill for drill in DRILLS if not arguments.drills or drill.name in arguments.drills]
    left_out = [(drill, why) for drill in asked if (why := scene.lacks(drill))]
    if arguments.drills and left_out:
        raise UserError(
            "; ".join(f"{drill.name} {why}" for drill, why in left_out) + ". Leave it out, or give what it needs."
        )
    folder.mkdir(parents=True, exist_ok=True)
    scene = dataclasses.replace(scene, flags=(*make_materials(folder / "materials", per_class=160), *_RECIPE, *rest))
    played = play([drill for drill in asked if not scene.lacks(drill)], scene, at_once=arguments.at_once)
    shown = table(played, left_out)
    (folder / "drills.md").write_text(shown + "\n")
    draw(played, folder / "drills.png")
    print(f"\n{shown}\n\n{folder / 'drills.md'}, {folder / 'drills.png'}")
    return 1 if any(each.trouble for each in played) else 0


def _checked_nodes(flags: Sequence[str]) -> int:
    """How many nodes submit.py's flags ask for.

    Raises:
        UserError: they are not for Slurm.
    """
    parser = argparse.ArgumentParser("submit.py", allow_abbrev=False)
    add_submit_arguments(parser)
    arguments = parser.parse_args(list(flags))
    allocation = resolve_allocation(arguments, load_cluster_file(arguments.cluster))
    if not allocation.on_slurm:
        raise UserError(
            "Drills need Slurm. Run this on a login node; or bring up a Slurm on this machine: "
            "python3 slurm/cluster.py up (slurm/README.md)."
        )
    return allocation.nodes


if __name__ == "__main__":
    sys.exit(main())
