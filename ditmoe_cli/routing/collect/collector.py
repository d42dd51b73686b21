"""Collecting a profile: the model samples, and the routing of every mixture is counted.

Counters take every token of every trajectory. A state (z_t, t, y) is kept for each image and step bin of a part of the
images, and a fixed choice of its tokens enters the reservoir: the same tokens in every block, conditional and
unconditional ones paired.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ditmoe_cli.diffusion.predictor import Predictor
from ditmoe_cli.diffusion.sampling import SampleSpec, batches, sample_batch, visit_noised
from ditmoe_cli.diffusion.step_bins import step_bin
from ditmoe_cli.diffusion.watchers import Watchers
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.workfolder import WorkFolder
from ditmoe_cli.model.dit import Denoiser, DiTMoE
from ditmoe_cli.model.moe import MoEEvent
from ditmoe_cli.model.offload import OffloadedDiTMoE
from ditmoe_cli.processes import WHOLE, Share
from ditmoe_cli.progress import Phase, phase
from ditmoe_cli.routing.calibration_settings import Calibration
from ditmoe_cli.routing.collect.batch_events import BatchEvent, batch_event
from ditmoe_cli.routing.collect.counters import Counters
from ditmoe_cli.routing.collect.kept_steps import KeptSteps
from ditmoe_cli.routing.collect.moments import Moments
from ditmoe_cli.routing.collect.ranks import gather_merged, rank_of_other_threads
from ditmoe_cli.routing.collect.reservoir import Reservoir, Selection, select_states
from ditmoe_cli.routing.collect.shared_inputs import with_similarities

# calibration noise is never the noise that images are evaluated on, whatever the seeds
PURPOSE = "calibration"


class RoutingCollector:
    """Observer of a model that samples one batch after the other; keeps counters and a reservoir.

    Call `begin_batch` with the images, pass the collector as observer and its `begin_step` as step watcher, and store
    the batch's result in `final` (images, C, S, S).
    """

    def __init__(self, model: Denoiser, spec: SampleSpec, bins: int, selection: Selection) -> None:
        self.config, self.spec, self.bins = model.config, spec, bins
        self.counters = Counters(model.config, spec.images, bins, model.device)
        self.reservoir = Reservoir(selection, model.config.depth)
        side = model.config.input_size
        self.final = torch.zeros(spec.images, model.config.in_channels, side, side)
        self._finite = torch.ones(model.config.depth, dtype=torch.bool, device=model.device)
        self._batch = self._images = range(0)
        self._step = -1
        self.passed: Callable[[int], None] = lambda _: None
        """Is told each block that a step has passed."""

    @property
    def bin(self) -> int:
        """Return the bin of the current step."""
        return step_bin(self._step, self.spec.steps, self.bins)

    def begin_batch(self, images: range) -> None:
        """Start a batch of images by their indices."""
        self._batch, self._images, self._step = images, images, -1
        self.counters.begin_batch()

    def live(self) -> dict[str, Tensor]:
        """Return what every step changes, under the names that profiles store it by."""
        return {**self.counters.live(), "image.final": self.final}

    def go_on(self, step: int, before: dict[str, Tensor]) -> None:
        """Take the batch that has begun as far as behind `step` - 1; `before` are the choices there."""
        self._step = step - 1
        self.counters.set_before(before)

    def begin_step(self, z: Tensor, t: float) -> None:
        """Start a step, at which the model is given z (N, C, H, W) at time t."""
        self._step += 1
        self.reservoir.begin_step(self._batch, self._step, self.bin, z, t)

    def select(self, start: int, stop: int) -> None:
        """Take the events that follow as those of images start..stop of the batch."""
        self._images = self._batch[start:stop]

    def __call__(self, event: MoEEvent) -> None:
        """Collect one block's event."""
        batch = batch_event(event, self._images, self.bin, self.config.num_experts)
        self._finite[event.block] &= batch.raw_norms.isfinite().all()
        self.add(batch)
        self.passed(event.block)

    def check(self) -> None:
        """Raise `BadInputError` where an output of this step was NaN or infinite, naming the first block.

        The device is waited for once a step, not in each block.
        """
        if not bool(self._finite.all()):
            block = self._finite.int().argmin()
            raise BadInputError(f"block {int(block)} produced NaN or infinite values at step {self._step}")

    def add(self, batch: BatchEvent) -> None:
        """Count the batch's routing and keep its share of the reservoir."""
        self.counters.add(batch)
        self.reservoir.keep(batch.event, batch.images)

    def tensors(self) -> dict[str, Tensor]:
        """Return everything collected, under the names that profiles store it by."""
        return {**self.counters.tensors(), **self.reservoir.tensors(self.spec), "image.final": self.final}


