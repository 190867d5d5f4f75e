"""The models of a family whose weights LoRA files change: here, in Diffusers, and by the names of LoRA files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from networks.adapters.lora_targets import Rules

Weights = dict[str, Tensor]


@dataclass(eq=False)
class Workbench:
    """Small random models of a family; ``encoders`` in the order of its networks, None for one that it lacks."""

    family: str
    lora: Any
    """The family's LoRA module."""
    oft: Any
    unet: nn.Module
    encoders: list[nn.Module | None]
    rules: Rules
    tree: nn.Module
    """The U-Net or transformer under the paths of LoRA files."""
    parts: Sequence[str]
    """What ComfyUI calls the text encoders."""
    pipeline: Any = None
    """Diffusers' pipeline, or its transformer where that loads LoRA files itself."""
    their_state: Callable[[Weights], Weights] | None = None
    """The transformer's tensors under Diffusers' names; None where it is Diffusers' own model."""
    paths: list[tuple[str, str, str]] = field(init=False)
    """The part, the path in it and the name in our LoRA files of each layer; ``unet`` is the U-Net or transformer."""
    layers: dict[str, Any] = field(init=False)
    """Every layer with a weight, by the name that our LoRA files would give it."""
    weights: Weights = field(init=False)
    """The weight of each layer."""

    def __post_init__(self) -> None:
        self.paths, self.layers = [], {}
        encoders = zip(self.parts, self.rules.text_encoders, self.encoders)
        for part, table, model in (*encoders, ("unet", self.rules.transformer, self.tree)):
            for path, layer in _with_weights(model) if model is not None else ():
                name = f"{table.prefix}.{table.file_path(path)}".replace(".", "_")
                self.paths.append((part, table.file_path(path), name))
                self.layers[name] = layer
        self.weights = {name: layer.weight.detach().clone() for name, layer in self.layers.items()}

    def merged(self, merge: Callable[[], None]) -> Weights:
        """The weights after ``merge``, which are then what they were."""
        biases = {name: layer.bias for name, layer in self.layers.items() if getattr(layer, "bias", None) is not None}
        kept = {name: bias.detach().clone() for name, bias in biases.items()}
        merge()
        found = {name: layer.weight.detach().clone() for name, layer in self.layers.items()}
        with torch.no_grad():
            for name, layer in self.layers.items():
                layer.weight.copy_(self.weights[name])
            for name, bias in kept.items():
                biases[name].copy_(bias)
        return found


