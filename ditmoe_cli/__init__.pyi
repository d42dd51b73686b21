# The types of what `import ditmoe_cli` offers, for type checkers; written by tests/api/test_public_types.py.
# fmt: off
# ruff: noqa
from collections.abc import Mapping
from collections.abc import Sequence
from ditmoe_cli.api.calling import AnyCheckpoint
from ditmoe_cli.api.calling import AnyPath
from ditmoe_cli.api.calling import Count
from ditmoe_cli.api.calling import Device
from ditmoe_cli.api.calling import NamedDtype
from ditmoe_cli.api.calling import Seed
from ditmoe_cli.api.checkpoint_files import Cast
from ditmoe_cli.api.export_runs import ExportedCheckpoint
from ditmoe_cli.api.export_runs import ForeseenExport
from ditmoe_cli.api.inspection_runs import DifferingCheckpoints
from ditmoe_cli.api.inspection_runs import InspectedCheckpoint
from ditmoe_cli.api.inspection_runs import InspectedTensors
from ditmoe_cli.api.measurements import OneFile
from ditmoe_cli.api.measurements import Picture
from ditmoe_cli.api.model_cards import Measurement
from ditmoe_cli.api.planners import AnySize
from ditmoe_cli.api.planners import Width
from ditmoe_cli.api.planning_requests import AnyProfile
from ditmoe_cli.api.sample_runs import SampledImages
from ditmoe_cli.api.schedule_runs import ForeseenSchedule
from ditmoe_cli.api.schedule_runs import MadeSchedule
from ditmoe_cli.api.sensitivity_runs import ForeseenMap
from ditmoe_cli.api.training_runs import ForeseenTraining
from ditmoe_cli.api.training_runs import TrainedCheckpoint
from ditmoe_cli.api.written_checkpoints import ForeseenCheckpoint
from ditmoe_cli.api.written_checkpoints import WrittenCheckpoint
from ditmoe_cli.compression.plan import CompressionPlan
from ditmoe_cli.routing.sensitivity.sensitivity_map import SensitivityMap
from typing import Literal
from typing import overload
from ditmoe_cli.api.calling import quiet as quiet
from ditmoe_cli.api.measurements import bench as bench
from ditmoe_cli.api.measurements import compare as compare
from ditmoe_cli.api.measurements import profile as profile
from ditmoe_cli.api.measurements import report as report
from ditmoe_cli.api.measurements import sample as sample
from ditmoe_cli.api.measurements import score as score
from ditmoe_cli.api.opening import load_model as load_model
from ditmoe_cli.api.opening import open_checkpoint as open_checkpoint
from ditmoe_cli.api.opening import read_profile as read_profile
from ditmoe_cli.api.planners import size_curve as size_curve
from ditmoe_cli.errors import DitmoeError as DitmoeError
from ditmoe_cli.version import __version__ as __version__

@overload
def apply(
    checkpoint: AnyCheckpoint, plan: CompressionPlan | AnyPath, *, profile: AnyProfile | None = None, clock:
    Sequence[int] | None = None, device: Device = 'auto', output: AnyPath | None = None, force: bool = False,
    max_shard_size: AnySize = '10GB', dry_run: Literal[False] = False,
) -> WrittenCheckpoint: ...
@overload
def apply(
    checkpoint: AnyCheckpoint, plan: CompressionPlan | AnyPath, *, profile: AnyProfile | None = None, clock:
    Sequence[int] | None = None, device: Device = 'auto', output: AnyPath | None = None, force: bool = False,
    max_shard_size: AnySize = '10GB', dry_run: Literal[True],
) -> WrittenCheckpoint | ForeseenCheckpoint: ...
@overload
def apply(
    checkpoint: AnyCheckpoint, plan: CompressionPlan | AnyPath, *, profile: AnyProfile | None = None, clock:
    Sequence[int] | None = None, device: Device = 'auto', output: AnyPath | None = None, force: bool = False,
    max_shard_size: AnySize = '10GB', dry_run: bool,
) -> WrittenCheckpoint | ForeseenCheckpoint: ...

