"""Prints the English text of the Debian Administrator's Handbook (Debian package debian-handbook) in reading order.

The package's HTML pages are chained by <link rel="next">; of each page the paragraphs are kept, one a line, and titles,
tables of contents, listings and navigation are left out. Only the standard library is used.

    python handbook_text.py [FOLDER] > handbook.txt
"""

import sys
from html.parser import HTMLParser
from pathlib import Path

FOLDER = Path("/usr/share/doc/debian-handbook/html/en-US")
FIRST = "index.html"
VOID = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta"}


class Page(HTMLParser):
    """Collects ``paragraphs`` and the name of the ``next`` page."""

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = []
        self.next: str | None = None
        self._text: list[str] = []
        self._open: list[str] = []  # what each open element is: "para", "skip" or ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        named = dict(attributes)
        if tag == "link" and named.get("rel") == "next":
            self.next = named.get("href")
        if tag in VOID:
            return
        kind = ""
        if tag == "pre":
            kind = "skip"
        elif tag == "div" and named.get("class") == "para":
            kind = "para"
        if kind:
            self._flush()  # a paragraph ends where another one, or a listing, begins inside it
        self._open.append(kind)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag in VOID:
            self.handle_starttag(tag, attributes)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID and self._open and self._open.pop():
            self._flush()

    def handle_data(self, data: str) -> None:
        if "para" in self._open and "skip" not in self._open:
            self._text.append(data)

    def _flush(self) -> None:
        text = " ".join("".join(self._text).split())
        self._text.clear()
        if text:
            self.paragraphs.append(text)


def pages(folder: Path) -> list[Page]:
    """All pages of the book, in reading order."""
    read, name, seen = [], FIRST, set()
    while name and name not in seen:
        seen.add(name)
        page = Page()
        page.feed((folder / name).read_text("utf-8"))
        page.close()
        read.append(page)
        name = page.next or ""
    return read


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    if not (folder / FIRST).is_file():
        sys.exit(
            f"{folder} holds no {FIRST}: install the Debian package debian-handbook, or name its folder of HTML pages"
        )
    for page in pages(folder):
        for paragraph in page.paragraphs:
            print(paragraph)


if __name__ == "__main__":
    main()
