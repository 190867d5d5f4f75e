"""--XTI_embeddings: each layer of the U-Net reads the text with its own vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from library.errors import UserError
from library.generation.features import Batch, check_features
from library.generation.image_prompts import ImagePrompt
from library.generation.model_options import ModelOptions, open_model
from library.generation.network_options import NetworkOptions
from library.generation.regions import open_regions
from library.generation.text_options import TextOptions
from library.generation.textual_inversion import add_textual_inversions
from library.generation.xti import LAYERS, open_xti
from library.models.stable_diffusion.pipeline import StableDiffusionPipeline
from library.safetensors_io import save_file
from networks.adapters.image_networks import open_networks

CPU = torch.device("cpu")
TEXTS = ("a (xtiword:1.2) cat", "ugly xtiword")


def opened(model: Path, *embeddings: Path) -> StableDiffusionPipeline:
    pipeline = open_model(ModelOptions(ckpt=str(model)), TextOptions(), CPU)
    add_textual_inversions([str(path) for path in embeddings], pipeline)
    return pipeline


@pytest.fixture(scope="module")
def vectors(tiny_sd1) -> dict[str, Tensor]:
    """Of two tokens, other ones for every layer."""
    width = opened(tiny_sd1).opened("text_encoder").hidden_size
    return {
        layer: torch.randn(2, width, generator=torch.Generator().manual_seed(seed)) for seed, layer in enumerate(LAYERS)
    }


def draw(pipeline: StableDiffusionPipeline, feature: Any = None, texts: tuple[str, str] = TEXTS) -> Tensor:
    """The latents of an image with a positive and a negative prompt."""
    positive, negative = pipeline.encode_image_texts(texts, chunks=1)
    request = pipeline.request_class(
        width=64, height=64, seed=3, sample_steps=2, conditioning=positive, negative_conditioning=negative
    )
    batch = Batch([], [request], [0], 64, 64)
    hooks = [] if feature is None else [feature.hook(batch)]
    return pipeline.generate_latents(request, hooks=hooks)


def test_equal_vectors_in_all_layers_are_a_plain_textual_inversion(tiny_sd1, vectors, tmp_path):
    save_file({layer: vectors["MID"] for layer in LAYERS}, tmp_path / "xtiword.safetensors")
    xti = opened(tiny_sd1)
    feature = open_xti([str(tmp_path / "xtiword.safetensors")], xti)
    save_file({"emb_params": vectors["MID"]}, tmp_path / "xtiword.safetensors")
    plain = opened(tiny_sd1, tmp_path / "xtiword.safetensors")
    assert torch.equal(draw(xti, feature), draw(plain))


def test_each_layer_attends_to_the_text_with_its_own_vectors(tiny_sd1, vectors, tmp_path):
    """The positive and the negative prompt; the others' layers, and a text without the word, are untouched."""
    torch.save(vectors, tmp_path / "xtiword.pt")
    pipeline = opened(tiny_sd1)
    feature = open_xti([str(tmp_path / "xtiword.pt")], pipeline)
    unet, seen = pipeline.load("unet"), {}
    handles = [
        unet.get_submodule(f"{path}.transformer_blocks.0.attn2.to_k").register_forward_pre_hook(
            lambda module, arguments, layer=layer: seen.setdefault(layer, arguments[0])
        )
        for layer, path in LAYERS.items()
    ]
    draw(pipeline, feature)
    assert seen.keys() == LAYERS.keys()
    for layer in ("IN01", "IN05", "MID", "OUT03", "OUT11"):
        save_file({"emb_params": vectors[layer]}, tmp_path / "xtiword.safetensors")
        reference = opened(tiny_sd1, tmp_path / "xtiword.safetensors")
        positive, negative = (texts["hidden_state"] for texts in reference.encode_image_texts(TEXTS, chunks=1))
        torch.testing.assert_close(seen[layer], torch.cat((negative, positive)))
    seen.clear()
    draw(pipeline, feature, ("a cat", "a dog"))
    positive, negative = (
        texts["hidden_state"] for texts in opened(tiny_sd1).encode_image_texts(("a cat", "a dog"), chunks=1)
    )
    assert all(torch.equal(state, torch.cat((negative, positive))) for state in seen.values())
    for handle in handles:
        handle.remove()
    before = draw(pipeline, feature, ("a cat", "a dog"))
    assert torch.equal(draw(pipeline, None, ("a cat", "a dog")), before), "nothing is left on the U-Net"


def test_files_that_cannot_be_used_are_one_sentence(tiny_sd1, few_blocks_sd1, tiny_sdxl, vectors, tmp_path):
    width = vectors["MID"].shape[1]
    unequal = {**vectors, "MID": torch.ones(1, width)}
    refused: list[tuple[Path, str, dict[str, Tensor], str]] = [
        (tiny_sd1, "plain.pt", {"emb_params": torch.ones(1, width)}, "is not an Extended Textual Inversion"),
        (tiny_sd1, "more.pt", {**vectors, "OUT12": torch.ones(2, width)}, "is not an Extended Textual Inversion"),
        (tiny_sd1, "unequal.pt", unequal, "vectors of different numbers or lengths"),
        (tiny_sd1, "wide.pt", {layer: torch.ones(1, 7) for layer in LAYERS}, "vectors of 7 values; the text encoder"),
        (tiny_sdxl, "xl.pt", vectors, "Stable Diffusion 1.x and 2.x only"),
        (few_blocks_sd1, "few.pt", vectors, "Stable Diffusion 1.x and 2.x only"),
    ]
    for model, name, content, message in refused:
        torch.save(content, tmp_path / name)
        with pytest.raises(UserError, match=f"^--XTI_embeddings: .*{message}"):
            open_xti([str(tmp_path / name)], opened(model))
    with pytest.raises(
        UserError, match=r"^--textual_inversion_embeddings: .*holds 16 tensors \(IN01, .*--XTI_embeddings"
    ):
        opened(tiny_sd1, tmp_path / "xl.pt")
    assert open_xti([], opened(tiny_sdxl)) is None


def test_prompts_for_regions_are_refused(tiny_sd1, vectors, tmp_path):
    """ " AND " decides itself which text a layer attends to."""
    save_file(vectors, tmp_path / "xtiword.safetensors")
    pipeline = opened(tiny_sd1)
    networks = open_networks(NetworkOptions(), pipeline)
    features = [
        open_regions(NetworkOptions(), None, networks, pipeline),
        open_xti([str(tmp_path / "xtiword.safetensors")], pipeline),
    ]
    check_features(features, ImagePrompt("a cat"))
    with pytest.raises(UserError, match='line 2: " AND " cannot be used together with --XTI_embeddings'):
        check_features(features, ImagePrompt("a cat AND a dog"), "line 2: ")
