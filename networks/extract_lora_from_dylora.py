"""Cut a LoRA that was trained with networks.dylora to every smaller rank, one file each."""

from __future__ import annotations

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from library.console import ConsoleOptions, run_script, say, set_up_console
from library.errors import UserError
from library.options import parse_options
from networks.lora_tools.options import check_output, check_rank

if TYPE_CHECKING:
    from networks.adapters.lora_file import LoRAWeights


@dataclass
class CutOptions:
    """Files and ranks"""

    model: str | None = None
    """LoRA file that was trained with networks.dylora."""
    save_to: str | None = None
    """File to write; the rank is put in its name, as in name-0004.safetensors."""
    unit: int = 1
    """Ranks from one file to the next: that of the training, or a multiple of it."""


@dataclass
class ExtractFromDyloraOptions:
    """Options of extract_lora_from_dylora.py"""

    cut: CutOptions = field(default_factory=CutOptions)


def cut(weights: LoRAWeights, rank: int) -> LoRAWeights:
    """The first ``rank`` ranks, as strong as DyLoRA trained them: sqrt(all / rank) times alpha / all."""
    full = len(weights.down)
    if rank >= full:
        return weights
    alpha = weights.alpha * math.sqrt(rank / full)
    return weights._replace(down=weights.down[:rank], up=weights.up[:, :rank], alpha=alpha)


def main(arguments: list[str] | None = None) -> None:
    """Read the options and the file, write one file for each rank."""
    options = parse_options(ExtractFromDyloraOptions, __doc__ or "", arguments).cut
    set_up_console(ConsoleOptions())
    if options.model is None:
        raise UserError("--model needs the LoRA file to cut.")
    check_rank(options.unit, "--unit")
    save_to = check_output(options.save_to, [options.model])

    from networks.adapters.lora_file import state_dict_of, write_file
    from networks.lora_tools.metadata import network_entries
    from networks.lora_tools.named_lora import NamedLoRA

    lora = NamedLoRA(options.model, "--model")
    modules = {name: lora.load(name) for name in lora.modules}
    full = max(len(weights.down) for weights in modules.values())
    ranks = range(options.unit, full, options.unit)
    if not ranks:
        raise UserError(f"--unit: {lora.label} has rank {full}, so no smaller rank is a multiple of {options.unit}.")
    for rank in ranks:
        smaller = {name: cut(weights, rank) for name, weights in modules.items()}
        comment = f"split from DyLoRA, rank {full} to {rank}; {lora.metadata.get('ss_training_comment', '')}"
        metadata = {**lora.metadata, **network_entries(smaller), "ss_training_comment": comment}
        path = save_to.with_name(f"{save_to.stem}-{rank:04d}{save_to.suffix}")
        write_file(path, state_dict_of(smaller), metadata)
        say(f"saved {path}: {len(smaller)} modules, rank {rank}")


if __name__ == "__main__":
    run_script(main)
