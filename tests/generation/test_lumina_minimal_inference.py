"""lumina_minimal_inference.py: what its options do to an image."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from library.errors import UserError
from library.models.lumina.pipeline import LuminaFiles, LuminaPipeline, LuminaRequest
from library.options import declared_options, parse_options
from library.prompt_options import PromptOptions
from lumina_minimal_inference import LuminaInference, LuminaInferenceOptions
from tests.generation.drawing import difference, latents, moves, pixels, text_of, write_random_network
from tests.running import run_in_process
from tools.make_tiny_models import make_tiny_lumina

SYSTEM = "the big red"
SHORT = {"gemma2_max_token_length": 24}


@pytest.fixture(scope="module")
def pipeline(tiny_lumina) -> LuminaPipeline:
    """The tiny model itself."""
    return LuminaPipeline(LuminaFiles(**vars(tiny_lumina)), torch.float32, "cpu", **SHORT)


@pytest.fixture(scope="module")
def model_files(tiny_lumina) -> list[object]:
    """The options that name the tiny model's files."""
    return [
        *("--pretrained_model_name_or_path", tiny_lumina.transformer),
        *("--gemma2_path", tiny_lumina.gemma2, "--ae_path", tiny_lumina.autoencoder),
    ]


@pytest.fixture(scope="module")
def command(model_files) -> list[object]:
    """A small quick image of the tiny model, half of whose steps are guided."""
    return [
        *model_files,
        *("--image_width", 48, "--image_height", 32, "--steps", 4, "--cfg_trunc_ratio", 0.2, "--prompt", "a red cat"),
        *("--dtype", "float", "--gemma2_dtype", "float", "--ae_dtype", "float", "--gemma2_max_token_length", 24),
    ]


@pytest.fixture(scope="module")
def inference(command, tmp_path_factory):
    """The script's run with more options, ready to draw."""
    folder = tmp_path_factory.mktemp("out")

    def make(*arguments: object) -> LuminaInference:
        given = [*command, "--output_dir", folder, *arguments]
        return LuminaInference(parse_options(LuminaInferenceOptions, "", [str(word) for word in given]))

    return make


@pytest.fixture
def draw(inference, tmp_path):
    """Draw with more options; the new image files in order."""

    def run(*arguments: object) -> list[Path]:
        before = set(tmp_path.glob("*.png"))
        inference("--seed", 7, "--output_dir", tmp_path, *arguments).run()
        return sorted(set(tmp_path.glob("*.png")) - before, key=lambda path: path.stat().st_mtime_ns)

    return run


@pytest.fixture(scope="module")
def plain(inference) -> Tensor:
    """The latents of seed 3 without more options."""
    return latents(inference("--seed", 3))


# ---- the image ------------------------------------------------------------------------------------------------------


