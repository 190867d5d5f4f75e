"""LoRA files for FLUX.1 and Chroma under this suite's names, whatever program wrote them; no model is needed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import torch

from library.console import say
from library.errors import UserError
from library.families import lora_family
from library.models.flux.checkpoint import DOUBLE, OUTER, SINGLE
from networks.adapters.lora_file import LoRAWeights
from networks.adapters.lora_formats import join_parts, plain_name, refuse_repetition, whole_module
from networks.adapters.lora_targets import Part, Target
from networks.lora_flux import CLIP_L, IN_LAYERS, T5XXL, TRANSFORMER, other_names
from networks.lora_tools.named_lora import NamedLoRA

FEED_FORWARD_RATIO = 4  # of FLUX.1 and Chroma, where a file does not tell
MOST_BLOCKS = 1000
BFL_NAMES = ("double_blocks.", "single_blocks.", "final_layer.", *IN_LAYERS)
FLAT_BFL_NAMES = tuple(name.replace(".", "_") for name in BFL_NAMES)
CONTROL_LORA = (".lora_B.bias", "_norm.scale")
_CLIP_LAYERS = (*(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2")
_T5_LAYERS = (
    *(f"layer.0.SelfAttention.{name}" for name in ("q", "k", "v", "o")),
    *(f"layer.1.DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wo")),
)


def layer_paths(blocks: int) -> Iterable[Target]:
    """Every layer that a LoRA for FLUX.1 or Chroma can act on, in models of up to ``blocks`` blocks of each kind.

    The targets have names and paths but no modules.
    """
    paths = [
        *((TRANSFORMER, path) for path in OUTER),
        *((TRANSFORMER, f"double_blocks.{number}.{path}") for number in range(blocks) for path in DOUBLE),
        *((TRANSFORMER, f"single_blocks.{number}.{path}") for number in range(blocks) for path in SINGLE),
        *((CLIP_L, f"text_model.encoder.layers.{number}.{path}") for number in range(blocks) for path in _CLIP_LAYERS),
        *((T5XXL, f"encoder.block.{number}.{path}") for number in range(blocks) for path in _T5_LAYERS),
    ]
    return [Target(path, cast(Any, None), table) for table, path in paths]


@cache
def _known_names(blocks: int) -> dict[str, tuple[Target, Part]]:
    """Every name that a program gives a layer or a part of it."""
    known: dict[str, tuple[Target, Part]] = {}
    for target in layer_paths(blocks):
        known |= {alias: (target, part) for alias, part in other_names(target)}
        known[target.name] = (target, None)
    return known


def part_count(path: str) -> int:
    """In how many layers Diffusers has a layer of the original model: 3 (q, k, v), 4 (and the feed-forward), or 1."""
    if path.endswith(("img_attn.qkv", "txt_attn.qkv")):
        return 3
    return 4 if path.endswith(".linear1") else 1


class FluxLoRA(NamedLoRA):
    """A LoRA file of any dialect, opened by its header; ``modules`` are the names of ``networks.lora_flux``.

    ``targets`` are the layers by these names, ``parts`` the file's names by part (see ``lora_targets.Part``),
    ``unmatched`` the file's modules that are none of FLUX.1's or Chroma's.
    """

    def __init__(self, path: Path | str, option: str = "--models"):
        super().__init__(path, option)
        numbers = [int(number) for name in self.keys for number in re.findall(r"(?<=[._])\d{1,9}(?=[._])", name)]
        known = _known_names(min(max(numbers, default=0) + 1, MOST_BLOCKS))
        self.targets: dict[str, Target] = {}
        self.parts: dict[str, dict[Part, str]] = {}
        self.unmatched: list[str] = []
        self._ratio_is_told = False
        for name in self.keys:
            if plain_name(name) not in known:
                self.unmatched.append(name)
                continue
            target, part = known[plain_name(name)]
            self.targets[target.name] = target
            parts = self.parts.setdefault(target.name, {})
            try:
                refuse_repetition(target.name, part, parts)
            except UserError as error:
                raise self._named(error) from None
            parts[part] = name
        self.modules = self.parts.keys()
        for name in self.modules:
            self._check_parts(name)

    def require_known(self) -> None:
        """Raises UserError that lists every module and tensor that belongs to no layer of FLUX.1 or Chroma."""
        control = next((key for key in self.others if key.endswith(CONTROL_LORA)), None)
        if control is not None:
            raise UserError(
                f'{self.label} is a Control LoRA of Black Forest Labs (it holds "{control}"): beside LoRA it changes'
                " biases and norms, which a LoRA file cannot hold."
            )
        unknown = [*self.unmatched, *self.others]
        if unknown:
            family = None if self.modules else lora_family(unknown)
            other = f" It is for {family.lora_name}." if family else ""
            raise UserError(
                f"{self.label}: {len(unknown)} of its modules and tensors belong to no layer of FLUX.1 or Chroma: "
                f"{', '.join(unknown)}.{other}"
            )

    @property
    def dialects(self) -> set[str]:
        """Which programs' names are in the file: sd-scripts, ai-toolkit, comfyui, onetrainer, xlabs, bfl ..."""
        found = {dialect_of(plain_name(name)) for name in self.keys}
        # OneTrainer names CLIP-L as sd-scripts does.
        own = any(name.startswith(("lora_unet_", "lora_te3_")) for name in self.keys)
        return found - {"sd-scripts"} if "onetrainer" in found and not own else found

    def _check_parts(self, name: str) -> None:
        rows = self.rows(name)
        for part, own in self.parts[name].items():
            down, up = self.shapes(own)
            heights = accumulate(rows[part:]) if isinstance(part, int) else [sum(rows)]
            if len(down) != 2 or down[1] != self.width(name) or min(rows) < 0 or up[0] not in heights:
                raise UserError(
                    f"{self.label}: the matrices of {own}, {list(up)} and {list(down)}, do not fit {name}; the file is"
                    " damaged or for another model."
                )

    def width(self, name: str) -> int:
        """Inputs of a module's layer."""
        return self.shapes(next(iter(self.parts[name].values())))[0][1]

    def rows(self, name: str) -> list[int]:
        """Rows of a module's parts: [out] of one that is not joined, else those of q, k, v (and the feed-forward)."""
        whole, count, width = self._whole(name), part_count(self.targets[name].path), self.width(name)
        if count == 1:
            return [self.shapes(str(whole))[1][0]]
        if count == 3:
            return [width] * 3
        if whole is not None:
            return [width] * 3 + [self.shapes(whole)[1][0] - 3 * width]
        parts = self.parts[name]
        return [width] * 3 + [self.shapes(parts[3])[1][0] if 3 in parts else self._feed_forward_rows(width)]

    def _whole(self, name: str) -> str | None:
        """The file's name of the module where it stands for the whole layer."""
        return next((own for part, own in self.parts[name].items() if not isinstance(part, int)), None)

    def _feed_forward_rows(self, width: int) -> int:
        """Of a single block whose feed-forward part has no module: as other modules have it, else FLUX.1's ratio."""
        for name, parts in self.parts.items():
            path, whole = self.targets[name].path, self._whole(name)
            if path.endswith(".linear1") and (3 in parts or whole is not None):
                return self.shapes(parts[3])[1][0] if whole is None else self.shapes(whole)[1][0] - 3 * width
            if whole is not None and path.endswith("_mlp.0"):
                return self.shapes(whole)[1][0]
            if whole is not None and path.endswith((".linear2", "_mlp.2")):
                columns = self.shapes(whole)[0][1]
                return columns - width if path.endswith(".linear2") else columns
        if not self._ratio_is_told:
            self._ratio_is_told = True
            say(
                f"{self.path}: no module tells the size of the feed-forward layers; {FEED_FORWARD_RATIO} times"
                f" {width} is taken, as FLUX.1 and Chroma have it"
            )
        return FEED_FORWARD_RATIO * width

    def layer_shape(self, name: str) -> tuple[int, ...]:
        """The shape [out, in] of the layer's weight."""
        return sum(self.rows(name)), self.width(name)

    def rank(self, name: str) -> int:
        """The rank that ``load`` gives."""
        return len(self.load(name).down)

    def load(self, name: str, device: torch.device | str = "cpu") -> LoRAWeights:
        """The module, of a joined layer as one. Raises UserError when its matrices hold infinity or NaN."""
        parts = {part: super(FluxLoRA, self).load(own, device) for part, own in self.parts[name].items()}
        whole = whole_module(parts)
        return _joined(parts, self.rows(name)) if whole is None else whole


