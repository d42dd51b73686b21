"""Checkpoints as folders of diffusers pipelines, with the code that runs them. Torch-free.

``transformer/`` holds the tensors as they are stored, packed ones too, under their own names, and so is a checkpoint as
ours are; ``config.json`` beside them has the shapes of all blocks and the format of each packed layer. The code is that
in `diffusers_code`, copied. ``scheduler/`` has a scheduler of diffusers whose steps are those of our solvers.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from ditmoe_cli.diffusion.schedule import TRAINING_STEPS, UPSTREAM
from ditmoe_cli.diffusion.vae import CONFIG_NAME, VAE_CLASS, WEIGHTS_NAME, vae_on_disk
from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.exporting.exported import CARD, Export, Wanted
from ditmoe_cli.exporting.recoded import Recoding
from ditmoe_cli.files.fingerprint import digest, file_digest
from ditmoe_cli.files.names import natural_key
from ditmoe_cli.files.provenance import Provenance
from ditmoe_cli.files.staging import staged
from ditmoe_cli.files.writer import Shard, file_bytes, index_text, plan_shards, pretty, write_files
from ditmoe_cli.model.checkpoint import UNREAD, Checkpoint, open_checkpoint
from ditmoe_cli.model.config import BlockConfig, DiTMoEConfig
from ditmoe_cli.model.conversions import with_positions
from ditmoe_cli.progress import BYTES, phase

OLDEST = "0.33.0"
"""The oldest diffusers that the code was run with."""
MODEL_CLASS, PIPELINE_CLASS = "DiTMoETransformer2DModel", "DiTMoEPipeline"
MODEL_CODE, PIPELINE_CODE = "modeling_ditmoe", "pipeline_ditmoe"
AUTO_MAP = {"AutoModel": f"{MODEL_CODE}.{MODEL_CLASS}"}
VAE, VAE_CHANNELS = "stabilityai/sd-vae-ft-mse", 4
_TARGET = "diffusers"
_CODE = Path(__file__).resolve().parent / "diffusers_code"
_STEPS = {"rf": UPSTREAM["rf"][1], "ddpm": 50}
_DISTILLED_TO = ("euler", "ddim-trailing")  # solvers that schedulers of diffusers have


def obstacle(checkpoint: Checkpoint) -> str | None:
    """Return what a pipeline of diffusers cannot express of a checkpoint, and what to do instead; None for nothing."""
    distilled = checkpoint.distilled
    if distilled is not None and distilled.solver not in _DISTILLED_TO:
        return (
            f"it was distilled to steps of {distilled.solver}, which no scheduler of diffusers takes; distil its "
            f"original to steps of {' or '.join(_DISTILLED_TO)}"
        )
    return None


def laid_out(checkpoint: Checkpoint, wanted: Wanted, tell: Callable[[str], None]) -> DiffusersFolder:
    """Lay a checkpoint out, whose position embedding is rebuilt where the file has none.

    Raises `UsageError` for a VAE of a model of pixels, and `BadInputError` as `vae_on_disk` does.
    """
    config, folder = checkpoint.config, None
    if wanted.vae is not None and config.pixel_space:
        raise UsageError(f"⟨vae⟩ {wanted.vae}: {checkpoint.name} makes pixels, which need none; leave it out")
    if wanted.vae is not None:
        folder = vae_on_disk(wanted.vae, config.in_channels)
    whole = with_positions(checkpoint)
    if whole is not checkpoint:
        tell("pos_embed is rebuilt, since the model of the folder has it in its weights")
    return DiffusersFolder(whole, wanted, folder)


@dataclass(frozen=True)
class DiffusersFolder(Export):
    """The folder of a checkpoint that ``DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`` opens.

    `vae` is the folder of the VAE that it holds a copy of, if any.
    """

    vae: Path | None = None

    contents: ClassVar[re.Pattern[str]] = re.compile(
        r"(transformer|scheduler|vae)/|README\.md|images\.png|model_index\.json|pipeline_ditmoe\.py|scheduler/scheduler_config\.json"
        r"|transformer/(config\.json|modeling_ditmoe\.py|diffusion_pytorch_model.*\.safetensors(\.index\.json)?)"
        r"|vae/(config\.json|diffusion_pytorch_model\.safetensors)"
    )

    @property
    def inputs(self) -> tuple[Path, ...]:
        """What is read, and must not be written."""
        return (self.checkpoint.path, *(self._copies.values()))

    @cached_property
    def _copies(self) -> Mapping[str, Path]:
        """The files of the VAE that are copied, by their paths in the folder."""
        names = () if self.vae is None else (CONFIG_NAME, WEIGHTS_NAME)
        return {f"vae/{name}": self.vae / name for name in names if self.vae is not None}

    @cached_property
    def recoding(self) -> Recoding:
        """The tensors of the model: those that are stored."""
        return Recoding(self.checkpoint)

    @property
    def model_settings(self) -> dict[str, Any]:
        """The ``config.json`` of the model."""
        return model_settings(self.checkpoint)

    @cached_property
    def _shards(self) -> list[Shard]:
        return plan_shards(self.recoding.tensors, self.wanted.shard_bytes)

    @cached_property
    def texts(self) -> Mapping[str, bytes]:
        """All files but those of weights and copies, by their paths in the folder."""
        index = index_text(self._shards)
        return {
            **self.wanted.card,
            "model_index.json": pretty(self._settings),
            f"{PIPELINE_CODE}.py": (_CODE / f"{PIPELINE_CODE}.py").read_bytes(),
            "scheduler/scheduler_config.json": pretty(scheduler_settings(self.checkpoint)),
            "transformer/config.json": pretty(self.model_settings),
            f"transformer/{MODEL_CODE}.py": (_CODE / f"{MODEL_CODE}.py").read_bytes(),
            **{f"transformer/{name}": text for name, text in index.items()},
        }

    def _provenance(self, fingerprint: str | None = None) -> Provenance:
        """Return the metadata of the weights; without the input's `fingerprint`, that is read where it is needed."""
        return self.copied_or_recorded(_TARGET, fingerprint)

    def options(self, target: str) -> dict[str, Any]:
        """Return the options that shape the files; the VAE by its name on the hub, or the digest of a copied one."""
        named = self._vae_digest if self.vae is not None else self.wanted.vae
        return {**super().options(target), **({} if named is None else {"vae": named})}

    @cached_property
    def _vae_digest(self) -> str:
        assert self.vae is not None
        return copied_vae_digest(self.vae)

    @property
    def nbytes(self) -> int:
        """The exact bytes of all files."""
        metadata = self._provenance(UNREAD).to_metadata
        weights = sum(file_bytes(shard.tensors, metadata) for shard in self._shards)
        copies = sum(file.stat().st_size for file in self._copies.values())
        return weights + copies + sum(map(len, self.texts.values()))

    def write(self) -> None:
        """Write all files, or none, by several threads that take a weight each.

        Raises `BadInputError` for NaN and infinite weights, and what `check_target` raises.
        """
        path, metadata = self.wanted.path, self._provenance(UNREAD).to_metadata
        total = sum(info.nbytes for shard in self._shards for info in shard.tensors)
        with (
            staged(path, self.wanted.force, self.inputs, self.contents) as staging,
            phase(f"writing {path.name}", total, BYTES) as progress,
        ):
            for name, text in self.texts.items():
                (staging / name).parent.mkdir(parents=True, exist_ok=True)
                (staging / name).write_bytes(text)
            for name, file in self._copies.items():
                (staging / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(file, staging / name)
            files = {staging / "transformer" / shard.name: shard.tensors for shard in self._shards}
            write_files(files, self.recoding.jobs(progress), metadata, lambda: self._provenance().to_metadata)

    def difference(self) -> str | None:
        """Return how what stands at the path differs; None where files, tensors and history are the same."""
        folder = self.wanted.path
        try:
            held = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} - {CARD}
            texts = {name: text for name, text in self.texts.items() if name != CARD}  # which may have been edited
            if held != {*texts, *self._copies, *(f"transformer/{shard.name}" for shard in self._shards)}:
                return "is no such folder"
            changed = next((name for name, text in texts.items() if (folder / name).read_bytes() != text), None)
            if changed is None:
                copies = self._copies.items()
                changed = next((name for name, file in copies if file_digest(folder / name) != file_digest(file)), None)
            if changed is not None:
                return f"its {changed} is another"
            same = self.holds_input(folder / "transformer")
        except (BadInputError, OSError):
            return "cannot be read as one"
        return None if same else "is no copy of this input"

    def holds_input(self, model: Path) -> bool:
        """Return whether the folder of a model has this export's tensors and history. Raises `BadInputError`."""
        made = open_checkpoint(model)
        return made.header.provenance == self._provenance() and made.fingerprint == self.checkpoint.fingerprint

    @property
    def _settings(self) -> dict[str, Any]:
        """What ``model_index.json`` says."""
        repository = self.wanted.vae or (VAE if self.checkpoint.config.in_channels == VAE_CHANNELS else None)
        return pipeline_settings(self.checkpoint, None if self.vae is not None else repository, self.vae is not None)

    def facts(self) -> dict[str, Any]:
        """Return steps and scheduler of the pipeline, and the diffusers that it needs."""
        settings = self._settings
        return {
            "scheduler": settings["scheduler"][1],
            "steps": settings["num_inference_steps"],
            "distilled": settings["distilled"],
            "vae": str(self.vae) if self.vae is not None else settings["vae_repository"],
            "diffusers": OLDEST,
            "packed": {name: len(layers) for name, layers in packed_layers(self.checkpoint).items()},
        }

    def usage(self) -> Sequence[tuple[str, str]]:
        """Return how to open and sample it."""
        steps = self._settings["num_inference_steps"]
        opened = f"DiffusionPipeline.from_pretrained({str(self.wanted.path)!r}, trust_remote_code=True)"
        return [("open with", opened), ("sample with", f"pipeline(class_labels=[0]), {steps} steps by default")]


