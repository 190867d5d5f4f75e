"""The model families: one row each, from which every list of families, of their scripts or of their options is made.

A row holds names, nothing is imported before it is needed. ``path.to.module:Name`` is a class in a module; families'
scripts lie above ``library/``, so that this module is the only one of it that reaches them, and only by these names.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any


@dataclass(frozen=True)
class ModelVersion:
    """A base model as the metadata of LoRA files describes it."""

    architecture: str
    """``modelspec.architecture``."""
    implementation: str
    """``modelspec.implementation``."""
    side: int
    """Pixels of the square images that it is made for."""


@dataclass(frozen=True, eq=False)
class Family:
    """One training script and what belongs to it."""

    key: str
    """Short name; also the caching tools' switch for the family."""
    name: str
    """As messages and tables name it."""
    room: str
    """Folder below ``library/models/``."""
    script: str
    """Module of the training script."""
    trainer: str
    """Class in it."""
    options: str
    """Class of all its options."""
    networks: tuple[str, ...]
    """Network modules for it, the usual one first."""
    versions: Mapping[str, ModelVersion]
    """Base models by the beginning of ``ss_base_model_version`` in LoRA files."""
    models: tuple[str, ...] = ()
    """Short names of the models in it, where there are several."""
    inference: str | None = None
    """Options class of the script that makes images, as ``module:Name``."""
    inference_tables: str | None = None
    """The page with tables of its options, where its guide has no room for them."""
    tools: tuple[str, ...] = ()
    """Options classes of the tools for its LoRA files and models, each as ``module:Name``."""
    is_default: bool = False
    """Whether the caching tools take it when no switch is given."""
    lora_name: str = ""
    """As the tools for LoRA files name it."""
    module_marks: str = ""
    """Regular expression that finds one of its LoRA files by the name of a module in the transformer or U-Net."""
    shared_marks: str = ""
    """The same for names that another family has too; they count where ``ss_base_model_version`` says it is this."""
    encoder_marks: str = ""
    """The same for files that hold nothing but modules of text encoders."""
    lora_files: str = ""
    """Class that reads its LoRA files under any program's names, as ``module:Name``; of families with several names."""

    @property
    def model_names(self) -> tuple[str, ...]:
        """Short names of its models; of a single one, the family's."""
        return self.models or (self.key,)

    @property
    def file(self) -> str:
        """File of the training script."""
        return f"{self.script}.py"

    @property
    def options_page(self) -> str:
        """Page of the documentation with a table of its options."""
        return f"docs/options_{self.script}.md"

    @property
    def inference_script(self) -> str | None:
        """Module of the script that makes images."""
        return self.inference.partition(":")[0] if self.inference else None

    def trainer_class(self) -> Any:
        """The trainer, imported now."""
        return load(f"{self.script}:{self.trainer}")

    def options_class(self) -> Any:
        """The dataclass of all options of the training script, imported now."""
        return load(f"{self.script}:{self.options}")


