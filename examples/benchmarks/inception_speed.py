"""Measure images per second of FID's Inception: ours in fp32 and bf16, torch-fidelity's and pytorch-fid's.

All networks hold the same seeded weights, and turn the same uint8 images into features, resizing included; each peer
gets them in the layout of its own loader. Rounds alternate between the networks, so that a busy machine slows all
alike; the best round of each counts. Peers that cannot be imported are named and left out.

    python examples/benchmarks/inception_speed.py --images 32 --rounds 3
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))
from peers import noise, pytorch_fid_network, seeded_state, torch_fidelity_network, torchvision_at_hand

from ditmoe_cli.evaluation.features.extractors import make_extractor

Network = Callable[[torch.Tensor], torch.Tensor]


def our_networks(weights: Path) -> dict[str, Network]:
    """Return our network as each peer prepares images, and in bf16."""

    def network(preprocessing: str, precision: str) -> Network:
        extractor = make_extractor("inception", weights=weights, preprocessing=preprocessing, precision=precision)
        return lambda images: torch.from_numpy(extractor(images.numpy()))

    return {
        "ditmoe, tf1": network("tf1", "fp32"),
        "ditmoe, tf1, bf16": network("tf1", "bf16"),
        "ditmoe, pytorch-fid": network("pytorch-fid", "fp32"),
        "ditmoe, pytorch-fid, bf16": network("pytorch-fid", "bf16"),
        "ditmoe, clean-fid": network("clean-fid", "fp32"),
    }


def peer_networks(weights: Path) -> dict[str, Network]:
    """Return the peers that can be imported; print the names of the others."""
    networks: dict[str, Network] = {}
    try:
        fidelity = torch_fidelity_network(weights)
        networks["torch-fidelity"] = lambda images: fidelity(as_loaded(images))[0]
    except pytest.skip.Exception as absent:
        print(f"absent: {absent.msg}")
    patch = pytest.MonkeyPatch()
    try:
        fid = pytorch_fid_network(torch.load(weights), patch)
        networks["pytorch-fid"] = lambda images: fid(as_loaded(images).float() / 255)[0].flatten(1)
    except pytest.skip.Exception as absent:
        print(f"absent: {absent.msg}")
    except ImportError as absent:  # the stand-in for torchvision takes its blocks from torch-fidelity
        print(f"absent: pytorch-fid needs torchvision or torch-fidelity ({absent})")
    finally:
        patch.undo()
    return networks


def as_loaded(images: torch.Tensor) -> torch.Tensor:
    """Return images (N, H, W, C) as (N, C, H, W), each channel a plane."""
    return images.permute(0, 3, 1, 2).contiguous()


def features_and_seconds(network: Network, images: torch.Tensor, batch: int) -> tuple[np.ndarray, float]:
    """Return features of all images, and the seconds that they took."""
    start = time.perf_counter()
    with torch.inference_mode():
        features = torch.cat([network(part) for part in images.split(batch)])
    return features.double().numpy(), time.perf_counter() - start


def main() -> None:
    """Time all networks and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    images = noise(options.images, options.side, options.side)
    with tempfile.TemporaryDirectory() as folder, torchvision_at_hand():
        weights = Path(folder) / "seeded.pth"
        torch.save(seeded_state(), weights)
        networks = {**our_networks(weights), **peer_networks(weights)}
        best = dict.fromkeys(networks, float("inf"))
        features: dict[str, np.ndarray] = {}
        for network in networks.values():
            features_and_seconds(network, images[:2], 2)  # warmed up
        for _ in range(options.rounds):
            for name, network in networks.items():
                features[name], seconds = features_and_seconds(network, images, options.batch)
                best[name] = min(best[name], seconds)
    print("| network | images/s | times torch-fidelity | times pytorch-fid | error to fp32 | to the peer |")
    print("|---|---|---|---|---|---|")
    for name, seconds in best.items():
        cells = [name, f"{options.images / seconds:.1f}"]
        cells += [f"{best[peer] / seconds:.2f}" if peer in best else "" for peer in ("torch-fidelity", "pytorch-fid")]
        cells.append(error(features, name, name.removesuffix(", bf16")) if name.endswith("bf16") else "")
        peer = {"ditmoe, tf1": "torch-fidelity", "ditmoe, pytorch-fid": "pytorch-fid"}.get(name, "")
        cells.append(error(features, name, peer))
        print(f"| {' | '.join(cells)} |")


def error(features: dict[str, np.ndarray], a: str, b: str) -> str:
    """Return ‖a - b‖ / ‖b‖ over all features; nothing where b is absent."""
    if b not in features:
        return ""
    return f"{np.linalg.norm(features[a] - features[b]) / np.linalg.norm(features[b]):.2g}"


if __name__ == "__main__":
    main()
