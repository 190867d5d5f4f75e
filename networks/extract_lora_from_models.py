"""Make a LoRA of the difference between two Stable Diffusion models, by singular value decomposition."""

from __future__ import annotations

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from library.console import ConsoleOptions, run_script, set_up_console
from library.devices import parse_dtype
from library.errors import UserError
from library.options import parse_options
from networks.lora_tools.options import (
    Precision,
    check_clamp_quantile,
    check_output,
    check_rank,
    parse_device,
    save_modules,
)

if TYPE_CHECKING:
    from pathlib import Path

    from library.models.stable_diffusion.checkpoint import StableDiffusionModel
    from networks.adapters.lora_file import LoRAWeights


@dataclass
class ExtractModels:
    """Models"""

    model_org: str | None = None
    """Original model, a single file or a Diffusers folder."""
    model_tuned: str | None = None
    """Model that was made from it; the LoRA leads from the original to this one."""
    v2: bool = False
    """The models are Stable Diffusion 2.x; they are recognised without this."""
    sdxl: bool = False
    """The models are Stable Diffusion XL; they are recognised without this."""
    v_parameterization: bool = False
    """Say in the metadata that the model predicts v; unset says what the file says, yes for a 2.x file that doesn't."""
    load_precision: Precision | None = None
    """Dtype to which both models are rounded before they are compared; unset compares the files' numbers."""
    load_original_model_to: str | None = None
    """Device that the original model's tensors are read to; unset means the CPU."""
    load_tuned_model_to: str | None = None
    """Device that the tuned model's tensors are read to; unset means the CPU."""


@dataclass
class ExtractOptions:
    """LoRA"""

    save_to: str | None = None
    """File to write."""
    dim: int = 4
    """Rank; alpha is the same."""
    conv_dim: int | None = None
    """Rank of convolutions wider than 1x1; unset leaves them out."""
    device: str | None = None
    """Device to compute on, such as cuda; unset means the CPU."""
    clamp_quantile: float = 0.99
    """Cut off values of the result beyond this quantile; 1 cuts nothing off."""
    min_diff: float = 0.01
    """Leave the text encoders out unless one of their weights differs by more than this."""
    save_precision: Precision | None = None
    """Dtype of the file; unset means float."""
    no_metadata: bool = False
    """Write only the metadata that is needed to use the file."""


@dataclass
class ExtractLoraOptions:
    """Options of extract_lora_from_models.py"""

    models: ExtractModels = field(default_factory=ExtractModels)
    lora: ExtractOptions = field(default_factory=ExtractOptions)


def main(arguments: list[str] | None = None) -> None:
    """Read the options, check the files, extract."""
    options = parse_options(ExtractLoraOptions, __doc__ or "", arguments)
    set_up_console(ConsoleOptions())
    models, lora = options.models, options.lora
    save_to = check_options(models, lora)
    from library.models.stable_diffusion.checkpoint import open_stable_diffusion
    from networks.lora_tools.extraction import Comparison, Extraction, extract, layer_pairs

    device = parse_device(lora.device)
    comparison = Comparison(
        parse_dtype(models.load_precision) if models.load_precision else None,
        parse_device(models.load_original_model_to, "--load_original_model_to"),
        parse_device(models.load_tuned_model_to, "--load_tuned_model_to"),
        device,
    )
    original = open_stable_diffusion(str(models.model_org), option="--model_org")
    tuned = open_stable_diffusion(str(models.model_tuned), option="--model_tuned")
    check_models(models, original, tuned)
    text, unet = layer_pairs(original, tuned, with_conv=lora.conv_dim is not None)
    extraction = Extraction(lora.dim, lora.conv_dim, lora.clamp_quantile, lora.min_diff)
    modules = extract(text, unet, comparison, extraction)
    metadata = extracted_metadata(options, tuned, modules, save_to)
    save_modules(save_to, modules, metadata, lora.save_precision or "float")


def check_options(models: ExtractModels, lora: ExtractOptions) -> Path:
    """The file to write. Raises UserError for what the options alone show to be wrong."""
    for value, option in ((models.model_org, "--model_org"), (models.model_tuned, "--model_tuned")):
        if not value:
            raise UserError(f"{option} needs a Stable Diffusion model.")
    if models.v2 and models.sdxl:
        raise UserError("--v2 and --sdxl are mutually exclusive.")
    check_rank(lora.dim, "--dim")
    check_rank(lora.conv_dim, "--conv_dim")
    check_clamp_quantile(lora.clamp_quantile)
    if not lora.min_diff >= 0:
        raise UserError(f"--min_diff must be 0 or more, not {lora.min_diff:g}.")
    return check_output(lora.save_to, [models.model_org, models.model_tuned])


def check_models(models: ExtractModels, original: StableDiffusionModel, tuned: StableDiffusionModel) -> None:
    """Raises UserError when the models are of different families, or of another than the options say."""
    from library.models.stable_diffusion.checkpoint import MODEL_NAMES

    if original.variant != tuned.variant:
        raise UserError(
            f"--model_org is {MODEL_NAMES[original.variant]}, --model_tuned {MODEL_NAMES[tuned.variant]}; both must be"
            " of one family."
        )
    for given, option, variant in ((models.v2, "--v2", "sd2"), (models.sdxl, "--sdxl", "sdxl")):
        if given and original.variant != variant:
            raise UserError(f"{option} is given, but the models are {MODEL_NAMES[original.variant]}.")


def extracted_metadata(
    options: ExtractLoraOptions, tuned: StableDiffusionModel, modules: dict[str, LoRAWeights], save_to: Path
) -> dict[str, str]:
    """The metadata of the new file, without hashes."""
    from library.models.stable_diffusion.checkpoint import BASE_MODEL_VERSIONS
    from library.modelspec import standard_entries
    from networks.lora_tools.metadata import network_entries, with_modelspec

    told = tuned.variant == "sd2" if tuned.predicts_v is None else tuned.predicts_v
    predicts_v = options.models.v_parameterization or told
    version = BASE_MODEL_VERSIONS[tuned.variant]
    if tuned.variant != "sdxl" and predicts_v:
        version += "_v"
    entries = {
        "ss_v2": str(tuned.variant == "sd2"),
        "ss_base_model_version": version,
        "ss_network_module": "networks.lora",
        **network_entries(modules),
    }
    if options.lora.no_metadata:
        return entries
    standard = standard_entries(version)
    standard["modelspec.architecture"] += "/lora"
    standard["modelspec.prediction_type"] = "v" if predicts_v else "epsilon"
    return with_modelspec({**standard, **entries}, save_to)


if __name__ == "__main__":
    run_script(main)