def _with_weights(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, module in model.named_modules():
        if isinstance(getattr(module, "weight", None), Tensor) and not isinstance(module, nn.Embedding):
            yield path, module


def randomised(network: nn.Module, size: float = 0.3) -> Any:
    """The network with random numbers in every parameter."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return network


def fill(model: nn.Module, seed: int) -> nn.Module:
    """Random numbers in every parameter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.requires_grad_(False).parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def tiny_clip() -> tuple[nn.Module, nn.Module]:
    """CLIP-L of two layers, here and as transformers has it."""
    from transformers import CLIPTextConfig, CLIPTextModel

    from library.models.clip import ClipTextEncoder

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPTextConfig(**sizes, vocab_size=99, bos_token_id=97, eos_token_id=98)
    return fill(ClipTextEncoder(config), 2), CLIPTextModel(config)


def tiny_t5() -> nn.Module:
    """T5 of two layers, as transformers has it."""
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": 48, "d_kv": 12, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 99}
    return fill(T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu")), 3)


def _stable_diffusion(variant: str, folder: Path) -> Workbench:
    from diffusers import DiffusionPipeline

    from library.models.clip import ClipTextEncoder
    from networks import lora, oft
    from tools.make_tiny_stable_diffusion import make_tiny_stable_diffusion

    make_tiny_stable_diffusion(folder, variant, "diffusers")  # type: ignore[arg-type]
    pipeline = DiffusionPipeline.from_pretrained(folder)
    theirs = [pipeline.text_encoder, *([pipeline.text_encoder_2] if variant == "sdxl" else [])]
    encoders: list[nn.Module | None] = [fill(ClipTextEncoder(encoder.config), 2) for encoder in theirs]
    rules, tree = lora.rules_of(pipeline.unet, encoders)
    parts = {"sd1": ["clip_l"], "sd2": ["clip_h"], "sdxl": ["clip_l", "clip_g"]}[variant]
    return Workbench(variant, lora, oft, pipeline.unet, encoders, rules, tree, parts, pipeline)


def _flux(folder: Path) -> Workbench:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    from library.models.flux.transformer import FluxTransformer
    from networks import lora_flux, oft_flux
    from tools.make_tiny_models import transformer_config
    from tools.other_layouts import diffusers_transformer_config, diffusers_transformer_state

    config = transformer_config()
    ours = fill(FluxTransformer(config), 1)
    theirs = FluxTransformer2DModel.from_config(diffusers_transformer_config(config))
    scheduler = FlowMatchEulerDiscreteScheduler()
    clip, their_clip = tiny_clip()
    pipeline = FluxPipeline(scheduler, None, their_clip, None, tiny_t5(), None, theirs)
    encoders: list[nn.Module | None] = [clip, tiny_t5()]
    return Workbench(
        *("flux", lora_flux, oft_flux, ours, encoders, lora_flux.FLUX, ours, ["clip_l", "t5xxl"], pipeline),
        their_state=lambda state: diffusers_transformer_state(state, config),
    )


def _chroma(folder: Path) -> Workbench:
    from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

    from library.models.flux.chroma import ChromaTransformer
    from networks import lora_flux, oft_flux
    from tools.make_tiny_models import transformer_config
    from tools.other_layouts import diffusers_transformer_config, diffusers_transformer_state

    config: Any = transformer_config("chroma")
    ours = fill(ChromaTransformer(config), 1)
    theirs = ChromaTransformer2DModel.from_config(diffusers_transformer_config(config))
    pipeline = ChromaPipeline(FlowMatchEulerDiscreteScheduler(), None, tiny_t5(), None, theirs)
    return Workbench(
        *("chroma", lora_flux, oft_flux, ours, [None, tiny_t5()], lora_flux.FLUX, ours, ["", "t5xxl"], pipeline),
        their_state=lambda state: diffusers_transformer_state(state, config),
    )


def _lumina(folder: Path) -> Workbench:
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

    from library.models.gemma2 import Gemma2TextEncoder, gemma2_config
    from library.models.lumina.transformer import LuminaTransformer
    from networks import lora_lumina, oft_lumina
    from tests.networks.test_lora_lumina import GEMMA
    from tools.make_tiny_models import LUMINA
    from tools.other_layouts import diffusers_lumina_config, diffusers_lumina_state

    ours = fill(LuminaTransformer(LUMINA), 1)
    theirs = Lumina2Transformer2DModel.from_config(diffusers_lumina_config(LUMINA))
    pipeline = Lumina2Pipeline(theirs, FlowMatchEulerDiscreteScheduler(), None, None, None)
    gemma = fill(Gemma2TextEncoder(gemma2_config(GEMMA)), 2)
    return Workbench(
        *("lumina", lora_lumina, oft_lumina, ours, [gemma], lora_lumina.LUMINA, ours, ["gemma2_2b"], pipeline),
        their_state=lambda state: diffusers_lumina_state(state, LUMINA),
    )


def _hunyuan_image(folder: Path) -> Workbench:
    from library.models.hunyuan_image.transformer import HunyuanImageTransformer
    from networks import lora_hunyuan_image, oft_hunyuan_image
    from tests.parity.test_hunyuan_image_transformer_matches_diffusers import their_model
    from tools.make_tiny_models import HUNYUAN_IMAGE
    from tools.other_layouts import diffusers_hunyuan_image_state

    ours = fill(HunyuanImageTransformer(HUNYUAN_IMAGE), 1)
    rules = lora_hunyuan_image.HUNYUAN_IMAGE
    return Workbench(
        *(
            "hunyuan_image",
            lora_hunyuan_image,
            oft_hunyuan_image,
            ours,
            [],
            rules,
            ours,
            [],
            their_model(HUNYUAN_IMAGE),
        ),
        their_state=lambda state: diffusers_hunyuan_image_state(state, HUNYUAN_IMAGE),
    )


MAKERS: Mapping[str, Callable[[Path], Workbench]] = {
    **{variant: partial(_stable_diffusion, variant) for variant in ("sd1", "sd2", "sdxl")},
    "flux": _flux,
    "chroma": _chroma,
    "lumina": _lumina,
    "hunyuan_image": _hunyuan_image,
}


def workbenches(folder: Path) -> Callable[[str], Workbench]:
    """Gives the workbench of a family, each made once."""
    return cache(lambda family: MAKERS[family](folder / family))
