"""Print what a device is, and the rate of large products in each dtype.

    python examples/benchmarks/device_facts.py --device cuda --json facts.json

The rate is that of the best of some square products, of side 8192 on a GPU and 1024 on a CPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
from collections.abc import Sequence
from typing import Any

import torch
from interleaved import DTYPES, Timer, add_options, machine, peak_rate, report, table, timer_of

KINDS = {**DTYPES, "fp64": torch.float64}


def facts(timer: Timer) -> dict[str, Any]:
    """Return the device's name, memory and capability, and what software there is."""
    found = {**machine(timer), "python": platform.python_version(), "cores": os.cpu_count()}
    for name in ("bitsandbytes", "triton"):
        found[name] = importlib.util.find_spec(name) is not None
    if timer.device.type == "cuda":
        properties = torch.cuda.get_device_properties(timer.device)
        found["GiB"] = round(properties.total_memory / 2**30, 1)
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["CUDA"] = torch.version.cuda
        found["TF32"] = torch.backends.cuda.matmul.allow_tf32
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the facts and a table of rates."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, rounds=5)
    parser.set_defaults(dtype=list(KINDS))
    options = parser.parse_args(arguments)
    timer = timer_of(options)
    rows = [{"dtype": name, "flops": peak_rate(timer, KINDS[name], options.rounds)} for name in options.dtype]
    cells = [[row["dtype"], f"{row['flops'] / 1e12:.3g}"] for row in rows]
    report(options.json, facts(timer), rows, table(("dtype", "TFLOP/s of a product"), cells))


if __name__ == "__main__":
    main()
