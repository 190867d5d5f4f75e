"""The tools for LoRA files on those of Lumina Image 2.0: merged, extracted, resized, in one rank, checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.errors import UserError
from library.models.gemma2 import open_gemma2
from library.models.loading import LoadSpec
from library.models.lumina.checkpoint import open_transformer
from networks import check_lora_weights, lora_lumina, resize_lora, svd_merge_lora
from networks.convert_lumina_lora import main as convert
from networks.lumina_extract_lora import main as extract
from networks.lumina_merge_lora import main as merge
from tests.networks.lora_tool_files import assert_same, deltas, metadata, ranks, run, write_lora
from tests.running import run_in_process
from tools.make_tiny_models import LUMINA, make_tiny_lumina

RATIOS = (0.7, -0.4)
Models = dict[str, Path]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Models:
    """A transformer and a Gemma 2 as single files, and both as one file with ComfyUI's prefixes."""
    place = tmp_path_factory.mktemp("lumina")
    files = make_tiny_lumina(place)
    together = make_tiny_lumina(place / "comfyui", layout="comfyui").transformer
    return {"transformer": files.transformer, "gemma2": files.gemma2, "together": together}


def opened(models: Models) -> tuple[nn.Module, nn.Module]:
    """Transformer and Gemma 2, loaded."""
    spec = LoadSpec.of(torch.float32)
    return open_transformer(models["transformer"]).load(spec), open_gemma2(models["gemma2"]).load(spec)


def make_lora(models: Models, path: Path, seed: int, rank: int = 3, alpha: float = 2.0, **arguments: str) -> Path:
    """A LoRA with random numbers for both models."""
    network = lora_lumina.create_network(
        1.0, rank, alpha, None, [open_gemma2(models["gemma2"]).meta_module()],
        open_transformer(models["transformer"]).meta_module(), **arguments,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.08, generator=generator)
    network.save_weights(path, None, {"ss_base_model_version": "lumina2", "modelspec.title": f"LoRA {seed}"})
    return path


@pytest.fixture(scope="module")
def loras(models, tmp_path_factory) -> list[Path]:
    """Two files of different ranks, alphas and modules."""
    place = tmp_path_factory.mktemp("loras")
    return [
        make_lora(models, place / "a.safetensors", 1, embedder_dims="2,2,2"),
        make_lora(models, place / "b.safetensors", 2, 2, 4.0, split_qkv="True", refiner_dim="1"),
    ]


def outputs(transformer: nn.Module, gemma: nn.Module) -> Tensor:
    """The velocity for noise of a fixed size and two prompts of different length."""
    random = torch.Generator().manual_seed(2)
    latents = torch.randn(2, LUMINA.latent_channels, 4, 6, generator=random)
    tokens, mask = torch.randint(5, 99, (2, 6), generator=random), torch.tensor([[1] * 6, [1] * 3 + [0] * 3])
    with torch.no_grad():
        return transformer(latents, torch.tensor([0.2, 0.7]), gemma(tokens, mask), mask)


def applied(models: Models, files: list[Path], ratios: tuple[float, ...]) -> Tensor:
    """The velocity with networks at work beside the models."""
    transformer, gemma = opened(models)
    for path, ratio in zip(files, ratios):
        network, _ = lora_lumina.create_network_from_weights(ratio, path, None, [gemma], transformer)
        network.eval().apply_to([gemma], transformer)
    return outputs(transformer, gemma)


def close(one: Tensor, two: Tensor) -> None:
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_merged_models_do_what_the_files_do(models, loras, tmp_path):
    made = {name: tmp_path / f"{name}.safetensors" for name in ("transformer", "gemma2")}
    run(
        merge,
        *("--models", *loras, "--ratios", *RATIOS),
        *("--lumina_model", models["transformer"], "--save_to", made["transformer"]),
        *("--gemma2", models["gemma2"], "--gemma2_save_to", made["gemma2"]),
    )
    wanted = applied(models, loras, RATIOS)
    close(outputs(*opened(made)), wanted)
    assert (wanted - applied(models, [], ())).abs().max() > 0.02
    for name, path in made.items():
        before, after = load_file(models[name]), load_file(path)
        assert {k: (t.shape, t.dtype) for k, t in after.items()} == {k: (t.shape, t.dtype) for k, t in before.items()}
    assert torch.equal(load_file(made["gemma2"])["spiece_model"], load_file(models["gemma2"])["spiece_model"])
    said = metadata(made["transformer"])
    assert said["modelspec.architecture"] == "lumina-2" and "LoRA 1" in said["modelspec.merged_from"]


