"""Several LoRA files as one: the exact sum of what they add, or the best sum of a given rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from library.console import say
from library.errors import UserError
from library.randomness import generator
from networks.adapters.lora_file import LoRAWeights
from networks.lora_tools.arithmetic import (
    clamped_factors,
    compacted,
    concatenated,
    singular_parts,
    strength,
)
from networks.lora_tools.block_weights import BlockWeights
from networks.lora_tools.named_lora import NamedLoRA, kernel_is_wide, without_1x1


def same_name(name: str) -> str:
    """The module's name as it is."""
    return name


@dataclass
class Ingredient:
    """A LoRA file with its share in a sum.

    ``rename`` gives a module's name in the result, so that files under several naming schemes meet.
    """

    lora: NamedLoRA
    ratio: float = 1.0
    blocks: BlockWeights | None = None
    rename: Callable[[str], str] = same_name
    names: dict[str, str] = field(init=False)
    """Name in the result -> name in the file."""

    def __post_init__(self) -> None:
        self.names = {self.rename(name): name for name in self.lora.modules}
        if len(self.names) < len(self.lora.modules):
            twice = next(name for name in self.lora.modules if self.names[self.rename(name)] != name)
            raise UserError(f"{self.lora.label} holds {self.rename(twice)} twice, under several names.")

    def ratio_of(self, name: str) -> float:
        """The ratio of a module, by its name in the result: the file's, times the block's where one is listed."""
        factor = self.blocks.of(name) if self.blocks is not None else None
        return self.ratio if factor is None else self.ratio * factor

    def load(self, name: str, device: torch.device | str = "cpu") -> LoRAWeights:
        """A module by its name in the result."""
        return self.lora.load(self.names[name], device)


def module_names(ingredients: Sequence[Ingredient]) -> list[str]:
    """Every module of any file, in the order of the files."""
    return list(dict.fromkeys(name for ingredient in ingredients for name in ingredient.names))


def check_ingredients(ingredients: Sequence[Ingredient]) -> None:
    """Raises UserError when a file holds more than LoRA, or when layers of one name differ in size between files.

    Says once how many modules block weights do not reach.
    """
    shapes: dict[str, tuple[tuple[int, ...], NamedLoRA]] = {}
    for ingredient in ingredients:
        lora = ingredient.lora
        lora.refuse_other_tensors()
        for name, own in ingredient.names.items():
            shape = lora.layer_shape(own)
            first, other = shapes.setdefault(name, (shape, lora))
            if without_1x1(shape) != without_1x1(first):
                raise UserError(
                    f"{lora.path} and {other.path} are for different models: {name} belongs to a layer of shape"
                    f" {list(shape)} in one and {list(first)} in the other."
                )
        _tell_of_unlisted_blocks(ingredient)


def _tell_of_unlisted_blocks(ingredient: Ingredient) -> None:
    blocks = ingredient.blocks
    unlisted = [name for name in ingredient.names if blocks is not None and blocks.of(name) is None]
    if unlisted and blocks is not None:
        say(
            f"{ingredient.lora.path}: {len(unlisted)} modules, such as {unlisted[0]}, lie in blocks that a list of"
            f" {len(blocks.weights)} does not name; they keep the whole ratio"
        )


def summed(
    ingredients: Sequence[Ingredient],
    combine: Callable[[Sequence[tuple[LoRAWeights, float]]], LoRAWeights],
    device: torch.device | str = "cpu",
) -> dict[str, LoRAWeights]:
    """Every module of any file as ``combine`` makes it of the files' modules and their ratios; on the CPU.

    A share of 0 is left out, and so is a module without any share. Raises UserError when that leaves nothing.
    """
    modules = {}
    for name in tqdm(module_names(ingredients), desc="modules", mininterval=1):
        used = [one for one in ingredients if name in one.names and one.ratio_of(name)]
        if used:
            made = combine([(one.load(name, device), one.ratio_of(name)) for one in used])
            modules[name] = LoRAWeights(made.down.cpu(), made.up.cpu(), made.alpha)
    if not modules:
        raise UserError("--ratios: every ratio is 0, so that nothing is left of any module.")
    return modules


def exact_sum(parts: Sequence[tuple[LoRAWeights, float]]) -> LoRAWeights:
    """The sum in the smallest rank that holds it; of one module, the module itself with its ratio."""
    joined = concatenated(parts)
    return joined if len(parts) == 1 else compacted(joined)


def sum_of_rank(rank: int, conv_rank: int, clamp_quantile: float) -> Callable[..., LoRAWeights]:
    """A ``combine`` that approximates the sum in ``rank`` (``conv_rank`` for convolutions wider than 1x1).

    up = U S, down = V^T, alpha = rank; values beyond the quantile are cut off. Ranks end where the sum's own end.
    """

    def combine(parts: Sequence[tuple[LoRAWeights, float]]) -> LoRAWeights:
        joined = concatenated(parts)
        shape = joined.down.shape[1:]
        scaled = joined._replace(up=joined.up * strength(joined))
        wanted = conv_rank if kernel_is_wide((0, *shape)) else rank
        return clamped_factors(singular_parts(scaled), wanted, tuple(shape), clamp_quantile)

    return combine


def shuffled(modules: Mapping[str, LoRAWeights]) -> dict[str, LoRAWeights]:
    """The same sums with the ranks of each module in another, always the same, order."""
    mixed = {}
    for name, weights in modules.items():
        order = torch.randperm(len(weights.down), generator=generator(0, "shuffle_ranks", name))
        mixed[name] = LoRAWeights(weights.down[order], weights.up[:, order], weights.alpha)
    return mixed
