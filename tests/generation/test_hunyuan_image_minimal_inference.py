"""hunyuan_image_minimal_inference.py: what its options do to an image."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hunyuan_image_minimal_inference import HunyuanImageInference, HunyuanImageInferenceOptions
from library.errors import UserError
from library.models.hunyuan_image.pipeline import HunyuanImageFiles, HunyuanImagePipeline, HunyuanImageRequest
from library.options import declared_options, parse_options
from library.prompt_options import PromptOptions
from library.safetensors_io import read_header
from tests.generation.drawing import difference, latents, pixels, text_of, write_random_network
from tests.running import lycoris_package, run_in_process

QUOTING = 'a red cat "hi"'


@pytest.fixture(scope="module")
def pipeline(tiny_hunyuan_image) -> HunyuanImagePipeline:
    """The tiny model itself."""
    return HunyuanImagePipeline(HunyuanImageFiles(**vars(tiny_hunyuan_image)), torch.float32, "cpu")


@pytest.fixture(scope="module")
def model_files(tiny_hunyuan_image) -> list[object]:
    """The options that name the tiny model's files."""
    tiny = tiny_hunyuan_image
    return [
        "--dit",
        tiny.transformer,
        "--text_encoder",
        tiny.text_encoder,
        "--byt5",
        tiny.byt5,
        "--vae",
        tiny.autoencoder,
    ]


@pytest.fixture(scope="module")
def command(model_files) -> list[object]:
    """A small quick image of the tiny model, with both kinds of guidance; the last --image_size counts."""
    return [
        *model_files,
        *("--image_size", 64, 96, "--infer_steps", 4, "--apg_start_step_general", 1, "--apg_start_step_ocr", 2),
        *("--dtype", "fp32"),
    ]


@pytest.fixture(scope="module")
def inference(command, tmp_path_factory):
    """The script's run with more options, ready to draw."""
    folder = tmp_path_factory.mktemp("out")

    def make(*arguments: object) -> HunyuanImageInference:
        words = [str(word) for word in (*command, "--save_path", folder, *arguments)]
        others = {"--prompt", "--from_file", "--interactive", "--latent_path", "--save_merged_model"}
        prompt = [] if others & set(words) else ["--prompt", QUOTING]
        return HunyuanImageInference(parse_options(HunyuanImageInferenceOptions, "", words + prompt))

    return make


@pytest.fixture
def draw(inference, tmp_path):
    """Draw with more options; the new files in order."""

    def run(*arguments: object) -> list[Path]:
        before = set(tmp_path.iterdir())
        inference("--seed", 7, "--save_path", tmp_path, *arguments).run()
        return sorted(set(tmp_path.iterdir()) - before, key=lambda path: path.stat().st_mtime_ns)

    return run


@pytest.fixture(scope="module")
def plain(inference) -> Tensor:
    """The latents of seed 3 without more options."""
    return latents(inference("--seed", 3))


# ---- the image ------------------------------------------------------------------------------------------------------


def test_defaults_are_the_documented_ones(model_files, tmp_path):
    words = [str(word) for word in (*model_files, "--save_path", tmp_path, "--prompt", "a cat")]
    run = HunyuanImageInference(parse_options(HunyuanImageInferenceOptions, "", words))
    assert run.defaults == PromptOptions("a cat", "", 2048, 2048, None, 50, 3.5, flow_shift=5.0)
    assert {part: dtype.stored for part, dtype in run.dtypes.items()} == dict.fromkeys(
        ("transformer", "text_encoder", "byt5", "autoencoder"), torch.bfloat16
    )
    own = HunyuanImageRequest(prompt="a cat", negative_prompt="")
    assert vars(run.request(run.defaults)) == vars(own), "the pipeline has the same"


