"""Text of any script in pictures.

matplotlib's own font has Latin, Greek, Cyrillic, Arabic and many symbols. Other characters, of names of runs and
classes, are drawn in a font that is installed on this machine. Those that no installed font has are shown as code
points, [U+732B], so that two names stay different.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterable
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.font_manager import FontEntry, FontProperties, findfont, fontManager, get_font
from matplotlib.text import Text

from cfmask.runtime.output import clean

OWN = "DejaVu Sans"
"""matplotlib's own font, which comes with it."""
logger = logging.getLogger(__name__)


def drawable(text: str) -> str:
    """A text with what cannot be drawn as escapes and code points. A dollar sign is not changed: see ``STYLED``."""
    if text.isascii() and text.isprintable():
        return text
    lines = [clean(line) for line in text.split("\n")]
    missing = {char for char in text if char.isprintable() and family_of(char) is None}
    if not missing:
        return "\n".join(lines)
    _warn(missing)
    runs = re.compile(f"[{''.join(map(re.escape, missing))}]+")
    return "\n".join(runs.sub(lambda run: f"[U+{' '.join(f'{ord(c):04X}' for c in run[0])}]", line) for line in lines)


_warned: set[str] = set()


def _warn(missing: set[str]) -> None:
    """Name each character once."""
    if new := sorted(missing - _warned):
        _warned.update(new)
        logger.warning(
            f"No installed font has {' '.join(new[:8])}{' …' if len(new) > 8 else ''}: pictures show code points. "
            "Install a font that has these characters to see them; tables and pages have them as they are."
        )


def families(text: str) -> list[str]:
    """Fonts that together have the characters of a drawable text, matplotlib's own first."""
    found = [OWN]
    for char in dict.fromkeys(text):
        if not (char.isspace() or any(_has(_file_of(family), char) for family in found)):
            found += filter(None, [family_of(char)])
    return found


@functools.cache
def family_of(char: str) -> str | None:
    """The font in which a character is drawn; None if no installed font has it."""
    if get_font(_file_of(OWN)).get_char_index(ord(char)):
        return OWN
    for entry in _installed():
        if _has(entry.fname, char) and Path(_file_of(entry.name)) == Path(entry.fname):
            return entry.name
    return None


def _file_of(family: str) -> str:
    return str(findfont(FontProperties(family=family)))


def _installed() -> Iterable[FontEntry]:
    """Upright fonts, those without serifs first. The font of last resort has a box for every character."""
    upright = [e for e in fontManager.ttflist if e.style == "normal" and "Last" not in e.name and e.name != OWN]
    return sorted(upright, key=lambda entry: ("Sans" not in entry.name, entry.name, entry.fname))


def _has(file: str, char: str) -> bool:
    """Whether a font has an outline of a character. Fonts of coloured pictures have none, and cannot be drawn."""
    try:
        font = get_font(file)
        index = font.get_char_index(ord(char))
        return bool(index) and any(font.load_glyph(index).bbox)
    except (RuntimeError, OSError):  # no scalable font, or a damaged or deleted one
        return False


def fit_fonts(figure: Figure) -> None:
    """Make all texts of a figure drawable, and give them the fonts that they need. Labels of ticks, which are written
    again when the figure is drawn, have to be drawable already."""
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_text(drawable(text.get_text()))
        if not text.get_text().isascii():
            text.set_fontfamily(families(text.get_text()))
