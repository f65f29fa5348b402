#!/usr/bin/env python3
"""Submit a training run: to Slurm where `srun` is there, to this machine otherwise.

    python launch/submit.py --shards DIR --nodes 2                        the paper's headline row, ViT-B/32
    python launch/submit.py --shards DIR --preset ft --seed 1             vanilla fine-tuning
    python launch/submit.py --resume RUN                                  go on with a run, whatever became of it

The same command again finds the same run folder, and goes on from its last checkpoint. Settings that are
unknown, contradictory or without effect are refused here, before a job is queued.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from cfmask.data.plan import lanes_of_rank, steps_per_epoch  # noqa: E402
from cfmask.data.remote import is_remote  # noqa: E402
from cfmask.data.shards import Manifest, find_set, load_manifest  # noqa: E402
from cfmask.errors import UserError, exits_cleanly  # noqa: E402
from cfmask.models.head import (  # noqa: E402
    check_architecture,
    check_head,
    check_same_kind,
    find_weights,
    model_info,
    read_info,
)
from cfmask.recipe import Recipe  # noqa: E402
from cfmask.runs import RunFolder, find_model  # noqa: E402
from launch.arguments import add_recipe_arguments, given_recipe_flags, recipe_from  # noqa: E402


@dataclass(frozen=True)
class Allocation:
    """What a job is given. tasks_per_node: one per GPU; on machines without GPUs as many as asked for."""

    executor: str
    nodes: int
    gpus_per_node: int
    tasks_per_node: int
    cpus_per_task: int
    time_min: int
    partition: str | None
    account: str | None

    @property
    def world_size(self) -> int:
        return self.nodes * self.tasks_per_node


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--run", type=Path, metavar="DIR", help="run folder (default: runs/<method>-<model>-s<seed>-<hash>)")
    p.add_argument("--resume", type=Path, metavar="RUN", help="go on with this run; its folder says everything else")
    p.add_argument("--dry-run", action="store_true", help="print the resolved recipe, check everything, queue nothing")
    p.add_argument(
        "--follow",
        action=argparse.BooleanOptionalAction,
        help="stay and show progress until the job ends (default: yes here, no on Slurm)",
    )
    add_allocation_arguments(p)
    add_recipe_arguments(p)
    return p


def add_allocation_arguments(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group("allocation", "Where the job runs. Changes nothing about what is trained.")
    g.add_argument(
        "--executor",
        choices=("auto", "slurm", "local", "debug"),
        default="auto",
        help="auto: slurm if srun is there, else local; debug: one rank in this process (default: auto)",
    )
    g.add_argument("--nodes", type=int, default=1, metavar="N", help="machines (default: 1)")
    g.add_argument(
        "--gpus-per-node", type=int, metavar="N", help="one task each (default: 8 on Slurm, else those of this machine)"
    )
    g.add_argument("--tasks-per-node", type=int, metavar="N", help="ranks on a machine without GPUs (default: 1)")
    g.add_argument("--cpus-per-task", type=int, default=8, metavar="N", help="cores of a Slurm task (default: 8)")
    g.add_argument(
        "--time",
        type=int,
        default=1440,
        metavar="MIN",
        help="time limit on Slurm; a run requeues itself before it (default: 1440)",
    )
    g.add_argument("--partition", help="Slurm partition")
    g.add_argument("--account", help="Slurm account")


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    p = parser()
    arguments = p.parse_args(argv)
    allocation = resolve_allocation(arguments)
    if arguments.resume:
        flags = given_recipe_flags(arguments) + (["run"] if arguments.run else [])
        if flags:
            raise UserError(
                f"--resume goes on with the recipe in {arguments.resume}; these flags would do nothing: "
                f"{', '.join(flags)}. Leave them out, or start another run without --resume."
            )
        run = RunFolder(arguments.resume.resolve())
        recipe = run.recipe()
    else:
        recipe = resolve_recipe(recipe_from(arguments), allocation)
        run = RunFolder((arguments.run or default_folder(recipe)).resolve())
    print(recipe.to_json())
    check(recipe, run, allocation)
    if arguments.dry_run:
        print(f"Would run on {describe(allocation)} into {run.root}. Everything checked; nothing was queued.")
        return 0

    run.claim(recipe)
    if run.results.exists():
        print(f"{run.root} is finished:\n{run.results.read_text()}")
        return 0
    with run.locked():
        pass  # another job on this folder is refused here rather than in the queue
    return submit(run, recipe, allocation, follow=arguments.follow)


# --- resolving and checking -------------------------------------------------------------------------------------


def resolve_allocation(arguments: argparse.Namespace) -> Allocation:
    """Raises UserError for what cannot be allocated."""
    executor = arguments.executor
    if executor == "auto":
        executor = "slurm" if shutil.which("srun") else "local"
    if executor == "slurm" and not shutil.which("sbatch"):
        raise UserError("There is no sbatch on this machine. Run this on a login node, or use --executor local.")
    if executor != "slurm" and arguments.nodes != 1:
        raise UserError(
            f"--nodes {arguments.nodes} needs Slurm, and --executor is {executor}: one machine is all there is here. "
            "Run this where srun is, or leave --nodes out."
        )
    gpus = arguments.gpus_per_node
    if gpus is None:
        gpus = 0 if arguments.tasks_per_node is not None else 8 if executor == "slurm" else _visible_gpus()
    tasks = arguments.tasks_per_node
    if tasks is not None and gpus and tasks != gpus:
        raise UserError(
            f"--tasks-per-node {tasks} contradicts --gpus-per-node {gpus}: there is one task for each GPU. Leave "
            "--tasks-per-node out, or give --gpus-per-node 0 to train on CPUs."
        )
    if executor == "debug" and max(gpus, tasks or 1) > 1:
        raise UserError("--executor debug is one rank in this process. Ask for one GPU or task, or use local.")
    for flag, value in (
        ("--nodes", arguments.nodes),
        ("--gpus-per-node", gpus + 1),
        ("--tasks-per-node", 1 if tasks is None else tasks),
        ("--cpus-per-task", arguments.cpus_per_task),
        ("--time", arguments.time),
    ):
        if value < 1:
            raise UserError(f"{flag} is too small.")
    return Allocation(
        executor=executor,
        nodes=arguments.nodes,
        gpus_per_node=gpus,
        tasks_per_node=gpus or tasks or 1,
        cpus_per_task=arguments.cpus_per_task,
        time_min=arguments.time,
        partition=arguments.partition,
        account=arguments.account,
    )


def _visible_gpus() -> int:
    if not shutil.which("nvidia-smi"):
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def resolve_recipe(recipe: Recipe, allocation: Allocation) -> Recipe:
    """The recipe with nothing left open: paths absolute, the paper's values and the precision filled in."""
    if not recipe.data.shards:
        raise UserError("--shards is missing: the folder that tools/make_shards.py wrote, with a folder a split.")
    shards = recipe.data.shards if is_remote(recipe.data.shards) else str(Path(recipe.data.shards).resolve())
    precision = recipe.run.precision
    if precision == "auto":
        precision = "bf16" if allocation.gpus_per_node else "fp32"
    model = replace(
        recipe.model,
        name=_absolute(recipe.model.name) if recipe.model.name.endswith(".json") else recipe.model.name,
        pretrained=_absolute(recipe.model.pretrained),
        head=_absolute(recipe.model.head) if recipe.model.head else None,
    )
    method = recipe.method
    if method.ensemble is not None:
        method = replace(method, ensemble=_absolute(method.ensemble))
    return replace(
        recipe,
        model=model,
        method=method,
        data=replace(recipe.data, shards=shards),
        run=replace(recipe.run, precision=precision),
    ).resolved()


