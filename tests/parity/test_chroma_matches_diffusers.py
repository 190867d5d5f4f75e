"""Chroma gives what Diffusers' ChromaTransformer2DModel gives for the same weights and a boolean mask, float32.

Diffusers' own pipeline hands the mask over as numbers, which attention then adds to its scores; that is not compared.
"""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import ChromaTransformer2DModel
from torch import Tensor

from library.memory.apply import apply_memory_plan
from library.memory.plan import MemoryPlan
from library.models.flux.checkpoint import open_transformer
from library.models.flux.chroma import ChromaConfig, ChromaTransformer, text_key_mask
from library.models.loading import LoadSpec, on_meta
from networks import lora_flux
from tests.parity.flux_inputs import HEIGHT, WIDTH, assert_equal_to_scale, transformer_inputs
from tools.make_tiny_models import fill_randomly, make_tiny_chroma, transformer_config
from tools.other_layouts import diffusers_transformer_config, diffusers_transformer_state

TEXT = 9
PROMPT_TOKENS = (3, 7)  # with the end token


@pytest.fixture(scope="module")
def ours() -> ChromaTransformer:
    model = ChromaTransformer(transformer_config("chroma"))
    fill_randomly(model, 1, "parity")
    return model


@pytest.fixture(scope="module")
def theirs(ours) -> ChromaTransformer2DModel:
    model = ChromaTransformer2DModel.from_config(diffusers_transformer_config(ours.config))
    model.load_state_dict(diffusers_transformer_state(ours.state_dict(), ours.config), strict=True)
    # Its norms leave eps to the dtype; the original has 1e-6.
    for norm in model.distilled_guidance_layer.norms:
        norm.eps = 1e-6
    return model


def inputs(batch: int = 2) -> dict[str, Tensor]:
    mask = torch.zeros(batch, TEXT, dtype=torch.long)
    for row, count in enumerate(PROMPT_TOKENS[:batch]):
        mask[row, :count] = 1
    given = transformer_inputs(TEXT, batch)
    del given["y"], given["guidance"]
    return {**given, "txt_attention_mask": mask}


def run_diffusers(model: ChromaTransformer2DModel, given: dict[str, Tensor]) -> Tensor:
    counts = given["txt_attention_mask"].sum(dim=1, keepdim=True)
    text = torch.arange(TEXT) <= counts  # as Diffusers' pipeline does: one padding token stays
    image = torch.ones(len(text), HEIGHT * WIDTH // 4, dtype=torch.bool)
    with torch.no_grad():
        return model(
            hidden_states=given["img"],
            encoder_hidden_states=given["txt"],
            timestep=given["timesteps"],
            img_ids=given["img_ids"],
            txt_ids=given["txt_ids"],
            attention_mask=torch.cat((text, image), dim=1),
        ).sample


def test_the_same_velocity(ours, theirs):
    given = inputs()
    assert_equal_to_scale(ours(**given), run_diffusers(theirs, given))


def test_diffusers_shards_in_our_loader_give_the_same_velocity(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "transformer", max_shard_size="300KB")
    opened = open_transformer(tmp_path, model_type="chroma")
    assert opened.variant == "chroma" and opened.config == transformer_config("chroma")
    given = inputs()
    assert_equal_to_scale(opened.load(LoadSpec.of(torch.float32))(**given), run_diffusers(theirs, given))


def test_every_layout_holds_the_same_tensors(tmp_path):
    states = [
        open_transformer(make_tiny_chroma(tmp_path / layout, layout).transformer, model_type="chroma")
        .load(LoadSpec.of(torch.float32))
        .state_dict()
        for layout in ("original", "comfyui", "diffusers")
    ]
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[key], tensor) for key, tensor in states[0].items())


