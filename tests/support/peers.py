"""What comparisons with other programs share: weights, images, and a torchvision good enough to import them.

torch-fidelity, pytorch-fid and clean-fid import torchvision, of which they use little: pytorch-fid builds on its blocks
of Inception. A torchvision that was built for another torch fails on import for want of its compiled operators, which
none of this calls; here they are declared, and it loads. Where there is none, a stand-in takes its place.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import re
import sys
import types
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from ditmoe_cli.evaluation.features.inception import Inception

_DECLARED = []  # libraries of operators; dropping one would undo its declarations


def seeded_state():
    """Return weights under which features neither vanish nor explode (PyTorch's own start does the former)."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        layout = Inception().state_dict()
    state = {}
    for name, tensor in layout.items():
        normal = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim > 1:
            state[name] = normal * (2 / tensor[0].numel()) ** 0.5
        elif name.endswith(("bn.weight", "running_var")):
            state[name] = 0.75 + 0.5 * torch.rand(tensor.shape, generator=generator)
        else:
            state[name] = 0.1 * normal
    return state


def noise(n=2, h=32, w=32, c=3, seed=0):
    """Return uint8 images (n, h, w, c) of noise."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, h, w, c), dtype=np.uint8))


def smooth(n, side=32, seed=0, contrast=1.0):
    """Return uint8 images (n, side, side, 3) of blurred noise, which networks tell apart more than noise itself."""
    generator = np.random.default_rng(seed)
    coarse = generator.normal(size=(n, 4, 4, 3)).repeat(side // 4, axis=1).repeat(side // 4, axis=2)
    pixels = 128 + contrast * (60 * coarse + 10 * generator.normal(size=coarse.shape))
    return pixels.clip(0, 255).astype(np.uint8)


class TorchvisionStub(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds any module of torchvision, and in it any class; the blocks of Inception are torch-fidelity's."""

    def find_spec(self, name, path=None, target=None):  # noqa: ARG002
        stub = name.split(".")[0] == "torchvision"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if stub else None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: self._attribute(spec.name, name)
        return module

    @staticmethod
    def _attribute(module, name):
        if name == "__version__":
            return "0.13.0"
        if name.startswith("__"):
            raise AttributeError(name)
        if module == "torchvision" and name in ("models", "transforms"):
            return importlib.import_module(f"torchvision.{name}")
        if module == "torchvision.models" and name == "inception":
            return importlib.import_module("torchvision.models.inception")
        if module == "torchvision.models" and name == "inception_v3":
            return _inception_v3
        if module == "torchvision.models.inception" and name.startswith("Inception"):
            blocks = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
            return blocks.InceptionE_1 if name == "InceptionE" else getattr(blocks, name)
        return type(name, (), {})

    def exec_module(self, module):
        pass


def _inception_v3(**kwargs):  # noqa: ARG001
    """Return a network with the attributes of torchvision's, before pytorch-fid replaces some of its blocks."""
    blocks = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    network = torch.nn.Module()
    network.Conv2d_1a_3x3 = blocks.BasicConv2d(3, 32, kernel_size=3, stride=2)
    network.Conv2d_2a_3x3 = blocks.BasicConv2d(32, 32, kernel_size=3)
    network.Conv2d_2b_3x3 = blocks.BasicConv2d(32, 64, kernel_size=3, padding=1)
    network.Conv2d_3b_1x1 = blocks.BasicConv2d(64, 80, kernel_size=1)
    network.Conv2d_4a_3x3 = blocks.BasicConv2d(80, 192, kernel_size=3)
    network.Mixed_6a = blocks.InceptionB(288)
    network.Mixed_7a = blocks.InceptionD(768)
    network.fc = torch.nn.Linear(2048, 1008)
    return network


def _forget(before=frozenset()):
    for name in set(sys.modules) - set(before):
        if name.split(".")[0] == "torchvision":
            del sys.modules[name]


def _load_torchvision():
    """Tell whether torchvision itself could be imported, its operators declared where they are missing."""
    while True:
        try:
            importlib.import_module("torchvision")
        except ImportError:
            return False
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            _forget()
            if missing is None:
                return False
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define(f"{missing[1]}(Tensor x) -> Tensor")
            _DECLARED.append(library)
        else:
            return True


@contextmanager
def torchvision_at_hand():
    """Let peers be imported: with torchvision where it is, else with a stand-in, which is gone afterwards."""
    if _load_torchvision():
        yield
        return
    stub, before = TorchvisionStub(), set(sys.modules)
    sys.meta_path.append(stub)
    try:
        yield
    finally:
        sys.meta_path.remove(stub)
        _forget(before)


def imported(name):
    """Import a peer's module, or skip the test. Call it within `torchvision_at_hand`."""
    package = name.split(".")[0].replace("_", "-").replace("cleanfid", "clean-fid")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"{package} is not installed (pip install ditmoe[peers])")


def torch_fidelity_network(weights, layers=("2048",)):
    """Return torch-fidelity's Inception with the weights at a path, loaded strictly by itself."""
    module = imported("torch_fidelity")
    return module.FeatureExtractorInceptionV3("peer", list(layers), feature_extractor_weights_path=str(weights))


def pytorch_fid_network(state, monkeypatch):
    """Return pytorch-fid's Inception with a state dict in place of the one that it would fetch."""
    module = imported("pytorch_fid.inception")
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *_args, **_kwargs: state)
    return module.InceptionV3().eval()