@pytest.mark.parametrize("prompt", ["a red cat", QUOTING])
def test_the_image_is_the_pipelines_own(draw, pipeline, prompt):
    (path,) = draw("--negative_prompt", "dog", "--flow_shift", 3, "--guidance_rescale", 0.5, "--prompt", prompt)
    request = HunyuanImageRequest(
        prompt, "dog", 96, 64, seed=7, sample_steps=4, flow_shift=3.0, guidance_rescale=0.5,
        apg_start_step_general=1, apg_start_step_ocr=2,
    )  # fmt: skip
    assert pixels(path) == pipeline.generate(request).tobytes()
    assert re.fullmatch(r"\d{8}-\d{6}-\d{3}_7_\.png", path.name)


@pytest.mark.parametrize(
    "arguments",
    [
        *(("--prompt", 'a red cat "ho"'), ("--negative_prompt", "small dog"), ("--infer_steps", 3)),
        *(("--guidance_scale", 2), ("--guidance_scale", 1), ("--apg_start_step_ocr", 0), ("--guidance_rescale", 0.5)),
        *(("--guidance_rescale_apg", 0.5), ("--flow_shift", 2), ("--seed", 4)),
    ],
    ids=lambda arguments: " ".join(map(str, arguments)),
)
def test_what_the_image_depends_on(inference, arguments, plain):
    assert difference(plain, latents(inference("--seed", 3, *arguments))) > 1e-3


def test_each_kind_of_prompt_has_its_own_start_of_projected_guidance(inference):
    general = [
        latents(inference("--seed", 3, "--prompt", "a cat", *more)) for more in ((), ("--apg_start_step_ocr", 0))
    ]
    assert torch.equal(*general), "nothing is quoted"
    assert (
        difference(general[0], latents(inference("--seed", 3, "--prompt", "a cat", "--apg_start_step_general", 3)))
        > 0.01
    )


@pytest.mark.parametrize(
    ("arguments", "streamed"),
    [
        (("--disable_mmap_load_safetensors", "--device", "cpu", "--tokenizer_cache_dir", "empty"), []),
        (("--blocks_to_swap", 2), ["transformer"]),
        (("--stream_text_encoders",), ["text_encoder", "byt5"]),
        (("--text_encoder_cpu", "--attn_mode", "sdpa", "--offload"), []),
    ],
    ids=["reading", "swapped", "streamed", "placed"],
)
def test_how_it_is_computed_does_not_change_it(inference, arguments, streamed, plain):
    """Streamed weights that aren't on the device are NaN in tests."""
    run = inference("--seed", 3, *arguments)
    assert torch.equal(plain, latents(run))
    assert list(run.pipeline.streamed) == streamed
    assert run.pipeline.on_host == (("text_encoder", "byt5") if "--text_encoder_cpu" in arguments else ())


def test_decoding_in_strips_gives_the_same(inference, plain):
    runs = [inference(*more) for more in ((), ("--vae_chunk_size", 16))]
    whole, strips = (run.decode(plain) for run in runs)
    assert difference(whole, strips) < 1e-4 and runs[1].pipeline.vae_chunk_size == 16


@pytest.mark.parametrize("part", ["dtype", "vae_dtype"])
def test_dtypes(inference, plain, part):
    run = inference("--seed", 3, f"--{part}", "bf16")
    drawn = latents(run)
    assert (difference(drawn, plain) > 1e-3) == (part == "dtype")
    assert run.pipeline.load_autoencoder().encoder.conv_in.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("given", ["--fp8", "--fp8_scaled", "--fp8_vl"])
def test_eight_bits_draw_nearly_the_same(inference, given, plain):
    run = inference("--seed", 3, given)
    drawn = latents(run)
    cosine = torch.nn.functional.cosine_similarity(drawn.flatten(), plain.flatten(), dim=0)
    assert 0.9 < cosine < 0.999999
    if given != "--fp8_vl":
        stored = run.pipeline.modules["transformer"].double_blocks[0].img_attn_qkv.stored_weight
        assert stored.codes.dtype == torch.float8_e4m3fn


def test_of_two_formats_in_8_bits_the_more_exact_one_is_taken(inference):
    scaled, by_tensor, both = (
        latents(inference("--seed", 3, *given)) for given in (["--fp8_scaled"], ["--fp8"], ["--fp8", "--fp8_scaled"])
    )
    assert torch.equal(both, scaled) and difference(both, by_tensor) > 1e-3


