"""Building blocks of reports as HTML: one file that needs no network, no script and no other file.

    page("Evaluation", [Section("Accuracy", [table(…), figure(…)])])

All text is escaped where it enters a block; only ``Html``, which the blocks return, is inserted as it is. Pictures are
embedded. Wide tables and pictures scroll by themselves, so that the page is never wider than a phone.
"""

from __future__ import annotations

import base64
import html
import io
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

from cfmask import __version__
from cfmask.secrets import mask_secrets

FILE = "index.html"
"""Name of a page in the folder of its results."""


class Html(str):
    """Markup. Every other string is text."""

    __slots__ = ()


# Control characters are invalid in HTML, and bidirectional controls (in a name of a run) would reorder what follows.
_INVISIBLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufffe\uffff]")
_NUMBER = re.compile(r"[–≈▲▼]?\s?[+−-]?[\d.,]*\d(e-\d+|\s?[%±(–/)]|\s\w{1,3}\b|$|:).*|[–-]?")
_TAG = re.compile(r"<[^>]*>")


@dataclass(frozen=True)
class Section:
    """A part of a page, with a heading that the contents at its top link to."""

    title: str
    blocks: Sequence[Html]


def escape(value: object) -> Html:
    """A value as text of a page: secrets are masked, characters that HTML or UTF-8 cannot hold are shown as escapes.
    ``Html`` is returned as it is."""
    if isinstance(value, Html):
        return value
    text = mask_secrets(str(value)).encode(errors="backslashreplace").decode()
    return Html(html.escape(_INVISIBLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)))


def joined(parts: Iterable[object]) -> Html:
    """Blocks or texts, one after the other."""
    return Html("".join(map(escape, parts)))


def paragraph(text: object, *, note: bool = False) -> Html:
    """
    Args:
        note: small print.
    """
    return Html(f'<p class="{"note" if note else "text"}">{escape(text)}</p>')


def subsection(title: str, *blocks: Html) -> Html:
    return Html(f'<div class="sub"><h3>{escape(title)}</h3>{joined(blocks)}</div>')


def folded(title: str, *blocks: Html) -> Html:
    """Blocks that a click unfolds; on paper they are shown."""
    return Html(f"<details><summary>{escape(title)}</summary>{joined(blocks)}</details>")


def command(text: str) -> Html:
    return Html(f'<pre tabindex="0"><code>{escape(text)}</code></pre>')


def facts(values: Iterable[tuple[str, object]]) -> Html:
    """A list of names and values."""
    lines = (f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in values)
    return Html(f'<dl class="facts">{"".join(lines)}</dl>')


def table(
    caption: str, header: Sequence[object], rows: Sequence[Sequence[object]], *, together: Sequence[int] = ()
) -> Html:
    """A table that scrolls by itself. The first cell of each line is its heading. Columns of numbers are aligned right;
    None is shown as –.

    Args:
        together: numbers of consecutive lines that belong together and stay on one page of paper; without, each line
            stands alone.
    """
    cells = [[escape("–" if cell is None else cell) for cell in row] for row in rows]
    kinds = [_kind_of([_shown(row[i]) for row in cells]) for i in range(1, len(header))]
    head = [f'<th scope="col">{escape(header[0])}</th>']
    for name, kind in zip(map(escape, header[1:]), kinds, strict=True):
        head.append(f'<th scope="col" class="{kind}{" wide" if len(_shown(name)) > 24 else ""}">{name}</th>')
    lines = [
        f'<tr><th scope="row">{row[0]}</th>'
        + "".join(f'<td class="{kind}">{cell}</td>' for cell, kind in zip(row[1:], kinds, strict=True))
        + "</tr>"
        for row in cells
    ]
    ends = list(accumulate(together or [1] * len(lines)))
    bodies = ["".join(lines[start:end]) for start, end in pairwise([0, *ends])]
    name, short = escape(caption), ' class="short"' if len(cells) <= 30 else ""
    return Html(
        f'<div class="scroll" role="region" tabindex="0" aria-label="{name}"><table{short}><caption><span>{name}</span>'
        "</caption>"
        f"<thead><tr>{''.join(head)}</tr></thead>{''.join(f'<tbody>{body}</tbody>' for body in bodies)}</table></div>"
    )


def _shown(cell: Html) -> str:
    """The text of a cell without markup."""
    return html.unescape(_TAG.sub("", cell))


def _kind_of(column: Sequence[str]) -> str:
    """The class of a column's cells, which decides their alignment and width."""
    if all(len(text) <= 24 and _NUMBER.fullmatch(text) for text in column):
        return "number"
    longest = max(map(len, column))
    return "text short" if longest <= 20 else "text long" if longest > 40 else "text"


def figure(picture: Path | bytes, caption: object, alt: str) -> Html:
    """An embedded picture.

    Args:
        picture: a file, or its content, in a format that Pillow reads.
        alt: what it shows, for readers who cannot see it.

    Raises:
        OSError: it cannot be read, or is no picture.
    """
    data, kind, (width, height) = _compressed(picture.read_bytes() if isinstance(picture, Path) else picture)
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return Html(
        f'<figure><div class="scroll" role="region" tabindex="0" aria-label="{escape(alt)}"><img src="{source}" '
        f'width="{width}" height="{height}" alt="{escape(alt)}"></div><figcaption>{escape(caption)}</figcaption>'
        "</figure>"
    )


