"""The benchmark that backs the claim about --fused_backward_pass counts what it says, for the same training."""

from __future__ import annotations

import argparse

import torch

from benchmarks.fused_backward import WAYS, Training

OPTIONS = {"width": 64, "rank": 4, "double_blocks": 1, "single_blocks": 2, "device": "cpu"}


def test_fused_steps_hold_one_gradient_at_a_time_and_end_at_the_same_weights():
    taken = {way: Training(argparse.Namespace(**OPTIONS), way) for way in WAYS}
    for training in taken.values():
        training.step()
        training.step()
    plain, fused = taken["ordinary"], taken["fused"]
    sizes = [parameter.nbytes for parameter in plain.parameters]
    assert plain.most_gradients == sum(sizes) and fused.most_gradients == max(sizes)
    assert plain.states() == fused.states() > 0
    assert all(torch.equal(one, two) for one, two in zip(plain.parameters, fused.parameters))
