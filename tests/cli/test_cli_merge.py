"""``ditmoe merge``: every method writes what it predicts, copies merge without loss, and what cannot be is said why."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from cases import slow_but
from cli_helpers import bytes_of, contents, here, tensor_shapes
from conftest import Pico, make_pico
from torch import Tensor

from ditmoe_cli.compression.methods import MERGES
from ditmoe_cli.model.config import expected_weights

pytestmark = pytest.mark.usefixtures("few_tokens")

SETTINGS = ("--images", 4, "--steps", 2)
FEW = ("--refit-tokens", 64)
MERGE = ("merge", "a.safetensors", "--profile", "p.safetensors")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, its profile and a fast one; not to be written to."""
    folder = tmp_path_factory.mktemp("merge")
    make_pico(sampler="rf", in_channels=1).save(folder / "a.safetensors")
    for name, options in {"p": (), "fast": ("--fast",)}.items():
        words = ("profile-experts", "a.safetensors", *SETTINGS, "--bins", 2, *options, "-o", f"{name}.safetensors")
        assert here(*words, cwd=folder).code == 0
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "folder"))


@pytest.mark.parametrize(("router", "refit"), [("map", FEW), ("slice", ("--no-refit",))])
@pytest.mark.parametrize("method", MERGES)
def test_every_method_writes_what_it_predicts_and_runs(
    method: str, refit: tuple[object, ...], router: str, folder: Path
) -> None:
    words = (*MERGE, "--groups", 2, "--method", method, "--router", router, *refit)
    before = contents(folder)
    predicted = here(*words, "--dry-run", cwd=folder)
    assert contents(folder) == before
    written = here(*words, cwd=folder)
    assert written.path.name.startswith("a.merge-groups2-") and written.path.parent == folder
    assert written.result["bytes"] == predicted.result["bytes"] == bytes_of(written.path)
    for groups in written.result["groups"]:
        assert len(groups) == 2
        assert sorted(e for group in groups for e in group) == [0, 1, 2, 3]
    assert written.result["method"] == method
    assert ("refit_error" in written.result) == (refit == FEW)
    described = here("inspect", written.path, cwd=folder).result
    assert described["history"] == ["merge"]
    assert described["router_rows"] == ([4, 4] if router == "map" else [2, 2])
    assert described["ghost_rows"] == [0, 0], "rows of merged experts still select something"
    assert described["config"]["num_experts"] == 2
    assert described["loads_upstream"] == (router == "slice")
    sampled = here("sample", written.path, "--images", 2, "--steps", 2, "-o", "s.safetensors", cwd=folder)
    assert sampled.code == 0, sampled.err
    if router == "slice":
        upstream = make_pico(sampler="rf", in_channels=1, experts=2)
        assert tensor_shapes(written.path) == dict(expected_weights(upstream.config))


@pytest.mark.parametrize(("groups", "experts"), [("1", 1), ("3", 3), ("4", 4), ("0.5", 2), ("0.51", 3), ("1.0", 4)])
def test_groups_are_a_ratio_or_a_count(groups: str, experts: int, folder: Path) -> None:
    written = here(*MERGE, "--groups", groups, *FEW, cwd=folder)
    assert [len(block) for block in written.result["groups"]] == [experts] * 2
    assert here("inspect", written.path, cwd=folder).result["config"]["num_experts"] == experts
    assert here("sample", written.path, "--images", 1, "--steps", 1, cwd=folder).code == 0


def twins(permuted: bool) -> Pico:
    """A model whose experts 2 and 3 are 0 and 1, maybe in another order of neurons, and whose rows are shorter.

    With this seed the longer rows are selected more often, so that they lead the groups of those methods that ask.
    """
    pico = make_pico(sampler="rf", in_channels=1, top_k=1, seed=4)
    changes: dict[str, Tensor | None] = {}
    generator = torch.Generator().manual_seed(4)
    for block in range(2):
        router = f"blocks.{block}.moe.gate.weight"
        changes[router] = torch.cat([pico.state[router][:2], 0.8 * pico.state[router][:2]])
        for e in (2, 3):
            order = torch.randperm(64, generator=generator) if permuted else torch.arange(64)
            for matrix in ("gate", "up", "down"):
                name = f"blocks.{block}.moe.experts.{{}}.{matrix}_proj.weight"
                twin = pico.state[name.format(e - 2)]
                changes[name.format(e)] = twin[:, order] if matrix == "down" else twin[order]
    return pico.with_state(**changes)


