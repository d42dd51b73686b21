"""FID's Inception: names and shapes of its weights, its resize, where weights come from, and parity with a peer.

The real weights are not needed: a seeded state dict in their place goes through both implementations.
"""

from __future__ import annotations

import hashlib
import importlib.abc
import importlib.machinery
import json
import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.evaluation import inception
from ditmoe_cli.evaluation.inception import Inception, load_inception, preprocess, resize_tf1

# SHA-256 of the canonical JSON {name: shape} of torch-fidelity 0.4.0's network, num_batches_tracked left out.
LAYOUT_DIGEST = "67901373e2f702a8074ffcd17d2aef96d20b3f690bf3679fd8b909ae1488a971"


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


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "seeded.pth"
    torch.save(seeded_state(), path)
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def loaded(weights):
    return load_inception(weights)


@pytest.fixture(autouse=True)
def no_weights_around(monkeypatch, tmp_path):
    """Keep the caller's own weights, and the network, out of the tests."""
    monkeypatch.delenv("DITMOE_INCEPTION", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(inception, "WEIGHTS_URL", (tmp_path / "no-such-server").as_uri())


def images(n=2, h=32, w=32, c=3, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, h, w, c), dtype=np.uint8))


def test_names_and_shapes_are_those_of_the_weight_file():
    with torch.device("meta"):
        shapes = {name: list(tensor.shape) for name, tensor in Inception().state_dict().items()}
    assert len(shapes) == 472
    assert shapes["Conv2d_1a_3x3.conv.weight"] == [32, 3, 3, 3]
    assert shapes["Mixed_5b.branch1x1.bn.running_var"] == [64]
    assert shapes["Mixed_6b.branch7x7_2.conv.weight"] == [128, 128, 1, 7]
    assert shapes["Mixed_7c.branch3x3dbl_3b.conv.weight"] == [384, 384, 3, 1]
    assert shapes["fc.weight"] == [1008, 2048]
    text = json.dumps(shapes, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(text.encode()).hexdigest() == LAYOUT_DIGEST


def resized_by_loops(image, side):
    """TensorFlow 1's resize of (H, W), pixel by pixel in float64."""
    height, width = image.shape
    result = np.zeros((side, side))
    for i in range(side):
        for j in range(side):
            y, x = i * height / side, j * width / side
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            above = image[top, left] + (x - left) * (image[top, right] - image[top, left])
            below = image[bottom, left] + (x - left) * (image[bottom, right] - image[bottom, left])
            result[i, j] = above + (y - top) * (below - above)
    return result


@pytest.mark.parametrize(("shape", "side"), [((4, 4), 10), ((5, 3), 7), ((9, 12), 5), ((1, 1), 3), ((6, 6), 6)])
def test_resize_is_that_of_tensorflow_1(shape, side):
    image = np.random.default_rng(0).uniform(0, 255, shape)
    got = resize_tf1(torch.tensor(image, dtype=torch.float32)[None, None], side)[0, 0].numpy()
    assert np.allclose(got, resized_by_loops(image, side), rtol=1e-5, atol=1e-3)


def test_resize_by_hand():
    # Positions 0, ½, 1, 1½; the last one lies beyond the last pixel, which is repeated.
    got = resize_tf1(torch.tensor([[[[0.0, 10.0], [20.0, 30.0]]]]), 4)
    assert got[0, 0, 0].tolist() == [0, 5, 10, 10]
    assert got[0, 0, :, 0].tolist() == [0, 10, 20, 20]


def test_preprocessing_maps_bytes_to_about_one_and_repeats_grey():
    flat = torch.tensor([0, 128, 255], dtype=torch.uint8).reshape(3, 1, 1, 1).expand(3, 7, 9, 1)
    got = preprocess(flat)
    assert got.shape == (3, 3, 299, 299)
    for index, value in enumerate([-1.0, 0.0, 127 / 128]):
        assert (got[index] == value).all()


def test_features_are_deterministic_and_finite_whatever_the_size_of_the_images(loaded):
    module, _ = loaded
    with torch.inference_mode():
        first, again = module(images()), module(images())
        wide = module(images(1, 20, 40))
    assert first.shape == (2, 2048)
    assert torch.equal(first, again)
    assert torch.isfinite(first).all()
    assert torch.isfinite(wide).all()
    # Seeded weights must tell images apart, or the comparisons here would prove nothing.
    assert (first[0] - first[1]).abs().max() > 1e-2 * first.abs().max()


def test_features_are_those_that_torch_fidelity_gave(loaded):
    """Numbers of torch-fidelity 0.4.0 with torch 2.13 for the same weights and images; checks without the peer."""
    module, _ = loaded
    with torch.inference_mode():
        got = module(images())
    expected = [[1.2036735, 0.6850073, 0.4956640, 0.0], [1.1982119, 0.6639970, 0.4932476, 0.0]]
    assert torch.allclose(got[:, :4], torch.tensor(expected), rtol=1e-4, atol=1e-5)
    assert got.double().mean().item() == pytest.approx(0.4693332, rel=1e-5)
    assert got.double().std().item() == pytest.approx(0.6280519, rel=1e-5)


def test_grey_images_have_the_features_of_their_colour_copies(loaded):
    module, _ = loaded
    grey = images(1, c=1)
    with torch.inference_mode():
        assert torch.allclose(module(grey), module(grey.repeat(1, 1, 1, 3)), rtol=1e-5, atol=1e-6)


def test_loading_gives_the_digest_of_the_file_and_a_frozen_module(loaded, weights):
    module, digest = loaded
    assert digest == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())
    state = module.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in seeded_state().items())