def test_one_file_with_both_models_stays_one_file(models, loras, tmp_path):
    out, both = tmp_path / "out.safetensors", models["together"]
    given = ["--models", *loras, "--ratios", *RATIOS, "--lumina_model", both, "--gemma2", both]
    run(merge, *given, "--save_to", out, "--gemma2_save_to", out)
    assert load_file(out).keys() == load_file(both).keys()
    close(outputs(*opened({"transformer": out, "gemma2": out})), applied(models, loras, RATIOS))


@pytest.mark.parametrize(
    "form",
    [[], pytest.param(["--concat"], marks=pytest.mark.thorough), ["--concat", "--shuffle"]],
    ids=" ".join,
)
def test_one_file_of_two_does_what_both_do(models, loras, tmp_path, form):
    both = tmp_path / "both.safetensors"
    run(merge, "--models", *loras, "--ratios", *RATIOS, "--save_to", both, *form)
    close(applied(models, [both], (1.0,)), applied(models, loras, RATIOS))
    said = metadata(both)
    assert said["ss_network_module"] == "networks.lora_lumina" and said["ss_base_model_version"] == "lumina2"
    assert said["modelspec.architecture"] == "lumina-2/lora"
    if form:
        assert ranks(both)["lora_unet_layers_0_attention_qkv"] == 3 + 3 * 2


def test_other_programs_names_merge_the_same(models, loras, tmp_path):
    comfyui, both, wanted = (tmp_path / f"{name}.safetensors" for name in ("comfyui", "both", "wanted"))
    run(convert, "--src_path", loras[0], "--dst_path", comfyui, "--dst", "comfyui")
    for files, out in (([comfyui, loras[1]], both), (loras, wanted)):
        run(merge, "--models", *files, "--ratios", *RATIOS, "--save_to", out)
    assert_same(deltas(both), deltas(wanted), 1e-5)


def test_a_diffusers_folder_becomes_a_new_folder_or_one_file(models, loras, tmp_path):
    folder = make_tiny_lumina(tmp_path / "diffusers", layout="diffusers").transformer
    given = ["--models", loras[0], "--ratios", 1, "--lumina_model", folder, "--save_to"]
    run(merge, *given, tmp_path / "new")
    run(merge, *given, tmp_path / "one.safetensors")
    run(merge, *given[:5], models["transformer"], "--save_to", tmp_path / "wanted.safetensors")
    names = set(load_file(tmp_path / "one.safetensors"))
    assert names | {"norm_final.weight"} == set(load_file(models["transformer"]))
    spec = LoadSpec.of(torch.float32)
    wanted = open_transformer(tmp_path / "wanted.safetensors").load(spec).state_dict()
    for path in (tmp_path / "new", tmp_path / "one.safetensors"):
        for key, tensor in open_transformer(path).load(spec).state_dict().items():
            torch.testing.assert_close(tensor, wanted[key], rtol=0, atol=1e-6)


def test_extracting_gives_the_merged_weights_back(models, tmp_path):
    """The LoRA itself in its own rank; layers that are the same in both models are not in the file."""
    lora = make_lora(models, tmp_path / "lora.safetensors", 1, 4, 4.0, train_blocks="transformer", mod_dim="0")
    only = {key: tensor for key, tensor in load_file(lora).items() if key.startswith("lora_unet")}
    save_file(only, lora)
    tuned, out = tmp_path / "tuned.safetensors", tmp_path / "extracted.safetensors"
    run(merge, "--models", lora, "--ratios", 1, "--lumina_model", models["transformer"], "--save_to", tuned)
    given = ("--model_org", models["together"], "--model_tuned", tuned, "--dim", 4, "--clamp_quantile", 1)
    done = run_in_process("networks/lumina_extract_lora.py", *given, "--save_to", out)
    assert done.returncode == 0, done.stderr
    assert_same(deltas(out), deltas(lora), 1e-4)
    said = metadata(out)
    assert (said["ss_base_model_version"], said["ss_network_module"]) == ("lumina2", "networks.lora_lumina")
    assert said["modelspec.architecture"] == "lumina-2/lora"
    with pytest.raises(UserError, match="do not differ"):
        run(extract, "--model_org", tuned, "--model_tuned", tuned, "--save_to", tmp_path / "no.safetensors")


