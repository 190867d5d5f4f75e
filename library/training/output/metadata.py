"""Metadata of LoRA files: the ``ss_*`` keys of kohya-ss/sd-scripts that many programs show, and modelspec 1.0.1.

All values are strings: Python's ``str`` of an option's value, or JSON. https://github.com/Stability-AI/ModelSpec
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import mimetypes
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.console import warn
from library.errors import UserError
from library.files import open_regular
from library.modelspec import modelspec_entries
from library.training.optim.optimizers import CreatedOptimizer

MINIMAL_KEYS = (
    "ss_v2",
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
)
"""What ``--no_metadata`` leaves of the ``ss_*`` keys: what a program needs to use the file."""


@dataclass
class MetadataOptions:
    """Metadata"""

    no_metadata: bool = False
    """Leave out how the file was trained; what is needed to use it stays."""
    training_comment: str | None = None
    """Comment that is stored in the file."""
    metadata_title: str | None = None
    """Title of the model; unset means --output_name."""
    metadata_author: str | None = None
    """Author of the model."""
    metadata_description: str | None = None
    """Description of the model."""
    metadata_license: str | None = None
    """License of the model."""
    metadata_tags: str | None = None
    """Tags of the model, separated by commas."""
    metadata_usage_hint: str | None = None
    """Hint on how to use the model."""
    metadata_thumbnail: str | None = None
    """Image file (or data URL) that is stored in the file as its thumbnail."""
    metadata_merged_from: str | None = None
    """Models that this one was merged from."""
    metadata_trigger_phrase: str | None = None
    """Words that call up what was trained."""
    metadata_preprocessor: str | None = None
    """Preprocessing that the model's input needs."""
    metadata_is_negative_embedding: str | None = None
    """Whether the model is meant for negative prompts: true or false."""


@dataclass(frozen=True)
class SessionFacts:
    """What the metadata says about a run beyond its options."""

    session_id: int
    started_at: float
    """Unix time."""
    seed: int
    optimizer: CreatedOptimizer
    max_train_steps: int
    num_batches_per_epoch: int
    """Batches of one process."""
    num_epochs: int
    num_train_images: int
    num_reg_images: int = 0
    num_validation_images: int = 0
    network_args: Mapping[str, Any] | None = None
    """Parsed --network_args, or None when none were given."""


# ss_ key -> option, where the two are not simply "ss_" + option
_RENAMED = {"debiased_estimation": "debiased_estimation_loss"}
_FROM_OPTIONS = """
    output_name learning_rate unet_lr text_encoder_lr
    gradient_checkpointing gradient_accumulation_steps lr_warmup_steps lr_scheduler max_grad_norm
    network_module network_dim network_alpha network_dropout
    mixed_precision full_fp16 fp8_base fp8_base_unet lowram cache_latents
    v2 clip_skip max_token_length training_comment
    noise_offset noise_offset_random_strength multires_noise_iterations multires_noise_discount adaptive_noise_scale
    zero_terminal_snr ip_noise_gamma ip_noise_gamma_random_strength
    min_snr_gamma debiased_estimation loss_type huber_schedule huber_scale huber_c prior_loss_weight scale_weight_norms
    caption_dropout_rate caption_dropout_every_n_epochs caption_tag_dropout_rate face_crop_aug_range
    resize_interpolation
    validation_seed validation_split max_validation_steps validate_every_n_epochs validate_every_n_steps
""".split()
OPTIONS_USED = frozenset(_RENAMED.get(key, key) for key in _FROM_OPTIONS)
"""Names of the options that ``training_metadata`` reads."""


def training_metadata(
    options: Mapping[str, Any], facts: SessionFacts, dataset: Mapping[str, Any], family: Mapping[str, Any]
) -> dict[str, str]:
    """The ``ss_*`` entries that stay the same during a run; ``at_step`` adds the rest.

    ``options`` holds every option by name. ``dataset`` holds the entries about the data (of
    ``library.data.metadata``), ``family`` what only this family writes, ``ss_base_model_version`` among it; its values
    win. Raises KeyError for a missing option.
    """
    entries: dict[str, Any] = {f"ss_{key}": options[_RENAMED.get(key, key)] for key in _FROM_OPTIONS}
    optimizer = facts.optimizer
    entries["ss_learning_rate"] = optimizer.learning_rate
    if optimizer.forced_scheduler:
        entries |= {"ss_lr_scheduler": optimizer.forced_scheduler, "ss_unet_lr": None, "ss_text_encoder_lr": None}
    elif options["lr_scheduler_type"]:
        entries["ss_lr_scheduler"] = options["lr_scheduler_type"]
    entries |= {
        "ss_session_id": facts.session_id,
        "ss_training_started_at": facts.started_at,
        "ss_seed": facts.seed,
        "ss_optimizer": optimizer.description,
        "ss_max_train_steps": facts.max_train_steps,
        "ss_num_batches_per_epoch": facts.num_batches_per_epoch,
        "ss_num_epochs": facts.num_epochs,
        "ss_num_train_images": facts.num_train_images,
        "ss_num_reg_images": facts.num_reg_images,
        "ss_num_validation_images": facts.num_validation_images,
        "ss_sd_scripts_commit_hash": "(unknown)",
    }
    if facts.network_args is not None:
        entries["ss_network_args"] = json.dumps(
            {**facts.network_args, "dropout": facts.network_args.get("dropout", options["network_dropout"])}
        )
    return {key: str(value) for key, value in {**entries, **dataset, **family}.items()}