def test_weights_from_the_environment_in_safetensors_and_with_extras(monkeypatch, tmp_path):
    path = tmp_path / "seeded.safetensors"
    state = seeded_state()
    save_file({**state, "Conv2d_1a_3x3.bn.num_batches_tracked": torch.tensor(0)}, path)
    monkeypatch.setenv("DITMOE_INCEPTION", str(path))
    module, digest = load_inception()
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert torch.equal(module.fc.weight, state["fc.weight"])


def test_an_explicit_path_wins_over_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("DITMOE_INCEPTION", str(tmp_path / "from-environment"))
    with pytest.raises(BadInputError, match="from-environment: no such file, named by DITMOE_INCEPTION"):
        load_inception()
    with pytest.raises(BadInputError, match="from-option: no such file, named by --weights"):
        load_inception(tmp_path / "from-option")


def test_files_of_other_networks_are_refused_by_the_first_offending_tensor(tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"fc.weight": torch.zeros(2)}, path)
    with pytest.raises(BadInputError, match=r"other\.pth: .*'Conv2d_1a_3x3\.conv\.weight' is missing; .*--weights"):
        load_inception(path)
    torch.save({"Conv2d_1a_3x3.conv.weight": torch.zeros(32, 1, 3, 3)}, path)
    with pytest.raises(BadInputError, match=r"is \(32, 1, 3, 3\), expected \(32, 3, 3, 3\)"):
        load_inception(path)
    path.write_bytes(b"not weights")
    with pytest.raises(BadInputError, match=r"other\.pth"):
        load_inception(path)


def test_without_weights_or_network_the_error_says_what_to_do(tmp_path):
    with pytest.raises(BadInputError) as caught:
        load_inception()
    message = str(caught.value)
    assert message.startswith("pt_inception-2015-12-05-6726825d.pth: not at ")
    for part in (str(tmp_path / "cache" / "ditmoe"), "no-such-server", "--weights PATH", "DITMOE_INCEPTION"):
        assert part in message
    assert "\n" not in message


def serve(monkeypatch, path, content):
    """Let the download come from a local file whose digest is the expected one."""
    path.write_bytes(content)
    monkeypatch.setattr(inception, "WEIGHTS_URL", path.as_uri())
    monkeypatch.setattr(inception, "WEIGHTS_DIGEST", hashlib.sha256(content).hexdigest()[:8])


def test_weights_are_downloaded_once(monkeypatch, tmp_path):
    served = tmp_path / "served"
    serve(monkeypatch, served, b"the weights" * 1000)
    cached = inception.find_weights()
    assert cached == tmp_path / "cache" / "ditmoe" / "pt_inception-2015-12-05-6726825d.pth"
    assert cached.read_bytes() == served.read_bytes()
    served.unlink()
    assert inception.find_weights() == cached
    assert [child.name for child in cached.parent.iterdir()] == [cached.name]


def test_a_download_of_the_wrong_digest_leaves_nothing(monkeypatch, tmp_path):
    serve(monkeypatch, tmp_path / "served", b"the weights")
    (tmp_path / "served").write_bytes(b"an error page")
    with pytest.raises(BadInputError, match="what arrived has SHA-256"):
        inception.find_weights()
    assert list((tmp_path / "cache" / "ditmoe").iterdir()) == []


def test_a_damaged_cache_is_named():
    cached = inception.cached_weights()
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"cut short")
    with pytest.raises(BadInputError, match=r"6726825d\.pth: SHA-256 is .* delete the file"):
        load_inception()


def test_the_cache_is_in_the_home_folder_by_default(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert inception.cached_weights().parent == tmp_path / ".cache" / "ditmoe"


class TorchvisionStub(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Lets torch-fidelity be imported where torchvision is not; its Inception path needs none of it."""

    def find_spec(self, name, path=None, target=None):  # noqa: ARG002
        stub = name.split(".")[0] == "torchvision"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if stub else None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = self._attribute
        return module

    @staticmethod
    def _attribute(name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})

    def exec_module(self, module):
        pass


@pytest.fixture
def peer(weights, monkeypatch):
    """Return torch-fidelity's extractor with the seeded weights, loaded strictly by itself."""
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, TorchvisionStub()])
    before = set(sys.modules)
    module = pytest.importorskip("torch_fidelity", reason="torch-fidelity is not installed")
    yield module.FeatureExtractorInceptionV3("peer", ["2048"], feature_extractor_weights_path=str(weights))
    for name in set(sys.modules) - before:
        if name.split(".")[0] == "torchvision":
            del sys.modules[name]


@pytest.mark.parametrize("side", [32, 299, 320])
def test_features_equal_those_of_torch_fidelity(peer, loaded, side):
    module, _ = loaded
    batch = images(2, side, side, seed=side)
    with torch.inference_mode():
        (expected,) = peer(batch.permute(0, 3, 1, 2))
        got = module(batch)
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
