"""extract_lora_from_models.py: from two models to the LoRA that leads from one to the other."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.models.stable_diffusion.checkpoint import open_stable_diffusion
from networks import extract_lora_from_models, lora
from networks.merge_lora import main as merge_main
from networks.sdxl_merge_lora import main as sdxl_merge_main
from tests.networks.lora_tool_files import deltas, metadata, ranks, run

RANK, CONV_RANK = 3, 2


@pytest.fixture(scope="session")
def tuned(few_blocks_sd1, few_blocks_sd2, few_blocks_sdxl, tmp_path_factory):
    """By variant: original, the LoRA, and the model with the LoRA merged into it."""
    made = {}

    def make(variant):
        if variant not in made:
            original = {"sd1": few_blocks_sd1, "sd2": few_blocks_sd2, "sdxl": few_blocks_sdxl}[variant]
            place = tmp_path_factory.mktemp(f"tuned_{variant}")
            opened = open_stable_diffusion(original)
            encoders = [encoder.meta_module() for encoder in opened.text_encoders]
            network = lora.create_network(
                1.0, RANK, RANK, None, encoders, opened.unet.meta_module(), conv_dim=str(CONV_RANK), conv_alpha="2"
            )
            generator = torch.Generator().manual_seed(0)
            for parameter in network.parameters():
                torch.nn.init.normal_(parameter, std=0.2, generator=generator)
            network.save_weights(place / "lora.safetensors", None, None)
            files = ["--models", place / "lora.safetensors", "--ratios", 1, "--sd_model", original]
            run(sdxl_merge_main if variant == "sdxl" else merge_main, *files, "--save_to", place / "tuned.safetensors")
            made[variant] = (original, place / "lora.safetensors", place / "tuned.safetensors")
        return made[variant]

    return make


def extract(original, model, save_to, *options):
    run(extract_lora_from_models.main, "--model_org", original, "--model_tuned", model, "--save_to", save_to, *options)
    return save_to


@pytest.mark.parametrize(
    "variant", [*(pytest.param(name, marks=pytest.mark.thorough) for name in ("sd1", "sd2")), "sdxl"]
)
def test_what_was_merged_is_extracted(tuned, variant, tmp_path):
    """At full rank and without clamping, up to the float32 rounding of the tuned model's weights."""
    original, source, model = tuned(variant)
    options = ("--dim", RANK, "--conv_dim", CONV_RANK, "--clamp_quantile", 1)
    made = extract(original, model, tmp_path / "e.safetensors", *options)
    found, wanted = deltas(made), deltas(source)
    assert set(found) == set(wanted) and ranks(made) == ranks(source)
    weights = load_file(model)
    size = max(float(tensor.abs().max()) for tensor in weights.values() if tensor.is_floating_point())
    for name, tensor in wanted.items():
        assert (found[name] - tensor).norm() < 1e-5 * max(float(tensor.norm()), size), name
        assert tensor.norm() > 1e-2
    described = metadata(made)
    versions = {"sd1": "sd_v1", "sd2": "sd_v2_v", "sdxl": "sdxl_base_v1-0"}
    assert described["ss_base_model_version"] == versions[variant]
    assert described["ss_v2"] == str(variant == "sd2") and described["ss_network_module"] == "networks.lora"
    assert (described["ss_network_dim"], described["ss_network_alpha"]) == ("3", "3.0")
    assert json.loads(described["ss_network_args"]) == {"conv_dim": "2", "conv_alpha": "2.0"}
    assert described["modelspec.architecture"].endswith("/lora") and described["modelspec.title"] == "e"
    assert described["modelspec.prediction_type"] == ("v" if variant == "sd2" else "epsilon")


def test_a_lower_rank_is_the_best_approximation_and_convolutions_are_left_out(tuned, tmp_path):
    original, source, model = tuned("sd1")
    made = extract(original, model, tmp_path / "e.safetensors", "--dim", 1, "--clamp_quantile", 1, "--no_metadata")
    wide = {key.split(".")[0] for key, t in load_file(source).items() if "lora_down" in key and t.shape[2:] == (3, 3)}
    found, wanted = deltas(made), deltas(source)
    conv_blocks = {name for name in wanted if "resnets" in name}
    assert wide and not set(found) & (wide | conv_blocks) and set(ranks(made).values()) == {1}
    for name, tensor in found.items():
        values = torch.linalg.svdvals(wanted[name])
        assert float((tensor - wanted[name]).norm()) == pytest.approx(float(values[1:].norm()), rel=1e-3)
    assert not any(key.startswith("modelspec") for key in metadata(made))


