"""Elements of HTML and SVG. Text and attributes are escaped when an element is created."""

from html import escape


class Html(str):
    """Markup, which is not escaped again."""

    __slots__ = ()


Content = str | Html | None


def el(name: str, *children: Content, **attributes: object) -> Html:
    """Return an element.

    Args:
        name: the name of the element.
        children: markup as `Html`. Other text is escaped, and None is left out.
        attributes: the attributes by name. `class_` is `class`, and other underscores become hyphens. None is left out.
    """
    attribute_text = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{attribute_text}>{joined(*children)}</{name}>")


def joined(*children: Content) -> Html:
    """Return several children without an element around them."""
    return Html("".join(child if isinstance(child, Html) else escape(child) for child in children if child is not None))


def table(head: list[str], rows: list[list[Content]], *, first: int = 1, marked: int | None = None) -> Html:
    """Return a table in a box that scrolls horizontally if it is too wide.

    Args:
        head: the titles of the columns.
        rows: the cells.
        first: the number of columns of text; the others are numbers.
        marked: the index of a row to emphasize.
    """

    def cells(name: str, values: list[Content]) -> Html:
        return joined(*(el(name, value, class_=None if i < first else "number") for i, value in enumerate(values)))

    body = [el("tr", cells("td", row), class_="marked" if i == marked else None) for i, row in enumerate(rows)]
    top = el("thead", el("tr", cells("th", list(head)))) if head else None
    return el("div", el("table", top, el("tbody", *body)), class_="wide")