# ---- files ----------------------------------------------------------------------------------------------------------


def test_a_name_that_ends_in_png_is_the_image(draw, tmp_path):
    wanted = tmp_path / "penguin.png"
    quick = ("--infer_steps", 1, "--guidance_scale", 1)
    assert [path.name for path in draw(*quick, "--save_path", wanted)] == ["penguin.png"]
    assert [path.name for path in draw(*quick, "--save_path", wanted)] == ["penguin_001.png"], "nothing is written over"
    (folder := tmp_path / "folder.png").mkdir()
    assert [path.name for path in draw(*quick, "--save_path", folder)] == [] and len(list(folder.glob("*_7_.png"))) == 1


def test_latents_are_written_and_decoded_later(draw, inference, tmp_path):
    file, image = draw("--output_type", "latent_images", "--negative_prompt", "dog")
    assert re.fullmatch(r"(.+_7_)latent\.safetensors", file.name)[1] == image.stem
    saved, metadata = load_file(file), read_header(file).metadata
    assert list(saved) == ["latent"] and torch.equal(
        saved["latent"], latents(inference("--seed", 7, "--negative_prompt", "dog"))
    )
    assert {
        "seeds": "7", "prompt": QUOTING, "height": "64", "width": "96", "infer_steps": "4", "guidance_scale": "3.5",
        "negative_prompt": "dog",
    }.items() <= metadata.items()  # fmt: skip
    (alone,) = draw("--output_type", "latent", "--negative_prompt", "dog")
    assert torch.equal(load_file(alone)["latent"], saved["latent"])
    out = tmp_path / "decoded"
    words = ["--vae", inference().options.model.vae, "--dtype", "fp32", "--save_path", out, "--latent_path", file]
    run = HunyuanImageInference(parse_options(HunyuanImageInferenceOptions, "", [str(word) for word in words]))
    run.run()
    (again,) = out.iterdir()
    assert again.name.endswith(f"_7__{file.stem}.png") and pixels(again) == pixels(image)
    assert text_of(again) == text_of(image)
    bare, _ = draw("--output_type", "latent_images", "--no_metadata")
    assert read_header(bare).metadata in ({}, None)


def test_other_files_of_latents_are_decoded(draw, plain, tmp_path):
    (expected,) = draw("--seed", 3)
    forms = {
        "bare.pt": plain, "frames.pt": {"latent": plain[:, :, None].half().float()},
        "packed.pt": plain[0].permute(1, 2, 0).flatten(0, 1),
    }  # fmt: skip
    for name, value in forms.items():
        torch.save(value, tmp_path / name)
    images = draw("--latent_path", *(tmp_path / name for name in forms))
    assert [re.sub(r".*_0__", "", image.name) for image in images] == ["bare.png", "frames.png", "packed.png"]
    assert pixels(images[0]) == pixels(images[2]) == pixels(expected)


def test_a_prompt_file_decides_image_by_image(draw, inference, tmp_path, monkeypatch):
    path = tmp_path / "prompts.txt"
    path.write_text(
        "a dog --d 5 --s 1 --w 32 --g 2 --fs 2.5\na cat --d 6 --h 32 --n small dog --l 4\n", encoding="utf-8"
    )
    first, second = draw("--from_file", path)
    (expected,) = draw(
        *("--prompt", "a dog", "--seed", 5, "--infer_steps", 1, "--image_size", 64, 32, "--guidance_scale", 2),
        *("--flow_shift", 2.5),
    )
    assert pixels(first) == pixels(expected)
    (expected,) = draw(
        *("--prompt", "a cat", "--seed", 6, "--image_size", 32, 96, "--negative_prompt", "small dog"),
        *("--guidance_scale", 4),
    )
    assert pixels(second) == pixels(expected)
    run, seen = inference("--from_file", path, "--save_path", tmp_path / "parts"), []
    load, release = run.parts._load, run.pipeline.release
    monkeypatch.setattr(run.parts, "_load", lambda part: (seen.append(part), load(part)))
    monkeypatch.setattr(run.pipeline, "release", lambda part: (seen.append(f"no {part}"), release(part)))
    run.run()
    parts = ("text_encoder", "byt5", "transformer")
    assert seen == [*(word for part in parts for word in (part, f"no {part}")), "autoencoder"]


