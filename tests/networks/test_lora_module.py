"""One LoRA module against written-out formulas: dropouts, multipliers, convolutions, splitting, perturbation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from networks.adapters.lora_module import LoRAModule, Regularisation
from networks.adapters.lora_targets import Target, TargetTable

TABLE = TargetTable("lora_unet", "unet", ())


def module_for(layer: nn.Module, rank: int = 4, alpha: float = 2.0, seed: int = 0, **settings) -> LoRAModule:
    """A module with values in all its matrices, in place of the layer's forward."""
    split_rows = settings.pop("split_rows", None)
    lora = LoRAModule(
        Target("layer", layer.requires_grad_(False), TABLE), rank, alpha, 1.0, Regularisation(**settings), split_rows
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    lora.apply_to()
    return lora


def linear(inputs: int = 6, outputs: int = 10) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(inputs, outputs)


def plain(layer: nn.Linear, x):
    return F.linear(x, layer.weight, layer.bias)


def test_multiplier_scales_and_zero_gives_the_layers_own_bits():
    layer = linear()
    lora = module_for(layer)
    x = torch.randn(2, 3, 6)
    addition = 0.5 * x @ lora.down_matrix.t() @ lora.up_matrix.t()
    for multiplier in (1.0, -0.7, 3.0):
        lora.multiplier = multiplier
        torch.testing.assert_close(layer(x), plain(layer, x) + multiplier * addition)
    lora.multiplier = 0.0
    assert torch.equal(layer(x), plain(layer, x))
    lora.multiplier, lora.enabled = 1.0, False
    assert torch.equal(layer(x), plain(layer, x))


@pytest.mark.parametrize("shape", [(3,), (3, 5), (3, 2, 4)])
def test_each_item_of_a_batch_may_have_its_own_multiplier(shape):
    layer = linear()
    lora = module_for(layer)
    x = torch.randn(*shape, 6)
    lora.multiplier = torch.tensor([0.0, 1.0, -2.0])
    together = layer(x)
    for index, multiplier in enumerate([0.0, 1.0, -2.0]):
        lora.multiplier = multiplier
        torch.testing.assert_close(together[index : index + 1], layer(x[index : index + 1]))
    lora.multiplier = torch.ones(2)
    with pytest.raises(ValueError, match="3 items"):
        layer(x)


def test_module_dropout_skips_whole_calls_at_its_rate():
    layer = linear()
    lora = module_for(layer, module_dropout=0.3).train()
    x = torch.randn(2, 6)
    base = plain(layer, x)
    torch.manual_seed(0)
    skipped = sum(torch.equal(layer(x), base) for _ in range(600)) / 600
    assert 0.24 < skipped < 0.36
    lora.eval()
    assert not any(torch.equal(layer(x), base) for _ in range(50))


def test_neuron_dropout_acts_between_down_and_up():
    layer = linear()
    lora = module_for(layer, rank=64, dropout=0.25).train()
    x = torch.randn(2, 50, 6)
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    mask = F.dropout(torch.ones(2, 50, 64), 0.25)
    assert set(mask.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs((mask == 0).float().mean().item() - 0.25) < 0.02
    expected = plain(layer, x) + lora.scale * ((x @ lora.down_matrix.t()) * mask) @ lora.up_matrix.t()
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(8,), (8, 5)])
def test_rank_dropout_takes_whole_ranks_of_an_item_and_makes_up_for_them(shape):
    layer = linear()
    lora = module_for(layer, rank=64, rank_dropout=0.4).train()
    x = torch.randn(*shape, 6)
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    kept = (torch.rand(8, 64) > 0.4).float()
    assert abs(kept.mean().item() - 0.6) < 0.06
    mask = kept if len(shape) == 1 else kept[:, None, :]
    expected = plain(layer, x) + lora.scale / 0.6 * ((x @ lora.down_matrix.t()) * mask) @ lora.up_matrix.t()
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{"dropout": 0.5}, {"rank_dropout": 0.5}, {"dropout": 0.3, "rank_dropout": 0.3}])
def test_dropouts_keep_the_mean_and_are_off_in_evaluation(settings):
    layer = linear()
    lora = module_for(layer, **settings)
    x = torch.randn(1, 6)
    exact = lora.eval() and layer(x)
    lora.train()
    torch.manual_seed(0)
    drawn = torch.stack([layer(x) for _ in range(1500)])
    error = (drawn.mean(dim=0) - exact).abs() / (drawn.std(dim=0) / 1500**0.5)
    assert drawn.std(dim=0).min() > 0.1
    assert error.max() < 4.5
    lora.eval()
    assert torch.equal(layer(x), exact)