def _compressed(data: bytes) -> tuple[bytes, str, tuple[int, int]]:
    """The smaller one of a PNG of 256 colours, which suits charts, and a JPEG, which suits photographs.

    Returns:
        Its content, its format, and (width, height) in pixels.
    """
    from PIL import Image

    with Image.open(io.BytesIO(data)) as opened:
        flat = Image.new("RGB", opened.size, "white")
        flat.paste(opened, mask=opened.getchannel("A") if opened.mode in ("RGBA", "LA") else None)
    png, jpeg = io.BytesIO(), io.BytesIO()
    flat.quantize(256, dither=Image.Dither.NONE).save(png, "png", optimize=True)
    flat.save(jpeg, "jpeg", quality=85, optimize=True)
    smaller, kind = min(((png, "png"), (jpeg, "jpeg")), key=lambda pair: pair[0].tell())
    return smaller.getvalue(), kind, flat.size


def page(title: str, sections: Sequence[Section], *, lead: Iterable[Html] = ()) -> str:
    """A complete document.

    Args:
        lead: blocks above the contents: what a reader wants to know first.
    """
    links = [f'<li><a href="#part-{i}">{escape(part.title)}</a></li>' for i, part in enumerate(sections, 1)]
    parts = [
        f'<section aria-labelledby="part-{i}"><h2 id="part-{i}">{escape(part.title)}</h2>'
        f"{joined(part.blocks)}</section>"
        for i, part in enumerate(sections, 1)
    ]
    written = time.strftime("%Y-%m-%d %H:%M %Z")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<header><h1>{escape(title)}</h1>{joined(lead)}</header>
<nav aria-label="contents"><ul>{"".join(links)}</ul></nav>
<main>{"".join(parts)}</main>
<footer>Written by cfmask {__version__} on {written}.</footer>
</body>
</html>
"""


_STYLE = """
:root { --text: #1a1a1a; --soft: #595959; --back: #fff; --line: #d5d5d5; --pale: #f4f4f2; --link: #0b57a4 }
@media (prefers-color-scheme: dark) {
  :root { --text: #e8e8e6; --soft: #acacac; --back: #17181a; --line: #44464a; --pale: #222427; --link: #8ab8f0 }
}
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100% }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; color: var(--text); background: var(--back);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .5rem }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem }
p { margin: .5rem 0; max-width: 48rem }
a { color: var(--link) }
.note, figcaption, caption, footer { color: var(--soft); font-size: .875rem }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none; margin: .8rem 0; padding: 0 }
.scroll { overflow-x: auto; margin: .8rem 0; container-type: inline-size }
.scroll:focus-visible, pre:focus-visible { outline: 2px solid var(--link) }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums }
caption { text-align: left; padding: 0 0 .4rem }
caption span { display: inline-block; position: sticky; left: 0; max-width: calc(100vw - 3rem);
  max-width: 100cqw }
th, td { padding: .3rem .9rem .3rem 0; text-align: left; vertical-align: top; overflow-wrap: break-word }
thead th { border-bottom: 2px solid var(--line); vertical-align: bottom; white-space: nowrap }
thead th.wide { white-space: normal; min-width: 10rem; overflow-wrap: anywhere }
tbody { border-bottom: 1px solid var(--line) }
tbody th { font-weight: 600; min-width: 8rem; max-width: min(24rem, 42vw); position: sticky; left: 0;
  background: var(--back); overflow-wrap: anywhere }
tbody tr + tr th { font-weight: 400; color: var(--soft) }
tbody tr + tr td { color: var(--soft) }
.number { text-align: right; white-space: nowrap }
td.text { min-width: 5rem; max-width: 30rem }
td.short { min-width: 0; white-space: nowrap }
td.long { min-width: min(22rem, 70vw); overflow-wrap: anywhere }
.interval { color: var(--soft); font-size: .85em }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); gap: .4rem 1.5rem;
  margin: .8rem 0 }
dt { color: var(--soft); font-size: .8125rem }
dd { margin: 0 }
figure { margin: 1.2rem 0 }
figure .scroll { margin: 0 0 .3rem }
img { display: block; width: auto; max-width: min(100%, 52rem); height: auto; background: #fff }
pre { overflow-x: auto; background: var(--pale); padding: .6rem .8rem; margin: .6rem 0; font-size: .8125rem }
summary { cursor: pointer; padding: .3rem 0 }
footer { margin-top: 2.5rem }
@media print {
  :root { --text: #000; --soft: #444; --back: #fff; --line: #bbb; --pale: #f4f4f2; --link: #000 }
  @page { margin: 15mm }
  body { padding: 0; max-width: none; font-size: 9.5pt }
  .note, figcaption, caption, footer { font-size: 8.5pt }
  nav { display: none }
  h2, h3, caption { break-after: avoid }
  figure, table.short, tbody, tr, .facts div { break-inside: avoid }
  .facts { grid-template-columns: repeat(5, 1fr); gap: .1rem .8rem; font-size: 8pt }
  dt { font-size: 7pt }
  caption span { position: static; max-width: none }
  .scroll { container-type: normal }
  .scroll, pre { overflow: visible }
  table { font-size: 8pt; width: 100% }
  thead { display: table-header-group }
  tbody th { position: static; min-width: 5rem }
  td.text { min-width: 0 }
  td.long { min-width: 10rem }
  thead th, td.number, td.short { white-space: normal }
  th, td { padding-right: .5rem }
  pre { white-space: pre-wrap }
  img { max-height: 200mm }
  details::details-content { content-visibility: visible; block-size: auto }
}
"""
