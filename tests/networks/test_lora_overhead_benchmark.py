"""The benchmark that backs the claim about LoRA's cost runs, and its ways to add LoRA compute the same."""

from __future__ import annotations

import argparse

import pytest
import torch

from benchmarks.lora_overhead import WAYS, Step, measure

OPTIONS = {
    "width": 64, "tokens": 18, "batch": 2, "rank": 2, "double_blocks": 1, "single_blocks": 1, "base_dtype": "float32",
    "autocast": "none", "checkpointing": False, "device": "cpu", "repeats": 1,
}  # fmt: skip


def test_every_way_is_measured():
    results = measure(argparse.Namespace(**OPTIONS))
    assert list(results) == list(WAYS)
    assert results["plain"]["share"] == 0 and all(numbers["seconds"] > 0 for numbers in results.values())


@pytest.mark.parametrize("way", ["accumulated", "fused"])
def test_the_ways_to_add_lora_compute_the_same(way):
    step = Step(argparse.Namespace(**OPTIONS))
    with torch.no_grad():
        for _, up in step.matrices:
            up.normal_(0, 0.1)

    def output(way: str) -> torch.Tensor:
        step.use(way)
        return step.model.run_blocks(step.image, step.text, step.vec, step.rope, None)

    assert not torch.allclose(output(way), output("plain"), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output(way), output("separate"), rtol=1e-4, atol=1e-4)
