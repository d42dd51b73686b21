"""Time how the code of exported folders unpacks an expert's matrix of XL, beside ours, in processor time of one thread.

    python examples/benchmarks/exported_unpacking.py

Values are the same to the bit, which is checked. The last line is the product of 256 tokens and the matrix.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from ditmoe_cli.exporting.diffusers_code.modeling_ditmoe import unpack
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.formats.registry import pack, parse_format

SHAPE, ROUNDS = (4608, 1152), 5
FORMATS = ("nf4", "nf4-dq", "int8", "int2-g64", "int3-g64", "int4-g64", "int5-g64", "int8-g64", "ternary-g64")


def seconds(work: Callable[[], object]) -> float:
    """Return the processor time of some work, the middle of a few."""
    times = []
    for _ in range(ROUNDS):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return median(times)


def main() -> None:
    """Print the times."""
    torch.set_num_threads(1)
    weight = 0.02 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    info, ours = TensorInfo("x.weight", "F32", SHAPE), torch.empty(SHAPE)
    for name in FORMATS:
        members = pack(weight, info, name)
        loaded = parse_format(name).load(info, members)
        loaded.unpack(loaded.tensors, ours)
        theirs = unpack(name, SHAPE, lambda end, members=members: members[f"x.{end}"])
        assert torch.equal(theirs, ours)
        exported = seconds(lambda name=name, members=members: unpack(name, SHAPE, lambda end: members[f"x.{end}"]))
        own = seconds(lambda loaded=loaded: loaded.unpack(loaded.tensors, ours))
        each = 1e9 * exported / weight.numel()
        print(f"{name:12} {1e3 * exported:6.1f} ms, {each:.1f} ns a weight; ours {1e3 * own:6.1f} ms")
    tokens = torch.randn(256, SHAPE[1])
    print(f"{'product':12} {1e3 * seconds(lambda: tokens @ weight.T):6.1f} ms")


if __name__ == "__main__":
    main()
