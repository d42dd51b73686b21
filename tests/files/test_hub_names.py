"""Names on the hub are taken apart, and refused where they could name something else."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.hub_names import PUBLISHED, HubName, is_hub_name, parse_hub_name, told_name

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WORDS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,8}", fullmatch=True)


@given(st.lists(WORDS, min_size=2, max_size=5), st.none() | WORDS | st.just("refs/pr/1") | st.just(COMMIT))
def test_parts_come_out_as_they_went_in(parts: list[str], revision: str | None) -> None:
    name = parse_hub_name("hf:" + "/".join(parts) + (f"@{revision}" if revision else ""))
    assert (name.repository, name.path) == ("/".join(parts[:2]), "/".join(parts[2:]))
    assert name.revision == (revision or "main")
    assert name.commit == (COMMIT if revision == COMMIT else None)


@pytest.mark.parametrize(
    "text", ["hf:a/b/c.pt", "hf://a/b/c.pt", "hf:/a/b/c.pt", "hf:a/b/c.pt/", "hf:a//b/c.pt", "hf:a/b/c.pt@main"]
)
def test_slashes_more_or_less_change_nothing(text: str) -> None:
    assert parse_hub_name(text) == HubName(text, "a/b", "c.pt")


def test_a_name_may_hold_the_sign_of_revisions_where_one_follows() -> None:
    assert parse_hub_name("hf:a/b/c@d.pt@main").path == "c@d.pt"


@pytest.mark.parametrize(
    "text",
    [
        *("hf:", "hf:@main", "hf:a/b@", "hf:a/b/c@", "hf:a/../c", "hf:a/b/../c.pt", "hf:a/b/./c.pt", "hf:../b/c"),
        *("hf:a/b/c@../../x", "hf:a/b/c@/etc/passwd", "hf:a/b/c@a//../b", "hf:a b/c/d", "hf:a/b?c/d", "hf:~/b/c"),
    ],
)
def test_other_names_are_refused_with_the_form(text: str) -> None:
    with pytest.raises(BadInputError, match="hf:OWNER/REPO/FILE@REVISION"):
        parse_hub_name(text)


@pytest.mark.parametrize("short", PUBLISHED)
def test_published_files_have_short_names(short: str) -> None:
    name = parse_hub_name(f"hf:{short}")
    assert (name.repository, name.path, name.revision) == ("feizhengcong/DiT-MoE", PUBLISHED[short].path, "main")
    assert parse_hub_name(f"hf:{short.upper()}@{COMMIT}").commit == COMMIT
    size = short.removeprefix("dit-moe-")
    assert f"_{size}_" in name.path and PUBLISHED[short].model.startswith(f"DiT-MoE-{size.upper()}/2-")


def test_an_unknown_short_name_is_told_the_known_ones() -> None:
    with pytest.raises(BadInputError, match="hf:dit-moe-s, hf:dit-moe-b, hf:dit-moe-xl, hf:dit-moe-g"):
        parse_hub_name("hf:dit-moe-l")


def test_only_the_prefix_makes_a_name() -> None:
    assert is_hub_name("hf:a/b") and not is_hub_name("./hf:a/b") and not is_hub_name("hf")


def test_a_repository_in_the_cache_is_called_by_its_name() -> None:
    snapshot = Path(f"/cache/models--owner--Some-Repo/snapshots/{COMMIT}")
    assert told_name(snapshot) == "Some-Repo"
    assert told_name(snapshot / "x.pt") == "x.pt" and told_name(snapshot / "transformer") == "transformer"
    assert told_name(Path("snapshots/x")) == "x" and told_name(Path("/models--a--b/snapshots/mine")) == "mine"
