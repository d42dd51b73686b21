"""FID's Inception: names and shapes of its weights, its resize, where weights come from, and parity with a peer.

The real weights are not needed: a seeded state dict in their place goes through both implementations.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from peers import noise, seeded_state, torch_fidelity_network, torchvision_at_hand
from safetensors.torch import save_file

from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.evaluation.features import inception_weights
from ditmoe_cli.evaluation.features.extractors import activations, make_extractor
from ditmoe_cli.evaluation.features.inception import Inception, load_inception, preprocess, resize_clean, resize_tf1
from ditmoe_cli.evaluation.images import ImageSet

# SHA-256 of the canonical JSON {name: shape} of torch-fidelity 0.4.0's network, num_batches_tracked left out.
LAYOUT_DIGEST = "67901373e2f702a8074ffcd17d2aef96d20b3f690bf3679fd8b909ae1488a971"


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
    monkeypatch.setattr(inception_weights, "WEIGHTS_URL", (tmp_path / "no-such-server").as_uri())


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


def bilinear_by_loops(image, side):
    """Half-pixel bilinear resize of (H, W) to (side, side): pixel centres of both grids cover the same square."""
    result = np.zeros((side, side))
    for i in range(side):
        for j in range(side):
            position = [(index + 0.5) * length / side - 0.5 for index, length in zip((i, j), image.shape, strict=True)]
            y, x = (min(max(p, 0), length - 1) for p, length in zip(position, image.shape, strict=True))
            top, left = int(y), int(x)
            bottom, right = min(top + 1, image.shape[0] - 1), min(left + 1, image.shape[1] - 1)
            corners = image[[top, top, bottom, bottom], [left, right, left, right]].reshape(2, 2)
            result[i, j] = np.array([1 - y + top, y - top]) @ corners @ np.array([1 - x + left, x - left])
    return result


@pytest.mark.parametrize("shape", [(5, 3), pytest.param((320, 300), marks=pytest.mark.slow)])
def test_preprocessing_of_pytorch_fid(shape):
    batch = noise(1, *shape, c=1)
    got = preprocess(batch, "pytorch-fid")[0].numpy()
    expected = 2 * bilinear_by_loops(batch[0, :, :, 0].numpy() / 255, 299) - 1
    assert got.shape == (3, 299, 299)
    assert np.abs(got - expected).max() < 2e-4  # positions are taken in fp32


def bicubic_weights(length, side):
    """PIL's (side, length) weights: Keys' cubic with a = -1/2, widened by the ratio where it shrinks."""
    ratio = length / side
    stretch = max(ratio, 1.0)

    def cubic(x):
        x = abs(x)
        if x < 1:
            return 1.5 * x**3 - 2.5 * x**2 + 1
        return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0

    weights = np.zeros((side, length))
    for i in range(side):
        centre = (i + 0.5) * ratio
        for j in range(length):
            weights[i, j] = cubic((j + 0.5 - centre) / stretch)
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("shape", [(16, 16), (40, 7)])
@pytest.mark.parametrize("side", [9, 50])
def test_resize_of_clean_fid_is_an_antialiased_bicubic_without_rounding(shape, side):
    batch = noise(1, *shape, c=1)
    rows, columns = (bicubic_weights(length, side) for length in shape)
    expected = (rows @ batch[0, :, :, 0].numpy().astype(float) @ columns.T).clip(0, 255)
    got = resize_clean(batch.permute(0, 3, 1, 2), side)[0, 0].numpy()
    assert np.abs(got - expected).max() < 1e-2
    assert np.abs(got - got.round()).max() > 0.3
    assert (got.min(), got.max()) >= (0, 200)


def test_preprocessing_of_clean_fid_scales_as_its_network_does():
    flat = torch.tensor([0, 128, 255], dtype=torch.uint8).reshape(3, 1, 1, 1).expand(3, 7, 9, 1)
    got = preprocess(flat, "clean-fid")
    assert got.shape == (3, 3, 299, 299)
    for index, value in enumerate([-1.0, 0.0, 127 / 128]):
        assert torch.allclose(got[index], torch.tensor(value), atol=1e-6)
    with pytest.raises(UsageError, match="unknown preprocessing 'tf2'; choose tf1, pytorch-fid, clean-fid"):
        preprocess(flat, "tf2")


def test_spatial_features_are_those_of_adm(loaded):
    """The first 7 channels of Mixed_6d's 1x1 branch after its ReLU, as TensorFlow flattens (N, 17, 17, 7)."""
    module, _ = loaded
    seen = []
    handle = module.get_submodule("Mixed_6d.branch1x1").register_forward_hook(
        lambda _m, _i, output: seen.append(output)
    )
    images = noise(1)
    with torch.inference_mode():
        pool, spatial = module.pool_and_spatial(images)
        assert torch.equal(pool, module(images))
    handle.remove()
    branch = seen[0].numpy()
    assert branch.shape == (1, 192, 17, 17)
    assert spatial.shape == (1, 7 * 17 * 17)
    assert np.array_equal(spatial.numpy(), branch.transpose(0, 2, 3, 1)[..., :7].reshape(1, -1))
    assert branch.min() == 0 < branch.max()