def test_a_session_draws_line_by_line(inference, lora_files, monkeypatch, capsys):
    lines = [
        "a dog --w 32 --s 1 --g 2 --d 5 --fs 3 --n blurry",
        "",
        "a cat --m 0.5,0 --h 32 --n -",
        "a cat --w 50",
        "exit",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    drawn = []
    run = inference("--interactive", "--seed", 9, "--negative_prompt", "a dog", "--lora_weight", *lora_files)
    monkeypatch.setattr(run, "draw", lambda prompt: drawn.append((prompt, list(run.stack.multipliers))))
    run.run()
    first = PromptOptions("a dog", "blurry", 32, 64, 5, 1, 2.0, flow_shift=3.0)
    second = PromptOptions("a cat", "", 96, 32, 9, 4, 3.5, flow_shift=5.0)
    assert drawn == [(first, [1.0, 1.0]), (second, [0.5, 0.0])]
    assert "must be multiples of 32, not 64 and 50" in capsys.readouterr().out


def test_the_text_of_an_image_says_how_to_make_it_again(draw, lora_files):
    (path,) = draw(
        *("--negative_prompt", "dog", "--guidance_scale", 2, "--infer_steps", 3, "--flow_shift", 2.5),
        *("--guidance_rescale", 0.2, "--guidance_rescale_apg", 0.3, "--fp8_scaled", "--lora_weight", lora_files[0]),
    )
    text = text_of(path)
    names = {
        **{"prompt": "prompt", "negative_prompt": "negative-prompt", "seed": "seed", "infer_steps": "steps"},
        "guidance_scale": "scale",
    }
    same = "flow_shift guidance_rescale guidance_rescale_apg apg_start_step_ocr apg_start_step_general dtype".split()
    names |= {name: name.replace("_", "-") for name in same}
    assert text["fp8-scaled"] == "true" and text["lora-weights"] == '["one.safetensors;1"]'
    (again,) = draw(
        *(word for option, key in names.items() for word in (f"--{option}", text[key])),
        *("--image_size", text["height"], text["width"], "--fp8_scaled", "--lora_weight", lora_files[0]),
    )
    assert pixels(again) == pixels(path) and text_of(again) == text
    (bare,) = draw("--no_metadata", "--infer_steps", 1)
    assert text_of(bare) == {}


# ---- LoRA -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora_files(pipeline, tmp_path_factory) -> list[Path]:
    """A LoRA and an OFT file."""
    from networks import lora_hunyuan_image, oft_hunyuan_image

    folder, model = tmp_path_factory.mktemp("lora"), pipeline.load("transformer")
    return [
        write_random_network(folder / "one.safetensors", lora_hunyuan_image, [], model, 1, 2.0),
        write_random_network(folder / "turn.safetensors", oft_hunyuan_image, [], model, 2, 0.5),
    ]


def test_several_files_act_together_with_their_multipliers(inference, lora_files, plain):
    def drawn(*more: object) -> Tensor:
        return latents(inference("--seed", 3, "--lora_weight", *lora_files, *more))

    both = drawn()
    assert torch.equal(both, drawn("--lora_multiplier", 1.0)), "missing multipliers are 1"
    assert torch.equal(both, drawn("--lora_multiplier", 1.0, 1.0, 3.0)), "more are left out"
    assert difference(both, drawn("--lora_multiplier", 0.5)) > 1e-3 < difference(both, plain)
    assert torch.equal(plain, drawn("--lora_multiplier", 0, 0))
    merged = drawn("--merge_lora_weights")
    assert 0 < difference(both, merged) < 1e-3 * both.abs().max()


def test_patterns_choose_the_modules_of_each_file(inference, lora_files):
    def drawn(*more: object) -> Tensor:
        return latents(inference("--seed", 3, "--lora_weight", lora_files[0], *more))

    def modules(*more: object) -> set[str]:
        run = inference("--lora_weight", lora_files[0], *more)
        return {place.module.lora_name for place in run.stack.places["transformer"]}

    every, double = modules(), modules("--include_patterns", "double_blocks_.*attn")
    assert double == {name for name in every if re.search("double_blocks_.*attn", name)} and double < every
    rest = modules("--exclude_patterns", "double_blocks_.*attn")
    assert rest == every - double
    assert modules("--include_patterns", "double", "--exclude_patterns", "mlp") == {
        name for name in every if "double" in name and "mlp" not in name
    }
    assert difference(drawn(), drawn("--include_patterns", "single_blocks")) > 1e-3
    with pytest.raises(UserError, match=r"one\.safetensors"):
        modules("--include_patterns", "nothing like it")
    with pytest.raises(UserError, match=r'--exclude_patterns: "\(" is not a regular expression'):
        modules("--exclude_patterns", "(")


def test_a_merged_model_is_written_and_nothing_is_drawn(inference, lora_files, plain, tmp_path):
    path, empty = tmp_path / "merged.safetensors", tmp_path / "empty"
    empty.mkdir()
    given = ("--lora_weight", *lora_files, "--lora_multiplier", 0.7)
    run = inference(*given, "--save_merged_model", path, "--save_path", empty)
    run.run()
    assert list(empty.iterdir()) == [] and not run.pipeline.modules  # tensor by tensor: no model is loaded
    merged = latents(inference("--seed", 3, "--dit", path))
    assert difference(merged, latents(inference("--seed", 3, *given))) < 1e-3 * merged.abs().max()
    assert difference(merged, plain) > 1e-3
    assert read_header(path).metadata["modelspec.merged_from"] == "one, turn"


def test_lycoris_files_are_merged(inference, plain, tmp_path):
    package = lycoris_package()
    module = HunyuanImagePipeline(pipeline_files(inference), torch.float32, "cpu").load("transformer")
    network = package.create_network(1.0, 4, 2.0, None, [], module, algo="loha")
    network.apply_to([], module, False, True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    metadata = {"ss_network_module": "lycoris.kohya", "ss_network_dim": "4", "ss_network_alpha": "2.0"}
    metadata["ss_network_args"] = '{"algo": "loha"}'
    network.save_weights(str(tmp_path / "loha.safetensors"), torch.float32, metadata)
    given = ("--seed", 3, "--lora_weight", tmp_path / "loha.safetensors", "--lycoris")
    full, half = latents(inference(*given)), latents(inference(*given, "--lora_multiplier", 0.5))
    assert difference(full, plain) > 1e-3 < difference(full, half)
    run = inference("--seed", 3)
    run.pipeline.modules["transformer"] = module
    assert difference(full, latents(run)) < 1e-3 * full.abs().max(), "as it acts in training"
    in_8_bits = [latents(inference(*more, "--fp8_scaled")) for more in (given, ("--seed", 3))]
    assert difference(*in_8_bits) > 1e-3
    only = latents(inference(*given, "--include_patterns", "single_blocks"))
    assert difference(only, full) > 1e-3 < difference(only, plain)


def pipeline_files(inference) -> HunyuanImageFiles:
    model = inference().options.model
    return HunyuanImageFiles(model.dit, model.text_encoder, model.byt5, model.vae)


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--dit", ""], "--dit is missing"),
        (["--save_path", ""], "--save_path is missing"),
        (["--image_size", 64, 65], r"must be multiples of 32, not 64 and 65"),
        (["--image_size", 64], "--image_size takes height and width; 1 numbers given"),
        (["--image_size", 0, 64], "at least 1"),
        (["--infer_steps", 0], "steps must be at least 1"),
        (["--flow_shift", 0], "must be above 0, not 0"),
        (["--guidance_rescale", 1.5], "--guidance_rescale must be between 0 and 1, not 1.5"),
        (["--guidance_rescale_apg", -1], "--guidance_rescale_apg must be between 0 and 1, not -1"),
        (["--vae_chunk_size", 0], "--vae_chunk_size must be at least 1"),
        (["--text_encoder_cpu", "--stream_text_encoders"], "are mutually exclusive"),
        (["--attn_mode", "flash"], "needs the package flash_attn"),
        (["--attn_mode", "sageattn"], "needs the package sageattention"),
        (["--attn_mode", "xformers"], "needs the package xformers"),
        (["--lora_weight", "no.safetensors"], "--lora_weight: there is no file no.safetensors"),
        (["--lora_multiplier", "inf"], "--lora_multiplier"),
        (["--save_merged_model", "a.safetensors"], "--save_merged_model needs --lora_weight"),
        (["--blocks_to_swap", 99], "--blocks_to_swap 99: this model has"),
        (["--from_file", "a.txt", "--interactive"], "are mutually exclusive"),
        (["--latent_path", "a", "--interactive"], "--latent_path only decodes"),
        (["--latent_path", "none.safetensors"], "there is no latent file none.safetensors"),
        (["--dtype", "bf61"], '--dtype: "bf61" is not a dtype'),
        (["--vae_dtype", "bf61"], '--vae_dtype: "bf61" is not a dtype'),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_wrong_options_are_one_sentence(inference, arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        inference(*arguments).run()


def test_something_to_draw_is_needed(command, tmp_path):
    words = [str(word) for word in (*command, "--save_path", tmp_path)]
    with pytest.raises(UserError, match="nothing to generate: give --prompt, --from_file or --interactive"):
        HunyuanImageInference(parse_options(HunyuanImageInferenceOptions, "", words))


def test_wrong_files_are_named(inference, tiny_hunyuan_image, tmp_path):
    tiny = tiny_hunyuan_image
    for option in ("--text_encoder", "--byt5", "--vae"):
        with pytest.raises(UserError, match=f"{option}: "):
            inference(option, tiny.transformer)
    with pytest.raises(UserError, match="--dit: "):
        inference("--dit", tiny.autoencoder)
    with pytest.raises(UserError, match="holds no tensor"):
        inference("--latent_path", tiny.autoencoder).run()


def test_what_has_no_effect_is_said(inference, lora_files, caplog):
    caplog.set_level("INFO", logger="library")
    inference("--fp8", "--fp8_scaled", "--lycoris", "--merge_lora_weights", "--lora_multiplier", 2)
    inference("--guidance_scale", 1, "--negative_prompt", "dog")
    for line in (
        "--fp8 has no effect with --fp8_scaled",
        "--lycoris has no effect without --lora_weight",
        "--merge_lora_weights has no effect without --lora_weight",
        "--lora_multiplier: only the first 0 have an effect",
        "a negative prompt has no effect without classifier-free guidance",
    ):
        assert line in caplog.text


# ---- as a user runs it ----------------------------------------------------------------------------------------------


def test_from_the_command_line_with_a_configuration_file(command, tmp_path):
    """The command of the users' guide, in a file but for the models."""
    config = tmp_path / "image.toml"
    config.write_text("[image]\ninfer_steps = 1\nseed = 4\nimage_size = [32, 64]\n", encoding="utf-8")
    given = [str(word) for word in command]
    for option, count in (("--infer_steps", 2), ("--image_size", 3)):
        del given[given.index(option) : given.index(option) + count]
    script = "hunyuan_image_minimal_inference.py"
    done = run_in_process(
        script, *given, "--config_file", config, "--save_path", tmp_path / "a.png", "--prompt", "a cat"
    )
    assert done.returncode == 0, done.stderr
    text = text_of(tmp_path / "a.png")
    assert [text[key] for key in ("steps", "height", "width", "seed")] == ["1", "32", "64", "4"]
    done = run_in_process(script, *given, "--split_attn")
    assert done.returncode == 2 and done.stderr.startswith("error: Unknown option --split_attn")


def test_every_option_has_a_sentence():
    assert [name for name, option in declared_options(HunyuanImageInferenceOptions).items() if not option.help] == []
