"""The documentation: links and paths exist, generated parts are current, words are plain."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
GENERATED = {"job_file.md", "cli.md"}
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        ROOT / "jobs" / "README.md",
        ROOT / "cluster" / "README.md",
        *DOCS.glob("*.md"),
    ]
)
FENCE = re.compile(r"^ *```.*?^ *```", re.DOTALL | re.MULTILINE)
BLOCK = re.compile(r"<!-- (generated: \w+|matrix: begin) -->.*?<!-- (matrix: )?end -->", re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
PATH = re.compile(r"`((?:raytrain_adv|tests|jobs|cluster|docs)/[\w./-]+)`")
ARCHAIC = re.compile(
    r"\banew\b|in the place of|\bbeside\b|\bgoes? on\b|\bholds? \w+ to\b|none where|of its own\b"
    r"|tried out|asked for|\bsays?\b|\btold\b|in the house form",
    re.IGNORECASE,
)
README_LINES = 200


def prose(page: Path) -> str:
    """Return what a person has written in a page: no code, no generated blocks."""
    return FENCE.sub("", BLOCK.sub("", page.read_text()))


def slug(title: str) -> str:
    """Return the anchor that both Markdown renderers give to a heading, for plain headings."""
    return re.sub(r"[^\w\- ]", "", title.replace("`", "").lower()).strip().replace(" ", "-")


def anchors(page: Path) -> set[str]:
    text = FENCE.sub("", page.read_text())
    return {slug(title) for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


def links(page: Path) -> Iterator[str]:
    for link in LINK.findall(FENCE.sub("", page.read_text())):
        if not link.startswith(("http://", "https://")):
            yield link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{link} leads nowhere"
        included = re.fullmatch(r'--8<-- "(.+)"\s*', target.read_text()) if anchor else None
        target = ROOT / included[1] if included else target
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_in_prose_exist(page: Path) -> None:
    for path in PATH.findall(prose(page)):
        assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_tests_that_pages_name_exist() -> None:
    """A claim of the threat model is one because its test would fail if it were not so."""
    named = {
        found
        for page in (ROOT / "docs").glob("*.md")
        for found in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page.read_text())
    }
    assert len(named) > 15
    for file, name in sorted(named):
        assert f"\ndef {name}(" in (ROOT / file).read_text(), f"{file}::{name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_words_are_plain(page: Path) -> None:
    if page.name not in GENERATED:
        found = [match[0] for match in ARCHAIC.finditer(prose(page))]
        assert not found, f"{page.name}: {found}"


def test_the_readme_is_one_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


def test_every_page_is_in_the_navigation() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    named = set(re.findall(r"[\w/]+\.md", str(config["nav"])))
    assert named == {page.name for page in DOCS.glob("*.md")}


def test_the_site_loads_nothing_from_other_hosts() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert config["theme"]["font"] is False
    assert config["plugins"] == ["search"], "privacy and offline fetch from other hosts"
    assert "mermaid" not in str(config["markdown_extensions"])


def test_every_job_is_in_the_index_of_examples() -> None:
    index = (ROOT / "jobs" / "README.md").read_text()
    jobs = [*(ROOT / "jobs").glob("*.yaml"), *(ROOT / "jobs" / "sweeps").glob("*.yaml")]
    for job in jobs:
        assert f"]({job.relative_to(ROOT / 'jobs')})" in index, job.name


def test_a_block_keeps_the_text_between_it_and_the_next() -> None:
    """It did not once: an empty block reached to the end of the next."""
    source = (DOCS / "generate.py").read_text()
    (pattern,) = re.findall(r'^BLOCK = re.compile\(r"(.+)", re.DOTALL\)$', source, re.MULTILINE)
    page = "<!-- generated: a -->\n<!-- end -->\nkept\n<!-- generated: b -->\nold\n<!-- end -->"
    new = re.sub(pattern, r"\1new\n\3", page, flags=re.DOTALL)
    assert new.count("new") == 2 and "kept" in new and "old" not in new
