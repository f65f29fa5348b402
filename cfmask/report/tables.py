"""Tables of results in Markdown, LaTeX and HTML, alone and beside published numbers."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cfmask.data.benchmarks import SHIFTED
from cfmask.errors import UserError
from cfmask.report import page
from cfmask.report.results import AVERAGE, LABELS, Estimate, ResultRow, Split

_ROUNDING = 0.05
"""Largest rounding error of published numbers, which have one decimal."""
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
"""Top-1 in percent of OpenAI's CLIP fine-tuned on ImageNet, by architecture, row and column, from tables of later
papers; None where no number was available."""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded to align in a terminal."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in (header, *rows)]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


@dataclass(frozen=True)
class Difference:
    """A number beside the published one, in percent."""

    ours: float
    published: float
    noise: float
    """Largest difference without meaning: half of our 95 % interval (``Estimate.noise``) and 0.05 for the rounding."""

    @property
    def difference(self) -> float:
        return self.ours - self.published

    @property
    def within_noise(self) -> bool:
        return abs(self.difference) <= self.noise

    def __str__(self) -> str:
        mark = "≈" if self.within_noise else "▲" if self.difference > 0 else "▼"
        return f"{mark} {signed(self.difference)}"


@dataclass(frozen=True)
class _Notation:
    """How a markup writes an estimate."""

    plus_minus: str
    interval: str
    bold: str
    missing: str

    def cell(self, e: Estimate | None, *, bold: bool = False) -> str:
        if e is None:
            return self.missing
        text = f"{e.value:.1f}" if e.seeds == 1 else f"{e.value:.1f}{self.plus_minus}{e.sd:.1f}"
        if bold:
            text = self.bold.format(text)
        return text if e.seeds > 1 else f"{text} {self.interval.format(f'{e.low:.1f}', f'{e.high:.1f}')}"


_MARKDOWN = _Notation(" ± ", "({}–{})", "**{}**", "–")
_LATEX = _Notation(r" $\pm$ ", r"{{\scriptsize [{}, {}]}}", r"\textbf{{{}}}", "--")
_HTML = _Notation(" ± ", '<span class="interval">({}–{})</span>', "<b>{}</b>", "–")


def differences(
    row: ResultRow, published: Mapping[str, float | None], split: Split | None = None
) -> dict[str, Difference]:
    """Differences by column heading, where both have a number. An average is compared only if it is over the paper's
    five sets.

    Args:
        published: by column heading, such as PUBLISHED["ViT-B-16"]["FT"].
    """
    split = split or Split.of_rows([row])
    found = {}
    for label, estimate in row.estimates(split).items():
        number = published.get(label)
        if number is not None and (label != AVERAGE or split.is_benchmark):
            found[label] = Difference(estimate.value, number, estimate.noise + _ROUNDING)
    return found


def markdown_table(rows: Sequence[ResultRow], split: Split | None = None, *, note: str = "") -> str:
    """Top-1 in percent, with a line below that explains the numbers. The best of each column is bold, with ties after
    rounding.

    Args:
        note: further sentences for that line.

    Raises:
        UserError: no row, or none with a set.
    """
    split = checked_split(rows, split)
    cells = _cells(rows, split, _MARKDOWN)
    lines = [[markdown_text(row.name), *line] for row, line in zip(rows, cells, strict=True)]
    return table(["top-1 %", *map(markdown_text, split.columns)], lines) + "\n\n" + _note(rows, split, note)


def latex_table(rows: Sequence[ResultRow], split: Split | None = None, *, note: str = "") -> str:
    r"""The same as ``markdown_table`` as a tabular, for \input in a paper; needs the package booktabs."""
    split = checked_split(rows, split)
    cells = _cells(rows, split, _LATEX)
    lines = [[latex_text(row.name), *line] for row, line in zip(rows, cells, strict=True)]
    return "\n".join(
        [
            r"% \usepackage{booktabs}",
            *(f"% {line}" for line in textwrap.wrap(_note(rows, split, note), 110)),
            rf"\begin{{tabular}}{{l{'c' * len(split.columns)}}}",
            r"\toprule",
            " & ".join(["", *map(latex_text, split.columns)]) + r" \\",
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
    """A Markdown table with three lines for each row: ours, published, and their difference. It is marked ▲ or ▼ if it
    exceeds the noise (``Difference``), and ≈ otherwise.

    Args:
        published: by name of a row, such as PUBLISHED["ViT-B-16"].
        note: further sentences for the line below.

    Raises:
        UserError: no row, or none with a set.
    """
    split = checked_split(rows, split)
    groups = _compared(rows, published, split, _MARKDOWN)
    lines = [[markdown_text(name), *line] for group in groups for name, line in group]
    header = table(["top-1 %", *map(markdown_text, split.columns)], lines)
    return f"{header}\n\n" + _note(rows, split, note, _RULE)


def html_table(
    rows: Sequence[ResultRow],
    split: Split | None = None,
    *,
    published: Mapping[str, Mapping[str, float | None]] | None = None,
    note: str = "",
) -> page.Html:
    """The same as ``markdown_table`` or, with ``published``, as ``comparison``, as blocks of a page."""
    split = checked_split(rows, split)
    if published:
        caption, rule = "Top-1 in percent, beside the published numbers", _RULE
        groups = _compared(rows, published, split, _HTML)
        groups = [group if published.get(row.name) else group[:1] for row, group in zip(rows, groups, strict=True)]
    else:
        caption, rule = "Top-1 in percent; the best of each column is bold", ""
        groups = [[(row.name, line)] for row, line in zip(rows, _cells(rows, split, _HTML), strict=True)]
    cells = [[name, *map(page.Html, line)] for group in groups for name, line in group]
    shown = page.table(caption, ["", *split.columns], cells, together=list(map(len, groups)))
    return page.joined([shown, page.paragraph(_note(rows, split, note, rule), note=True)])


_RULE = (
    "▲ ▼: above or below the published number by more than the noise. ≈: within the noise, which is half of our "
    f"95 % interval + {_ROUNDING} for the rounding of published numbers. The interval is over draws of the test "
    "set and, with several seeds, of seeds: sqrt(h² + (t·sd/√n)²), with h half of the test set's interval and "
    "Student's t. The unknown noise of the published numbers is not included."
)


def _compared(
    rows: Sequence[ResultRow], published: Mapping[str, Mapping[str, float | None]], split: Split, notation: _Notation
) -> list[list[tuple[str, list[str]]]]:
    """For each row, heading and cells of three lines: ours, published, difference."""
    labels = list(split.columns)
    groups = []
    for row in rows:
        ours, known = row.estimates(split), published.get(row.name, {})
        found = differences(row, known, split)
        groups.append(
            [
                (row.name, [notation.cell(ours.get(label)) for label in labels]),
                ("published", [f"{found[i].published:.1f}" if i in found else "–" for i in labels]),
                ("difference", [str(found.get(label, "–")) for label in labels]),
            ]
        )
    return groups


def latex_text(text: str) -> str:
    """Text for LaTeX, with special characters and characters that pdflatex lacks escaped."""
    return text.translate(_LATEX_CHARACTERS)


_LATEX_CHARACTERS = str.maketrans(
    {
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
)


def checked_split(rows: Sequence[ResultRow], split: Split | None) -> Split:
    """``split``, or the one that the rows' sets suggest. Raises UserError if no row has a result to show."""
    if not rows:
        raise UserError("There is no result to show: name at least one evaluation with a model.")
    split = split or Split.of_rows(rows)
    if not any(row.estimates(split) for row in rows):
        wanted = ", ".join(name for name in split.columns.values() if name) or "a set"
        models = ", ".join(row.name for row in rows)
        raise UserError(f"None of {models} was evaluated on {wanted}. Evaluate at least one there with --sets.")
    return split