@overload
def compress(
    checkpoint: AnyCheckpoint, *, size: AnySize | None = None, ratio: float | None = None, max_damage: float | None
    = None, allow: Sequence[Width] = ('2', '3', '4', '5', '6', '8', '16'), floor: Mapping[str, float] | None = None,
    protect: Sequence[str] = (), tie: Sequence[str] = (), heal: bool = False, steps: Count | None = None, minutes:
    float = 10.0, clock: Sequence[int] | None = None, target: str | None = None, profile: AnyProfile | None = None,
    device: Device = 'auto', dtype: NamedDtype = 'auto', calibration_cfg: float | None = None, calibration_steps:
    int | None = None, calibration_images: int | None = None, calibration_data: AnyPath | None = None,
    calibration_classes: Sequence[int] | None = None, calibration_seed: Seed | None = None, output: AnyPath | None =
    None, force: bool = False, max_shard_size: AnySize = '10GB', dry_run: Literal[False] = False,
) -> WrittenCheckpoint: ...
@overload
def compress(
    checkpoint: AnyCheckpoint, *, size: AnySize | None = None, ratio: float | None = None, max_damage: float | None
    = None, allow: Sequence[Width] = ('2', '3', '4', '5', '6', '8', '16'), floor: Mapping[str, float] | None = None,
    protect: Sequence[str] = (), tie: Sequence[str] = (), heal: bool = False, steps: Count | None = None, minutes:
    float = 10.0, clock: Sequence[int] | None = None, target: str | None = None, profile: AnyProfile | None = None,
    device: Device = 'auto', dtype: NamedDtype = 'auto', calibration_cfg: float | None = None, calibration_steps:
    int | None = None, calibration_images: int | None = None, calibration_data: AnyPath | None = None,
    calibration_classes: Sequence[int] | None = None, calibration_seed: Seed | None = None, output: AnyPath | None =
    None, force: bool = False, max_shard_size: AnySize = '10GB', dry_run: Literal[True],
) -> WrittenCheckpoint | ForeseenCheckpoint: ...
@overload
def compress(
    checkpoint: AnyCheckpoint, *, size: AnySize | None = None, ratio: float | None = None, max_damage: float | None
    = None, allow: Sequence[Width] = ('2', '3', '4', '5', '6', '8', '16'), floor: Mapping[str, float] | None = None,
    protect: Sequence[str] = (), tie: Sequence[str] = (), heal: bool = False, steps: Count | None = None, minutes:
    float = 10.0, clock: Sequence[int] | None = None, target: str | None = None, profile: AnyProfile | None = None,
    device: Device = 'auto', dtype: NamedDtype = 'auto', calibration_cfg: float | None = None, calibration_steps:
    int | None = None, calibration_images: int | None = None, calibration_data: AnyPath | None = None,
    calibration_classes: Sequence[int] | None = None, calibration_seed: Seed | None = None, output: AnyPath | None =
    None, force: bool = False, max_shard_size: AnySize = '10GB', dry_run: bool,
) -> WrittenCheckpoint | ForeseenCheckpoint: ...

@overload
def convert(
    checkpoint: AnyCheckpoint, *, dtype: Cast | None = None, dequantize: bool = False, from_diffusers: bool = False,
    output: AnyPath | None = None, force: bool = False, max_shard_size: int | str = '10GB', dry_run: Literal[False]
    = False,
) -> WrittenCheckpoint: ...
@overload
def convert(
    checkpoint: AnyCheckpoint, *, dtype: Cast | None = None, dequantize: bool = False, from_diffusers: bool = False,
    output: AnyPath | None = None, force: bool = False, max_shard_size: int | str = '10GB', dry_run: Literal[True],
) -> WrittenCheckpoint | ForeseenCheckpoint: ...
@overload
def convert(
    checkpoint: AnyCheckpoint, *, dtype: Cast | None = None, dequantize: bool = False, from_diffusers: bool = False,
    output: AnyPath | None = None, force: bool = False, max_shard_size: int | str = '10GB', dry_run: bool,
) -> WrittenCheckpoint | ForeseenCheckpoint: ...

