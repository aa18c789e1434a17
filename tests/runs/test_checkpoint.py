from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import platform
from collections import OrderedDict
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ppl_vaebm.errors import InputError
from ppl_vaebm.runs import checkpoint

FILES = ["manifest.json", "state.pt", "weights.safetensors"]


def store(folder: Path, step: int, score: float | None = None, **changes: Any) -> Path:
    arguments: dict[str, Any] = {
        "stage": "ebm",
        "weights": {"model": {"w": torch.tensor([float(step), -1.0])}},
        "state": {"step": step},
        "config": {"seed": 3},
        "keep": 2,
    }
    return checkpoint.save(folder, step=step, score=score, **(arguments | changes))


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same(found: Any, expected: Any) -> None:
    """Same types, same keys in the same order, same numbers to the bit, all the way down."""
    assert type(found) is type(expected)
    if isinstance(expected, Tensor):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


def tensors() -> dict[str, Tensor]:
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
    typed = {f"to/{dtype}": torch.tensor([[0, 1], [1, 1]]).to(dtype) for dtype in dtypes}
    return typed | {
        "scalar": torch.tensor(1 / 3, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "slice": torch.arange(1000.0)[10:13],
        "subnormal": torch.tensor([1e-45, -0.0]),
    }


def test_round_trip_is_exact(tmp_path: Path, generator: torch.Generator) -> None:
    state = {
        "optimiser": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"betas": (0.9, 0.99), "on": True}]},
        "generators": {"replay": generator.get_state()},
        "replay": tensors(),
        "position": [1, -2.5, None, "text", 2**80, 1e300, ()],
    }
    weights = {"model": tensors(), "ema": {"w": torch.ones(1)}, "nothing": {}}
    config = {"seed": 3, "model": {"widths": [1, 2], "name": None, "rate": 0.1}}
    path = checkpoint.save(
        tmp_path / "new" / "ebm", stage="ebm", step=12, weights=weights, state=state, config=config, score=-1.25
    )
    assert path == tmp_path / "new" / "ebm" / "step-00000012"
    assert entries(path) == FILES

    found = checkpoint.load(tmp_path / "new" / "ebm")
    assert (found.path, found.stage, found.step, found.score) == (path, "ebm", 12, -1.25)
    assert_same(found.state, state)
    assert_same(found.config, config)
    assert set(found.weights) == set(weights)
    for name in weights:
        assert_same(found.weights[name], {key: weights[name][key] for key in sorted(weights[name])})
    assert all(tensor.is_contiguous() for tensor in found.weights["model"].values())
    # Negative zero and zero are equal, so torch.equal would not tell them apart.
    assert found.weights["model"]["subnormal"].view(torch.int32).tolist() == [1, -(2**31)]


def test_manifest_says_what_the_checkpoint_is(tmp_path: Path) -> None:
    path = store(tmp_path, 7, 0.5)
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["schema"], manifest["stage"], manifest["step"], manifest["score"]) == (2, "ebm", 7, 0.5)
    assert manifest["config"] == {"seed": 3}
    assert manifest["versions"]["python"] == platform.python_version()
    assert manifest["versions"]["torch"] == version("torch")
    for name in ("weights.safetensors", "state.pt"):
        assert manifest["sha256"][name] == hashlib.sha256((path / name).read_bytes()).hexdigest()


def test_resumed_optimiser_continues_to_the_bit(tmp_path: Path, generator: torch.Generator) -> None:
    def updates(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, num: int) -> None:
        for _ in range(num):
            optimizer.zero_grad()
            (parameter * torch.randn(3, generator=generator)).sum().square().backward()
            optimizer.step()

    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([parameter], lr=0.1)
    updates(parameter, optimizer, 3)
    state = {"optimiser": optimizer.state_dict(), "generator": generator.get_state()}
    store(tmp_path, 3, weights={"model": {"p": parameter}}, state=state)
    updates(parameter, optimizer, 4)

    found = checkpoint.load(tmp_path)
    resumed = nn.Parameter(found.weights["model"]["p"])
    other = torch.optim.Adam([resumed], lr=0.5)
    other.load_state_dict(found.state["optimiser"])
    generator.set_state(found.state["generator"])
    updates(resumed, other, 4)
    assert torch.equal(resumed, parameter)


def test_loaded_tensors_are_apart_from_the_file_and_from_each_other(tmp_path: Path) -> None:
    shared = torch.ones(2)
    store(tmp_path, 1, weights={"model": {"a": shared, "b": shared}}, state={"a": shared, "b": shared[:1]})
    found = checkpoint.load(tmp_path)
    found.weights["model"]["a"].add_(1)
    found.state["a"].add_(1)
    assert found.weights["model"]["b"].tolist() == [1.0, 1.0]
    assert found.state["b"].tolist() == [1.0]
    again = checkpoint.load(tmp_path)
    assert again.weights["model"]["a"].tolist() == [1.0, 1.0]


