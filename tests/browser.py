"""How Chromium shows a page: does it fit a phone and a desk, decode its pictures, and print?"""

from __future__ import annotations

import html
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from html_check import Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
MEASURE = """<!doctype html>
<iframe style="border: 0; width: WIDTHpx; height: 900px" srcdoc="PAGE"></iframe>
<script>
const frame = document.querySelector("iframe");
frame.onload = () => {
  const page = frame.contentDocument, pictures = [...page.images];
  document.body.dataset.found = JSON.stringify({
    page: page.documentElement.scrollWidth, window: frame.contentWindow.innerWidth,
    decoded: pictures.filter(p => p.complete && p.naturalWidth > 0).length, pictures: pictures.length,
    cut: [...page.querySelectorAll("caption span")].filter(
      each => each.getBoundingClientRect().right > each.closest(".scroll").getBoundingClientRect().right + 1).length,
  });
};
</script>
"""
"""A page in a frame: a window of Chromium cannot be as narrow as a phone."""


def assert_fits_and_prints(file: Path, folder: Path) -> None:
    """Check a page at the widths of a phone and of a desk, and print it.

    Args:
        folder: for temporary files.
    """
    text = file.read_text()
    assert "default-src 'none'" in text, "the browser loads nothing else"
    for width in (360, 1280):
        measured = folder / "measured.html"
        measured.write_text(MEASURE.replace("WIDTH", str(width)).replace("PAGE", html.escape(text)))
        dom = _chromium(folder, "--window-size=1400,900", "--dump-dom", measured.as_uri())
        found = json.loads(Page(dom).all("body")[0].attributes["data-found"] or "")
        assert found["window"] == width and found["page"] <= width, "no scrolling to the side"
        assert found["decoded"] == found["pictures"] > 0
        assert found["cut"] == 0, "captions are as wide as the window, not as their tables"
    _chromium(folder, f"--print-to-pdf={folder / 'page.pdf'}", file.as_uri())
    assert (folder / "page.pdf").read_bytes().startswith(b"%PDF")


def _chromium(folder: Path, *flags: object) -> str:
    quiet = ["quic", "background-networking", "component-update", "sync", "extensions", "gpu"]
    command = [CHROMIUM, "--headless", "--no-sandbox", "--no-first-run", f"--user-data-dir={folder / 'profile'}"]
    command += [*(f"--disable-{each}" for each in quiet), "--host-resolver-rules=MAP * ~NOTFOUND", *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
