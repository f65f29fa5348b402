"""The page of launch/status.py --html; launch/reproduce.py shows its tables for the jobs of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from cfmask.errors import UserError
from cfmask.evaluation.model_origin import short_names
from cfmask.recipe import Recipe
from cfmask.report import page, run_blocks
from cfmask.report.labels import run_groups
from cfmask.report.page import Html, Section
from cfmask.runs import RunFolder
from cfmask.runtime.attempts import Start
from cfmask.runtime.files import write_atomically
from cfmask.runtime.times import duration
from launch.state.facts import RunState, SlurmAnswers
from launch.state.status import Status, explained_starts
from launch.state.table import totals

MOST_CURVES = 8
"""Number of lines in a picture: the first recipes of the page, each with all of its seeds."""


def write_runs_page(out: Path, shown: Sequence[tuple[RunState, Status]], slurm: SlurmAnswers, of: int) -> None:
    """Write the page of these runs.

    Args:
        of: number of runs before filters.

    Raises:
        UserError: the file cannot be written.
    """
    text = _runs_page(shown, slurm, of)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, text)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}). Choose another path with --html.") from error
    print(f"written: {out}")


def _runs_page(shown: Sequence[tuple[RunState, Status]], slurm: SlurmAnswers, of: int) -> str:
    statuses = [status for _, status in shown]
    names = _names(statuses)
    runs = {name: run_state.run for name, (run_state, _) in zip(names, shown, strict=True)}
    works = {name: run_state.work for name, (run_state, _) in zip(names, shown, strict=True)}
    recipes = {name: work for name, work in works.items() if isinstance(work, Recipe)}
    starts = {name: explained_starts(*each, slurm) for name, each in zip(names, shown, strict=True)}
    lead = [page.paragraph(totals(statuses, of))]
    if slurm.queue is None and any(each.jobs.slurm and not each.finished for each, _ in shown):
        lead.append(page.paragraph("Slurm does not answer here: pending jobs are unknown."))
    sections = [
        Section("States", [runs_table("State of each run", names, statuses), *_remarks(names, statuses)]),
        Section("Curves", _curves([runs[name] for name in recipes])),
        Section("Starts", [interrupted(starts), page.folded("All starts", run_blocks.starts(starts))]),
        Section("Recipes", [run_blocks.recipes(recipes), run_blocks.versions(list(runs.values()))]),
    ]
    return page.page("Runs", sections, lead=lead)


def _names(statuses: Sequence[Status]) -> list[str]:
    paths = [status.run for status in statuses]
    return short_names(paths) if len(paths) > 1 else [Path(path).name for path in paths]


def runs_table(caption: str, names: Sequence[str], statuses: Sequence[Status]) -> Html:
    """A line for each run."""
    rows = [
        [
            name,
            s.in_words or s.state,
            _of(s.step, s.total_steps),
            None if s.best_top1 is None else f"{s.best_top1:.2f} ({s.best_on})",
            f"{s.best_epoch} of {s.epochs}" if s.best_epoch else None,
            duration(s.eta_s),
            None if s.samples_per_s is None else f"{s.samples_per_s:,.0f}",
            None if s.loss is None else f"{s.loss:.4g}",
            s.attempts,
            f"{s.job} (+{s.waiting})" if s.waiting else s.job,
            s.nodes,
        ]
        for name, s in zip(names, statuses, strict=True)
    ]
    header = ["run", "state", "step", "best top-1, %", "at epoch", "time left", "samples/s", "loss", "starts", "job"]
    return page.table(caption, [*header, "nodes"], rows)


def interrupted(starts: Mapping[str, Sequence[Start]]) -> Html:
    """The starts of those runs that have started more than once, or whose start has not ended well."""
    again = {
        name: of_run
        for name, of_run in starts.items()
        if len(of_run) > 1 or any(start.why_ended not in (None, "finished") for start in of_run)
    }
    if not again:
        return page.paragraph("No run was interrupted.")
    return run_blocks.starts(again, "Runs that were interrupted: why each start ended")


def _remarks(names: Sequence[str], statuses: Sequence[Status]) -> list[Html]:
    """What to do about pending jobs, slow ranks, and what could not be read."""
    rows = []
    for name, s in zip(names, statuses, strict=True):
        slowest = f"slowest: {s.straggler}" if s.straggler else None
        rows += [[name, remark] for remark in (s.remedy, slowest, *s.notes) if remark]
    return [page.table("Remarks", ["run", "remark"], rows)] if rows else []


def _curves(runs: Sequence[RunFolder]) -> list[Html]:
    groups = run_groups(run_blocks.with_steps(runs))
    with TemporaryDirectory() as folder:
        shown = [run for group in groups[:MOST_CURVES] for run in group.runs]
        blocks = run_blocks.curves(Path(folder) / "curves.png", shown)
    if len(groups) > MOST_CURVES:
        blocks.append(page.paragraph(f"The first {MOST_CURVES} of {len(groups)} recipes are drawn.", note=True))
    return blocks or [page.paragraph("No run has taken a step.")]


def _of(step: int | None, total: int | None) -> str | None:
    return None if step is None else f"{step:,}/{total:,}" if total else f"{step:,}"
