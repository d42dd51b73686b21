"""How a profile is collected: the model samples, and every mixture's routing is counted.

Counters see every token of every trajectory. A state (z_t, t, y) is kept for each image and step bin of a part of
the images, and a fixed choice of its tokens enters the reservoir: the same tokens in every block, conditional and
unconditional ones paired.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ditmoe_cli.diffusion.sampling import SampleSpec, batches, check_followable, sample_batch, step_bin, visit_noised
from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.model.dit import Denoiser, DiTMoE
from ditmoe_cli.model.moe import MoEEvent
from ditmoe_cli.model.offload import OffloadedDiTMoE
from ditmoe_cli.processes import WHOLE, Share
from ditmoe_cli.routing.collect.batch_events import Seen, see
from ditmoe_cli.routing.collect.counters import Counters
from ditmoe_cli.routing.collect.moments import Moments
from ditmoe_cli.routing.collect.ranks import merged, rank_of_other_threads
from ditmoe_cli.routing.collect.reservoir import Reservoir, Selection, select_states
from ditmoe_cli.routing.collect.shared_inputs import with_similarities

# calibration noise is never the noise that images are evaluated on, whatever the seeds
PURPOSE = "calibration"


class RoutingCollector:
    """Watches a model sample one batch after the other, and keeps counters and a reservoir.

    Hand `begin_batch` the images, pass the collector as observer and its `begin_step` as step watcher, and put into
    `final` (images, C, S, S) what came out.
    """

    def __init__(self, model: Denoiser, spec: SampleSpec, bins: int, selection: Selection) -> None:
        self.config, self.spec, self.bins = model.config, spec, bins
        self.counters = Counters(model.config, spec.images, bins, model.device)
        self.reservoir = Reservoir(selection, model.config.depth)
        side = model.config.input_size
        self.final = torch.zeros(spec.images, model.config.in_channels, side, side)
        self._batch: list[int] = []
        self._images: list[int] = []
        self._step = -1

    @property
    def bin(self) -> int:
        """The bin of the step at hand."""
        return step_bin(self._step, self.spec.steps, self.bins)

    def begin_batch(self, images: list[int]) -> None:
        """Start a batch of images by their indices."""
        self._batch, self._images, self._step = images, images, -1
        self.counters.begin_batch()

    def begin_step(self, z: Tensor, t: float) -> None:
        """Take note that the model is about to be shown z (N, C, H, W) at time t."""
        self._step += 1
        self.reservoir.begin_step(self._batch, self._step, self.bin, z, t)

    def select(self, start: int, stop: int) -> None:
        """The events that follow are of these images of the batch."""
        self._images = self._batch[start:stop]

    def __call__(self, event: MoEEvent) -> None:
        """Count one block's routing and keep its share of the reservoir."""
        if not bool(event.outputs.isfinite().all()):
            raise BadInputError(f"block {event.block} produced NaN or infinite values at step {self._step}")
        self.take(see(event, self._images, self.bin, self.config.num_experts))

    def take(self, seen: Seen) -> None:
        """Hand an event on to what collects it."""
        self.counters.add(seen)
        self.reservoir.keep(seen.event, self._images)

    def tensors(self) -> dict[str, Tensor]:
        """Return everything collected, under the names that profiles store it by."""
        return {**self.counters.tensors(), **self.reservoir.tensors(self.spec), "image.final": self.final}


class FullCollector(RoutingCollector):
    """Watches neurons, inputs and outputs too."""

    def __init__(self, model: Denoiser, spec: SampleSpec, bins: int, selection: Selection) -> None:
        super().__init__(model, spec, bins, selection)
        self.moments = Moments(model.config, bins, model.device)

    def neurons(self, block: int, expert: int, weights: Tensor, activations: Tensor) -> None:
        """Add one expert's neurons."""
        self.moments.neurons(block, expert, weights, activations)

    def take(self, seen: Seen) -> None:
        """Count, keep, and add to the moments."""
        super().take(seen)
        self.moments.add(seen)

    def tensors(self) -> dict[str, Tensor]:
        """Return everything collected, under the names that profiles store it by."""
        return {**super().tensors(), **self.moments.tensors()}


def check_settings(spec: SampleSpec, bins: int, reservoir: int) -> None:
    """Raise `UsageError` for steps that cannot be followed, more bins than steps, or a negative reservoir."""
    check_followable(spec)
    if not 1 <= bins <= spec.steps:
        raise UsageError(f"--bins {bins}: must be between 1 and the {spec.steps} steps")
    if reservoir < 0:
        raise UsageError(f"--reservoir {reservoir}: must be at least 0 tokens")


def collect(
    model: DiTMoE | OffloadedDiTMoE,
    spec: SampleSpec,
    bins: int,
    reservoir: int,
    batch: int,
    progress: Callable[[int], None],
    clean: Tensor | None = None,
    fast: bool = False,
    share: Share = WHOLE,
) -> dict[str, Tensor] | None:
    """Sample `spec`'s images, or noise the given `clean` ones (N, C, S, S), and return the profile's tensors.

    `fast` leaves out the moments and the reservoir. `progress` is told the images of each step. An offloaded model is
    given all images at once, and divides them into micro-batches of its own. Where several processes share the work,
    rank 0 returns everybody's tensors and the others None.
    """
    selection = select_states(spec, bins, model.config.num_patches, 0 if fast else reservoir)
    collector = (RoutingCollector if fast else FullCollector)(model, spec, bins, selection)
    size = spec.images if isinstance(model, OffloadedDiTMoE) else batch
    dealt = list(batches(spec.images, size))
    for indices in share.of(dealt):
        watch_batch(model, spec, indices, collector, progress, clean)
    odd_rank = rank_of_other_threads(share)
    tensors = merged(share, collector.tensors())
    if tensors is None:
        return None
    if odd_rank is not None and odd_rank < len(dealt):
        again = RoutingCollector(model, spec, bins, Selection({}, {}))
        watch_batch(model, spec, dealt[odd_rank], again, lambda _: None, clean)
        tensors["flip_rate"] = flip_rate(tensors, again.tensors(), dealt[odd_rank])
    return with_similarities(model, tensors, bins)


def watch_batch(
    model: Denoiser,
    spec: SampleSpec,
    indices: range,
    collector: RoutingCollector,
    progress: Callable[[int], None],
    clean: Tensor | None,
) -> None:
    """Let a collector watch the images `indices` being sampled, or their clean versions noised."""
    collector.begin_batch(list(indices))

    def on_step(z: Tensor, t: float) -> None:
        collector.begin_step(z, t)
        progress(len(z))

    if clean is None:
        collector.final[indices] = sample_batch(model, spec, indices, collector, on_step, PURPOSE).cpu()
    else:
        final = clean[indices.start : indices.stop]
        visit_noised(model, spec, indices, final, collector, on_step, PURPOSE)
        collector.final[indices] = final


def flip_rate(merged_tensors: dict[str, Tensor], again: dict[str, Tensor], indices: range) -> Tensor:
    """Return the share of choices, at the images `indices`, that came out differently on this process: at least that
    many near-ties of the top-k were tipped by rounding.

    Counted as half the L1 distance of the tables by image and position over their sum.
    """
    mine, theirs = (tensors["image.positions"][list(indices)].double() for tensors in (again, merged_tensors))
    return (mine - theirs).abs().sum() / 2 / theirs.sum()
