"""A saved state gives back exactly what was put in, and refuses what it cannot be."""

from __future__ import annotations

import json
import math
import os

import pytest
import torch

from library.errors import UserError
from library.training.output.state import Position, RunIdentity, SavedState, pack, save_state, unpack


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and (a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b)))


def test_nested_data_survives_json():
    data = {
        0: {"exp_avg": torch.randn(3, 2), "step": torch.tensor(5.0), "betas": (0.9, 0.999)},
        "groups": [{"lr": 0.1 + 0.2, "params": [0, 1], "none": None, "flag": True, "inf": math.inf}],
        "bytes": torch.arange(4, dtype=torch.uint8),
        "empty": {},
    }
    tensors: dict[str, torch.Tensor] = {}
    packed = json.loads(json.dumps(pack(data, tensors, "x")))
    assert equal(unpack(packed, tensors), data)


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adagrad", "NAdam", "RMSprop"])
def test_an_optimizer_goes_on_to_the_same_bits(tmp_path, name):
    def start():
        torch.manual_seed(0)
        weights = torch.nn.Parameter(torch.randn(4, 3))
        optimizer = getattr(torch.optim, name)([{"params": [weights], "lr": 1e-2}])
        return weights, optimizer

    def step(weights, optimizer, number):
        weights.grad = torch.sin(weights.detach() * number)
        optimizer.step()

    weights, optimizer = start()
    for number in range(10):
        step(weights, optimizer, number)
        if number == 4:
            state = {"w": weights.detach()}
            save_state(
                tmp_path / "s", state, optimizer.state_dict(), Position(1, 2, 5), RunIdentity({"a": 1}), {"x": [0.1]}
            )
    again, resumed = start()
    saved = SavedState(tmp_path / "s")
    again.data.copy_(saved.network_state()["w"])
    resumed.load_state_dict(saved.optimizer_state())
    for number in range(5, 10):
        step(again, resumed, number)
    assert torch.equal(weights, again)
    assert saved.position == Position(1, 2, 5)
    assert saved.rest == {"x": [0.1]}


def make(folder, **identity) -> SavedState:
    save_state(
        folder, {"w": torch.ones(1)}, {}, Position(), RunIdentity({"optimizer": "A"}, {"data": "d"} | identity), None
    )
    return SavedState(folder)


def test_a_state_of_another_run_is_refused_and_changes_are_named(tmp_path):
    saved = make(tmp_path / "s")
    with pytest.raises(UserError, match="belongs to another run: its optimizer is A, this run's is B"):
        saved.check_belongs_to(RunIdentity({"optimizer": "B"}))
    assert saved.check_belongs_to(RunIdentity({"optimizer": "A"}, {"data": "e"})) == ["data"]


def test_a_state_without_a_later_option_had_its_default(tmp_path):
    saved, later = make(tmp_path / "s"), {"data": "d", "--later": False}
    assert saved.check_belongs_to(RunIdentity({"optimizer": "A"}, later), {"--later": False, "data": "x"}) == []
    changed = saved.check_belongs_to(RunIdentity({"optimizer": "A"}, {**later, "--later": True}), {"--later": False})
    assert changed == ["--later"]
    assert saved.check_belongs_to(RunIdentity({"optimizer": "A"}, {"data": "d"})) == []


def test_a_state_is_replaced_whole(tmp_path):
    make(tmp_path / "s")
    make(tmp_path / "s", data="new")
    assert SavedState(tmp_path / "s").identity.exact == {"data": "new"}
    assert os.listdir(tmp_path) == ["s"]


def test_a_failed_save_leaves_the_old_state(tmp_path):
    make(tmp_path / "s")
    with pytest.raises(TypeError, match="cannot store a object"):
        save_state(tmp_path / "s", {}, {"bad": object()}, Position(), RunIdentity(), None)
    assert SavedState(tmp_path / "s").identity.fixed == {"optimizer": "A"}
    assert os.listdir(tmp_path) == ["s"]


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="there is no state folder"):
        SavedState(tmp_path / "none")
    with pytest.raises(UserError, match="no readable train_state.json"):
        SavedState(tmp_path)
    (tmp_path / "train_state.json").write_text('{"current_epoch": 1, "current_step": 5}', encoding="utf-8")
    with pytest.raises(UserError, match="written by another program"):
        SavedState(tmp_path)
    make(tmp_path / "s")
    (tmp_path / "s" / "optimizer.safetensors").unlink()
    with pytest.raises(UserError, match=r"incomplete: optimizer\.safetensors is missing"):
        SavedState(tmp_path / "s")
