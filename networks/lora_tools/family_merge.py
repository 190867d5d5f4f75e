"""LoRA files of a transformer's family as one, or merged into its models: what such a program does with its options."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from library.console import say, warn
from library.devices import is_fp8, parse_dtype
from library.errors import UserError
from library.models.loading import TensorSource
from library.models.pipeline import OpenedPart
from library.safetensors_io import save_one_by_one
from networks.adapters.lora_file import LoRAWeights
from networks.adapters.lora_targets import TargetTable
from networks.lora_tools.arithmetic import concatenated
from networks.lora_tools.known_lora import KnownLoRA
from networks.lora_tools.merging import Ingredient, check_ingredients, exact_sum, shuffled, summed
from networks.lora_tools.metadata import merged_metadata, merged_model_metadata
from networks.lora_tools.model_layers import layers_of
from networks.lora_tools.model_merging import (
    Change,
    Layer,
    MergeFormat,
    Plan,
    load_converted,
    merge_into_folder,
    merge_keys,
    plan_merge,
    rounded,
    widened,
)
from networks.lora_tools.options import LORA_SUFFIXES, check_merge_files, check_output, parse_device, save_modules

if TYPE_CHECKING:
    from networks.lora_tools.options import MergeFiles, MergeNumbers, ModelMergeNumbers, ModelOption


def merge_files(
    loras: Sequence[KnownLoRA],
    files: MergeFiles,
    numbers: ModelMergeNumbers | MergeNumbers,
    combine: Callable[[Sequence[tuple[LoRAWeights, float]]], LoRAWeights],
    shuffle: bool = False,
    device: torch.device | str = "cpu",
) -> None:
    """Write the sum of files of one family as one LoRA, each module as ``combine`` makes it."""
    save_to = check_output(files.save_to, files.models, LORA_SUFFIXES)
    save_precision = numbers.save_precision or numbers.precision
    if is_fp8(parse_dtype(save_precision, "--save_precision")):
        raise UserError(f"--save_precision {save_precision} is for models; a LoRA file needs float, fp16 or bf16.")
    ingredients = [Ingredient(lora, ratio) for lora, ratio in zip(loras, files.ratios)]
    check_ingredients(ingredients)
    modules = summed(ingredients, combine, device)
    if shuffle:
        modules = shuffled(modules)
    metadata = merged_metadata(loras, modules, save_to, numbers.no_metadata, loras[0].entries)
    save_modules(save_to, modules, metadata, save_precision, numbers.precision)


@dataclass(frozen=True)
class MergePart:
    """A kind of model that LoRA files of a family can be merged into."""

    table: TargetTable
    open: Callable[..., OpenedPart[Any]]
    """Opens a file; takes its path and ``option``."""
    outer: tuple[str, ...] = ()
    """Paths of layers outside the table's classes that a file may hold."""
    standard: Callable[[Any], Mapping[str, str]] | None = None
    """The modelspec entries that follow from an opened transformer; None for text encoders."""


@dataclass(frozen=True)
class MergeFamily:
    """What distinguishes the merges of one family."""

    lora: type[KnownLoRA]
    parts: Mapping[str, MergePart]
    """By the option that names the model, the transformer first."""


@dataclass(frozen=True)
class Model:
    """An opened model with the option that names it and the file to write."""

    option: str
    path: Path
    save_option: str
    save_to: Path
    source: TensorSource
    layers: Mapping[str, Layer]
    standard: Mapping[str, str] = field(default_factory=dict)
    """Of a transformer: its modelspec entries."""

    @property
    def is_folder(self) -> bool:
        """Whether a folder is written, not a file."""
        return not self.save_to.suffix

    @property
    def gets_original_names(self) -> bool:
        """Whether one file is made of a Diffusers folder or of shards, whose names no single file has."""
        renamed = any(not origin.keys[0].endswith(name) for name, origin in self.source.origins.items())
        return bool(self.standard) and renamed and (self.path.is_dir() or len(self.source.checkpoint.files) > 1)