class FullCollector(RoutingCollector):
    """Collector of the moments of neurons, inputs and outputs too."""

    def __init__(self, model: Denoiser, spec: SampleSpec, bins: int, selection: Selection) -> None:
        super().__init__(model, spec, bins, selection)
        self.moments = Moments(model.config, bins, model.device)

    def live(self) -> dict[str, Tensor]:
        """Return what every step changes, under the names that profiles store it by."""
        return {**super().live(), **self.moments.live()}

    def neurons(self, block: int, expert: int, weights: Tensor, activations: Tensor) -> None:
        """Add one expert's neurons to the moments."""
        self.moments.add_neurons(block, expert, weights, activations)

    def add(self, batch: BatchEvent) -> None:
        """Count, keep, and add to the moments."""
        super().add(batch)
        self.moments.add(batch)

    def tensors(self) -> dict[str, Tensor]:
        """Return everything collected, under the names that profiles store it by."""
        return {**super().tensors(), **self.moments.tensors()}


def collect(
    model: DiTMoE | OffloadedDiTMoE,
    settings: Calibration,
    clean: Tensor | None = None,
    share: Share = WHOLE,
    work: WorkFolder | None = None,
    title: str = "profiling",
) -> dict[str, Tensor] | None:
    """Sample the images of `settings`, or noise `clean` ones (N, C, S, S), and return the profile's tensors.

    That is a phase of the `title`, which counts steps of images, and one that compares experts. An offloaded model
    takes all images at once, and divides them into micro-batches of its own. Where several processes share the work,
    rank 0 returns the tensors of all and the others None. What is done is kept in `work`, and gone on from there.
    """
    spec, bins = settings.spec, settings.bins
    selection = select_states(spec, bins, model.config.num_patches, 0 if settings.fast else settings.reservoir)
    collector = (RoutingCollector if settings.fast else FullCollector)(model, spec, bins, selection)
    size = spec.images if isinstance(model, OffloadedDiTMoE) else settings.batch
    dealt = list(batches(spec.images, size))
    own = share.of(dealt)
    kept = KeptSteps(work, collector, len(own), spec.steps) if work is not None else None
    with phase(title, sum(map(len, own)) * spec.steps, "steps") as progress:
        for number, indices in enumerate(own):
            if kept is not None and number < kept.batch:
                _taken_up(progress, len(indices) * spec.steps)
                continue
            watch_batch(model, collector, indices, progress, clean, kept)
    odd_rank = rank_of_other_threads(share)
    tensors = gather_merged(share, collector.tensors())
    if tensors is None:
        return None
    if odd_rank is not None and odd_rank < len(dealt):
        again = RoutingCollector(model, spec, bins, Selection({}, {}))
        indices = dealt[odd_rank]
        with phase("measuring how rounding routes", len(indices) * spec.steps, "steps") as progress:
            watch_batch(model, again, indices, progress, clean)
        tensors["flip_rate"] = flip_rate(tensors, again.tensors(), indices)
    return with_similarities(model, tensors, bins, work)


def _taken_up(progress: Phase, units: int) -> None:
    """Count units that an earlier run had done; the time that is left is told from the others."""
    progress(units)
    progress.start += units


def watch_batch(
    model: Denoiser,
    collector: RoutingCollector,
    indices: range,
    progress: Phase,
    clean: Tensor | None,
    kept: KeptSteps | None = None,
) -> None:
    """Let a collector observe the images `indices` being sampled, or their `clean` versions being noised."""
    collector.begin_batch(indices)
    if kept is not None:
        _taken_up(progress, len(indices) * kept.begin_batch())

    def evaluated(predict: Predictor) -> Predictor:
        def step(x: Tensor, t: float) -> Tensor:
            with phase("evaluating", model.config.depth, "blocks", share=len(indices)) as blocks:
                collector.passed = lambda block: blocks(block + 1 - blocks.done)
                try:
                    output = predict(x, t)
                except BadInputError:
                    collector.check()  # which names the block where it began
                    raise
            collector.check()
            progress(len(indices))
            return output

        return kept.through(step) if kept is not None else step

    watchers = Watchers(collector, collector.begin_step, evaluated)
    if clean is None:
        collector.final[indices] = sample_batch(model, collector.spec, indices, watchers, PURPOSE).cpu()
    else:
        final = clean[indices.start : indices.stop]
        visit_noised(model, collector.spec, indices, final, watchers, PURPOSE)
        collector.final[indices] = final
    if kept is not None:
        kept.end_batch()


def flip_rate(merged: dict[str, Tensor], again: dict[str, Tensor], indices: range) -> Tensor:
    """Return the share of choices at the images `indices` that came out differently when rank 0 ran them again.

    It is half the L1 distance of the two tables by image and position over their sum, so at least that many near-ties
    of the top-k were tipped by rounding.
    """
    second, first = (tensors["image.positions"][list(indices)].double() for tensors in (again, merged))
    return (second - first).abs().sum() / 2 / first.sum()
