"""The table of a reproduction: its rows beside the published numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfmask.evaluation.model_origin import ModelOrigin, checkpoint_note
from cfmask.runtime.files import write_atomically
from cfmask.secrets import mask_secrets
from launch.paper.plan import HEADLINE, LABELS
from launch.paper.reproduction import Reproduction

if TYPE_CHECKING:  # scipy takes a second to import, and a command that only submits jobs does not need it
    from cfmask.report.results import ResultRow, Split
    from cfmask.report.robustness import Line


def published_line(reproduction: Reproduction) -> Line:
    """The line of effective robustness through the published zero-shot models. Raises UserError if they have no
    accuracy on the reproduction's sets."""
    from cfmask.report.robustness import Line

    return Line.of({}, split_of(reproduction), published=True)


def split_of(reproduction: Reproduction) -> Split:
    """The first set is in distribution, the others are shifted."""
    from cfmask.report.results import Split

    home, *shifted = reproduction.setup.evaluation.sets
    return Split(home, tuple(shifted))


@dataclass(frozen=True)
class PaperTable:
    """The rows of a plan, as far as they have results."""

    rows: tuple[ResultRow, ...]
    """In the plan's order; a row without results is a line of dashes."""
    split: Split
    seeds_done: Mapping[str, int]
    """By the row's word."""
    origins: Mapping[str, list[ModelOrigin]]
    """Origins of the evaluated checkpoints by the row's word."""
    published: Mapping[str, Any]
    """By the row's label; empty for another model than the paper's."""
    missing: tuple[str, ...]
    """The rows that are not complete, in words."""

    @property
    def note(self) -> str:
        """Sentences below the table."""
        checkpoints = checkpoint_note({LABELS[word]: of_row for word, of_row in self.origins.items()})
        missing = f"Missing: {'; '.join(self.missing)}." if self.missing else ""
        return " ".join(filter(None, (checkpoints, missing)))


def read_table(reproduction: Reproduction) -> PaperTable | None:
    """The rows so far; None if none has a result."""
    from cfmask.report import results, tables

    rows, done, missing = [], {}, []
    origins: dict[str, list[ModelOrigin]] = {}
    for row in reproduction.plan.rows:
        there = [name for name in row.found_in if reproduction.folder(name).results.exists()]
        models = []
        for name in there:
            evaluated = results.read_results(reproduction.folder(name).root)
            origins.setdefault(row.word, []).extend(origin for origin in evaluated.origins if origin.run is not None)
            models.append(evaluated.models[evaluated.chosen or 0])
        if len(there) < len(row.found_in):
            missing.append(row.label + (f" ({len(there)} of {len(row.found_in)} seeds done)" if there else ""))
        rows.append(results.ResultRow(row.label, tuple(models) or (results.ModelResult(row.label, {}),)))
        done[row.word] = len(there)
    if not any(done.values()):
        return None
    published = published_rows(tables.PUBLISHED.get(reproduction.arch or "", {}))
    return PaperTable(tuple(rows), split_of(reproduction), done, origins, published, tuple(missing))


def write_table(reproduction: Reproduction, found: PaperTable, line: Line | None = None) -> list[Path]:
    """Write the rows, beside the published numbers, to table.md, table.tex, results.json and charts in the plan's
    folder, and print the table.

    Args:
        line: also draw effective robustness, above this line.

    Returns:
        The charts.
    """
    from cfmask.report import charts, robustness, tables

    folder, rows, split = reproduction.setup.folder, found.rows, found.split
    if found.published:
        table = tables.comparison(rows, found.published, split, note=found.note)
    else:
        table = tables.markdown_table(rows, split, note=found.note)
    write_atomically(folder / "table.md", table + "\n")
    write_atomically(folder / "table.tex", tables.latex_table(rows, split, note=found.note) + "\n")
    results = {"plan": reproduction.identity, "rows": _numbers(reproduction, found)}
    write_atomically(folder / "results.json", mask_secrets(json.dumps(results, indent=2)))
    there = [row for row in rows if row.sets]
    written = [folder / "bars.png"]
    charts.bar_chart(there, written[0], split)
    names, note = ["table.md", "table.tex", "results.json", "bars.png"], ""
    if line is not None:
        written.append(folder / "effective-robustness.png")
        values = charts.effective_robustness([*there, *line.published], line.backbones, written[-1], split)
        note = robustness.robustness_table(values, line.backbones)
        write_atomically(folder / "effective-robustness.md", note + "\n")
        names += ["effective-robustness.md", "effective-robustness.png"]
    elif split.shifted:
        note = (
            "Effective robustness is not drawn: a line needs zero-shot models of two backbones, and this plan has one. "
            f"--fit-on {robustness.PUBLISHED_LINE} takes the three published ones."
        )
    print("\n" + "\n\n".join(filter(None, (table, note, f"{folder}: {', '.join(names)}"))))
    return written


def _numbers(reproduction: Reproduction, found: PaperTable) -> list[dict[str, Any]]:
    """``rows`` of results.json."""
    from cfmask.report.tables import differences

    numbers = []
    for row, shown in zip(reproduction.plan.rows, found.rows, strict=True):
        different = differences(shown, found.published.get(row.label, {}), found.split)
        numbers.append(
            {
                "row": row.word,
                "label": row.label,
                "seeds": found.seeds_done[row.word],
                "of": len(row.found_in),
                "checkpoints": [origin.to_json() for origin in found.origins.get(row.word, [])],
                "top1": {
                    label: {"value": e.value, "low": e.low, "high": e.high, "sd": e.sd, "noise": e.noise}
                    | (
                        {"published": d.published, "difference": d.difference, "within_noise": d.within_noise}
                        if (d := different.get(label))
                        else {}
                    )
                    for label, e in shown.estimates(found.split).items()
                },
            }
        )
    return numbers


def published_rows(known: Mapping[str, Any]) -> dict[str, Any]:
    """The published numbers of one architecture by row label.

    Args:
        known: an entry of tables.PUBLISHED, whose keys are the paper's names of the rows.
    """
    names = {"zero-shot": "zero-shot", "ft": "FT", "wise-ft": "WiSE-FT", HEADLINE: "this method"}
    return {LABELS[word]: known[name] for word, name in names.items() if name in known}
