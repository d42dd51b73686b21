"""What training end to end takes: where steps of matrices are worth their operations."""

from __future__ import annotations

from conftest import make_pico

from ditmoe_cli.compression.training.trained_tensors import TrainedSize
from ditmoe_cli.compression.training.training_memory import pays, stepping
from ditmoe_cli.model.effort import image_flops


def test_it_pays_beside_the_gradients_of_many_states() -> None:
    config = make_pico(sampler="rf").config
    flops = 0.75 * 3 * 10 * image_flops(config)
    less, more = (TrainedSize(1, 0, int(share * flops)) for share in (0.99, 1.01))
    assert pays(less, config, 10) and not pays(more, config, 10)
    assert stepping(config, less, 10).flops == less.matrix_flops and stepping(config, more, 10).flops == 0
