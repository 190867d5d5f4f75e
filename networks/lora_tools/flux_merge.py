"""What flux_merge_lora.py does with its options."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from library.console import say, warn
from library.devices import parse_dtype
from library.errors import UserError
from library.models.clip import open_clip
from library.models.flux.checkpoint import open_transformer
from library.models.loading import TensorSource
from library.models.t5 import open_t5
from library.modelspec import merged_from, standard_entries
from library.safetensors_io import save_one_by_one
from networks.lora_flux import CLIP_L, T5XXL, TRANSFORMER
from networks.lora_tools.arithmetic import concatenated
from networks.lora_tools.flux_layers import encoder_layers, transformer_layers
from networks.lora_tools.flux_lora import FluxLoRA
from networks.lora_tools.flux_metadata import flux_entries
from networks.lora_tools.merging import Ingredient, check_ingredients, exact_sum, shuffled, summed
from networks.lora_tools.metadata import merged_metadata, with_modelspec
from networks.lora_tools.model_merging import (
    Change,
    Layer,
    MergeFormat,
    Plan,
    merge_into_file,
    merge_into_folder,
    plan_merge,
    rounded,
)
from networks.lora_tools.options import LORA_SUFFIXES, check_merge_files, check_output, parse_device, save_modules

if TYPE_CHECKING:
    from networks.flux_merge_lora import FluxMergeNumbers, FluxMergeTargets
    from networks.lora_tools.options import MergeFiles

HASHES = {"sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"}
OPTIONS = {TRANSFORMER.prefix: "--flux_model", CLIP_L.prefix: "--clip_l", T5XXL.prefix: "--t5xxl"}


@dataclass(frozen=True)
class Model:
    """An opened model with the option that names it and the file to write."""

    option: str
    path: Path
    save_to: Path
    source: TensorSource
    layers: Mapping[str, Layer]
    model_type: str = ""
    """Of a transformer: ``flux`` or ``chroma``."""


class FluxMergeRun:
    """The files of a merge, opened and checked."""

    def __init__(self, files: MergeFiles, targets: FluxMergeTargets, numbers: FluxMergeNumbers) -> None:
        check_merge_files(files)
        self.files, self.numbers = files, numbers
        self.device = parse_device(numbers.working_device, "--working_device")
        parse_device(numbers.loading_device, "--loading_device")
        self.loras = [FluxLoRA(path) for path in files.models]
        for lora in self.loras:
            lora.require_known()
        self.models = self._open_models(targets)

    def _open_models(self, targets: FluxMergeTargets) -> list[Model]:
        models = []
        if targets.flux_model:
            opened = open_transformer(targets.flux_model, option="--flux_model", model_type=None)
            layers = transformer_layers(opened)
            path = Path(targets.flux_model)
            models.append(self._model("--flux_model", path, self.files.save_to, opened, layers, opened.model_type))
        for encoder_path, option, save_to, open_encoder in (
            (targets.clip_l, "--clip_l", targets.clip_l_save_to, open_clip),
            (targets.t5xxl, "--t5xxl", targets.t5xxl_save_to, open_t5),
        ):
            if encoder_path:
                encoder: Any = open_encoder(encoder_path, option=option)
                models.append(self._model(option, Path(encoder_path), save_to, encoder, encoder_layers(encoder)))
        outputs = [model.save_to.resolve() for model in models]
        if len(set(outputs)) < len(outputs):
            raise UserError(f"--save_to, --clip_l_save_to and --t5xxl_save_to must be different files: {outputs[0]}.")
        return models

    def _model(
        self, option: str, path: Path, save_to: str | None, opened: Any, layers: Mapping[str, Layer], kind: str = ""
    ) -> Model:
        suffixes = (".safetensors", "") if path.is_dir() else (".safetensors",)
        inputs = [*self.files.models, *(str(file) for file in opened.source.checkpoint.files)]
        target = check_output(save_to, inputs, suffixes)
        if not target.suffix and target.exists():
            raise UserError(f"--save_to: {target} exists already; name a new folder.")
        return Model(option, path, target, opened.source, layers, kind)

    # LoRA files into one

    def merge_files(self, concat: bool, shuffle: bool) -> None:
        """Write the exact sum of the files as one LoRA."""
        save_to = check_output(self.files.save_to, self.files.models, LORA_SUFFIXES)
        ingredients = [Ingredient(lora, ratio) for lora, ratio in zip(self.loras, self.files.ratios)]
        check_ingredients(ingredients)
        modules = summed(ingredients, concatenated if concat else exact_sum, self.device)
        if shuffle:
            modules = shuffled(modules)
        metadata = merged_metadata(self.loras, modules, save_to, self.numbers.no_metadata, flux_entries("flux"))
        precision = self.numbers.precision
        saved: Any = self.numbers.save_precision or precision
        if saved.startswith("fp8"):
            raise UserError(f"--save_precision {saved} is for models; a LoRA file needs float, fp16 or bf16.")
        save_modules(save_to, modules, metadata, saved, precision)

    # LoRA files into models

    def merge_into_models(self) -> None:
        """Write each model with the modules that are for it."""
        ingredients = [Ingredient(lora, ratio) for lora, ratio in zip(self.loras, self.files.ratios)]
        check_ingredients(ingredients)
        layers = {name: layer for model in self.models for name, layer in model.layers.items()}
        self._leave_out_other_models(ingredients)
        plan = plan_merge(ingredients, layers)
        for model in self.models:
            self._write(model, plan, ingredients)

    def _leave_out_other_models(self, ingredients: Sequence[Ingredient]) -> None:
        """Modules of a model that is not given stay out, which is said. Raises UserError when nothing is left."""
        given = {model.option for model in self.models}
        for ingredient in ingredients:
            lora = ingredient.lora
            assert isinstance(lora, FluxLoRA)
            for prefix, option in OPTIONS.items():
                names = [name for name, target in lora.targets.items() if target.table.prefix == prefix]
                if names and option not in given:
                    warn(f"{lora.path}: {len(names)} modules are left out, because no {option} is given to merge into")
                    for name in names:
                        del ingredient.names[name]
        if not any(ingredient.names for ingredient in ingredients):
            raise UserError(f"--models hold no modules for {' or '.join(sorted(given))}; there is nothing to merge.")

    def _write(self, model: Model, plan: Plan, ingredients: Sequence[Ingredient]) -> None:
        save_dtype = parse_dtype(self.numbers.save_precision) if self.numbers.save_precision else None
        form = MergeFormat(parse_dtype(self.numbers.precision), save_dtype, self.device)
        files = model.source.checkpoint.files
        count = sum(1 for file, _ in plan if file in files)
        if not model.save_to.suffix:
            merge_into_folder(model.path, files, plan, model.save_to, form, {})
        elif len(files) == 1:
            merge_into_file(files[0], plan, model.save_to, form, self._metadata(model))
        else:
            self._write_in_original_layout(model, ingredients, form)
        say(f"saved {model.save_to}: {count} tensors of {model.path} changed")

    def _write_in_original_layout(self, model: Model, ingredients: Sequence[Ingredient], form: MergeFormat) -> None:
        """Of shards: one file with the original names, each tensor put together, changed and written in turn."""
        source = model.source
        changes: dict[str, list[Change]] = defaultdict(list)
        for ingredient in ingredients:
            for name in ingredient.names.keys() & model.layers.keys():
                if ingredient.ratio_of(name):
                    layer = model.layers[name]
                    changes[layer.tensor].append(Change(ingredient, name, layer))
        described = {
            name: torch.empty(source.shape(name), dtype=form.stored(name, source.stored_dtype(name)), device="meta")
            for name in source.names()
        }

        def load(name: str) -> torch.Tensor:
            total = source.load(name, None, self.device)
            if name not in changes:
                return total.to("cpu", described[name].dtype)
            total = total.to(torch.promote_types(total.dtype, torch.float32))
            for change in changes[name]:
                total += change.values(self.device)
            return rounded(name, total, described[name].dtype, form.precision)

        save_one_by_one(described, load, model.save_to, self._metadata(model))

    def _metadata(self, model: Model) -> dict[str, str]:
        """The model's own metadata; title, date and origin of a transformer are those of the new file."""
        source = model.source.checkpoint.metadata
        kept = {key: value for key, value in source.items() if key not in HASHES}
        if self.numbers.no_metadata or not model.model_type:
            return {key: value for key, value in kept.items() if not key.startswith("modelspec.")}
        standard = standard_entries("chroma" if model.model_type == "chroma" else "flux1")
        origins = [(model.path, source), *((lora.path, lora.metadata) for lora in self.loras)]
        return with_modelspec({**standard, **kept}, model.save_to, merged_from(origins))
