"""Runs by a table: each choice against the block written out, what is kept and for how long, and operations counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from conftest import Pico
from torch import Tensor
from torch.testing import assert_close

from ditmoe_cli.model.block_choices import FULL, BlockChoice, ComputeTable, full_table, parse_choice, table_of
from ditmoe_cli.model.compute_cost import block_cost, expert_cost, fixed_cost
from ditmoe_cli.model.dit import DiTMoE
from ditmoe_cli.model.effort import image_flops
from ditmoe_cli.model.scheduled import ScheduledRun, lifetimes

TIMES = (0.9, 0.7, 0.6, 0.3)
LABELS = torch.tensor([0, 2, 1])


def states(count: int = len(TIMES), step: float = 0.2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(len(LABELS), 4, 8, 8, generator=generator)
    return [first + step * n * torch.randn(first.shape, generator=generator) for n in range(count)]


def outputs(
    model: DiTMoE, table: ComputeTable, xs: Sequence[Tensor] | None = None
) -> tuple[list[Tensor], ScheduledRun]:
    run = ScheduledRun(model, table)
    found = []
    with torch.inference_mode():
        for x, t in zip(xs or states(table.evaluations), TIMES, strict=False):
            c = model.condition(torch.full((len(x),), t), LABELS)
            found.append(run.predict(x, t, lambda _, modulate, c=c: modulate(c), (0,)))  # type: ignore[misc]
    return found, run


def plain(model: DiTMoE, xs: Sequence[Tensor]) -> list[Tensor]:
    with torch.inference_mode():
        return [model(x, torch.full((len(x),), t), LABELS) for x, t in zip(xs, TIMES, strict=False)]


def by_hand(model: DiTMoE, choices: Sequence[BlockChoice], xs: Sequence[Tensor]) -> Tensor:
    """The last output where all blocks of an evaluation take one choice, written out; the last two are of interest."""
    made: dict[tuple[str, int], list[tuple[float, Tensor]]] = {}

    def part(name: str, index: int, how: str, t: float, compute: Callable[[], Tensor]) -> Tensor | float:
        kept = made.setdefault((name, index), [])
        if how == "skip":
            return 0.0
        if how == "compute":
            kept.append((t, compute()))
            return kept[-1][1]
        if how == "reuse" or len(kept) < 2:
            return kept[-1][1]
        (before, older), (last, newer) = kept[-2:]
        return newer + (newer - older) * ((t - last) / (last - before))

    with torch.inference_mode():
        for x, t, choice in zip(xs, TIMES, choices, strict=False):
            tokens, c = model.embed(x, torch.full((len(x),), t), LABELS)
            for index, block in enumerate(model.blocks):
                parts = block.adaLN_modulation(c).chunk(6, dim=1)  # type: ignore[operator]
                shift, scale, gate, shift2, scale2, gamma = (each[:, None] for each in parts)
                normed = torch.nn.functional.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)
                h = normed * (1 + scale) + shift
                tokens = tokens + gate * part("a", index, choice.attention, t, lambda h=h, b=block: b.attn(h))  # type: ignore[misc, operator]
                normed = torch.nn.functional.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)
                u = normed * (1 + scale2) + shift2
                tokens = tokens + gamma * part(
                    "m",
                    index,
                    choice.mixture,
                    t,
                    lambda u=u, b=block, g=parts[5]: b.moe(u, 0, g, None),  # type: ignore[misc, operator]
                )
            found = model.unembed(tokens, c)
    return found


def uniform(choices: Sequence[BlockChoice], blocks: int = 2) -> ComputeTable:
    return table_of([[[choice] * blocks] for choice in choices])


@pytest.mark.parametrize("attention", ["timm", "flash"])
def test_a_full_table_is_the_model_to_the_bit_and_keeps_nothing(pico: Callable[..., Pico], attention: str) -> None:
    model = pico(attention=attention).model()
    found, run = outputs(model, full_table(len(TIMES), 2))
    assert all(torch.equal(mine, its) for mine, its in zip(found, plain(model, states()), strict=True))
    assert run.count.most_kept == 0


@pytest.mark.parametrize("text", ["top-p:1.0", "odp:0.0"])
def test_rules_that_leave_nothing_out_are_the_model_to_the_bit(pico: Callable[..., Pico], text: str) -> None:
    model = pico().model()
    found, _ = outputs(model, uniform([parse_choice(text)] * 2))
    assert all(torch.equal(mine, its) for mine, its in zip(found, plain(model, states(2)), strict=True))


@pytest.mark.parametrize(
    "texts",
    [
        ("full", "reuse"),
        ("full", "reuse-attention"),
        ("full", "reuse-mixture"),
        ("full", "skip"),
        ("skip-attention", "skip-mixture"),
        ("full", "full", "forecast"),
        ("full", "full", "forecast", "forecast"),
        ("full", "forecast", "full", "forecast"),
        ("full", "reuse-attention", "forecast-attention+reuse-mixture", "forecast"),
        ("full", "reuse-mixture+skip-attention", "full", "reuse"),
    ],
)
def test_choices_are_the_block_written_out(pico: Callable[..., Pico], texts: tuple[str, ...]) -> None:
    model = pico(sampler="rf").model()
    choices = [parse_choice(text) for text in texts]
    found, _ = outputs(model, uniform(choices))
    assert_close(found[-1], by_hand(model, choices, states(len(texts))), rtol=1e-4, atol=1e-5)


def test_what_is_reused_at_the_same_state_is_the_model(pico: Callable[..., Pico]) -> None:
    """Same images, same time: whatever is taken from before is what would be computed."""
    model = pico().model()
    x = states(1)[0]
    for text in ("reuse", "forecast", "reuse-slots", "reuse-attention+reuse-slots"):
        run = ScheduledRun(model, uniform([FULL, parse_choice(text)]))
        with torch.inference_mode():
            c = model.condition(torch.full((3,), 0.5), LABELS)
            first, second = (run.predict(x, 0.5, lambda _, modulate, c=c: modulate(c), (0,)) for _ in range(2))  # type: ignore[misc]
        assert_close(second, first, rtol=1e-4, atol=1e-5)


def test_an_image_does_not_depend_on_its_batch(pico: Callable[..., Pico]) -> None:
    model = pico().model()
    texts = ("full", "forecast-attention+top-p:0.4", "reuse-slots", "reuse")
    table = uniform([parse_choice(text) for text in texts])
    together, _ = outputs(model, table)
    for residual in (None, 0.5):
        table = full_table(len(TIMES), 2, residual=residual) if residual else table
        together, _ = outputs(model, table)
        for image in range(3):
            run = ScheduledRun(model, table)
            with torch.inference_mode():
                for n, (x, t) in enumerate(zip(states(), TIMES, strict=True)):
                    c = model.condition(torch.full((1,), t), LABELS[image : image + 1])
                    alone = run.predict(x[image : image + 1], t, lambda _, m, c=c: m(c), (0,))  # type: ignore[misc]
                    assert_close(alone, together[n][image : image + 1], rtol=1e-4, atol=1e-5)


def test_branches_of_other_choices_are_computed_apart(pico: Callable[..., Pico]) -> None:
    model = pico().model()
    xs, other = states(2), parse_choice("reuse-attention")
    joined = table_of([[[FULL] * 2] * 2, [[FULL, other], [other, FULL]]], ["compute", "compute"])
    run = ScheduledRun(model, joined)
    labels = torch.cat((LABELS, torch.full((3,), 3)))
    alone = [uniform([FULL, FULL]) for _ in range(2)]
    alone = [table_of([[[FULL] * 2], [[FULL, other]]]), table_of([[[FULL] * 2], [[other, FULL]]])]
    runs = [ScheduledRun(model, table) for table in alone]
    with torch.inference_mode():
        for x, t in zip(xs, TIMES, strict=False):
            c = model.condition(torch.full((6,), t), labels)
            both = run.predict(torch.cat((x, x)), t, lambda _, m, c=c: m(c), (0, 1))  # type: ignore[misc]
            for branch, mine in enumerate(runs):
                rows = slice(3 * branch, 3 * branch + 3)
                single = mine.predict(x, t, lambda _, m, c=c, rows=rows: m(c[rows]), (0,))  # type: ignore[misc]
                assert_close(both[rows], single, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- by residuals


def test_a_threshold_of_residuals_of_zero_is_the_model_to_the_bit(pico: Callable[..., Pico]) -> None:
    model = pico(depth=3).model()
    found, _ = outputs(model, full_table(len(TIMES), 3, residual=0.0))
    assert all(torch.equal(mine, its) for mine, its in zip(found, plain(model, states()), strict=True))


def test_images_whose_first_block_adds_the_same_take_later_blocks_from_before(pico: Callable[..., Pico]) -> None:
    model = pico(depth=3).model()
    xs = states(2, step=0.01)
    xs[1][0] += 3.0  # only this image moves
    table = full_table(2, 3, residual=0.3)
    found, run = outputs(model, table, xs)
    fresh = plain(model, xs)
    assert_close(found[1][:1], fresh[1][:1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[1][1:], fresh[1][1:], rtol=1e-4, atol=1e-5)
    config = model.config
    blocks = [block_cost(config, block) for block in config.blocks]
    expected = 6 * fixed_cost(config) + 6 * blocks[0] + 4 * sum(blocks[1:])
    assert run.count.total == pytest.approx(expected, rel=1e-9)
    assert run.count.most_kept == 2 * 3 * 16 * 32 * 4, "what the first block added, and what the others did"


# ---------------------------------------------------------------- what is kept, and counted


def test_outputs_are_kept_until_the_last_evaluation_that_takes_them() -> None:
    texts = ("full", "reuse-mixture", "full", "forecast", "forecast-attention", "reuse-slots", "full")
    table = uniform([parse_choice(text) for text in texts], blocks=1)
    lives = lifetimes(table, 0, 0)
    assert lives.attention == {1: 4, 2: 4}
    assert lives.mixture == {0: 3, 2: 3}
    assert lives.slots == {4: 5}


def test_memory_is_let_go_when_nothing_takes_it_any_more(pico: Callable[..., Pico]) -> None:
    model = pico().model()
    _, run = outputs(model, uniform([FULL, parse_choice("reuse"), FULL, FULL]))
    assert run.count.most_kept == 2 * 2 * 3 * 16 * 32 * 4, "attention and mixture of both blocks, of three images"
    assert all(shelf.nbytes == 0 for shelf in run._shelves.values())


@pytest.mark.parametrize("saved", ["reuse", "reuse-slots", "forecast"])
def test_a_branch_that_is_let_go_of_leaves_no_memory_behind(pico: Callable[..., Pico], saved: str) -> None:
    """The null class is predicted once: of both branches' outputs, those of the conditional one alone are kept."""
    model = pico().model()
    second, null = parse_choice(saved), model.config.num_classes
    cells = [[[FULL] * 2] * 2, [[second] * 2, [FULL] * 2], [[FULL] * 2] * 2]
    run = ScheduledRun(model, table_of(cells, ("compute", "off", "off")))
    both = torch.cat((LABELS, torch.full_like(LABELS, null)))
    x = states(1)[0]
    with torch.inference_mode():
        c = model.condition(torch.full((6,), 0.9), both)
        run.predict(torch.cat((x, x)), 0.9, lambda _, modulate: modulate(c), (0, 1))
    for (branch, _), shelf in run._shelves.items():
        tensors = [kept.output for kept in (*shelf.attention, *shelf.mixture)]
        if shelf.slots is not None:
            tensors += [shelf.slots.outputs, shelf.slots.shared, shelf.slots.rows]
        assert bool(tensors) == (branch == 0)
        assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) == shelf.nbytes


def test_operations_are_those_of_the_formulas(pico: Callable[..., Pico]) -> None:
    model = pico().model()
    config = model.config
    _, run = outputs(model, full_table(2, 2))
    assert run.count.total == pytest.approx(2 * 3 * image_flops(config), rel=1e-9)
    _, run = outputs(model, uniform([FULL, parse_choice("reuse")]))
    assert run.count.total == pytest.approx(3 * (image_flops(config) + fixed_cost(config)), rel=1e-9)
    _, run = outputs(model, uniform([parse_choice("top1")]))
    saved = 2 * config.num_patches * expert_cost(config, config.blocks[0])
    assert run.count.total == pytest.approx(3 * (image_flops(config) - saved), rel=1e-9)


def test_a_table_ends(pico: Callable[..., Pico]) -> None:
    model = pico().model()
    with pytest.raises(IndexError, match="ends after 1 evaluations"):
        run = ScheduledRun(model, full_table(1, 2))
        for x in states(2):
            c = model.condition(torch.full((3,), 0.5), LABELS)
            run.predict(x, 0.5, lambda _, modulate, c=c: modulate(c), (0,))  # type: ignore[misc]
