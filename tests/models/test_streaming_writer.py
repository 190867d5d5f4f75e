"""Writing tensors one at a time, and the way from a module's tensor back to the file's."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from library.checkpoints import open_checkpoint
from library.models.flux.checkpoint import open_transformer
from library.models.loading import Origin, TensorSource
from library.models.stable_diffusion.checkpoint import open_stable_diffusion
from library.safetensors_io import save_file, save_one_by_one


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    return {f"t{index}": torch.randn(3, index + 1, generator=generator).to(kind) for index, kind in enumerate(kinds)}


def test_the_same_bytes_as_all_at_once_and_each_tensor_is_asked_for_once(tensors, tmp_path):
    asked = []

    def load(name):
        asked.append(name)
        return tensors[name]

    described = {name: tensor.to("meta") for name, tensor in tensors.items()}
    save_one_by_one(described, load, tmp_path / "a.safetensors", {"x": "y"})
    save_file(tensors, tmp_path / "b.safetensors", {"x": "y"})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert sorted(asked) == sorted(tensors)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(tmp_path / "a.safetensors").items())


@pytest.mark.parametrize("wrong", [lambda t: t.double().half().float(), lambda t: t[:1], None])
def test_nothing_is_left_when_a_tensor_is_not_as_described_or_cannot_be_made(tensors, tmp_path, wrong):
    def load(name):
        if wrong is None:
            raise RuntimeError("no memory")
        return wrong(tensors[name])

    described = {name: tensor.to("meta") for name, tensor in tensors.items()}
    with pytest.raises((ValueError, RuntimeError)):
        save_one_by_one(described, load, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def assert_way_back(source: TensorSource) -> None:
    """Every tensor as the module has it, put back, is the file's; together they cover what was read."""
    for name in source.names():
        for key, rows, values in source.stored(name, source.load(name, None, "cpu")):
            assert torch.equal(source.checkpoint.load(key)[rows], values), name


@pytest.mark.parametrize("variant", [pytest.param("sd1", marks=pytest.mark.thorough), "sd2", "sdxl"])
def test_the_way_back_of_stable_diffusion(variant, request):
    """Fused query, key and value of OpenCLIP, its transposed projection, reshaped convolutions of the VAE."""
    model = open_stable_diffusion(request.getfixturevalue(f"tiny_{variant}"))
    for source in (model.unet.source, model.autoencoder.source, *(one.source for one in model.text_encoders)):
        assert_way_back(source)


def test_the_way_back_of_joined_tensors(tmp_path):
    """Diffusers keeps query, key and value of FLUX apart, and halves of its last layer's scale and shift swapped."""
    from tools.make_tiny_models import make_tiny_flux

    files = make_tiny_flux(tmp_path, layout="diffusers")
    source = open_transformer(files.transformer).source
    assert any(len(origin.keys) > 1 for origin in source.origins.values())
    assert any(origin.transform is not None for origin in source.origins.values())
    assert_way_back(source)


def test_the_way_back_of_a_transformed_part(tmp_path):
    """Rows cut out first, then reordered, then reshaped."""
    save_file({"w": torch.arange(24.0).reshape(6, 4)}, tmp_path / "a.safetensors")
    source = TensorSource(open_checkpoint(tmp_path / "a.safetensors"))
    source.origins["t"] = Origin(("w",), lambda tensor: tensor.t().contiguous(), (2, 6), (1, 4))
    assert source.load("t", None, "cpu").shape == (2, 6)
    assert_way_back(source)
