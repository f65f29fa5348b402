"""What submit.py prints about the jobs that it has submitted, in five lines:

    run      runs/ft-ViT-B-32-quickgelu-s0-1a2b3c4d: new; code 0123456789ab (commit 0123456)
    recipe   ft; lr 3e-05 → 1e-05
    steps    24820: 10 epochs of 2482; batches of 512, on each of 16 GPUs 32; evaluated on holdout
    job      4711 on Slurm: 2 nodes × 8 GPUs, partition gpu, at most 24 h a start; cluster file cluster.toml
    watch    python launch/status.py runs/ft-ViT-B-32-quickgelu-s0-1a2b3c4d --follow

Of a sweep, the first line has all runs, and the fourth the job of each.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from cfmask.data.plan import steps_per_epoch
from cfmask.evaluation_spec import Evaluation
from cfmask.presets import PRESETS, nearest_preset
from cfmask.recipe import Recipe
from cfmask.runs import RunFolder
from cfmask.runtime.times import duration
from cfmask.secrets import mask_secrets
from launch.allocation.resolve import Allocation
from launch.allocation.settings import PARTITION_TIME
from launch.submission.planning import PlannedJob
from launch.submission.recipe_arguments import flag_of

_MAX_LISTED = 8
"""Longer lists of evaluation models are cut."""


def shown(path: Path) -> str:
    """A path relative to the working directory, if it is below it."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def line(name: str, text: str) -> str:
    return mask_secrets(f"{name:8} {text}")


# --- recipes ----------------------------------------------------------------------------------------------------------