@pytest.mark.parametrize(
    ("method", "permuted"),
    slow_but(
        [("m-smoe", True), ("uncurl", True)],
        [("m-smoe", True), ("uncurl", True), ("sub-moe", True), ("hc-smoe", True), ("m-smoe", False)],
    ),
)
@pytest.mark.parametrize("refit", [FEW, ("--no-refit",)], ids=["refit", "no-refit"])
def test_copies_merge_without_loss(method: str, permuted: bool, refit: tuple[object, ...], tmp_path: Path) -> None:
    twins(permuted and method != "hc-smoe").save(tmp_path / "a.safetensors")
    profiling = ("profile-experts", "a.safetensors", *SETTINGS, "--bins", 2, "-o", "p.safetensors")
    assert here(*profiling, cwd=tmp_path).code == 0
    merged = here(*MERGE, "--groups", 2, "--method", method, *refit, cwd=tmp_path)
    assert [sorted(map(sorted, block)) for block in merged.result["groups"]] == [[[0, 2], [1, 3]]] * 2
    compared = here("compare", *SETTINGS, "--bins", 2, "--cfg", 1.5, cwd=tmp_path, stdin=merged.out)
    assert compared.result["prediction"]["relative_error"] < 1e-4
    assert compared.result["latents"]["relative_error"] < 1e-4
    assert merged.result["ratio"] < 0.8


def test_a_pipe_of_all_stages(folder: Path) -> None:
    outcome = here("profile-experts", "a.safetensors", *SETTINGS, "--bins", 2, cwd=folder)
    for words in (
        ("merge", "--groups", 0.5, "--method", "mergemoe", *FEW),
        ("quantize", "--uniform", "--bits", 4),
        ("inspect",),
    ):
        outcome = here(*words, cwd=folder, stdin=outcome.out)
    assert [step["command"] for step in outcome.envelope["history"]] == ["profile-experts", "merge", "quantize"]
    assert outcome.result["history"] == ["merge", "quantize"]
    assert outcome.result["formats"]["nf4"] > 0


def test_what_was_pruned_is_merged_and_what_was_merged_is_pruned(folder: Path) -> None:
    pruned = here("prune", "a.safetensors", "--keep", 3, "--profile", "p.safetensors", *FEW, cwd=folder)
    merged = here("merge", "--groups", 2, *FEW, "-o", "pm.safetensors", cwd=folder, stdin=pruned.out)
    assert any("ancestor" in line for line in merged.notes)
    assert here("inspect", "pm.safetensors", cwd=folder).result["ghost_rows"] == [1, 1]
    first = here(*MERGE, "--groups", 3, *FEW, cwd=folder)
    second = here("prune", "--keep", 2, *FEW, "-o", "mp.safetensors", cwd=folder, stdin=first.out)
    described = here("inspect", "mp.safetensors", cwd=folder).result
    assert described["history"] == ["merge", "prune"] and described["config"]["num_experts"] == 2
    for path in (merged.path, second.path):
        assert here("sample", path, "--images", 1, "--steps", 1, "-o", "s.safetensors", "--force", cwd=folder).code == 0


# what is refused, in one line and without a trace


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--groups", 5), 4, "--groups 5: block 0 has 4 experts"),
        (("--groups", 1, "--router", "slice"), 4, "left with 2 to 4"),
        (("--groups", 2, "--method", "k-means"), 2, "m-smoe, hc-smoe"),
        (("--groups", 2, "--router", "mass"), 2, "map or slice"),
        (("--groups", 2, "--refit-tokens", -1), 2, "--refit-tokens -1"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_bad_values(words: tuple[object, ...], code: int, said: str, options: tuple[str, ...], folder: Path) -> None:
    before = contents(folder)
    assert said in here(*MERGE, *words, *options, cwd=folder).error(code)
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "without --fast and with a --reservoir, or do without them: --no-refit"),
        (("--method", "hc-smoe", "--no-refit"), "--method hc-smoe"),
        (("--method", "sub-moe", "--no-refit"), "--method sub-moe"),
        (("--method", "mergemoe", "--no-refit"), "without --fast"),
    ],
    ids=str,
)
def test_a_fast_profile_where_more_is_needed(words: tuple[object, ...], said: str, folder: Path) -> None:
    before = contents(folder)
    given = ("merge", "a.safetensors", "--groups", 2, "--profile", "fast.safetensors")
    message = here(*given, *words, cwd=folder).error(3)
    assert said in message and "--fast" in message and "fast.safetensors" in message
    assert contents(folder) == before
    assert here(*given, "--no-refit", cwd=folder).code == 0, "rows and weights are enough for the default"


def test_what_cannot_be_merged_is_refused_before_it_is_profiled(folder: Path) -> None:
    merged = here(*MERGE, "--groups", 2, *FEW, "-o", "merged.safetensors", cwd=folder)
    packed = here("quantize", "a.safetensors", "--uniform", "--bits", 8, "-o", "q.safetensors", cwd=folder)
    narrow = make_pico(sampler="rf", in_channels=1, widths=((16, 24), (24, 24)))
    narrow.save(folder / "uneven.safetensors")
    before = contents(folder)
    for options in ((), ("--dry-run",)):
        for stdin, said in ((merged.out, "are merged already"), (packed.out, "is int8 already")):
            assert said in here("merge", "--groups", 1, *options, cwd=folder, stdin=stdin).error(3)
        assert "differ in width" in here("merge", "uneven.safetensors", "--groups", 1, *options, cwd=folder).error(3)
    assert contents(folder) == before
