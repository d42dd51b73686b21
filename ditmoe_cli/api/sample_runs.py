"""Images of a checkpoint, sampled or found where an earlier run wrote them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ditmoe_cli.api.foretelling import foretell
from ditmoe_cli.api.guiding_requests import Guiding, sampling_work
from ditmoe_cli.api.notes import note
from ditmoe_cli.api.output_names import FileDestination
from ditmoe_cli.api.sampling_requests import Accelerating, ImageSampling, Running, samples_label
from ditmoe_cli.briefs import Brief, Fact
from ditmoe_cli.diffusion.compute_schedule import ComputeSchedule
from ditmoe_cli.diffusion.sampling import SampleSpec
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.processes import first_process

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ditmoe_cli.evaluation.computed_share import Computed
    from ditmoe_cli.evaluation.samples import Sampling, Targets


@dataclass(frozen=True)
class ImageFiles(FileDestination):
    """The samples file, and the other files that hold the same images."""

    png: Path | None = None
    npz: Path | None = None
    grid: Path | None = None

    def targets(self, checkpoint: Path, label: str, inputs: tuple[Path, ...]) -> Targets:
        """Return the same as the sampler takes them; `label` ends the default name, `inputs` stay as they are."""
        from ditmoe_cli.evaluation.samples import Targets

        file = self.at(checkpoint, label)
        return Targets(file, png=self.png, npz=self.npz, grid=self.grid, force=self.force, inputs=inputs)


@dataclass(frozen=True, repr=False)
class SampledImages(Brief):
    """Samples of a checkpoint in a file.

    Attributes:
        path: the safetensors file.
        bytes: its size.
        kind: ``images``, uint8 of shape (N, H, W, C), or ``latents``, fp32 of shape (N, C, S, S).
        shape: of one sample.
        spec: how they were sampled.
        vae: what decoded them; None for models of pixels, and for latents.
        exports: other files that hold the same images, by kind: png, npz or grid.
        computed: what a schedule computed of them, and kept; None without a schedule.
    """

    path: Path
    bytes: int
    kind: Literal["images", "latents"]
    shape: tuple[int, int, int]
    spec: SampleSpec
    vae: Mapping[str, Any] | None
    exports: Mapping[str, Path]
    computed: Computed | None = None

    @cached_property
    def values(self) -> NDArray[Any]:
        """The images or latents as an array of `kind`, read when they are asked for."""
        from safetensors.numpy import load_file

        return load_file(self.path)[self.kind]

    @property
    def nfe(self) -> int:
        """Evaluations of the network that an image took."""
        return self.spec.nfe if self.computed is None else self.computed.nfe

    def _brief(self) -> list[Fact]:
        spec = self.spec
        return [
            ("", self.path),
            (self.kind, f"{spec.images} of {' x '.join(map(str, self.shape))}"),
            ("solver", f"{spec.solver}, {spec.steps} steps, cfg {spec.cfg:g}, {self.nfe} NFE an image"),
            *([("schedule", self.computed.told)] if self.computed else []),
            ("seed", spec.seed),
            *((kind, path) for kind, path in self.exports.items()),
        ]

    def _repr_html_(self) -> str:
        is_there = self.kind == "images" and self.path.is_file()
        return super()._repr_html_() + (f"<br>{self._picture()}" if is_there else "")

    def _picture(self) -> str:
        """Return the first images in one picture, as HTML that holds it."""
        import base64

        from ditmoe_cli.evaluation.image_grids import png_bytes, sample_grid

        text = base64.b64encode(png_bytes(sample_grid(self.values))).decode()
        return f'<img alt="samples" src="data:image/png;base64,{text}">'

    def to_json(self) -> dict[str, Any]:
        """Return size, spec, NFE, VAE and files by name, and what a schedule computed."""
        paths = {name: str(self.exports[name].absolute()) if name in self.exports else None for name in _EXPORTS}
        computed = {"computed": self.computed.to_json()} if self.computed else {}
        told = {"bytes": self.bytes, "spec": self.spec.conditions(), "nfe": self.nfe, **computed}
        return {**told, "vae": self.vae, **paths}


_EXPORTS = ("png", "npz", "grid")


def sampled(
    checkpoint: Checkpoint,
    sampling: ImageSampling,
    guiding: Guiding,
    running: Accelerating,
    to: ImageFiles,
    schedule: ComputeSchedule | None = None,
) -> SampledImages | None:
    """Sample a checkpoint, by a schedule if any, unless the same was sampled before.

    None in all processes but the first, which writes.
    """
    running.check(schedule)
    guided = guiding.of(schedule)
    spec = guided.over(sampling.on(running.device, schedule=schedule))(checkpoint).by(schedule, checkpoint)
    from ditmoe_cli.evaluation.samples import Sampling, check_targets, open_decoder, read_computed

    vae = sampling.vae
    label = samples_label(spec, sampling, checkpoint)
    targets = to.targets(checkpoint.path, label, (Path(vae).expanduser(),) if vae is not None else ())
    images = Sampling(checkpoint, spec, weak=guided.weak, schedule=schedule)
    check_targets(images, targets, will_decode=vae is not None)
    if vae is not None:
        images = replace(images, decoder=open_decoder(checkpoint, vae, running.runtime.device))
    size = write_or_reuse(images, running, targets, guided)
    if size is None:
        return None
    return SampledImages(
        path=targets.file,
        bytes=size,
        kind="images" if images.images else "latents",
        shape=images.shape,
        spec=spec,
        vae=images.decoder.to_json() if images.decoder else None,
        exports=targets.exports,
        computed=read_computed(targets.file),
    )


def write_or_reuse(images: Sampling, running: Running, targets: Targets, guiding: Guiding) -> int | None:
    """Return the bytes of the samples file, which an earlier run may have written; None where another rank prints.

    Torch is not imported where samples of pixels are there already.
    """
    from ditmoe_cli.evaluation.samples import check_targets, complete_samples, is_made, write_samples

    if not is_made(images, targets):
        runtime = running.runtime
        expected = sampling_work(images.checkpoint, images.spec, runtime.batch, guiding)
        foretell([expected], lambda: runtime.device)
        return write_samples(images, runtime, targets, note)
    check_targets(images, targets)
    return complete_samples(images, targets, note) if first_process() else None
