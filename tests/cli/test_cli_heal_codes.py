"""Healing of quantised checkpoints: scales and codes are trained, and the file keeps its layout."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_helpers import here, outputs
from conftest import Pico, make_pico
from packed import packed_pico
from stored_parts import wholly_packed

from ditmoe_cli.compression.heal import healing_memory
from ditmoe_cli.model.checkpoint import open_checkpoint

pytestmark = pytest.mark.usefixtures("few_tokens")

HEAL = ("--original", "a.safetensors", "--profile", "p.safetensors", "--batch", 16)


def pico() -> Pico:
    return make_pico(sampler="rf", in_channels=1, input_size=4, experts=3, widths=((32, 48, 32),) * 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An original, its profile, and three students of it, all of whose matrices are quantised in two of them."""
    folder = tmp_path_factory.mktemp("codes")
    pico().save(folder / "a.safetensors")
    profiling = ("profile-experts", "a.safetensors", "--images", 16, "--steps", 2, "-o", "p.safetensors")
    assert here(*profiling, cwd=folder).code == 0
    wholly_packed(pico(), "nf4").save(folder / "nf4.safetensors")
    wholly_packed(pico(), "int3-g32").save(folder / "int3.safetensors")
    packed_pico(packed_pico(pico(), "int2-g32", "experts.1."), "ternary-g32", "experts.2.").save(
        folder / "mix.safetensors"
    )
    return folder


@pytest.mark.parametrize(
    ("name", "words", "moved"),
    [
        ("nf4", ("--scope", "model", "--steps", 16), "absmax"),
        pytest.param(
            "int3", ("--scope", "block", "--train", "attention", "--steps", 16), "weight_scale", marks=pytest.mark.slow
        ),
        (
            "mix",
            ("--scope", "model", "--codes", "learn", "--train", "experts", "--steps", 16),
            "weight_scale",
        ),
    ],
)
def test_quantised_students_are_healed_in_their_layout(
    name: str, words: tuple[object, ...], moved: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(healing_memory, "BLOCK_TOKENS", 2048)
    out = tmp_path / "h.safetensors"
    outcome = here("heal", f"{name}.safetensors", *HEAL, *words, "-o", out, cwd=folder)
    before, after = outcome.result["held_error"]
    assert after < before
    old, new = (open_checkpoint(path) for path in (folder / f"{name}.safetensors", out))
    assert new.header.tensors == old.header.tensors
    assert [weight.format for weight in new.weights.values()] == [weight.format for weight in old.weights.values()]
    changed = {
        member for member in old.header.tensors if not old.finite_tensor(member).equal(new.finite_tensor(member))
    }
    assert any(member.endswith(moved) for member in changed)
    codes = {member for weight in old.weights.values() if weight.quantized for member in weight.members[:1]}
    ternary = {weight.members[0] for weight in old.weights.values() if str(weight.format).startswith("ternary")}
    if "learn" in words:
        assert not changed & ternary
        assert "codes of ternary-g32 stay as they are, and scales are trained" in outcome.err
    else:
        assert not changed & codes, "codes are fixed"


def test_codes_that_nothing_has_are_refused(folder: Path, tmp_path: Path) -> None:
    before = outputs(folder)
    for words in (("nf4.safetensors",), ("int3.safetensors", "--train", "router")):
        outcome = here("heal", *words, *HEAL, "--steps", 4, "--codes", "learn", "-o", tmp_path / "x", cwd=folder)
        assert "--codes learn has no effect" in outcome.error(2)
    assert "--codes moving" in here("heal", "int3.safetensors", *HEAL, "--codes", "moving", cwd=folder).error(2)
    assert outputs(folder) == before
    assert not (tmp_path / "x").exists()


def test_what_is_trained_is_counted_in_the_dry_run(folder: Path) -> None:
    counts = {}
    for codes in ("fixed", "learn"):
        words = ("heal", "int3.safetensors", *HEAL, "--steps", 4, "--codes", codes, "--dry-run")
        counts[codes] = here(*words, cwd=folder).result["trained_weights"]
    weights = open_checkpoint(folder / "int3.safetensors").weights.values()
    assert counts["learn"] - counts["fixed"] == sum(
        w.info.numel for w in weights if w.quantized and "pos_embed" not in w.info.name
    )