def _absolute(path: str) -> str:
    """A job starts elsewhere: paths that exist become absolute, names stay."""
    return str(Path(path).resolve()) if os.path.exists(path) else path


def default_folder(recipe: Recipe) -> Path:
    model = Path(recipe.model.name).stem
    return Path("runs") / f"{recipe.method.row}-{model}-s{recipe.run.seed}-{recipe.digest()}"


def check(recipe: Recipe, run: RunFolder, allocation: Allocation) -> None:
    """All that can be known before a job is queued.

    Raises:
        UserError: shards, weights, head, lanes, ranks or sizes that do not go together.
    """
    shards = recipe.data.shards
    train = load_manifest(find_set(shards, recipe.data.train_split))
    steps_per_epoch(train.num_samples, recipe.optim.batch_size)
    own_lanes = len(lanes_of_rank(0, allocation.world_size, recipe.optim.lanes))
    if own_lanes % recipe.optim.micro_batches:
        raise UserError(
            f"--micro-batches {recipe.optim.micro_batches} does not divide the {own_lanes} lanes that each of "
            f"{allocation.world_size} ranks has: a micro-batch is made of whole lanes."
        )
    for name in recipe.data.eval_sets:
        _check_same_classes(load_manifest(find_set(shards, name)), train)
    if run.initial.exists():
        return  # the run has its weights and head
    pretrained = recipe.model.pretrained
    own = read_info(pretrained) if os.path.isfile(pretrained) else None
    if recipe.model.head:
        check_head(recipe.model.head, [wnid for wnid, _ in train.classes])
    elif own is not None and own.classes:
        check_head(pretrained, [wnid for wnid, _ in train.classes])
    asked = model_info(recipe.model.name, pretrained)
    depth = asked.config["vision_cfg"].get("layers", 12)
    if recipe.method.first_block is not None and isinstance(depth, int) and recipe.method.first_block >= depth:
        raise UserError(
            f"--first-block is {recipe.method.first_block}; {recipe.model.name} has {depth} blocks, counted from 0."
        )
    if recipe.method.ensemble is not None:
        path = find_model(recipe.method.ensemble)
        start = own if own is not None else asked
        check_same_kind(read_info(path), replace(start, classes=tuple(w for w, _ in train.classes)), str(path))
    if own is not None:
        check_architecture(own, asked, pretrained)
    else:
        # Here, not in the job: compute nodes often have no network.
        find_weights(recipe.model.name, pretrained)


