"""What is written for readers: the books, their blocks, links and headings."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
GUIDES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
REFERENCE = sorted(f"docs/api/{path.name}" for path in (ROOT / "docs" / "api").glob("*.md"))
BOOKS = [
    *GUIDES,
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "bench/NOTES.md",
    "csrc/README.md",
    "tests/data/README.md",
    "tests/ptx/README.md",
]


def text_of(book):
    return (ROOT / book).read_text()


def blocks(book):
    """Language and text of every block of code; one may be indented, as part of a list."""
    found = re.findall(r"^( *)```(\S*)\n(.*?)^\1```$", text_of(book), re.DOTALL | re.MULTILINE)
    return [(language, code) for _, language, code in found]


def prose(book):
    """A book without its blocks."""
    return re.sub(r"^( *)```.*?^\1```$", "", text_of(book), flags=re.DOTALL | re.MULTILINE)


def quoted(book):
    """What stands between backticks in the prose, on one line each."""
    return [" ".join(each.split()) for each in re.findall(r"`([^`]+)`", prose(book))]


def links(book):
    """Where the links of the prose lead, but for other sites."""
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose(book)))
    return [target for target in targets if not target.startswith(("https://", "http://"))]


def anchors(book):
    """What code hosts and Sphinx make of the headings of a book."""
    headings = re.findall(r"^#+ (.*)$", prose(book), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}