def test_dropout_gradients_reach_only_what_was_kept():
    layer = linear()
    lora = module_for(layer, rank_dropout=0.5).train()
    torch.manual_seed(7)
    kept = torch.rand(1, 4) > 0.5
    assert kept.any() and not kept.all()
    torch.manual_seed(7)
    layer(torch.randn(1, 6, generator=torch.Generator().manual_seed(0))).sum().backward()
    assert torch.equal(lora.lora_down.weight.grad.abs().sum(dim=1) > 0, kept[0])
    assert torch.equal(lora.lora_up.weight.grad.abs().sum(dim=0) > 0, kept[0])


@pytest.mark.parametrize("kernel", [1, 3])
def test_convolutions_merge_to_what_they_compute(kernel):
    torch.manual_seed(0)
    layer = nn.Conv2d(5, 7, kernel, stride=2, padding=kernel // 2)
    lora = module_for(layer, rank=3, alpha=1.5)
    lora.multiplier = 0.8
    x = torch.randn(2, 5, 9, 9)
    with_lora = layer(x)
    delta = torch.einsum("or,rikl->oikl", lora.lora_up.weight[:, :, 0, 0], lora.lora_down.weight)
    expected = F.conv2d(x, layer.weight + 0.8 * 0.5 * delta, layer.bias, 2, kernel // 2)
    torch.testing.assert_close(with_lora, expected, rtol=1e-4, atol=1e-4)
    lora.merge()
    lora.remove()
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    assert lora.lora_down.weight.shape == (3, 5, kernel, kernel) and lora.lora_up.weight.shape == (7, 3, 1, 1)


def test_convolutions_have_the_same_dropouts():
    torch.manual_seed(0)
    layer = nn.Conv2d(5, 7, 3, padding=1)
    lora = module_for(layer, 16, dropout=0.2, rank_dropout=0.3).train()
    x = torch.randn(2, 5, 4, 6)
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    mask = F.dropout(torch.ones(2, 4, 6, 16), 0.2).movedim(-1, 1)
    mask = mask * (torch.rand(2, 16) > 0.3).float()[:, :, None, None]
    hidden = F.conv2d(x, lora.lora_down.weight, padding=1) * mask
    expected = lora.org_forward(x) + lora.scale / 0.7 * F.conv2d(hidden, lora.lora_up.weight)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def split_sum(lora: LoRAModule, x):
    """The parts one by one, as separate small LoRA modules would compute them."""
    outs = [x @ down.weight.t() @ up.weight.t() for down, up in zip(lora.lora_down, lora.lora_up)]
    return lora.scale * torch.cat(outs, dim=-1)


def test_a_split_module_is_a_lora_of_each_part():
    layer = linear(6, 11)
    lora = module_for(layer, rank=2, alpha=3.0, split_rows=[3, 3, 5])
    x = torch.randn(2, 4, 6, requires_grad=True)
    y = layer(x)
    expected = plain(layer, x) + split_sum(lora, x)
    torch.testing.assert_close(y, expected)
    weights = torch.randn_like(y)
    inputs = [x, *lora.parameters()]
    for mine, theirs in zip(
        torch.autograd.grad((y * weights).sum(), inputs), torch.autograd.grad((expected * weights).sum(), inputs)
    ):
        torch.testing.assert_close(mine, theirs)


def test_a_split_module_keeps_its_strength_in_joined_form():
    layer = linear(6, 11)
    lora = module_for(layer, rank=2, alpha=3.0, split_rows=[3, 3, 5])
    down, up, alpha, _ = lora.file_weights()
    assert down.shape == (6, 6) and up.shape == (11, 6) and alpha == 9.0
    x = torch.randn(4, 6)
    torch.testing.assert_close(alpha / len(down) * x @ down.t() @ up.t(), split_sum(lora, x))
    before = layer(x)
    lora.merge()
    lora.remove()
    torch.testing.assert_close(layer(x), before)


def test_rank_dropout_works_on_split_modules():
    layer = linear(6, 9)
    lora = module_for(layer, rank=2, rank_dropout=0.5, split_rows=[3, 3, 3]).train()
    torch.manual_seed(5)
    x = torch.randn(4, 2, 6, generator=torch.Generator().manual_seed(0))
    y = layer(x)
    torch.manual_seed(5)
    kept = (torch.rand(4, 6) > 0.5).float()[:, None, :]
    expected = plain(layer, x) + 2 * lora.scale * ((x @ lora.down_matrix.t()) * kept) @ lora.up_matrix.t()
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("split_rows", [None, [3, 3, 4]])
def test_the_norm_limit_shrinks_the_product_to_the_limit_and_no_further(split_rows):
    layer = linear()
    lora = module_for(layer, split_rows=split_rows)

    def product():
        return lora.scale * lora.up_matrix.detach().double() @ lora.down_matrix.detach().double()

    before = product()
    norm, shrunk = lora.limit_norm(2 * before.norm().item())
    assert not shrunk and torch.equal(product(), before)
    assert norm.item() == pytest.approx(before.norm().item())
    norm, shrunk = lora.limit_norm(0.5)
    assert shrunk and norm.item() == pytest.approx(0.5)
    torch.testing.assert_close(product(), before * (0.5 / before.norm()), rtol=1e-5, atol=1e-7)


def test_a_module_without_effect_has_the_norm_zero():
    lora = module_for(linear())
    with torch.no_grad():
        lora.lora_up.weight.zero_()
    norm, shrunk = lora.limit_norm(1.0)
    assert norm == 0 and not shrunk


def test_the_perturbation_has_the_scale_of_the_published_formula():
    """P_ij ~ N(0, 1) * (sigma * c_i + beta * g_i^2) / sqrt(out), c_i and g_i being row norms."""
    sigma, beta = 0.03, 0.01
    layer = linear(300, 40)
    lora = module_for(layer, ggpo_sigma=sigma, ggpo_beta=beta).train()
    x = torch.randn(2, 300)
    exact = layer(x)  # no norms yet: nothing is added at the first step
    torch.testing.assert_close(exact, plain(layer, x) + lora.scale * x @ lora.down_matrix.t() @ lora.up_matrix.t())
    exact.square().mean().backward()
    lora.update_grad_norms()
    lora.update_norms()

    down, up = lora.lora_down.weight, lora.lora_up.weight
    change = lora.scale * (up.double() @ down.grad.double() + up.grad.double() @ down.double())
    mean_row = layer.weight.double().norm(dim=1).mean()
    combined = (mean_row**2 + (up.double() @ down.double()).square().sum(dim=1)).sqrt()
    torch.testing.assert_close(lora.grad_norms.double(), change.norm(dim=1), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(lora.combined_norms.double(), combined, rtol=1e-5, atol=1e-7)

    deviation = (sigma * combined + beta * change.square().sum(dim=1)) / 40**0.5
    torch.manual_seed(9)
    added = torch.stack([layer(x) - exact for _ in range(1500)]).double()
    expected = x.double().norm(dim=1)[:, None] * deviation
    assert (added.std(dim=0) / expected - 1).abs().max() < 0.1
    assert (added.mean(dim=0) / (expected / 1500**0.5)).abs().max() < 4.5

    lora.multiplier = 0.5  # the perturbation does not shrink with the multiplier
    half = plain(layer, x) + 0.5 * lora.scale * x @ down.t() @ up.t()
    assert ((layer(x) - half).abs() / expected).max() > 0.1
    lora.multiplier = 1.0
    assert torch.equal(lora.eval() and layer(x), exact)


def test_the_perturbation_has_no_gradient():
    layer = linear(30, 20)
    lora = module_for(layer, ggpo_sigma=0.5, ggpo_beta=0.5).train()
    x = torch.randn(2, 30, requires_grad=True)
    weights = torch.randn(2, 20)
    inputs = [x, *lora.parameters()]
    before = torch.autograd.grad((layer(x) * weights).sum(), inputs)
    lora.grad_norms, lora.combined_norms = torch.ones(20), torch.ones(20)
    for mine, theirs in zip(torch.autograd.grad((layer(x) * weights).sum(), inputs), before):
        assert torch.equal(mine, theirs)


def test_nothing_is_computed_for_the_perturbation_when_it_is_off():
    lora = module_for(linear()).train()
    lora.target.module(torch.randn(2, 6)).sum().backward()
    lora.update_grad_norms()
    lora.update_norms()
    assert lora.weight_norm is None and lora.grad_norms is None and lora.combined_norms is None


def test_norms_of_a_split_module_are_those_of_its_joined_matrices():
    layer = linear(6, 9)
    lora = module_for(layer, rank=2, ggpo_sigma=0.1, ggpo_beta=0.1, split_rows=[3, 3, 3])
    layer(torch.randn(5, 6)).square().sum().backward()
    lora.update_grad_norms()
    parts = zip(lora.lora_down, lora.lora_up)
    rows = [(u.weight @ d.weight.grad + u.weight.grad @ d.weight).norm(dim=1) for d, u in parts]
    torch.testing.assert_close(lora.grad_norms, lora.scale * torch.cat(rows))


def test_networks_can_be_stacked_and_taken_away_in_any_order():
    layer = linear()
    x = torch.randn(3, 6)
    base = plain(layer, x)
    first, second, third = (module_for(layer, seed=seed) for seed in (1, 2, 3))
    additions = [lora.scale * x @ lora.down_matrix.t() @ lora.up_matrix.t() for lora in (first, second, third)]
    torch.testing.assert_close(layer(x), base + sum(additions))
    second.remove()
    torch.testing.assert_close(layer(x), base + additions[0] + additions[2])
    third.remove()
    torch.testing.assert_close(layer(x), base + additions[0])
    first.remove()
    first.remove()
    assert torch.equal(layer(x), base) and "forward" not in vars(layer)


def test_a_layer_with_a_forward_of_its_own_is_used_as_it_is():
    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    torch.manual_seed(0)
    x = torch.randn(3, 6)
    for layer in (Doubled(6, 10), linear()):
        if type(layer) is nn.Linear:
            original = layer.forward
            layer.forward = lambda x, original=original: 2 * original(x)
        lora = module_for(layer)
        addition = lora.scale * x @ lora.down_matrix.t() @ lora.up_matrix.t()
        torch.testing.assert_close(layer(x), 2 * plain(layer, x) + addition)
        lora.remove()
        torch.testing.assert_close(layer(x), 2 * plain(layer, x))


def test_a_base_that_trains_too_gets_its_gradient():
    layer = linear()
    lora = module_for(layer)
    layer.requires_grad_(True)
    layer(torch.randn(3, 6)).sum().backward()
    assert layer.weight.grad is not None and lora.lora_up.weight.grad is not None


def test_alpha_survives_a_cast_of_the_network():
    lora = module_for(linear(), alpha=0.3)
    state = lora.to(torch.bfloat16).state_dict()
    assert state["alpha"].dtype == torch.float32
    other = module_for(linear(), alpha=1.0)
    other.load_state_dict(state)
    assert other.scale == lora.scale
    with pytest.raises(RuntimeError, match="alpha"):
        other.load_state_dict({key: value for key, value in state.items() if key != "alpha"})