def test_logits_are_products_with_the_classifier(loaded):
    module, _ = loaded
    weight, bias = module.fc.weight.double(), module.fc.bias.double()
    with torch.inference_mode():
        features = module(noise())
        plain, biased = module.logits(features), module.logits(features, bias=True)
    assert plain.shape == (2, 1008)
    assert torch.allclose(plain.double(), features.double() @ weight.T, rtol=1e-4, atol=1e-4)
    assert torch.allclose((biased - plain).double(), bias.expand(2, -1), atol=1e-4)


def test_bf16_is_near_fp32_and_not_it(weights):
    batch = noise(1).numpy()
    exact = activations(make_extractor("inception", weights=weights), ImageSet(batch), ["spatial", "logits"])
    rough = activations(
        make_extractor("inception", weights=weights, precision="bf16"), ImageSet(batch), ["spatial", "logits"]
    )
    for a, b in ((exact.features, rough.features), (exact.spatial, rough.spatial), (exact.logits, rough.logits)):
        assert 1e-5 < np.linalg.norm(a - b) / np.linalg.norm(a) < 2e-2
    # What is stored is not itself rounded to eight bits of mantissa.
    assert not torch.equal(torch.from_numpy(rough.features).bfloat16().double(), torch.from_numpy(rough.features))


def test_features_are_deterministic_and_finite_whatever_the_size_of_the_images(loaded):
    module, _ = loaded
    with torch.inference_mode():
        first, again = module(noise()), module(noise())
        wide = module(noise(1, 20, 40))
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
        got = module(noise())
    expected = [[1.2036735, 0.6850073, 0.4956640, 0.0], [1.1982119, 0.6639970, 0.4932476, 0.0]]
    assert torch.allclose(got[:, :4], torch.tensor(expected), rtol=1e-4, atol=1e-5)
    assert got.double().mean().item() == pytest.approx(0.4693332, rel=1e-5)
    assert got.double().std().item() == pytest.approx(0.6280519, rel=1e-5)


def test_grey_images_have_the_features_of_their_colour_copies(loaded):
    module, _ = loaded
    grey = noise(1, c=1)
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
    with pytest.raises(BadInputError, match="from-option: no such file, named by weights"):
        load_inception(tmp_path / "from-option")


def test_files_of_other_networks_are_refused_by_the_first_offending_tensor(tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"fc.weight": torch.zeros(2)}, path)
    with pytest.raises(BadInputError, match=r"other\.pth: .*'Conv2d_1a_3x3\.conv\.weight' is missing; .*weights"):
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
    for part in (str(tmp_path / "cache" / "ditmoe"), "no-such-server", "weights PATH", "DITMOE_INCEPTION"):
        assert part in message
    assert "\n" not in message


def serve(monkeypatch, path, content):
    """Let the download come from a local file whose digest is the expected one."""
    path.write_bytes(content)
    monkeypatch.setattr(inception_weights, "WEIGHTS_URL", path.as_uri())
    monkeypatch.setattr(inception_weights, "WEIGHTS_DIGEST", hashlib.sha256(content).hexdigest()[:8])


def test_weights_are_downloaded_once(monkeypatch, tmp_path):
    served = tmp_path / "served"
    serve(monkeypatch, served, b"the weights" * 1000)
    cached = inception_weights.find_weights()
    assert cached == tmp_path / "cache" / "ditmoe" / "pt_inception-2015-12-05-6726825d.pth"
    assert cached.read_bytes() == served.read_bytes()
    served.unlink()
    assert inception_weights.find_weights() == cached
    assert [child.name for child in cached.parent.iterdir()] == [cached.name]


def test_a_download_of_the_wrong_digest_leaves_nothing(monkeypatch, tmp_path):
    serve(monkeypatch, tmp_path / "served", b"the weights")
    (tmp_path / "served").write_bytes(b"an error page")
    with pytest.raises(BadInputError, match="what arrived has SHA-256"):
        inception_weights.find_weights()
    assert list((tmp_path / "cache" / "ditmoe").iterdir()) == []


def test_a_damaged_cache_is_named():
    cached = inception_weights.cached_weights()
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"cut short")
    with pytest.raises(BadInputError, match=r"6726825d\.pth: SHA-256 is .* delete the file"):
        load_inception()


def test_the_cache_is_in_the_home_folder_by_default(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert inception_weights.cached_weights().parent == tmp_path / ".cache" / "ditmoe"


@pytest.fixture
def peer(weights):
    with torchvision_at_hand():
        yield torch_fidelity_network(weights)


@pytest.mark.parametrize("side", [32, 320])
def test_features_equal_those_of_torch_fidelity(peer, loaded, side):
    module, _ = loaded
    batch = noise(2, side, side, seed=side)
    with torch.inference_mode():
        (expected,) = peer(batch.permute(0, 3, 1, 2))
        got = module(batch)
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
