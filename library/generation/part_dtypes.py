"""In which dtypes the parts of a model are kept and compute, from the names that options give."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.console import say
from library.devices import is_fp8, parse_dtype

if TYPE_CHECKING:
    import torch

    from library.memory.storage import StorageDtype


@dataclass
class DtypeOptions:
    """Dtypes"""

    dtype: str = "bfloat16"
    """Dtype: bf16, fp16, fp32, or fp8."""
    fp8_scaled: bool = False
    """Keep the transformer in 8-bit floats with a scale for each 64 inputs: more exact than fp8, 3 % larger."""


@dataclass(frozen=True)
class PartDtype:
    """How a part is kept in memory, and in which dtype it computes."""

    stored: StorageDtype
    compute: torch.dtype


def resolve_part_dtypes(
    options: DtypeOptions, own: Mapping[str, str], denoiser: str, never_8_bits: Collection[str] = ("autoencoder",)
) -> tuple[dict[str, PartDtype], torch.dtype]:
    """The dtypes of each part, and the one that noise is drawn in.

    ``own``: the name of the option by part; where that is unset, ``--dtype`` counts. A part in fp8 computes in
    bfloat16, in which those that are ``never_8_bits`` are kept, too. With ``--fp8_scaled`` the ``denoiser`` computes in
    its dtype and is kept in fp8 with a scale for 64 inputs. With either, noise is drawn in float32, as
    kohya-ss/sd-scripts does for fp8. Raises UserError for an unknown name.
    """
    import torch

    from library.memory.storage import BlocksStoredAs, Storage

    names = {part: getattr(options, option) for part, option in own.items()}
    dtypes = {
        part: _part_dtype(name or options.dtype, f"--{own[part]}" if name else "--dtype")
        for part, name in names.items()
    }
    if options.fp8_scaled:
        compute = dtypes[denoiser].compute
        dtypes[denoiser] = PartDtype(BlocksStoredAs(compute, Storage("fp8", "block")), compute)
    base = parse_dtype(options.dtype, "--dtype")
    has_fp8 = is_fp8(base) or any(part.stored != part.compute for part in dtypes.values())
    for part in never_8_bits:
        dtypes[part] = PartDtype(dtypes[part].compute, dtypes[part].compute)
    return dtypes, torch.float32 if has_fp8 else base


def _part_dtype(name: str, option: str) -> PartDtype:
    import torch

    from library.memory.storage import BlocksStoredAs

    dtype = parse_dtype(name, option)
    if not is_fp8(dtype):
        return PartDtype(dtype, dtype)
    if dtype != torch.float8_e4m3fn:
        say(f"{option} {name}: weights are kept as float8_e4m3fn, which has the same size and is more exact here")
    return PartDtype(BlocksStoredAs(torch.bfloat16), torch.bfloat16)