@overload
def distill(
    checkpoint: AnyCheckpoint, *, original: AnyCheckpoint, steps: Count = 4, cfg: float = 1.0, minutes: float | None
    = None, iterations: int | None = None, clock: Sequence[int] | None = None, teacher_steps: Count | None = None,
    states: Literal['teacher', 'own'] = 'teacher', progressive: bool = False, train: str | Sequence[str] = 'all',
    codes: Literal['fixed', 'learn'] = 'fixed', batch: Count = 128, rate: float | None = None, seed: Seed = 0,
    guide_with: AnyCheckpoint | None = None, guide_by: Literal['top1', 'rank2'] | None = None, guide_scale: float |
    None = None, guide_interval: Sequence[float] | None = None, device: Device = 'auto', dtype: NamedDtype = 'auto',
    output: AnyPath | None = None, force: bool = False, max_shard_size: int | str = '10GB', dry_run: Literal[False]
    = False,
) -> TrainedCheckpoint: ...
@overload
def distill(
    checkpoint: AnyCheckpoint, *, original: AnyCheckpoint, steps: Count = 4, cfg: float = 1.0, minutes: float | None
    = None, iterations: int | None = None, clock: Sequence[int] | None = None, teacher_steps: Count | None = None,
    states: Literal['teacher', 'own'] = 'teacher', progressive: bool = False, train: str | Sequence[str] = 'all',
    codes: Literal['fixed', 'learn'] = 'fixed', batch: Count = 128, rate: float | None = None, seed: Seed = 0,
    guide_with: AnyCheckpoint | None = None, guide_by: Literal['top1', 'rank2'] | None = None, guide_scale: float |
    None = None, guide_interval: Sequence[float] | None = None, device: Device = 'auto', dtype: NamedDtype = 'auto',
    output: AnyPath | None = None, force: bool = False, max_shard_size: int | str = '10GB', dry_run: Literal[True],
) -> TrainedCheckpoint | ForeseenTraining: ...
@overload
def distill(
    checkpoint: AnyCheckpoint, *, original: AnyCheckpoint, steps: Count = 4, cfg: float = 1.0, minutes: float | None
    = None, iterations: int | None = None, clock: Sequence[int] | None = None, teacher_steps: Count | None = None,
    states: Literal['teacher', 'own'] = 'teacher', progressive: bool = False, train: str | Sequence[str] = 'all',
    codes: Literal['fixed', 'learn'] = 'fixed', batch: Count = 128, rate: float | None = None, seed: Seed = 0,
    guide_with: AnyCheckpoint | None = None, guide_by: Literal['top1', 'rank2'] | None = None, guide_scale: float |
    None = None, guide_interval: Sequence[float] | None = None, device: Device = 'auto', dtype: NamedDtype = 'auto',
    output: AnyPath | None = None, force: bool = False, max_shard_size: int | str = '10GB', dry_run: bool,
) -> TrainedCheckpoint | ForeseenTraining: ...

@overload
def export(
    checkpoint: AnyCheckpoint, *, to: str, dtype: Cast | None = None, dequantize: bool = False, scores:
    Sequence[AnyPath | Measurement] | None = None, picture: AnyPath | None = None, samples: Sequence[AnyPath |
    SampledImages] | None = None, output: AnyPath | None = None, force: bool = False, max_shard_size: int | str =
    '10GB', vae: str | None = None, dry_run: Literal[False] = False,
) -> ExportedCheckpoint: ...
@overload
def export(
    checkpoint: AnyCheckpoint, *, to: str, dtype: Cast | None = None, dequantize: bool = False, scores:
    Sequence[AnyPath | Measurement] | None = None, picture: AnyPath | None = None, samples: Sequence[AnyPath |
    SampledImages] | None = None, output: AnyPath | None = None, force: bool = False, max_shard_size: int | str =
    '10GB', vae: str | None = None, dry_run: Literal[True],
) -> ExportedCheckpoint | ForeseenExport: ...
@overload
def export(
    checkpoint: AnyCheckpoint, *, to: str, dtype: Cast | None = None, dequantize: bool = False, scores:
    Sequence[AnyPath | Measurement] | None = None, picture: AnyPath | None = None, samples: Sequence[AnyPath |
    SampledImages] | None = None, output: AnyPath | None = None, force: bool = False, max_shard_size: int | str =
    '10GB', vae: str | None = None, dry_run: bool,
) -> ExportedCheckpoint | ForeseenExport: ...

