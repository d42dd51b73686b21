"""Work on a CPU that is divided over threads of this process, each of which computes with one thread.

Small products gain nothing by torch's own threads, which meet after each of them: gradients of 128 states of the demo
take 0.144 s on one thread, 0.157 s on torch's two, and 0.084 s as two halves in two threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import TypeVar

import torch

from ditmoe_cli.files.streaming import in_threads
from ditmoe_cli.threads import usable_threads

Part = TypeVar("Part")
Result = TypeVar("Result")

MOST_BYTES = 2**29  # of gradients, of which each thread has its own


def workers_for(device: torch.device, values: int) -> int:
    """Return over how many threads training some values is divided: all of a CPU, as far as gradients stay small."""
    if device.type != "cpu":
        return 1
    return max(1, min(usable_threads(), MOST_BYTES // max(4 * values, 1)))


def side_by_side(compute: Callable[[Part], Result], parts: Sequence[Part]) -> list[Result]:
    """Return the result of each part, one thread a part; gradients are recorded there as they are here.

    Raises the error of the first part that fails, once those under way have ended (`in_threads`).
    """
    recording, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def computed(part: Part) -> Result:
        with torch.inference_mode(inference), torch.set_grad_enabled(recording and not inference):
            return compute(part)

    return in_threads([partial(computed, part) for part in parts], _pool(len(parts)))


@lru_cache(maxsize=1)
def _pool(count: int) -> ThreadPoolExecutor:
    """Return threads, kept for the next step: what they work in is theirs, and fresh pages take long to clear."""
    return ThreadPoolExecutor(count, "side-by-side")
