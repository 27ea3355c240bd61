"""The links, anchors, tags and loaded files of a built page."""

from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Page(HTMLParser):
    """One HTML file."""

    path: Path
    ids: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    tags: set[str] = field(default_factory=set)
    text: str = ""

    def __post_init__(self) -> None:
        super().__init__()
        self._in_article = self._in_code = 0
        self.feed(self.path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        actual = {name: value or "" for name, value in attrs}
        self.ids.update(actual[key] for key in ("id", "name") if key in actual)
        if tag == "a" and "href" in actual:
            self.links.append(actual["href"])
        if tag in ("script", "img", "iframe", "source") and "src" in actual:
            self.loads.append(actual["src"])
        if tag == "link" and actual.get("rel") in ("stylesheet", "preconnect", "icon"):
            self.loads.append(actual["href"])
        self._in_article += tag == "article"
        self._in_code += tag in ("code", "style", "script")
        if self._in_article:
            self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        self._in_article -= tag == "article"
        self._in_code -= tag in ("code", "style", "script")

    def handle_data(self, data: str) -> None:
        if self._in_article and not self._in_code:
            self.text += data


def pages_of(site: Path) -> dict[Path, Page]:
    """Return the pages of a site by their path."""
    return {path: Page(path) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}


def target_of(page: Page, link: str) -> tuple[Path, str] | None:
    """Return the file and the anchor of a link, or None for another site."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return None
    path = (page.path.parent / unquote(parts.path)).resolve() if parts.path else page.path.resolve()
    return (path / "index.html" if path.is_dir() else path), unquote(parts.fragment)
