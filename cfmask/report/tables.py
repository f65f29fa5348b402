"""Results as tables, in Markdown and LaTeX, alone and beside published numbers."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cfmask.data.benchmarks import SHIFTED
from cfmask.errors import UserError
from cfmask.report.results import AVERAGE, LABELS, Estimate, ResultRow, Split

_ROUNDING = 0.05
"""Numbers are published with one decimal."""
_COLUMNS = ("IN", *(LABELS[benchmark.name] for benchmark in SHIFTED), AVERAGE)


def _published(*values: float | None) -> dict[str, float | None]:
    return dict(zip(_COLUMNS, values, strict=True))


_UNKNOWN = _published(*[None] * len(_COLUMNS))
PUBLISHED: dict[str, dict[str, dict[str, float | None]]] = {
    "ViT-B-32": {
        "zero-shot": _published(63.3, 55.9, 69.3, 42.3, 43.5, 31.5, 48.5),
        "FT": _published(76.2, 64.2, 57.1, 38.7, 40.1, 21.0, 44.2),
        "WiSE-FT": _UNKNOWN,
        "this method": _UNKNOWN,
    },
    "ViT-B-16": {
        "zero-shot": _published(68.3, 61.9, 77.7, 48.3, 54.2, 50.0, 58.4),
        "FT": _published(81.3, 70.6, 65.6, 45.1, 50.5, 36.6, 53.7),
        "WiSE-FT": _published(82.5, 73.1, 75.1, 51.6, 55.7, 47.6, 60.6),
        "this method": _published(82.4, 73.4, 78.1, 53.4, 57.9, 53.5, 63.3),
    },
    "ViT-L-14": {
        "zero-shot": _published(75.6, 69.9, 87.9, 59.6, 66.6, 70.8, 70.9),
        "FT": _published(84.7, 75.3, 75.4, 54.4, 59.8, 55.7, 64.1),
        "WiSE-FT": _UNKNOWN,
        "this method": _UNKNOWN,
    },
}
"""Top-1 in percent by architecture, row and column, of OpenAI's CLIP fine-tuned on ImageNet, collected from tables of
later papers; None where no number was available."""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it reads well in a terminal."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in rows]
    head = "| " + " | ".join(cell.ljust(w) for cell, w in zip(header, widths, strict=True)) + " |"
    return "\n".join([head, "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines])


@dataclass(frozen=True)
class Difference:
    """A number beside the published one, in percent. noise: what they may differ by without meaning anything: half of
    our 95 % interval (``Estimate.noise``) and the 0.05 that publishing rounded away."""

    ours: float
    published: float
    noise: float

    @property
    def difference(self) -> float:
        return self.ours - self.published

    @property
    def within_noise(self) -> bool:
        return abs(self.difference) <= self.noise


def differences(
    row: ResultRow, published: Mapping[str, float | None], split: Split | None = None
) -> dict[str, Difference]:
    """By label of a column, where both have a number. published: such as PUBLISHED["ViT-B-16"]["FT"]. An average is
    compared only if it is over the paper's five sets."""
    split = split or Split.of_rows([row])
    found = {}
    for label, estimate in row.estimates(split).items():
        number = published.get(label)
        if number is not None and (label != AVERAGE or split.is_benchmark):
            found[label] = Difference(estimate.value, number, estimate.noise + _ROUNDING)
    return found


def markdown_table(
    rows: Sequence[ResultRow], split: Split | None = None, *, uncertainty: bool = True, digits: int = 1, note: str = ""
) -> str:
    """Top-1 in percent, with a line below that says what the numbers are. The best of a column is bold (all that look
    the same with so many digits).

    Args:
        note: more sentences for that line.

    Raises:
        UserError: no row, or none with a set.
    """
    split = checked_split(rows, split)
    cells = _cells(rows, split, uncertainty, digits, " ± ", "({}–{})", "**{}**", "–")
    lines = [[markdown_text(row.name), *line] for row, line in zip(rows, cells, strict=True)]
    below = " ".join(filter(None, [_note(rows, split, uncertainty), note]))
    return table(["top-1 %", *map(markdown_text, split.columns)], lines) + "\n\n" + below


