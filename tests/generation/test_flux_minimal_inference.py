"""flux_minimal_inference.py: what its options do to an image."""

from __future__ import annotations

import io
import json
import weakref

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.errors import UserError
from library.models.attention import AttentionBackend
from library.models.flux.pipeline import FluxFiles, FluxPipeline, FluxRequest
from library.prompt_options import PromptOptions
from tests.generation.drawing import difference, latents, moves, pixels, text_of
from tools.make_tiny_models import make_tiny_flux


@pytest.fixture(scope="module")
def plain(inference) -> Tensor:
    """The latents of seed 3 without more options."""
    return latents(inference("--seed", 3))


def test_the_image_is_the_pipelines_own(draw, tiny_pipeline):
    (path,) = draw("--guidance", "2.5")
    request = FluxRequest("a red cat", width=48, height=32, seed=7, sample_steps=2, guidance_scale=2.5)
    assert pixels(path) == tiny_pipeline.generate(request).tobytes()


def test_schnell_has_four_steps_and_an_unshifted_schedule(tmp_path, inference, caplog):
    files = make_tiny_flux(tmp_path, "schnell")
    run = inference("--ckpt_path", files.transformer, "--seed", 3, "--guidance", "2")
    run.options.image.steps = None
    assert run.default_prompt().sample_steps == 4
    assert "--guidance has no effect: schnell" in caplog.text
    pipeline = FluxPipeline(FluxFiles(**vars(files)), torch.float32, "cpu", t5xxl_max_token_length=16)
    request = FluxRequest("a red cat", width=48, height=32, seed=3, sample_steps=2, shift=False)
    assert torch.equal(latents(run), pipeline.generate_latents(request))


def test_dev_has_fifty_steps(inference):
    run = inference()
    run.options.image.steps = None
    assert run.default_prompt().sample_steps == 50