def _check_same_classes(evaluated: Manifest, train: Manifest) -> None:
    ours, theirs = ([wnid for wnid, _ in m.classes] for m in (train, evaluated))
    if ours != theirs:
        raise UserError(
            f"The set {evaluated.root} has another class list ({len(theirs)} classes) than {train.root} "
            f"({len(ours)} classes): its labels mean other classes. Convert both with one class list."
        )


def describe(allocation: Allocation) -> str:
    kind = "GPU" if allocation.gpus_per_node else "CPU"
    return f"{allocation.executor}: {allocation.nodes} × {allocation.tasks_per_node} {kind} ranks"


# --- submitting -------------------------------------------------------------------------------------------------


def submit(run: RunFolder, recipe: Recipe, allocation: Allocation, *, follow: bool | None) -> int:
    import submitit

    from launch.follow import follow_job
    from launch.job import Job

    jobs = run.root / "jobs"
    # The job imports cfmask and launch from here, wherever it is started.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")]))
    options = {"slurm_max_num_timeout": 1000} if allocation.executor == "slurm" else {}
    # The local controller counts this down and kills: there is no queue to give the machine back to.
    time_limit = allocation.time_min if allocation.executor == "slurm" else 525_600
    executor = submitit.AutoExecutor(folder=jobs, cluster=allocation.executor, **options)
    executor.update_parameters(
        name=f"cfmask-{run.root.name}",
        nodes=allocation.nodes,
        tasks_per_node=allocation.tasks_per_node,
        gpus_per_node=allocation.gpus_per_node,
        timeout_min=time_limit,
        stderr_to_stdout=True,
    )
    if allocation.executor == "slurm":
        executor.update_parameters(
            cpus_per_task=allocation.cpus_per_task,
            slurm_signal_delay_s=120,
            # srun does not inherit sbatch's --cpus-per-task; and one dead rank must end the job.
            slurm_srun_args=[f"--cpus-per-task={allocation.cpus_per_task}", "--kill-on-bad-exit=1"],
            slurm_additional_parameters={"requeue": True},
            # For sites whose jobs do not inherit the environment they are submitted from.
            slurm_setup=[f"export PYTHONPATH={shlex.quote(os.environ['PYTHONPATH'])}"],
            **{f"slurm_{k}": v for k in ("partition", "account") if (v := getattr(allocation, k))},
        )
    # Ctrl-C is for this process, which tells the job's controller; that one would die of it with a traceback.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        job = executor.submit(Job(run.root, allocation.gpus_per_node, time_limit))
    finally:
        signal.signal(signal.SIGINT, before)
    print(f"job {job.job_id} on {describe(allocation)}\nrun  {run.root}\nlogs {job.paths.stdout.parent}")
    if allocation.executor == "debug":
        job.result()
        return 0
    if follow is False or (follow is None and allocation.executor == "slurm"):
        return 0
    return follow_job(job, run, local=allocation.executor == "local")


if __name__ == "__main__":
    sys.exit(main())
