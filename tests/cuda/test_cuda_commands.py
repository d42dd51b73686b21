"""Every command that computes gives on a GPU what it gives on the CPU.

In fp32, images differ by at most a grey level, moments of profiles by 0.5 % and two in a thousand selections, scores by
1 %; what a command fits or rounds is as near to the original as on the CPU within 5 %, and in bf16 within 25 %.
``DITMOE_TEST_DEVICE=cpu`` tries these tests without a GPU.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import Outcome, here, tensor_shapes
from compressing import measure_few_tokens, outputs
from conftest import make_pico
from devices import TRIED_ON
from safetensors.torch import load_file
from torch import Tensor

from ditmoe_cli.model.loading import load_model

pytestmark = pytest.mark.cuda

SMALL = ("--images", 8, "--steps", 4)
PROFILING = (*SMALL, "--reservoir", 1024, "--bins", 2, "--cfg", 1.5)
DTYPES = ("fp32", "bf16")
CLOSE, NEAR = {"fp32": 1e-3, "bf16": 0.05}, {"fp32": 1.05, "bf16": 1.25}
MOMENTS = {"fp32": 5e-3, "bf16": 0.05}
REFIT, TOKENS = ("--refit-tokens", 512), ("--tokens", 512)
UNIFORM, ROUNDED = ("--uniform", "--format"), ("--rounding", "gptq", *TOKENS)
STAGES = {
    "prune": ("prune", "--keep", "0.5", *REFIT),
    "constants": ("prune", "--keep", "0.5", "--constants", *REFIT),
    "residual": ("prune", "--keep", "0.5", "--residual-rank", 4, *REFIT),
    "neurons": ("prune", "--neurons", "0.5", "--allocate", "global", *REFIT),
    "searched": ("prune", "--keep", "0.5", "--method", "naee", "--no-refit"),
    "merge": ("merge", "--groups", "0.5", *REFIT),
    "svd": ("merge", "--delta", "svd"),
    "ternary": ("merge", "--delta", "ternary"),
    "mixed": ("quantize", "--bits", "4.5", *TOKENS),
    "smooth": ("quantize", "--bits", "5", "--smooth", "0.5", *TOKENS),
    "nearest": ("quantize", "--bits", "5", "--rounding", "nearest"),
    "nf4": ("quantize", *UNIFORM, "nf4", *ROUNDED),
    "fp4": ("quantize", *UNIFORM, "fp4", "--double-quant"),
    "int8": ("quantize", *UNIFORM, "int8"),
    "int": ("quantize", *UNIFORM, "int", "--bits", "3", *ROUNDED),
    "ternary64": ("quantize", *UNIFORM, "ternary", *ROUNDED),
    "compress": ("compress", "--ratio", "0.5"),
}
MIXES = ("mixed", "smooth", "nearest", "compress")  # formats of nearly equal errors may change places
PROFILE = "p-fp32.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and its profile in each dtype from the CPU; commands write beside them."""
    folder = tmp_path_factory.mktemp("made")
    make_pico(sampler="rf", in_channels=1, hidden=64).save(folder / "a.safetensors")
    for dtype in DTYPES:
        words = (*PROFILING, "--dtype", dtype, "-o", f"p-{dtype}.safetensors")
        ran(folder, "profile-experts", "a.safetensors", *words, "cpu")
    return folder


def ran(folder: Path, *words: object) -> Outcome:
    """Run a command on the device that its last word names."""
    *command, device = words
    outcome = here(*command, "--device", device, cwd=folder)
    assert outcome.code == 0, outcome.err
    return outcome