def latex_table(
    rows: Sequence[ResultRow], split: Split | None = None, *, uncertainty: bool = True, digits: int = 1, note: str = ""
) -> str:
    r"""The same as a tabular, for \input in a paper; needs the package booktabs.

    Raises:
        UserError: no row, or none with a set.
    """
    split = checked_split(rows, split)
    interval = r"{{\scriptsize [{}, {}]}}"
    cells = _cells(rows, split, uncertainty, digits, r" $\pm$ ", interval, r"\textbf{{{}}}", "--")
    lines = [[latex_text(row.name), *line] for row, line in zip(rows, cells, strict=True)]
    header = ["", *map(latex_text, split.columns)]
    said = " ".join(filter(None, [_note(rows, split, uncertainty), note]))
    comments = [f"% {line}" for line in textwrap.wrap(said, 110)]
    return "\n".join(
        [
            r"% \usepackage{booktabs}",
            *comments,
            rf"\begin{{tabular}}{{l{'c' * len(split.columns)}}}",
            r"\toprule",
            " & ".join(header) + r" \\",
            r"\midrule",
            *(" & ".join(line) + r" \\" for line in lines),
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


def comparison(
    rows: Sequence[ResultRow],
    published: Mapping[str, Mapping[str, float | None]],
    split: Split | None = None,
    *,
    note: str = "",
) -> str:
    """Rows beside the published numbers, as a Markdown table of three lines a row: ours, published, and ours less
    published, with ▲ or ▼ if that is more than noise (``Difference``) and ≈ if it is not.

    Args:
        published: by the row's name, such as PUBLISHED["ViT-B-16"]; a row that it lacks has no number there.
        note: more sentences for the line below.

    Raises:
        UserError: no row, or none with a set.
    """
    split = checked_split(rows, split)
    labels, lines = list(split.columns), []
    for row in rows:
        ours, known = row.estimates(split), published.get(row.name, {})
        found = differences(row, known, split)
        lines.append([markdown_text(row.name), *(_plain(ours.get(label)) for label in labels)])
        lines.append(["published", *(f"{found[i].published:.1f}" if i in found else "–" for i in labels)])
        lines.append(["difference", *(_marked(found[label]) if label in found else "–" for label in labels)])
    rule = (
        "▲ ▼: above, below the published number by more than noise. ≈: within it, |difference| ≤ half of our 95 % "
        f"interval + {_ROUNDING} for the rounding of what is published. The interval is over draws of the test set "
        "and, with several seeds, of these: sqrt(h² + (t·sd/√n)²), h half of the test set's, t Student's. The "
        "published numbers' own noise is not known, and not counted."
    )
    header = table(["top-1 %", *map(markdown_text, labels)], lines)
    return f"{header}\n\n" + " ".join(filter(None, [_note(rows, split, uncertainty=True), note, rule]))


def latex_text(text: str) -> str:
    """Text for LaTeX: its special characters, and those of ours that pdflatex does not know, escaped."""
    return "".join(_LATEX.get(character, character) for character in text)


_LATEX = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    "α": r"$\alpha$",
    "β": r"$\beta$",
    "γ": r"$\gamma$",
    "θ": r"$\theta$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "·": r"$\cdot$",
    "−": "$-$",
    "≤": r"$\le$",
    "≥": r"$\ge$",
    "→": r"$\rightarrow$",
    "∞": r"$\infty$",
    "–": "--",
    "—": "---",
    "…": r"\ldots{}",
}


def checked_split(rows: Sequence[ResultRow], split: Split | None) -> Split:
    if not rows:
        raise UserError("There is no result to show: name at least one evaluation with a model.")
    split = split or Split.of_rows(rows)
    if not any(row.estimates(split) for row in rows):
        wanted = ", ".join(name for name in split.columns.values() if name) or "a set"
        models = ", ".join(row.name for row in rows)
        raise UserError(f"None of {models} was evaluated on {wanted}. Evaluate at least one there with --sets.")
    return split


def _cells(
    rows: Sequence[ResultRow],
    split: Split,
    uncertainty: bool,
    digits: int,
    plus_minus: str,
    interval: str,
    bold: str,
    missing: str,
) -> list[list[str]]:
    """A line of cells a row; the notation is the last four arguments'."""
    estimates = [row.estimates(split) for row in rows]
    best = {
        label: max((round(e[label].value, digits) for e in estimates if label in e), default=math.nan)
        for label in split.columns
    }
    lines = []
    for of_row in estimates:
        line = []
        for label in split.columns:
            if label not in of_row:
                line.append(missing)
                continue
            e = of_row[label]
            text = f"{e.value:.{digits}f}"
            several = e.seeds > 1 and uncertainty
            if several:
                text += f"{plus_minus}{e.sd:.{digits}f}"
            if len(rows) > 1 and round(e.value, digits) == best[label]:
                text = bold.format(text)
            if uncertainty and not several:
                text += " " + interval.format(f"{e.low:.{digits}f}", f"{e.high:.{digits}f}")
            line.append(text)
        lines.append(line)
    return lines


def _note(rows: Sequence[ResultRow], split: Split, uncertainty: bool) -> str:
    """What a table's numbers are, in sentences."""
    seeds = sorted({len(row.per_seed) for row in rows if len(row.per_seed) > 1})
    numbers = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}" if seeds else ""
    average = AVERAGE in split.columns
    parts = []
    if seeds:
        parts.append(f"Mean {'± sample standard deviation ' if uncertainty else ''}over {numbers} seeds.")
    if uncertainty and any(len(row.per_seed) == 1 for row in rows):
        of_average = ", of the average by the sets' binomial variances" if average else ""
        parts.append(f"Of one seed, the 95 % interval over draws of the test set (Wilson's{of_average}).")
    if average:
        shifted = [label for label, name in split.columns.items() if name in split.shifted]
        parts.append(f"{AVERAGE}: mean of {', '.join(shifted)}.")
    return " ".join(parts)


def _plain(estimate: Estimate | None) -> str:
    if estimate is None:
        return "–"
    if estimate.seeds > 1:
        return f"{estimate.value:.1f} ± {estimate.sd:.1f}"
    return f"{estimate.value:.1f} ({estimate.low:.1f}–{estimate.high:.1f})"


def _marked(found: Difference) -> str:
    mark = "≈" if found.within_noise else "▲" if found.difference > 0 else "▼"
    return f"{mark} {signed(found.difference)}"


def markdown_text(text: str) -> str:
    return text.replace("|", r"\|").replace("*", r"\*").replace("\n", " ")


def signed(value: float | None) -> str:
    """One decimal, a minus as wide as the plus, and no sign for what rounds to nothing; – for None."""
    if value is None:
        return "–"
    return f"{round(value, 1) or 0.0:+.1f}".replace("-", "−").replace("+0.0", "0.0")
