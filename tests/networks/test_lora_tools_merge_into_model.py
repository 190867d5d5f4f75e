"""merge_lora.py and sdxl_merge_lora.py with --sd_model: what the merged model computes, and what stays as it was."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.models.loading import LoadSpec
from library.models.stable_diffusion.checkpoint import open_stable_diffusion
from networks import lora, merge_lora, sdxl_merge_lora
from tests.families.stable_diffusion import make_few_blocks
from tests.forked import growth, in_a_child, linux_only
from tests.networks.lora_tool_files import deltas, metadata, run
from tests.published import make_published

RATIOS = (0.7, -0.4)


@pytest.fixture(scope="session", params=[pytest.param("sd2", marks=pytest.mark.thorough), "sdxl"])
def variant(request):
    return request.param


@pytest.fixture(scope="session")
def model(variant, request):
    """The single file of a tiny model."""
    return request.getfixturevalue(f"few_blocks_{variant}")


@pytest.fixture(scope="session")
def folder(variant, tmp_path_factory):
    """The same model as a Diffusers folder."""
    return make_few_blocks(tmp_path_factory.mktemp(f"{variant}_folder"), variant, "diffusers")


def make_loras(model, place):
    """Two files with text encoders, of different rank and alpha; the second has all convolutions."""
    opened = open_stable_diffusion(model)
    encoders = [encoder.meta_module() for encoder in opened.text_encoders]
    paths = []
    for index, (dim, alpha, arguments) in enumerate([(4, 2.0, {}), (3, 3.0, {"conv_dim": "2", "conv_alpha": "1"})]):
        network = lora.create_network(1.0, dim, alpha, None, encoders, opened.unet.meta_module(), **arguments)
        generator = torch.Generator().manual_seed(index)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.08, generator=generator)
        paths.append(place / f"{index}.safetensors")
        version = "sdxl_base_v1-0" if opened.variant == "sdxl" else "sd_v1"
        network.save_weights(paths[-1], None, {"ss_base_model_version": version, "modelspec.title": f"LoRA {index}"})
    return paths


@pytest.fixture(scope="session")
def loras(model, tmp_path_factory):
    return make_loras(model, tmp_path_factory.mktemp("loras"))


@pytest.fixture(scope="session")
def sd1_loras(few_blocks_sd1, tmp_path_factory):
    return make_loras(few_blocks_sd1, tmp_path_factory.mktemp("sd1_loras"))


def script(variant):
    return sdxl_merge_lora.main if variant == "sdxl" else merge_lora.main


def merge(variant, model, loras, save_to, *options):
    files = ["--sd_model", model, "--models", *loras, "--ratios", *RATIOS[: len(loras)], "--save_to", save_to]
    run(script(variant), *files, *options)
    return save_to


def modules_of(path):
    opened = open_stable_diffusion(path)
    spec = LoadSpec(torch.float32)
    return [encoder.load(spec) for encoder in opened.text_encoders], opened.unet.load(spec)


def modules_in_folder(path):
    """The modules of a Diffusers folder as diffusers and transformers load them."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    classes = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    encoders = [kind.from_pretrained(path / part) for part, kind in classes.items() if (path / part).is_dir()]
    return encoders, UNet2DConditionModel.from_pretrained(path / "unet")


