"""The text of an HTML page of documentation, without what stands around it.

A manual's page is a third navigation: side bars, links to the next chapter, the search form. None
of that is text anyone wrote to be read, and it repeats on each page, so a model trained on it
learns the theme. `text_of_page` keeps the part that the page itself marks as its body, the line
breaks of code, and one blank line between paragraphs.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser

LEFT_OUT = {
    "script", "style", "nav", "head", "svg", "footer", "select", "button", "form", "noscript",
    "template", "iframe", "title", "math",
}  # fmt: skip
LEFT_OUT_ROLES = {"navigation", "search", "banner", "contentinfo"}
LEFT_OUT_CLASSES = {
    "sphinxsidebar", "related", "navheader", "navfooter", "toc", "headerlink", "sidebar", "footer",
    "breadcrumbs", "nav-wrapper", "tocset", "navsetleft", "navsetright", "navsettop",
    "navsetbottom", "toplang", "bottomlang", "docnav", "toctree-wrapper", "versionbox", "header",
    "nav-panel", "nosearch", "menu",
}  # fmt: skip
BODY_TAGS = {"main", "article"}
BODY_ROLES = {"main"}
# Tags that have no end, or whose end old pages leave out: what follows them is not inside them.
NEVER_CLOSED = {
    "area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "wbr",
    "p", "li", "tr", "td", "th", "dt", "dd", "body",
}  # fmt: skip
NEW_PARAGRAPH = {
    "p", "div", "section", "article", "main", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "dl",
    "pre", "table", "blockquote", "body", "dt", "figure", "hr",
}  # fmt: skip
NEW_LINE = {"br", "li", "tr", "dd"}
CELLS = {"td", "th"}


def text_of_page(page: str) -> str:
    """The readable text of an HTML page.

    Args:
        page: the page's source; tags need not be closed, as in manuals of the nineties.

    Returns:
        The text of the page's body as it marks it (``<main>``, ``<article>``, ``role="main"``), of
        the whole page if it marks none. Paragraphs are separated by one blank line.
    """
    reader = _Reader()
    reader.feed(page)
    reader.close()
    marked = tidy("".join(reader.marked))
    return marked if marked else tidy("".join(reader.everything))


def tidy(text: str) -> str:
    """Text with no space at the end of a line and at most one blank line in a row."""
    text = re.sub(r"[ \t\u00a0\u00b6]+\n", "\n", text.replace("\r\n", "\n") + "\n")
    return re.sub(r"\n{3,}", "\n\n", text).strip()


class _Reader(HTMLParser):
    """Collects the text of a page, all of it and that inside the marked body."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.everything: list[str] = []
        self.marked: list[str] = []
        self.skipped = _Span()
        self.body = _Span()
        self.preformatted = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.skipped.nested(tag)
        self.body.nested(tag)
        if self.skipped.tag is not None:
            return
        values = dict(attrs)
        if tag not in NEVER_CLOSED and _left_out(tag, values):
            self.skipped.enter(tag)
            return
        if self.body.tag is None and (tag in BODY_TAGS or values.get("role") in BODY_ROLES):
            self.body.enter(tag)
        self._break(tag)
        if tag == "pre":
            self.preformatted += 1
        elif tag == "li":
            self._write("- ")

    def handle_endtag(self, tag: str) -> None:
        was_skipped = self.skipped.tag is not None
        self.skipped.leave(tag)
        if not was_skipped:
            if tag not in NEW_LINE:
                self._break(tag)
            if tag == "pre":
                self.preformatted = max(0, self.preformatted - 1)
        self.body.leave(tag)

    def handle_data(self, data: str) -> None:
        if self.skipped.tag is None:
            self._write(data if self.preformatted else re.sub(r"\s+", " ", data))

    def _break(self, tag: str) -> None:
        if tag in NEW_PARAGRAPH:
            self._write("\n\n")
        elif tag in NEW_LINE:
            self._write("\n")
        elif tag in CELLS:
            self._write(" ")

    def _write(self, text: str) -> None:
        # The space before a line's first word comes from the source's indentation.
        if text == " " and self.everything and self.everything[-1].endswith(("\n", " ")):
            return
        self.everything.append(text)
        if self.body.tag is not None:
            self.marked.append(text)


class _Span:
    """What lies between a tag and its end, however many of the same name are nested in it."""

    def __init__(self) -> None:
        self.tag: str | None = None
        self.depth = 0

    def enter(self, tag: str) -> None:
        self.tag, self.depth = tag, 1

    def nested(self, tag: str) -> None:
        if tag == self.tag:
            self.depth += 1

    def leave(self, tag: str) -> None:
        if tag == self.tag:
            self.depth -= 1
            if not self.depth:
                self.tag = None


def _left_out(tag: str, values: dict[str, str | None]) -> bool:
    classes = (values.get("class") or "").split()
    return (
        tag in LEFT_OUT
        or values.get("role") in LEFT_OUT_ROLES
        or not LEFT_OUT_CLASSES.isdisjoint(classes)
    )


__all__ = ["text_of_page", "tidy"]
