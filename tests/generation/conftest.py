"""LoRA files for the tiny FLUX.1, and the inference script in this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flux_minimal_inference import FluxInference, FluxInferenceOptions
from library.generation.model_options import ModelOptions
from library.memory.streaming_options import StreamingOptions
from library.models.flux.pipeline import FluxFiles, FluxPipeline
from library.options import parse_options
from tests.generation.drawing import write_random_network


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_flux) -> FluxPipeline:
    """The tiny model itself, all of it loaded."""
    pipeline = FluxPipeline(FluxFiles(**vars(tiny_flux)), torch.float32, "cpu", t5xxl_max_token_length=16)
    pipeline.load_transformer()
    pipeline.load_text_encoders()
    return pipeline


@pytest.fixture(scope="session")
def lora(tiny_pipeline, tmp_path_factory):
    """Write a LoRA (or OFT) file with random weights: of the transformer, CLIP-L and T5, as requested."""
    from networks import lora_flux, oft_flux

    folder = tmp_path_factory.mktemp("lora")

    def make(name: str, seed: int, encoders: bool = True, oft: bool = False) -> Path:
        path = folder / f"{name}.safetensors"
        module = oft_flux if oft else lora_flux
        text_encoders = [tiny_pipeline.modules[part] if encoders else None for part in ("clip_l", "t5xxl")]
        arguments = {} if oft else {"train_t5xxl": "True"}
        transformer, alpha = tiny_pipeline.modules["transformer"], 0.5 if oft else 2.0
        return write_random_network(path, module, text_encoders, transformer, seed, alpha, **arguments)

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


@pytest.fixture(scope="session")
def share_parts() -> Callable[[Any], Any]:
    """Give a run of gen_img.py the parts that runs before it have loaded of its model, and keep what it loads.

    Each run has a pipeline and settings of its own; only weights are shared. A run whose options change the parts
    themselves loads its own ones; where these are networks, its autoencoder is still a shared one.
    """
    loaded: dict[str, dict[str, Any]] = {}

    def share(run: Any) -> Any:
        options, pipeline = run.options, run.pipeline
        ckpt = options.model.ckpt
        model = replace(options.model, v_parameterization=False, zero_terminal_snr=False, vae_slices=None)
        has_words = options.text.textual_inversion_embeddings or options.text.XTI_embeddings
        is_placed = options.device.offload or options.streaming != StreamingOptions()
        if model != ModelOptions(ckpt=ckpt) or has_words or is_placed:
            return run
        shared = loaded.setdefault(ckpt, {})
        if not options.networks.network_module:
            pipeline.modules = shared
        else:
            pipeline.modules.update({part: module for part, module in shared.items() if part == "autoencoder"})
            shared["autoencoder"] = pipeline.load_autoencoder()
        return run

    return share


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