@torch.no_grad()
def outputs(encoders, unet):
    """What the text encoders and the U-Net compute for fixed inputs."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 500, (2, 12), generator=generator)
    results = [getattr(encoder, "text_model", encoder)(input_ids=tokens).last_hidden_state for encoder in encoders]
    latents = torch.randn(2, 4, 16, 16, generator=generator)
    text = torch.randn(2, 12, unet.config.cross_attention_dim, generator=generator)
    extra = None
    if unet.config.addition_embed_type:
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
        extra = {"text_embeds": torch.randn(2, pooled, generator=generator), "time_ids": ids}
    return [*results, unet(latents, torch.tensor([10, 700]), text, added_cond_kwargs=extra).sample]


@pytest.fixture(scope="session")
def applied(model, loras):
    """What the model computes with both networks put into it, and without."""
    encoders, unet = modules_of(model)
    before = outputs(encoders, unet)
    for path, ratio in zip(loras, RATIOS):
        network, _ = lora.create_network_from_weights(ratio, path, None, encoders, unet, for_inference=True)
        network.apply_to(encoders, unet)
    return outputs(encoders, unet), before


def assert_computes(results, applied):
    for result, wanted, before in zip(results, *applied):
        assert (result - wanted).norm() < 1e-5 * wanted.norm()
        assert (before - wanted).norm() > 1e-2 * wanted.norm()  # the LoRA does something


@pytest.fixture(scope="session")
def merged(variant, model, loras, tmp_path_factory):
    """The model with both files merged into it."""
    return merge(variant, model, loras, tmp_path_factory.mktemp("merged") / "my model.safetensors")


def test_the_merged_file_computes_what_the_networks_do(merged, applied):
    assert_computes(outputs(*modules_of(merged)), applied)


def test_a_diffusers_folder_is_merged_for_diffusers_and_transformers(variant, folder, loras, applied, tmp_path):
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"the same in another format")
    merged = merge(variant, folder, loras, tmp_path / "merged")
    assert_computes(outputs(*modules_in_folder(merged)), applied)
    old, new = (
        {file.relative_to(top).as_posix() for file in top.rglob("*") if file.is_file()} for top in (folder, merged)
    )
    assert old - new == {"unet/diffusion_pytorch_model.fp16.safetensors"} and not new - old
    same = [name for name in new if not name.startswith(("unet/diff", "text_encoder")) or name.endswith(".json")]
    assert len(same) > 5 and all((folder / name).read_bytes() == (merged / name).read_bytes() for name in same)


def test_only_the_loras_layers_change(variant, model, loras, merged):
    before, after = load_file(model), load_file(merged)
    assert list(before) == list(after)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    modules = set(deltas(loras[0])) | set(deltas(loras[1]))
    fused = sum("attn.in_proj_weight" in key for key in changed)
    assert len(changed) == len(modules) - 2 * fused
    assert (fused > 0) == (variant != "sd1")
    assert not any("first_stage_model" in key or key.endswith(".bias") for key in changed)


def test_a_weight_is_rounded_once_to_the_files_format(tmp_path):
    """A float16 model stays float16; every changed weight is the float64 sum, rounded."""
    model = make_few_blocks(tmp_path / "half", "sd1", dtype=torch.float16)
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    generator = torch.Generator().manual_seed(0)
    down, up = (torch.randn(shape, generator=generator) for shape in ((4, 32), (32, 4)))
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "lora.safetensors")
    before = load_file(model)
    merged = load_file(merge("sd1", model, [tmp_path / "lora.safetensors"], tmp_path / "m.safetensors"))
    wanted = before[key].double() + 0.7 * 0.25 * up.double() @ down.double()
    assert merged[key].dtype == torch.float16
    # Rounded to float32 on the way: at a tie, half a unit in the last place.
    assert (merged[key].double() - wanted).abs().max() <= 0.5001 * (wanted.half().double().abs() * 2**-10).max()
    assert float((merged[key] == wanted.half()).float().mean()) > 0.999
    assert all(tensor.dtype == before[key_].dtype for key_, tensor in merged.items())

    saved = load_file(
        merge("sd1", model, [tmp_path / "lora.safetensors"], tmp_path / "b.safetensors", "--save_precision", "bf16")
    )
    half = {key_ for key_, tensor in before.items() if tensor.dtype == torch.float16}
    assert {tensor.dtype for key_, tensor in saved.items() if key_ in half} == {torch.bfloat16}
    others = set(before) - half  # the noise schedule in float32, whole numbers
    assert "alphas_cumprod" in others and all(torch.equal(saved[key_], before[key_]) for key_ in others)
    assert torch.equal(
        saved["first_stage_model.quant_conv.weight"], before["first_stage_model.quant_conv.weight"].bfloat16()
    )


def test_other_programs_names_are_understood(few_blocks_sd1, tmp_path):
    """What diffusers (PEFT) writes, with the strength in the metadata, gives the same as the kohya form."""
    rest = "transformer_blocks.0.attn1.to_q"
    path, original = f"down_blocks.0.attentions.0.{rest}", f"input_blocks.1.1.{rest}"
    kohya = f"lora_unet_{path}".replace(".", "_")
    generator = torch.Generator().manual_seed(0)
    down, up = (torch.randn(shape, generator=generator) for shape in ((4, 32), (32, 4)))
    forms = {
        "kohya": {
            f"{kohya}.lora_down.weight": down,
            f"{kohya}.lora_up.weight": up,
            f"{kohya}.alpha": torch.tensor(2.0),
        },
        "peft": {f"unet.{path}.lora_A.weight": down, f"unet.{path}.lora_B.weight": up},
        "comfy": {
            f"diffusion_model.{original}.lora_down.weight": down,
            f"diffusion_model.{original}.lora_up.weight": up / 2,
        },
    }
    results = []
    for form, tensors in forms.items():
        settings = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 2})}
        save_file(tensors, tmp_path / f"{form}.safetensors", settings if form == "peft" else None)
        merged = merge("sd1", few_blocks_sd1, [tmp_path / f"{form}.safetensors"], tmp_path / f"m_{form}.safetensors")
        results.append(load_file(merged))
    for other in results[1:]:
        assert all(torch.allclose(results[0][key], other[key], atol=1e-6) for key in other)
    key = f"model.diffusion_model.{original}.weight"
    assert (results[0][key] - load_file(few_blocks_sd1)[key]).abs().max() > 0.1


def test_a_1x1_convolution_of_the_lora_fits_a_linear_layer(few_blocks_sd2, tmp_path):
    """Stable Diffusion 2 files have matrices where those of 1.x, and some LoRA files, have convolutions."""
    name = "lora_unet_down_blocks_0_attentions_0_proj_in"
    down, up = torch.randn(2, 32, 1, 1), torch.randn(32, 2, 1, 1)
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, tmp_path / "lora.safetensors")
    key = "model.diffusion_model.input_blocks.1.1.proj_in.weight"
    merged = load_file(merge("sd2", few_blocks_sd2, [tmp_path / "lora.safetensors"], tmp_path / "m.safetensors"))[key]
    wanted = load_file(few_blocks_sd2)[key] + 0.7 * up.flatten(1) @ down.flatten(1)
    assert merged.shape == (32, 32) and torch.allclose(merged, wanted, atol=1e-6)


def test_pickled_models_are_read_and_written(tmp_path):
    model = make_published(tmp_path / "model")
    loras = make_loras(model, tmp_path)
    torch.save({"state_dict": load_file(model), "global_step": 7}, tmp_path / "model.ckpt")
    plain = load_file(merge("sd1", model, loras, tmp_path / "m.safetensors"))
    from_pickle = load_file(merge("sd1", tmp_path / "model.ckpt", loras, tmp_path / "n.safetensors"))
    merge("sd1", model, loras, tmp_path / "m.ckpt")
    into_pickle = torch.load(tmp_path / "m.ckpt", weights_only=True)["state_dict"]
    for other in (from_pickle, into_pickle):
        assert set(other) == set(plain) and all(torch.equal(other[key], plain[key]) for key in plain)


def test_metadata_of_a_merged_model(variant, model, merged):
    found, before = metadata(merged), metadata(model)
    architectures = {
        "sd1": ("stable-diffusion-v1", "512x512", "epsilon"),
        "sd2": ("stable-diffusion-v2-768-v", "768x768", "v"),
        "sdxl": ("stable-diffusion-xl-v1-base", "1024x1024", "epsilon"),
    }
    names = ("architecture", "resolution", "prediction_type")
    assert tuple(found[f"modelspec.{name}"] for name in names) == architectures[variant]
    assert found["modelspec.title"] == "my model"
    assert found["modelspec.merged_from"] == f"{model.stem}, LoRA 0, LoRA 1"
    assert all(found[key] == value for key, value in before.items())


def test_the_inputs_are_untouched_and_the_same_command_gives_the_same_bytes(few_blocks_sd1, sd1_loras, tmp_path):
    """Without modelspec, which has the date; what is needed to load the model stays in the metadata."""
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (few_blocks_sd1, *sd1_loras)]
    first = merge("sd1", few_blocks_sd1, sd1_loras, tmp_path / "m.safetensors", "--no_metadata").read_bytes()
    assert merge("sd1", few_blocks_sd1, sd1_loras, tmp_path / "m.safetensors", "--no_metadata").read_bytes() == first
    assert [hashlib.sha256(path.read_bytes()).hexdigest() for path in (few_blocks_sd1, *sd1_loras)] == hashes
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]
    kept = {key: value for key, value in metadata(few_blocks_sd1).items() if not key.startswith("modelspec.")}
    assert metadata(tmp_path / "m.safetensors") == kept


# ---- what cannot be merged ---------------------------------------------------------------------------------------


def test_every_unmatched_module_is_listed_before_anything_is_written(few_blocks_sd1, tmp_path):
    names = ["lora_unet_down_blocks_9_attentions_0_proj_in", "lora_unet_up_blocks_9_attentions_0_proj_in"]
    tensors = {}
    for name in names:
        tensors |= {f"{name}.lora_down.weight": torch.ones(2, 8), f"{name}.lora_up.weight": torch.ones(8, 2)}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=f"2 of 2 modules have no layer in this model: {', '.join(names)}"):
        merge("sd1", few_blocks_sd1, [tmp_path / "x.safetensors"], tmp_path / "m.safetensors")
    assert not (tmp_path / "m.safetensors").exists()


def test_a_module_of_another_size_is_named(few_blocks_sd1, tmp_path):
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 320), f"{name}.lora_up.weight": torch.ones(320, 2)}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(
        UserError, match=rf"{name} is for a layer of shape \[320, 320\], but this model's is \[32, 32\]"
    ):
        merge("sd1", few_blocks_sd1, [tmp_path / "x.safetensors"], tmp_path / "m.safetensors")


def test_numbers_too_large_for_the_format_are_named(few_blocks_sd1, tmp_path):
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{name}.lora_down.weight": torch.full((2, 32), 1e3), f"{name}.lora_up.weight": torch.full((32, 2), 1e3)}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="gets numbers too large for torch.float16"):
        given = (few_blocks_sd1, [tmp_path / "x.safetensors"], tmp_path / "m.safetensors")
        merge("sd1", *given, "--save_precision", "fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


# ---- memory ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@linux_only
def test_memory_holds_one_tensor_and_not_the_model(few_blocks_sd1, tmp_path):
    """A model that is 8 tensors of 8 MB larger is merged with little more memory than without them."""
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 32), f"{name}.lora_up.weight": torch.ones(32, 2)}
    lora_file, large = tmp_path / "lora.safetensors", tmp_path / "large.safetensors"
    save_file(tensors, lora_file)
    padding = {f"first_stage_model.loss.{index}": torch.full((2_000_000,), float(index)) for index in range(8)}
    save_file({**load_file(few_blocks_sd1), **padding}, large, metadata(few_blocks_sd1))
    del padding

    def merged(path: Path) -> None:
        merge("sd1", path, [lora_file], tmp_path / "out.safetensors", "--save_precision", "bf16")

    def measured() -> list[int]:
        merged(few_blocks_sd1)
        return [
            growth(lambda: merged(large)),
            growth(lambda: {key: tensor.clone() for key, tensor in load_file(large).items()}),
        ]

    merging, loading = in_a_child(measured)
    assert loading > 60e6  # what the measure says of the whole model at once
    assert merging < 30e6