@pytest.mark.parametrize("name", ["sd-scripts", "diffusers"])
def test_a_smaller_rank_is_the_best_of_its_size(models, loras, tmp_path, name):
    """Eckart-Young, under the names that the file has."""
    source, out, form = loras[0], tmp_path / "small.safetensors", "kohya"
    if name == "diffusers":
        source, form = tmp_path / "diffusers.safetensors", "peft"
        run(convert, "--src_path", loras[0], "--dst_path", source, "--dst", "diffusers")
    run(resize_lora.main, "--model", source, "--save_to", out, "--new_rank", 1)
    found, wanted = deltas(out, form), deltas(source, form)
    assert set(ranks(out, form).values()) == {1} and found.keys() == wanted.keys()
    for module, difference in wanted.items():
        error = (found[module] - difference).norm()
        assert abs(error - torch.linalg.svdvals(difference)[1:].norm()) < 1e-4 * difference.norm(), module


@pytest.mark.parametrize("name", ["sd-scripts", "comfyui"])
def test_svd_merge_of_full_rank_is_the_sum(loras, tmp_path, name):
    files, out = list(loras), tmp_path / "out.safetensors"
    if name == "comfyui":
        files[0] = tmp_path / "comfyui.safetensors"
        run(convert, "--src_path", loras[0], "--dst_path", files[0], "--dst", "comfyui", "--no_metadata")
    given = ("--models", *files, "--ratios", *RATIOS, "--save_to", out, "--clamp_quantile", 1)
    run(svd_merge_lora.main, *given, "--new_rank", 16)
    wanted = {key: RATIOS[0] * delta for key, delta in deltas(loras[0]).items()}
    for key, delta in deltas(loras[1]).items():
        wanted[key] = wanted.get(key, 0) + RATIOS[1] * delta
    assert_same(deltas(out), wanted, 1e-5)
    assert metadata(out)["ss_network_module"] == "networks.lora_lumina"
    run(svd_merge_lora.main, *given, "--new_rank", 2)
    assert set(ranks(out).values()) == {2}


def test_it_is_checked(loras, capsys):
    run(check_lora_weights.main, loras[0])
    assert f"number of LoRA modules: {2 * len(ranks(loras[0]))}" in capsys.readouterr().out


def test_what_cannot_be_merged_is_refused(models, loras, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    files = ["--models", *loras, "--ratios", *RATIOS]
    flux = write_lora(tmp_path / "flux.safetensors", {"lora_unet_double_blocks_0_img_attn_proj": (8, 8)}, metadata={})
    theirs = write_lora(
        tmp_path / "theirs.safetensors", {"transformer.transformer_blocks.0.attn.to_q": (8, 8)}, metadata={}
    )
    cases = [
        (["--models", theirs, "--ratios", 1, "--save_to", out], "no layer of Lumina Image 2.0: .*It is for FLUX.1"),
        ([*files, "--gemma2", models["gemma2"]], "--gemma2 needs --gemma2_save_to too"),
        ([*files, "--lumina_model", models["transformer"]], "--lumina_model needs --save_to too"),
        (["--models", flux, "--ratios", 1, "--save_to", out], "no layer of Lumina Image 2.0: .*It is for FLUX.1"),
        ([*files, "--lumina_model", models["gemma2"], "--save_to", out], "a Lumina Image 2.0 transformer is needed"),
        (
            [*files, "--lumina_model", models["transformer"], "--save_to", out, "--gemma2", models["gemma2"],
             "--gemma2_save_to", out],
            "--save_to and --gemma2_save_to both name",
        ),
    ]  # fmt: skip
    for arguments, message in cases:
        with pytest.raises(UserError, match=message):
            run(merge, *arguments)
    with pytest.raises(UserError, match="--lbws is for Stable Diffusion; .* is for Lumina Image 2.0"):
        run(svd_merge_lora.main, *files, "--save_to", out, "--lbws", json.dumps([1] * 12), json.dumps([1] * 12))
    with pytest.raises(UserError, match="belong to no layer of Lumina Image 2.0: .*It is for FLUX.1"):
        run(svd_merge_lora.main, "--models", loras[0], flux, "--ratios", 1, 1, "--save_to", out)
    with pytest.raises(UserError, match="--model_org needs a Lumina Image 2.0 transformer"):
        run(extract, "--model_tuned", models["transformer"], "--save_to", out)
    assert not out.exists()
    run(merge, *files, "--lumina_model", models["transformer"], "--save_to", out)
    assert "21 modules are left out, because no --gemma2 is given" in " ".join(capsys.readouterr().err.split())