@overload
def heal(
    checkpoint: AnyCheckpoint, *, original: AnyCheckpoint, minutes: float | None = None, steps: int | None = None,
    clock: Sequence[int] | None = None, train: str | Sequence[str] = 'all', codes: Literal['fixed', 'learn'] =
    'fixed', scope: Literal['auto', 'block', 'model'] = 'auto', batch: Count = 128, rate: float | None = None, seed:
    Seed = 0, profile: AnyProfile | None = None, device: Device = 'auto', dtype: NamedDtype = 'auto',
    calibration_cfg: float | None = None, calibration_steps: int | None = None, calibration_images: int | None =
    None, calibration_data: AnyPath | None = None, calibration_classes: Sequence[int] | None = None,
    calibration_seed: Seed | None = None, output: AnyPath | None = None, force: bool = False, max_shard_size: int |
    str = '10GB', dry_run: Literal[False] = False,
) -> TrainedCheckpoint: ...
@overload
def heal(
    checkpoint: AnyCheckpoint, *, original: AnyCheckpoint, minutes: float | None = None, steps: int | None = None,
    clock: Sequence[int] | None = None, train: str | Sequence[str] = 'all', codes: Literal['fixed', 'learn'] =
    'fixed', scope: Literal['auto', 'block', 'model'] = 'auto', batch: Count = 128, rate: float | None = None, seed:
    Seed = 0, profile: AnyProfile | None = None, device: Device = 'auto', dtype: NamedDtype = 'auto',
    calibration_cfg: float | None = None, calibration_steps: int | None = None, calibration_images: int | None =
    None, calibration_data: AnyPath | None = None, calibration_classes: Sequence[int] | None = None,
    calibration_seed: Seed | None = None, output: AnyPath | None = None, force: bool = False, max_shard_size: int |
    str = '10GB', dry_run: Literal[True],
) -> TrainedCheckpoint | ForeseenTraining: ...
@overload
def heal(
    checkpoint: AnyCheckpoint, *, original: AnyCheckpoint, minutes: float | None = None, steps: int | None = None,
    clock: Sequence[int] | None = None, train: str | Sequence[str] = 'all', codes: Literal['fixed', 'learn'] =
    'fixed', scope: Literal['auto', 'block', 'model'] = 'auto', batch: Count = 128, rate: float | None = None, seed:
    Seed = 0, profile: AnyProfile | None = None, device: Device = 'auto', dtype: NamedDtype = 'auto',
    calibration_cfg: float | None = None, calibration_steps: int | None = None, calibration_images: int | None =
    None, calibration_data: AnyPath | None = None, calibration_classes: Sequence[int] | None = None,
    calibration_seed: Seed | None = None, output: AnyPath | None = None, force: bool = False, max_shard_size: int |
    str = '10GB', dry_run: bool,
) -> TrainedCheckpoint | ForeseenTraining: ...

@overload
def inspect(
    checkpoint: AnyCheckpoint, other: None = None, *, tensors: Literal[False] = False, card: AnyPath | None = None,
    scores: Sequence[AnyPath | Measurement] | None = None, picture: AnyPath | None = None, samples: Sequence[AnyPath
    | SampledImages] | None = None, force: bool = False, verify: bool = False, values: bool = False,
) -> InspectedCheckpoint: ...
@overload
def inspect(
    checkpoint: AnyCheckpoint, other: None = None, *, tensors: bool = False, card: AnyPath | None = None, scores:
    Sequence[AnyPath | Measurement] | None = None, picture: AnyPath | None = None, samples: Sequence[AnyPath |
    SampledImages] | None = None, force: bool = False, verify: bool = False, values: bool = False,
) -> InspectedCheckpoint | InspectedTensors: ...
@overload
def inspect(
    checkpoint: AnyCheckpoint, other: AnyCheckpoint, *, tensors: bool = False, card: AnyPath | None = None, scores:
    Sequence[AnyPath | Measurement] | None = None, picture: AnyPath | None = None, samples: Sequence[AnyPath |
    SampledImages] | None = None, force: bool = False, verify: bool = False, values: bool = False,
) -> DifferingCheckpoints: ...

