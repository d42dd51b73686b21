"""What all tests share: a pico DiT-MoE, the oracles, and the command line in a pipe."""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from devices import can_try
from hypothesis import HealthCheck, settings
from torch import Tensor

from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.files.provenance import Card, Provenance
from ditmoe_cli.files.reader import dtype_code, tensor_bytes
from ditmoe_cli.files.writer import DEFAULT_SHARD_BYTES, Output, one_by_one
from ditmoe_cli.model import throughput
from ditmoe_cli.model.config import BlockConfig, DiTMoEConfig, expected_weights
from ditmoe_cli.model.dit import DiTMoE
from ditmoe_cli.model.embedders import sincos_position_embedding

TESTS = Path(__file__).resolve().parent
REPOSITORY = TESTS.parent
SHARED = REPOSITORY.parent / "shared"

torch.set_num_threads(1)  # several processes share the cores

# fixtures here are stateless, and a shared machine has no business failing a test for being slow
settings.register_profile(
    "ditmoe", deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
settings.load_profile("ditmoe")


def heed_signals() -> None:
    """Make a child heed signals (as preexec_fn) that a run in the background, or by nohup, ignores and passes on."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random values on a scale at which routing, modulation and every bias make a difference."""
    value = torch.randn(shape, generator=generator)
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return 1 + 0.1 * value
    if len(shape) == 1:
        return 0.3 * value if "adaLN" in name else 0.1 * value
    if name.endswith("moe.gate.weight"):
        return 1.5 * value / shape[1] ** 0.5
    if name.startswith("y_embedder"):
        return value
    if "adaLN" in name:
        return 0.5 * value / shape[1] ** 0.5
    return value / float(np.prod(shape[1:])) ** 0.5


@dataclass(frozen=True)
class Pico:
    """A DiT-MoE of some 100,000 random weights: its configuration and its state dict under upstream names."""

    config: DiTMoEConfig
    state: Mapping[str, Tensor]

    def with_state(self, **changes: Tensor | None) -> Pico:
        """Return a copy with tensors replaced (None removes); write dots of names as ``__``."""
        state = {**self.state, **{name.replace("__", "."): value for name, value in changes.items()}}
        return replace(self, state={name: value for name, value in state.items() if value is not None})

    def infos(self) -> list[TensorInfo]:
        """Return the tensors' descriptions, in the state dict's order."""
        return [TensorInfo(n, dtype_code(t.dtype, n), tuple(t.shape)) for n, t in self.state.items()]

    def content(self, info: TensorInfo) -> memoryview:
        """Return the bytes of a tensor."""
        return tensor_bytes(self.state[info.name])

    def save(
        self,
        path: Path,
        *,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
        force: bool = False,
        provenance: Provenance | None = None,
    ) -> Path:
        """Write as ditmoe does: one file where `path` ends in ``.safetensors``, else a folder."""
        provenance = provenance or Provenance(self.config.to_json(), card=Card(extractor="pixels"))
        output = Output(path, force, shard_bytes)
        output.write(self.infos(), one_by_one(self.infos(), self.content), provenance, ())
        return path

    def save_pt(self, path: Path, container: str = "bare", *, legacy: bool = False, **args: Any) -> Path:
        """Write a pickle: ``bare``, a key such as ``ema``, ``train``, or ``deepspeed`` (a folder).

        `args` become train.py's arguments. In ``train`` the ``model`` beside ``ema`` holds other weights.
        """
        state = dict(self.state)
        others = {name: tensor + 1 for name, tensor in state.items()}
        arguments = argparse.Namespace(**args)
        document: Any = {
            "bare": lambda: state,
            "train": lambda: {
                "model": others,
                "ema": state,
                "opt": {"state": {}, "param_groups": [{"lr": 1e-4}]},
                "args": arguments,
            },
            "deepspeed": lambda: {"module": state, "dp_world_size": 8, "args": arguments},
        }.get(container, lambda: {container: state, **({"args": arguments} if args else {})})()
        if container == "deepspeed":
            step = path / "global_step7"
            step.mkdir(parents=True)
            (path / "latest").write_text("global_step7")
            torch.save(document, step / "mp_rank_00_model_states.pt")
        else:
            torch.save(document, path, _use_new_zipfile_serialization=not legacy)
        return path

    def model(self) -> DiTMoE:
        """Return the network with these weights, put together by torch alone."""
        model = DiTMoE(self.config)
        missing, unexpected = model.load_state_dict(dict(self.state), strict=False)
        assert not unexpected and set(missing) <= {"pos_embed"}
        if missing:
            side = self.config.input_size // self.config.patch_size
            model.pos_embed.copy_(sincos_position_embedding(self.config.hidden_size, side))
        return model.eval().requires_grad_(False)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Spare garbage collections, which `bench` asks for each time, what lives as long as the tests do."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests of GPUs where there is none."""
    if item.get_closest_marker("cuda") is not None and not can_try():
        pytest.skip("no GPU")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown() -> Iterator[None]:
    """Fail a test that leaves torch with more threads: they spin at each barrier and slow all later tests down."""
    yield
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    assert count == 1, f"torch is left with {count} threads"


def make_pico(
    *,
    attention: str = "timm",
    sampler: str = "ddpm",
    hidden: int = 32,
    depth: int = 2,
    heads: int = 2,
    experts: int = 4,
    top_k: int = 2,
    patch: int = 2,
    in_channels: int = 4,
    input_size: int = 8,
    learn_sigma: bool = True,
    num_classes: int = 3,
    null_class: bool = True,
    widths: tuple[tuple[int, ...], ...] | None = None,
    shared_width: int | None = None,
    expert_of: tuple[tuple[int, ...], ...] | None = None,
    extras: Mapping[str, Any] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Pico:
    """Build a pico DiT-MoE; `widths` and `expert_of` give each block's expert widths and router map.

    `extras` are further fields of all blocks' `BlockConfig`, as constants and residual maps.
    """
    shared = 2 * hidden if shared_width is None else shared_width
    per_block = widths or ((hidden * 2,) * experts,) * depth
    rows = [len(m) for m in expert_of] if expert_of else [len(w) for w in per_block]
    config = DiTMoEConfig(
        input_size=input_size,
        patch_size=patch,
        in_channels=in_channels,
        out_channels=in_channels * (2 if learn_sigma else 1),
        hidden_size=hidden,
        depth=depth,
        num_heads=heads,
        num_classes=num_classes,
        top_k=top_k,
        attention="flash" if attention == "flash" else "timm",
        sampler="rf" if sampler == "rf" else "ddpm",
        blocks=tuple(
            BlockConfig(r, w, shared, expert_of is not None, **(extras or {}))
            for r, w in zip(rows, per_block, strict=True)
        ),
        null_class=null_class,
    )
    generator = torch.Generator().manual_seed(seed)
    state = {name: _random(name, shape, generator) for name, shape in expected_weights(config).items()}
    state["pos_embed"] = sincos_position_embedding(hidden, input_size // patch)
    for block, mapping in enumerate(expert_of or ()):
        state[f"blocks.{block}.moe.gate.expert_of"] = torch.tensor(mapping, dtype=torch.int32)
    if sampler == "rf" and learn_sigma:
        sigma = torch.arange(patch * patch * config.out_channels) % config.out_channels >= in_channels
        state["final_layer.linear.weight"][sigma] = 0
        state["final_layer.linear.bias"][sigma] = 0
    state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}
    return Pico(config, state)


@pytest.fixture(scope="session")
def pico() -> Callable[..., Pico]:
    """The factory of pico models, `make_pico`."""
    return make_pico


@dataclass(frozen=True)
class Oracle:
    """What upstream computed with one small checkpoint."""

    name: str
    checkpoint: Path
    about: Mapping[str, Any]
    expected: Mapping[str, np.ndarray]
    heads: int | None


def oracle_folders() -> dict[str, Path]:
    """Return the oracles at hand: those in ``tests/data`` and, beside the repository, the shared ones."""
    found = {f"data-{about.parent.name}": about.parent for about in sorted((TESTS / "data").glob("*/about.json"))}
    found.update({f"shared-{about.parent.name}": about.parent for about in sorted(SHARED.glob("oracle/*/about.json"))})
    return found


def load_oracle(folder: Path) -> Oracle:
    """Read an oracle. The head count is given where no tensor tells it: timm layouts of unusual widths."""
    about = json.loads((folder / "about.json").read_text())
    pickles = [folder / name for name in ("checkpoint.pt", "checkpoint") if (folder / name).exists()]
    heads = None if about["config"].get("use_flash_attn") else about["config"]["num_heads"]
    with np.load(folder / "expected.npz") as expected:
        return Oracle(folder.name, pickles[0], about, dict(expected), heads)


@pytest.fixture(scope="session")
def oracle() -> Callable[[str], Oracle]:
    """Return an oracle by name; skips where neither ``tests/data`` nor the shared folder has it."""

    def find(name: str) -> Oracle:
        folders = oracle_folders()
        folder = folders.get(f"data-{name}") or folders.get(f"shared-{name}")
        if folder is None:
            pytest.skip(f"oracle {name} is not here")
        return load_oracle(folder)

    return find


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared materials beside the repository; skips in a clone without it."""
    if not SHARED.is_dir():
        pytest.skip("no shared folder beside the repository")
    return SHARED


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what commands cache away from the user's own folder, and from tests that ran in this process before."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def no_progress() -> Iterator[None]:
    """Switch progress off, of which a slow machine prints more."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("DITMOE_PROGRESS", "0")
        yield


@pytest.fixture(autouse=True, scope="session")
def machine_measured_once() -> Iterator[None]:
    """Measure the speed of this machine once, and not whenever `bench` runs."""
    measured = cache(throughput._product_rate)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(throughput, "_product_rate", measured)
        yield


@pytest.fixture(scope="module")
def few_tokens() -> Iterator[None]:
    """Measure, try, fit and heal on few tokens, and try few plans, in the commands of a module's tests."""
    from compressing import compress_in_few_trials
    from healing import heal_on_few_states

    with pytest.MonkeyPatch.context() as patched:
        compress_in_few_trials(patched)
        heal_on_few_states(patched)
        yield


@pytest.fixture
def run_cli(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run ``python -m ditmoe_cli ARGS`` with pipes for streams, in an empty folder.

    Without `stdin` text, standard input is the null device.
    """

    def run(
        *args: object,
        stdin: str | None = None,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 300,
    ) -> subprocess.CompletedProcess[str]:
        search = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1", **(env or {})}
        return subprocess.run(
            [sys.executable, "-m", "ditmoe_cli", *map(str, args)],
            cwd=cwd or tmp_path,
            env=environment,
            timeout=timeout,
            text=True,
            capture_output=True,
            **({"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}),
        )

    return run
