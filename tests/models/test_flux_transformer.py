"""Behaviour of the transformer that training depends on: masks, checkpointing, precision, attention backends."""

from __future__ import annotations

import pytest
import torch

from library.errors import UserError
from library.memory.apply import apply_memory_plan
from library.memory.plan import MemoryPlan
from library.models.flux import transformer as flux
from library.models.flux.transformer import (
    KEPT_POSITIONS,
    FluxConfig,
    FluxTransformer,
    Modulation,
    SingleStreamBlock,
    image_ids,
)
from library.models.loading import on_meta
from library.models.transformer_parts import LARGEST_FLOAT16, rope_rotations
from tools.make_tiny_models import fill_randomly, transformer_config


@pytest.fixture
def transformer() -> FluxTransformer:
    model = FluxTransformer(transformer_config())
    fill_randomly(model, 1, "behaviour")
    return model


def inputs(text: int = 6) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    return {
        "img": torch.randn(2, 6, 64, generator=random),
        "img_ids": image_ids(4, 6),
        "txt_ids": torch.zeros(text, 3),
        "timesteps": torch.tensor([0.2, 0.7]),
        "y": torch.randn(2, 64, generator=random),
        "guidance": torch.tensor([3.5, 1.0]),
        "txt": torch.randn(2, text, 64, generator=random),
    }


@pytest.mark.parametrize("backend", ["sdpa", "split"])
def test_masked_text_is_as_if_it_were_not_there(transformer, backend):
    transformer.set_attention_backend(backend)
    given = inputs()
    mask = torch.ones(2, 6)
    mask[:, 4:] = 0
    cut = given | {"txt": given["txt"][:, :4], "txt_ids": given["txt_ids"][:4]}
    torch.testing.assert_close(transformer(**given, txt_attention_mask=mask), transformer(**cut), atol=1e-5, rtol=1e-5)
    assert (transformer(**given) - transformer(**cut)).abs().max() > 1e-3


def test_items_of_a_batch_do_not_depend_on_each_other(transformer):
    given = inputs()
    mask = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
    together = transformer(**given, txt_attention_mask=mask)
    for item in (0, 1):
        shared = {"img_ids", "txt_ids"}
        alone = {key: value if key in shared else value[item : item + 1] for key, value in given.items()}
        expected = transformer(**alone, txt_attention_mask=mask[item : item + 1])
        torch.testing.assert_close(together[item : item + 1], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cpu_offload", [False, True])
def test_checkpointing_changes_no_gradient_of_an_adapter_on_frozen_weights(transformer, cpu_offload):
    adapters = [block.img_attn.qkv.bias for block in transformer.double_blocks]
    adapters += [block.linear2.bias for block in transformer.single_blocks]

    def gradients() -> list[torch.Tensor]:
        for adapter in adapters:
            adapter.requires_grad_(True).grad = None
        transformer(**inputs()).square().mean().backward()
        return [adapter.grad.clone() for adapter in adapters]

    expected = gradients()
    calls = []
    transformer.double_blocks[0].img_attn.qkv.register_forward_pre_hook(lambda *_: calls.append(1))
    blocks = {"": [*transformer.double_blocks, *transformer.single_blocks]}
    apply_memory_plan(blocks, MemoryPlan(checkpointing=True, offload_inputs=cpu_offload))
    for actual, wanted in zip(gradients(), expected):
        assert torch.equal(actual, wanted) and wanted.abs().max() > 0
    assert len(calls) == 2, "the block must have been run again in the backward pass"
    with torch.no_grad():
        transformer(**inputs())
    assert len(calls) == 3


def test_the_names_are_those_of_the_original_checkpoints():
    for guidance, count in ((True, 780), (False, 776)):
        with on_meta():
            state = FluxTransformer(FluxConfig(guidance_embed=guidance)).state_dict()
        assert len(state) == count
    assert state["double_blocks.18.txt_attn.norm.query_norm.scale"].shape == (128,)
    assert state["single_blocks.37.linear1.weight"].shape == (21504, 3072)
    assert state["double_blocks.0.img_mod.lin.weight"].shape == (18432, 3072)
    assert state["final_layer.adaLN_modulation.1.weight"].shape == (6144, 3072)


def test_lora_target_classes_hold_the_known_linears():
    with on_meta():
        model = FluxTransformer(FluxConfig())
    blocks = [m for m in model.modules() if type(m).__name__ in ("DoubleStreamBlock", "SingleStreamBlock")]
    assert sum(isinstance(module, torch.nn.Linear) for block in blocks for module in block.modules()) == 304


def test_float16_streams_stay_finite():
    config = transformer_config()
    block = SingleStreamBlock(config, Modulation(config.hidden_size, 3))
    fill_randomly(block, 0, "float16")
    block.linear2.bias.data.fill_(60000)
    block.modulation.lin.bias.data[-config.hidden_size :] = 5
    block = block.half()
    x = torch.full((1, 4, config.hidden_size), 1000.0).half()
    rope = rope_rotations(torch.zeros(1, 4, 3), config.axes_dims, config.theta)
    out = block(x, torch.zeros(1, config.hidden_size).half(), rope)
    assert out.isfinite().all() and out.max() == LARGEST_FLOAT16


def test_timesteps_are_never_rounded_to_the_weights_dtype(transformer):
    """In bfloat16, 0.9001 and 0.9 would be the same."""
    transformer.to(torch.bfloat16)
    given = inputs()
    first = transformer(**given | {"timesteps": torch.tensor([0.9, 0.9])})
    second = transformer(**given | {"timesteps": torch.tensor([0.9001, 0.9001])})
    assert torch.tensor(0.9).bfloat16() == torch.tensor(0.9001).bfloat16()
    assert not torch.equal(first, second)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_autocast_stays_close_to_float32(transformer, stored):
    given = inputs()
    expected = transformer(**given)
    transformer.to(stored)
    with torch.autocast("cpu", torch.bfloat16):
        actual = transformer(**given)
    assert (actual.float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_a_guidance_distilled_model_asks_for_guidance(transformer):
    with pytest.raises(ValueError, match="guidance"):
        transformer(**inputs() | {"guidance": None})


def test_positions_are_computed_once_for_a_size_and_are_those_of_every_ids(transformer, monkeypatch):
    computed = []
    ours = rope_rotations
    monkeypatch.setattr(flux, "rope_rotations", lambda ids, *rest: (computed.append(len(ids)), ours(ids, *rest))[1])
    sizes = [(height, 6) for height in range(4, 4 + 2 * KEPT_POSITIONS, 2)]
    for size in 3 * sizes:
        rope = transformer.positions(image_ids(*size), torch.zeros(5, 3), 2)
        ids = torch.cat([torch.zeros(5, 3), image_ids(*size)]).expand(2, -1, -1)
        assert torch.equal(rope, ours(ids, transformer.config.axes_dims, transformer.config.theta))
    assert len(computed) == len(sizes)
    other = transformer.positions(image_ids(4, 6), torch.ones(5, 3), 2)
    assert not torch.equal(other, transformer.positions(image_ids(4, 6), torch.zeros(5, 3), 2))


def test_position_axes_must_fill_the_head():
    with pytest.raises(ValueError, match="axes"):
        FluxConfig(hidden_size=64, num_heads=2, axes_dims=(4, 14, 12))


@pytest.mark.parametrize("backend", ["xformers", "flash", "sdpaa"])
def test_an_attention_backend_that_is_not_there_is_named(transformer, backend):
    with pytest.raises(UserError, match=backend):
        transformer.set_attention_backend(backend)
