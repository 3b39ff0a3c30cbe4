"""Links within the repository lead somewhere, also to a heading of a page."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("hf_sdp", "examples", "configs", "tests")
PAGES = [ROOT / "README.md", *(page for name in FOLDERS for page in sorted((ROOT / name).rglob("*.md")))]
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)")


def headings(page: Path) -> set[str]:
    """As GitHub names them in links: lower case, hyphens for spaces, no punctuation."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    names = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", name.lower()).replace(" ", "-") for name in names}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page):
    broken = []
    for target, heading in LINK.findall(page.read_text()):
        file = (page.parent / target).resolve() if target else page
        if not file.exists() or (heading and heading not in headings(file)):
            broken.append(f"{target}#{heading}")
    assert broken == []
