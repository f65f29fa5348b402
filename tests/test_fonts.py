"""Text in pictures: names in any script, with any characters, whatever the user's settings of matplotlib are."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.font_manager import fontManager
from matplotlib.text import Text

import made
from cfmask.report import charts, fonts
from cfmask.report.figures import broken, save
from cfmask.report.fonts import drawable, families, family_of
from cfmask.report.results import ModelResult, ResultRow, SetResult
from cfmask.report.sheet import Cell, contact_sheet

CAT = "\U000130e0"
"""A hieroglyph, which matplotlib's own font does not have."""


@pytest.fixture
def cat_font(tmp_path):
    """An installed font that has CAT as a square."""
    pen = TTGlyphPen(None)
    for corner, move in zip(((0, 0), (0, 700), (700, 700), (700, 0)), (pen.moveTo, *[pen.lineTo] * 3), strict=True):
        move(corner)
    pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "cat"])
    builder.setupCharacterMap({ord(CAT): "cat"})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "cat": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (500, 0), "cat": (800, 0)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Cats Sans", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "cats.ttf")
    before = list(fontManager.ttflist)
    family_of.cache_clear()
    fontManager.addfont(tmp_path / "cats.ttf")
    yield "Cats Sans"
    fontManager.ttflist[:] = before
    family_of.cache_clear()
    fontManager._findfont_cached.cache_clear()


@given(st.text(st.characters(max_codepoint=0x24F)))
def test_european_names_are_drawn_as_they_are(text):
    shown = "".join(text.split())
    if shown.isprintable():
        assert "".join(drawable(text).split()) == shown
    assert all(line.isprintable() for line in drawable(text).split("\n"))


def test_what_cannot_be_drawn_is_an_escape_or_a_code_point(caplog, monkeypatch):
    monkeypatch.setattr(fonts, "_installed", lambda: [])
    monkeypatch.setattr(fonts, "_warned", set())
    family_of.cache_clear()
    assert drawable("caf\udce9 \x1b[31m a\u202eb\tc") == "caf\\udce9 \\x1b[31m a\\u202eb c"
    assert drawable(f"a{CAT}{CAT} b") == drawable(f"a{CAT}{CAT} b") == "a[U+130E0 130E0] b"
    assert [CAT in record.getMessage() for record in caplog.records] == [True], "said once"
    family_of.cache_clear()


def test_an_installed_font_is_used(cat_font, tmp_path):
    assert drawable(f"a{CAT}") == f"a{CAT}" and families(f"a{CAT}") == [fonts.OWN, cat_font]
    assert families("aé") == [fonts.OWN]
    figure = contact_sheet(["image"], [[Cell(np.zeros((8, 8, 3), np.uint8), CAT)]], note=f"a note {CAT}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(figure, tmp_path / "sheet.png")
    shown = {text.get_text(): text.get_fontfamily() for text in figure.findobj(Text)}
    assert shown[f"image\n{CAT}"] == shown[f"a note {CAT}"] == [fonts.OWN, cat_font]


def row(name: str, of: str) -> ResultRow:
    sets = {each: SetResult(50, 100, 50.0, (40.0, 60.0), 0.1, ((100, 50, 60.0),), {}) for each in ("val", of)}
    return ResultRow(name, (ModelResult(name, sets),))


@pytest.mark.parametrize(
    "name",
    [
        "三毛猫",
        "मुखौटा",
        "fox 🦊",
        r"cost $\foo{ x$ b_1^2",
        "caf\udce9",
        "a\x1b[31m\nb",
        "_hidden",
        "<script>\"'&",
        "x" * 200,
    ],
)
def test_charts_can_be_drawn_of_any_names(name, tmp_path):
    rows = [row(name, name), row("ft", name)]
    figures = [charts.bars_figure(rows), charts.reliability_figure(rows)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for figure in figures:
            save(figure, tmp_path / "chart.png")
    for figure in figures:
        entries = [text.get_text() for text in figure.legends[0].get_texts()]
        assert len(entries) == 2 and "".join(entries[0].split()) == "".join(drawable(name).split())


@pytest.mark.parametrize("width", [7, 10, 30])
def test_long_names_of_sets_have_three_short_lines_that_keep_their_ends(width):
    for name in ("imagenet-sketch", "a_very_long_name_of_a_set_no_17", "x" * 60 + "7", "三毛猫のモデルの名前7", "Avg."):
        lines = broken(name, width).split("\n")
        assert len(lines) <= 3 and max(map(len, lines)) <= width and lines[-1][-1] == drawable(name)[-1]
    assert broken("imagenet-sketch", 10) == "imagenet-\nsketch"


def test_pictures_do_not_depend_on_the_users_matplotlib(tmp_path):
    """With an unknown backend matplotlib cannot be imported, and with usetex it needs LaTeX."""
    log = tmp_path / "runs/ft/log.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text('{"step": 1, "loss": 1.0, "ce": 1.0}\n{"step": 2, "loss": 0.5, "ce": 0.5}\n')
    (log.parent / "recipe.json").write_text("{}")
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.size: 30\nxtick.labelsize: 30\nsavefig.dpi: 10\n")
    pictures = []
    for more in ({}, {"MPLBACKEND": "no-such-backend", "MATPLOTLIBRC": str(tmp_path)}):
        out = tmp_path / f"{len(pictures)}.png"
        command = [sys.executable, str(made.REPO / "tools/plot_runs.py"), str(log.parent), "--out", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **more})
        assert (done.returncode, done.stderr) == (0, "")
        pictures.append(out.read_bytes())
    assert pictures[0] == pictures[1]
