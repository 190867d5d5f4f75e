"""flux_merge_lora.py, flux_extract_lora.py and convert_diffusers_to_flux.py on tiny FLUX.1 and Chroma models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.models.flux.checkpoint import open_transformer
from library.models.flux.pipeline import PIPELINES, FluxFiles, FluxPipeline, FluxRequest
from library.models.loading import LoadSpec
from networks import lora_flux
from networks.convert_flux_lora import main as convert
from networks.flux_extract_lora import main as extract
from networks.flux_merge_lora import main as merge
from networks.svd_merge_lora import main as svd_merge
from tests.forked import growth, in_a_child, linux_only
from tests.networks.lora_tool_files import assert_same, deltas, metadata, ranks, run
from tests.running import run_in_process
from tools.convert_diffusers_to_flux import main as to_original
from tools.make_tiny_models import make_tiny_chroma, make_tiny_flux

RATIOS = (0.7, -0.4)
IN_LAYERS = "in_dims=[2,2,2,2,2]"


def make_lora(files, path: Path, seed: int, rank: int = 3, alpha: float = 2.0, **arguments: str) -> Path:
    """A LoRA with random numbers for the transformer, and for the text encoders of FLUX.1."""
    pipeline = opened(files)
    encoders = [pipeline.meta_module(part) if part in pipeline.encoders else None for part in ("clip_l", "t5xxl")]
    network = lora_flux.create_network(
        1.0, rank, alpha, None, encoders, pipeline.meta_module("transformer"), **arguments
    )
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.08, generator=generator)
    version = "chroma" if pipeline.variant == "chroma" else "flux1"
    network.save_weights(path, None, {"ss_base_model_version": version, "modelspec.title": f"LoRA {seed}"})
    return path


def opened(files, **changed: Path) -> FluxPipeline:
    paths = {**vars(files), **changed}
    kind = "flux" if files.clip_l else "chroma"
    return PIPELINES[kind](FluxFiles(**paths), torch.float32, "cpu", t5xxl_max_token_length=16)


def latents(pipeline: FluxPipeline) -> torch.Tensor:
    return pipeline.generate_latents(FluxRequest("a red cat", width=64, height=48, seed=3, sample_steps=2))


def applied(files, loras: list[Path], ratios: tuple[float, ...]) -> torch.Tensor:
    """Latents of the model with networks at work beside it."""
    pipeline = opened(files)
    transformer = pipeline.load_transformer()
    modules = dict(zip(pipeline.encoders, pipeline.load_text_encoders()))
    encoders = [modules.get(part) for part in ("clip_l", "t5xxl")]
    for path, ratio in zip(loras, ratios):
        network, _ = lora_flux.create_network_from_weights(ratio, path, None, encoders, transformer, for_inference=True)
        network.apply_to(encoders, transformer)
    return latents(pipeline)


@pytest.fixture(scope="module")
def flux_loras(tiny_flux, tmp_path_factory) -> list[Path]:
    """Two files with text encoders and conditioning layers, of different ranks, alphas and joined layers."""
    place = tmp_path_factory.mktemp("loras")
    return [
        make_lora(tiny_flux, place / "a.safetensors", 1, train_t5xxl="True", in_dims="[2,2,2,2,2]"),
        make_lora(tiny_flux, place / "b.safetensors", 2, 2, 4.0, train_t5xxl="True", split_qkv="True"),
    ]


def merged_models(files, loras: list[Path], place: Path, *options: object) -> dict[str, Path]:
    """The three models of FLUX.1 with the files merged into them, through the command line."""
    made = {name: place / f"{name}.safetensors" for name in ("transformer", "clip_l", "t5xxl")}
    run(
        merge,
        *("--models", *loras, "--ratios", *RATIOS, "--flux_model", files.transformer, "--save_to", made["transformer"]),
        *("--clip_l", files.clip_l, "--clip_l_save_to", made["clip_l"]),
        *("--t5xxl", files.t5xxl, "--t5xxl_save_to", made["t5xxl"], *options),
    )
    return made


def test_merged_models_do_what_the_files_do(tiny_flux, flux_loras, tmp_path):
    made = merged_models(tiny_flux, flux_loras, tmp_path)
    folder = tiny_flux.t5xxl.parent  # the tokenizers are found beside the original T5
    with_networks = applied(tiny_flux, flux_loras, RATIOS)
    pipeline = FluxPipeline(
        FluxFiles(autoencoder=tiny_flux.autoencoder, tokenizer_cache_dir=None, **made), torch.float32, "cpu",
        t5xxl_max_token_length=16,
    )  # fmt: skip
    pipeline.tokenizers = {encoder: opened(tiny_flux).tokenizer(encoder) for encoder in ("clip_l", "t5xxl")}
    found = latents(pipeline)
    torch.testing.assert_close(found, with_networks, rtol=1e-5, atol=1e-5)
    assert (found - latents(opened(tiny_flux))).abs().max() > 0.05
    for name, path in made.items():
        original = load_file(getattr(tiny_flux, name))
        assert {key: tensor.shape for key, tensor in load_file(path).items()} == {
            key: tensor.shape for key, tensor in original.items()
        }, folder
    said = metadata(made["transformer"])
    assert said["modelspec.architecture"] == "flux-1-dev" and "LoRA 1" in said["modelspec.merged_from"]


@pytest.fixture(scope="module")
def of_both(tiny_flux, flux_loras, tmp_path_factory) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What the model draws with both files beside it, and the weights with both merged into it."""
    merged = tmp_path_factory.mktemp("both") / "two.safetensors"
    model = ["--flux_model", tiny_flux.transformer, "--save_to", merged]
    run(merge, "--models", *flux_loras, "--ratios", *RATIOS, *model)
    return applied(tiny_flux, flux_loras, RATIOS), load_file(merged)


