"""Check that every link within a built site leads somewhere: to a file, and to an anchor in it if it names one.

Usage: ``python ci/check_pages.py FOLDER``; prints one line per link that does not, and exits with 1 if there is one.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the dead links of the site in the folder that is named; return 1 if there are any, else 0."""
    (folder,) = sys.argv[1:] if arguments is None else arguments
    pages = {path.resolve(): _Page.of(path) for path in sorted(Path(folder).rglob("*.html"))}
    found = [line for path in pages for line in dead_links(path, pages)]
    if not pages:
        found = [f"{folder}: holds no page, so nothing was checked."]
    for line in found:
        print(line)
    if not found:
        n_links = sum(len(page.links) for page in pages.values())
        print(f"pages: {n_links} links of {len(pages)} pages lead somewhere, or out of the site.")
    return int(bool(found))


def dead_links(path: Path, pages: dict[Path, _Page]) -> list[str]:
    """Return one line for each link of a page to a file that is not there, or an anchor that is not in it."""
    found = []
    for link in pages[path].links:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        if not target.exists():
            found.append(f"{path.name}: {link} leads to no file.")
        elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
            found.append(f"{path.name}: {link} names an anchor that is not there.")
    return found


class _Page(HTMLParser):
    """The links of a page, and what can be linked to."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()

    @classmethod
    def of(cls, path: Path) -> _Page:
        page = cls()
        page.feed(path.read_text(encoding="utf-8"))
        return page

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.anchors |= {value for name in ("id", "name") if (value := values.get(name))}
        # A theme's empty link is a button.
        self.links += [value for name in ("href", "src") if (value := values.get(name)) and value != "#"]


if __name__ == "__main__":
    sys.exit(main())
