"""Models for captions and masks, in folders that users name; which kind one is, its files say."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from library.checkpoints import is_hub_id
from library.errors import UserError
from library.text_files import parse_json, read_text

if TYPE_CHECKING:
    import torch

CONFIG = "config.json"


@dataclass
class ModelOptions:
    """Model"""

    model: str | None = None
    """Folder of the model; its files say which kind it is."""
    batch_size: int = 4
    """Images that the model gets at once."""
    device: str | None = None
    """Device that the model works on, such as cuda:1 or cpu; unset means the GPU, if there is one."""
    dtype: Literal["fp32", "fp16", "bf16"] | None = None
    """Dtype that the model works in; unset means bf16 on a GPU and fp32 on the CPU."""


def model_path(name: str | None) -> Path:
    """The folder or file of ``--model``. Raises UserError for none; nothing is fetched."""
    if name is None:
        raise UserError("--model is missing: name the folder of a model.")
    path = Path(name)
    if path.exists():
        return path
    if is_hub_id(name):
        identity = path.as_posix()
        raise UserError(
            f"--model: there is no folder {name}. If it is a model on the Hugging Face hub, fetch it yourself: "
            f'"hf download {identity} --local-dir models/{path.name}", then --model models/{path.name}.'
        )
    raise UserError(f"--model: there is no folder {name}.")


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model folder. Raises UserError."""
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"--model: {folder} has no {CONFIG}, which says what kind of model it is.")
    config = parse_json(read_text(path), path)
    if not isinstance(config, dict):
        raise UserError(f"{path}: is not the configuration of a model.")
    return config


def transformers_kind(folder: Path, known: Collection[str], purpose: str) -> str:
    """``model_type`` of a model folder in the layout of transformers, which must be one of ``known``.

    Raises UserError for another one, and for a model that needs program code of its own.
    """
    config = read_config(folder)
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in known:
        named = f"is a model of the type {kind}" if isinstance(kind, str) else "does not name its model_type"
        raise UserError(f"--model: {folder / CONFIG} {named}; {purpose} are made by {', '.join(known)}.")
    if "auto_map" in config:
        hint = ""
        if kind == "florence2":
            hint = "; the same weights in the layout that transformers reads are florence-community/Florence-2-*"
        raise UserError(f"--model: {folder} brings program code of its own, which is not run{hint}.")
    return kind


def read_model(model_class: Any, folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """A model of transformers, ready to work. Raises UserError for files that are damaged or incomplete."""
    quiet_transformers()
    try:
        model, report = model_class.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
        model = model.to(device).eval()
    except Exception as error:  # whatever a damaged file makes transformers raise
        raise UserError(f"--model: {folder} cannot be read ({first_line(error)}).") from None
    weights = {name for name, _ in model.named_parameters()}
    missing = sorted(weights & set(report["missing_keys"]))
    if missing:
        raise UserError(f"--model: {folder} lacks {len(missing)} weights ({', '.join(missing[:3])}).")
    return model


def read_processor(auto_class: Any, folder: Path, **named: Any) -> Any:
    """A tokenizer or processor of transformers. Raises UserError for files that are missing or damaged."""
    quiet_transformers()
    try:
        return auto_class.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **named)
    except Exception as error:  # as in read_model
        raise UserError(
            f"--model: the tokenizer or image settings of {folder} cannot be read ({first_line(error)})."
        ) from None


def quiet_transformers() -> None:
    """Its remarks about files and options are for programmers."""
    from transformers.utils import logging as messages

    messages.set_verbosity_error()
    messages.disable_progress_bar()


def first_line(error: Exception) -> str:
    """An error of a library in a few words, without a full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")


def device_and_dtype(options: ModelOptions) -> tuple[torch.device, torch.dtype]:
    """Where the model works, and in which dtype. Raises UserError for a device that is not there."""
    from library.devices import default_device, named_device, parse_dtype

    device = default_device() if options.device is None else named_device(options.device)
    return device, parse_dtype(options.dtype or ("fp32" if device.type == "cpu" else "bf16"))
