"""Attention Couple and regional LoRA: each part of a prompt, and each network, acts in its region of the image."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from library.errors import UserError
from library.generation.features import Batch
from library.generation.image_prompts import ImagePrompt
from library.generation.network_options import NetworkOptions
from library.generation.regions import PromptRegions, open_regions, read_regions
from library.generation.sampling_options import SamplingOptions
from library.generation.start_images import StartImageOptions, StartImages, open_start_images
from library.models.stable_diffusion.pipeline import StableDiffusionPipeline
from networks import lora
from networks.adapters.image_networks import ImageNetworks, open_networks
from tests.families.stable_diffusion import loaded_pipelines

VARIANTS = ("sd1", "sd2", "sdxl")
FIRST, SECOND = "a red cat", "two blue dogs on a table"
RED, GREEN, YELLOW, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (255, 255, 0), (0, 0, 255), (255,) * 3, (0,) * 3


@pytest.fixture(scope="module")
def pipelines(few_blocks_sd1, few_blocks_sd2, few_blocks_sdxl):
    return loaded_pipelines(dict(zip(VARIANTS, (few_blocks_sd1, few_blocks_sd2, few_blocks_sdxl))))


@pytest.fixture(scope="module")
def lora_file(pipelines, tmp_path_factory):
    """A random LoRA file of this number; of it, the modules whose names hold ``modules``."""
    folder = tmp_path_factory.mktemp("networks")

    @cache
    def make(variant: str, modules: str, number: int) -> str:
        pipeline = pipelines(variant)
        encoders, unet = pipeline.load_text_encoders(), pipeline.load("unet")
        network = lora.create_network(1.0, 4, 4.0, None, encoders, unet, conv_dim="2")
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        path = folder / f"{len(list(folder.iterdir()))}.safetensors"
        save_file({k: t for k, t in network.file_tensors(network.loras).items() if re.search(modules, k)}, path)
        return str(path)

    return make


@pytest.fixture
def networks(pipelines, lora_file):
    """Networks of random LoRA files that act on the U-Net; of them, the modules whose names hold ``modules``."""
    opened: list[ImageNetworks] = []

    def open_(count: int, variant: str = "sd1", modules: str = "", **options: Any) -> ImageNetworks:
        pipeline = pipelines(variant)
        paths = [lora_file(variant, modules, number) for number in range(count)]
        stack = open_networks(NetworkOptions(["networks.lora"] * count, paths, **options), pipeline)
        stack.enter("unet", pipeline.modules["unet"], "cpu")
        opened.append(stack)
        return stack

    yield open_
    for stack in opened:
        stack.leave("unet")


@pytest.fixture
def mask(tmp_path):
    """A mask image of columns of these colours, each of the same width."""

    def draw(*colours: tuple[int, int, int], name: str = "mask.png") -> Path:
        columns = [numpy.full((64, 64 // len(colours), 3), colour, dtype=numpy.uint8) for colour in colours]
        Image.fromarray(numpy.concatenate(columns, axis=1)).save(tmp_path / name)
        return tmp_path / name

    return draw


def start_images(mask: Path | None, networks: Any, image: Path | None = None) -> StartImages | None:
    paths = {name: None if path is None else str(path) for name, path in (("image_path", image), ("mask_path", mask))}
    return open_start_images(StartImageOptions(**paths), SamplingOptions(), regional=bool(networks.acting))


class Drawing:
    """Draws prompts of one pipeline with regions and sees what a layer gives in the first step."""

    def __init__(self, pipeline: StableDiffusionPipeline, mask: Path | None = None, networks: Any = None):
        self.pipeline = pipeline
        networks = networks or open_networks(NetworkOptions(), pipeline)
        self.feature = open_regions(NetworkOptions(), start_images(mask, networks), networks, pipeline)

    def latents(self, *prompts: ImagePrompt, scale: float = 3.0, width: int = 64, watched: Any = None) -> Any:
        """The latents of images of ``prompts``, or the first output of the layer ``watched``."""
        requests, steps = [], 2 if watched is None else 1
        for prompt in prompts:
            request = self.pipeline.request(prompt, scale=scale, width=width, height=64, sample_steps=steps)
            texts = self.pipeline.encode_image_texts(self.pipeline.sub_prompts(prompt.prompt), chunks=1)
            request.sub_conditionings = texts if len(texts) > 1 else ()
            request.conditioning = texts[-1]
            (request.negative_conditioning,) = self.pipeline.encode_image_texts(["blurry"], chunks=1)
            requests.append(request)
        batch = Batch(prompts, requests, [0] * len(prompts), 64, width)
        hooks = [hook for hook in [self.feature.hook(batch)] if hook is not None]
        if watched is None:
            return self.pipeline.generate_latents(*requests, hooks=hooks)
        seen: list[Tensor] = []
        removable = watched.register_forward_hook(lambda module, inputs, output: seen.append(output))
        self.pipeline.generate_latents(*requests, hooks=hooks)
        removable.remove()
        return seen[0]


def prompt(*parts: str, seed: int = 1) -> ImagePrompt:
    return ImagePrompt(" AND ".join(parts), seed=seed)


def error(values: Tensor, expected: Tensor) -> float:
    return ((values - expected).abs().max() / expected.abs().max()).item()


def first_transformer(pipeline: StableDiffusionPipeline) -> Any:
    unet = pipeline.modules["unet"]
    return next(m for m in unet.modules() if type(m).__name__ == "Transformer2DModel").transformer_blocks[0]


def halves(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The left and the right half of the features of each row, which are square."""
    side = int(tokens.shape[1] ** 0.5)
    return tokens.unflatten(1, (side, side)).chunk(2, dim=2)  # type: ignore[return-value]


