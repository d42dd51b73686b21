"""What ``inspect`` says of loading in upstream's code, and that it is so: names and shapes are upstream's own."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_helpers import here
from conftest import make_pico

from ditmoe_cli.files.header import read_safetensors_header

pytestmark = pytest.mark.usefixtures("few_tokens")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("upstream")
    make_pico(sampler="rf", in_channels=1).save(folder / "a.safetensors")
    profiling = ("profile-experts", "a.safetensors", "--images", 8, "--steps", 2, "--bins", 2, "-o", "p.safetensors")
    assert here(*profiling, cwd=folder).code == 0
    return folder


@pytest.mark.parametrize(
    ("words", "loads"),
    [
        (("prune", "--keep", 2, "--router", "slice"), True),
        (("merge", "--groups", 2, "--router", "slice"), True),
        (("prune", "--keep", 2), False),
        *(
            pytest.param(words, loads, marks=pytest.mark.slow)
            for words, loads in (
                (("prune", "--keep", 2, "--router", "slice", "--scale"), True),
                (("prune", "--keep", 2, "--no-refit"), False),
                (("merge", "--groups", 2), False),
            )
        ),
    ],
)
def test_sliced_files_hold_what_upstream_has_words_for(words: tuple[object, ...], loads: bool, folder: Path) -> None:
    command, *options = words
    made = here(
        command, "a.safetensors", *options, "--profile", "p.safetensors", "-o", "m.safetensors", "--force", cwd=folder
    )
    assert made.code == 0, made.err
    assert here("inspect", "m.safetensors", cwd=folder).result["loads_upstream"] is loads
    original, found = (read_safetensors_header(folder / name).tensors for name in ("a.safetensors", "m.safetensors"))
    renumbered = {name for name in found if name not in original}
    assert (not renumbered) is loads


def test_quantised_files_do_not_load_there(folder: Path) -> None:
    here("quantize", "a.safetensors", "--uniform", "--bits", 4, "-o", "q.safetensors", cwd=folder)
    assert here("inspect", "a.safetensors", cwd=folder).result["loads_upstream"] is True
    described = here("inspect", "q.safetensors", cwd=folder).result
    assert described["loads_upstream"] is False
    assert described["upstream_obstacle"].endswith(
        "weights are quantised or differences, which export --to upstream writes whole"
    )


def test_what_keeps_upstream_from_loading_a_file_is_said(folder: Path) -> None:
    make_pico(expert_of=((0, 1, -1, 2), (0, 1, 2, 3)), widths=((64,) * 3, (64,) * 4)).save(folder / "g.safetensors")
    make_pico().with_state(pos_embed=None).save(folder / "n.safetensors")
    said = here("inspect", "g.safetensors", "--text", cwd=folder).out
    assert "no: block 0 has a router with rows that select no expert" in said
    assert "--router slice instead" in said
    said = here("inspect", "n.safetensors", "--text", cwd=folder).out
    assert "no: pos_embed is absent, which export --to upstream rebuilds" in said