def norm_of_difference(a: Tensor, b: Tensor) -> float:
    """‖a - b‖ / ‖b‖."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


@cache
def predicted(path: Path) -> Tensor:
    """What a checkpoint predicts on the CPU."""
    return outputs(load_model(path))


def error(path: Path) -> float:
    """How far the predictions of a compressed checkpoint are from the original's."""
    return norm_of_difference(predicted(path), predicted(path.parent / "a.safetensors"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cfg", [1, 1.5])
def test_samples(made: Path, dtype: str, cfg: float) -> None:
    images = []
    for device in ("cpu", TRIED_ON):
        name = f"s-{device}-{cfg}-{dtype}.safetensors"
        precision = "fp32" if device == "cpu" else dtype
        ran(made, "sample", "a.safetensors", *SMALL, "--cfg", cfg, "--dtype", precision, "-o", name, "--force", device)
        images.append(load_file(made / name)["images"])
    assert norm_of_difference(*images) <= CLOSE[dtype]
    if dtype == "fp32":
        assert int((images[0].int() - images[1].int()).abs().max()) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("guide", [("--guide-with", "b.safetensors"), ("--guide-by", "top1")])
def test_samples_guided_by_a_weaker_model(made: Path, dtype: str, guide: tuple[str, str]) -> None:
    make_pico(sampler="rf", in_channels=1, hidden=64, seed=1).save(made / "b.safetensors", force=True)
    images = []
    for device in ("cpu", TRIED_ON):
        name, precision = f"g-{device}-{guide[1]}-{dtype}.safetensors", "fp32" if device == "cpu" else dtype
        words = (*guide, "--guide-scale", 0.5, "--cfg", 1.5, "--dtype", precision, "-o", name, "--force")
        ran(made, "sample", "a.safetensors", *SMALL, *words, device)
        images.append(load_file(made / name)["images"])
    assert norm_of_difference(*images) <= 2 * CLOSE[dtype], "a difference of two predictions rounds more"


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_profiles(made: Path, dtype: str, offload: bool) -> None:
    name = f"q-{dtype}-{offload}.safetensors"
    words = (*PROFILING, "--dtype", dtype, *(["--offload"] if offload else []), "-o", name)
    ran(made, "profile-experts", "a.safetensors", *words, TRIED_ON)
    expected, found = load_file(made / PROFILE), load_file(made / name)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        if tensor.is_floating_point():
            assert norm_of_difference(found[key], tensor) <= MOMENTS[dtype], key
        else:  # a token between two experts may go to either
            assert (found[key] - tensor).abs().sum() <= 2 * CLOSE[dtype] * tensor.abs().sum(), key


@cache
def staged(folder: Path, stage: str, device: str, dtype: str) -> Path:
    """Run a command of `STAGES` on a device."""
    command, *words = STAGES[stage]
    calibrated = "--uniform" not in words or "gptq" in words
    profile = ("--profile", f"p-{dtype}.safetensors", "--dtype", dtype) if calibrated else ()
    output = ("-o", f"{stage}-{device}-{dtype}.safetensors", "--force")
    return ran(folder, command, "a.safetensors", *words, *profile, *output, device).path


@pytest.fixture
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure formats on few tokens."""
    measure_few_tokens(monkeypatch, 512)


@pytest.mark.usefixtures("few_tokens")
@pytest.mark.parametrize("stage", STAGES)
def test_stages(made: Path, stage: str) -> None:
    expected, found = (staged(made, stage, device, "fp32") for device in ("cpu", TRIED_ON))
    assert error(found) <= NEAR["fp32"] * error(expected)
    if stage not in MIXES:
        assert tensor_shapes(found) == tensor_shapes(expected)


@pytest.mark.usefixtures("few_tokens")
@pytest.mark.parametrize("stage", ["prune", "neurons", "merge", "mixed"])
def test_stages_of_profiles_in_half_precision(made: Path, stage: str) -> None:
    assert error(staged(made, stage, TRIED_ON, "bf16")) <= NEAR["bf16"] * error(staged(made, stage, "cpu", "fp32"))


def test_plans_are_applied(made: Path) -> None:
    plan = here("prune", "a.safetensors", "--keep", "0.5", "--profile", PROFILE, "--dry-run", cwd=made)
    (made / "plan.json").write_text(plan.out)
    paths = []
    for device in ("cpu", TRIED_ON):
        words = ("--plan", "plan.json", "--profile", PROFILE, "-o", f"applied-{device}.safetensors", "--force")
        paths.append(ran(made, "apply", "a.safetensors", *words, device).path)
    assert error(paths[1]) <= NEAR["fp32"] * error(paths[0])


@pytest.fixture(scope="module")
def halved(made: Path) -> Path:
    """The checkpoint with half of its experts, made on the CPU."""
    words = ("--keep", "0.5", "--profile", PROFILE, "-o", "half.safetensors")
    return ran(made, "prune", "a.safetensors", *words, "cpu").path


TRAINED = {
    "heal": ("heal", "--steps", 30),
    "heal lora": ("heal", "--steps", 30, "--scope", "model", "--train", "lora:2"),
    "distill": ("distill", "--steps", 2, "--teacher-steps", 8, "--iterations", 30, "--cfg", 1.5),
    "distill own": ("distill", "--steps", 2, "--teacher-steps", 8, "--iterations", 30, "--states", "own"),
    "distill guided": ("distill", "--steps", 2, "--iterations", 30, "--guide-by", "top1", "--guide-scale", 0.5),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", TRAINED)
def test_training(made: Path, training: str, dtype: str) -> None:
    """Held-out errors before and after are those of the CPU."""
    prune = ("--keep", "0.5", "--no-refit", "--profile", PROFILE, "-o", "damaged.safetensors", "--force")
    student = ran(made, "prune", "a.safetensors", *prune, "cpu").path
    results, paths = [], []
    for device, precision in (("cpu", "fp32"), (TRIED_ON, dtype)):
        command, *words = TRAINED[training]
        words += ["--profile", f"p-{precision}.safetensors"] if command == "heal" else []
        output = ("-o", f"{training.replace(' ', '-')}-{device}-{precision}.safetensors", "--force")
        ending = ("--original", "a.safetensors", "--batch", 16, "--rate", 0.004, "--dtype", precision, *output)
        outcome = ran(made, command, student.name, *words, *ending, device)
        results.append(outcome.result["held_error"])
        paths.append(outcome.path)
    assert results[0][1] < results[0][0]
    assert results[1] == pytest.approx(results[0], rel=NEAR[dtype] - 1)
    assert tensor_shapes(paths[1]) == tensor_shapes(paths[0]) == tensor_shapes(student)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores(made: Path, halved: Path, dtype: str) -> None:
    def scores(device: str, precision: str) -> tuple[float, float]:
        pair = ("a.safetensors", halved.name, *SMALL, "--dtype", precision)
        compared = ran(made, "compare", *pair, "--force", device).result
        words = ("--original", "a.safetensors", "--ref", "a.safetensors", "--extractor", "pixels", *SMALL)
        score = ran(made, "fid", halved.name, *words, "--dtype", precision, device).result
        return compared["prediction"]["relative_error"], score["paired_features"]["estimate"]

    expected = scores("cpu", "fp32")
    assert scores(TRIED_ON, dtype) == pytest.approx(expected, rel=0.01 if dtype == "fp32" else 0.25)


@pytest.mark.parametrize("dtype", [*DTYPES, "fp16"])
def test_benchmarks(made: Path, halved: Path, dtype: str) -> None:
    words = ("a.safetensors", halved.name, "--batch", 2, "--repeats", 2, "--cfg", 1.5, "--dtype", dtype)
    text = json.dumps(ran(made, "bench", *words, TRIED_ON).result)
    found: dict[str, Any] = json.loads(text)
    assert found and "NaN" not in text


@pytest.mark.parametrize("guide", [(), ("--guide-by", "rank2", "--guide-scale", 0.5)])
def test_accelerated_samples(made: Path, guide: tuple[object, ...]) -> None:
    if TRIED_ON == "cpu":
        pytest.skip("graphs take a GPU")
    images = {}
    for how in ("--no-cuda-graphs", "--cuda-graphs", "--compile"):
        name = f"fast{how}{len(guide)}.safetensors"
        words = (*SMALL, "--cfg", 1.5, *guide, "--dtype", "bf16", how, "-o", name)
        ran(made, "sample", "a.safetensors", *words, TRIED_ON)
        images[how] = load_file(made / name)["images"]
    assert torch.equal(images["--cuda-graphs"], images["--no-cuda-graphs"])
    assert norm_of_difference(images["--compile"], images["--no-cuda-graphs"]) <= CLOSE["bf16"]