@pytest.mark.parametrize(
    "form",
    [[], pytest.param(["--concat"], marks=pytest.mark.thorough), ["--concat", "--shuffle"]],
    ids=" ".join,
)
def test_one_file_of_two_does_what_both_do(tiny_flux, flux_loras, of_both, tmp_path, form):
    """Each ratio counts once, alphas are respected: in the network, and merged into a model."""
    both = tmp_path / "both.safetensors"
    run(merge, "--models", *flux_loras, "--ratios", *RATIOS, "--save_to", both, *form)
    together, merged = of_both
    torch.testing.assert_close(applied(tiny_flux, [both], (1.0,)), together, rtol=1e-5, atol=1e-5)
    said = metadata(both)
    assert said["ss_network_module"] == "networks.lora_flux" and said["ss_base_model_version"] == "flux1"
    if form:
        assert ranks(both)["lora_unet_double_blocks_0_img_attn_proj"] == 5
        assert ranks(both)["lora_unet_single_blocks_0_linear1"] == 3 + 4 * 2

    one = tmp_path / "one.safetensors"
    run(merge, "--models", both, "--ratios", 1, "--flux_model", tiny_flux.transformer, "--save_to", one)
    found = load_file(one)
    for key, tensor in merged.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-5)


def test_svd_merge_gives_the_best_sum_of_a_rank_under_any_names(flux_loras, tmp_path):
    """Eckart-Young, of the sum of both files; with names that no metadata explain."""
    converted, out = tmp_path / "ai.safetensors", tmp_path / "out.safetensors"
    run(convert, "--src_path", flux_loras[0], "--dst_path", converted, "--dst", "ai-toolkit", "--no_metadata")
    given = ("--models", converted, flux_loras[1], "--ratios", *RATIOS, "--clamp_quantile", 1)
    run(svd_merge, *given, "--new_rank", 2, "--save_to", out)
    wanted = {name: RATIOS[0] * delta for name, delta in deltas(flux_loras[0]).items()}
    for name, delta in deltas(flux_loras[1]).items():
        wanted[name] = wanted.get(name, 0) + RATIOS[1] * delta
    found = deltas(out)
    assert found.keys() == wanted.keys() and set(ranks(out).values()) == {2}
    for name, delta in wanted.items():
        error = (found[name] - delta).norm()
        assert abs(error - torch.linalg.svdvals(delta)[2:].norm()) < 1e-5 * max(1.0, float(delta.norm())), name
    assert metadata(out)["ss_network_module"] == "networks.lora_flux"