def same_content(seed: int) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Equal content as other objects: strings and tensors that are one object here are two there."""
    text, vector = "".join(["ada", "m"]), torch.arange(3.0)
    if seed == 0:
        weights = {"model": {"b": vector, "a": vector}, "ema": {"a": torch.zeros(2)}}
        return weights, {"x": text, "y": text, "t": vector, "u": vector, "l": ["ada" + "m"]}
    weights = {
        "ema": {"a": torch.zeros(5)[1:3]},
        "model": {"a": torch.arange(6.0)[:3], "b": torch.arange(0, 3).float()},
    }
    state = {"x": "".join(["ad", "am"]), "y": "".join(["a", "dam"]), "t": vector.clone(), "u": torch.arange(9.0)[:3]}
    return weights, state | {"l": [text]}


def test_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    paths = []
    for index, folder in enumerate(("a", "another")):
        weights, state = same_content(index)
        paths.append(store(tmp_path / folder, 5, weights=weights, state=state))
    for name in FILES:
        assert (paths[0] / name).read_bytes() == (paths[1] / name).read_bytes()
    other = store(tmp_path / "other", 5, weights={"model": {"a": torch.arange(3.0) + 1e-7}})
    assert (other / "weights.safetensors").read_bytes() != (paths[0] / "weights.safetensors").read_bytes()


def test_loading_and_saving_again_gives_the_same_bytes(tmp_path: Path) -> None:
    weights, state = same_content(0)
    path = store(tmp_path / "a", 5, weights=weights, state=state)
    found = checkpoint.load(tmp_path / "a")
    again = store(tmp_path / "b", 5, weights=found.weights, state=found.state)
    assert contents(again) == contents(path)


def test_keeps_the_last_two_and_the_best(tmp_path: Path) -> None:
    seen = []
    for step, score in ((1, 0.0), (2, 3.0), (3, 1.0), (4, 2.0), (5, None), (6, 3.0), (7, -1.0), (8, -2.0)):
        store(tmp_path, step, score)
        seen.append(checkpoint.available(tmp_path))
    # Step 6 ties with step 2, and the later is the best.
    assert seen == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [5, 6], [6, 7], [6, 7, 8]]
    assert entries(tmp_path) == ["step-00000006", "step-00000007", "step-00000008"]
    assert checkpoint.load(tmp_path).step == 8
    assert checkpoint.load(tmp_path, "best").step == 6
    assert checkpoint.load(tmp_path, 7).weights["model"]["w"].tolist() == [7.0, -1.0]


def test_without_scores_the_best_is_the_last(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        store(tmp_path, step)
    assert checkpoint.available(tmp_path) == [2, 3]
    assert checkpoint.load(tmp_path, "best").step == 3
    assert checkpoint.load(tmp_path, "best").score is None


def test_keep_is_how_many_stay(tmp_path: Path) -> None:
    for step in range(1, 6):
        store(tmp_path, step, keep=3)
    assert checkpoint.available(tmp_path) == [3, 4, 5]
    store(tmp_path, 6, keep=1)
    assert checkpoint.available(tmp_path) == [6]


def test_just_written_stays_even_behind_later_steps(tmp_path: Path) -> None:
    for step in (100, 200):
        store(tmp_path, step)
    path = store(tmp_path, 50)
    assert path.is_dir()
    assert checkpoint.available(tmp_path) == [50, 100, 200]


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        store(tmp_path, step)
    assert checkpoint.available(tmp_path) == [99_999_999, 100_000_000]
    assert checkpoint.load(tmp_path).step == 100_000_000


def test_same_step_is_replaced(tmp_path: Path) -> None:
    store(tmp_path, 1, 0.5)
    store(tmp_path, 1, 0.25, weights={"model": {"w": torch.tensor([9.0])}})
    found = checkpoint.load(tmp_path)
    assert (found.score, found.weights["model"]["w"].tolist()) == (0.25, [9.0])
    assert entries(tmp_path) == ["step-00000001"]


def fail_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Let the numbered call of os.replace raise, and all after it, as if the process had died there."""
    real, num_calls = os.replace, 0

    def replace(source: Path, target: Path) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls >= call:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)


