"""LoRA files for the tiny FLUX.1, and the inference script in this process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flux_minimal_inference import FluxInference, FluxInferenceOptions
from library.models.flux.pipeline import FluxFiles, FluxPipeline
from library.options import parse_options


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_flux) -> FluxPipeline:
    """The tiny model itself, all of it loaded."""
    pipeline = FluxPipeline(FluxFiles(**vars(tiny_flux)), torch.float32, "cpu", t5xxl_max_token_length=16)
    pipeline.load_transformer()
    pipeline.load_text_encoders()
    return pipeline


@pytest.fixture(scope="session")
def lora(tiny_pipeline, tmp_path_factory):
    """Write a LoRA (or OFT) file with random weights: of the transformer, CLIP-L and T5, as asked for."""
    from networks import lora_flux, oft_flux

    folder = tmp_path_factory.mktemp("lora")

    def make(name: str, seed: int, encoders: bool = True, oft: bool = False) -> Path:
        path = folder / f"{name}.safetensors"
        module = oft_flux if oft else lora_flux
        text_encoders = [tiny_pipeline.modules[part] if encoders else None for part in ("clip_l", "t5xxl")]
        arguments = {} if oft else {"train_t5xxl": "True"}
        network = module.create_network(
            1.0, 4, 0.5 if oft else 2.0, None, text_encoders, tiny_pipeline.modules["transformer"], **arguments
        )
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        network.save_weights(path, None, {})
        return path

    return make


@pytest.fixture(scope="session")
def inference_command(tiny_flux) -> list[object]:
    """Options of the script that name the tiny model and a small quick image."""
    return [
        *("--ckpt_path", tiny_flux.transformer, "--clip_l", tiny_flux.clip_l, "--t5xxl", tiny_flux.t5xxl),
        *("--ae", tiny_flux.autoencoder, "--width", "48", "--height", "32", "--steps", "2", "--dtype", "float32"),
        *("--t5xxl_max_token_length", "16", "--prompt", "a red cat"),
    ]


@pytest.fixture(scope="session")
def inference(inference_command, tmp_path_factory):
    """The script's run with more options, ready to draw."""
    folder = tmp_path_factory.mktemp("out")

    def make(*arguments: object) -> FluxInference:
        given = [*inference_command, "--output_dir", folder, *arguments]
        return FluxInference(parse_options(FluxInferenceOptions, "", [str(argument) for argument in given]))

    return make


@pytest.fixture
def draw(inference, tmp_path):
    """Draw with more options; the new image files in order."""

    def run(*arguments: object) -> list[Path]:
        before = set(tmp_path.glob("*.png"))
        inference("--seed", 7, "--output_dir", tmp_path, *arguments).run()
        return sorted(set(tmp_path.glob("*.png")) - before)

    return run


@pytest.fixture(autouse=True)
def every_line_is_seen(caplog) -> None:
    """What the script says is in ``caplog``."""
    caplog.set_level("INFO", logger="library")
