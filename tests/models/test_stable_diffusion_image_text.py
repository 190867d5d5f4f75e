"""Texts of images: weights, BREAK, AND, long texts; against diffusers' plain encoding and the formulas in float64."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from library.models.stable_diffusion.image_text import ImageTexts, image_chunks, normalized
from library.models.stable_diffusion.pipeline import StableDiffusionFiles, StableDiffusionPipeline
from library.models.stable_diffusion.prompt_weights import parts_between_breaks, sub_prompts

# The tiny models' tokenizers have a token for each letter, so the texts here are of letters.
STATES = {"sd1": ("hidden_state",), "sd2": ("hidden_state",), "sdxl": ("hidden_state1", "hidden_state2")}
VARIANTS = sorted(STATES)


@pytest.fixture(scope="module")
def pipelines(few_blocks_sd1, few_blocks_sd2, few_blocks_sdxl):
    paths = {"sd1": few_blocks_sd1, "sd2": few_blocks_sd2, "sdxl": few_blocks_sdxl}
    return {
        variant: StableDiffusionPipeline(
            StableDiffusionFiles(path), torch.float32, "cpu", image_texts=ImageTexts(max_chunks=3)
        )
        for variant, path in paths.items()
    }


def encoded(pipeline: StableDiffusionPipeline, text: str, chunks: int = 1) -> dict[str, torch.Tensor]:
    return pipeline.encode_image_texts([text], chunks=chunks)[0]


# ---- against others -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("text", ["", "a photo of a red cat, 4k!", "x " * 75])
def test_a_plain_text_is_encoded_as_training_encodes_the_prompts_of_its_samples_bit_for_bit(pipelines, variant, text):
    pipeline = pipelines[variant]
    ours, training = encoded(pipeline, text), pipeline.encode_prompts([text])
    assert ours.keys() == training.keys()
    assert all(torch.equal(ours[name], training[name]) for name in ours)


def diffusers_encode(pipeline: StableDiffusionPipeline, text: str) -> dict[str, torch.Tensor]:
    """The conditioning as diffusers' own pipelines make it of our modules."""
    from diffusers import StableDiffusionPipeline as SdPipeline
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
    from transformers.models.clip.configuration_clip import CLIPTextConfig

    models = []
    for encoder, module in zip(pipeline.encoders, pipeline.load_text_encoders()):
        tokenizer = pipeline.tokenizers[encoder]
        config = CLIPTextConfig(**asdict(module.config), eos_token_id=tokenizer.eos_token_id)
        if module.text_projection is None:
            model = CLIPTextModel(config).eval()
            model.load_state_dict(module.text_model.state_dict())
        else:
            config.projection_dim = module.text_projection.out_features
            model = CLIPTextModelWithProjection(config).eval()
            model.load_state_dict(module.state_dict())
        models.append(model)
    tokenizers = []
    for encoder in pipeline.encoders:
        ours = pipeline.tokenizers[encoder]
        tokenizers.append(CLIPTokenizer(vocab=ours.get_vocab(), merges=[], model_max_length=77))
        tokenizers[-1].pad_token_id = ours.pad_token_id
    empty = {"scheduler": None, "vae": None, "unet": None}
    with torch.no_grad():
        if pipeline.variant == "sdxl":
            xl = StableDiffusionXLPipeline(
                **empty,
                text_encoder=models[0],
                text_encoder_2=models[1],
                tokenizer=tokenizers[0],
                tokenizer_2=tokenizers[1],
            )
            states, _, pooled, _ = xl.encode_prompt(text, device="cpu", do_classifier_free_guidance=False)
            widths = [model.config.hidden_size for model in models]
            first, second = states.split(widths, dim=-1)
            return {"hidden_state1": first, "hidden_state2": second, "pool2": pooled}
        plain = SdPipeline(
            **empty,
            text_encoder=models[0],
            tokenizer=tokenizers[0],
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        states, _ = plain.encode_prompt(text, "cpu", 1, False)
    return {"hidden_state": states}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_plain_text_is_encoded_as_diffusers_encodes_it(pipelines, variant):
    text = "a photo of a red cat in the rain, 4k!"
    reference = diffusers_encode(pipelines[variant], text)
    ours = encoded(pipelines[variant], text)
    assert ours.keys() == reference.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], reference[name], rtol=0, atol=2e-5)


