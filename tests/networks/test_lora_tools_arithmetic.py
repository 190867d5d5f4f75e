"""Sums, truncation and choice of rank against formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from networks.adapters.lora_file import LoRAWeights
from networks.lora_tools.arithmetic import (
    RANK_METHODS,
    clamp_limit,
    compacted,
    concatenated,
    difference,
    dynamic_rank,
    extracted,
    largest_parts,
    numerical_rank,
    retention,
    singular_parts,
    truncated,
    with_storable_alpha,
)


def module(out=9, rest=(7,), rank=3, alpha=2.0, seed=0) -> LoRAWeights:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, *rest, generator=generator, dtype=torch.float64)
    up = torch.randn(out, rank, *(1 for _ in rest[1:]), generator=generator, dtype=torch.float64)
    return LoRAWeights(down, up, alpha)


def product(weights: LoRAWeights, ratio: float = 1.0) -> torch.Tensor:
    """The formula, for Linear and convolutions, through torch's own convolution."""
    scale = ratio * weights.alpha / len(weights.down)
    down, up = weights.down.double(), weights.up.double()
    if down.dim() == 2:
        return scale * up @ down
    return scale * torch.nn.functional.conv2d(down.permute(1, 0, 2, 3), up).permute(1, 0, 2, 3)


RESTS = [(7,), (5, 1, 1), (4, 3, 3)]