def at_step(
    metadata: Mapping[str, str], steps: int, epoch: int, no_metadata: bool, modelspec: Mapping[str, str]
) -> dict[str, str]:
    """The metadata of the file that is saved now: ``steps`` updates, ``epoch`` as the file names it."""
    now = {"ss_steps": str(steps), "ss_epoch": str(epoch), "ss_training_finished_at": str(time.time())}
    complete = {**metadata, **now}
    if no_metadata:
        complete = {key: complete[key] for key in MINIMAL_KEYS if key in complete}
    return {**complete, **modelspec}


# --- modelspec --------------------------------------------------------------------------------------------------------

_DESCRIPTIVE = """author description license tags usage_hint merged_from trigger_phrase preprocessor
    is_negative_embedding""".split()


def modelspec_metadata(
    options: MetadataOptions,
    *,
    architecture: str,
    implementation: str,
    output_name: str | None,
    resolution: tuple[int, int],
    prediction_type: str | None = None,
    timestep_range: tuple[int | None, int | None] = (None, None),
    clip_skip: int | None = None,
    trigger_phrase: str | None = None,
    date: datetime.datetime | None = None,
) -> dict[str, str]:
    """The ``modelspec.*`` entries of a LoRA for ``architecture`` (``flux-1-dev``); ``resolution`` is (width, height).

    ``timestep_range`` holds --min_timestep and --max_timestep; ``trigger_phrase`` counts where no option gives one. A
    thumbnail that cannot be read is left out with a warning.
    """
    date = date or datetime.datetime.now()
    title = options.metadata_title or output_name or f"LoRA@{date.timestamp()}"
    others: dict[str, str] = {}
    if prediction_type is not None:
        others["prediction_type"] = prediction_type
    low, high = timestep_range
    if low is not None or high is not None:
        others["timestep_range"] = f"{0 if low is None else low},{1000 if high is None else high}"
    if clip_skip is not None:
        others["encoder_layer"] = str(clip_skip)
    if trigger_phrase is not None:
        others["trigger_phrase"] = trigger_phrase
    for name in _DESCRIPTIVE:
        value = getattr(options, f"metadata_{name}")
        if value is not None:
            others[name] = value
    thumbnail = _data_url(options.metadata_thumbnail) if options.metadata_thumbnail else None
    if thumbnail is not None:
        others["thumbnail"] = thumbnail
    return modelspec_entries(
        architecture=f"{architecture}/lora",
        implementation=implementation,
        title=title,
        resolution=resolution,
        date=date,
        **others,
    )


def modelspec_resolution(resolution: str | None, default: int = 1024) -> tuple[int, int]:
    """``--resolution`` ("512" or "512,768") as (width, height); ``default`` squared when it is not given."""
    sizes = [int(part) for part in resolution.split(",")] if resolution else [default]
    return sizes[0], sizes[-1]


def _data_url(image: str) -> str | None:
    if image.startswith("data:"):
        return image
    kind = mimetypes.guess_type(image)[0] or "application/octet-stream"
    try:
        with open_regular(image) as file:
            content = file.read()
    except (OSError, UserError) as error:
        reason = getattr(error, "strerror", None) or "not a regular file"
        warn(f"--metadata_thumbnail: {image} cannot be read ({reason}); the file gets no thumbnail.")
        return None
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


# --- hashes of the base model -----------------------------------------------------------------------------------------


def legacy_hash(path: str | Path) -> str:
    """First 8 hex digits of the SHA-256 of 64 KiB at offset 1 MiB; "NOFILE", "IsADirectory" where there is no file."""
    return _hash(Path(path), 0x10000, offset=0x100000)[:8] if Path(path).is_file() else _no_file(Path(path))


def full_hash(path: str | Path) -> str:
    """SHA-256 of the whole file as hex; "NOFILE", "IsADirectory" where there is no file."""
    return _hash(Path(path)) if Path(path).is_file() else _no_file(Path(path))


def _no_file(path: Path) -> str:
    return "IsADirectory" if path.is_dir() else "NOFILE"


def _hash(path: Path, size: int | None = None, offset: int = 0) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(offset)
        if size is not None:
            digest.update(file.read(size))
        else:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


class BackgroundHashes:
    """Names and hashes of the base model's files, computed in a thread while training starts.

    ``BackgroundHashes(sd_model=path, vae=None)``: ``entries()`` gives ``ss_sd_model_name``, ``ss_sd_model_hash``,
    ``ss_new_sd_model_hash`` and waits for the thread if need be. A path that does not exist (a hub id) has a name only.
    """

    def __init__(self, **paths: str | None) -> None:
        self._entries: dict[str, str] = {}
        self._problems: list[str] = []
        given = {name: path for name, path in paths.items() if path}
        self._thread = threading.Thread(target=self._compute, args=(given,), name="model-hashes", daemon=True)
        self._thread.start()

    def _compute(self, paths: Mapping[str, str]) -> None:
        for name, path in paths.items():
            exists = Path(path).exists()
            self._entries[f"ss_{name}_name"] = Path(path).name if exists else path
            if not exists:
                continue
            try:
                self._entries[f"ss_{name}_hash"] = legacy_hash(path)
                self._entries[f"ss_new_{name}_hash"] = full_hash(path)
            except OSError as error:
                self._problems.append(f"{path} can no longer be read ({error.strerror}); saved files lack its hash.")

    def entries(self) -> dict[str, str]:
        """The metadata entries. A file that could not be read is named in a warning, once."""
        self._thread.join()
        while self._problems:
            warn(self._problems.pop(0))
        return dict(self._entries)
