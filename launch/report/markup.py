"""HTML elements whose text is escaped unless it is HTML already."""

from collections.abc import Sequence
from html import escape


class Html(str):
    """Text that is HTML, to be written as it is."""

    __slots__ = ()


def element(tag: str, *content: str, **attributes: object) -> Html:
    """<tag attributes>content</tag>; a trailing underscore of an attribute (class_) is dropped.

    Content and attributes are escaped, except for content that is Html.
    """
    names = {name.rstrip("_"): escape(str(value)) for name, value in attributes.items() if value}
    opening = "".join(f' {name}="{value}"' for name, value in names.items())
    inner = join(content)
    return Html(f"<{tag}{opening}>{inner}" + ("" if tag == "img" else f"</{tag}>"))


def join(parts: Sequence[str]) -> Html:
    """Parts one after the other; those that are not Html are escaped."""
    return Html("".join(part if isinstance(part, Html) else escape(part) for part in parts))


def table(header: Sequence[str], rows: Sequence[Sequence[str]], class_: str = "") -> Html:
    """Rows of text under a header, which may be empty; the first column names the rows."""
    head = [element("th", cell, scope="col") for cell in header]
    body = []
    for name, *values in rows:
        cells = [element("td", value) for value in values]
        body.append(element("tr", element("th", name, scope="row"), *cells))
    parts = [element("thead", element("tr", *head))] if head else []
    whole = element("table", *parts, element("tbody", *body), class_=class_)
    return element("div", whole, class_="scroll")
