"""Settings that change nothing are refused beside the options that make them so, or named on stderr."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_helpers import here, outputs
from conftest import make_pico

pytestmark = pytest.mark.usefixtures("few_tokens")

PROFILE = ("--profile", "p.safetensors")
PRUNE = ("prune", "a.safetensors", *PROFILE)
MERGE = ("merge", "a.safetensors", *PROFILE)
MIX = ("quantize", "a.safetensors", *PROFILE, "--bits", 4)
UNIFORM = ("quantize", "a.safetensors", "--uniform", "--bits", 4)
COMPRESS = ("compress", "a.safetensors", *PROFILE)
SVD = (*MERGE, "--delta", "svd")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of three experts of 16 neurons, and its profile; nothing here writes."""
    folder = tmp_path_factory.mktemp("idle")
    make_pico(sampler="rf", in_channels=1, input_size=4, experts=3, widths=((16,) * 3,) * 2).save(
        folder / "a.safetensors"
    )
    profiling = ("profile-experts", "a.safetensors", "--images", 2, "--steps", 2, "-o", "p.safetensors")
    assert here(*profiling, cwd=folder).code == 0
    return folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*PRUNE, "--keep", 2, "--seed", 3), "--seed has no effect without --method random"),
        ((*PRUNE, "--keep", 2, "--multiple", 8), "--multiple has no effect without --neurons"),
        ((*PRUNE, "--keep", 2, "--narrow-shared"), "--narrow-shared has no effect without --neurons"),
        ((*PRUNE, "--keep", 2, "--no-refit", "--refit-tokens", 64), "--refit-tokens has no effect with --no-refit"),
        ((*PRUNE, "--neurons", 0.5, "--method", "frequency"), "--method has no effect without --keep"),
        ((*PRUNE, "--neurons", 0.5, "--router", "slice"), "--router has no effect without --keep"),
        ((*PRUNE, "--neurons", 0.5, "--constants"), "--constants has no effect without --keep"),
        ((*PRUNE, "--neurons", 0.5, "--residual-rank", 2), "--residual-rank has no effect without --keep"),
        ((*PRUNE, "--keep", 2, "--residual-rank", 10**9), "--residual-rank 1000000000: the model's width is"),
        ((*PRUNE, "--keep", 2, "--method", "random", "--seed", 2**64), "must fit 64 bits"),
        ((*MERGE, "--groups", 2, "--no-refit", "--refit-tokens", 9), "--refit-tokens has no effect with --no-refit"),
        ((*SVD, "--method", "average"), "--method has no effect with --delta"),
        ((*SVD, "--router", "slice"), "--router has no effect with --delta"),
        ((*SVD, "--no-refit"), "--no-refit has no effect with --delta"),
        ((*SVD, "--refit-tokens", 9), "--refit-tokens has no effect with --delta"),
        ((*UNIFORM, "--group-size", 32), "--group-size 32: nf4 has its own"),
        ((*UNIFORM, "--symmetric"), "--symmetric: only --format int has it"),
        ((*UNIFORM, "--double-quant", "--format", "int"), "--double-quant: only nf4 and fp4 have it"),
        ((*UNIFORM, "--tokens", 64), "--tokens 64: give at least 1, and --rounding gptq"),
        ((*UNIFORM, "--smooth", 0.5), "--smooth 0.5: give 0 to 1, and --rounding gptq"),
        ((*UNIFORM, "--floor", "attn=4"), "--floor: shapes a planned mix"),
        ((*MIX, "--rounding", "nearest", "--tokens", 64), "--tokens 64: give at least 1, and --rounding gptq"),
        ((*MIX, "--floor", "attn=4", "--protect", "attn"), "--floor attn=4 has no effect with --protect attn"),
        ((*MIX, "--method", "pmq", "--tie", "gate,up"), "--tie has no effect with --method pmq"),
        ((*MIX, "--tie", "gate,gate"), "--tie gate: name at least two matrices"),
        ((*MIX, "--allow", "16"), "--allow 16: leaves every weight as it is"),
        ((*MIX, "--allow", "1.58,16", "--symmetric"), "--symmetric has no effect with --allow 1.58,16"),
        ((*MIX, "--group-size", 10**9), "--group-size 1000000000: choose from 32, 64, 128"),
        ((*COMPRESS, "--ratio", 0.5, "--minutes", 3), "--minutes has no effect without --heal"),
        ((*COMPRESS, "--ratio", 0.5, "--heal", "--minutes", 0), "--minutes 0: give a time above 0"),
        ((*COMPRESS, "--max-damage", 0.1, "--heal"), "--max-damage has no effect with --heal"),
        ((*COMPRESS, "--ratio", 0.5, "--target", "upstream", "--heal"), "--heal has no effect with --target upstream"),
        ((*COMPRESS, "--curve", "--heal"), "--heal has no effect with --curve"),
        ((*COMPRESS, "--curve", "--target", "upstream"), "--target has no effect on a curve of sizes"),
        (("convert", "a.safetensors", "-o", "b.safetensors", "--max-shard-size", "1MB"), "on a single file"),
        (("profile-experts", "a.safetensors", "--fast", "--reservoir", 64), "--reservoir has no effect with --fast"),
        (("profile-experts", "a.safetensors", "--seed", 2**70), "must fit 64 bits"),
        (("bench", "a.safetensors", "--batch", 10**12), "--batch 1000000000000: must be at least 1"),
        (("bench", "a.safetensors", "--seed", -(2**64)), "must fit 64 bits"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_what_has_no_effect_is_refused(words: tuple[object, ...], message: str, folder: Path) -> None:
    before = outputs(folder)
    assert message in here(*words, cwd=folder).error(2)
    assert outputs(folder) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*PRUNE, "--keep", 3), "--keep 3 keeps all experts of each block"),
        ((*PRUNE, "--keep", 1.0, "--no-refit"), "--keep 1.0 keeps all experts of each block"),
        ((*PRUNE, "--neurons", 0.9, "--multiple", 16), "--neurons 0.9 leaves every expert its width"),
        ((*PRUNE, "--neurons", 0.5, "--multiple", 10**20), "leaves every expert its width"),
        ((*MERGE, "--groups", 3), "--groups 3 is as many as each block has experts"),
        ((*MIX, "--allow", "2,8", "--floor", "experts=3"), "--allow 2 has no effect: no weight may take it"),
        (("convert", "a.safetensors", "--dtype", "fp32"), "--dtype fp32 has no effect: the weights are stored in it"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_what_changes_nothing_of_this_checkpoint_is_named(
    words: tuple[object, ...], message: str, folder: Path
) -> None:
    done = here(*words, "--dry-run", cwd=folder)
    assert done.code == 0 and message in done.err


def test_plans_that_change_nothing_or_need_no_profile_are_named(folder: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(here(*PRUNE, "--keep", 2, "--no-refit", "--dry-run", cwd=folder).out)
    done = here("apply", "a.safetensors", *PROFILE, "--plan", plan, "--dry-run", cwd=folder)
    assert done.code == 0 and "--profile has no effect: the plan computes no weights" in done.err
