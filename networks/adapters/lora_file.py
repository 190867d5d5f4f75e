"""LoRA files: ``<name>.lora_down.weight`` [rank, in], ``<name>.lora_up.weight`` [out, rank], ``<name>.alpha``.

The format is that of kohya-ss/sd-scripts, which ComfyUI and diffusers read; other forms are read by ``lora_formats``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from library.checkpoints import load_tensors
from library.files import writing
from library.safetensors_io import content_hashes, save_file

PEFT_METADATA = "lora_adapter_metadata"  # diffusers keeps PEFT's settings there
SPLIT_MARK = "ss_network_split_qkv"
FULL_STRENGTH = "alpha_times_parts"  # alpha was raised with the rank of joined modules


class Magnitudes(NamedTuple):
    """DoRA's scales of some rows of a weight: what the norms of its outputs or of its inputs become.

    https://arxiv.org/abs/2402.09353
    """

    rows: slice
    values: Tensor
    """[outputs, 1, ...] or [1, inputs, 1, ...]"""

    def applied(self, weight: Tensor) -> Tensor:
        """The rows of ``weight`` [out, in, ...] with these norms."""
        rows = weight[self.rows]
        over = [0, *range(2, rows.dim())] if self.values.shape[0] == 1 else list(range(1, rows.dim()))
        norms = torch.linalg.vector_norm(rows, dim=over, keepdim=True)
        return rows * (self.values.to(rows) / (norms + torch.finfo(rows.dtype).eps))


class LoRAWeights(NamedTuple):
    """One module of a file; its strength is alpha / rank, the rank being down's first dimension.

    With ``magnitudes`` it is DoRA's, which is read for images and merging.
    """

    down: Tensor
    up: Tensor
    alpha: float
    magnitudes: tuple[Magnitudes, ...] = ()


def state_dict_of(modules: Mapping[str, LoRAWeights], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Tensors on the CPU under the keys of files; all of ``dtype``, or as they are with alpha in float32."""
    tensors: dict[str, Tensor] = {}
    for name, weights in modules.items():
        tensors[f"{name}.lora_down.weight"] = weights.down
        tensors[f"{name}.lora_up.weight"] = weights.up
        tensors[f"{name}.alpha"] = torch.tensor(weights.alpha, dtype=torch.float32)
    return {key: tensor.detach().to("cpu", dtype).contiguous() for key, tensor in tensors.items()}


def decomposed(weight: Tensor, magnitudes: Iterable[Magnitudes]) -> Tensor:
    """A weight to which a DoRA module's difference was added, with the module's norms."""
    result = weight.clone()
    for part in magnitudes:
        result[part.rows] = part.applied(weight)
    return result


def read_file(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata. Raises UserError when the file is missing or damaged."""
    tensors, metadata = load_tensors(path)
    return tensors, with_adapter_config(path, metadata)


def with_adapter_config(path: Path | str, metadata: Mapping[str, str]) -> dict[str, str]:
    """``metadata`` and, for an ``adapter_model`` that PEFT has written, the settings in the file beside it."""
    config = Path(path).with_name("adapter_config.json")
    if PEFT_METADATA in metadata or Path(path).stem != "adapter_model" or not config.is_file():
        return dict(metadata)
    return {**metadata, PEFT_METADATA: config.read_text(encoding="utf-8", errors="replace")}


def write_file(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> None:
    """Write a file that appears complete or not at all.

    ``.safetensors`` files carry the metadata and two hashes of the content (``sshs_model_hash``,
    ``sshs_legacy_hash``); any other suffix means ``torch.save``, which has no metadata.
    """
    path = Path(path)
    if path.suffix.lower() != ".safetensors":
        with writing(path) as file:
            torch.save(dict(tensors), file)
        return
    metadata = dict(metadata or {})
    metadata["sshs_model_hash"], metadata["sshs_legacy_hash"] = content_hashes(tensors, metadata)
    save_file(tensors, path, metadata)
