"""How many modules the published models get, on tensors that have shapes but no values."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from library.errors import UserError
from library.models.clip import ClipConfig, ClipTextEncoder
from library.models.flux.chroma import ChromaConfig, ChromaTransformer
from library.models.flux.transformer import FluxConfig, FluxTransformer
from library.models.loading import on_meta
from library.models.t5 import T5TextEncoder
from networks import lora_flux


@pytest.fixture(scope="module")
def models():
    from transformers import T5Config

    with on_meta():
        return {
            "flux": FluxTransformer(FluxConfig()),
            "chroma": ChromaTransformer(ChromaConfig()),
            "clip_l": ClipTextEncoder(ClipConfig()),
            "t5xxl": T5TextEncoder(T5Config(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
                                            feed_forward_proj="gated-gelu")),
        }  # fmt: skip


def modules(models, transformer: str = "flux", encoders=(None, None), **arguments) -> dict[str, int]:
    """Rank by name. The matrices of rank 1 are small enough to be real."""
    given = [models[name] if name else None for name in encoders]
    network = lora_flux.create_network(1.0, 1, 1.0, None, given, models[transformer], **arguments)
    return {lora.lora_name: lora.lora_dim for lora in network.loras}


def test_flux_has_304_modules_and_chroma_228(models):
    flux, chroma = modules(models), modules(models, "chroma")
    assert (len(flux), len(chroma)) == (304, 228)
    assert set(flux) - set(chroma) == {name for name in flux if name.endswith(("_mod_lin", "_modulation_lin"))}
    assert set(chroma) < set(flux)


def test_a_network_for_a_model_without_numbers_has_numbers(models):
    network = lora_flux.create_network(1.0, 1, 1.0, None, [None], models["flux"])
    assert all(parameter.device.type == "cpu" for parameter in network.parameters())


def test_clip_l_has_72_modules_and_t5_7_in_each_layer(models):
    found = modules(
        models, encoders=("clip_l", "t5xxl"), train_t5xxl="True", train_blocks="single", train_single_block_indices="0"
    )
    assert sum(name.startswith("lora_te1_text_model_encoder_layers_") for name in found) == 72
    layers = Counter(re.findall(r"lora_te3_encoder_block_(\d+)_", " ".join(found)))
    assert layers == {str(number): 7 for number in range(24)}
    assert len(found) == 72 + 168 + 3
    alone = modules(models, encoders=("clip_l", "t5xxl"))
    assert len(alone) == 304 + 72


@pytest.mark.parametrize(("transformer", "count"), [("flux", 8), ("chroma", 2)])
def test_in_dims_adds_the_input_layers_that_a_model_has(models, transformer, count):
    blocks = modules(models, transformer)
    assert len(modules(models, transformer, in_dims="[4,2,2,2,4]")) == len(blocks) + count


def blocks(found: dict[str, int], kind: str) -> list[int]:
    return sorted({int(number) for number in re.findall(rf"{kind}_blocks_(\d+)_", " ".join(found))})


@pytest.mark.parametrize("transformer", ["flux", "chroma"])
def test_block_numbers_of_the_users_guide(models, transformer):
    found = modules(
        models,
        transformer,
        train_double_block_indices="0,1,8-12,18",
        train_single_block_indices="3,10,20-25,37",
    )
    assert blocks(found, "double") == [0, 1, 8, 9, 10, 11, 12, 18]
    assert blocks(found, "single") == [3, 10, 20, 21, 22, 23, 24, 25, 37]
    found = modules(models, transformer, train_double_block_indices="none", train_single_block_indices="10-15")
    assert (blocks(found, "double"), blocks(found, "single")) == ([], [10, 11, 12, 13, 14, 15])
    found = modules(models, transformer, train_double_block_indices="0-18", train_single_block_indices="0-37")
    assert found == modules(models, transformer)


@pytest.mark.parametrize(
    ("argument", "text", "last"),
    [("train_double_block_indices", "0-19", 18), ("train_single_block_indices", "38", 37)],
)
def test_block_numbers_beyond_the_model_are_refused(models, argument, text, last):
    with pytest.raises(UserError, match=f"{argument} names block {last + 1}, .* the blocks 0 to {last}"):
        modules(models, **{argument: text})


def test_patterns_of_the_users_guide(models):
    found = modules(models, network_reg_dims="single.*_modulation.*=4,img_attn=8")
    assert Counter(found.values()) == {4: 38, 8: 2 * 19, 1: 304 - 38 - 38}
    network = lora_flux.create_network(
        1.0, 1, 1.0, None, [None], models["flux"], network_reg_lrs=r"single_blocks_(\d|10)_=1e-3,double_blocks=2e-3"
    )
    groups, labels = network.prepare_optimizer_params_with_multiple_te_lrs(None, None, 5e-4)
    sizes = {label: (len(group["params"]) // 2, group["lr"]) for label, group in zip(labels, groups)}
    assert sizes == {
        "unet reg_lr_1": (190, 2e-3),
        "unet reg_lr_0": (33, 1e-3),  # single blocks 0 to 10
        "unet": (81, 5e-4),
    }