@pytest.mark.parametrize("kind", ["flux", "chroma"])
def test_extracting_at_full_rank_gives_the_merged_weights_back(kind, tiny_flux, tiny_chroma, tmp_path):
    """Extract(base, base + LoRA), merged into base, is base + LoRA to 1e-5; only the layers of blocks are in it."""
    files = tiny_flux if kind == "flux" else tiny_chroma
    lora = make_lora(files, tmp_path / "lora.safetensors", 1, 4, 4.0, train_blocks="double")
    tuned, out, again = (tmp_path / f"{name}.safetensors" for name in ("tuned", "extracted", "again"))
    model = ["--flux_model", files.transformer]
    run(merge, "--models", lora, "--ratios", 1, *model, "--save_to", tuned)
    done = run_in_process(
        "networks/flux_extract_lora.py",
        *("--model_org", files.transformer, "--model_tuned", tuned, "--save_to", out, "--dim", 1000),
        *("--clamp_quantile", 1),
    )
    assert done.returncode == 0, done.stderr
    run(merge, "--models", out, "--ratios", 1, *model, "--save_to", again)
    original, wanted = load_file(files.transformer), load_file(tuned)
    for key, tensor in load_file(again).items():
        torch.testing.assert_close(tensor, wanted[key], rtol=1e-5, atol=1e-5)
    changed = {key for key, tensor in wanted.items() if not torch.equal(tensor, original[key])}
    assert {f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}" for key in changed} == set(ranks(out))
    assert all(".weight" in key and key.startswith("double_blocks") for key in changed)
    said = metadata(out)
    assert said["ss_base_model_version"] == ("flux1" if kind == "flux" else "chroma")
    assert said["modelspec.architecture"] == ("flux-1-dev/lora" if kind == "flux" else "chroma/lora")
    assert said["ss_network_module"] == "networks.lora_flux"


def test_a_low_rank_is_extracted_exactly_and_a_lower_one_best(tiny_flux, tmp_path):
    """Eckart-Young: the error of rank 2 is the norm of the singular values that are left out."""
    lora = make_lora(tiny_flux, tmp_path / "lora.safetensors", 1, 4, 4.0, network_reg_dims="txt=0")
    tuned = tmp_path / "tuned.safetensors"
    run(merge, "--models", lora, "--ratios", 1, "--flux_model", tiny_flux.transformer, "--save_to", tuned)
    for rank in (4, 2):
        out = tmp_path / f"{rank}.safetensors"
        models = ["--model_org", tiny_flux.transformer, "--model_tuned", tuned]
        run(extract, *models, "--dim", rank, "--clamp_quantile", 1, "--save_to", out, "--mem_eff_safe_open")
        found, wanted = deltas(out), deltas(lora)
        for name in found:
            values = torch.linalg.svdvals(wanted[name])
            error = (found[name] - wanted[name]).norm()
            assert abs(error - values[rank:].norm()) < 1e-5 * max(1.0, float(values.norm())), name


