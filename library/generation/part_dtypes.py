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


@dataclass(frozen=True)
class PartDtype:
    """How a part is kept in memory, and in which dtype it computes."""

    stored: StorageDtype
    compute: torch.dtype


def resolve_part_dtypes(
    dtype: str, own: Mapping[str, tuple[str, str | None]], scaled: Collection[str] = ()
) -> tuple[dict[str, PartDtype], torch.dtype]:
    """The dtypes of each part, and the one that noise is drawn in.

    ``own``: option and name by part; a name that is None means ``dtype``. A part in fp8 computes in bfloat16; those in
    ``scaled`` compute in their dtype and are kept in fp8 with a scale for 64 inputs. With either, noise is drawn in
    float32, as kohya-ss/sd-scripts does for fp8. Raises UserError for an unknown name.
    """
    import torch

    from library.memory.storage import BlocksStoredAs, Storage

    dtypes = {part: _part_dtype(name or dtype, option if name else "--dtype") for part, (option, name) in own.items()}
    for part in scaled:
        compute = dtypes[part].compute
        dtypes[part] = PartDtype(BlocksStoredAs(compute, Storage("fp8", "block")), compute)
    base = parse_dtype(dtype, "--dtype")
    has_fp8 = is_fp8(base) or any(part.stored != part.compute for part in dtypes.values())
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
