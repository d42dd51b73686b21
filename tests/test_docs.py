"""The documentation agrees with the program. ``python tests/test_docs.py`` rewrites the help texts in docs/."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = (
    "inspect",
    "convert",
    "export",
    "profile-experts",
    "prune",
    "merge",
    "quantize",
    "compress",
    "heal",
    "distill",
    "plan",
    "apply",
    "run",
    "schedule",
    "sample",
    "fid",
    "report",
    "compare",
    "bench",
)
PACKAGE = ROOT / "ditmoe_cli"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
_OF_OTHERS = {  # not ours, or in folders that we write
    *("vae/", "transformer/", "zero_to_fp32.py", "train.py", "sample.py", "upcycle.py"),
    "transformer/modeling_ditmoe.py",
}
_PATH = re.compile(r"`([\w./-]+(?:\.py|/))`|\b((?:ditmoe_cli|tests|examples)/[\w./-]*\w)")
_MODULE = re.compile(r"\bditmoe_cli(?:\.[a-z_]+)+")
_BRANCH = re.compile(r"^( +)([\w./]+(?:, [\w./]+)*)(?:  +.*)?$")
# commands of two words, on the page of the first
KINDS = (("report", "sensitivity"),)


_HELPS = """
import contextlib, io, json, sys
from ditmoe_cli.cli.app import run
for arguments in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()) as text:
        run([*arguments, "--help"])
    print(json.dumps(text.getvalue().strip()))
"""


@cache
def helps() -> dict[tuple[str, ...], str]:
    """The help of the program, of each command and of each kind of one, printed by one process."""
    asked: list[tuple[str, ...]] = [(), *((name,) for name in COMMANDS), *KINDS]
    done = subprocess.run(
        [sys.executable, "-c", _HELPS],
        input=json.dumps(asked),
        env={**os.environ, "COLUMNS": "100", "TERMINAL_WIDTH": "100"},
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    return dict(zip(asked, map(json.loads, done.stdout.splitlines()), strict=True))


def help_of(*arguments: str) -> str:
    return helps()[arguments]


def with_help(page: str, text: str, heading: str = "Options") -> str:
    block = re.compile(rf"## {heading}\n\n```text\n.*?\n```\n", re.S)
    changed, count = block.subn(lambda _: f"## {heading}\n\n```text\n{text}\n```\n", page)
    assert count == 1, f"a page has one section '## {heading}' with the help text"
    return changed


def heading_of(kind: str) -> str:
    """The heading of the help text of a command's kind, such as that of ``report sensitivity``."""
    return f"Options of {kind}"


@pytest.mark.parametrize("command", COMMANDS)
def test_each_page_holds_the_help_of_its_command(command: str) -> None:
    page = (ROOT / "docs" / f"{command}.md").read_text()
    assert page == with_help(page, help_of(command)), "run python tests/test_docs.py"


@pytest.mark.parametrize(("command", "kind"), KINDS)
def test_the_page_of_a_command_holds_the_help_of_its_kinds(command: str, kind: str) -> None:
    page = (ROOT / "docs" / f"{command}.md").read_text()
    assert page == with_help(page, help_of(command, kind), heading_of(kind)), "run python tests/test_docs.py"


def test_every_command_has_a_page_and_stands_in_the_readme() -> None:
    listed = re.findall(r"^  ([a-z-]+)  ", help_of().partition("Commands:")[2], re.M)
    assert tuple(listed) == COMMANDS
    readme = (ROOT / "README.md").read_text()
    assert all(f"docs/{command}.md" in readme for command in COMMANDS)


def test_links_between_documents_lead_somewhere() -> None:
    for page in PAGES:
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
            linked = (page.parent / target).resolve() if target else page
            assert linked.exists(), f"{page.name} links to {target}"
            if anchor:
                headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.M)
                assert anchor in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}, anchor


def exists(path: str) -> bool:
    """Whether a path is there: below the repository, the package or docs; a single name may stand in any folder."""
    if any((base / path).exists() for base in (ROOT, PACKAGE, ROOT / "docs")):
        return True
    return "/" not in path.rstrip("/") and any(
        any((ROOT / folder).rglob(path)) for folder in ("ditmoe_cli", "tests", "examples")
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_modules_that_a_page_names_exist(page: Path) -> None:
    """A name in capitals, as NAME.py, stands for a file to be made."""
    text = page.read_text()
    paths = {one or other for one, other in _PATH.findall(text)} - _OF_OTHERS
    missing = {path for path in paths if not exists(path) and "NAME" not in path and not path.startswith("/")}
    modules = {match[0].replace(".", "/") for match in _MODULE.finditer(text)}
    missing |= {m for m in modules if not any((ROOT / f"{part}").exists() for part in (m, f"{m}.py", up(m)))}
    assert not missing


def up(module: str) -> str:
    """The file of the module that a dotted name stands in."""
    return f"{module.rpartition('/')[0]}.py"


def test_names_in_backquotes_are_in_the_code() -> None:
    """Of classes, functions, tables, fields of results: a page keeps up with what it names."""
    files = [file for folder in ("ditmoe_cli", "tests", "examples") for file in (ROOT / folder).rglob("*.py")]
    words = {word for file in (*files, ROOT / "pyproject.toml") for word in re.findall(r"\w+", file.read_text())}
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
        assert not set(re.findall(r"`([A-Za-z_]\w+)(?:\([^`]*\))?`", text)) - words, page.name


def drawn_tree() -> list[str]:
    """The paths of the tree in design.md; those of folders end in a slash."""
    block = (ROOT / "docs" / "design.md").read_text().partition("    ditmoe_cli/\n")[2].partition("\n\n")[0]
    paths: list[str] = []
    folders: list[tuple[int, str]] = []
    for line in block.splitlines():
        branch = _BRANCH.match(line)
        assert branch, f"not a line of the tree: {line!r}"
        indent = len(branch[1])
        folders = [(depth, name) for depth, name in folders if depth < indent]
        above = "".join(name for _, name in folders)
        paths += [above + name for name in branch[2].split(", ")]
        folders.append((indent, branch[2]))
    return paths


def test_the_tree_in_design_is_the_package() -> None:
    drawn = drawn_tree()
    assert not [path for path in drawn if not (PACKAGE / path).exists()]
    folders = {f"{path.parent.relative_to(PACKAGE)}/" for path in PACKAGE.rglob("*.py")} - {"./"}
    assert not folders - set(drawn), "enter new folders into the tree"


def test_whoever_comes_next_finds_the_tour() -> None:
    assert "docs/contributing.md" in (ROOT / "README.md").read_text()
    assert "contributing.md" in (ROOT / "docs" / "design.md").read_text()


def test_no_page_holds_a_gap_to_be_filled() -> None:
    assert not [page.name for page in PAGES if re.search("@@|TODO|FIXME", page.read_text())]


def test_ci_runs_the_test_command_of_the_readme() -> None:
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)
    assert blocks[1] in (ROOT / ".ci" / "run").read_text()


if __name__ == "__main__":
    for name in COMMANDS:
        file = ROOT / "docs" / f"{name}.md"
        file.write_text(with_help(file.read_text(), help_of(name)))
    for name, kind in KINDS:
        file = ROOT / "docs" / f"{name}.md"
        file.write_text(with_help(file.read_text(), help_of(name, kind), heading_of(kind)))
