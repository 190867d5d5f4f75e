"""LoRA files for FLUX.1 and Chroma under this suite's names (see ``stream_lora``)."""

from __future__ import annotations

from collections.abc import Iterable

from library.errors import UserError
from library.models.flux.checkpoint import DOUBLE, OUTER, SINGLE
from networks.adapters.lora_targets import TargetTable
from networks.lora_flux import CLIP_L, FLUX, IN_LAYERS, T5XXL, TRANSFORMER
from networks.lora_tools.flux_metadata import flux_entries
from networks.lora_tools.stream_lora import StreamLoRA

BFL_NAMES = ("double_blocks.", "single_blocks.", "final_layer.", *IN_LAYERS)
FLAT_BFL_NAMES = tuple(name.replace(".", "_") for name in BFL_NAMES)
CONTROL_LORA = (".lora_B.bias", "_norm.scale")
_CLIP_LAYERS = (*(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2")
_T5_LAYERS = (
    *(f"layer.0.SelfAttention.{name}" for name in ("q", "k", "v", "o")),
    *(f"layer.1.DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wo")),
)


class FluxLoRA(StreamLoRA):
    """A LoRA file for FLUX.1 or Chroma."""

    model_name = "FLUX.1 or Chroma"
    rules = FLUX
    entries = flux_entries()
    joined = ("img_attn.qkv", "txt_attn.qkv")
    feed_forward = ("_mlp.0", "_mlp.2")

    @staticmethod
    def layer_paths(blocks: int) -> Iterable[tuple[TargetTable, str]]:
        yield from ((TRANSFORMER, path) for path in OUTER)
        for number in range(blocks):
            yield from ((TRANSFORMER, f"double_blocks.{number}.{path}") for path in DOUBLE)
            yield from ((TRANSFORMER, f"single_blocks.{number}.{path}") for path in SINGLE)
            yield from ((CLIP_L, f"text_model.encoder.layers.{number}.{path}") for path in _CLIP_LAYERS)
            yield from ((T5XXL, f"encoder.block.{number}.{path}") for path in _T5_LAYERS)

    @staticmethod
    def dialect_of(name: str) -> str:
        if name.startswith("lycoris_"):
            return "lycoris"
        if name.startswith("lora_unet_") and not name.removeprefix("lora_unet_").startswith(FLAT_BFL_NAMES):
            return "sd-scripts with Diffusers' paths"
        if name.startswith(("lora_unet_", "lora_te1_", "lora_te3_")):
            return "sd-scripts"
        if name.startswith(("lora_transformer_", "lora_te2_", "lora_te_", "clip_l.", "t5.")):
            return "onetrainer"
        if name.startswith(("diffusion_model.", "text_encoders.")):
            return "comfyui"
        if ".processor." in name:
            return "xlabs"
        return "bfl" if name.removeprefix("transformer.").startswith(BFL_NAMES) else "ai-toolkit"

    @property
    def dialects(self) -> set[str]:
        """Which programs' names are in the file: sd-scripts, ai-toolkit, comfyui, onetrainer, xlabs, bfl ..."""
        found = super().dialects
        # OneTrainer names CLIP-L as sd-scripts does.
        own = any(name.startswith(("lora_unet_", "lora_te3_")) for name in self.keys)
        return found - {"sd-scripts"} if "onetrainer" in found and not own else found

    def refuse_special(self) -> None:
        control = next((key for key in self.others if key.endswith(CONTROL_LORA)), None)
        if control is not None:
            raise UserError(
                f'{self.label} is a Control LoRA of Black Forest Labs (it holds "{control}"): beside LoRA it changes'
                " biases and norms, which a LoRA file cannot hold."
            )