@pytest.mark.parametrize("negative", ["a blue dog", pytest.param("", marks=pytest.mark.thorough)])
def test_classifier_free_guidance_leads_away_from_the_negative_prompt(inference, negative, plain):
    """v = v_neg + c (v_pos - v_neg) in each step; an empty negative prompt is one, too."""
    run = inference("--seed", 3, "--cfg_scale", "3", "--negative_prompt", negative)
    actual, pipeline = latents(run), run.pipeline
    run.parts.pipeline.load_text_encoders()
    positive, unwanted = pipeline.encode_prompts(["a red cat"]), pipeline.encode_prompts([negative])
    noise = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(3))
    expected = noise.reshape(1, 2, 3, 16, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(1, 16, 4, 6)
    mu = 0.5 + (1.15 - 0.5) * (6 - 256) / (4096 - 256)
    middle = torch.tensor(mu).exp() / (torch.tensor(mu).exp() + 1)
    guidance = torch.tensor([3.5])
    with torch.no_grad():
        for sigma, following in ((1.0, middle), (middle, 0.0)):
            time = torch.as_tensor(sigma).reshape(1)
            towards, away = (pipeline.predict(expected, time, c, guidance) for c in (positive, unwanted))
            expected = expected + (following - sigma) * (away + 3 * (towards - away))
    assert difference(actual, expected) < 1e-4
    assert difference(actual, plain) > 1e-2


def test_a_size_that_is_rounded_is_said(inference, caplog, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog --w 50 --h 64\n", encoding="utf-8")
    inference("--from_file", prompts)
    (line,) = (record.getMessage() for record in caplog.records if "rounded" in record.getMessage())
    assert line == f"{prompts}, prompt 2: 50x64 is rounded to 64x64"


def test_a_missing_negative_prompt_is_the_empty_one(inference, caplog):
    assert torch.equal(
        latents(inference("--seed", 3, "--cfg_scale", "3")),
        latents(inference("--seed", 3, "--cfg_scale", "3", "--negative_prompt", "")),
    )
    assert caplog.text.count("leads away from the empty prompt") == 1


def test_a_negative_prompt_alone_changes_nothing_and_that_is_said(inference, caplog, plain):
    assert torch.equal(plain, latents(inference("--seed", 3, "--negative_prompt", "dog")))
    assert "a negative prompt has no effect" in caplog.text


def test_every_seed_is_another_image_and_an_unset_one_is_drawn(inference, plain):
    assert difference(latents(inference("--seed", 1)), plain) > 0.1
    run = inference()
    seeds = {run.prompts()[0].seed for _ in range(5)}
    assert len(seeds) == 5 and all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize(
    "arguments",
    [("--apply_t5_attn_mask",), ("--t5xxl_max_token_length", "8"), ("--guidance", "1"), ("--prompt", "a dog")],
    ids=lambda arguments: arguments[0],
)
def test_what_the_image_depends_on(inference, arguments, plain):
    assert difference(plain, latents(inference("--seed", 3, *arguments))) > 1e-3


@pytest.mark.parametrize(
    "arguments", [("--attn_mode", "split"), ("--disable_mmap_load_safetensors",), ("--device", "cpu")]
)
def test_how_it_is_computed_does_not_change_it(inference, arguments, plain):
    assert difference(plain, latents(inference("--seed", 3, *arguments))) < 1e-5


def test_attention_backends_are_those_of_the_models():
    from typing import get_args, get_type_hints

    from flux_minimal_inference import FluxDeviceOptions

    assert get_args(get_type_hints(FluxDeviceOptions)["attn_mode"]) == get_args(AttentionBackend)


def test_options_from_a_file(inference, tmp_path):
    path = tmp_path / "image.toml"
    path.write_text("[image]\nseed = 4\nguidance = 2\nwidth = 64\n[output]\nno_metadata = true\n", encoding="utf-8")
    run = inference("--config_file", path)
    assert (run.defaults.seed, run.defaults.guidance_scale, run.options.output.no_metadata) == (4, 2.0, True)
    assert run.defaults.width == 48, "the command line wins"


# ---- dtypes -------------------------------------------------------------------------------------------------


def test_noise_is_drawn_in_the_base_format_and_in_float32_where_a_part_is_in_8_bits(inference):
    assert inference("--dtype", "bf16").noise_dtype == torch.bfloat16
    assert inference("--dtype", "bf16", "--t5xxl_dtype", "fp8").noise_dtype == torch.float32
    assert inference("--dtype", "fp8_e4m3fn").noise_dtype == torch.float32


def test_eight_bits_take_half_the_memory_and_draw_nearly_the_same(inference, plain):
    run = inference("--seed", 3, "--dtype", "fp8")
    actual = latents(run)
    assert actual.isfinite().all()
    assert torch.nn.functional.cosine_similarity(actual.flatten(), plain.flatten(), dim=0) > 0.97
    block = run.pipeline.modules["transformer"].double_blocks[0].img_attn.qkv
    assert block.stored_weight.codes.dtype == torch.float8_e4m3fn
    assert {p.dtype for p in run.pipeline.modules["transformer"].parameters()} == {torch.bfloat16}


def test_scaled_fp8_is_the_transformers_alone_and_is_nearer_still(inference, plain):
    run = inference("--seed", 3, "--fp8_scaled")
    assert run.noise_dtype == torch.float32
    actual = latents(run)
    assert torch.nn.functional.cosine_similarity(actual.flatten(), plain.flatten(), dim=0) > 0.99
    layer = run.pipeline.modules["transformer"].single_blocks[0].linear2
    assert layer.stored_weight.granularity == "block" and layer.compute_dtype == torch.float32
    assert run.dtypes["t5xxl"].stored == torch.float32


def test_other_eight_bit_formats_are_named_and_kept_as_e4m3fn(inference, caplog):
    run = inference("--flux_dtype", "fp8_e5m2")
    assert "--flux_dtype fp8_e5m2: weights are kept as float8_e4m3fn" in caplog.text
    assert run.dtypes["clip_l"].compute == torch.float32


def test_each_part_has_its_own_format(inference):
    run = inference("--clip_l_dtype", "bf16", "--t5xxl_dtype", "fp16", "--ae_dtype", "bf16", "--seed", "1")
    prompt = run.prompts()[0]
    run.encode([prompt], keep_encoders=True)
    run.image(prompt)
    formats = {part: next(module.parameters()).dtype for part, module in run.pipeline.modules.items()}
    half = {"clip_l": torch.bfloat16, "t5xxl": torch.float16, "autoencoder": torch.bfloat16}
    assert formats == {**half, "transformer": torch.float32}


# ---- LoRA -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(lora) -> list[str]:
    """Two LoRA files with text encoders and one OFT file, with strengths."""
    return [f"{lora('one', 1)};0.7", f"{lora('two', 2)}", f"{lora('turn', 3, oft=True)};1.5"]


@pytest.fixture(scope="module")
def together(inference, files) -> Tensor:
    """The latents of seed 3 with all of them."""
    return latents(inference("--seed", 3, "--lora_weights", *files))


def test_several_files_act_together_and_merging_gives_the_same(inference, files, together, plain):
    merged = latents(inference("--seed", 3, "--merge_lora_weights", "--lora_weights", *files))
    assert difference(together, merged) < 1e-4 * together.abs().max()
    assert difference(together, plain) > 1e-2
    for left_out in range(3):
        fewer = files[:left_out] + files[left_out + 1 :]
        assert difference(together, latents(inference("--seed", 3, "--lora_weights", *fewer))) > 1e-3


def test_files_act_on_the_text_encoders(inference, lora):
    runs = [inference("--seed", 3), inference("--seed", 3, "--lora_weights", lora("one", 1))]
    for run in runs:
        run.encode(run.prompts())
    before, after = (next(iter(run.texts.values())) for run in runs)
    assert difference(before["l_pooled"], after["l_pooled"]) > 1e-3
    assert difference(before["t5_out"], after["t5_out"]) > 1e-3


def test_the_multiplier_scales_the_file(inference, lora, plain):
    assert torch.equal(plain, latents(inference("--seed", 3, "--lora_weights", f"{lora('one', 1)};0")))
    half, whole = (latents(inference("--seed", 3, "--lora_weights", f"{lora('one', 1)};{m}")) for m in (0.5, 1))
    assert difference(plain, half) < difference(plain, whole)


@pytest.mark.parametrize("merge", [(), ("--merge_lora_weights",)], ids=["beside", "merged"])
def test_lora_of_a_model_in_8_bits(inference, files, together, merge):
    in_8_bits = latents(inference("--seed", 3, "--dtype", "fp8", "--lora_weights", *files, *merge))
    assert torch.nn.functional.cosine_similarity(in_8_bits.flatten(), together.flatten(), dim=0) > 0.9


# ---- parts ----------------------------------------------------------------------------------------------------------


def test_offload_gives_the_same_bits_and_keeps_one_part_on_the_device(inference, files, together, monkeypatch):
    run = inference("--seed", 3, "--lora_weights", *files, "--offload", "--cfg_scale", 1)
    seen = moves(run, monkeypatch)
    prompt = run.prompts()[0]
    run.encode([prompt], keep_encoders=True)
    run.texts.clear()
    run.encode([prompt], keep_encoders=True)
    drawn = run.latents(prompt)
    assert torch.equal(drawn, together)
    assert torch.equal(run.decode(drawn), inference().decode(together))
    came_and_went = [(part, what) for part in ("clip_l", "t5xxl") for what in ("load", "cpu")]
    came_back = [(part, what) for part in ("clip_l", "t5xxl") for what in ("device", "cpu")]
    others = [(part, what) for part in ("transformer", "autoencoder") for what in ("load", "cpu")]
    assert seen == came_and_went + came_back + others


@pytest.mark.parametrize("given", [(), ("--merge_lora_weights",), ("--offload", "--flux_dtype", "fp8")])
def test_streamed_blocks_draw_the_same(inference, files, caplog, given):
    """Weights that aren't on the device are NaN in tests. The text encoders are encoded with and drawn from twice."""
    given = ["--seed", 3, "--lora_weights", *files, "--cfg_scale", 2, *given]
    expected = latents(inference(*given))
    run = inference(*given, "--blocks_to_swap", 2, "--stream_text_encoders")
    assert "--blocks_to_swap 2: 2 of 2 double_blocks and 2 of 2 single_blocks are streamed from" in caplog.text
    assert "--stream_text_encoders: t5xxl: 2 of 2 encoder.block are streamed from" in caplog.text
    for _ in range(2):
        assert torch.equal(latents(run), expected)
    stream = run.pipeline.applied["transformer"].stream
    assert stream.misses == 0 or "--offload" in given
    assert (stream.ring == []) == ("--offload" in given), "an idle part takes nothing on the device"


def test_without_offload_parts_are_loaded_once_and_stay(inference, monkeypatch):
    run = inference()
    seen = moves(run, monkeypatch)
    prompts = run.prompts() * 2
    run.encode(prompts)
    for prompt in prompts:
        run.image(prompt)
    assert seen == [(part, "load") for part in ("clip_l", "t5xxl", "transformer", "autoencoder")]


def test_text_encoders_are_gone_before_the_transformer_is_loaded(inference, files):
    run = inference("--lora_weights", *files)
    encoders = []
    enter = run.parts.on_load
    run.parts.on_load = lambda part, module, device: (encoders.append(weakref.ref(module)), enter(part, module, device))
    run.encode(run.prompts())
    assert run.pipeline.modules == {}
    assert [encoder() for encoder in encoders] == [None, None]


def test_a_repeated_text_is_encoded_once(inference, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat --n dog --l 2\ndog --d 1\na cat --d 2\n", encoding="utf-8")
    run = inference("--from_file", path)
    encoded = []
    encode = run.pipeline.encode_prompts
    run.pipeline.encode_prompts = lambda texts, encoders, role: (
        encoded.append((*texts, role, *encoders)) or encode(texts, encoders, role)
    )
    run.encode(run.prompts())
    texts = [("a cat", "positive"), ("dog", "positive"), ("dog", "negative")]
    assert encoded == [(*text, encoder) for encoder in ("clip_l", "t5xxl") for text in texts]


def test_a_session_keeps_the_newest_texts(inference, monkeypatch):
    monkeypatch.setattr("library.generation.inference_run.TEXTS_KEPT", 2)
    run = inference("--interactive")
    for text in ("a", "b", "a", "c"):
        run.encode([PromptOptions(text, scale=1.0)], keep_encoders=True)
    assert [text for (text, _), _ in run.texts] == ["a", "c"]


def test_an_interrupted_start_leaves_no_part_without_its_lora(inference, lora, plain):
    run = inference("--seed", 3, "--lora_weights", lora("one", 1), "--interactive")
    prompt = run.prompts()[0]
    run.encode([prompt], keep_encoders=True)
    module = run.stack.places["transformer"][5].module
    apply, module.apply_to = module.apply_to, lambda: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        run.latents(prompt)
    assert "transformer" not in run.pipeline.modules
    module.apply_to = apply
    assert torch.equal(run.latents(prompt), latents(inference("--seed", 3, "--lora_weights", lora("one", 1))))


def test_a_full_device_is_explained(inference, monkeypatch):
    run = inference("--interactive")
    sentence = "cpu ran out of memory while generating an image of 48x32; use --vram_budget"

    def full(*arguments, **keywords):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def more_than_there_is(*arguments, **keywords):
        torch.empty(2**55)

    def wrong(*arguments, **keywords):
        torch.empty(2) + torch.empty(3)

    for generate in (full, more_than_there_is):
        monkeypatch.setattr(run.pipeline, "generate_latents", generate)
        with pytest.raises(UserError, match=sentence):
            run.draw_line(run.defaults, None)
    monkeypatch.setattr(run.pipeline, "generate_latents", wrong)
    with pytest.raises(RuntimeError, match="size of tensor"):
        run.draw_line(run.defaults, None)


# ---- prompt files and sessions --------------------------------------------------------------------------------------


def test_a_prompt_file_decides_image_by_image(draw, inference, tmp_path):
    path = tmp_path / "prompts.toml"
    path.write_text(
        "[prompt]\nwidth = 32\n[[prompt.subset]]\nprompt = 'a dog'\nseed = 5\nguidance_scale = 1.5\nsample_steps = 1\n"
        "[[prompt.subset]]\nprompt = 'a cat'\nheight = 64\nscale = 2.0\nnegative_prompt = 'dog'\n",
        encoding="utf-8",
    )
    first, second = draw("--from_file", path)
    alone = ["--width", 32, "--prompt", "a dog", "--seed", 5, "--guidance", 1.5, "--steps", 1]
    (expected,) = draw(*alone)
    assert pixels(first) == pixels(expected)
    alone = ["--width", 32, "--prompt", "a cat", "--height", 64, "--cfg_scale", 2, "--negative_prompt", "dog"]
    (expected,) = draw(*alone)
    assert pixels(second) == pixels(expected)


def test_a_session_draws_line_by_line(inference, files, monkeypatch, capsys, tmp_path):
    lines = [
        "a dog --w 32 --s 1 --g 2 --d 5",
        "a cat --m 0.5,0,1 --d 6 --n - --c 3",
        "a cat --m 1,2 --d 6",
        "a cat --w wide",
        "",
        "never drawn",
    ]
    stdin = io.StringIO("\n".join(lines) + "\n")
    monkeypatch.setattr("sys.stdin", stdin)
    drawn = []
    run = inference("--interactive", "--lora_weights", *files)
    monkeypatch.setattr(run, "draw", lambda prompt: drawn.append((prompt, list(run.stack.multipliers))))
    run.run()
    first = PromptOptions("a dog", None, 32, 32, 5, 1, 1.0, 2.0)
    second = PromptOptions("a cat", "", 32, 32, 6, 1, 3.0, 2.0)
    assert drawn == [(first, [0.7, 1.0, 1.5]), (second, [0.5, 0.0, 1.0])]
    printed = capsys.readouterr().out
    assert "--m needs one number for each of the 3 LoRA files; 2 given." in printed
    assert '--w must be a whole number, not "wide"' in printed
    assert sorted(run.pipeline.modules) == ["clip_l", "t5xxl"], "kept for the next line"


def test_trigger_stands_for_the_word_that_the_files_name(inference, lora, monkeypatch, tmp_path, caplog):
    tensors = load_file(lora("one", 1))
    file = tmp_path / "trained.safetensors"
    save_file(tensors, file, {"ss_trigger_word": "sks"})
    (tmp_path / "prompts.txt").write_text("a [trigger] dog --n [trigger]\na cat\n", encoding="utf-8")
    run = inference("--lora_weights", file, "--from_file", tmp_path / "prompts.txt")
    texts = [(prompt.prompt, prompt.negative_prompt) for prompt in run.file_prompts]
    assert texts == [("a sks dog", "sks"), ("a cat", None)]
    monkeypatch.setattr("sys.stdin", io.StringIO("[trigger] --d 1\n"))
    run, drawn = inference("--interactive", "--lora_weights", file), []
    monkeypatch.setattr(run, "draw", lambda prompt: drawn.append(prompt.prompt))
    run.run()
    assert drawn == ["sks"] and "trigger" not in caplog.text
    assert inference("--prompt", "a [trigger]").file_prompts[0].prompt == "a [trigger]"
    assert "no --lora_weights file names a trigger word in its metadata: [trigger] stays as it is" in caplog.text


def test_strengths_change_in_a_session_as_if_given_at_the_start(inference, lora):
    file = lora("one", 1)
    run = inference("--lora_weights", file, "--interactive")
    prompt = PromptOptions("a red cat", None, 48, 32, 3, 2, 1.0, 3.5)
    run.encode([prompt], keep_encoders=True)
    whole = run.latents(prompt)
    run.stack.set_multipliers([0.5])
    run.encode([prompt], keep_encoders=True)
    half = run.latents(prompt)
    assert torch.equal(whole, latents(inference("--seed", 3, "--lora_weights", file)))
    assert torch.equal(half, latents(inference("--seed", 3, "--lora_weights", f"{file};0.5")))


def test_merged_files_keep_their_strength(inference, lora):
    run = inference("--lora_weights", lora("one", 1), "--merge_lora_weights", "--interactive")
    with pytest.raises(UserError, match="--m cannot change files that were merged"):
        run.draw_line(run.defaults, "0.5")


# ---- the image's text ---------------------------------------------------------------------------------------------


def test_the_text_of_a_image_says_how_to_make_it_again(draw, files):
    prompt = 'a cat 猫, "quoted": 50%'
    given = ["--prompt", prompt, "--negative_prompt", "dog", "--cfg_scale", 2, "--guidance", 1.5, "--height", 40]
    (path,) = draw(*given, "--lora_weights", *files)
    text = text_of(path)
    assert text["prompt"] == prompt and (text["width"], text["height"]) == ("48", "48")
    names = json.loads(text["lora-weights"])
    folder = files[0].rpartition("one")[0]
    (again,) = draw(
        *("--prompt", text["prompt"], "--negative_prompt", text["negative-prompt"], "--seed", text["seed"]),
        *("--steps", text["steps"], "--cfg_scale", text["scale"], "--guidance", text["guidance-scale"]),
        *("--width", text["width"], "--height", text["height"], "--dtype", text["dtype"]),
        *("--model_type", text["model-type"], "--t5xxl_max_token_length", text["t5xxl-max-token-length"]),
        *("--lora_weights", *(folder + name for name in names)),
    )
    assert pixels(again) == pixels(path)


def test_files_are_named_by_the_time(draw, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda form: form)
    assert [path.name for path in (*draw(), *draw())] == ["%Y%m%d_%H%M%S.png", "%Y%m%d_%H%M%S_001.png"]


def test_no_metadata_leaves_no_text(draw):
    (path,) = draw("--no_metadata")
    assert text_of(path) == {}


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--ckpt_path", ""], "--ckpt_path is missing"),
        (["--width", "0"], "--width must be at least 1"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--blocks_to_swap", "9"], "--blocks_to_swap 9: this model has 4 blocks, all of which are streamed with 2"),
        (["--block_swap_ring_size", "0"], "--block_swap_ring_size must be at least 1, not 0"),
        (["--seed", str(2**64)], "the seed 18446744073709551616 does not fit into 64 bits"),
        (["--t5xxl_max_token_length", "0"], "--t5xxl_max_token_length must be at least 1"),
        (["--dtype", "bf61"], '--dtype: "bf61" is not a dtype.*Did you mean "bf16"'),
        (["--device", "tpu"], '--device: "tpu" is not a device of this machine'),
        (["--attn_mode", "xformers"], "needs the package xformers"),
        (["--from_file", "a.txt", "--interactive"], "are mutually exclusive"),
        (["--from_file", "no.txt"], "no.txt: there is no such file"),
        (["--lora_weights", "no.safetensors;1"], "there is no file no.safetensors"),
        (["--output_dir", __file__], "--output_dir: cannot write in"),
        (["--lora_weights", f"{__file__};strong"], 'a multiplier must be a number, not "strong"'),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_options_are_one_sentence(inference, arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        inference(*arguments)


def test_wrong_files_are_named(inference, tiny_flux, tmp_path, lora):
    with pytest.raises(UserError, match=r"--ckpt_path: .*clip_l.* a CLIP-L text encoder"):
        inference("--ckpt_path", tiny_flux.clip_l)
    with pytest.raises(UserError, match=r"--ckpt_path: .* is a FLUX.1 file.*--model_type flux"):
        inference("--model_type", "chroma")
    with pytest.raises(UserError, match="none of the|no LoRA"):
        inference("--lora_weights", tiny_flux.clip_l)
    path = tmp_path / "empty.txt"
    path.write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(UserError, match="contains no prompts"):
        inference("--from_file", path)


def test_a_lora_for_another_family_is_named(inference, tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "xl.safetensors"
    name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    save_file({f"{name}.lora_down.weight": torch.ones(4, 8), f"{name}.lora_up.weight": torch.ones(8, 4)}, path)
    with pytest.raises(UserError, match=r"xl\.safetensors is a LoRA for Stable Diffusion XL"):
        inference("--lora_weights", path)


def test_a_lora_of_other_sizes_is_refused_before_loading(inference, tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "large.safetensors"
    name = "lora_unet_double_blocks_0_img_attn_proj"
    save_file({f"{name}.lora_down.weight": torch.ones(4, 3072), f"{name}.lora_up.weight": torch.ones(3072, 4)}, path)
    with pytest.raises(UserError, match="made for another model"):
        inference("--lora_weights", path)


def test_nothing_is_said_twice(inference, lora, caplog):
    path = lora("one", 1)
    caplog.clear()
    latents(inference("--seed", 3, "--lora_weights", path))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == len(set(lines)) and sum("LoRA with" in line for line in lines) == 1


# ---- ControlNet -----------------------------------------------------------------------------------------------------


@pytest.fixture
def control_image(tmp_path):
    path = tmp_path / "edges.png"
    Image.linear_gradient("L").convert("RGB").save(path)
    return path


@pytest.mark.parametrize("offload", [(), ("--offload",)], ids=["", "offload"])
def test_a_control_image_acts_as_in_the_pipeline(inference, tiny_controlnet, control_image, plain, offload, tiny_flux):
    given = ["--seed", 3, "--controlnet_model_name_or_path", tiny_controlnet, *offload]
    controlled = latents(inference(*given, "--controlnet_image", control_image, "--controlnet_strength", "0.6"))
    files = FluxFiles(**vars(tiny_flux), controlnet=tiny_controlnet)
    pipeline = FluxPipeline(files, torch.float32, "cpu", t5xxl_max_token_length=16)
    request = FluxRequest("a red cat", width=48, height=32, seed=3, sample_steps=2)
    request.control_image, request.control_strength = Image.open(control_image), 0.6
    assert torch.equal(controlled, pipeline.generate_latents(request))
    assert difference(controlled, plain) > 1e-3


def test_a_prompts_own_control_image(inference, tiny_controlnet, control_image, plain, caplog, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text(f"a red cat --d 3\na red cat --d 3 --cn {control_image}\n", encoding="utf-8")
    run = inference("--controlnet_model_name_or_path", tiny_controlnet, "--from_file", path)
    assert "generated without the ControlNet" in caplog.text
    prompts = run.prompts()
    run.encode(prompts)
    without, controlled = (run.latents(prompt) for prompt in prompts)
    assert torch.equal(without, plain)
    assert difference(controlled, plain) > 1e-3
    text = run.record(prompts[1]).entries()
    assert (text["control-image"], text["controlnet"]) == ("edges.png", tiny_controlnet.name)
    assert "controlnet" not in run.record(prompts[0]).entries()


def test_control_images_that_cannot_be_used(inference, tiny_controlnet, control_image, tmp_path):
    with pytest.raises(UserError, match="--controlnet_image needs --controlnet_model_name_or_path"):
        inference("--controlnet_image", control_image)
    control_image.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"edges\.png"):
        inference("--controlnet_model_name_or_path", tiny_controlnet, "--controlnet_image", control_image)