def _joined(parts: Mapping[Part, LoRAWeights], rows: list[int]) -> LoRAWeights:
    """Parts as one module; parts that share their down, as those of a module that was taken apart, become it again."""
    positions = sorted(part for part in parts if isinstance(part, int))
    found = [parts[position] for position in positions]
    first = found[0]
    is_shared = len(found) == len(rows) and all(
        weights.alpha == first.alpha and torch.equal(weights.down, first.down) for weights in found
    )
    if is_shared:
        return LoRAWeights(first.down, torch.cat([weights.up for weights in found]), first.alpha)
    return join_parts(found, positions, rows)


def dialect_of(name: str) -> str:
    """The program whose manner of naming modules ``name`` (without wrappers) follows."""
    if name.startswith("lycoris_"):
        return "lycoris"
    if name.startswith("lora_unet_") and not name.removeprefix("lora_unet_").startswith(FLAT_BFL_NAMES):
        return "sd-scripts with Diffusers' paths"
    if name.startswith(("lora_unet_", "lora_te1_", "lora_te3_")):
        return "sd-scripts"
    if name.startswith(("lora_transformer_", "lora_te2_")):
        return "onetrainer"
    if name.startswith(("diffusion_model.", "text_encoders.")):
        return "comfyui"
    if ".processor." in name:
        return "xlabs"
    return "bfl" if name.removeprefix("transformer.").startswith(BFL_NAMES) else "ai-toolkit"