def test_values_are_clamped_at_the_quantile(tuned, tmp_path):
    original, _, model = tuned("sd1")
    free = load_file(extract(original, model, tmp_path / "free.safetensors", "--dim", 3, "--clamp_quantile", 1))
    cut = load_file(extract(original, model, tmp_path / "cut.safetensors", "--dim", 3))
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_2"
    keys = [f"{name}.lora_up.weight", f"{name}.lora_down.weight"]
    limit = float(torch.quantile(torch.cat([free[key].flatten() for key in keys]).abs(), 0.98))
    for key in keys:
        assert torch.allclose(cut[key], free[key].clamp(-limit, limit), atol=1e-6)


def with_changed(source, path, change):
    tensors = load_file(source)
    change(tensors)
    save_file(tensors, path, metadata(source))
    return path


ENCODER_KEY = "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
UNET_KEY = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"


def test_text_encoders_that_hardly_differ_are_left_out(few_blocks_sd1, tmp_path, capsys):
    def change(tensors):
        tensors[ENCODER_KEY][0, 0] += 0.005
        tensors[UNET_KEY][0, 0] += 0.001

    model = with_changed(few_blocks_sd1, tmp_path / "tuned.safetensors", change)
    made = extract(few_blocks_sd1, model, tmp_path / "e.safetensors", "--dim", 1)
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    assert set(ranks(made)) == {name}  # and layers that are the same in both are not in the file
    assert "text encoders differ by 0.005" in capsys.readouterr().err
    made = extract(few_blocks_sd1, model, tmp_path / "f.safetensors", "--dim", 1, "--min_diff", 0.001)
    assert set(ranks(made)) == {name, "lora_te_text_model_encoder_layers_0_mlp_fc1"}


def test_load_precision_rounds_both_models_first(few_blocks_sd1, tmp_path):
    """A tuned model in float16 differs from its float32 original by rounding alone; rounded alike, by nothing."""

    def halve(tensors):
        for key, tensor in tensors.items():
            if tensor.is_floating_point():
                tensors[key] = tensor.half()

    model = with_changed(few_blocks_sd1, tmp_path / "tuned.safetensors", halve)
    assert ranks(extract(few_blocks_sd1, model, tmp_path / "e.safetensors", "--dim", 1))
    with pytest.raises(UserError, match="do not differ in any layer"):
        extract(few_blocks_sd1, model, tmp_path / "f.safetensors", "--dim", 1, "--load_precision", "fp16")


def test_a_tuned_model_that_is_damaged_is_named(few_blocks_sd1, tmp_path):
    model = with_changed(
        few_blocks_sd1, tmp_path / "tuned.safetensors", lambda tensors: tensors[UNET_KEY].fill_(float("nan"))
    )
    with pytest.raises(UserError, match=r"attn1\.to_q\.weight holds numbers that are not finite"):
        extract(few_blocks_sd1, model, tmp_path / "e.safetensors", "--dim", 1)
    assert not (tmp_path / "e.safetensors").exists()


def test_a_tuned_model_that_lacks_a_layer_is_named(few_blocks_sd1, tmp_path):
    model = with_changed(few_blocks_sd1, tmp_path / "tuned.safetensors", lambda tensors: tensors.pop(UNET_KEY))
    with pytest.raises(UserError, match=r"tuned\.safetensors.*1 tensor is missing \(.*attn1\.to_q\.weight"):
        extract(few_blocks_sd1, model, tmp_path / "e.safetensors", "--dim", 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--v2",), "--v2 is given, but the models are Stable Diffusion 1.x"),
        (("--sdxl",), "--sdxl is given, but the models are Stable Diffusion 1.x"),
        (("--v2", "--sdxl"), "--v2 and --sdxl are mutually exclusive"),
        (("--dim", 0), "--dim must be at least 1, not 0"),
        (("--conv_dim", 0), "--conv_dim must be at least 1, not 0"),
        (("--clamp_quantile", 0.5), "--clamp_quantile must be above 0.5 and at most 1"),
        (("--min_diff", -1), "--min_diff must be 0 or more"),
        (("--device", "quantum"), '--device: "quantum" is not a device'),
    ],
)
def test_wrong_options_are_one_sentence(few_blocks_sd1, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        extract(few_blocks_sd1, few_blocks_sd1, tmp_path / "e.safetensors", *options)


def test_models_of_two_families_are_refused(few_blocks_sd1, few_blocks_sdxl, tmp_path):
    with pytest.raises(UserError, match=r"--model_org is Stable Diffusion 1\.x, --model_tuned Stable Diffusion XL"):
        extract(few_blocks_sd1, few_blocks_sdxl, tmp_path / "e.safetensors")