def test_layouts_may_be_mixed(tiny_flux, tmp_path):
    """ComfyUI's prefix on one side, Diffusers' shards on the other."""
    lora = make_lora(tiny_flux, tmp_path / "lora.safetensors", 1)
    only_transformer = {key: tensor for key, tensor in load_file(lora).items() if key.startswith("lora_unet")}
    save_file(only_transformer, lora)
    comfyui = make_tiny_flux(tmp_path / "comfyui", layout="comfyui").transformer
    folder = make_tiny_flux(tmp_path / "diffusers", layout="diffusers").transformer
    tuned, new_folder, from_shards = tmp_path / "tuned.safetensors", tmp_path / "new", tmp_path / "one.safetensors"
    models = ["--models", lora, "--ratios", 1]
    run(merge, *models, "--flux_model", comfyui, "--save_to", tuned)
    run(merge, *models, "--flux_model", folder, "--save_to", new_folder)
    run(merge, *models, "--flux_model", folder, "--save_to", from_shards)
    assert all(key.startswith("model.diffusion_model.") for key in load_file(tuned))
    assert load_file(from_shards).keys() == load_file(tiny_flux.transformer).keys()
    states = [
        open_transformer(path).load(LoadSpec.of(torch.float32)).state_dict()
        for path in (tuned, new_folder, from_shards)
    ]
    for state in states[1:]:
        for key, tensor in states[0].items():
            torch.testing.assert_close(state[key], tensor, rtol=0, atol=1e-7)
    out = tmp_path / "extracted.safetensors"
    run(extract, "--model_org", folder, "--model_tuned", tuned, "--dim", 3, "--clamp_quantile", 1, "--save_to", out)
    assert_same(deltas(out), deltas(lora), 1e-4)


def test_other_programs_names_merge_the_same(tiny_flux, flux_loras, tmp_path):
    """A file in AI-toolkit's names merges to the same models, with --diffusers or without."""
    converted = [tmp_path / path.name for path in flux_loras]
    for source, target in zip(flux_loras, converted):
        run(convert, "--src_path", source, "--dst_path", target, "--dst", "ai-toolkit")
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    first = merged_models(tiny_flux, flux_loras, tmp_path / "first")
    second = merged_models(tiny_flux, converted, tmp_path / "second", "--diffusers", "--mem_eff_load_save")
    for name, path in first.items():
        for key, tensor in load_file(path).items():
            torch.testing.assert_close(load_file(second[name])[key], tensor, rtol=1e-5, atol=1e-6)
    both = tmp_path / "both.safetensors"
    run(merge, "--models", flux_loras[0], converted[1], "--ratios", *RATIOS, "--concat", "--save_to", both)
    wanted = {name: RATIOS[0] * delta for name, delta in deltas(flux_loras[0]).items()}
    for name, delta in deltas(flux_loras[1]).items():
        wanted[name] = wanted.get(name, 0) + RATIOS[1] * delta
    assert_same(deltas(both), wanted, 1e-5)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("bf16", torch.bfloat16), ("fp8", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)],
)
def test_models_are_saved_in_the_format_asked_for(tiny_flux, flux_loras, tmp_path, name, dtype):
    out = tmp_path / "out.safetensors"
    models = ["--models", flux_loras[0], "--ratios", 1, "--flux_model", tiny_flux.transformer, "--save_to"]
    run(merge, *models, out, "--save_precision", name)
    run(merge, *models, tmp_path / "float.safetensors")
    exact = load_file(tmp_path / "float.safetensors")
    for key, tensor in load_file(out).items():
        assert tensor.dtype == dtype and torch.equal(tensor.float(), exact[key].to(dtype).float()), key


