"""Inception-v3: what it is given, its name, and every way in which its file can be wrong.

torch-fidelity is stood in for by a module of the same names, whose network has a few weights; the last test runs the
true one, where it is installed.
"""

from __future__ import annotations

import hashlib
import pickle
import sys
import urllib.error
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ppl_vaebm.data.pixels import quantised
from ppl_vaebm.errors import InputError
from ppl_vaebm.evaluation.metrics import inception as features_inception
from ppl_vaebm.evaluation.metrics.features_base import network_outputs
from ppl_vaebm.evaluation.metrics.inception import load_inception
from ppl_vaebm.rng import stream

URL = "https://example.org/weights-tiny.pth"


class TinyExtractor(nn.Module):
    """What torch-fidelity's network looks like from outside: bytes in, a tuple of the named outputs out."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str) -> None:
        super().__init__()
        assert features_list == ["2048", "logits_unbiased"]
        self.linear = nn.Linear(3, 5)
        self.fc = nn.Linear(5, 4)
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        assert x.dtype == torch.uint8 and x.shape[1] == 3
        features = self.linear(x.float().mean((2, 3)))
        return features, features @ self.fc.weight.T


def weights() -> dict[str, Tensor]:
    shapes = {"linear.weight": (5, 3), "linear.bias": (5,), "fc.weight": (4, 5), "fc.bias": (4,)}
    return {name: torch.randn(shape, generator=stream(0, name)) for name, shape in shapes.items()}


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install the stand-in, and write its weights."""
    package = ModuleType("torch_fidelity")
    module: Any = ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3, module.URL_INCEPTION_V3 = TinyExtractor, URL
    package.feature_extractor_inceptionv3 = module  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    torch.save(weights(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def images(channels: int) -> Tensor:
    return quantised(torch.rand(7, channels, 6, 6, generator=stream(0, "images")) * 2 - 1)


def test_outputs_are_those_of_the_weights_in_the_file(path: Path) -> None:
    before = torch.get_rng_state()
    net = load_inception(path)
    assert torch.equal(before, torch.get_rng_state())
    x = images(3)
    levels = ((x + 1) * 128).floor()
    expected = levels.mean((2, 3)) @ weights()["linear.weight"].T + weights()["linear.bias"]
    features, logits = network_outputs(net, x, batch_size=3)
    torch.testing.assert_close(features, expected)
    torch.testing.assert_close(logits, features @ weights()["fc.weight"].T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(net.outputs(x).features, features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(net.outputs(x).logits, logits, rtol=1e-4, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in net.parameters())


def test_grey_images_are_repeated_and_others_refused(path: Path) -> None:
    net = load_inception(path)
    grey = images(1)
    torch.testing.assert_close(net.outputs(grey).features, net.outputs(grey.repeat(1, 3, 1, 1)).features)
    with pytest.raises(InputError, match=r"needs images of shape \(n, 1 or 3, H, W\), got \(7, 2, 6, 6\)"):
        net.outputs(images(2))


def test_only_the_original_weights_have_the_plain_name(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    assert load_inception(path).name == f"inception-v3-{start}"
    monkeypatch.setattr(features_inception, "WEIGHTS_HASH", start)
    assert load_inception(path).name == "inception-v3"


def test_a_missing_file_is_told(path: Path) -> None:
    path.unlink()
    with pytest.raises(InputError, match=r"expected weights of Inception-v3 in .*weights\.pth, found no such file"):
        load_inception(path)
    with pytest.raises(InputError, match="found no such file"):
        load_inception(path.parent)


@pytest.mark.parametrize("content", ["cut", b"", b"hello", pickle.dumps({"a": 1}), pickle.dumps(Path("/"))])
def test_a_file_that_is_cut_short_or_no_tensors_is_told(path: Path, content: bytes | str) -> None:
    path.write_bytes(path.read_bytes()[:-200] if isinstance(content, str) else content)
    with pytest.raises(InputError, match=r"weights of Inception-v3 in .*weights\.pth"):
        load_inception(path)


class Payload:
    """A pickle that writes a file when it is read."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.target,)


def test_code_in_a_file_is_not_run(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "touched"
    torch.save({"linear.weight": Payload(target)}, path)
    with pytest.raises(InputError, match="cut short or no file of PyTorch tensors; fetch https://example.org"):
        load_inception(path)
    assert not target.exists()
    torch.load(path, weights_only=False)  # as torch-fidelity would
    assert target.exists()


@pytest.mark.parametrize("change", ["other layers", "another width", "a list"])
def test_weights_of_another_network_are_told(path: Path, change: str) -> None:
    found: Any = weights()
    if change == "other layers":
        found = {"weight": torch.zeros(2, 2)}
    elif change == "another width":
        found["fc.weight"] = torch.zeros(7, 5)
    else:
        found = [torch.zeros(2)]
    torch.save(found, path)
    with pytest.raises(InputError, match=r"in .*weights\.pth, found those of another network; fetch https://example"):
        load_inception(path)


def test_a_package_that_is_not_installed_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(InputError, match=r"package torch-fidelity; install it with pip install -e '.\[metrics\]'"):
        load_inception(path)


def test_without_a_file_the_weights_are_fetched_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fetch(url: str, target: str, hash_prefix: str) -> None:
        calls.append((url, hash_prefix))
        Path(target).write_bytes(path.read_bytes())

    monkeypatch.setenv("TORCH_HOME", str(path.parent / "cache"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    x = images(3)
    assert torch.equal(load_inception().outputs(x).features, load_inception(path).outputs(x).features)
    assert torch.equal(load_inception().outputs(x).features, load_inception(path).outputs(x).features)
    assert calls == [(URL, features_inception.WEIGHTS_HASH)]
    assert (path.parent / "cache/hub/checkpoints/weights-tiny.pth").exists()


@pytest.mark.parametrize("error", [urllib.error.URLError("Name or service not known"), RuntimeError("invalid hash")])
def test_weights_that_cannot_be_fetched_are_told(path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setenv("TORCH_HOME", str(path.parent / "cache"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(
        InputError, match=r"could not be fetched \(.*(known|hash).*fetch https://example\.org.* into .*"
    ):
        load_inception()


@pytest.mark.slow
def test_the_true_network_takes_a_file_and_tells_truncation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", reason="needs the extra metrics")
    file = tmp_path / "weights.pth"
    with monkeypatch.context() as patch, torch.random.fork_rng():
        patch.setattr(module, "load_state_dict_from_url", lambda *args, **options: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *args: None)
        untrained = module.FeatureExtractorInceptionV3("untrained", ["2048"])
    torch.save(untrained.state_dict(), file)
    net = load_inception(file)
    x = images(1)[:2]
    features, logits = network_outputs(net, x)
    assert features.shape == (2, 2048) == (2, net.num_features)
    assert logits.shape == (2, 1008)
    (expected,) = untrained(((x + 1) * 128).to(torch.uint8).repeat(1, 3, 1, 1))
    torch.testing.assert_close(features, expected)
    torch.testing.assert_close(logits, features @ untrained.fc.weight.T)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(InputError, match="cut short"):
        load_inception(file)
    torch.save({**untrained.state_dict(), "fc.weight": torch.zeros(1000, 2048)}, file)
    with pytest.raises(InputError, match="another network"):
        load_inception(file)