# ---- Attention Couple -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "colours"), [("sd1", ()), *((variant, ((200, 50, 0), (10, 240, 90))) for variant in VARIANTS)]
)
def test_equal_parts_are_the_plain_prompt(pipelines, mask, variant, colours):
    """Without any LoRA, whatever the masks are; also of another aspect."""
    drawing = Drawing(pipelines(variant), mask(*colours) if colours else None)
    for scale, width in ((3.0, 72), (1.0, 64)):
        plain = drawing.latents(prompt(FIRST), scale=scale, width=width)
        assert error(drawing.latents(prompt(FIRST, FIRST, FIRST), scale=scale, width=width), plain) < 1e-3
    assert error(drawing.latents(prompt(FIRST, SECOND), scale=scale), plain) > 1e-3


def test_a_part_acts_in_its_region(pipelines, mask):
    """What the first cross-attention gives on the left is what the first part alone gives there, and so on."""
    pipeline = pipelines("sd1")
    layer = first_transformer(pipeline).attn2
    drawing = Drawing(pipeline, mask(RED, GREEN))
    coupled = halves(drawing.latents(prompt(FIRST, SECOND), watched=layer))
    alone = [halves(drawing.latents(prompt(text), watched=layer)) for text in (FIRST, SECOND)]
    for side in (0, 1):
        negative, positive = coupled[side]
        assert torch.equal(negative, alone[side][side][0]), "negative prompts act everywhere"
        inner = slice(0, 3) if side == 0 else slice(1, 4)  # where the regions meet, masks are mixed
        assert error(positive[:, inner], alone[side][side][1][:, inner]) < 1e-5
        assert error(positive[:, inner], alone[1 - side][side][1][:, inner]) > 1e-3


def test_where_regions_overlap_the_mean_of_their_parts_acts(pipelines, mask):
    """Channels with nothing, and parts beyond the masks, are the whole image."""
    pipeline = pipelines("sd1")
    layer = first_transformer(pipeline).attn2
    one, two = (Drawing(pipeline).latents(prompt(text), watched=layer)[1] for text in (FIRST, SECOND))
    for parts, colour, expected in (
        ((FIRST, SECOND), YELLOW, (one + two) / 2),
        ((FIRST, FIRST, SECOND), RED, (2 * one + two) / 3),  # green and blue are empty
        ((FIRST, FIRST, FIRST, SECOND), WHITE, (3 * one + two) / 4),
        ((FIRST, SECOND), (51, 204, 0), (one + 4 * two) / 5),
    ):
        drawing = Drawing(pipeline, mask(colour))
        assert error(drawing.latents(prompt(*parts), watched=layer)[1], expected) < 1e-5


