"""Checks of a page: is it well formed, whole in one file, and usable without colours, pictures, or a mouse?"""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "img", "br", "hr", "input"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str | None]
    inside: list[str] = field(default_factory=list)
    """Tags of its ancestors."""
    text: str = ""


class Page(HTMLParser):
    """The elements and texts of a page. ``wrong`` lists what is not well formed."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[Element] = []
        self.wrong: list[str] = []
        self._open: list[Element] = []
        self.feed(text)
        self.close()
        self.wrong += [f"<{element.tag}> is not closed" for element in self._open]

    def handle_starttag(self, tag, attrs):
        element = Element(tag, dict(attrs), [each.tag for each in self._open])
        if len(element.attributes) != len(attrs):
            self.wrong.append(f"<{tag}> has an attribute twice")
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_endtag(self, tag):
        if not self._open or self._open[-1].tag != tag:
            self.wrong.append(f"</{tag}> closes {self._open[-1].tag if self._open else 'nothing'}")
        else:
            self._open.pop()

    def handle_data(self, data):
        for element in self._open:
            element.text += data

    def all(self, *tags: str) -> list[Element]:
        return [element for element in self.elements if element.tag in tags]

    @property
    def text(self) -> str:
        return self.all("body")[0].text


def checked(data: bytes | str) -> Page:
    """The page, after all checks."""
    text = data if isinstance(data, str) else data.decode()  # UTF-8
    assert text.startswith("<!doctype html>")
    page = Page(text)
    assert page.wrong == []
    [root], [title] = page.all("html"), page.all("title")
    assert root.attributes["lang"] == "en" and title.text.strip()
    assert any(each.attributes.get("name") == "viewport" for each in page.all("meta"))
    _check_outline(page)
    _check_tables(page)
    _check_one_file(page, text)
    return page


def _check_outline(page: Page) -> None:
    levels = [int(each.tag[1]) for each in page.all("h1", "h2", "h3")]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    assert [len(page.all(tag)) for tag in ("main", "header", "footer", "nav")] == [1] * 4
    ids = [each.attributes["id"] for each in page.elements if "id" in each.attributes]
    assert len(set(ids)) == len(ids)
    assert {str(each.attributes["href"])[1:] for each in page.all("a")} <= set(ids), "links lead somewhere"
    for each in page.all("section"):
        assert each.attributes["aria-labelledby"] in ids


def _check_tables(page: Page) -> None:
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(each.text.strip() for each in page.all("caption"))
    assert all(each.attributes.get("scope") in ("col", "row") for each in page.all("th"))
    scrolling = [each for each in page.all("div") if each.attributes.get("class") == "scroll"]
    assert len(scrolling) == len(page.all("table", "img")), "wide contents scroll by themselves"
    assert all(each.attributes["aria-label"] and each.attributes["tabindex"] == "0" for each in scrolling)


def _check_one_file(page: Page, text: str) -> None:
    """No request: every picture is embedded and can be decoded, and nothing else is loaded."""
    from PIL import Image

    assert not page.all("script", "iframe", "object", "embed", "video", "audio", "base", "form")
    for each in page.elements:
        for name, value in each.attributes.items():
            if name in ("src", "href", "srcset", "poster", "action", "data", "background"):
                assert str(value).startswith(("data:", "#")), f"<{each.tag} {name}={value}>"
            assert not name.startswith("on")
    assert not re.search(r"url\(|@import|@font-face", " ".join(each.text for each in page.all("style")))
    for each in page.all("img"):
        assert each.attributes["alt"], "a text for those who cannot see it"
        kind, _, data = str(each.attributes["src"]).removeprefix("data:image/").partition(";base64,")
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as picture:
            picture.load()
            assert picture.format == kind.upper()
            assert str(picture.size) == f"({each.attributes['width']}, {each.attributes['height']})"
