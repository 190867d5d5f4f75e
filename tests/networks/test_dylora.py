"""networks.dylora: a rank for each step, files of LoRA, and the tool that cuts them."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from library.errors import UserError
from library.memory.apply import apply_memory_plan
from library.memory.plan import MemoryPlan
from library.models.stable_diffusion.unet import block_lists
from networks import dylora, extract_lora_from_dylora, lora
from tests.networks.stable_diffusion import Tiny, tiny_meta_module, tiny_model

NAME = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


def applied(tiny: Tiny, randomise, dim: int = 8, **arguments):
    network = dylora.create_network(1.0, dim, 4.0, None, tiny.encoders, tiny.unet, **arguments)
    randomise(network)
    network.apply_to(tiny.encoders, tiny.unet)
    return network.train()


def test_files_are_those_of_lora(randomise, tmp_path):
    tiny = tiny_model("sdxl")
    network = applied(tiny, randomise, unit="4", conv_dim="8", conv_alpha="4").eval()
    expected = tiny.predict()
    network.save_weights(tmp_path / "dylora.safetensors", None, None)
    network.remove()
    for module, more in ((lora, {}), (dylora, {"unit": "4"})):
        loaded, _ = module.create_network_from_weights(
            1.0, tmp_path / "dylora.safetensors", None, tiny.encoders, tiny.unet, **more
        )
        loaded.apply_to(tiny.encoders, tiny.unet)
        torch.testing.assert_close(tiny.predict(), expected, rtol=1e-5, atol=1e-5)
        loaded.remove()
    network.merge_to(None, None)
    torch.testing.assert_close(tiny.predict(), expected, rtol=1e-4, atol=1e-4)


def test_it_starts_with_the_numbers_of_lora():
    matrices = []
    for module in (lora, dylora):
        torch.manual_seed(0)
        network = module.create_network(1.0, 8, 4.0, None, None, tiny_meta_module("sdxl"), conv_dim="8")
        matrices.append([matrix for m in network.loras for matrix in (m.down_matrix, m.up_matrix)])
    assert all(torch.equal(a, b) for a, b in zip(*matrices))


def test_a_training_step_is_one_of_the_cut_network(randomise):
    """What a step computes, against plain LoRA with the first ranks alone, at sqrt(all / first) of the strength."""
    tiny, unit = tiny_model("sd1"), 2
    network = applied(tiny, randomise, unit=str(unit), conv_dim="8", conv_alpha="4")
    seen = set()
    for seed in range(3):
        torch.manual_seed(seed)
        network.on_step_start(None, None)
        rank = (getattr(network, NAME).drawn + 1) * unit
        seen.add(rank)
        expected = tiny.predict()
        network.remove()
        cut = {}
        for module in network.loras:
            weights = module.file_weights()
            strength = weights.alpha / 8 * math.sqrt(8 / rank)
            cut[f"{module.lora_name}.lora_down.weight"] = weights.down[:rank]
            cut[f"{module.lora_name}.lora_up.weight"] = weights.up[:, :rank]
            cut[f"{module.lora_name}.alpha"] = torch.tensor(strength * rank)
        plain, _ = lora.create_network_from_weights(1.0, None, None, tiny.encoders, tiny.unet, cut)
        plain.apply_to(tiny.encoders, tiny.unet)
        torch.testing.assert_close(tiny.predict(), expected, rtol=1e-4, atol=1e-4)
        plain.remove()
        network.apply_to(tiny.encoders, tiny.unet)
    assert len(seen) > 1 and all(rank % unit == 0 for rank in seen)


def test_only_the_last_unit_of_the_drawn_rank_is_trained(randomise):
    tiny = tiny_model("sd1")
    network = applied(tiny, randomise, unit="2", conv_dim="8")
    torch.manual_seed(3)
    network.on_step_start(None, None)
    tiny.predict().square().mean().backward()
    for module in network.unet_loras:
        for units in (module.lora_down, module.lora_up):
            for index, parameter in enumerate(units.parameters()):
                assert (parameter.grad is not None) == (index == module.drawn)
                assert parameter.grad is None or parameter.grad.abs().max() > 0


def test_every_rank_is_drawn_equally_often_and_the_seed_decides(randomise):
    network = dylora.create_network(1.0, 8, 4.0, None, None, tiny_meta_module("sd1"), unit="2")
    torch.manual_seed(0)
    drawn = []
    for _ in range(400):
        network.on_step_start(None, None)
        assert len({module.drawn for module in network.loras}) == 1
        drawn.append(network.loras[0].drawn)
    assert set(drawn) == {0, 1, 2, 3} and all(60 < drawn.count(unit) < 140 for unit in range(4))
    torch.manual_seed(0)
    network.on_step_start(None, None)
    assert network.loras[0].drawn == drawn[0]


def test_dropouts_and_single_strengths_still_act(randomise):
    tiny = tiny_model("sd1")
    network = applied(tiny, randomise, rank_dropout="0.5", conv_dim="8")
    network.on_step_start(None, None)
    assert not torch.equal(tiny.predict(), tiny.predict())
    network.set_multiplier(torch.tensor([0.0, 1.0]))
    with_strengths = tiny.predict()
    network.remove()
    torch.testing.assert_close(with_strengths[0], tiny.predict()[0])


def test_recomputed_blocks_give_the_very_same_gradients(randomise):
    tiny = tiny_model("sd1")
    network = applied(tiny, randomise, dropout="0.3", conv_dim="8")
    gradients = []
    for recompute in (False, True):
        tiny.unet.train()
        network.zero_grad(set_to_none=True)
        torch.manual_seed(7)
        network.on_step_start(None, None)
        with apply_memory_plan(block_lists(tiny.unet), MemoryPlan(checkpointing=recompute)):
            tiny.predict().square().mean().backward()
        gradients.append({name: p.grad for name, p in network.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(grad, gradients[1][name]) for name, grad in gradients[0].items())


def test_its_state_goes_on_to_the_same_bits(randomise):
    tiny = tiny_model("sd1")
    first = dylora.create_network(1.0, 8, 0.3, None, None, tiny.unet, unit="2")
    randomise(first)
    second = dylora.create_network(1.0, 8, 1.0, None, None, tiny.unet, unit="2")
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    assert [module.scale for module in first.loras] == [module.scale for module in second.loras]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"unit": "3"}, "unit=3 does not divide the rank 8 of lora_"),
        ({"unit": "0"}, "unit must be at least 1"),
        ({"conv_dim": "4"}, "networks.dylora needs conv_dim=8, which is --network_dim, not 4"),
        ({"ggpo_sigma": "0.1", "ggpo_beta": "0.1"}, "ggpo_sigma cannot be used here"),
        ({"unitt": "1"}, r'networks.dylora has no argument "unitt". Did you mean "unit"'),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        dylora.create_network(1.0, 8, 4.0, None, None, tiny_meta_module("sd1"), **arguments)
    dylora.check_network_args({"unit": "4", "conv_dim": "8", "block_dims": "8"})


# ---- extract_lora_from_dylora.py ----


def test_each_smaller_rank_becomes_a_file_as_strong_as_it_was_trained(randomise, tmp_path):
    tiny = tiny_model("sd1")
    network = applied(tiny, randomise, unit="2")
    metadata = {"ss_network_dim": "8", "ss_network_alpha": "4.0", "ss_training_comment": "circles"}
    network.save_weights(tmp_path / "full.safetensors", torch.float32, metadata)
    extract_lora_from_dylora.main(
        ["--model", str(tmp_path / "full.safetensors"), "--save_to", str(tmp_path / "cut.safetensors"), "--unit", "2"]
    )
    names = sorted(path.name for path in tmp_path.glob("cut*"))
    assert names == ["cut-0002.safetensors", "cut-0004.safetensors", "cut-0006.safetensors"]
    for drawn, name in enumerate(names):
        for module in network.loras:
            module.drawn = drawn
        expected = tiny.predict()
        network.remove()
        loaded, _ = lora.create_network_from_weights(1.0, tmp_path / name, None, tiny.encoders, tiny.unet)
        loaded.apply_to(tiny.encoders, tiny.unet)
        torch.testing.assert_close(tiny.predict(), expected, rtol=1e-4, atol=1e-4)
        loaded.remove()
        network.apply_to(tiny.encoders, tiny.unet)
        with safe_open(tmp_path / name, "pt") as file:
            said = file.metadata()
        rank = 2 * (drawn + 1)
        assert said["ss_network_dim"] == str(rank)
        assert float(said["ss_network_alpha"]) == pytest.approx(4 * math.sqrt(rank / 8))
        assert said["ss_training_comment"] == f"split from DyLoRA, rank 8 to {rank}; circles"
        assert load_file(tmp_path / name)[f"{NAME}.lora_down.weight"].shape[0] == rank


def test_the_tool_refuses_what_it_cannot_cut(tmp_path):
    network = lora.create_network(1.0, 2, 1.0, None, None, tiny_meta_module("sd1"))
    network.save_weights(tmp_path / "full.safetensors", None, None)
    full, cut = str(tmp_path / "full.safetensors"), str(tmp_path / "cut.safetensors")
    for arguments, message in (
        ([], "--model needs"),
        (["--model", full], "--save_to needs"),
        (["--model", full, "--save_to", full], "one of the inputs"),
        (["--model", full, "--save_to", cut, "--unit", "0"], "--unit must be at least 1"),
        (["--model", full, "--save_to", cut, "--unit", "2"], "has rank 2, so no smaller rank is a multiple of 2"),
        (["--model", str(tmp_path / "none.safetensors"), "--save_to", cut], "none.safetensors"),
    ):
        with pytest.raises(UserError, match=message):
            extract_lora_from_dylora.main(arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["full.safetensors"]