def copied_vae_digest(folder: Path) -> str:
    """Return the SHA-256 of the names and digests of the files of a VAE that exports copy."""
    return digest([[name, file_digest(folder / name)] for name in (CONFIG_NAME, WEIGHTS_NAME)])


def model_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return ``config.json`` of the model: the arguments of its class."""
    config = checkpoint.config
    own = {field.name: getattr(config, field.name) for field in fields(DiTMoEConfig)}
    del own["depth"], own["blocks"]
    return {
        "_class_name": MODEL_CLASS,
        "_diffusers_version": OLDEST,
        "auto_map": AUTO_MAP,
        **own,
        "mixtures": [_mixture_settings(block) for block in config.blocks],
        "packed": packed_layers(checkpoint),
    }


def _mixture_settings(block: BlockConfig) -> dict[str, Any]:
    """Return what the mixture of a block has, without what it has not."""
    return {name: value for name, value in asdict(block).items() if value}


def packed_layers(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """Return the names of the layers that are stored in each format."""
    layers: dict[str, list[str]] = {}
    for name, weight in checkpoint.weights.items():
        if weight.format is not None:
            layers.setdefault(weight.format, []).append(name.removesuffix(".weight"))
    return {fmt: sorted(names, key=natural_key) for fmt, names in sorted(layers.items())}


def scheduler_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return ``scheduler_config.json``.

    Rectified flow takes equal Euler steps, unshifted. DDPM takes DDIM steps (eta 0) from timestep 999; where those of a
    distilled model do not divide 1,000, diffusers' DDIM would miss their ends, and DPM-Solver++ of order 1, which is
    DDIM too, takes them.
    """
    if checkpoint.config.sampler == "rf":
        own = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0, "use_dynamic_shifting": False}
    else:
        own = {
            "_class_name": "DDIMScheduler",
            "beta_start": 1e-4,
            "beta_end": 2e-2,
            "beta_schedule": "linear",
            "prediction_type": "epsilon",
            "timestep_spacing": "trailing",
            "clip_sample": False,
        }
        if checkpoint.distilled is not None and TRAINING_STEPS % checkpoint.distilled.steps:
            del own["clip_sample"]
            own |= {
                "_class_name": "DPMSolverMultistepScheduler",
                "algorithm_type": "dpmsolver++",
                "solver_order": 1,
                "final_sigmas_type": "zero",
            }
    return {**own, "_diffusers_version": OLDEST, "num_train_timesteps": TRAINING_STEPS}


def pipeline_settings(checkpoint: Checkpoint, repository: str | None, has_vae: bool) -> dict[str, Any]:
    """Return ``model_index.json``: the parts of the pipeline, and the arguments of its class.

    `repository` is the VAE on the hub that decodes latents where the folder has none.
    """
    config, distilled = checkpoint.config, checkpoint.distilled
    return {
        "_class_name": [PIPELINE_CODE, PIPELINE_CLASS],
        "_diffusers_version": OLDEST,
        "transformer": [MODEL_CODE, MODEL_CLASS],
        "scheduler": ["diffusers", scheduler_settings(checkpoint)["_class_name"]],
        "vae": ["diffusers", VAE_CLASS] if has_vae else [None, None],
        "num_inference_steps": _STEPS[config.sampler] if distilled is None else distilled.steps,
        "distilled": distilled is not None,
        "vae_repository": repository,
        "auto_map": AUTO_MAP,
    }