@overload
def plan_merge(
    checkpoint: AnyCheckpoint, *, groups: float | int | str | None = None, method: str = 'm-smoe', router:
    Literal['map', 'slice'] = 'map', delta: Literal['svd', 'ternary'] | None = None, delta_ratio: float | None =
    None, refit: bool = True, refit_tokens: int = 0, profile: AnyProfile | None = None, device: Device = 'auto',
    dtype: NamedDtype = 'auto', calibration_cfg: float | None = None, calibration_steps: int | None = None,
    calibration_images: int | None = None, calibration_data: AnyPath | None = None, calibration_classes:
    Sequence[int] | None = None, calibration_seed: Seed | None = None, dry_run: Literal[False] = False,
) -> CompressionPlan: ...
@overload
def plan_merge(
    checkpoint: AnyCheckpoint, *, groups: float | int | str | None = None, method: str = 'm-smoe', router:
    Literal['map', 'slice'] = 'map', delta: Literal['svd', 'ternary'] | None = None, delta_ratio: float | None =
    None, refit: bool = True, refit_tokens: int = 0, profile: AnyProfile | None = None, device: Device = 'auto',
    dtype: NamedDtype = 'auto', calibration_cfg: float | None = None, calibration_steps: int | None = None,
    calibration_images: int | None = None, calibration_data: AnyPath | None = None, calibration_classes:
    Sequence[int] | None = None, calibration_seed: Seed | None = None, dry_run: Literal[True],
) -> ForeseenCheckpoint: ...
@overload
def plan_merge(
    checkpoint: AnyCheckpoint, *, groups: float | int | str | None = None, method: str = 'm-smoe', router:
    Literal['map', 'slice'] = 'map', delta: Literal['svd', 'ternary'] | None = None, delta_ratio: float | None =
    None, refit: bool = True, refit_tokens: int = 0, profile: AnyProfile | None = None, device: Device = 'auto',
    dtype: NamedDtype = 'auto', calibration_cfg: float | None = None, calibration_steps: int | None = None,
    calibration_images: int | None = None, calibration_data: AnyPath | None = None, calibration_classes:
    Sequence[int] | None = None, calibration_seed: Seed | None = None, dry_run: bool,
) -> CompressionPlan | ForeseenCheckpoint: ...

@overload
def plan_prune(
    checkpoint: AnyCheckpoint, *, keep: float | int | str | None = None, method: str = 'reap', seed: Seed = 0,
    router: Literal['auto', 'slice', 'ghost', 'mass'] = 'ghost', allocate: Literal['uniform', 'global'] = 'uniform',
    neurons: float = 1.0, multiple: int = 64, narrow_shared: bool = False, refit: bool = True, refit_tokens: int =
    0, scale: bool = False, constants: bool = False, residual_rank: int = 0, profile: AnyProfile | None = None,
    device: Device = 'auto', dtype: NamedDtype = 'auto', calibration_cfg: float | None = None, calibration_steps:
    int | None = None, calibration_images: int | None = None, calibration_data: AnyPath | None = None,
    calibration_classes: Sequence[int] | None = None, calibration_seed: Seed | None = None, dry_run: Literal[False]
    = False,
) -> CompressionPlan: ...
@overload
def plan_prune(
    checkpoint: AnyCheckpoint, *, keep: float | int | str | None = None, method: str = 'reap', seed: Seed = 0,
    router: Literal['auto', 'slice', 'ghost', 'mass'] = 'ghost', allocate: Literal['uniform', 'global'] = 'uniform',
    neurons: float = 1.0, multiple: int = 64, narrow_shared: bool = False, refit: bool = True, refit_tokens: int =
    0, scale: bool = False, constants: bool = False, residual_rank: int = 0, profile: AnyProfile | None = None,
    device: Device = 'auto', dtype: NamedDtype = 'auto', calibration_cfg: float | None = None, calibration_steps:
    int | None = None, calibration_images: int | None = None, calibration_data: AnyPath | None = None,
    calibration_classes: Sequence[int] | None = None, calibration_seed: Seed | None = None, dry_run: Literal[True],
) -> ForeseenCheckpoint: ...
@overload
def plan_prune(
    checkpoint: AnyCheckpoint, *, keep: float | int | str | None = None, method: str = 'reap', seed: Seed = 0,
    router: Literal['auto', 'slice', 'ghost', 'mass'] = 'ghost', allocate: Literal['uniform', 'global'] = 'uniform',
    neurons: float = 1.0, multiple: int = 64, narrow_shared: bool = False, refit: bool = True, refit_tokens: int =
    0, scale: bool = False, constants: bool = False, residual_rank: int = 0, profile: AnyProfile | None = None,
    device: Device = 'auto', dtype: NamedDtype = 'auto', calibration_cfg: float | None = None, calibration_steps:
    int | None = None, calibration_images: int | None = None, calibration_data: AnyPath | None = None,
    calibration_classes: Sequence[int] | None = None, calibration_seed: Seed | None = None, dry_run: bool,
) -> CompressionPlan | ForeseenCheckpoint: ...