@pytest.mark.parametrize("rest", RESTS)
def test_difference_is_the_formula(rest):
    weights = module(rest=rest)
    assert torch.allclose(difference(weights, -0.3, torch.float64), product(weights, -0.3), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("combine", [concatenated, lambda parts: compacted(concatenated(parts))])
def test_a_sum_has_each_ratio_once_and_each_alpha(combine, rest):
    parts = [(module(rest=rest), 0.5), (module(rest=rest, rank=2, alpha=5.0, seed=1), -1.25)]
    parts.append((module(rest=rest, rank=1, alpha=0.25, seed=2), 3.0))
    wanted = sum(product(weights, ratio) for weights, ratio in parts)
    made = combine(parts)
    assert made.down.shape[1:] == rest and made.up.shape[2:] == (1,) * (len(rest) - 1)
    assert torch.allclose(product(made), wanted, rtol=1e-12, atol=1e-13)


def test_files_of_one_strength_are_put_side_by_side_bit_for_bit():
    first, second = module(alpha=3.0), module(alpha=2.0, rank=2, seed=1)
    made = concatenated([(first, 1.0), (second, 1.0)])
    assert torch.equal(made.down, torch.cat([first.down, second.down])) and made.alpha == 5.0
    assert torch.equal(made.up, torch.cat([first.up, second.up], dim=1))


def test_a_file_without_strength_adds_nothing_and_a_cancelled_sum_is_zero():
    assert not product(concatenated([(module(alpha=0.0), 1.0)])).any()
    mixed = concatenated([(module(alpha=0.0), 1.0), (module(seed=1), 1.0)])
    assert torch.allclose(product(mixed), product(module(seed=1)), rtol=1e-12, atol=1e-13)
    cancelled = compacted(concatenated([(module(), 1.0), (module(), -1.0)]))
    assert len(cancelled.down) == 1 and product(cancelled).abs().max() < 1e-12


def test_the_smallest_rank_is_found():
    weights = module(rank=4, out=12, rest=(11,))
    twice = concatenated([(weights, 1.0), (weights, 2.0)])
    assert len(twice.down) == 8 and numerical_rank(twice, singular_parts(twice)) == 4
    assert len(compacted(twice).down) == 4
    wide = concatenated([(module(rank=6, seed=seed), 1.0) for seed in range(3)])
    assert len(compacted(wide).down) == 7  # as many as the layer has inputs


def test_layers_of_other_sizes_are_refused():
    with pytest.raises(ValueError, match="different sizes"):
        concatenated([(module(), 1.0), (module(out=8), 1.0)])


@pytest.mark.parametrize("rest", RESTS)
def test_singular_values_are_those_of_the_product(rest):
    weights = module(rest=rest, rank=5, alpha=5.0)
    parts = singular_parts(weights)
    wanted = torch.linalg.svdvals(product(weights).flatten(1))
    count = len(parts.s)
    assert torch.allclose(parts.s, wanted[:count], rtol=1e-12, atol=1e-13)
    assert wanted[count:].sum() < 1e-12
    assert torch.allclose(parts.u * parts.s @ parts.vh, product(weights).flatten(1), atol=1e-12)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_truncation_is_the_best_approximation(rank):
    """Eckart-Young: the error is what the left-out singular values hold."""
    weights = module(rank=5, alpha=5.0)
    made = truncated(singular_parts(weights), rank, 1.0, weights)
    values = torch.linalg.svdvals(product(weights))
    assert math.isclose(float((product(made) - product(weights)).norm()), float(values[rank:].norm()), rel_tol=1e-10)
    assert made.alpha == rank and torch.allclose(made.up.norm(dim=0), made.down.norm(dim=1))


@pytest.mark.parametrize("shape", [(9, 7), (6, 5, 1, 1), (6, 4, 3, 3)])
def test_extraction_at_full_rank_is_exact_and_below_it_the_best(shape):
    wanted = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    full = extracted(wanted, 100)
    assert full.down.shape[1:] == shape[1:] and full.alpha == len(full.down) == min(shape[0], math.prod(shape[1:]))
    assert torch.allclose(product(full), wanted, atol=1e-12)
    values = torch.linalg.svdvals(wanted.flatten(1))
    error = (product(extracted(wanted, 2)) - wanted).norm()
    assert math.isclose(float(error), float(values[2:].norm()), rel_tol=1e-10)


@pytest.mark.parametrize("shape", [(60, 20), (20, 60), (30, 30)])
@pytest.mark.parametrize("decay", [0.0, 0.5], ids=["flat", "steep"])
def test_the_largest_singular_parts_are_those_of_a_decomposition_in_float64(shape, decay):
    """Of float32 matrices whose singular values lie close together, or fall to a millionth and to zero."""
    torch.manual_seed(0)
    count = min(shape)
    u, v = (torch.linalg.qr(torch.randn(size, count, dtype=torch.float64))[0] for size in shape)
    s = torch.exp(-decay * torch.arange(count, dtype=torch.float64) * 2).where(torch.arange(count) < 18, 0.0)
    matrix = (u * s @ v.t()).float()
    exact = matrix.double()
    values = torch.linalg.svdvals(exact)
    for rank in (1, 5, 18, 100):
        parts = largest_parts(matrix, rank)
        assert parts.u.dtype == torch.float32 and len(parts.s) == min(rank, count)
        assert torch.allclose(parts.s.double(), values[:rank], atol=1e-7)
        product = parts.u.double() * parts.s.double() @ parts.vh.double()
        assert abs(float((product - exact).norm() - values[rank:].norm())) < 5e-7
        assert bool(torch.isfinite(product).all())
    assert not largest_parts(torch.zeros(shape), 3).s.any()


def test_the_clamp_cuts_what_lies_beyond_the_quantile_whatever_the_signs():
    wanted = torch.randn(30, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    free, cut = extracted(wanted, 5), extracted(wanted, 5, 0.9)
    values = torch.cat([free.up.flatten(), free.down.flatten()])
    both = torch.cat([values, -values])
    limit = torch.quantile(values.abs(), 0.8)
    assert math.isclose(clamp_limit(values, 0.9), float(limit))
    assert abs(float(torch.quantile(both, 0.9)) - float(limit)) < 0.01 * float(limit)
    assert torch.allclose(cut.up, free.up.clamp(-limit, limit)) and torch.allclose(
        cut.down, free.down.clamp(-limit, limit)
    )
    assert clamp_limit(values, 1.0) == float(values.abs().max()) == clamp_limit(-values, 1.0)


values = st.lists(st.floats(0.01, 100.0), min_size=1, max_size=12).map(lambda x: torch.tensor(sorted(x)[::-1]).double())


def kept_enough(s: torch.Tensor, rank: int, method: str, parameter: float) -> bool:
    """The criterion itself: what is left out is as it may be."""
    if method == "sv_ratio":
        return all(float(value) <= float(s[0]) / parameter for value in s[rank:])
    powers = s if method == "sv_cumulative" else s.square()
    share = float(powers[:rank].sum()) / float(powers.sum())
    return (share if method == "sv_cumulative" else math.sqrt(share)) >= parameter * (1 - 1e-12)


@given(values, st.sampled_from(sorted(RANK_METHODS)), st.floats(0.05, 1.0))
def test_dynamic_ranks_fulfil_their_criterion_and_one_less_would_not(s, method, share):
    parameter = 1 / share if method == "sv_ratio" else share
    rank = dynamic_rank(s, method, parameter, 100)
    assert 1 <= rank <= len(s)
    assert kept_enough(s, rank, method, parameter)
    assert rank == 1 or not kept_enough(s, rank - 1, method, parameter * (1 + 1e-9))


@pytest.mark.parametrize(
    ("method", "parameter", "rank"),
    [
        ("sv_ratio", 1.0, 1), ("sv_ratio", 3.9, 2), ("sv_ratio", 8.5, 4), ("sv_ratio", 1e9, 4),
        ("sv_cumulative", 0.5, 1), ("sv_cumulative", 0.54, 2), ("sv_cumulative", 0.8, 2), ("sv_cumulative", 1.0, 4),
        ("sv_fro", 0.86, 1), ("sv_fro", 0.88, 2), ("sv_fro", 1.0, 4),
    ],
)  # fmt: skip
def test_ranks_of_a_known_matrix(method, parameter, rank):
    """Singular values 8, 4, 2, 1: sum 15, squares 64 + 16 + 4 + 1 = 85."""
    s = torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64)
    assert dynamic_rank(s, method, parameter, 100) == rank
    assert dynamic_rank(s, method, parameter, 1) == 1
    assert dynamic_rank(torch.zeros(4), method, parameter, 4) == 1


def test_what_is_kept_of_a_known_matrix():
    kept = retention(torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64), 2)
    assert kept == pytest.approx((12 / 15, math.sqrt(80 / 85), 2.0))
    assert retention(torch.zeros(3), 1) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("alpha", [2.0, 1 / 3, 8.37, 1e-9, 1e9])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_an_alpha_that_the_format_rounds_does_not_change_the_sum(alpha, dtype):
    weights = module(alpha=alpha)
    made = with_storable_alpha(weights, dtype)
    assert float(torch.tensor(made.alpha).to(dtype)) == made.alpha
    assert torch.allclose(product(made), product(weights), rtol=1e-12)