def _cells(rows: Sequence[ResultRow], split: Split, notation: _Notation) -> list[list[str]]:
    """The cells of each row. With several rows, the best of each column is bold."""
    estimates = [row.estimates(split) for row in rows]
    columns = []
    for label in split.columns:
        column = [of_row.get(label) for of_row in estimates]
        best = max((round(e.value, 1) for e in column if e), default=None) if len(rows) > 1 else None
        columns.append([notation.cell(e, bold=e is not None and round(e.value, 1) == best) for e in column])
    return [list(line) for line in zip(*columns, strict=True)]


def _note(rows: Sequence[ResultRow], split: Split, *more: str) -> str:
    """Sentences that explain a table's numbers, and then ``more``."""
    seeds = sorted({len(row.per_seed) for row in rows if len(row.per_seed) > 1})
    parts = []
    if seeds:
        numbers = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        parts.append(f"Mean ± sample standard deviation over {numbers} seeds.")
    if any(len(row.per_seed) == 1 for row in rows):
        of_average = "; for the average, from the sets' binomial variances" if AVERAGE in split.columns else ""
        parts.append(f"Of one seed: the 95 % interval over draws of the test set (Wilson's{of_average}).")
    if AVERAGE in split.columns:
        shifted = [label for label, name in split.columns.items() if name in split.shifted]
        parts.append(f"{AVERAGE}: mean of {', '.join(shifted)}.")
    return " ".join(filter(None, [*parts, *more]))


def markdown_text(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return text.replace("|", r"\|").replace("*", r"\*").replace("\n", " ")


def signed(value: float | None) -> str:
    """One decimal with its sign (− is as wide as +), without one if it rounds to zero; – for None."""
    if value is None:
        return "–"
    return f"{round(value, 1) or 0.0:+.1f}".replace("-", "−").replace("+0.0", "0.0")
