"""What the file of a merged, resized or extracted LoRA says about itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from library.console import warn
from library.modelspec import merged_from, modelspec_entries, standard_entries
from networks.adapters.lora_file import LoRAWeights
from networks.lora_tools.named_lora import NamedLoRA, kernel_is_wide

MINIMAL_KEYS = ("ss_v2", "ss_base_model_version", "ss_network_module")
HASHES = {"sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"}
BASE_MODEL_KEYS = (
    *("ss_sd_model_name", "ss_sd_model_hash", "ss_new_sd_model_hash"),
    *("ss_vae_name", "ss_vae_hash", "ss_new_vae_hash", "ss_clip_skip"),
    *("modelspec.architecture", "modelspec.implementation", "modelspec.resolution"),
    *("modelspec.prediction_type", "modelspec.encoder_layer"),
)
"""What files say about the model they were trained on; a merged file says it where all of them agree."""


def file_entries(base_model_version: str, network_module: str) -> dict[str, str]:
    """The entries without which programs do not know a LoRA file of the suite's."""
    return {"ss_v2": "False", "ss_base_model_version": base_model_version, "ss_network_module": network_module}


def extracted_metadata(
    entries: Mapping[str, str],
    standard: Mapping[str, str],
    modules: Mapping[str, LoRAWeights],
    save_to: Path,
    no_metadata: bool,
) -> dict[str, str]:
    """The metadata of a LoRA taken out of a transformer with the modelspec entries ``standard``; hashes are not in it.

    ``entries`` are those without which programs do not know the file.
    """
    needed = {**entries, **network_entries(modules), "ss_network_args": "{}"}
    if no_metadata:
        return needed
    described = dict(standard)
    described["modelspec.architecture"] += "/lora"
    return with_modelspec({**described, **needed}, save_to)


def network_entries(
    modules: Mapping[str, LoRAWeights], has_conv_rank: Callable[[Sequence[int]], bool] = kernel_is_wide
) -> dict[str, str]:
    """``ss_network_dim``, ``ss_network_alpha`` and, for convolutions with a rank of their own, ``ss_network_args``.

    ``has_conv_rank`` tells them by the shape of down. "Dynamic" stands for values that differ from module to module.
    """
    convs = [weights for weights in modules.values() if has_conv_rank(weights.down.shape)]
    others = [weights for weights in modules.values() if not has_conv_rank(weights.down.shape)]
    entries = {
        "ss_network_dim": _common(others or convs, lambda weights: len(weights.down)),
        "ss_network_alpha": _common(others or convs, lambda weights: float(weights.alpha)),
    }
    if convs:
        arguments = {
            "conv_dim": _common(convs, lambda weights: len(weights.down)),
            "conv_alpha": _common(convs, lambda weights: float(weights.alpha)),
        }
        entries["ss_network_args"] = json.dumps(arguments)
    return entries


def _common(modules: Iterable[LoRAWeights], value: Callable[[LoRAWeights], float]) -> str:
    values = {value(weights) for weights in modules}
    return str(values.pop()) if len(values) == 1 else "Dynamic"


def merged_metadata(
    files: Sequence[NamedLoRA],
    modules: Mapping[str, LoRAWeights],
    save_to: Path,
    no_metadata: bool,
    unsaid: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The metadata of ``modules``, made from ``files``, without hashes.

    ``no_metadata`` leaves what is needed to use the file; ``unsaid`` is what the result says of that where no file
    says anything.
    """
    entries = {key: value for key in MINIMAL_KEYS if (value := _agreed(key, files, warn_of_others=True))}
    entries = {**(unsaid or {}), **entries}
    entries |= network_entries(modules)
    if no_metadata:
        return entries
    entries |= {key: value for key in BASE_MODEL_KEYS if (value := _agreed(key, files))}
    standard = standard_entries(entries.get("ss_base_model_version", ""))
    if standard:
        standard["modelspec.architecture"] += "/lora"
    described = {**standard, **entries}
    return with_modelspec(described, save_to, merged_from((file.path, file.metadata) for file in files))


def merged_model_metadata(
    path: Path,
    own: Mapping[str, str],
    standard: Mapping[str, str],
    files: Sequence[NamedLoRA],
    save_to: Path,
    no_metadata: bool,
) -> dict[str, str]:
    """The metadata of the model at ``path`` with ``files`` merged into it.

    Its ``own`` stay, before the ``standard`` entries of its kind; title, date and origin are those of the new file,
    hashes of the old are left out. ``no_metadata`` leaves what is needed to use the file.
    """
    kept = {key: value for key, value in own.items() if key not in HASHES}
    if no_metadata:
        return {key: value for key, value in kept.items() if not key.startswith("modelspec.")}
    origins = [(path, own), *((file.path, file.metadata) for file in files)]
    return with_modelspec({**standard, **kept}, save_to, merged_from(origins))


def with_modelspec(entries: Mapping[str, str], save_to: Path, merged_from: str | None = None) -> dict[str, str]:
    """``entries`` with the ``modelspec.*`` keys that every file has, title and date those of the new file.

    Without a known architecture there are none.
    """
    if "modelspec.architecture" not in entries:
        return dict(entries)
    made = modelspec_entries(
        architecture=entries["modelspec.architecture"],
        implementation=entries.get("modelspec.implementation", "diffusers"),
        title=save_to.stem,
        resolution=(512, 512),
        merged_from=merged_from,
    )
    return {**entries, **made, "modelspec.resolution": entries.get("modelspec.resolution", "512x512")}


def _agreed(key: str, files: Sequence[NamedLoRA], warn_of_others: bool = False) -> str | None:
    """The value that every file with metadata has; where they differ, None, or the first one's with a warning."""
    values = list(dict.fromkeys(file.metadata[key] for file in files if key in file.metadata))
    if warn_of_others and len(values) > 1:
        warn(f"the files differ in {key} ({', '.join(values)}); the result says {values[0]}")
        return values[0]
    complete = all(key in file.metadata for file in files if file.metadata)
    return values[0] if len(values) == 1 and (complete or warn_of_others) else None