def test_images_of_a_batch_are_drawn_as_alone(pipelines, mask, networks):
    drawing = Drawing(pipelines("sd1"), mask(RED, GREEN), networks(2))
    prompts = [prompt(FIRST, SECOND), prompt(SECOND, "a green bird", seed=2)]
    together = drawing.latents(*prompts)
    for row, each in enumerate(prompts):
        assert error(together[row], drawing.latents(each)[0]) < 1e-5


@pytest.mark.parametrize(
    "pre_calc", [pytest.param(False, id="beside", marks=pytest.mark.thorough), pytest.param(True, id="pre-calculated")]
)
def test_afterwards_the_model_is_as_before(pipelines, mask, networks, pre_calc):
    """Also the networks: --network_pre_calc is off while they act in regions."""
    pipeline = pipelines("sd1")
    stack = networks(2, network_pre_calc=pre_calc)
    plain = Drawing(pipeline)
    before = plain.latents(prompt(FIRST))
    regional = Drawing(pipeline, mask(RED, GREEN), stack).latents(prompt(FIRST, SECOND))
    assert torch.equal(plain.latents(prompt(FIRST)), before)
    stack.leave("unet")
    assert not any("forward" in vars(m) for m in pipeline.modules["unet"].modules() if isinstance(m, torch.nn.Linear))
    stack.enter("unet", pipeline.modules["unet"], "cpu")
    assert torch.equal(Drawing(pipeline, mask(RED, GREEN), stack).latents(prompt(FIRST, SECOND)), regional)


# ---- regional LoRA --------------------------------------------------------------------------------------------------


def test_a_network_acts_in_its_region(pipelines, mask, networks):
    """Of a layer before any neighbour is seen: inside, as with the network everywhere; outside, as without."""
    pipeline = pipelines("sd1")
    layer = pipeline.modules["unet"].down_blocks[0].resnets[0].conv1
    without = Drawing(pipeline).latents(prompt(FIRST, SECOND), watched=layer)
    stack = networks(1)
    everywhere = Drawing(pipeline).latents(prompt(FIRST, SECOND), watched=layer)
    regional = Drawing(pipeline, mask(RED, GREEN), stack).latents(prompt(FIRST, SECOND), watched=layer)
    left, right = slice(0, 3), slice(5, 8)
    assert torch.equal(regional[..., right], without[..., right])
    assert (
        error(regional[..., left], everywhere[..., left]) < 1e-5 < 1e-3 < error(regional[..., left], without[..., left])
    )


@pytest.mark.parametrize("variant", [pytest.param("sd1", marks=pytest.mark.thorough), "sdxl"])
def test_one_network_for_the_whole_image_is_the_network_itself(pipelines, mask, networks, variant):
    pipeline, stack = pipelines(variant), networks(1, variant)
    everywhere = Drawing(pipeline).latents(prompt(FIRST), scale=1.0)
    regional = Drawing(pipeline, mask(WHITE), stack)
    assert regional.feature.acts_on(prompt(FIRST))
    assert error(regional.latents(prompt(FIRST), scale=1.0), everywhere) < 1e-3
    stack.set_multipliers([0.0])
    plain = Drawing(pipeline).latents(prompt(FIRST))
    assert error(regional.latents(prompt(FIRST)), plain) < 1e-5 < 1e-3 < error(plain, everywhere)


def test_each_network_belongs_to_its_part(pipelines, mask, networks):
    """What a network changes of a text's keys and values, and of what is read from them, it changes of its part's."""
    pipeline = pipelines("sd1")
    layer = first_transformer(pipeline).attn2
    alone = []
    for number, text in enumerate((FIRST, SECOND)):
        stack = networks(2, modules="attn2_to_(k|v|out)")
        stack.set_multipliers([1.0 - number, float(number)])
        alone.append(halves(Drawing(pipeline).latents(prompt(text), watched=layer)))
        stack.leave("unet")
    without = halves(Drawing(pipeline).latents(prompt(FIRST), watched=layer))
    stack = networks(2, modules="attn2_to_(k|v|out)")
    coupled = halves(Drawing(pipeline, mask(RED, GREEN), stack).latents(prompt(FIRST, SECOND), watched=layer))
    for side, inner in ((0, slice(0, 3)), (1, slice(1, 4))):
        negative, positive = coupled[side]
        assert torch.equal(negative, without[side][0]), "no network is for the negative prompt"
        assert error(positive[:, inner], alone[side][side][1][:, inner]) < 1e-5
        assert error(positive[:, inner], without[side][1][:, inner]) > 1e-3


