"""Images that judge, and images that are trained on."""

from __future__ import annotations

import pytest
import torch

from ditmoe_cli.compression.heal.healed_weights import HELD_IMAGES, _Images


@pytest.mark.parametrize("count", [2, 7, 8, 9, 64, 4000])
def test_every_eighth_image_judges_and_is_never_trained_on(count: int) -> None:
    images = _Images(torch.arange(count).reshape(-1, 1, 1, 1).float(), torch.arange(count))
    held, training = set(images.held.labels.tolist()), set(images.training.labels.tolist())
    assert held and training and not held & training
    assert len(training) == count - max(1, count // 8)
    assert len(held) == min(max(1, count // 8), HELD_IMAGES)
    assert torch.equal(images.held.images.flatten().long(), images.held.labels)