def recipe_lines(recipes: Sequence[Recipe], num_samples: int, allocation: Allocation) -> list[str]:
    """The second and third line about training runs that differ in preset and seed only.

    Args:
        num_samples: Samples of the training set.
    """
    presets = list(dict.fromkeys(_preset(recipe) for recipe in recipes))
    seeds = list(dict.fromkeys(recipe.run.seed for recipe in recipes))
    changes = [changes_of(recipe) for recipe in recipes]
    common = [change for change in changes[0] if all(change in other for other in changes)]
    what = ", ".join(presets) + (f" × seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else "")
    return [
        line("recipe", f"{what}; {', '.join(common)}" if common else f"{what}, unchanged"),
        line("steps", _steps(recipes[0], num_samples, allocation)),
    ]


def _preset(recipe: Recipe) -> str:
    return nearest_preset(recipe) or recipe.method.row


def changes_of(recipe: Recipe) -> list[str]:
    """What differs from the preset of a resolved recipe, by flag: "lr 3e-05 → 1e-05". Not listed are the place of its
    data, the arithmetic that its allocation decides, and the evaluation sets, which change no weights."""
    preset = nearest_preset(recipe)
    base = PRESETS[preset] if preset else Recipe(method=recipe.method)
    data, best_on = recipe.data, recipe.run.best_on
    base = replace(
        base,
        method=replace(base.method, ensemble=recipe.method.ensemble),
        data=replace(base.data, shards=data.shards, eval_sets=data.eval_sets, train_split=data.train_split),
        optim=replace(base.optim, micro_batches_for=recipe.optim.micro_batches_for),
        run=replace(base.run, best_on=best_on, precision=recipe.run.precision, seed=recipe.run.seed),
    ).resolved()
    changes = []
    for group in fields(Recipe):
        before, now = getattr(base, group.name), getattr(recipe, group.name)
        for each in fields(now):
            old, new = _text(getattr(before, each.name)), _text(getattr(now, each.name))
            if old != new:
                changes.append(f"{flag_of(each).removeprefix('--')} {old} → {new}")
    return changes


def _text(value: object) -> str:
    """The value of a setting."""
    if value in (None, ()):
        return "none"
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return shown(Path(value)) if isinstance(value, str) and value.startswith("/") else str(value)


def _steps(recipe: Recipe, num_samples: int, allocation: Allocation) -> str:
    optim, ranks = recipe.optim, allocation.world_size
    each = steps_per_epoch(num_samples, optim.batch_size)
    unit = "GPUs" if allocation.gpus_per_node else "CPU ranks"
    share = f"{optim.batch_size // ranks} on each of {ranks} {unit}" if ranks > 1 else f"on one {unit[:3]}"
    parts = optim.micro_batches
    micro = "" if parts == 1 else f", in micro-batches: {parts}"
    sets = f"; evaluated on {', '.join(recipe.data.eval_sets)}" if recipe.data.eval_sets else ""
    epochs = f"{optim.total_epochs} epochs of {each:,}" if optim.total_epochs > 1 else "1 epoch"
    return f"{each * optim.total_epochs:,}: {epochs}; batches of {optim.batch_size}, {share}{micro}{sets}"


def evaluation_lines(evaluation: Evaluation) -> list[str]:
    """The second and third line about an evaluation."""
    models = [shown(Path(path)) for path in evaluation.models]
    listed = models[:_MAX_LISTED] + ([f"… ({len(models)})"] if len(models) > _MAX_LISTED else [])
    return [line("models", ", ".join(listed)), line("sets", ", ".join(evaluation.sets) or "none")]


# --- runs, jobs, and how to watch them --------------------------------------------------------------------------------


@dataclass(frozen=True)
class About:
    """What a command knows about the jobs that it submits."""

    describe: Callable[[Sequence[PlannedJob]], list[str]] = lambda planned: []
    """Returns the second and third line about some of the jobs."""
    cluster_file: Path | None = None
    start: str = ""
    """A clause about the time when Slurm expects to start them."""


UNKNOWN = About()


def progress_of(run: RunFolder) -> str:
    """How far a run has come before it is submitted."""
    step = run.saved_step()
    return f"resumes from step {step:,}" if step else "starts again" if run.attempts.exists() else "new"


def summary(
    planned: Sequence[PlannedJob], jobs: Sequence[str], allocation: Allocation, about: About, code: str, progress: str
) -> str:
    """The five lines about jobs.

    Args:
        jobs: Their ids; empty if they were not submitted.
        code: The snapshot that they run.
        progress: ``progress_of`` the run, of a single one.
    """
    runs = [each.run for each in planned]
    folders = sorted({run.root.parent for run in runs})
    if len(runs) == 1:
        first = line("run", f"{shown(runs[0].root)}: {progress}; code {code}")
        watch = f"{shlex.quote(shown(runs[0].root))} --follow"
    else:
        first = line("runs", f"{len(runs)} in {', '.join(map(shown, folders))}; code {code}")
        watch = shlex.join(map(shown, folders))
    text = where(allocation) + (f"; cluster file {shown(about.cluster_file)}" if about.cluster_file else "")
    text += f"; {about.start}" if about.start else ""
    ids = list(dict.fromkeys(job.partition("_")[0] for job in jobs)) if len(jobs) > 1 else jobs
    if ids:
        text = f"{', '.join(ids)} on {text}"
    lines = [first, *about.describe(planned), line("job" if len(runs) == 1 else "jobs", text)]
    if len(runs) > 1:
        named = zip(jobs or [""] * len(runs), runs, strict=True)
        lines += [line("", f"{job}  {shown(run.root)}".lstrip()) for job, run in named]
    return "\n".join([*lines, line("watch", f"python launch/status.py {watch}")])


def where(allocation: Allocation) -> str:
    """Where jobs run, in words."""
    a = allocation
    unit = f"{a.gpu_type} GPU".strip() if a.gpus_per_node else "CPU rank"
    size = f"{a.tasks_per_node} {unit}{'s' if a.tasks_per_node > 1 else ''}"
    if not a.on_slurm:
        return f"this machine: {size}"
    partition = f"partition {a.partition}" if a.partition else "the default partition"
    limit = "no time limit"
    if a.time_min:
        limit = f"at most {duration(60 * a.time_min)} a start"
    elif a.time == PARTITION_TIME:
        limit = "the partition's time limit"
    return f"Slurm: {a.nodes} node{'s' if a.nodes > 1 else ''} × {size}, {partition}, {limit}"
