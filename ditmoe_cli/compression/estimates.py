"""What each phase of compressing takes, from shapes and numbers of tokens. Torch-free.

The formulas count what grows with the model: products of matrices, factorisations, and the small operations of GPTQ's
columns. Their constants were measured (docs/design.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ditmoe_cli.compression.block_layout import block_layouts, new_names
from ditmoe_cli.compression.distill.distilling import Distilling
from ditmoe_cli.compression.distill.distilling_memory import distilling_estimate
from ditmoe_cli.compression.heal.healing_memory import healing_estimate
from ditmoe_cli.compression.plan import CompressionPlan, Experts, Formats, Repair
from ditmoe_cli.compression.planned_training import planned_training
from ditmoe_cli.compression.training.trained_tensors import TrainedSize
from ditmoe_cli.compression.working_sizes import (
    ANCHORS,
    DOUBLE_FEATURES,
    ELIMINATION_TOKENS,
    EMBEDDING_TOKENS,
    EXPERT_DRAWS,
    FEWEST_CARRYING,
    FEWEST_EMBEDDED,
    FEWEST_SENT,
    FEWEST_STATES,
    FEWEST_TOKENS,
    HELD_OUT,
    KEPT_FEATURES,
    MOST_TOKENS,
    POOLED_TOKENS,
    REPLAYED_TOKENS,
    ROUNDED_BYTES,
    SENT_POSITIONS,
    SENT_TOKENS,
    SWEEPS,
    TOKENS_PER_INPUT,
    TOKENS_PER_NEURON,
    TOKENS_PER_UNKNOWN,
    TRIAL_OUTPUTS,
    carrying_tokens,
    most_unknowns,
    systems,
)
from ditmoe_cli.files.names import MATRICES, in_block, split_name
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.config import BlockConfig, DiTMoEConfig, mixture_shapes
from ditmoe_cli.model.effort import (
    BASELINE_BYTES,
    Effort,
    Estimate,
    activation_bytes,
    attention_flops,
    block_flops,
    block_steps,
    block_weights,
    branches_at,
    loading,
    mixture_flops,
    model_bytes,
    passes,
    total,
)
from ditmoe_cli.routing.calibration_settings import SHARED_BATCH, SHARED_TOKENS, Calibration

_COLLECTING = 1.1  # of evaluating without
_STRENGTHS = 5  # that a ridge regression tries, about
_STEPS_A_COLUMN = 10  # small operations of GPTQ
_OPERATIONS_OF_SCALES = 1_700  # of each number, in the search for scales
_OPERATIONS_OF_A_DRAW = 20 / 6  # for each number of an expert's matrix and token drawn
_STEPS_OF_NEURONS = 12  # small operations for each neuron that goes
_KINDS = 3  # mixture, attention, modulation
_TRIALS = 2
_AMPLIFYING = 2  # walks in which errors pass the rest of the model: the measurement, and the first trial


def profiling_estimate(config: DiTMoEConfig, settings: Calibration) -> Estimate:
    """Return what a calibration run takes: images × steps evaluations, of both branches under guidance.

    Collecting takes a tenth beside; then all experts run on some tokens of the reservoir, and their outputs meet in
    Gram matrices: 6 E T D H + 2 E T n D for T tokens, n at a time.
    """
    spec = settings.spec
    branches = branches_at(spec.cfg)
    effort = passes(config, spec.images, spec.steps * branches, settings.batch) * _COLLECTING + loading(config)
    if not settings.fast:
        shared, width = min(settings.reservoir, SHARED_TOKENS), config.hidden_size
        for block in config.blocks:
            experts = len(block.expert_widths)
            grams = 2 * experts * shared * min(shared, SHARED_BATCH) * width
            effort += Effort(flops=6 * shared * width * sum(block.expert_widths) + grams, steps=20 * experts)
    reservoir = 0 if settings.fast else 4 * config.depth * settings.reservoir * config.hidden_size
    held = activation_bytes(config, branches * min(settings.batch, spec.images))
    memory = BASELINE_BYTES + model_bytes(config) + held + reservoir
    return Estimate(f"profiling {spec.images:,} images in {spec.steps} steps", effort, memory)


def fitted_tokens(unknowns: int, tokens_per_unknown: int, asked: int = 0) -> int:
    """Return the tokens of one branch that a block is fitted on; `asked` overrides the default."""
    return asked or min(max(tokens_per_unknown * unknowns, FEWEST_TOKENS), MOST_TOKENS)


def system_effort(sizes: Sequence[int], rows: Sequence[float], width: int) -> Effort:
    """Return the effort of one system of terms with `sizes` f_i and numbers of rows n_i, of D outputs.

    The Gram takes Σ_i n_i f_i (f_i + 2 Σ_{j>i} n_j f_j / T), with T rows in all, and 4 n_i f_i (D + d) go to products
    with D outputs and d of the trial; each strength takes a factorisation F³/3 and two products 2 F² d, F = Σ f_i, and
    the solution on all rows another factorisation and 2 F² D. Systems of up to `DOUBLE_FEATURES` are solved in double
    precision.
    """
    trial, total_rows = min(width, TRIAL_OUTPUTS), max(rows, default=0.0)
    flops = 0.0
    for i, (n, f) in enumerate(zip(rows, sizes, strict=True)):
        others = sum(m / max(total_rows, 1.0) * g for m, g in zip(rows[i + 1 :], sizes[i + 1 :], strict=True))
        flops += n * f * (f + 2 * others + 4 * (width + trial))
    whole = sum(sizes)
    solving = (_STRENGTHS + 1) * whole**3 / 3 + whole**2 * (4 * _STRENGTHS * trial + 2 * width)
    if whole <= DOUBLE_FEATURES:
        return Effort(flops=flops, double_flops=solving, steps=200)
    return Effort(flops=flops + solving, steps=200)


def refitting_estimate(config: DiTMoEConfig, kept: Sequence[BlockConfig], branches: int, repair: Repair) -> Estimate:
    """Return what refitting takes that leaves blocks of the shapes `kept`.

    All tokens pass each block's attention once and its mixtures twice; then each system is solved. Where there are
    several, each is solved a second time with the factors of the first, which takes products with its features alone.
    """
    width = config.hidden_size
    unknowns = max(sum(block.expert_widths) + block.shared_width + width for block in kept)
    tokens = _whole_states(config, fitted_tokens(unknowns, TOKENS_PER_UNKNOWN, repair.tokens)) * branches
    images = tokens / config.num_patches
    efforts, largest, features, factors = [], 0, 0.0, 0.0
    for old, block in zip(config.blocks, kept, strict=True):
        chosen = tokens * config.top_k / max(old.router_rows, 1)
        terms = [(size, chosen) for size in block.expert_widths]
        terms += [(block.shared_width, tokens)] if repair.shared else []
        terms += [(width, tokens)] if block.residual_linear else []
        sizes, rows = [size for size, _ in terms], [count for _, count in terms]
        groups = [] if repair.scale else systems(sizes, most_unknowns(sizes))
        streams = images * (attention_flops(config) + 2 * config.num_patches * mixture_flops(config, old))
        efforts.append(Effort(flops=streams, steps=4 * block_steps(old) * (1 + images / 64)))
        for group in groups:
            efforts.append(system_effort(sizes[group], rows[group], width))
            largest = max(largest, sum(sizes[group]))
        held = [4 * n * f for n, f in zip(rows, sizes, strict=True)]
        features = max(features, min(sum(held), KEPT_FEATURES))
        if len(groups) > 1:
            wide = width + min(width, TRIAL_OUTPUTS)
            again = sum(4 * n * f * wide for n, f in zip(rows, sizes, strict=True))
            efforts.append(Effort(flops=(SWEEPS - 1) * again))
            factors = max(factors, sum(4 * sum(sizes[group]) ** 2 for group in groups))
        if sum(held) > KEPT_FEATURES:  # those of the others are computed for each of their uses
            uses = 2 * (SWEEPS if len(groups) > 1 else 1)
            anew = (1 - KEPT_FEATURES / sum(held)) * (uses - 1)
            efforts.append(Effort(flops=anew * sum(4 * n * f * width for n, f in zip(rows, sizes, strict=True))))
    weights = max(block_weights(config, block) for block in config.blocks)
    memory = BASELINE_BYTES + 8 * weights + 4 * tokens * width * 7 + features + factors
    memory += (8 if largest <= DOUBLE_FEATURES else 4) * largest * (4 * largest + 4 * width)
    return Estimate(f"refitting {_blocks(config.depth)}", total([*efforts, loading(config)]), memory)


def replaying_estimate(config: DiTMoEConfig, tokens: float, branches: int) -> Estimate:
    """Return what replaying subsets takes on `tokens` of all branches: in each block all experts on all of them.

    With R router rows and B branches a block takes, for each token, 6 R D H for the outputs and 2 B R² D for their
    products, beside its mixture as it is. Comparing subsets takes next to nothing unless there are thousands.
    """
    width, efforts = config.hidden_size, []
    for block in config.blocks:
        rows, wide = block.router_rows, sum(block.expert_widths) / max(len(block.expert_widths), 1)
        outputs = 6 * rows * width * wide + 2 * branches * rows**2 * width
        efforts.append(Effort(flops=tokens * (outputs + mixture_flops(config, block)), steps=block_steps(block)))
    most = max(block.router_rows for block in config.blocks)
    weights = max(block_weights(config, block) for block in config.blocks)
    memory = BASELINE_BYTES + 8 * weights + 4 * tokens * (2 * width + branches * most**2)
    return Estimate(f"replaying {_blocks(config.depth)}", total([*efforts, loading(config)]), memory)


def measuring_estimate(config: DiTMoEConfig, formats: Mapping[str, int], branches: int) -> Estimate:
    """Return what measuring errors takes, `formats` being how many are tried of each weight, with two trials.

    `REPLAYED_TOKENS` pass all blocks once, and `SENT_TOKENS` twice in each trial. Of an expert's matrix `EXPERT_DRAWS`
    tokens are computed anew for each format, with about 3.3 products. Formats of attention send `SENT_TOKENS` through
    the attention, and those of modulation a quarter of them through the mixture too. Errors of `ANCHORS` blocks and of
    each kind of weight pass the rest of the model, in the measurement and in the first trial. For each format of the
    time embedding `EMBEDDING_TOKENS` pass all blocks.
    """
    width = config.hidden_size
    patches = config.num_patches
    images = max(REPLAYED_TOKENS // (patches * branches), FEWEST_STATES) * branches
    sent = max(SENT_TOKENS // (patches * branches), FEWEST_SENT) * branches
    carrying = max(carrying_tokens(patches) // (patches * branches), FEWEST_CARRYING) * branches
    embedding = max(EMBEDDING_TOKENS // (patches * branches), FEWEST_EMBEDDED) * branches
    of_embedding = sum(count for name, count in formats.items() if name.startswith("t_embedder."))
    starts = [round(i * (config.depth - 1) / (ANCHORS - 1)) for i in range(ANCHORS)]
    efforts = []
    for index, block in enumerate(config.blocks):
        own = {name: count for name, count in formats.items() if split_name(name).block == index}
        dense = sum(count for name, count in own.items() if ".moe." not in name)
        wide = sum(block.expert_widths) / max(len(block.expert_widths), 1)
        mixed = sum(own.values()) - dense
        modulated = sum(count for name, count in own.items() if ".adaLN_modulation." in name)
        draws = min(images * patches / branches, EXPERT_DRAWS) * branches
        streams = _KINDS * len({start for start in starts if start <= index})
        passes = images + _AMPLIFYING * streams * carrying + 2 * _TRIALS * sent + of_embedding * embedding
        anew = dense * attention_flops(config)
        anew += modulated * min(patches, SENT_POSITIONS) * mixture_flops(config, block)
        efforts.append(Effort(flops=passes * block_flops(config, block) + sent * anew))
        efforts.append(Effort(flops=mixed * width * wide * (_OPERATIONS_OF_A_DRAW * draws + _OPERATIONS_OF_SCALES)))
        efforts.append(Effort(flops=_TRIALS * block_weights(config, block) * _OPERATIONS_OF_SCALES))
        rounds = 1 + dense + _AMPLIFYING * streams + 2 * _TRIALS + of_embedding
        efforts.append(Effort(steps=rounds * block_steps(block) + 50 * mixed))
    weights = max(block_weights(config, block) for block in config.blocks)
    held = carrying * _KINDS * min(ANCHORS, config.depth) + embedding * of_embedding + 9 * images
    memory = BASELINE_BYTES + 8 * weights + 4 * width * patches * held
    what = f"measuring the errors of formats in {_blocks(config.depth)}"
    return Estimate(what, total([*efforts, loading(config) * (1 + _TRIALS)]), memory)


def elimination_estimate(config: DiTMoEConfig, branches: int) -> Estimate:
    """Return what the errors of widths take (`replay.eliminations`).

    T states' tokens of one branch pass all blocks once, in each branch. An expert that n of them chose, of width H,
    takes 4 n D H for the neurons of each branch, 2 n H² for the Gram, and 4 H³ in double precision.
    """
    width = config.hidden_size
    neurons = max(sum(block.expert_widths) for block in config.blocks)
    tokens = _whole_states(config, min(TOKENS_PER_NEURON * neurons, ELIMINATION_TOKENS))
    images, efforts, widest = tokens * branches / config.num_patches, [loading(config)], 0
    for block in config.blocks:
        efforts.append(Effort(flops=images * block_flops(config, block), steps=block_steps(block) * (1 + images / 64)))
        chosen = tokens * min(1.0, branches * config.top_k / max(block.router_rows, 1))
        for size, count in ((block.shared_width, tokens), *((each, chosen) for each in block.expert_widths)):
            flops = count * size * (4 * branches * width + 2 * size)
            efforts.append(Effort(flops=flops, double_flops=4 * size**3, steps=_STEPS_OF_NEURONS * size))
            widest = max(widest, size)
    weights = max(block_weights(config, block) for block in config.blocks)
    memory = BASELINE_BYTES + 8 * weights + 4 * tokens * branches * width * 5 + 28 * widest**2
    return Estimate(f"eliminating neurons in {_blocks(config.depth)}", total(efforts), memory)


def matrix_rounding(rows: int, columns: int, tokens: float, inputs: float = 0.0) -> Effort:
    """Return the effort of GPTQ on a matrix (out, in) = (m, n), whose inputs take `inputs` operations a token.

    The second moment of T tokens and pooled ones takes n² each; two dampings a factorisation n³/3 each, of which one
    goes over all columns, m n²; errors of plain rounding and of these two dampings on an eighth of the tokens at most
    6 m n min(T / 8, n); the search for scales takes much more for each number than rounding does.
    """
    moment = (tokens + POOLED_TOKENS) * (columns**2 + inputs)
    columns_flops = rows * columns**2 + 2 * columns**3 / 3
    errors = 6 * rows * columns * min(tokens / HELD_OUT, columns)
    searched = _OPERATIONS_OF_SCALES * rows * columns
    return Effort(flops=moment + columns_flops + errors + searched, steps=_STEPS_A_COLUMN * columns + 100)


def rounding_estimate(checkpoint: Checkpoint, stage: Formats, branches: int) -> Estimate:
    """Return what rounding by GPTQ takes: two streams of tokens, and each matrix."""
    shapes = {name: checkpoint.weights[name].info.shape for name in stage.formats}
    widest = max((shape[1] for shape in shapes.values()), default=1)
    asked = stage.rounding.tokens if stage.rounding else 0
    return _rounding(checkpoint.config, shapes, fitted_tokens(widest, TOKENS_PER_INPUT, asked), branches)


def _rounding(config: DiTMoEConfig, shapes: Mapping[str, Sequence[int]], fitted: int, branches: int) -> Estimate:
    """Return what rounding matrices of `shapes` takes on `fitted` tokens of a branch."""
    widest = max((shape[1] for shape in shapes.values()), default=1)
    tokens = _whole_states(config, fitted) * branches
    images = tokens / config.num_patches
    efforts = [loading(config)]
    for name, shape in shapes.items():
        parts = split_name(name)
        if parts.block is not None:
            rows = config.blocks[parts.block].router_rows
            read = tokens * config.top_k / rows if parts.expert is not None else tokens
            neurons = 4 * shape[0] * shape[1] if name.endswith(f"{MATRICES[2]}.weight") else 0
            efforts.append(matrix_rounding(shape[0], shape[1], read if ".adaLN" not in name else images, neurons))
    for block in config.blocks:
        efforts.append(Effort(flops=2 * images * block_flops(config, block), steps=block_steps(block)))
    weights = max(block_weights(config, block) for block in config.blocks)
    one = 4 * widest * (5 * widest + 4 * config.hidden_size)  # Hessian, its factor and copies; weights and losses
    memory = BASELINE_BYTES + 12 * weights + 4 * tokens * config.hidden_size * 9 + max(one, ROUNDED_BYTES)
    what = f"rounding {len(shapes):,} matrices in {_blocks(config.depth)}"
    return Estimate(what, total(efforts), memory)


def together_estimate(checkpoint: Checkpoint, experts: Experts, formats: Formats, branches: int) -> Estimate:
    """Return what narrowing, refitting and rounding block after block takes, on matrices of their new shapes.

    Both take as many tokens as the one that asks for more. Beside what each holds, both streams are in memory.
    """
    config, layouts = checkpoint.config, block_layouts(checkpoint, experts)
    kept = [layout.config for layout in layouts]
    renamed = {old: new for index, layout in enumerate(layouts) for old, new in new_names(index, layout).items()}
    new = {
        in_block(index, name): shape
        for index, layout in enumerate(layouts)
        for name, shape in mixture_shapes(config.hidden_size, layout.config).items()
    }
    shapes = {}
    for name in formats.formats:
        if split_name(name).expert is None:
            shapes[name] = new.get(name, checkpoint.weights[name].info.shape)
        elif name in renamed:
            shapes[name] = new[renamed[name]]
    widest = max((checkpoint.weights[name].info.shape[1] for name in formats.formats), default=1)
    asked = max([fit.tokens for fit in (experts.repair, formats.rounding) if fit is not None], default=0)
    tokens = fitted_tokens(widest, TOKENS_PER_INPUT, asked)
    if experts.repair is not None:
        unknowns = max(sum(b.expert_widths) + b.shared_width for b in kept) + config.hidden_size
        tokens = max(tokens, fitted_tokens(unknowns, TOKENS_PER_UNKNOWN, asked))
    rounding = _rounding(config, shapes, tokens, branches)
    found = [rounding]
    if experts.repair is not None:
        found.append(refitting_estimate(config, kept, branches, replace(experts.repair, tokens=tokens)))
    effort = total(estimate.effort for estimate in found) + loading(config) * (1 - len(found))
    memory = max(estimate.memory for estimate in found) + 4 * tokens * branches * config.hidden_size
    return Estimate(f"compressing {_blocks(config.depth)}", effort, memory)


def repeated(estimates: Sequence[Estimate], what: str) -> Estimate:
    """Return what works one after the other take as one phase; `what` has a place for their number."""
    memory = max((estimate.memory for estimate in estimates), default=0.0)
    return Estimate(what.format(len(estimates)), total(estimate.effort for estimate in estimates), memory)


def writing_estimate(size: int) -> Estimate:
    """Return what writing a checkpoint of `size` bytes takes."""
    return Estimate("writing", Effort(nbytes=2 * size), BASELINE_BYTES)


def carrying_out(checkpoint: Checkpoint, plan: CompressionPlan | None, size: int) -> list[Estimate]:
    """Return what carrying a plan out (None: a plain copy) takes, phase by phase; `size` is the result's in bytes."""
    found = []
    branches = branches_at(float((plan.calibration or {}).get("cfg", 1.0))) if plan else 1
    together = plan.together if plan is not None else None
    if together is not None:
        found.append(together_estimate(checkpoint, *together, branches))
    for stage in plan.stages if plan is not None and together is None else ():
        match stage:
            case Experts() if stage.repair is not None:
                kept = [layout.config for layout in block_layouts(checkpoint, stage)]
                found.append(refitting_estimate(checkpoint.config, kept, branches, stage.repair))
            case Formats() if stage.rounding is not None:
                found.append(rounding_estimate(checkpoint, stage, branches))
            case _:
                pass
    if plan is not None and plan.retraining is not None:
        found.append(retraining_estimate(checkpoint, plan))
    return [*found, writing_estimate(size)]


def retraining_estimate(checkpoint: Checkpoint, plan: CompressionPlan) -> Estimate:
    """Return what training takes: the time that is asked for, whatever the machine, and next to it little.

    Steps are counted with all neurons; the memory is that of training the whole model.
    """
    config, asked = checkpoint.config, planned_training(plan)
    size = TrainedSize(sum(weight.info.numel for weight in checkpoint.weights.values()))
    if isinstance(asked, Distilling):
        return distilling_estimate(config, config, asked, size)
    return healing_estimate(config, config, asked, size, {"cfg": 1.0, "steps": 1, **(plan.calibration or {})})


def _whole_states(config: DiTMoEConfig, tokens: int) -> int:
    """Return the tokens of as many whole states, and at least `FEWEST_STATES`."""
    return max(tokens // config.num_patches, FEWEST_STATES) * config.num_patches


def _blocks(count: int) -> str:
    return "1 block" if count == 1 else f"{count} blocks"
