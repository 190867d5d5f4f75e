"""DoRA files do here what they do in the programs that trained them, applied, merged and in the tools."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.errors import UserError
from networks import flux_merge_lora, merge_lora
from networks.adapters.lora_file import LoRAWeights, Magnitudes
from networks.adapters.lora_module import LoRAModule
from networks.adapters.lora_targets import Target, TargetTable
from networks.adapters.oft_core import OFTModule
from tests.interop.layouts import LAYOUTS
from tests.interop.measuring import Kind, make
from tests.interop.workbench import Workbench
from tests.networks.lora_tool_files import run
from tests.running import lycoris_package, run_in_process


@pytest.mark.parametrize("family", [pytest.param("sdxl", marks=pytest.mark.thorough), "flux"])
def test_files_of_lycoris_merge_as_the_package_merges_them(bench, family, tmp_path):
    """Every layer that it trains by itself, convolutions too."""
    lycoris_package()
    models = bench(family)
    kind = Kind({"algo": "lora", "dora_wd": "True", "conv_dim": "2"}, "lycoris")
    file = make(models, kind, tmp_path / "dora.safetensors")
    network, _ = models.lora.create_network_from_weights(
        1.0, file.path, None, models.encoders, models.unet, for_inference=True
    )
    found = models.merged(lambda: network.merge_to(None, None))
    assert len(network.loras) == len(load_file(file.path)) // 4
    for name, weight in file.weights.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5)


def test_files_of_peft_merge_as_peft_merges_them(bench, tmp_path):
    from diffusers import FluxTransformer2DModel
    from peft import LoraConfig, get_peft_model

    from tools.make_tiny_models import transformer_config
    from tools.other_layouts import diffusers_transformer_config

    models, config = bench("flux"), transformer_config()
    theirs = FluxTransformer2DModel.from_config(diffusers_transformer_config(config))
    theirs.load_state_dict(models.their_state(models.unet.state_dict()))
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "ff.net.2"], use_dora=True)
    peft = get_peft_model(theirs, settings)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                change = torch.randn(parameter.shape, generator=generator) * 0.1
                parameter.mul_(1 + change) if "magnitude" in name else parameter.add_(change)
    peft.save_pretrained(tmp_path)
    network, _ = models.lora.create_network_from_weights(
        1.0, tmp_path / "adapter_model.safetensors", None, models.encoders, models.unet, for_inference=True
    )
    found = models.merged(lambda: network.merge_to(None, None))
    wanted = peft.merge_and_unload().state_dict()
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    torch.testing.assert_close(found[name][:64], wanted["transformer_blocks.0.attn.to_q.weight"], rtol=1e-4, atol=1e-5)
    assert torch.equal(found[name][64:], models.weights[name][64:])
    name = "lora_unet_double_blocks_1_img_mlp_2"
    torch.testing.assert_close(found[name], wanted["transformer_blocks.1.ff.net.2.weight"], rtol=1e-4, atol=1e-5)


# ---- a module --------------------------------------------------------------------------------------------------------

LAYERS = {
    "linear": (lambda: torch.nn.Linear(6, 8), (3, 5, 6)),
    "convolution": (lambda: torch.nn.Conv2d(6, 8, 3, stride=2, padding=1), (3, 6, 7, 7)),
}


def target(layer: Any) -> Target:
    return Target("layer", layer, TargetTable("lora_unet", "unet", ()))


def dora(layer: Any, by: str) -> LoRAModule:
    """A module with scales for all outputs, all inputs, or the inputs of the last three outputs."""
    generator, shape = torch.Generator().manual_seed(3), layer.weight.shape
    rows = slice(5, 8) if by == "some rows" else slice(0, 8)
    scales = (8, *(1 for _ in shape[1:])) if by == "outputs" else (1, 6, *(1 for _ in shape[2:]))
    ranks = (
        torch.randn(2, *shape[1:], generator=generator),
        torch.randn(8, 2, *(1 for _ in shape[2:]), generator=generator),
    )
    module = LoRAModule(target(layer), 2, 1.0)
    values = torch.rand(scales, generator=generator) + 0.5
    module.set_file_weights(LoRAWeights(*ranks, 1.0, (Magnitudes(rows, values),)))
    return module.requires_grad_(False).eval()


def outputs(layer: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return layer(x)


@pytest.mark.parametrize("below", ["nothing", "LoRA", "OFT"])
@pytest.mark.parametrize("by", ["outputs", "inputs", "some rows"])
@pytest.mark.parametrize("kind", LAYERS)
def test_beside_the_layer_and_merged_it_does_the_same(kind, by, below):
    """Also over another network, whose effect its norms see."""
    torch.manual_seed(0)
    make_layer, shape = LAYERS[kind]
    layer, x = make_layer(), torch.randn(shape)
    modules: list[Any] = [dora(layer, by)]
    if below == "LoRA":
        lower = LoRAModule(target(layer), 2, 3.0)
        torch.nn.init.normal_(lower.lora_up.weight)
        modules.insert(0, lower.requires_grad_(False).eval())
    if below == "OFT":
        turning = OFTModule(target(layer), 2, 0.1)
        torch.nn.init.normal_(turning.oft_blocks)
        modules.insert(0, turning.requires_grad_(False))
    plain = outputs(layer, x)
    for multiplier in (1.0, 0.4, 0.0):
        modules[-1].multiplier = multiplier
        for module in modules:
            module.apply_to()
        applied = outputs(layer, x)
        for module in reversed(modules):
            module.remove()
        kept = layer.weight.detach().clone()
        for module in modules:
            if not module.is_idle:
                module.merge()
        torch.testing.assert_close(outputs(layer, x), applied, rtol=1e-4, atol=1e-4)
        layer.weight.data.copy_(kept)
        assert multiplier == 0 or not torch.allclose(applied, plain, atol=1e-2)
    modules[-1].multiplier = torch.tensor([0.0, 1.0, 0.4])
    modules[-1].apply_to()
    several = outputs(layer, x)
    torch.testing.assert_close(several[0], plain[0])
    for item, multiplier in ((1, 1.0), (2, 0.4)):
        modules[-1].multiplier = multiplier
        torch.testing.assert_close(several[item], outputs(layer, x)[item], rtol=1e-4, atol=1e-4)


def test_scales_of_a_wrong_shape_are_named(bench, tmp_path):
    models = bench("flux")
    tensors, _ = LAYOUTS["OneTrainer, DoRA"]["flux"].file(models)
    key = next(key for key in tensors if key.endswith(".dora_scale"))
    save_file({**tensors, key: torch.ones(5)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=rf"{key}.* has the shape \[5\], where one number for each of"):
        models.lora.create_network_from_weights(
            1.0, tmp_path / "a.safetensors", None, models.encoders, models.unet, for_inference=True
        )


# ---- the tools -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_the_tool_merges_it_into_a_model_after_another_file(layout, tmp_path):
    """A Diffusers folder keeps q, k and v apart, while scales of inputs are those of joined rows or of parts."""
    from library.models.flux.checkpoint import open_transformer
    from library.models.loading import LoadSpec
    from networks import lora_flux
    from tools.make_tiny_models import make_tiny_flux

    files = make_tiny_flux(tmp_path / "model", layout=layout)
    ours = open_transformer(files.transformer).load(LoadSpec.of(torch.float32))
    models = Workbench("flux", lora_flux, None, ours, [None, None], lora_flux.FLUX, ours, ["clip_l", "t5xxl"])
    paths = []
    for name, program in (("plain", "AI-toolkit"), ("dora", "OneTrainer, DoRA")):
        tensors, _ = LAYOUTS[program]["flux"].file(models)
        paths.append(tmp_path / f"{name}.safetensors")
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, paths[-1])
    save_to = tmp_path / ("merged" if layout == "diffusers" else "merged.safetensors")
    given = ["--flux_model", files.transformer, "--save_to", save_to, "--models", *paths, "--ratios", "0.7", "0.6"]
    run(flux_merge_lora.main, *given)
    for path, ratio in zip(paths, (0.7, 0.6)):
        network, _ = lora_flux.create_network_from_weights(ratio, path, None, [None, None], ours, for_inference=True)
        network.merge_to(None, None)
    merged = open_transformer(save_to).load(LoadSpec.of(torch.float32)).state_dict()
    for key, weight in ours.state_dict().items():
        torch.testing.assert_close(merged[key], weight, rtol=1e-4, atol=1e-4)


def test_the_tool_for_stable_diffusion_merges_it(few_blocks_sd1, tmp_path):
    from library.models.stable_diffusion.checkpoint import open_stable_diffusion

    name, key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q", "attn1.to_q.weight"
    unet = open_stable_diffusion(few_blocks_sd1).unet
    path = next(path for path in unet.source.names() if path.startswith("mid_block") and path.endswith(key))
    weight = unet.source.load(path, torch.float32, "cpu")
    generator = torch.Generator().manual_seed(1)
    down, up = (torch.randn(*shape, generator=generator) for shape in ((2, weight.shape[1]), (len(weight), 2)))
    scale = torch.rand(1, weight.shape[1], generator=generator) + 0.5
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(2.0), "dora_scale": scale}
    save_file({f"{name}.{part}": tensor for part, tensor in tensors.items()}, tmp_path / "dora.safetensors")
    given = ["--sd_model", few_blocks_sd1, "--save_to", tmp_path / "merged.safetensors"]
    run(merge_lora.main, *given, "--models", tmp_path / "dora.safetensors", "--ratios", "0.5")
    found = open_stable_diffusion(tmp_path / "merged.safetensors").unet.source.load(path, torch.float32, "cpu")
    summed = weight + up @ down
    wanted = weight + 0.5 * (summed * scale / summed.norm(dim=0, keepdim=True) - weight)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


# ---- the scripts -----------------------------------------------------------------------------------------------------


def test_the_scripts_draw_with_it_and_do_not_train_on(bench, tiny_flux, dataset_toml, tmp_path):
    """--lora_weights beside and merged, --base_weights; --network_weights refuses it."""
    from tests.families.families import TINY

    tensors, _ = LAYOUTS["OneTrainer, DoRA"]["flux"].file(bench("flux"))
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items() if not key.startswith("lora_te")}
    save_file(tensors, tmp_path / "dora.safetensors")
    options = {"without": "", "beside": "--lora_weights", "merged": "--merge_lora_weights --lora_weights"}
    images = {}
    for name, words in options.items():
        given = [*words.split(), *([tmp_path / "dora.safetensors"] if words else [])]
        drawn = run_in_process(
            "flux_minimal_inference.py",
            *(*TINY["flux"].drawing(tiny_flux), *TINY["flux"].dtypes["fp32"], "--output_dir", tmp_path / name),
            *("--prompt", "a cat", "--width", "64", "--height", "64", "--steps", "2", "--seed", "3", *given),
        )
        assert drawn.returncode == 0, drawn.stderr[-2000:]
        with Image.open(next((tmp_path / name).glob("*.png"))) as image:
            images[name] = numpy.asarray(image).astype(int)
    assert abs(images["beside"] - images["merged"]).max() <= 2 < abs(images["beside"] - images["without"]).max()

    given = [*TINY["flux"].command(tiny_flux), "--dataset_config", dataset_toml(bucket_reso_steps=64, resolution=64)]
    given += ["--output_dir", tmp_path / "out", "--max_train_steps", "1", "--max_data_loader_n_workers", "0"]
    trained = run_in_process("flux_train_network.py", *given, "--base_weights", tmp_path / "dora.safetensors")
    assert trained.returncode == 0, trained.stderr[-2000:]
    refused = run_in_process("flux_train_network.py", *given, "--network_weights", tmp_path / "dora.safetensors")
    assert refused.returncode == 2 and "holds DoRA scales" in refused.stderr
