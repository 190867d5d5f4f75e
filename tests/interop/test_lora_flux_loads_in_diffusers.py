"""Files saved here are loaded by diffusers' FluxPipeline: every key finds its module, and the outputs agree."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import nn

from library.models.flux.checkpoint import DOUBLE, DOUBLE_NORMS, OUTER, SINGLE, SINGLE_NORMS
from library.models.flux.transformer import FluxConfig, FluxTransformer
from library.models.loading import on_meta
from networks import lora_flux

pytestmark = pytest.mark.skipif(find_spec("peft") is None, reason="diffusers loads LoRA through peft")

TINY = FluxConfig(
    hidden_size=64, num_heads=2, depth=2, depth_single=2, in_channels=64, context_dim=48, vector_dim=32, time_dim=256,
    mlp_hidden=256, axes_dims=(4, 14, 14),
)  # fmt: skip


def randomise(network: nn.Module, size: float = 0.2) -> None:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)


def diffusers_state(model: FluxTransformer) -> dict[str, torch.Tensor]:
    """The weights under diffusers' names, joined projections taken apart."""
    hidden, mlp = model.config.hidden_size, model.config.mlp_hidden
    tensors: dict[str, torch.Tensor] = {}
    for key, value in model.state_dict().items():
        module, kind = key.rsplit(".", 1)
        if module in OUTER:
            swapped = module == "final_layer.adaLN_modulation.1"
            tensors[f"{OUTER[module]}.{kind}"] = torch.cat(value.chunk(2)[::-1]) if swapped else value
            continue
        blocks, number, rest = module.split(".", 2)
        double = blocks == "double_blocks"
        theirs = f"{'' if double else 'single_'}transformer_blocks.{number}"
        if kind == "scale":
            tensors[f"{theirs}.{(DOUBLE_NORMS if double else SINGLE_NORMS)[rest]}.weight"] = value
            continue
        parts = (DOUBLE if double else SINGLE)[rest]
        rows = [len(value)] if len(parts) == 1 else [hidden] * 3 + [mlp] * (len(parts) - 3)
        tensors |= {f"{theirs}.{part}.{kind}": piece for part, piece in zip(parts, value.split(rows))}
    return tensors


def pipeline(transformer: nn.Module, clip: nn.Module | None = None):
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=clip, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, transformer=transformer,
    )  # fmt: skip


def tiny_pair() -> tuple[FluxTransformer, nn.Module]:
    """The same tiny transformer here and in diffusers."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    ours = FluxTransformer(TINY).requires_grad_(False).eval()
    for parameter in ours.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.1)
    theirs = FluxTransformer2DModel(
        in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=48, pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=(4, 14, 14),
    ).eval()  # fmt: skip
    theirs.load_state_dict(diffusers_state(ours))
    return ours, theirs


@pytest.fixture(scope="module")
def models():
    return tiny_pair()


def outputs(ours: nn.Module, theirs: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    image, text, pooled = torch.randn(2, 16, 64), torch.randn(2, 5, 48), torch.randn(2, 32)
    image_ids = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    text_ids, time, guidance = torch.zeros(5, 3), torch.tensor([0.3, 0.8]), torch.tensor([1.0, 3.5])
    with torch.no_grad():
        mine = ours(image, image_ids, text, text_ids, time, pooled, guidance)
        other = theirs(
            hidden_states=image, encoder_hidden_states=text, pooled_projections=pooled, timestep=time,
            img_ids=image_ids, txt_ids=text_ids, guidance=guidance,
        ).sample  # fmt: skip
    return mine, other


@pytest.mark.parametrize(("alpha", "split"), [(0.5, "False"), (3.0, "True")])
def test_outputs_agree(models, tmp_path, alpha, split):
    """Without linear1, whose sizes diffusers' converter takes from the full model (see the next test)."""
    ours, theirs = models
    mine, other = outputs(ours, theirs)
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)

    network = lora_flux.create_network(
        1.0, 4, alpha, None, [None, None], ours, split_qkv=split, network_reg_dims="linear1=0"
    )
    randomise(network)
    network.apply_to(None, ours, False, True)
    network.save_weights(tmp_path / "lora.safetensors", None, {"ss_seed": "1"})
    pipe = pipeline(theirs)
    pipe.load_lora_weights(tmp_path / "lora.safetensors")
    with_network, theirs_with_network = outputs(ours, theirs)
    pipe.unload_lora_weights()
    network.remove()
    assert (with_network - mine).abs().max() > 0.1
    torch.testing.assert_close(with_network, theirs_with_network, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("split", [pytest.param("False", marks=pytest.mark.thorough), "True"])
def test_every_module_of_the_full_model_arrives_with_its_strength(tmp_path, split):
    from diffusers import FluxPipeline, FluxTransformer2DModel

    with on_meta():
        ours = FluxTransformer(FluxConfig())
        theirs = FluxTransformer2DModel(guidance_embeds=True)
    network = lora_flux.create_network(1.0, 1, 0.5, None, [None, None], ours, split_qkv=split)
    randomise(network)
    network.save_weights(tmp_path / "lora.safetensors", torch.bfloat16, None)

    converted = FluxPipeline.lora_state_dict(tmp_path / "lora.safetensors")
    expected = set()
    for name, module in theirs.named_modules():
        if isinstance(module, nn.Linear) and "blocks." in name:
            expected |= {f"transformer.{name}.lora_A.weight", f"transformer.{name}.lora_B.weight"}
            assert converted[f"transformer.{name}.lora_A.weight"].shape[1] == module.in_features
            assert converted[f"transformer.{name}.lora_B.weight"].shape[0] == module.out_features
    assert set(converted) == expected

    for path in ("double_blocks.18.txt_attn.qkv", "single_blocks.37.linear1", "single_blocks.0.linear2"):
        blocks, number, module = path.split(".", 2)
        prefix = "transformer." + ("" if blocks == "double_blocks" else "single_") + f"transformer_blocks.{number}."
        parts = [prefix + part for part in (DOUBLE if blocks == "double_blocks" else SINGLE)[module]]
        lora = getattr(network, "lora_unet_" + path.replace(".", "_"))
        x = torch.randn(4, lora.org_module.in_features)
        mine = lora.scale * x @ lora.down_matrix.t() @ lora.up_matrix.t()
        theirs_parts = [
            x @ converted[f"{part}.lora_A.weight"].float().t() @ converted[f"{part}.lora_B.weight"].float().t()
            for part in parts
        ]
        difference = (mine - torch.cat(theirs_parts, dim=-1)).abs().max()
        assert difference < 0.02 * mine.abs().max()  # rounding of the file to bfloat16
