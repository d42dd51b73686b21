"""The documentation agrees with the program. ``python tests/test_docs.py`` rewrites the help texts in docs/."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = (
    "inspect",
    "convert",
    "profile-experts",
    "prune",
    "merge",
    "quantize",
    "plan",
    "apply",
    "sample",
    "fid",
    "report",
    "compare",
    "bench",
)
_BLOCK = re.compile(r"## Options\n\n(?:@@HELP@@|```text\n.*?\n```)\n", re.S)


def help_of(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "ditmoe_cli", *arguments, "--help"],
        env={**os.environ, "COLUMNS": "100", "TERMINAL_WIDTH": "100"},
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    return done.stdout.strip()


def with_help(page: str, text: str) -> str:
    changed, count = _BLOCK.subn(lambda _: f"## Options\n\n```text\n{text}\n```\n", page)
    assert count == 1, "a page has one section '## Options' with the help text"
    return changed


@pytest.mark.parametrize("command", COMMANDS)
def test_each_page_holds_the_help_of_its_command(command: str) -> None:
    page = (ROOT / "docs" / f"{command}.md").read_text()
    assert page == with_help(page, help_of(command)), "run python tests/test_docs.py"


def test_every_command_has_a_page_and_stands_in_the_readme() -> None:
    listed = re.findall(r"^  ([a-z-]+)  ", help_of().partition("Commands:")[2], re.M)
    assert tuple(listed) == COMMANDS
    readme = (ROOT / "README.md").read_text()
    assert all(f"docs/{command}.md" in readme for command in COMMANDS)


def test_links_between_documents_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
            linked = (page.parent / target).resolve() if target else page
            assert linked.exists(), f"{page.name} links to {target}"
            if anchor:
                headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.M)
                assert anchor in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}, anchor


def test_no_page_holds_a_gap_to_be_filled() -> None:
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]
    assert not [page.name for page in pages if re.search("@@|TODO|FIXME", page.read_text())]


def test_ci_runs_the_test_command_of_the_readme() -> None:
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)
    assert blocks[1] in (ROOT / ".ci" / "run").read_text()


if __name__ == "__main__":
    for name in COMMANDS:
        file = ROOT / "docs" / f"{name}.md"
        file.write_text(with_help(file.read_text(), help_of(name)))