def in_fp8(path: Path, out: Path, scaled: bool) -> dict[str, torch.Tensor]:
    """A copy of a model with the weights of its blocks in 8 bits; returns the numbers that they stand for."""
    stored, meant = {}, {}
    for key, tensor in load_file(path).items():
        meant[key], scale = tensor, torch.tensor(1.0)
        if "_blocks" in key and key.endswith(".weight"):
            if scaled:
                scale = tensor.abs().max() / 448
                stored[key.replace(".weight", ".scale_weight")] = scale
            tensor = (tensor / scale).to(torch.float8_e4m3fn)
            meant[key] = tensor.float() * scale
        stored[key] = tensor
    save_file({**stored, **({"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)} if scaled else {})}, out)
    return meant


def transformer_lora(files, path: Path) -> Path:
    """A LoRA for the transformer alone."""
    tensors = load_file(make_lora(files, path, 1))
    save_file({key: tensor for key, tensor in tensors.items() if key.startswith("lora_unet")}, path)
    return path


def added(lora: Path, key: str) -> torch.Tensor:
    """What a LoRA adds to a tensor of the transformer."""
    name = f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}"
    return deltas(lora).get(name, torch.zeros(())).float() if key.endswith(".weight") else torch.zeros(())


def test_a_model_in_plain_8_bits_is_merged_into(tiny_flux, tmp_path):
    model, out = tmp_path / "model.safetensors", tmp_path / "out.safetensors"
    lora = transformer_lora(tiny_flux, tmp_path / "lora.safetensors")
    meant = in_fp8(tiny_flux.transformer, model, scaled=False)
    run(merge, "--models", lora, "--ratios", 1, "--flux_model", model, "--save_to", out)
    before, after = load_file(model), load_file(out)
    for key, tensor in after.items():
        assert tensor.dtype == before[key].dtype
        wanted = meant[key] + added(lora, key)
        step = wanted.abs() * 2.0**-3 + 2.0**-8 if tensor.itemsize == 1 else 1e-6
        assert bool(((tensor.float() - wanted).abs() <= step / 2 + 1e-6).all()), key
    assert sum(not torch.equal(after[key].float(), before[key].float()) for key in after) > 10


def test_scaled_8_bit_weights_are_compared_with_their_scales(tiny_flux, tmp_path):
    """As exactly as float32 holds them; they are not added to, and what to use for that is said."""
    model, tuned, out = (tmp_path / f"{name}.safetensors" for name in ("model", "tuned", "out"))
    lora = transformer_lora(tiny_flux, tmp_path / "lora.safetensors")
    meant = in_fp8(tiny_flux.transformer, model, scaled=True)
    save_file({key: tensor + added(lora, key) for key, tensor in meant.items()}, tuned)
    run(extract, "--model_org", model, "--model_tuned", tuned, "--dim", 3, "--clamp_quantile", 1, "--save_to", out)
    assert_same(deltas(out), deltas(lora), 1e-5)
    files = ["--models", lora, "--ratios", 1, "--flux_model", model, "--save_to", tmp_path / "merged.safetensors"]
    with pytest.raises(UserError, match="holds scaled fp8 weights, which cannot be added to"):
        run(merge, *files)
    with pytest.raises(UserError, match="which --save_precision does not convert"):
        run(merge, *files, "--save_precision", "bf16")
    original = tmp_path / "original.safetensors"
    run(to_original, "--diffusers_path", model, "--save_to", original, "--save_precision", "float")
    found = load_file(original)
    assert found.keys() == meant.keys() and all(torch.equal(found[key], meant[key]) for key in meant)


def test_numbers_too_large_for_8_bits_are_named(tiny_flux, flux_loras, tmp_path):
    tensors = load_file(tiny_flux.transformer)
    tensors["txt_in.bias"][0] = 1000.0
    save_file(tensors, tmp_path / "model.safetensors")
    out = ("--save_to", tmp_path / "out.safetensors", "--save_precision", "fp8")
    with pytest.raises(UserError, match=r'"txt_in.bias" gets numbers too large for torch.float8_e4m3fn'):
        files = ["--models", flux_loras[1], "--ratios", 1, "--flux_model", tmp_path / "model.safetensors"]
        run(merge, *files, *out)
    with pytest.raises(UserError, match=r'model.safetensors: "txt_in.bias" gets numbers too large'):
        run(to_original, "--diffusers_path", tmp_path / "model.safetensors", *out)
    assert not (tmp_path / "out.safetensors").exists()


def test_all_parts_of_a_diffusers_folder_become_one_new_folder(tiny_flux, flux_loras, tmp_path):
    folder, new = make_tiny_flux(tmp_path / "diffusers", layout="diffusers").transformer, tmp_path / "new"
    run(
        merge,
        *("--models", *flux_loras, "--ratios", *RATIOS, "--flux_model", folder, "--save_to", new),
        *("--clip_l", folder, "--clip_l_save_to", new, "--t5xxl", folder, "--t5xxl_save_to", new),
    )
    names = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    assert names == {path.relative_to(new) for path in new.rglob("*") if path.is_file()}
    pipeline = opened(tiny_flux, **dict.fromkeys(vars(tiny_flux), new))
    torch.testing.assert_close(latents(pipeline), applied(tiny_flux, flux_loras, RATIOS), rtol=1e-5, atol=1e-5)


def test_a_text_encoder_of_shards_keeps_its_tensors(tiny_flux, flux_loras, tmp_path):
    """``shared.weight`` too, which other programs look for."""
    tensors = load_file(tiny_flux.t5xxl)
    keys = sorted(tensors)
    for number in range(3):
        name = f"model-{number + 1:05d}-of-00003.safetensors"
        save_file({key: tensors[key] for key in keys[number::3]}, tmp_path / name)
    out, wanted = tmp_path / "shards.safetensors", tmp_path / "file.safetensors"
    files = ["--models", *flux_loras, "--ratios", *RATIOS]
    run(merge, *files, "--t5xxl", tmp_path / "model-00001-of-00003.safetensors", "--t5xxl_save_to", out)
    run(merge, *files, "--t5xxl", tiny_flux.t5xxl, "--t5xxl_save_to", wanted)
    found, same = load_file(out), load_file(wanted)
    assert "shared.weight" in found and found.keys() == same.keys() == tensors.keys()
    assert all(torch.equal(found[key], same[key]) for key in same)
    assert not torch.equal(same[keys[1]], tensors[keys[1]]) or not all(
        torch.equal(same[key], tensors[key]) for key in keys
    )


def test_a_file_from_a_folder_says_what_shapes_cannot(tmp_path):
    """Also where the folder has one file only; the axes of the positions are in its config.json alone."""
    folder = make_tiny_flux(tmp_path / "diffusers", "schnell", "diffusers").transformer / "transformer"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["axes_dims_rope"] = [8, 12, 12]
    one = tmp_path / "one"
    one.mkdir()
    (one / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shards = [load_file(path) for path in folder.glob("*.safetensors")]
    save_file({**shards[0], **shards[1]}, one / "diffusion_pytorch_model.safetensors")
    down, up = "lora_unet_img_in.lora_down.weight", "lora_unet_img_in.lora_up.weight"
    save_file({down: torch.ones(1, 64), up: torch.ones(64, 1)}, tmp_path / "lora.safetensors")
    merged, converted = tmp_path / "merged.safetensors", tmp_path / "converted.safetensors"
    run(merge, "--models", tmp_path / "lora.safetensors", "--ratios", 1, "--flux_model", one, "--save_to", merged)
    run(to_original, "--diffusers_path", one, "--save_to", converted)
    for path in (merged, converted):
        assert open_transformer(path).config.axes_dims == (8, 12, 12)
        assert "double_blocks.0.img_attn.qkv.weight" in load_file(path)
    assert metadata(merged)["modelspec.architecture"] == "flux-1-schnell"


@pytest.mark.slow
@linux_only
def test_memory_holds_a_layer_and_not_the_model(tmp_path):
    """A transformer of 16 single blocks in 74 MB, none larger than 3.3 MB."""
    import scipy.linalg  # noqa: F401 - imported when it is needed; not what is measured

    from library.models.flux.transformer import FluxConfig, FluxTransformer
    from tools.make_tiny_models import fill_randomly

    def write(name: str, blocks: int) -> tuple[Path, Path]:
        sizes = {"hidden_size": 256, "num_heads": 8, "depth": 1, "depth_single": blocks, "context_dim": 64}
        model = FluxTransformer(FluxConfig(**sizes, mlp_hidden=1024, axes_dims=(4, 14, 14), vector_dim=64))
        fill_randomly(model, 0, name)
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
        tensors = {}
        for number in range(blocks):
            key = f"lora_unet_single_blocks_{number}_linear1"
            tensors |= {f"{key}.lora_down.weight": torch.randn(2, 256), f"{key}.lora_up.weight": torch.randn(1792, 2)}
        save_file(tensors, tmp_path / f"{name}_lora.safetensors")
        return tmp_path / f"{name}.safetensors", tmp_path / f"{name}_lora.safetensors"

    small, large = write("small", 1), write("large", 16)
    tuned, out = tmp_path / "tuned.safetensors", tmp_path / "out.safetensors"

    def merged(model: Path, lora: Path) -> None:
        run(merge, "--flux_model", model, "--models", lora, "--ratios", 1, "--save_to", tuned)

    def extracted(model: Path) -> None:
        run(extract, "--model_org", model, "--model_tuned", tuned, "--save_to", out, "--dim", 2)

    def measured() -> list[int]:
        merged(*small)
        extracted(small[0])
        whole = growth(lambda: {key: tensor.clone() for key, tensor in load_file(large[0]).items()})
        return [growth(lambda: merged(*large)), growth(lambda: extracted(large[0])), whole]

    merging, extracting, loading = in_a_child(measured)
    assert loading > 60e6  # what the measure says of the whole model at once
    # Extracting reads two models, 150 MB; how much of what it has freed the allocator keeps varies by 10 MB.
    assert merging < 30e6 and extracting < 45e6


def test_what_cannot_be_merged_is_refused(tiny_flux, tiny_chroma, flux_loras, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    files = ["--models", *flux_loras, "--ratios", *RATIOS]
    with pytest.raises(UserError, match="modules have no layer in this model: .*mod_lin"):
        run(merge, *files, "--flux_model", tiny_chroma.transformer, "--save_to", out)
    with pytest.raises(UserError, match="--clip_l needs --clip_l_save_to too"):
        run(merge, *files, "--clip_l", tiny_flux.clip_l)
    with pytest.raises(UserError, match="--flux_model needs --save_to too"):
        run(merge, *files, "--flux_model", tiny_flux.transformer)
    with pytest.raises(UserError, match="is for models; a LoRA file needs float"):
        run(merge, *files, "--save_to", out, "--save_precision", "fp8")
    with pytest.raises(UserError, match='--save_precision: "fp9" is not a dtype; known are float'):
        run(merge, *files, "--save_to", out, "--save_precision", "fp9")
    with pytest.raises(UserError, match="--save_to and --clip_l_save_to both name"):
        models = ["--flux_model", tiny_flux.transformer, "--clip_l", tiny_flux.clip_l, "--clip_l_save_to", out]
        run(merge, *files, *models, "--save_to", out)
    with pytest.raises(UserError, match="--clip_l_save_to: .*clip_l.safetensors is one of the inputs"):
        run(merge, *files, "--clip_l", tiny_flux.clip_l, "--clip_l_save_to", tiny_flux.clip_l)
    with pytest.raises(UserError, match="--ratios needs one number for each file"):
        run(merge, "--models", *flux_loras, "--ratios", 1, "--save_to", out)
    with pytest.raises(UserError, match="--model_org is FLUX.1, --model_tuned Chroma"):
        models = ["--model_org", tiny_flux.transformer, "--model_tuned", tiny_chroma.transformer]
        run(extract, *models, "--save_to", out)
    with pytest.raises(UserError, match="do not differ"):
        models = ["--model_org", tiny_flux.transformer, "--model_tuned", tiny_flux.transformer]
        run(extract, *models, "--save_to", out)
    assert not out.exists()
    run(merge, *files, "--flux_model", tiny_flux.transformer, "--save_to", out)
    assert "12 modules are left out, because no --clip_l is given" in capsys.readouterr().err


@pytest.mark.parametrize("make", [make_tiny_flux, make_tiny_chroma])
def test_diffusers_folders_become_one_original_file(make, tmp_path):
    folder = make(tmp_path / "diffusers", layout="diffusers").transformer
    wanted = load_file(make(tmp_path / "original").transformer)
    for number, path in enumerate((folder, next((folder / "transformer").glob("*-00001-of-*.safetensors")))):
        out = tmp_path / f"{number}.safetensors"
        run(to_original, "--diffusers_path", path, "--save_to", out, "--mem_eff_load_save")
        found = load_file(out)
        assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
    run(to_original, "--diffusers_path", folder, "--save_to", tmp_path / "b.safetensors", "--save_precision", "bf16")
    assert {tensor.dtype for tensor in load_file(tmp_path / "b.safetensors").values()} == {torch.bfloat16}
