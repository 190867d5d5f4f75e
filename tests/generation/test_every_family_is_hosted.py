"""The course of an inference script needs nothing of FLUX: a small script for Stable Diffusion runs on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from library.families import STABLE_DIFFUSION
from library.generation.image_files import ImageFileOptions
from library.generation.inference_run import InferenceRun
from library.generation.lora_files import LoraFileOptions
from library.generation.part_dtypes import DtypeOptions
from library.generation.parts import DeviceOptions
from library.generation.prompts import ImageOptions, PromptSourceOptions
from library.generation.session import SessionGrammar
from library.memory.streaming_options import StreamingOptions
from library.models.stable_diffusion.pipeline import StableDiffusionFiles, StableDiffusionPipeline
from library.prompt_options import PromptOptions
from networks import lora
from networks.adapters.network_stack import NetworkStack

PROMPT = PromptOptions("a red cat", "a dog", width=64, height=64, sample_steps=2, seed=5, scale=3.0)


@dataclass
class Options:
    """The groups that every inference script has."""

    model: Path
    image: ImageOptions = field(default_factory=ImageOptions)
    sources: PromptSourceOptions = field(default_factory=PromptSourceOptions)
    lora: LoraFileOptions = field(default_factory=LoraFileOptions)
    output: ImageFileOptions = field(default_factory=ImageFileOptions)
    dtypes: DtypeOptions = field(default_factory=lambda: DtypeOptions("fp32"))
    device: DeviceOptions = field(default_factory=lambda: DeviceOptions("cpu", offload=True))
    streaming: StreamingOptions = field(default_factory=StreamingOptions)


class StableDiffusionInference(InferenceRun[PromptOptions]):
    """As little as a family has to say."""

    script = "this test"
    family = STABLE_DIFFUSION
    sampler = "euler"
    session = SessionGrammar({}, (), "")
    denoiser = "unet"
    dtype_options = dict.fromkeys(("unet", "autoencoder", "text_encoder"), "dtype")
    pipeline: StableDiffusionPipeline

    def open_pipeline(self) -> StableDiffusionPipeline:
        return StableDiffusionPipeline(StableDiffusionFiles(self.options.model), torch.float32, "cpu")

    def open_loras(self) -> NetworkStack:
        files = [(file.path, file.multiplier) for file in self.lora_files]
        return NetworkStack.of_pipeline(
            self.pipeline, files, lambda keys: lora, self.pipeline.encoders, [STABLE_DIFFUSION]
        )

    def default_prompt(self) -> PromptOptions:
        return PROMPT

    def request(self, prompt: PromptOptions) -> Any:
        return self.pipeline.request(prompt, sampler=self.sampler)


@pytest.fixture(scope="module")
def pipeline(few_blocks_sd1) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(StableDiffusionFiles(few_blocks_sd1), torch.float32, "cpu")


@pytest.fixture
def draw(few_blocks_sd1, tmp_path):
    """The one image that the script draws with these LoRA files."""

    def run(*files: str) -> Image.Image:
        folder = tmp_path / f"images_{len(files)}"
        options = Options(few_blocks_sd1, lora=LoraFileOptions(list(files)), output=ImageFileOptions(str(folder)))
        StableDiffusionInference(options).run()
        (path,) = folder.glob("*.png")
        return Image.open(path)

    return run


def test_the_image_is_the_pipelines(draw, pipeline, few_blocks_sd1):
    drawn = draw()
    expected = pipeline.generate(pipeline.request(PROMPT, sampler="euler"))
    assert numpy.array_equal(drawn, expected)
    assert drawn.text["negative-prompt"] == "a dog" and drawn.text["model"] == few_blocks_sd1.name


def test_a_lora_file_acts_on_text_encoder_and_unet(draw, pipeline, few_blocks_sd1, tmp_path):
    network = lora.create_network(1.0, 4, 2.0, None, pipeline.load("text_encoder"), pipeline.load("unet"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    network.save_weights(tmp_path / "lora.safetensors", None, {})
    drawn = draw(f"{tmp_path / 'lora.safetensors'};0.7")
    with_network = StableDiffusionPipeline(StableDiffusionFiles(few_blocks_sd1), torch.float32, "cpu")
    parts = [with_network.load(part) for part in ("text_encoder", "unet")]
    loaded, _ = lora.create_network_from_weights(0.7, tmp_path / "lora.safetensors", None, *parts, for_inference=True)
    loaded.apply_to(*parts, True, True)
    loaded.load_weights(tmp_path / "lora.safetensors")
    expected = with_network.generate(with_network.request(PROMPT, sampler="euler"))
    assert numpy.array_equal(drawn, expected)
    assert not numpy.array_equal(drawn, pipeline.generate(pipeline.request(PROMPT, sampler="euler")))
