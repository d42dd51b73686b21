"""Streams through the blocks: with unchanged mixtures they are the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from calibration_states import KINDS, profiled_kind, states_of

from ditmoe_cli.compression.replay.stream import CalibrationStream
from ditmoe_cli.model.offload import OffloadedDiTMoE


@pytest.mark.parametrize("kind", KINDS)
def test_with_unchanged_mixtures_the_stream_is_the_model(kind: str, tmp_path: Path) -> None:
    case = profiled_kind(kind, tmp_path)
    checkpoint = case[0]
    states = states_of(case, 70)  # more than go through a block at once
    model = OffloadedDiTMoE(checkpoint, torch.device("cpu"))
    branches = len(states.branch_weights)
    null = torch.full_like(states.labels, checkpoint.config.num_classes)
    labels = torch.cat([states.labels, null][:branches])
    with torch.inference_mode():
        stream = CalibrationStream(model, states)
        x, c = model.embed(states.z.repeat(branches, 1, 1, 1), states.t.repeat(branches), labels)
        for index in range(checkpoint.config.depth):
            with model.resident(index) as block:
                expected = block(x, c, index, None)
                attended = stream.attend(block)
                tokens = stream.tokens(attended)
                stream.advance(attended, block.moe)
            assert len(tokens.inputs) == len(tokens.weights) == len(tokens.held) == x.shape[0] * x.shape[1]
            assert float(tokens.weights.mean()) == pytest.approx(1.0, rel=1e-4)
            gamma = attended.gamma.square().mean(dim=1)
            gamma[len(states) :] *= states.branch_weights[-1]
            gamma[: len(states)] *= states.branch_weights[0]
            torch.testing.assert_close(tokens.weights, (gamma / gamma.mean()).repeat_interleave(x.shape[1]))
            torch.testing.assert_close(stream.x, expected, rtol=1e-4, atol=1e-5)
            x = expected
