"""What merge_lora.py, sdxl_merge_lora.py and svd_merge_lora.py do with their options."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch

from library.console import say
from library.devices import parse_dtype
from library.errors import UserError
from library.families import SDXL, STABLE_DIFFUSION, Family, by_model
from library.models.stable_diffusion.checkpoint import (
    BASE_MODEL_VERSIONS,
    StableDiffusionModel,
    open_stable_diffusion,
)
from library.modelspec import standard_entries
from networks.adapters.lora_file import LoRAWeights
from networks.adapters.lora_formats import plain_name
from networks.lora_tools.block_weights import BlockWeights, parse_block_weights
from networks.lora_tools.merging import Ingredient, check_ingredients, shuffled, summed
from networks.lora_tools.metadata import merged_metadata, merged_model_metadata
from networks.lora_tools.model_merging import MergeFormat, merge_into_file, merge_into_folder, plan_merge
from networks.lora_tools.named_lora import NamedLoRA
from networks.lora_tools.options import (
    LORA_SUFFIXES,
    MergeFiles,
    MergeNumbers,
    check_merge_files,
    check_output,
    save_modules,
)
from networks.lora_tools.stable_diffusion_layers import layers_of, usual_name

ADVICE: Mapping[Family, str] = {
    STABLE_DIFFUSION: "networks/merge_lora.py merges those.",
    SDXL: "networks/sdxl_merge_lora.py merges those.",
}


class MergeRun:
    """The files of a merge, opened and checked; ``wanted`` are the model families that the script is for."""

    def __init__(
        self, files: MergeFiles, numbers: MergeNumbers, wanted: Collection[Family], lbws: Sequence[str] = ()
    ) -> None:
        check_merge_files(files)
        self.blocks = _block_weights(files, lbws)
        self.files, self.numbers, self.wanted = files, numbers, wanted
        self.loras = [NamedLoRA(path, takes_dora=True) for path in files.models]
        for lora in self.loras:
            if lora.family is not None:
                lora.require_family(wanted, ADVICE.get(lora.family, ""))

    def ingredients(self, family: Family, rename: Callable[[str], str]) -> list[Ingredient]:
        """The files with their shares, checked; modules under the names that ``rename`` gives."""
        for own in self.blocks:
            if own is not None and own.family is not family:
                raise UserError(
                    f"--lbws: a list of {len(own.weights)} is for {own.family.lora_name}, but the files are for"
                    f" {family.lora_name}, which takes {'12 or 20' if family is SDXL else '17 or 26'} numbers."
                )
        made = [
            Ingredient(lora, ratio, own, rename) for lora, ratio, own in zip(self.loras, self.files.ratios, self.blocks)
        ]
        check_ingredients(made)
        return made

    def family(self) -> Family:
        """The family that all files are for. Raises UserError when they are for several, or names don't tell."""
        families: dict[Family, NamedLoRA] = {}
        for lora in self.loras:
            if lora.family is not None:
                families[lora.family] = lora
                continue
            name = next(iter(lora.modules))
            raise UserError(
                f'{lora.label} names its modules differently ("{name}"); only files with the names of'
                ' kohya-ss/sd-scripts ("lora_unet_...") can be merged into one.'
            )
        if len(families) > 1:
            found = ", ".join(f"{lora.path} for {family.lora_name}" for family, lora in families.items())
            raise UserError(f"--models: the files are for different models: {found}.")
        return next(iter(families))

    def merge_files(
        self,
        combine: Callable[[Sequence[tuple[LoRAWeights, float]]], LoRAWeights],
        shuffle: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        """Write the sum of the files, each module as ``combine`` makes it."""
        for lora in self.loras:
            lora.refuse_dora("--sd_model names the model to merge it into")
        save_to = check_output(self.files.save_to, self.files.models, LORA_SUFFIXES)
        family = self.family()
        ingredients = self.ingredients(family, lambda name: usual_name(name, family))
        modules = summed(ingredients, combine, device)
        if shuffle:
            modules = shuffled(modules)
        metadata = merged_metadata(self.loras, modules, save_to, self.numbers.no_metadata)
        precision = self.numbers.precision
        save_modules(save_to, modules, metadata, self.numbers.save_precision or precision, precision)

    def merge_into_model(self, path: str, says_v2: bool = False) -> None:
        """Write the model at ``path`` with the files merged into it."""
        folder = Path(path).is_dir()
        suffixes = ("",) if folder else (".safetensors", ".ckpt")
        save_to = check_output(self.files.save_to, [*self.files.models, path], suffixes)
        if folder and save_to.exists():
            raise UserError(f"--save_to: {save_to} exists already; name a new folder.")
        model = open_stable_diffusion(path, option="--sd_model")
        self._check_model(model, path, says_v2)
        layers, names = layers_of(model)
        ingredients = self.ingredients(by_model(model.variant), lambda name: names.get(plain_name(name), name))
        plan = plan_merge(ingredients, layers)
        save_dtype = self.numbers.save_precision
        form = MergeFormat(parse_dtype(self.numbers.precision), parse_dtype(save_dtype) if save_dtype else None)
        metadata = self._model_metadata(model, Path(path), save_to)
        if folder:
            merge_into_folder(Path(path), _weight_files(model), plan, save_to, form, {})
        else:
            merge_into_file(Path(path), plan, save_to, form, metadata)
        say(f"saved {save_to}: {len(plan)} tensors of {path} changed")

    def _check_model(self, model: StableDiffusionModel, path: str, says_v2: bool) -> None:
        family = by_model(model.variant)
        if family not in self.wanted:
            raise UserError(f"--sd_model: {path} is for {family.lora_name}; {ADVICE[family]}")
        if says_v2 and model.variant != "sd2":
            raise UserError(f"--v2 is given, but {path} is a Stable Diffusion 1.x model.")

    def _model_metadata(self, model: StableDiffusionModel, path: Path, save_to: Path) -> dict[str, str]:
        version = BASE_MODEL_VERSIONS[model.variant]
        # As kohya-ss/sd-scripts: a 2.x model that doesn't say what it predicts is taken for one that predicts v.
        if model.predicts_v or (model.predicts_v is None and model.variant == "sd2"):
            version += "_v"
        own, standard = model.unet.source.checkpoint.metadata, standard_entries(version)
        return merged_model_metadata(path, own, standard, self.loras, save_to, self.numbers.no_metadata)


def _weight_files(model: StableDiffusionModel) -> set[Path]:
    sources = [model.unet.source, model.autoencoder.source, *(encoder.source for encoder in model.text_encoders)]
    return {file for source in sources for file in source.checkpoint.files}


def _block_weights(files: MergeFiles, lbws: Sequence[str]) -> list[BlockWeights | None]:
    if not lbws:
        return [None] * len(files.models)
    if len(lbws) != len(files.models):
        raise UserError(f"--lbws needs one list for each file of --models ({len(files.models)}); {len(lbws)} given.")
    return [parse_block_weights(text) for text in lbws]