def test_texts_are_encoded_with_the_network_of_their_part(pipelines, mask, networks):
    stack = networks(2, network_mul=[0.5, 0.7])
    couple = prompt(FIRST, SECOND)
    regional = Drawing(pipelines("sd1"), mask(RED, GREEN), stack).feature
    assert regional.text_strengths(couple, "positive", 0) == (0.5, 0.0)
    assert regional.text_strengths(couple, "positive", 1) == (0.0, 0.7)
    assert regional.text_strengths(couple, "negative", 0) == (0.0, 0.0)
    without_mask = Drawing(pipelines("sd1"), None, stack).feature
    assert without_mask.text_strengths(couple, "negative", 0) == (0.5, 0.7)


# ---- masks and mistakes ---------------------------------------------------------------------------------------------


def test_colour_codes(mask):
    """--network_regional_mask_max_color_codes: whole colours, in the order of the documentation."""
    colours = (RED, GREEN, YELLOW, BLUE, (255, 0, 255), (0, 255, 255), WHITE, BLACK)
    regions = read_regions(mask(*colours), 7)
    assert regions.shape == (7, 64, 64)
    for number in range(7):
        expected = torch.zeros(64)
        expected[8 * number : 8 * number + 8] = 1
        assert torch.equal(regions[number], expected.expand(64, 64))
    assert torch.equal(read_regions(mask(RED, BLACK), 2)[1], torch.ones(64, 64)), "a colour that is not there"
    channels = read_regions(mask(WHITE, YELLOW, (0, 51, 0), BLACK), None)
    assert channels[:, 0, ::16].tolist() == [[1, 1, 0, 0], [1, 1, pytest.approx(0.2), 0], [1, 0, 0, 0]]


def test_a_mask_gives_regions_or_what_is_drawn_over(pipelines, mask, networks):
    """--mask_path: with a start image and a single part, it is for inpainting."""
    stack = networks(1)
    for image, expected in ((mask(RED, name="start.png"), [False, True]), (None, [True, True])):
        start = start_images(mask(RED), stack, image)
        feature = open_regions(NetworkOptions(), start, stack, pipelines("sd1"))
        assert [feature.limits_networks(each) for each in (prompt(FIRST), prompt(FIRST, SECOND))] == expected


def test_images_that_are_drawn_together_have_as_many_parts(pipelines):
    key = Drawing(pipelines("sd1")).feature.key
    assert key(prompt(FIRST, SECOND)) == key(prompt(SECOND, FIRST)) != key(prompt(FIRST))


@pytest.mark.parametrize(
    ("has_mask", "codes", "sentence"),
    [
        (False, 2, "needs --mask_path"),
        (True, 8, "must be between 1 and 7, not 8"),
        (True, 0, "must be between 1 and 7, not 0"),
    ],
)
def test_mistakes(pipelines, mask, has_mask, codes, sentence):
    """--network_regional_mask_max_color_codes"""
    options = NetworkOptions(network_regional_mask_max_color_codes=codes)
    none = open_networks(NetworkOptions(), pipelines("sd1"))
    with pytest.raises(UserError, match=f"--network_regional_mask_max_color_codes {sentence}"):
        open_regions(options, start_images(mask(RED) if has_mask else None, none), none, pipelines("sd1"))


def test_more_networks_than_parts_are_refused(pipelines, mask, networks):
    feature: PromptRegions = Drawing(pipelines("sd1"), mask(RED, GREEN), networks(2)).feature
    feature.check(prompt(FIRST, SECOND), "")
    with pytest.raises(UserError, match="prompt 3: 2 networks need a part of the prompt each.*the prompt has 1"):
        feature.check(prompt(FIRST), "prompt 3: ")


def test_strengths_without_a_network_are_named(pipelines, networks, caplog):
    """--am"""
    feature = Drawing(pipelines("sd1"), None, networks(1)).feature
    feature.check(ImagePrompt("a cat", network_mul=(0.5,)), "line 1: ")
    assert "--am" not in caplog.text
    feature.check(ImagePrompt("a cat", network_mul=(0.5, 1.0)), "line 2: ")
    assert "line 2: --am: only the first 1 values have an effect" in caplog.text