class FamilyMerge:
    """The files of a merge, opened and checked; ``models`` are those that the command line may name."""

    def __init__(
        self, family: MergeFamily, files: MergeFiles, numbers: ModelMergeNumbers, models: Sequence[ModelOption]
    ) -> None:
        check_merge_files(files)
        self.family, self.files, self.numbers = family, files, numbers
        named = numbers.save_precision
        self.save_dtype = parse_dtype(named, "--save_precision") if named else None
        self.device = parse_device(numbers.working_device, "--working_device")
        self.loras = [family.lora(path, takes_dora=True) for path in files.models]
        for lora in self.loras:
            lora.require_known()
        self.models = [self._open_model(model) for model in models if model.path]
        _refuse_shared_outputs(self.models)

    def _open_model(self, named: ModelOption) -> Model:
        part, path = self.family.parts[named.option], Path(str(named.path))
        opened = part.open(named.path, option=named.option)
        checkpoint = opened.source.checkpoint
        suffixes = (".safetensors", "") if path.is_dir() else (".safetensors",)
        inputs = [*self.files.models, *(str(file) for file in checkpoint.files)]
        target = check_output(named.save_to, inputs, suffixes, named.save_option)
        if self.save_dtype is not None and any(opened.source.is_scaled(key) for key in checkpoint):
            raise UserError(
                f"{checkpoint.label} holds scaled fp8 weights, which --save_precision does not convert; merge into the"
                " float16, bfloat16 or float32 version."
            )
        if not target.suffix and target.exists():
            raise UserError(f"{named.save_option}: {target} exists already; name a new folder.")
        standard = part.standard(opened) if part.standard else {}
        layers = layers_of(opened, part.table, part.outer)
        return Model(named.option, path, named.save_option, target, opened.source, layers, standard)

    def run(self, concat: bool, shuffle: bool) -> None:
        """Merge the files into the models that are named, or without one into one LoRA."""
        if not self.models:
            for lora in self.loras:
                lora.refuse_dora("name the model to merge it into")
            combine = concatenated if concat else exact_sum
            merge_files(self.loras, self.files, self.numbers, combine, shuffle, self.device)
            return
        if concat or shuffle:
            warn("--concat and --shuffle have no effect on models")
        self.merge_into_models()

    # LoRA files into models

    def merge_into_models(self) -> None:
        """Write each model with the modules that are for it."""
        ingredients = [Ingredient(lora, ratio) for lora, ratio in zip(self.loras, self.files.ratios)]
        check_ingredients(ingredients)
        layers = {name: layer for model in self.models for name, layer in model.layers.items()}
        self._leave_out_other_models(ingredients)
        plan = plan_merge(ingredients, layers)
        if self.save_dtype is not None and is_fp8(self.save_dtype):
            say("8-bit files hold plain numbers without scales, as other programs expect; that loses accuracy")
        for model in {model.save_to.resolve(): model for model in reversed(self.models)}.values():
            if model.is_folder:
                self._write_folder(model, plan)
            else:
                self._write_file(model, plan, ingredients)

    def _leave_out_other_models(self, ingredients: Sequence[Ingredient]) -> None:
        """Modules of a model that is not given are left out, with a message. Raises UserError when nothing is left."""
        given = {model.option for model in self.models}
        for ingredient in ingredients:
            lora = ingredient.lora
            assert isinstance(lora, KnownLoRA)
            for option, part in self.family.parts.items():
                names = [name for name, target in lora.targets.items() if target.table is part.table]
                if names and option not in given:
                    warn(f"{lora.path}: {len(names)} modules are left out, because no {option} is given to merge into")
                    for name in names:
                        del ingredient.names[name]
        if not any(ingredient.names for ingredient in ingredients):
            raise UserError(f"--models hold no modules for {' or '.join(sorted(given))}; there is nothing to merge.")

    @property
    def _form(self) -> MergeFormat:
        return MergeFormat(parse_dtype(self.numbers.precision), self.save_dtype, self.device)

    def _write_folder(self, model: Model, plan: Plan) -> None:
        """Every part of the folder that was named with this new one."""
        parts = [other for other in self.models if other.save_to == model.save_to]
        files = {file for part in parts for file in part.source.checkpoint.files}
        merge_into_folder(model.path, files, plan, model.save_to, self._form, {})
        self._tell(model, plan, files)

    def _write_file(self, model: Model, plan: Plan, ingredients: Sequence[Ingredient]) -> None:
        checkpoint = model.source.checkpoint
        metadata = self._metadata(model)
        if model.gets_original_names:
            self._write_original_names(model, ingredients, metadata)
        else:
            merge_keys(checkpoint, checkpoint.keys(), plan, model.save_to, self._form, metadata)
        self._tell(model, plan, checkpoint.files)

    def _tell(self, model: Model, plan: Plan, files: Collection[Path]) -> None:
        count = sum(1 for file, _ in plan if file in files)
        say(f"saved {model.save_to}: {count} tensors of {model.path} changed")

    def _write_original_names(
        self, model: Model, ingredients: Sequence[Ingredient], metadata: Mapping[str, str]
    ) -> None:
        """One file with the original names, each tensor put together, changed and written in turn."""
        source, form = model.source, self._form
        changes: dict[str, list[Change]] = defaultdict(list)
        for ingredient in ingredients:
            for name in ingredient.names.keys() & model.layers.keys():
                if ingredient.ratio_of(name):
                    layer = model.layers[name]
                    before = tuple(changes[layer.tensor])
                    changes[layer.tensor].append(Change(ingredient, name, layer, before))
        described = {
            name: torch.empty(source.shape(name), dtype=form.stored(name, source.stored_dtype(name)), device="meta")
            for name in source.names()
        }

        def load(name: str) -> torch.Tensor:
            dtype = described[name].dtype
            if name not in changes:
                return load_converted(source, name, dtype)
            total = widened(source.load(name, None, self.device))
            for change in changes[name]:
                total += change.values(self.device)
            return rounded(f'{source.checkpoint.label}: "{name}"', total, dtype, form.precision)

        save_one_by_one(described, load, model.save_to, metadata)

    def _metadata(self, model: Model) -> dict[str, str]:
        """Of the new file: the model's own; of a transformer with title, date and origin."""
        source = model.source.checkpoint.metadata
        told = {} if "config" in source else model.source.config_entry
        no_metadata = self.numbers.no_metadata or not model.standard
        return told | merged_model_metadata(model.path, source, model.standard, self.loras, model.save_to, no_metadata)


def _refuse_shared_outputs(models: Sequence[Model]) -> None:
    """Raises UserError when two models would be written to one place; parts of one folder or file may be."""
    for number, model in enumerate(models):
        for other in models[:number]:
            is_whole = other.is_folder or not other.gets_original_names
            together = is_whole and model.path.resolve() == other.path.resolve()
            if model.save_to.resolve() == other.save_to.resolve() and not together:
                options = f"{other.save_option} and {model.save_option}"
                raise UserError(f"{options} both name {model.save_to}; they must differ.")
