"""Conditions of a sampling run: each (time, class) pair is embedded once, and modulates each block once.

A block's modulation depends on time and class alone: m = W SiLU(c) + b with c = t_embed + y_embed. So a batch that is
asked at S times for images of U classes needs S U rows of it. They are kept where all blocks' rows take at most
`MOST_BYTES`; else the U rows of one time are embedded and modulated at each evaluation. Which of the two is done
depends on the configuration and the batch alone, never on where weights are kept, so that results are the same to the
last bit.

All of it is computed in fp32, in whatever dtype the weights are; in fp64 where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ditmoe_cli.model.config import DiTMoEConfig

MOST_BYTES = 2**29
PARTS = 6  # vectors of a block's modulation: shift, scale and gate of attention, and of the mixture
_FLOAT_BYTES = 4

Modulate = Callable[[Tensor], Tensor]
"""Takes conditions (P, D), returns their modulation (P, parts · D)."""


@dataclass(frozen=True)
class Conditions:
    """The (time, class) pairs of a batch.

    Attributes:
        embedded: returns embedded pairs (S, U, D) of S times and the U classes.
        places: the index of each time.
        classes: (N,) the index of each row's class.
        whole: whether all times are modulated at once.
        kept: modulations (S, U, parts · D) by the name of what they modulate; filled where `keeps`.
        keeps: whether modulations are kept.
    """

    embedded: Callable[[Sequence[float]], Tensor]
    places: dict[float, int]
    classes: Tensor
    whole: bool
    keeps: bool
    kept: dict[str, Tensor] = field(default_factory=dict)
    _latest: dict[tuple[float, ...], Tensor] = field(default_factory=dict)

    def at(self, name: str, modulate: Modulate, t: float) -> Tensor:
        """Return the modulation (N, parts · D) of each row at time t, by `modulate`, which is called `name`."""
        place = self.places[t]
        if not self.whole:
            return modulate(self._pairs((t,))[0])[self.classes]
        table = self.kept.get(name)
        if table is None:
            pairs = self._pairs(tuple(self.places))
            table = modulate(pairs.flatten(0, 1)).reshape(*pairs.shape[:2], -1)
            if self.keeps:
                self.kept[name] = table
        return table[place][self.classes]

    def _pairs(self, times: tuple[float, ...]) -> Tensor:
        """Return the embedded pairs of times, for all that is modulated by them; those of other times are let go."""
        if times not in self._latest:
            self._latest.clear()
            self._latest[times] = self.embedded(times)
        return self._latest[times]


def conditions(
    times: Sequence[float],
    labels: Tensor,
    embed: Callable[[Tensor, Tensor], Tensor],
    config: DiTMoEConfig,
    keeps: bool = True,
) -> Conditions:
    """Return the conditions of rows with `labels` (N,) at `times`.

    ``embed(t, y)`` returns conditions (P, D) of times (P,) and labels (P,). Without `keeps`, for blocks that are read
    again at each evaluation, modulations are computed alike, but not kept.
    """
    known, classes = torch.unique(labels, return_inverse=True)
    places = {time: place for place, time in enumerate(dict.fromkeys(times))}

    def embedded(asked: Sequence[float]) -> Tensor:
        t = torch.tensor(asked, device=labels.device).repeat_interleave(len(known))
        c = embed(t, known.repeat(len(asked)))
        return (c if c.dtype == torch.float64 else c.float()).reshape(len(asked), len(known), -1)

    whole = modulation_bytes(config, len(places) * len(known)) <= MOST_BYTES
    return Conditions(embedded, places, classes, whole, keeps)


def modulation_bytes(config: DiTMoEConfig, pairs: int) -> int:
    """Return the bytes of all blocks' modulations of that many (time, class) pairs."""
    return _FLOAT_BYTES * PARTS * config.hidden_size * config.depth * pairs