def test_crash_before_the_rename_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store(tmp_path, 1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        fail_at(patch, 1)
        store(tmp_path, 2)
    assert entries(tmp_path) == [".tmp-step-00000002", "step-00000001"]
    assert checkpoint.available(tmp_path) == [1]
    assert checkpoint.load(tmp_path).weights["model"]["w"].tolist() == [1.0, -1.0]
    with pytest.raises(InputError, match=r"step 2 in .*, found \[1\]"):
        checkpoint.load(tmp_path, 2)

    store(tmp_path, 3)
    assert entries(tmp_path) == ["step-00000001", "step-00000003"]


@pytest.mark.parametrize("call", [1, 2])
def test_crash_while_replacing_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    store(tmp_path, 1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        fail_at(patch, call)
        store(tmp_path, 1, weights={"model": {"w": torch.tensor([9.0])}})
    assert checkpoint.available(tmp_path) == [1]
    for which in ("last", "best"):
        assert checkpoint.load(tmp_path, which).weights["model"]["w"].tolist() == [1.0, -1.0]

    store(tmp_path, 2)
    assert entries(tmp_path) == ["step-00000001", "step-00000002"]
    assert checkpoint.load(tmp_path, 1).weights["model"]["w"].tolist() == [1.0, -1.0]


def test_crash_after_replacing_leaves_the_new_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store(tmp_path, 1)

    def fail(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("shutil.rmtree", fail)
        store(tmp_path, 1, weights={"model": {"w": torch.tensor([9.0])}})
    assert checkpoint.load(tmp_path).weights["model"]["w"].tolist() == [9.0]
    store(tmp_path, 2)
    assert entries(tmp_path) == ["step-00000001", "step-00000002"]
    assert checkpoint.load(tmp_path, 1).weights["model"]["w"].tolist() == [9.0]


def test_crash_while_pruning_leaves_no_half_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        store(tmp_path, step)

    def fail(path: Path) -> None:
        (path / "state.pt").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("shutil.rmtree", fail)
        store(tmp_path, 3)
    assert checkpoint.available(tmp_path) == [2, 3]
    assert checkpoint.load(tmp_path).step == 3


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    at_replace: list[set[int]] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        real_fsync(descriptor)

    def replace(source: Path, target: Path) -> None:
        at_replace.append(set(synced))
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    path = store(tmp_path, 1)
    assert at_replace == [{path.stat().st_ino, *((path / name).stat().st_ino for name in FILES)}]
    assert synced[-1] == tmp_path.stat().st_ino


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["weights.safetensors", "state.pt"])
@pytest.mark.parametrize("damage", [truncate, empty, flip])
def test_damaged_file_is_refused_and_left_alone(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    store(tmp_path, 1)
    path = store(tmp_path, 2)
    expected = hashlib.sha256((path / name).read_bytes()).hexdigest()
    damage(path / name)
    found = hashlib.sha256((path / name).read_bytes()).hexdigest()
    before = contents(tmp_path)
    with pytest.raises(InputError) as caught:
        checkpoint.load(tmp_path)
    assert str(caught.value) == (
        f"expected {path / name} to be whole (sha256 {expected}), "
        f"found {(path / name).stat().st_size} bytes with sha256 {found}; "
        f"delete the folder {path} to continue from the checkpoint before it"
    )
    assert contents(tmp_path) == before
    assert checkpoint.load(tmp_path, 1).step == 1


def test_missing_file_is_refused(tmp_path: Path) -> None:
    path = store(tmp_path, 2)
    (path / "state.pt").unlink()
    with pytest.raises(InputError, match=r"state\.pt to be readable, found No such file or directory; delete"):
        checkpoint.load(tmp_path)


def edit_manifest(path: Path, changes: Mapping[str, Any]) -> None:
    file = path / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("schema", [0, 1, 3, "2"])
def test_other_schema_is_refused(tmp_path: Path, schema: object) -> None:
    path = store(tmp_path, 1)
    edit_manifest(path, {"schema": schema})
    before = contents(tmp_path)
    with pytest.raises(InputError, match=rf"manifest\.json to have schema 2, found {schema!r}; .* delete the folder"):
        checkpoint.load(tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("text", [b"", b'{"schema": 2, "st', b"\xff\xfe{}", b"[1]", b"{}", b'{"schema": 2}'])
def test_unreadable_manifest_is_refused(tmp_path: Path, text: bytes) -> None:
    path = store(tmp_path, 1)
    (path / "manifest.json").write_bytes(text)
    before = contents(tmp_path)
    for which in ("last", "best"):
        with pytest.raises(InputError, match=r"manifest\.json to be .*; delete the folder"):
            checkpoint.load(tmp_path, which)
    assert contents(tmp_path) == before


def test_folder_under_another_name_is_refused(tmp_path: Path) -> None:
    store(tmp_path, 1).rename(tmp_path / "step-00000002")
    with pytest.raises(InputError, match="the complete manifest of step-00000002, found a missing or wrong entry"):
        checkpoint.load(tmp_path)


def test_unreadable_checkpoints_neither_count_nor_go(tmp_path: Path) -> None:
    damaged = store(tmp_path, 1)
    (damaged / "manifest.json").write_text("{")
    other = store(tmp_path, 2)
    edit_manifest(other, {"schema": 3})
    for step in (3, 4, 5):
        store(tmp_path, step)
    assert checkpoint.available(tmp_path) == [1, 2, 4, 5]


@pytest.mark.parametrize("make", [False, True])
@pytest.mark.parametrize("which", ["last", "best", 5])
def test_no_checkpoint_is_refused(tmp_path: Path, make: bool, which: Any) -> None:
    folder = tmp_path / "ebm"
    if make:
        folder.mkdir()
    with pytest.raises(InputError, match="expected a checkpoint in .*ebm, found none; train that stage first"):
        checkpoint.load(folder, which)
    assert folder.exists() == make
    assert checkpoint.available(folder) == []


def test_other_entries_are_not_checkpoints(tmp_path: Path) -> None:
    for name in ("step-1", "step-0000001x", "xstep-00000001", ".tmp-step-00000004", "notes"):
        (tmp_path / name).mkdir()
    assert checkpoint.available(tmp_path) == []


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def replace_file(path: Path, name: str, data: bytes) -> None:
    """Put another file in place with its checksum, so that only the reader of its format can refuse it."""
    (path / name).write_bytes(data)
    digests = json.loads((path / "manifest.json").read_text())["sha256"]
    edit_manifest(path, {"sha256": digests | {name: hashlib.sha256(data).hexdigest()}})


@pytest.mark.parametrize("is_archive", [True, False])
def test_pickle_that_runs_code_is_refused_without_running_it(tmp_path: Path, is_archive: bool) -> None:
    path, trace = store(tmp_path / "ebm", 1), tmp_path / "trace"
    buffer = io.BytesIO()
    if is_archive:
        torch.save({"x": Malicious(trace)}, buffer)
    else:
        pickle.dump({"x": Malicious(trace)}, buffer, protocol=2)
    replace_file(path, "state.pt", buffer.getvalue())
    with pytest.raises(InputError, match=r"state\.pt to be .* a pickle that could run code; delete the folder"):
        checkpoint.load(tmp_path / "ebm")
    assert not trace.exists()
    # The same bytes do run code when they are trusted: the test would notice.
    buffer.seek(0)
    torch.load(buffer, weights_only=False) if is_archive else pickle.load(buffer)
    assert trace.exists()


@pytest.mark.parametrize(("name", "data"), [("state.pt", b""), ("state.pt", b"PK"), ("weights.safetensors", b"x" * 99)])
def test_other_format_is_refused(tmp_path: Path, name: str, data: bytes) -> None:
    path = store(tmp_path, 1)
    replace_file(path, name, data)
    with pytest.raises(InputError, match=f"expected .*{name} to be .* delete the folder"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": {"b": [0, Path("x")]}}, r"found pathlib[\w.]+ at state\['a'\]\['b'\]\[1\]$"),
        ({"a": (np.float64(1.0),)}, r"found numpy\.float64 at state\['a'\]\[0\]$"),
        ({"a": np.zeros(1)}, r"found numpy\.ndarray at state\['a'\]$"),
        ({"a": {1, 2}}, r"found builtins\.set at state\['a'\]$"),
        ({3: torch.Generator()}, r"found torch\._C\.Generator at state\[3\]$"),
        ({"a": torch.Size([1])}, r"found torch\.Size at state\['a'\]$"),
        ({"a": {1.5: 0}}, r"found the key 1\.5 in state\['a'\]$"),
        ({True: 0}, r"found the key True in state$"),
    ],
)
def test_state_of_other_types_is_our_own_fault(tmp_path: Path, state: dict[Any, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        store(tmp_path / "ebm", 1, state=state)
    assert not (tmp_path / "ebm").exists()


def test_ordered_dictionaries_and_parameters_become_plain(tmp_path: Path) -> None:
    state = OrderedDict(b=nn.Parameter(torch.ones(2)), a=1)
    store(tmp_path, 1, state=state)
    assert_same(checkpoint.load(tmp_path).state, {"b": torch.ones(2), "a": 1})


@pytest.mark.parametrize(
    "changes",
    [
        {"step": -1},
        {"keep": 0},
        {"score": float("nan")},
        {"score": float("inf")},
        {"weights": {"a/b": {}}},
        {"config": {"rate": float("nan")}},
    ],
)
def test_values_out_of_range_are_our_own_fault(tmp_path: Path, changes: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"folder": tmp_path / "ebm", "step": 1}
    with pytest.raises(ValueError):
        store(**(arguments | changes))
    assert not (tmp_path / "ebm").exists()
