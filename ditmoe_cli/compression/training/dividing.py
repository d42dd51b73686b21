"""Work divided: in buckets of a limited size, and among several that share it. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

Item = TypeVar("Item")
Key = TypeVar("Key")


def buckets(items: Iterable[Item], size: Callable[[Item], int], most: int) -> Iterator[list[Item]]:
    """Yield items in order, together as many as have a size of at most `most` in all, and at least one."""
    bucket: list[Item] = []
    held = 0
    for item in items:
        if bucket and held + size(item) > most:
            yield bucket
            bucket, held = [], 0
        bucket.append(item)
        held += size(item)
    if bucket:
        yield bucket


def dealt(loads: Mapping[Key, int], shares: int) -> dict[Key, int]:
    """Return which share each load goes to, the largest dealt out first, to the one that has least so far."""
    held, found = [0] * shares, dict[Key, int]()
    for key in sorted(loads, key=lambda key: -loads[key]):
        found[key] = held.index(min(held))
        held[found[key]] += loads[key]
    return found