def test_one_padding_token_is_attended_to_and_no_more(ours):
    given = inputs(1)
    expected = ours(**given)
    for place in range(PROMPT_TOKENS[0] - 1, TEXT):
        changed = {**given, "txt": given["txt"].clone()}
        changed["txt"][:, place] += 1
        difference = (ours(**changed) - expected).abs().max()
        if place <= PROMPT_TOKENS[0]:
            assert difference > 1e-4, place
        else:
            assert difference == 0, place
    full = torch.ones(1, TEXT)
    assert text_key_mask(full).all(), "a caption that fills every place has no padding token"


def test_a_caption_does_not_depend_on_its_neighbours(ours):
    both = inputs()
    together = ours(**both)
    for row in range(2):
        alone = {name: tensor if name.endswith("ids") else tensor[row : row + 1] for name, tensor in both.items()}
        torch.testing.assert_close(ours(**alone), together[row : row + 1], rtol=1e-5, atol=1e-5)


def sinusoid64(value: float, dim: int) -> list[float]:
    """cos and sin of 1000 x / 10000^(k / half), in float64."""
    half = dim // 2
    angles = [1000 * value / 10000 ** (k / half) for k in range(half)]
    return [math.cos(angle) for angle in angles] + [math.sin(angle) for angle in angles]


def test_the_approximator_sees_timestep_a_guidance_of_zero_and_the_number(ours):
    seen = ours.modulation_inputs(torch.tensor([0.25, 0.7])).double()
    count = 3 * 2 + 12 * 2 + 2
    assert seen.shape == (2, count, 64)
    for item, timestep in enumerate((0.25, 0.7)):
        for number in (0, 1, count - 1):
            wanted = [*sinusoid64(timestep, 16), *sinusoid64(0.0, 16), *sinusoid64(number, 32)]
            expected = torch.tensor(wanted, dtype=torch.float64)
            # float32 angles of up to 31,000 radians
            torch.testing.assert_close(seen[item, number], expected, rtol=0, atol=5e-3)


def test_guidance_and_pooled_text_change_nothing(ours):
    given = inputs()
    other = ours(**given, y=torch.randn(2, 64), guidance=torch.tensor([3.5, 7.0]))
    assert torch.equal(other, ours(**given))


def gradients(model: ChromaTransformer) -> dict[str, Tensor]:
    network = lora_flux.create_network(1.0, 2, 2.0, None, None, model)
    for name, parameter in network.named_parameters():
        random = torch.Generator().manual_seed(len(name))
        parameter.data = torch.randn(parameter.shape, generator=random) * 0.1
    network.apply_to(None, model, False, True)
    model(**inputs()).square().mean().backward()
    network.remove()
    return {name: parameter.grad for name, parameter in network.named_parameters()}


@pytest.mark.parametrize("cpu_offload", [False, True])
def test_checkpointing_changes_no_gradient(ours, cpu_offload):
    plain = gradients(ours)
    blocks = {"": [*ours.double_blocks, *ours.single_blocks]}
    with apply_memory_plan(blocks, MemoryPlan(checkpointing=True, offload_inputs=cpu_offload)):
        for name, gradient in gradients(ours).items():
            assert torch.equal(gradient, plain[name]), name
    assert len(plain) == 2 * (8 * 2 + 2 * 2)
    assert all(parameter.grad is None for parameter in ours.distilled_guidance_layer.parameters())


def test_the_full_size_has_the_published_counts():
    with on_meta():
        model = ChromaTransformer(ChromaConfig())
    assert len(model.state_dict()) == 643
    assert model.config.modulation_count == 344
    assert model.distilled_guidance_layer.out_proj.weight.shape == (3072, 5120)
    assert len(lora_flux.create_network(1.0, 1, 1.0, None, None, model).unet_loras) == 228


def test_bfloat16_weights_stay_close_to_float32():
    model = ChromaTransformer(transformer_config("chroma"))
    fill_randomly(model, 1, "parity")
    given = inputs()
    expected = model(**given)
    actual = model.to(torch.bfloat16)(**given)
    assert actual.dtype == torch.bfloat16
    assert (actual.float() - expected).abs().max() < 0.1 * expected.abs().max()