def test_defaults_are_the_documented_ones(model_files, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run = LuminaInference(parse_options(LuminaInferenceOptions, "", [str(word) for word in model_files]))
    assert run.defaults == PromptOptions(
        "A beautiful sunset over the mountains", "", 1024, 1024, None, 36, 3.5,
        cfg_trunc_ratio=0.25, renorm_cfg=1.0, flow_shift=6.0,
    )  # fmt: skip
    assert {part: dtype.stored for part, dtype in run.dtypes.items()} == dict.fromkeys(
        ("transformer", "gemma2", "autoencoder"), torch.bfloat16
    )
    assert (tmp_path / "outputs").is_dir() and run.pipeline.text_length == 256
    request = run.request(run.defaults)
    assert {name: value for name, value in vars(LuminaRequest(noise_dtype=torch.bfloat16)).items() if value} == {
        name: value for name, value in vars(request).items() if value and name != "prompt"
    }, "the pipeline has the same"


def test_the_image_is_the_pipelines_own(draw, pipeline, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda form: form)
    (path,) = draw("--negative_prompt", "dog", "--discrete_flow_shift", 3, "--renorm_cfg", 0.5)
    request = LuminaRequest(
        "a red cat", "dog", 48, 32, seed=7, sample_steps=4, cfg_trunc_ratio=0.2, renorm_cfg=0.5, flow_shift=3.0
    )
    assert pixels(path) == pipeline.generate(request).tobytes()
    assert path.name == "image_%Y%m%d%H%M%S_7.png"


@pytest.mark.parametrize(
    "arguments",
    [
        *(("--prompt", "a dog"), ("--negative_prompt", "small dog"), ("--steps", 3), ("--system_prompt", SYSTEM)),
        *(("--guidance_scale", 2), ("--cfg_trunc_ratio", 1), ("--renorm_cfg", 0.2), ("--discrete_flow_shift", 2)),
        *(("--gemma2_max_token_length", 2),),
    ],
    ids=lambda arguments: arguments[0],
)
def test_what_the_image_depends_on(inference, arguments, plain):
    assert difference(plain, latents(inference("--seed", 3, *arguments))) > 1e-3


@pytest.mark.parametrize(
    ("arguments", "streamed"),
    [
        (("--disable_mmap_load_safetensors", "--device", "cpu", "--tokenizer_cache_dir", "empty"), []),
        (("--blocks_to_swap", 2), ["transformer"]),
        (("--stream_text_encoders",), ["gemma2"]),
    ],
    ids=["reading", "swapped", "streamed"],
)
def test_how_it_is_computed_does_not_change_it(inference, arguments, streamed, plain):
    """Streamed weights that aren't on the device are NaN in tests."""
    run = inference("--seed", 3, *arguments)
    assert torch.equal(plain, latents(run))
    assert list(run.pipeline.streamed) == streamed
    assert list(run.pipeline.modules) == ["transformer"], "the text encoder is released"


def test_offload_keeps_one_part_on_the_device(inference, plain, monkeypatch):
    run = inference("--seed", 3, "--offload")
    seen = moves(run, monkeypatch)
    drawn = latents(run)
    assert torch.equal(drawn, plain) and torch.equal(run.decode(drawn), inference().decode(plain))
    assert seen == [(part, what) for part in ("gemma2", "transformer", "autoencoder") for what in ("load", "cpu")]


def test_noise_is_drawn_on_the_device_in_the_transformers_dtype(inference):
    for names, dtype in (((), torch.float32), (("--dtype", "bf16"), torch.bfloat16), (("--fp8_scaled",), None)):
        run = inference("--seed", 3, *names)
        request = run.request(run.prompts()[0])
        noise = run.pipeline.start_noise(request, [run.pipeline.generator(request)])
        generator = torch.Generator().manual_seed(3)
        assert torch.equal(noise, torch.randn((1, 16, 4, 6), generator=generator, dtype=dtype or torch.float32))


def test_every_seed_is_another_image_and_an_unset_one_is_drawn(inference, plain):
    assert difference(latents(inference("--seed", 1)), plain) > 0.1
    seeds = {inference().prompts()[0].seed for _ in range(3)}
    assert len(seeds) == 3 and all(0 <= seed < 2**32 for seed in seeds)


def test_sizes_are_rounded_to_whole_tokens(draw, caplog):
    caplog.set_level("INFO", logger="library")
    (path,) = draw("--image_width", 50, "--steps", 1)
    assert text_of(path)["width"] == "64" and "50x32 is rounded to 64x32" in caplog.text


# ---- guidance and system prompt -------------------------------------------------------------------------------------


@pytest.mark.parametrize("off", [("--guidance_scale", 1), ("--cfg_trunc_ratio", 0)], ids=["scale", "truncation"])
def test_a_negative_prompt_acts_only_where_a_step_is_guided(inference, off, caplog, plain):
    caplog.set_level("INFO", logger="library")
    runs = [inference("--seed", 3, *off), inference("--seed", 3, *off, "--negative_prompt", "dog")]
    one, other = map(latents, runs)
    assert torch.equal(one, other) and difference(one, plain) > 1e-3
    assert caplog.text.count("a negative prompt has no effect") == 1
    assert all(len(run.texts) == 1 for run in runs), "it is not even encoded"
    text = runs[1].record(runs[1].prompts()[0]).entries()
    assert text["scale"] == "1.0" and not {"negative-prompt", "cfg-trunc-ratio", "renorm-cfg"} & set(text)


def test_the_system_prompt_is_the_text_before_the_prompt(inference):
    given = latents(inference("--seed", 3, "--system_prompt", SYSTEM))
    assert torch.equal(given, latents(inference("--seed", 3, "--prompt", f"{SYSTEM} <Prompt Start> a red cat")))
    both = ("--system_prompt", SYSTEM, "--add_system_prompt_to_negative_prompt", "--negative_prompt", "dog")
    written = f"{SYSTEM} <Prompt Start> dog"
    expected = latents(inference("--seed", 3, "--system_prompt", SYSTEM, "--negative_prompt", written))
    assert torch.equal(latents(inference("--seed", 3, *both)), expected)
    assert difference(latents(inference("--seed", 3, *both[:2], *both[3:])), expected) > 1e-3


def test_what_has_no_effect_is_said(inference, caplog, tmp_path):
    caplog.set_level("INFO", logger="library")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --g 3 --ss ddim\n", encoding="utf-8")
    inference("--from_file", prompts, "--add_system_prompt_to_negative_prompt", "--merge_lora_weights")
    for said in (
        "no effect in prompts for Lumina Image 2.0: sample_sampler, guidance_scale",
        "--prompt has no effect with --from_file",
        "--add_system_prompt_to_negative_prompt has no effect without --system_prompt",
        "--merge_lora_weights has no effect without --lora_weights",
    ):
        assert said in caplog.text


# ---- dtypes ---------------------------------------------------------------------------------------------------------


def test_each_part_has_its_own_dtype(inference):
    run = inference("--gemma2_dtype", "fp16", "--ae_dtype", "bf16", "--seed", 1)
    prompt = run.prompts()[0]
    run.encode([prompt], keep_encoders=True)
    run.image(prompt)
    dtypes = {part: next(module.parameters()).dtype for part, module in run.pipeline.modules.items()}
    assert dtypes == {"transformer": torch.float32, "gemma2": torch.float16, "autoencoder": torch.bfloat16}


@pytest.mark.parametrize("given", [("--dtype", "fp8", "--gemma2_dtype", "fp8", "--ae_dtype", "fp8"), ("--fp8_scaled",)])
def test_eight_bits_draw_nearly_the_same(inference, plain, given):
    run = inference("--seed", 3, *given)
    cosine = torch.nn.functional.cosine_similarity(latents(run).flatten(), plain.flatten(), dim=0)
    assert 0.97 < cosine < 0.99999
    stored = run.pipeline.modules["transformer"].layers[0].attention.qkv.stored_weight
    assert stored.codes.dtype == torch.float8_e4m3fn
    assert run.dtypes["autoencoder"].stored == (torch.bfloat16 if len(given) > 1 else torch.float32)


# ---- LoRA -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(pipeline, tmp_path_factory) -> list[str]:
    """Two LoRA files with Gemma 2 and one OFT file, with strengths."""
    from networks import lora_lumina, oft_lumina

    folder, parts = tmp_path_factory.mktemp("lora"), ([pipeline.load("gemma2")], pipeline.load("transformer"))
    kinds = {"one": (lora_lumina, 2.0), "two": (lora_lumina, 2.0), "turn": (oft_lumina, 0.5)}
    paths = [
        write_random_network(folder / f"{name}.safetensors", module, *parts, seed, alpha)
        for seed, (name, (module, alpha)) in enumerate(kinds.items(), 1)
    ]
    return [f"{paths[0]};0.7", f"{paths[1]}", f"{paths[2]};1.5"]


def test_several_files_act_together_and_merging_gives_the_same(inference, files, plain):
    together = latents(inference("--seed", 3, "--lora_weights", *files))
    merged = latents(inference("--seed", 3, "--merge_lora_weights", "--lora_weights", *files))
    assert difference(together, merged) < 1e-3 * together.abs().max()
    assert difference(together, plain) > 1e-2
    for left_out in range(3):
        fewer = files[:left_out] + files[left_out + 1 :]
        assert difference(together, latents(inference("--seed", 3, "--lora_weights", *fewer))) > 1e-3
    offloaded = inference("--seed", 3, "--lora_weights", *files, "--offload", "--blocks_to_swap", 1)
    assert torch.equal(latents(offloaded), together)


def test_a_file_acts_on_gemma_with_its_multiplier(inference, files):
    one = files[0].rpartition(";")[0]
    states = []
    for multiplier in (0, 0.5, 1):
        run = inference("--lora_weights", f"{one};{multiplier}", "--guidance_scale", 1)
        run.encode(run.prompts())
        states.append(next(iter(run.texts.values()))["hidden_state"])
    none, half, whole = states
    assert 0 < difference(none, half) < difference(none, whole)


# ---- prompts from files, and one by one -----------------------------------------------------------------------------


def test_a_prompt_file_decides_image_by_image(draw, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text(
        "a dog --d 5 --s 1 --w 32 --l 2 --fs 2.5\na cat --d 6 --h 48 --n small dog --ctr 0.7 --rcfg 0.4\n",
        encoding="utf-8",
    )
    first, second = draw("--from_file", path)
    (expected,) = draw(
        *("--prompt", "a dog", "--seed", 5, "--steps", 1, "--image_width", 32, "--guidance_scale", 2),
        *("--discrete_flow_shift", 2.5),
    )
    assert pixels(first) == pixels(expected)
    (expected,) = draw(
        *("--prompt", "a cat", "--seed", 6, "--image_height", 48, "--negative_prompt", "small dog"),
        *("--cfg_trunc_ratio", 0.7, "--renorm_cfg", 0.4),
    )
    assert pixels(second) == pixels(expected)


def test_a_session_draws_line_by_line(inference, files, monkeypatch, capsys):
    lines = [
        "a dog --w 32 --s 1 --g 2 --d 5 --ctr 0.5 --rcfg 0 --fs 3 --n blurry",
        "",
        "a cat --m 0.5,0,1 --h 48 --n -",
        "a cat --m 1,2",
        "a cat --ctr 2",
        "exit",
        "never drawn",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    drawn = []
    run = inference("--interactive", "--seed", 9, "--negative_prompt", "a dog", "--lora_weights", *files)
    monkeypatch.setattr(run, "draw", lambda prompt: drawn.append((prompt, list(run.stack.multipliers))))
    run.run()
    guided = {"cfg_trunc_ratio": 0.5, "renorm_cfg": 0.0, "flow_shift": 3.0}
    first = PromptOptions("a dog", "blurry", 32, 32, 5, 1, 2.0, **guided)
    second = PromptOptions("a cat", "", 32, 48, 9, 1, 2.0, **guided)
    assert drawn == [(first, [0.7, 1.0, 1.5]), (second, [0.5, 0.0, 1.0])]
    printed = capsys.readouterr().out
    assert "--m needs one number for each of the 3 LoRA files; 2 given." in printed
    assert "cfg_trunc_ratio (--ctr) must be between 0 and 1, not 2" in printed
    assert sorted(run.pipeline.modules) == ["gemma2"], "kept for the next line"


def test_the_text_of_an_image_says_how_to_make_it_again(draw, files):
    (path,) = draw(
        *("--prompt", 'a cat 猫, "quoted"', "--negative_prompt", "dog", "--guidance_scale", 2, "--steps", 2),
        *("--cfg_trunc_ratio", 1 / 3, "--renorm_cfg", 0.7, "--discrete_flow_shift", 2.5, "--system_prompt", SYSTEM),
        *("--add_system_prompt_to_negative_prompt", "--gemma2_dtype", "bf16", "--lora_weights", *files),
    )
    text = text_of(path)
    folder = files[0].rpartition("one")[0]
    recorded = {
        **{"prompt": "prompt", "negative_prompt": "negative-prompt", "seed": "seed", "steps": "steps"},
        **{"guidance_scale": "scale", "image_width": "width", "image_height": "height"},
        **{name: name.replace("_", "-") for name in ("cfg_trunc_ratio", "renorm_cfg", "discrete_flow_shift", "dtype")},
        **{name: name.replace("_", "-") for name in ("gemma2_dtype", "ae_dtype", "system_prompt")},
        **{"gemma2_max_token_length": "gemma2-max-token-length"},
    }
    assert text["add-system-prompt-to-negative-prompt"] == "true"
    (again,) = draw(
        *(word for option, key in recorded.items() for word in (f"--{option}", text[key])),
        *("--add_system_prompt_to_negative_prompt", "--lora_weights"),
        *(folder + name for name in json.loads(text["lora-weights"])),
    )
    assert pixels(again) == pixels(path) and text_of(again) == text
    (bare,) = draw("--no_metadata", "--steps", 1)
    assert text_of(bare) == {}


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--pretrained_model_name_or_path", ""], "--pretrained_model_name_or_path is missing"),
        (["--cfg_trunc_ratio", 1.5], r"cfg_trunc_ratio \(--ctr\) must be between 0 and 1, not 1.5"),
        (["--cfg_trunc_ratio", -0.1], "must be between 0 and 1, not -0.1"),
        (["--renorm_cfg", -1], "must not be negative, but is -1"),
        (["--discrete_flow_shift", 0], "must be above 0, not 0"),
        (["--image_width", 0], "width must be at least 1"),
        (["--steps", 0], "--steps must be at least 1"),
        (["--gemma2_max_token_length", 0], "--gemma2_max_token_length must be at least 1"),
        (["--gemma2_dtype", "bf61"], '--gemma2_dtype: "bf61" is not a dtype'),
        (["--use_flash_attn"], "needs the package flash_attn"),
        (["--use_sage_attn"], "needs the package sageattention"),
        (["--use_sage_attn", "--use_flash_attn"], "needs the package sageattention"),
        (["--lora_weights", "a;0.5;1"], '"a;0.5;1" has more than one semicolon'),
        (["--lora_weights", "no.safetensors;1"], "there is no file no.safetensors"),
        (["--blocks_to_swap", 99], "--blocks_to_swap 99: this model has"),
        (["--from_file", "a.txt", "--interactive"], "are mutually exclusive"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_wrong_options_are_one_sentence(inference, arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        inference(*arguments)


def test_wrong_files_are_named(inference, tiny_lumina, tmp_path):
    with pytest.raises(UserError, match="--gemma2_path: .* a Gemma 2 text encoder is needed"):
        inference("--gemma2_path", tiny_lumina.autoencoder)
    with pytest.raises(UserError, match=r"--pretrained_model_name_or_path: .* is a FLUX autoencoder"):
        inference("--pretrained_model_name_or_path", tiny_lumina.autoencoder)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog --rcfg -2\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"prompts\.txt, prompt 2: renorm_cfg"):
        inference("--from_file", prompts)


def test_parts_that_are_not_named_are_in_the_same_file_or_folder(command, inference, plain, tmp_path):
    names = command.index("--gemma2_path")
    alone = [*command[:names], *command[names + 4 :]]

    def run(*arguments: object) -> LuminaInference:
        given = [*alone, "--output_dir", tmp_path, "--seed", 3, *arguments]
        return LuminaInference(parse_options(LuminaInferenceOptions, "", [str(word) for word in given]))

    for layout in ("comfyui", "diffusers"):
        files = make_tiny_lumina(tmp_path / layout, layout)
        together = run("--pretrained_model_name_or_path", files.transformer)
        assert difference(latents(together), plain) < 1e-5
        assert together.decode(plain).isfinite().all()
    with pytest.raises(UserError, match="--gemma2_path is missing"):
        run()
    with pytest.raises(UserError, match="--ae_path is missing"):
        run("--gemma2_path", command[names + 1])


# ---- as a user runs it ----------------------------------------------------------------------------------------------


def test_from_the_command_line_with_a_configuration_file(command, tmp_path):
    config = tmp_path / "image.toml"
    config.write_text('[image]\nsteps = 1\nseed = 4\n[text]\nsystem_prompt = "the red"\n', encoding="utf-8")
    given = [str(word) for word in command]
    del given[given.index("--steps") : given.index("--steps") + 2]
    done = run_in_process("lumina_minimal_inference.py", *given, "--config_file", config, "--output_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("image_*_4.png")
    assert (text_of(path)["steps"], text_of(path)["system-prompt"]) == ("1", "the red")
    done = run_in_process("lumina_minimal_inference.py", *given, "--ctr", "0.5")
    assert done.returncode == 2 and done.stderr.startswith("error: Unknown option --ctr")


def test_every_option_has_a_sentence():
    assert [name for name, option in declared_options(LuminaInferenceOptions).items() if not option.help] == []
