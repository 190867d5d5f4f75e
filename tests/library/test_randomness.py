"""Draws are named by what they are for and never depend on what was drawn before."""

from __future__ import annotations

import subprocess
import sys

import torch
from hypothesis import given
from hypothesis import strategies as st

from library.randomness import derive_seed, generator, seed_global_torch


def test_seeds_are_the_same_in_every_process():
    program = "from library.randomness import derive_seed; print(derive_seed(7, 'noise', 3, 'a'))"
    outputs = {
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert outputs == {f"{derive_seed(7, 'noise', 3, 'a')}\n"}


@given(st.integers(), st.text(), st.lists(st.one_of(st.integers(), st.text())))
def test_seeds_fit_every_generator(seed, purpose, keys):
    assert 0 <= derive_seed(seed, purpose, *keys) < 2**63


def test_number_and_text_keys_differ():
    assert derive_seed(1, "x", 1) != derive_seed(1, "x", "1")


def test_items_draw_different_noise_with_the_right_distribution():
    noise = torch.stack([torch.randn(64, generator=generator(0, "noise", 0, item)) for item in range(2000)])
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    correlation = torch.corrcoef(noise[:200])
    assert (correlation - torch.eye(200)).abs().max() < 0.65


def test_draws_of_modules_are_those_of_torch_seeded_by_the_same_name():
    seed_global_torch(7, "dropout", 3)
    drawn = torch.rand(5)
    torch.manual_seed(derive_seed(7, "dropout", 3))
    assert torch.equal(drawn, torch.rand(5))