@overload
def plan_quantize(
    checkpoint: AnyCheckpoint, *, bits: float | None = None, size: AnySize | None = None, method: str = 'replay',
    uniform: bool = False, format: str | None = None, double_quant: bool = False, group_size: int = 64, symmetric:
    bool = False, allow: Sequence[Width] = ('2', '3', '4', '5', '6', '8', '16'), floor: Mapping[str, float] | None =
    None, protect: Sequence[str] = (), tie: Sequence[str] = (), rounding: Literal['gptq', 'nearest'] | None = None,
    tokens: int = 0, smooth: float = 0.0, profile: AnyProfile | None = None, device: Device = 'auto', dtype:
    NamedDtype = 'auto', calibration_cfg: float | None = None, calibration_steps: int | None = None,
    calibration_images: int | None = None, calibration_data: AnyPath | None = None, calibration_classes:
    Sequence[int] | None = None, calibration_seed: Seed | None = None, dry_run: Literal[False] = False,
) -> CompressionPlan: ...
@overload
def plan_quantize(
    checkpoint: AnyCheckpoint, *, bits: float | None = None, size: AnySize | None = None, method: str = 'replay',
    uniform: bool = False, format: str | None = None, double_quant: bool = False, group_size: int = 64, symmetric:
    bool = False, allow: Sequence[Width] = ('2', '3', '4', '5', '6', '8', '16'), floor: Mapping[str, float] | None =
    None, protect: Sequence[str] = (), tie: Sequence[str] = (), rounding: Literal['gptq', 'nearest'] | None = None,
    tokens: int = 0, smooth: float = 0.0, profile: AnyProfile | None = None, device: Device = 'auto', dtype:
    NamedDtype = 'auto', calibration_cfg: float | None = None, calibration_steps: int | None = None,
    calibration_images: int | None = None, calibration_data: AnyPath | None = None, calibration_classes:
    Sequence[int] | None = None, calibration_seed: Seed | None = None, dry_run: Literal[True],
) -> ForeseenCheckpoint: ...
@overload
def plan_quantize(
    checkpoint: AnyCheckpoint, *, bits: float | None = None, size: AnySize | None = None, method: str = 'replay',
    uniform: bool = False, format: str | None = None, double_quant: bool = False, group_size: int = 64, symmetric:
    bool = False, allow: Sequence[Width] = ('2', '3', '4', '5', '6', '8', '16'), floor: Mapping[str, float] | None =
    None, protect: Sequence[str] = (), tie: Sequence[str] = (), rounding: Literal['gptq', 'nearest'] | None = None,
    tokens: int = 0, smooth: float = 0.0, profile: AnyProfile | None = None, device: Device = 'auto', dtype:
    NamedDtype = 'auto', calibration_cfg: float | None = None, calibration_steps: int | None = None,
    calibration_images: int | None = None, calibration_data: AnyPath | None = None, calibration_classes:
    Sequence[int] | None = None, calibration_seed: Seed | None = None, dry_run: bool,
) -> CompressionPlan | ForeseenCheckpoint: ...

