"""What healing of an XL is foretold to take, by updates of low rank and in several processes."""

from __future__ import annotations

import pytest
from real_sizes import of_xl, trained

from ditmoe_cli.compression.heal.healing_memory import block_scope_bytes, model_scope_bytes
from ditmoe_cli.compression.training.trained_tensors import TrainedSize
from ditmoe_cli.compression.training.training_memory import TRAINED_BYTES

ORIGINAL, HALF = of_xl(4608), of_xl(2304)


# docs/heal.md shows these
@pytest.mark.parametrize(
    ("rank", "millions", "alone", "of_eight"),
    [(None, 2384, 86.8, 45.0), (32, 99, 31.9, 30.2), (8, 26, 30.2, 29.7), (4, 14, 29.9, 29.6)],
)
def test_memory_at_xl_falls_with_the_rank_and_with_processes(
    rank: int | None, millions: int, alone: float, of_eight: float
) -> None:
    size = trained(HALF, rank)
    assert round(size.values / 1e6) == millions
    found = [model_scope_bytes(ORIGINAL, HALF, size, 1, 1.5, processes) / 1e9 for processes in (1, 8)]
    assert found == pytest.approx([alone, of_eight], abs=0.05)


def test_a_trained_weight_takes_less_of_one_of_several_processes() -> None:
    without = model_scope_bytes(ORIGINAL, HALF, TrainedSize(0), 1, 1.5)
    for processes in (1, 2, 5):
        each = (model_scope_bytes(ORIGINAL, HALF, TrainedSize(1000), 1, 1.5, processes) - without) / 1000
        assert each + 4 == pytest.approx(8 + 20 / processes)
    assert TRAINED_BYTES == 28


def test_a_block_takes_its_part_of_what_is_trained() -> None:
    every, few = trained(HALF, None), trained(HALF, 8)
    whole, low, none = (block_scope_bytes(ORIGINAL, HALF, size, 128, 1.5) for size in (every, few, TrainedSize(0)))
    widest = 6 * 1152**2 + 4 * 1152**2 + 8 * 3 * 1152 * 2304 + 3 * 1152 * 2304  # modulation, attention, experts
    assert (whole - none) / widest == pytest.approx(TRAINED_BYTES - 4, rel=0.02)
    assert (low - none) == pytest.approx((whole - none) * few.values / every.values, rel=0.05)
