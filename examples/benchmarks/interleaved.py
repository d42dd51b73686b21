"""Timing of several things in turn, so that what else a machine does falls on all of them, and what benchmarks print.

Each round runs every one of them once; ratios are taken within a round, and their median is told with the least and the
greatest. Seconds are those of the wall or, on a machine that others use too, of the processor: user and system time of
this process, which for one thread is what the wall shows on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ditmoe_cli.model import dtypes
from ditmoe_cli.model.config import DiTMoEConfig
from ditmoe_cli.model.dit import DiTMoE
from ditmoe_cli.model.dtypes import torch_dtype_of
from ditmoe_cli.model.experts import reserve
from ditmoe_cli.model.loading import kept_in, put

DTYPES: Mapping[str, torch.dtype] = {name: torch_dtype_of(name) for name in dtypes.DTYPES}
PEAK_SIDES: Mapping[str, int] = {"cpu": 1024, "cuda": 8192}  # of the product that others are told by
CLOCKS: Mapping[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}

Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Timer:
    """How long a call takes on a device, by one of `CLOCKS`; on CUDA by its events."""

    device: torch.device
    clock: str

    def seconds(self, run: Run) -> float:
        """Return how long one call takes, until the device is done."""
        if self.device.type != "cuda":
            start = CLOCKS[self.clock]()
            run()
            return CLOCKS[self.clock]() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize(self.device)
        return float(begin.elapsed_time(end)) / 1000

    def in_turn(self, runs: Mapping[str, Run], rounds: int, warm_ups: int = 1) -> dict[str, list[float]]:
        """Return the seconds of every run in each round; the order is reversed in every other round."""
        for run in runs.values():
            for _ in range(warm_ups):
                run()
        found: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(rounds):
            for name in runs if number % 2 == 0 else reversed(runs):
                found[name].append(self.seconds(runs[name]))
        return found


@dataclass(frozen=True)
class Ratio:
    """The median of ratios, the least and the greatest."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def ratio(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """Return the ratio of two runs' seconds, round by round."""
    each = [a / b for a, b in zip(above, below, strict=True)]
    return Ratio(statistics.median(each), min(each), max(each))


def matmul_run(dtype: torch.dtype, device: torch.device, side: int) -> Run:
    """Return a product of two square matrices of 2 side³ operations, whose rate is the peak that others are told by."""
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return lambda: torch.mm(left, right, out=out)


def peak_rate(timer: Timer, dtype: torch.dtype, rounds: int = 5) -> float:
    """Return the operations a second of a large product in a dtype, the best of some."""
    side = PEAK_SIDES[timer.device.type]
    run = matmul_run(dtype, timer.device, side)
    return 2 * side**3 / min(timer.in_turn({"peak": run}, rounds, warm_ups=2)["peak"])


def empty_model(config: DiTMoEConfig, device: torch.device | str, dtype: torch.dtype) -> DiTMoE:
    """Return a model without values that computes in a dtype, with its weights as the loader lays them out."""
    with torch.device("meta"):
        model = DiTMoE(config)
    for block in model.blocks:
        reserve(list(block.moe.experts), torch.device(device), dtype)
        reserve([block.moe.shared_experts], torch.device(device), dtype)
    model.compute_in(dtype)
    return model.eval()


def random_model(config: DiTMoEConfig, device: torch.device | str = "cpu") -> DiTMoE:
    """Return a model in fp32 of random weights on the scale of trained ones."""
    model = empty_model(config, device, torch.float32)
    for name, parameter in list(model.named_parameters()):
        value = parameter.data if not parameter.is_meta else torch.empty(parameter.shape, device=device)
        nn.init.normal_(value, std=value[0].numel() ** -0.5 if value.dim() > 1 else 0.02)
        put(model, name, value)
    return model.requires_grad_(False)


def in_dtype(model: DiTMoE, dtype: torch.dtype) -> DiTMoE:
    """Return a model over the weights of another that computes in a dtype, as the loader makes it.

    In fp32 it is the same, where that is not laid out for products.
    """
    state = model.state_dict()
    prepacked = [name for name, value in state.items() if value.is_mkldnn]
    if dtype == torch.float32 and not prepacked:
        return model
    state |= {name: state[name].to_dense() for name in prepacked}
    made = empty_model(model.config, model.device, dtype)
    for name, value in state.items():
        put(made, name, value.to(kept_in(name, dtype)))
    return made.requires_grad_(False)


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Return ‖a - b‖ / ‖b‖ in fp32."""
    wanted = expected.float()
    return float((found.float() - wanted).norm() / wanted.norm())


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine(timer: Timer) -> dict[str, Any]:
    """Return what the figures were taken on."""
    on_gpu = timer.device.type == "cuda"
    where = torch.cuda.get_device_name(timer.device) if on_gpu else platform.processor() or platform.machine()
    by = "events" if on_gpu else timer.clock
    return {"device": where, "threads": torch.get_num_threads(), "torch": torch.__version__, "clock": by}


def plain(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return rows as JSON holds them."""
    return [{key: asdict(value) if isinstance(value, Ratio) else value for key, value in row.items()} for row in rows]


def report(path: Path | None, place: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], printed: str) -> None:
    """Print the machine and the table; write both as JSON where a path is given."""
    print(", ".join(f"{key} {value}" for key, value in place.items()))
    print(printed)
    if path is not None:
        path.write_text(json.dumps({"machine": dict(place), "rows": list(rows)}, indent=1))


def add_options(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Add the options that benchmarks of speed share."""
    parser.add_argument("--dtype", type=names_of(DTYPES), default=["fp32", "bf16"], help="of " + ", ".join(DTYPES))
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda")
    parser.add_argument("--rounds", type=int, default=rounds, help="in each of which everything runs once")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="on a CPU; processor: of a busy machine")
    parser.add_argument("--threads", type=int, help="of torch; default: as many as it takes")
    parser.add_argument("--json", type=Path, help="file for all figures")


def names_of(known: Mapping[str, object]) -> Callable[[str], list[str]]:
    """Return a parser of names separated by commas."""

    def parse(text: str) -> list[str]:
        unknown = [name for name in text.split(",") if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r}: choose from {', '.join(known)}")
        return text.split(",")

    return parse


def numbers(text: str) -> list[int]:
    """Return positive numbers separated by commas."""
    found = [int(word) for word in text.split(",")]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be 1 or more")
    return found


def timer_of(options: argparse.Namespace) -> Timer:
    """Return the timer of the options, with torch's threads set."""
    if options.threads:
        torch.set_num_threads(options.threads)
    return Timer(options.device, options.clock)
