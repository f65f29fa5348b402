"""The table of a reproduction: its rows beside the published numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cfmask.evaluation.model_origin import ModelOrigin, checkpoint_note
from cfmask.runtime.files import write_atomically
from cfmask.secrets import mask_secrets
from launch.paper.plan import HEADLINE, LABELS
from launch.paper.reproduction import Reproduction

if TYPE_CHECKING:
    from cfmask.report.results import Split
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


def write_table(reproduction: Reproduction, line: Line | None = None) -> None:
    """Write the rows that have results, beside the published numbers, to table.md, table.tex, results.json and charts
    in the plan's folder, and print the table.

    Args:
        line: also draw effective robustness, above this line.
    """
    # Imported here, because a command that only submits jobs needs neither scipy nor matplotlib.
    from cfmask.report import charts, results, robustness, tables

    folder = reproduction.setup.folder
    rows, found, missing = [], {}, []
    origins: dict[str, list[ModelOrigin]] = {}
    for row in reproduction.plan.rows:
        done = [name for name in row.found_in if reproduction.folder(name).results.exists()]
        models = []
        for name in done:
            evaluated = results.read_results(folder / name)
            origins.setdefault(row.word, []).extend(origin for origin in evaluated.origins if origin.run is not None)
            models.append(evaluated.models[evaluated.chosen or 0])
        if len(done) < len(row.found_in):
            missing.append(row.label + (f" ({len(done)} of {len(row.found_in)} seeds done)" if done else ""))
        # A row without models is a line of dashes.
        rows.append(results.ResultRow(row.label, tuple(models) or (results.ModelResult(row.label, {}),)))
        found[row.word] = len(done)
    if not any(found.values()):
        print("No row of the table has results yet.")
        return
    split = split_of(reproduction)
    published = published_rows(tables.PUBLISHED.get(reproduction.arch or "", {}))
    note = checkpoint_note({LABELS[word]: of_row for word, of_row in origins.items()})
    if published:
        table = tables.comparison(rows, published, split, note=note)
    else:
        table = tables.markdown_table(rows, split, note=note)
    if missing:
        table += f"\n\nMissing: {'; '.join(missing)}."
    write_atomically(folder / "table.md", table + "\n")
    write_atomically(folder / "table.tex", tables.latex_table(rows, split, note=note) + "\n")
    numbers = []
    for row, shown in zip(reproduction.plan.rows, rows, strict=True):
        different = tables.differences(shown, published.get(row.label, {}), split)
        numbers.append(
            {
                "row": row.word,
                "label": row.label,
                "seeds": found[row.word],
                "of": len(row.found_in),
                "checkpoints": [origin.to_json() for origin in origins.get(row.word, [])],
                "top1": {
                    label: {"value": e.value, "low": e.low, "high": e.high, "sd": e.sd, "noise": e.noise}
                    | (
                        {"published": d.published, "difference": d.difference, "within_noise": d.within_noise}
                        if (d := different.get(label))
                        else {}
                    )
                    for label, e in shown.estimates(split).items()
                },
            }
        )
    write_atomically(
        folder / "results.json", mask_secrets(json.dumps({"plan": reproduction.identity, "rows": numbers}, indent=2))
    )
    there = [row for row in rows if row.sets]
    charts.bar_chart(there, folder / "bars.png", split)
    written = ["table.md", "table.tex", "results.json", "bars.png"]
    note = ""
    if line is not None:
        chart = folder / "effective-robustness.png"
        values = charts.effective_robustness([*there, *line.published], line.backbones, chart, split)
        note = robustness.robustness_table(values, line.backbones)
        write_atomically(folder / "effective-robustness.md", note + "\n")
        written += ["effective-robustness.md", chart.name]
    elif split.shifted:
        note = (
            "Effective robustness is not drawn: a line needs zero-shot models of two backbones, and this plan has one. "
            f"--fit-on {robustness.PUBLISHED_LINE} takes the three published ones."
        )
    print(f"\n{table}\n\n" + (f"{note}\n\n" if note else "") + f"{folder}: {', '.join(written)}")


def published_rows(known: Mapping[str, Any]) -> dict[str, Any]:
    """The published numbers of one architecture by row label.

    Args:
        known: an entry of tables.PUBLISHED, whose keys are the paper's names of the rows.
    """
    names = {"zero-shot": "zero-shot", "ft": "FT", "wise-ft": "WiSE-FT", HEADLINE: "this method"}
    return {LABELS[word]: known[name] for word, name in names.items() if name in known}