def load(name: str) -> Any:
    """The class ``module:Name``, imported now."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


STABLE_DIFFUSION = Family(
    key="sd",
    name="Stable Diffusion",
    lora_name="Stable Diffusion 1.x or 2.x",
    room="stable_diffusion",
    script="train_network",
    trainer="StableDiffusionNetworkTrainer",
    options="StableDiffusionTrainingOptions",
    is_default=True,
    models=("sd1", "sd2"),
    inference="gen_img:GenImgOptions",
    inference_tables="docs/options_gen_img.md",
    networks=("networks.lora", "networks.lora_fa", "networks.dylora", "networks.oft"),
    tools=(
        "networks.merge_lora:MergeLoraOptions",
        "networks.svd_merge_lora:SvdMergeOptions",
        "networks.extract_lora_from_models:ExtractLoraOptions",
        "networks.extract_lora_from_dylora:ExtractFromDyloraOptions",
    ),
    versions={
        "sd_v2_v": ModelVersion("stable-diffusion-v2-768-v", "diffusers", 768),
        "sd_v2": ModelVersion("stable-diffusion-v2-512", "diffusers", 512),
        "sd_v1": ModelVersion("stable-diffusion-v1", "diffusers", 512),
    },
    module_marks=r"lora_unet_((down|up)_blocks|mid_block)_",
    encoder_marks=r"lora_te_text_model_",
)
SDXL = Family(
    key="sdxl",
    name="Stable Diffusion XL",
    lora_name="Stable Diffusion XL",
    room="stable_diffusion",
    script="sdxl_train_network",
    trainer="SdxlNetworkTrainer",
    options="SdxlTrainingOptions",
    inference="gen_img:GenImgOptions",
    inference_tables="docs/options_gen_img.md",
    networks=("networks.lora", "networks.lora_fa", "networks.dylora", "networks.oft"),
    tools=("networks.sdxl_merge_lora:SdxlMergeOptions",),
    versions={
        "sdxl": ModelVersion("stable-diffusion-xl-v1-base", "https://github.com/Stability-AI/generative-models", 1024)
    },
    module_marks=(
        r"lora_unet_((input|output)_blocks|middle_block)_|lora_unet_\w+_attentions_\d+_transformer_blocks_[1-9]"
    ),
    encoder_marks=r"lora_te[12]_text_model_",
)
FLUX = Family(
    key="flux",
    name="FLUX.1",
    lora_name="FLUX.1",
    room="flux",
    script="flux_train_network",
    trainer="FluxNetworkTrainer",
    options="FluxTrainingOptions",
    models=("flux", "chroma"),
    inference="flux_minimal_inference:FluxInferenceOptions",
    networks=("networks.lora_flux", "networks.oft_flux"),
    tools=(
        "networks.flux_merge_lora:FluxMergeLoraOptions",
        "networks.flux_extract_lora:FluxExtractLoraOptions",
        "networks.convert_flux_lora:ConvertFluxLoraOptions",
        "tools.convert_diffusers_to_flux:ConvertDiffusersToFluxOptions",
    ),
    versions={
        "flux1": ModelVersion("flux-1-dev", "https://github.com/black-forest-labs/flux", 1024),
        "chroma": ModelVersion("chroma", "https://huggingface.co/lodestones/Chroma", 1024),
    },
    module_marks=r"lora_unet_(double|single)_blocks_",
    lora_files="networks.lora_tools.flux_lora:FluxLoRA",
)
LUMINA = Family(
    key="lumina",
    name="Lumina Image 2.0",
    lora_name="Lumina Image 2.0",
    room="lumina",
    script="lumina_train_network",
    trainer="LuminaNetworkTrainer",
    options="LuminaTrainingOptions",
    inference="lumina_minimal_inference:LuminaInferenceOptions",
    networks=("networks.lora_lumina", "networks.oft_lumina"),
    versions={"lumina": ModelVersion("lumina-2", "https://github.com/Alpha-VLLM/Lumina-Image-2.0", 1024)},
    module_marks=r"lora_unet_(layers|context_refiner|noise_refiner|cap_embedder)_",
    encoder_marks=r"lora_te1?_layers_\d+_(self_attn|mlp)_",
    lora_files="networks.lora_tools.lumina_lora:LuminaLoRA",
    tools=(
        "networks.lumina_merge_lora:LuminaMergeLoraOptions",
        "networks.lumina_extract_lora:LuminaExtractLoraOptions",
        "networks.convert_lumina_lora:ConvertLuminaLoraOptions",
    ),
)

HUNYUAN_IMAGE = Family(
    key="hunyuan_image",
    name="HunyuanImage-2.1",
    lora_name="HunyuanImage-2.1",
    room="hunyuan_image",
    script="hunyuan_image_train_network",
    trainer="HunyuanImageNetworkTrainer",
    options="HunyuanImageTrainingOptions",
    inference="hunyuan_image_minimal_inference:HunyuanImageInferenceOptions",
    networks=("networks.lora_hunyuan_image", "networks.oft_hunyuan_image"),
    versions={"hunyuan": ModelVersion("hunyuan-image-2.1", "diffusers", 2048)},
    module_marks=r"lora_unet_(double|single)_blocks_\d+_(\w+_fc\d|\w*mod\w*_linear)$",
    shared_marks=r"lora_unet_(double|single)_blocks_",
    lora_files="networks.lora_tools.hunyuan_image_lora:HunyuanImageLoRA",
    tools=(
        "networks.hunyuan_image_merge_lora:HunyuanImageMergeLoraOptions",
        "networks.hunyuan_image_extract_lora:HunyuanImageExtractLoraOptions",
    ),
)

FAMILIES = (STABLE_DIFFUSION, SDXL, FLUX, LUMINA, HUNYUAN_IMAGE)
CACHING_OPTIONS = "tools.cache_run:CachingOptions"
"""What the caching tools take beside the options of a family's training script and the families' switches."""


def by_key(key: str) -> Family:
    """The family of a short name. Raises KeyError for any other."""
    return {family.key: family for family in FAMILIES}[key]


def by_model(model: str) -> Family:
    """The family of a model by its short name (``sd1``, ``sdxl``, ``chroma``). Raises KeyError for any other."""
    return {name: family for family in FAMILIES for name in family.model_names}[model]


def by_options(options: Any) -> Family:
    """The family whose training script has options of this class."""
    found = {family.options: family for family in FAMILIES}
    return next(found[made.__name__] for made in type(options).__mro__ if made.__name__ in found)


def switches() -> dict[str, Family]:
    """The families that the caching tools have a switch for, by its name without ``--``."""
    return {family.key: family for family in FAMILIES if not family.is_default}


def network_modules() -> list[str]:
    """Names of the network modules of this suite, each once."""
    return sorted({module for family in FAMILIES for module in family.networks})


def script_options() -> Iterator[Any]:
    """The options classes of every script that reads a configuration file, imported now."""
    for family in FAMILIES:
        yield family.options_class()
        if family.inference:
            yield load(family.inference)


def version_of(base_model_version: str) -> tuple[Family, ModelVersion] | None:
    """Whose model ``ss_base_model_version`` names; the beginnings that are tried first are the longest."""
    found = {begin: (family, version) for family in FAMILIES for begin, version in family.versions.items()}
    for begin in sorted(found, key=len, reverse=True):
        if base_model_version.startswith(begin):
            return found[begin]
    return None


def lora_family(modules: Collection[str], base_model_version: str = "") -> Family | None:
    """The model family that a LoRA file is for.

    ``modules``: names of its modules. Those in the transformer or U-Net decide; where there is none or two families
    have them, ``base_model_version`` (``ss_base_model_version``) does, then the names in text encoders. None where
    nothing does.
    """
    # The names of one family may hold the marks of another; the more special of two stands before it.
    known = tuple(reversed(FAMILIES))

    def marked(marks: Callable[[Any], str]) -> Iterator[Family]:
        for family in known:
            pattern = marks(family)
            if pattern and any(re.match(pattern, name) for name in modules):
                yield family

    by_version = [family for family in known if base_model_version.startswith(tuple(family.versions))]
    found = chain(
        (family for family in marked(lambda family: family.shared_marks) if family in by_version),
        marked(lambda family: family.module_marks),
        by_version,
        marked(lambda family: family.encoder_marks),
    )
    return next(found, None)
