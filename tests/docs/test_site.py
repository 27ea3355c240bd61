"""Links of the built site are valid, no text is parsed as HTML tags, and lines of code fit."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docs.blocks import PAGES, ROOT, blocks_of
from tests.docs.html_pages import Page, pages_of, target_of

WIDEST = 100  # characters of a line of code that fit between both sidebars at 1,400 pixels

KNOWN_TAGS = set(
    re.findall(
        r"\w+",
        """
        a abbr article b blockquote br button code colgroup col dd details div dl dt em figure form h1 h2 h3 h4 h5 h6 hr
        img input label li nav ol p pre small span strong sub summary sup table tbody td th thead tr ul
        math mrow mi mo mn msub msup msubsup munder mover munderover mfrac mtext mstyle mspace msqrt mtable mtr mtd
        svg g path rect circle ellipse line polyline polygon text tspan marker defs style title
        """,
    )
)


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return pages_of(site)


@pytest.mark.slow
def test_every_link_leads_to_a_page_and_an_anchor(pages: dict[Path, Page]) -> None:
    dead = []
    resolved = {path.resolve(): page for path, page in pages.items()}
    for page in pages.values():
        for link in page.links:
            target = target_of(page, link)
            if target is None:
                continue
            path, anchor = target
            if not path.exists() or (anchor and path in resolved and anchor not in resolved[path].ids):
                dead.append(f"{page.path}: {link}")
    assert dead == []


@pytest.mark.slow
def test_text_is_not_parsed_as_tags(pages: dict[Path, Page]) -> None:
    unknown = {str(path): actual for path, page in pages.items() if (actual := page.tags - KNOWN_TAGS)}
    assert unknown == {}


@pytest.mark.slow
def test_every_formula_is_typeset(pages: dict[Path, Page]) -> None:
    assert [path for path, page in pages.items() if re.search(r"\\[(\[]|\$\S|arithmatex|<!--", page.text)] == []
    assert any("math" in page.tags for page in pages.values())


@pytest.mark.slow
def test_pages_load_nothing_from_another_host(pages: dict[Path, Page]) -> None:
    loaded = {load for page in pages.values() for load in page.loads}
    assert [load for load in loaded if re.match(r"(\w+:)?//", load)] == []


def test_lines_of_code_fit() -> None:
    wide = [
        f"{block.where}: {len(line)} characters"
        for page in PAGES
        if page.name != "CONTRIBUTING.md"  # not a page of the site
        for block in blocks_of(page)
        for line in block.text.splitlines()
        if len(line) > WIDEST
    ]
    assert wide == []


def test_the_index_has_the_order_of_the_navigation() -> None:
    listed = list(_leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    linked = re.findall(r"^\| \[.*\]\(([\w/-]+\.md)\)", (ROOT / "docs/index.md").read_text(), re.MULTILINE)
    assert linked == [page for page in listed if page in linked]
    rest = [page for page in listed if page not in linked and page != "index.md"]
    assert [page for page in rest if not page.startswith(("reference/api/", "decisions/"))] == []


def _leaves(entry: Any) -> Any:
    if isinstance(entry, str):
        yield entry
    else:
        for inner in entry.values() if isinstance(entry, dict) else entry:
            yield from _leaves(inner)


def test_links_of_files_outside_the_site() -> None:
    dead = []
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        text = (ROOT / name).read_text()
        for link in re.findall(r"\]\((?!\w+:|#)([^)\s]+)\)", text):
            path, _, anchor = link.partition("#")
            target = ROOT / path
            if not target.exists() or (anchor and anchor not in _anchors(target)):
                dead.append(f"{name}: {link}")
    assert dead == []


def _anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", head).strip().lower()) for head in heads}


def test_pictures_equal_those_of_their_script() -> None:
    names: dict[str, Any] = {"__name__": "pictures", "__file__": str(ROOT / "docs/tools/pictures.py")}
    exec(compile((ROOT / "docs/tools/pictures.py").read_text(), "pictures.py", "exec"), names)
    for name, draw in names["PICTURES"].items():
        assert (ROOT / f"docs/pictures/{name}.svg").read_text() == draw(), f"{name}: run docs/tools/pictures.py"