def test_clip_skip_names_the_layer_of_both_encoders_of_xl(few_blocks_sdxl):
    """--clip_skip of XL counts from the last layer, 2 is what it takes anyway; the pooled text stays."""
    first, second, unset = (
        StableDiffusionPipeline(StableDiffusionFiles(few_blocks_sdxl), torch.float32, "cpu", clip_skip=layer)
        for layer in (1, 2, None)
    )
    texts = [encoded(pipeline, "a cat") for pipeline in (first, second, unset)]
    for number in (1, 2):
        name = f"hidden_state{number}"
        module = first.load_text_encoders()[number - 1]
        ids = first.tokenize(["a cat"])[first.encoders[number - 1]].ids[:, 0]
        layers = module.text_model(ids).hidden_states
        assert torch.equal(texts[0][name], layers[-1]) and torch.equal(texts[1][name], layers[-2])
        assert torch.equal(texts[2][name], texts[1][name])
    assert torch.equal(texts[0]["pool2"], texts[1]["pool2"])


# ---- long texts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_76_tokens_need_two_chunks_whose_outputs_are_joined_whole(pipelines, variant):
    pipeline = pipelines[variant]
    words = ["r"] * 76
    assert pipeline.chunks_needed([" ".join(words[:75])]) == 1
    assert pipeline.chunks_needed(["a cat", " ".join(words)]) == 2
    whole = encoded(pipeline, " ".join(words), chunks=2)
    halves = [encoded(pipeline, text) for text in (" ".join(words[:75]), "r")]
    for name in STATES[variant]:
        assert whole[name].shape[1] == 154
        torch.testing.assert_close(whole[name], torch.cat([half[name] for half in halves], dim=1))
    if variant == "sdxl":
        torch.testing.assert_close(whole["pool2"], halves[0]["pool2"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_short_text_beside_a_long_one_is_filled_up_with_empty_chunks(pipelines, variant):
    pipeline = pipelines[variant]
    filled, short, empty = encoded(pipeline, "a cat", 2), encoded(pipeline, "a cat"), encoded(pipeline, "")
    for name in STATES[variant]:
        torch.testing.assert_close(filled[name], torch.cat((short[name], empty[name]), dim=1))


def test_a_text_is_cut_after_max_embeddings_multiples_with_a_warning(pipelines, caplog):
    pipeline = pipelines["sd1"]
    assert pipeline.chunks_needed(["c " * 300]) == 3
    assert pipeline.chunks_needed(["c " * 300, "c"]) == 3
    assert caplog.text.count("is cut after 3 x 75; use --max_embeddings_multiples 4 or more") == 1
    torch.testing.assert_close(
        encoded(pipeline, "c " * 300, 3)["hidden_state"], encoded(pipeline, "c " * 225, 3)["hidden_state"]
    )


# ---- weights --------------------------------------------------------------------------------------------------------


def formula(plain: torch.Tensor, weights: torch.Tensor, mode: str) -> torch.Tensor:
    """The weighted states in float64."""
    wide = plain.double()
    weighted = wide * weights.double()[:, None]
    if mode == "original":
        weighted *= wide.mean() / weighted.mean()
    if mode == "abs":
        weighted *= wide.abs().mean() / weighted.abs().mean()
    return weighted


@pytest.mark.parametrize("mode", ["original", "abs", "none"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_act_as_emb_normalize_mode_says(pipelines, variant, mode):
    """--emb_normalize_mode; the mean is that of the whole text, not of a chunk, and the pooled text has no weights."""
    pipeline = pipelines[variant]
    pipeline.image_texts = ImageTexts(3, mode)
    try:
        weighted = encoded(pipeline, "a (r:1.5) c [o] a (h" + " b" * 75 + ":0.5)", 2)
        plain = encoded(pipeline, "a r c o a h" + " b" * 75, 2)
    finally:
        pipeline.image_texts = ImageTexts(3)
    weights = torch.ones(154)
    weights[2], weights[4] = 1.5, 1 / 1.1
    weights[6:76] = weights[78:84] = 0.5  # 70 tokens in the first chunk, 6 in the second
    for name in STATES[variant]:
        expected = formula(plain[name], weights, mode)
        torch.testing.assert_close(weighted[name].double(), expected, rtol=1e-4, atol=1e-5)
    if variant == "sdxl":
        assert torch.equal(weighted["pool2"], plain["pool2"])


@pytest.mark.parametrize("mode", ["original", "abs", "none"])
def test_weights_of_1_change_nothing(pipelines, mode):
    pipeline = pipelines["sd1"]
    pipeline.image_texts = ImageTexts(3, mode)
    try:
        weighted = encoded(pipeline, "a (r:1.0) (([c]:1.1):1)")
    finally:
        pipeline.image_texts = ImageTexts(3)
    assert torch.equal(encoded(pipeline, "a (r:1.0) c")["hidden_state"], encoded(pipeline, "a r c")["hidden_state"])
    torch.testing.assert_close(weighted, encoded(pipeline, "a r c"))


def test_a_mean_of_zero_scales_nothing():
    plain = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    weighted = torch.tensor([[[1.0, -1.0], [2.0, -2.0]]])
    assert torch.equal(normalized(weighted, plain, "original"), weighted)
    assert torch.equal(normalized(weighted * 0, plain, "abs"), weighted * 0)


# ---- BREAK and AND --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_break_lets_a_text_go_on_in_the_next_chunk(pipelines, variant):
    pipeline = pipelines[variant]
    assert pipeline.chunks_needed(["a red cat BREAK a dog"]) == 2
    whole = encoded(pipeline, "a red cat BREAK a dog", 2)
    first, second = encoded(pipeline, "a red cat"), encoded(pipeline, "a dog")
    for name in STATES[variant]:
        torch.testing.assert_close(whole[name], torch.cat((first[name], second[name]), dim=1))
    if variant == "sdxl":
        torch.testing.assert_close(whole["pool2"], first["pool2"])


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("r " * 75 + "BREAK b", [75, 1]),  # at the border of a chunk it adds nothing
        ("BREAK r BREAK BREAK b BREAK", [1, 1]),
        ("BREAKFAST", None),  # only as a word of its own
        ("break", [5]),
        ("BREAK", [0]),
        ("r " * 80 + "BREAK b " + "r " * 75, [75, 5, 75, 1]),
    ],
)
def test_break_is_a_word_that_adds_no_empty_chunk(pipelines, text, lengths):
    chunks = image_chunks(pipelines["sd1"].tokenizer("text_encoder"), text)
    if lengths is None:
        assert len(chunks) == 1 and chunks[0].ids
    else:
        assert [len(chunk.ids) for chunk in chunks] == lengths


def test_brackets_reach_over_a_break():
    parts = parts_between_breaks("(a BREAK b:1.5) c")
    assert parts == [[("a ", 1.5)], [(" b", 1.5), (" c", 1.0)]]


def test_and_divides_a_prompt_into_sub_prompts():
    assert sub_prompts("2girls, smile AND girl, back  AND 2girls") == ["2girls, smile", "girl, back", "2girls"]
    assert sub_prompts("salt and pepper, SAND, AND") == ["salt and pepper, SAND, AND"]


@given(st.lists(st.text(alphabet="ab ()[]:.1\\", max_size=12), max_size=5))
def test_parts_between_breaks_lose_no_letter(texts):
    parts = parts_between_breaks(" BREAK ".join(texts))
    kept = "".join(piece for part in parts for piece, _ in part)
    assert [c for c in kept if c in "ab"] == [c for c in "".join(texts) if c in "ab"]
    assert len(parts) == max(1, len(texts))