@overload
def schedule(
    checkpoint: AnyCheckpoint, *, flops: float | None = None, max_damage: float | None = None, method: str =
    'planned', bins: int | None = None, profile: AnyProfile | None = None, anyway: bool = False, images: int = 32,
    steps: int | None = None, cfg: float = 1.0, cfg_interval: Sequence[float] | None = None, solver: str | None =
    None, upstream_exact: bool = False, classes: Sequence[int] | None = None, seed: Seed = 0, dtype: NamedDtype =
    'auto', guide_with: AnyCheckpoint | None = None, guide_by: Literal['top1', 'rank2'] | None = None, guide_scale:
    float | None = None, guide_interval: Sequence[float] | None = None, device: Device = 'auto', output: OneFile |
    None = None, force: bool = False, dry_run: Literal[False] = False,
) -> MadeSchedule: ...
@overload
def schedule(
    checkpoint: AnyCheckpoint, *, flops: float | None = None, max_damage: float | None = None, method: str =
    'planned', bins: int | None = None, profile: AnyProfile | None = None, anyway: bool = False, images: int = 32,
    steps: int | None = None, cfg: float = 1.0, cfg_interval: Sequence[float] | None = None, solver: str | None =
    None, upstream_exact: bool = False, classes: Sequence[int] | None = None, seed: Seed = 0, dtype: NamedDtype =
    'auto', guide_with: AnyCheckpoint | None = None, guide_by: Literal['top1', 'rank2'] | None = None, guide_scale:
    float | None = None, guide_interval: Sequence[float] | None = None, device: Device = 'auto', output: OneFile |
    None = None, force: bool = False, dry_run: Literal[True],
) -> ForeseenSchedule: ...
@overload
def schedule(
    checkpoint: AnyCheckpoint, *, flops: float | None = None, max_damage: float | None = None, method: str =
    'planned', bins: int | None = None, profile: AnyProfile | None = None, anyway: bool = False, images: int = 32,
    steps: int | None = None, cfg: float = 1.0, cfg_interval: Sequence[float] | None = None, solver: str | None =
    None, upstream_exact: bool = False, classes: Sequence[int] | None = None, seed: Seed = 0, dtype: NamedDtype =
    'auto', guide_with: AnyCheckpoint | None = None, guide_by: Literal['top1', 'rank2'] | None = None, guide_scale:
    float | None = None, guide_interval: Sequence[float] | None = None, device: Device = 'auto', output: OneFile |
    None = None, force: bool = False, dry_run: bool,
) -> MadeSchedule | ForeseenSchedule: ...

@overload
def sensitivity(
    checkpoint: AnyCheckpoint, *, images: int = 16, steps: int | None = None, cfg: float = 1.0, solver: str | None =
    None, upstream_exact: bool = False, classes: Sequence[int] | None = None, seed: Seed = 0, dtype: NamedDtype =
    'auto', parts: Sequence[str] = ('skip', 'skip-attention', 'skip-mixture', 'top1', 'skip-shared'), bins: int |
    None = None, batch: Count = 8, device: Device = 'auto', output: AnyPath | None = None, png: Picture | None =
    None, force: bool = False, dry_run: Literal[False] = False,
) -> SensitivityMap: ...
@overload
def sensitivity(
    checkpoint: AnyCheckpoint, *, images: int = 16, steps: int | None = None, cfg: float = 1.0, solver: str | None =
    None, upstream_exact: bool = False, classes: Sequence[int] | None = None, seed: Seed = 0, dtype: NamedDtype =
    'auto', parts: Sequence[str] = ('skip', 'skip-attention', 'skip-mixture', 'top1', 'skip-shared'), bins: int |
    None = None, batch: Count = 8, device: Device = 'auto', output: AnyPath | None = None, png: Picture | None =
    None, force: bool = False, dry_run: Literal[True],
) -> ForeseenMap: ...
@overload
def sensitivity(
    checkpoint: AnyCheckpoint, *, images: int = 16, steps: int | None = None, cfg: float = 1.0, solver: str | None =
    None, upstream_exact: bool = False, classes: Sequence[int] | None = None, seed: Seed = 0, dtype: NamedDtype =
    'auto', parts: Sequence[str] = ('skip', 'skip-attention', 'skip-mixture', 'top1', 'skip-shared'), bins: int |
    None = None, batch: Count = 8, device: Device = 'auto', output: AnyPath | None = None, png: Picture | None =
    None, force: bool = False, dry_run: bool,
) -> SensitivityMap | ForeseenMap: ...
