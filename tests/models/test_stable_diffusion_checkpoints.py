"""Stable Diffusion checkpoints as they come: containers, dtypes, what else lies in them, what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from library.checkpoints import open_checkpoint
from library.errors import UserError
from library.models.loading import LoadSpec
from library.models.stable_diffusion.checkpoint import StableDiffusionModel, open_stable_diffusion, open_vae
from library.safetensors_io import save_file
from tests.families.stable_diffusion import make_few_blocks
from tests.published import make_published
from tools.make_tiny_models import make_tiny_flux

UNET = "model.diffusion_model."
CLIP = "cond_stage_model.transformer."
VAE = "first_stage_model."
OPTION = "--pretrained_model_name_or_path"


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    """A file that needs to say nothing: all is as in the published models."""
    return make_published(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="session")
def sd1_folder(tmp_path_factory) -> Path:
    return make_few_blocks(tmp_path_factory.mktemp("sd1_folder"), "sd1", "diffusers")


def read(path: Path) -> dict[str, Tensor]:
    checkpoint = open_checkpoint(path)
    return {key: checkpoint.load(key) for key in checkpoint}


def metadata(path: Path) -> dict[str, str]:
    return open_checkpoint(path).metadata


@pytest.fixture(scope="module")
def changed(tmp_path_factory) -> Callable[..., Path]:
    """Write a single file's tensors again, changed by a function."""

    def write(path: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> Path:
        target = tmp_path_factory.mktemp("changed") / "model.safetensors"
        save_file(change(read(path)), target, metadata(path))
        return target

    return write


@cache
def states_of(path: Path) -> dict[str, dict[str, Tensor]]:
    """Of a file as it is, read once."""
    return states(open_stable_diffusion(path))


def states(model: StableDiffusionModel, dtype: torch.dtype | None = torch.float32) -> dict[str, dict[str, Tensor]]:
    parts = {"unet": model.unet, "vae": model.autoencoder}
    parts |= {f"text {index}": file for index, file in enumerate(model.text_encoders)}
    return {part: file.load(LoadSpec.of(dtype)).state_dict() for part, file in parts.items()}


def assert_same(actual: dict[str, dict[str, Tensor]], expected: dict[str, dict[str, Tensor]]) -> None:
    assert actual.keys() == expected.keys()
    for part, state in expected.items():
        assert actual[part].keys() == state.keys()
        for name, value in state.items():
            assert actual[part][name].dtype == value.dtype and torch.equal(actual[part][name], value), name


# What is read


@pytest.mark.parametrize("nested", [False, True])
def test_a_ckpt_file_loads_as_the_safetensors_file_does(whole, tmp_path, nested):
    """It cannot hold what shapes don't give, which is then as in the published models."""
    tensors = read(whole)
    torch.save({"state_dict": tensors, "global_step": 3} if nested else tensors, tmp_path / "model.ckpt")
    opened = open_stable_diffusion(tmp_path / "model.ckpt")
    expected = open_stable_diffusion(whole)
    assert opened.unet.config == expected.unet.config and opened.autoencoder.config == expected.autoencoder.config
    assert [encoder.sizes for encoder in opened.text_encoders] == [encoder.sizes for encoder in expected.text_encoders]
    assert_same(states(opened), states(expected))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_half_precision_files_are_kept_or_converted(few_blocks_sdxl, changed, stored):
    path = changed(few_blocks_sdxl, lambda tensors: {key: value.to(stored) for key, value in tensors.items()})
    expected = states_of(few_blocks_sdxl)
    rounded = {part: {name: value.to(stored) for name, value in state.items()} for part, state in expected.items()}
    opened = open_stable_diffusion(path, disable_mmap=True)
    assert_same(states(opened, None), rounded)
    full = {part: {name: value.float() for name, value in state.items()} for part, state in rounded.items()}
    assert_same(states(opened), full)


def test_text_encoder_keys_without_their_middle_level_are_read(few_blocks_sd1, changed):
    path = changed(few_blocks_sd1, lambda tensors: {key.replace(".text_model.", "."): tensors[key] for key in tensors})
    assert f"{CLIP}encoder.layers.0.mlp.fc1.weight" in read(path)
    assert_same(states(open_stable_diffusion(path)), states_of(few_blocks_sd1))


EXTRAS = {
    "sd1": (
        *("model_ema.decay", "model_ema.diffusion_modelout2weight", "logvar", "sqrt_alphas_cumprod", "scale_factor"),
        *("v_pred", "cond_stage_model.logit_scale", f"{CLIP}logit_scale", f"{CLIP}text_projection.weight"),
        *(f"{VAE}loss.logvar", f"{VAE}model_ema.decay"),
    ),
    "sd2": ("cond_stage_model.model.attn_mask", "loss.discriminator.main.0.weight"),
    "sdxl": (
        "ztsnr",
        "denoiser.sigmas",
        "conditioner.embedders.1.model.transformer.text_model.embeddings.position_ids",
    ),
}


@pytest.mark.parametrize("variant", list(EXTRAS))
def test_what_programs_leave_in_files_beside_the_model_does_no_harm(variant, request, changed):
    plain = request.getfixturevalue(f"few_blocks_{variant}")
    path = changed(plain, lambda tensors: tensors | {name: torch.ones(1) for name in EXTRAS[variant]})
    assert_same(states(open_stable_diffusion(path)), states_of(plain))


def test_a_projection_stored_as_a_layer_is_taken_as_it_is(few_blocks_sdxl, changed):
    key = "conditioner.embedders.1.model.text_projection"

    def as_layer(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
        return lambda tensors: tensors | {name: tensors.pop(key).t().contiguous()}

    expected = states_of(few_blocks_sdxl)
    for suffix in (".weight", ".weight.weight"):
        assert_same(states(open_stable_diffusion(changed(few_blocks_sdxl, as_layer(key + suffix)))), expected)


def test_a_diffusers_folder_is_read_in_any_number_of_shards_and_with_old_attention_names(sd1_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(sd1_folder, folder)
    unet = read(folder / "unet" / "diffusion_pytorch_model.safetensors")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    for index, keys in enumerate((sorted(unet)[:300], sorted(unet)[300:])):
        name = f"diffusion_pytorch_model-{index + 1:05d}-of-00002.safetensors"
        save_file({key: unet[key] for key in keys}, folder / "unet" / name)
    vae = read(folder / "vae" / "diffusion_pytorch_model.safetensors")
    save_file(under_old_names(vae), folder / "vae" / "diffusion_pytorch_model.safetensors")
    assert_same(states(open_stable_diffusion(folder)), states(open_stable_diffusion(sd1_folder)))


def under_old_names(vae: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for key, value in vae.items():
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            key = key.replace(f".attentions.0.{new}.", f".attentions.0.{old}.")
        renamed[key] = value
    return renamed


def test_the_origins_name_the_files_own_keys(tiny_sd2, tiny_sdxl):
    """So that a tool can write a module's weight back to where it came from."""
    for path in (tiny_sd2, tiny_sdxl):
        opened = open_stable_diffusion(path)
        stored = read(path)
        for file in (opened.unet, opened.autoencoder, *opened.text_encoders):
            places = {key: value.clone() for key, value in stored.items()}
            for name, origin in file.source.origins.items():
                (key,) = origin.keys
                value = file.source.load(name, None, "cpu") + 1
                value = value if origin.transform is None else origin.transform(value)
                rows = places[key] if origin.rows is None else places[key][slice(*origin.rows)]
                rows.copy_(value.reshape(rows.shape))
            used = {key for origin in file.source.origins.values() for key in origin.keys}
            assert used and all(torch.equal(places[key], stored[key] + 1) for key in used)


def test_what_the_files_say_about_the_prediction_is_told(few_blocks_sd2, few_blocks_sdxl, tmp_path):
    says = {}
    for variant in ("sd2", "sdxl"):
        for layout in ("original", "diffusers"):
            for v_prediction in (False, True):
                folder = tmp_path / f"{variant}_{layout}_{v_prediction}"
                if layout == "original" and not v_prediction:
                    path = few_blocks_sd2 if variant == "sd2" else few_blocks_sdxl
                else:
                    path = make_few_blocks(folder, variant, layout, v_prediction=v_prediction)
                opened = open_stable_diffusion(path)
                says[variant, layout, v_prediction] = (opened.predicts_v, opened.zero_terminal_snr)
    assert says == {
        ("sd2", "original", False): (None, None),
        ("sd2", "original", True): (True, None),
        ("sd2", "diffusers", False): (False, False),
        ("sd2", "diffusers", True): (True, False),
        ("sdxl", "original", False): (None, None),
        ("sdxl", "original", True): (True, True),
        ("sdxl", "diffusers", False): (False, False),
        ("sdxl", "diffusers", True): (True, True),
    }


def test_meta_modules_have_the_structure_and_no_numbers(few_blocks_sdxl):
    opened = open_stable_diffusion(few_blocks_sdxl)
    for file in (opened.unet, opened.autoencoder, *opened.text_encoders):
        meta_module = file.meta_module()
        assert all(parameter.is_meta for parameter in meta_module.parameters())
        assert set(meta_module.state_dict()) == set(file.source.names())


# --vae


@pytest.fixture(scope="session")
def other_vae(tmp_path_factory) -> Path:
    """The Diffusers folder of a model whose VAE has other numbers."""
    return make_published(tmp_path_factory.mktemp("other"), "diffusers")


@pytest.fixture(scope="session")
def vae_paths(whole, other_vae, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("vae")
    prefixed = {key: value for key, value in read(whole).items() if key.startswith(VAE)}
    bare = {key.removeprefix(VAE): value for key, value in prefixed.items()}
    weights = other_vae / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(read(weights), folder / "diffusion_pytorch_model.bin")
    leftovers = {"loss.logvar": torch.ones(()), "model_ema.decay": torch.ones(())}
    torch.save({"state_dict": bare | leftovers, "epoch": 1}, folder / "bare.ckpt")
    save_file(prefixed, folder / "prefixed.safetensors")
    matrices = {
        key: value[:, :, 0, 0] if ".attn_1." in key and value.dim() == 4 else value for key, value in bare.items()
    }
    save_file(matrices, folder / "matrices.safetensors")
    return {
        "a model's folder": other_vae,
        "a VAE's folder": other_vae / "vae",
        "a file in Diffusers' layout": weights,
        "a .bin file": folder / "diffusion_pytorch_model.bin",
        "a bare file with leftovers": folder / "bare.ckpt",
        "a file with prefix": folder / "prefixed.safetensors",
        "a file with matrices": folder / "matrices.safetensors",
        "a whole checkpoint": whole,
    }


@pytest.mark.parametrize("kind", [pytest.param("sd1", marks=pytest.mark.thorough), "sdxl"])
def test_a_replacement_vae_is_read_from_everything_that_holds_one(request, other_vae, vae_paths, kind):
    expected = open_stable_diffusion(other_vae).autoencoder.load(LoadSpec.of(torch.float32)).state_dict()
    path = request.getfixturevalue(f"few_blocks_{kind}")
    own = open_stable_diffusion(path).autoencoder
    assert not torch.equal(own.source.load("quant_conv.weight", None, "cpu"), expected["quant_conv.weight"])
    for name, vae in vae_paths.items():
        opened = open_stable_diffusion(path, vae=vae)
        actual = opened.autoencoder.load(LoadSpec.of(torch.float32)).state_dict()
        assert actual.keys() == expected.keys(), name
        assert all(torch.equal(actual[key], expected[key]) for key in expected), name
        # Latents stay as the U-Net knows them.
        assert opened.autoencoder.config["scaling_factor"] == own.config["scaling_factor"]


def test_a_file_without_a_vae_needs_one(few_blocks_sd1, changed, vae_paths):
    path = changed(few_blocks_sd1, lambda tensors: {key: tensors[key] for key in tensors if not key.startswith(VAE)})
    with pytest.raises(UserError, match=r"no autoencoder \(VAE\) in it; name one with --vae"):
        open_stable_diffusion(path)
    assert open_stable_diffusion(path, vae=vae_paths["a VAE's folder"]).autoencoder.config["latent_channels"] == 4


def test_other_files_given_as_vae_are_named(few_blocks_sd1, tmp_path):
    flux = make_tiny_flux(tmp_path / "flux")
    wide = {"encoder.down.0.block.0.conv1.weight": torch.zeros(8, 8, 3, 3), "quant_conv.weight": torch.zeros(32, 32)}
    wide |= {"encoder.conv_in.weight": torch.zeros(8, 3, 3, 3), "decoder.conv_in.weight": torch.zeros(8, 16, 3, 3)}
    save_file(wide, tmp_path / "wide.safetensors")
    refusals = {
        flux.autoencoder: r"--vae: .*ae\.safetensors is a FLUX autoencoder",
        flux.clip_l: r"--vae: .*clip_l\.safetensors is a CLIP",
        flux.transformer: r"--vae: .*is a FLUX\.1 file",
        tmp_path / "wide.safetensors": "is an autoencoder with 16 latent channels; Stable Diffusion's have 4",
        Path("stabilityai/sd-vae-ft-mse"): "--vae: .*sd-vae-ft-mse does not exist, and models are not downloaded",
        tmp_path / "missing.safetensors": r"--vae: .*missing\.safetensors does not exist",
    }
    for path, message in refusals.items():
        with pytest.raises(UserError, match=message):
            open_stable_diffusion(few_blocks_sd1, vae=path)
    with pytest.raises(UserError, match="is a Stable Diffusion 1.x file; a Stable Diffusion autoencoder"):
        without = {key: value for key, value in read(few_blocks_sd1).items() if not key.startswith(VAE)}
        save_file(without, tmp_path / "without.safetensors")
        open_vae(tmp_path / "without.safetensors", "sd1")


# What is refused


def with_inputs(channels: int) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    name = f"{UNET}input_blocks.0.0.weight"
    return lambda tensors: tensors | {name: torch.zeros(32, channels, 3, 3)}


def keep(*prefixes: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {key: value for key, value in tensors.items() if key.startswith(prefixes)}


def without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(UNET): value for key, value in tensors.items() if key.startswith(UNET)}


def as_refiner(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    old, new = "conditioner.embedders.1.", "conditioner.embedders.0."
    kept = {key: value for key, value in tensors.items() if not key.startswith(new)}
    return {key.replace(old, new): value for key, value in kept.items()}


REFUSALS = {
    "inpainting": ("sd1", with_inputs(9), r"extra image inputs \(inpainting: 9 input channels\)"),
    "depth": ("sd2", with_inputs(5), r"extra image inputs \(depth: 5 input channels\)"),
    "refiner": ("sdxl", as_refiner, "is the refiner of Stable Diffusion XL; the base model is needed"),
    "unet alone": ("sd1", without_prefix, "holds the U-Net alone"),
    "no text encoder": ("sd1", keep(UNET, VAE), "without a text encoder: .*cond_stage_model.transformer."),
    "no second text encoder": (
        "sdxl",
        keep(UNET, VAE, "conditioner.embedders.0."),
        "without a text encoder: .*conditioner.embedders.1.model.",
    ),
    "a VAE": ("sd1", keep(VAE), r"is a Stable Diffusion autoencoder \(VAE\); a Stable Diffusion 1.x, 2.x or XL"),
    "EDM": ("sdxl", lambda tensors: tensors | {"edm_mean": torch.ones(4)}, "trained with the EDM schedule"),
    "another text width": (
        "sd1",
        lambda tensors: {key: value[:, :48] if "attn2.to_k" in key else value for key, value in tensors.items()},
        "the U-Net reads text 48 wide, but its text encoder gives 64",
    ),
}


@pytest.mark.parametrize("case", list(REFUSALS))
def test_files_that_cannot_be_used_are_named(request, changed, case):
    variant, change, message = REFUSALS[case]
    path = changed(request.getfixturevalue(f"few_blocks_{variant}"), change)
    with pytest.raises(UserError, match=f"{OPTION}: .*{message}"):
        open_stable_diffusion(path)


def test_files_of_other_families_are_named(tmp_path):
    original = make_tiny_flux(tmp_path / "original")
    folder = make_tiny_flux(tmp_path / "folder", layout="diffusers").transformer
    save_file({"lora_unet_a.lora_down.weight": torch.ones(1)}, tmp_path / "lora.safetensors")
    refusals = {
        original.transformer: "is a FLUX.1 file; a Stable Diffusion 1.x, 2.x or XL checkpoint is needed",
        folder: "is a FLUX.1 file in the Diffusers layout; a Stable Diffusion",
        tmp_path / "lora.safetensors": "is a LoRA file; a Stable Diffusion",
        tmp_path / "nothing.safetensors": "nothing.safetensors does not exist",
        Path("stabilityai/stable-diffusion-xl-base-1.0"): "models are not downloaded from the Hugging Face hub",
    }
    for path, message in refusals.items():
        with pytest.raises(UserError, match=f"{OPTION}: .*{message}"):
            open_stable_diffusion(path)


def test_tensors_that_do_not_fit_are_listed_when_a_part_is_loaded(few_blocks_sd1, changed):
    query = "transformer_blocks.0.attn1.to_q.weight"
    cases = {
        r"1 tensor is unexpected \(input_blocks.1.0.odd.weight\)": lambda tensors: (
            tensors | {f"{UNET}input_blocks.1.0.odd.weight": torch.ones(1)}
        ),
        rf"1 tensor is missing \(down_blocks.0.attentions.0.{query}\)": lambda tensors: {
            key: value for key, value in tensors.items() if key != f"{UNET}input_blocks.1.1.{query}"
        },
        rf'tensor "down_blocks.0.attentions.0.{query}" has the shape \(3, 32\)': lambda tensors: (
            tensors | {f"{UNET}input_blocks.1.1.{query}": torch.ones(3, 32)}
        ),
    }
    for message, change in cases.items():
        opened = open_stable_diffusion(changed(few_blocks_sd1, change))
        with pytest.raises(UserError, match=message):
            opened.unet.load(LoadSpec.of(torch.float32))
    for prefix, part in ((VAE, "autoencoder"), (CLIP, "text_encoders")):
        path = changed(few_blocks_sd1, lambda tensors, prefix=prefix: tensors | {f"{prefix}encoder.odd": torch.ones(1)})
        files = getattr(open_stable_diffusion(path), part)
        with pytest.raises(UserError, match=r"1 tensor is unexpected \(.*encoder.odd\)"):
            (files[0] if part == "text_encoders" else files).load(LoadSpec.of(torch.float32))


def test_damaged_or_foreign_diffusers_folders_are_named(sd1_folder, tmp_path):
    def folder(name: str, change: Callable[[Path], object]) -> Path:
        shutil.copytree(sd1_folder, tmp_path / name)
        change(tmp_path / name)
        return tmp_path / name

    def scheduler(text: str) -> Callable[[Path], object]:
        return lambda root: (root / "scheduler" / "scheduler_config.json").write_text(text, encoding="utf-8")

    cases = {
        "no_text": (lambda root: shutil.rmtree(root / "text_encoder"), "has 0 text encoders; this U-Net needs 1"),
        "no_vae": (lambda root: shutil.rmtree(root / "vae"), "no autoencoder .VAE. in it; name one with --vae"),
        "flow": (scheduler(json.dumps({"prediction_type": "flow"})), 'prediction type "flow" is not supported'),
        "edm": (scheduler(json.dumps({"_class_name": "EDMEulerScheduler"})), "trained with the EDM schedule"),
        "damaged": (scheduler("{"), "is not a valid scheduler configuration"),
        "heads": (
            lambda root: (root / "unet" / "config.json").write_text('{"attention_head_dim": 7}', encoding="utf-8"),
            "32 channels cannot be split into 7 attention heads",
        ),
    }
    for name, (change, message) in cases.items():
        with pytest.raises(UserError, match=message):
            open_stable_diffusion(folder(name, change))
    assert (
        open_stable_diffusion(folder("no_scheduler", lambda root: shutil.rmtree(root / "scheduler"))).predicts_v is None
    )


def test_messages_name_the_option_that_was_given(few_blocks_sd1, changed):
    path = changed(few_blocks_sd1, with_inputs(8))
    with pytest.raises(UserError, match=re.escape(f"--base_model: {path} is a Stable Diffusion model with extra")):
        open_stable_diffusion(path, option="--base_model")
