"""Training curves for TensorBoard and Weights & Biases."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any, Literal

from library.console import printable, say, warn
from library.errors import UserError, in_one_line
from library.files import require_writable_folder
from library.options import SECRETS
from library.text_files import read_toml

if TYPE_CHECKING:
    import torch


@dataclass
class LoggingOptions:
    """Logging"""

    logging_dir: str | None = None
    """Folder for training curves; given alone it means TensorBoard."""
    log_with: Literal["tensorboard", "wandb", "all"] | None = None
    """Where training curves go: tensorboard (needs --logging_dir), wandb, or all for both."""
    log_prefix: str | None = None
    """Beginning of the name of the run's folder in --logging_dir; the start time follows."""
    log_tracker_name: str | None = None
    """Name of the run's inner folder and of the W&B project; unset means network_train."""
    wandb_run_name: str | None = None
    """Name of the run in W&B."""
    log_tracker_config: str | None = None
    """TOML file whose [wandb] table replaces the arguments of wandb.init."""
    wandb_api_key: str | None = None
    """Key to log in to W&B with."""
    log_config: bool = False
    """Also log the options of the run, without secrets and paths."""


DEFAULT_NAME = "network_train"
PATH_OPTIONS = frozenset(
    """
    pretrained_model_name_or_path vae clip_l t5xxl ae tokenizer_cache_dir train_data_dir reg_data_dir
    conditioning_data_dir in_json dataset_config config_file console_log_file output_dir logging_dir resume
    network_weights base_weights sample_prompts log_tracker_config metadata_thumbnail controlnet_model_name_or_path
    """.split()
)


def check_logging_options(options: LoggingOptions, read_only: bool = False) -> None:
    """Check the options, the packages and the tracker configuration before anything is loaded. Raises UserError.

    With ``read_only`` the folder is not made.
    """
    import importlib.util

    targets = logging_targets(options)
    if "tensorboard" in targets and not options.logging_dir:
        raise UserError(f"--log_with {options.log_with} needs --logging_dir: the folder for TensorBoard's files.")
    for target in targets:
        specification = importlib.util.find_spec(target)
        if specification is None or specification.origin is None:  # W&B's own folder ./wandb is no package
            raise UserError(
                f'Logging to {target} needs the package {target}, which is not installed: run "pip install {target}".'
            )
    for option in ("log_prefix", "log_tracker_name"):
        name = PureWindowsPath(getattr(options, option) or "")  # knows the separators and drives of every system
        if name.anchor or ".." in name.parts:
            raise UserError(f"--{option} must name a place within --logging_dir, not {name}.")
    if options.logging_dir and targets:
        require_writable_folder(Path(options.logging_dir), "--logging_dir", read_only)
    if options.log_tracker_config:
        _wandb_arguments(options)
    if "wandb" in targets:
        _warn_of_secrets(sys.argv)


def _warn_of_secrets(arguments: Sequence[str]) -> None:
    """W&B keeps the command line of a run; what stands in a configuration file it does not see."""
    shown = sorted(name for name in SECRETS if any(a.partition("=")[0] == f"--{name}" for a in arguments))
    if shown:
        names = " and ".join(f"--{name}" for name in shown)
        warn(f"W&B stores the command line of a run, with the value of {names}; give it in --config_file instead.")


def logging_targets(options: LoggingOptions) -> list[str]:
    """Where training curves go: tensorboard, wandb, both or nowhere."""
    if options.log_with is None:
        return ["tensorboard"] if options.logging_dir else []
    return ["tensorboard", "wandb"] if options.log_with == "all" else [options.log_with]


def _wandb_arguments(options: LoggingOptions) -> dict[str, Any]:
    """The arguments of ``wandb.init``; the ``[wandb]`` table of ``--log_tracker_config`` replaces the usual ones."""
    if not options.log_tracker_config:
        return {"name": options.wandb_run_name} if options.wandb_run_name else {}
    table = read_toml(Path(options.log_tracker_config)).get("wandb", {})
    if not isinstance(table, dict):
        raise UserError(f'{options.log_tracker_config}: "wandb" must be a table, [wandb].')
    return table


def loggable_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` without secrets and paths."""
    return {name: value for name, value in options.items() if name not in SECRETS | PATH_OPTIONS}


class Tracker:
    """Sends scalars and images to where the options say; does nothing without a target or on other processes."""

    def __init__(self, options: LoggingOptions, run_options: Mapping[str, Any], is_main: bool = True) -> None:
        self._tensorboard: _EventFile | None = None
        self._wandb: Any = None
        self._warned = False
        targets = logging_targets(options) if is_main else []
        self.active = bool(targets)
        if not targets:
            return
        name = options.log_tracker_name or DEFAULT_NAME
        config = loggable_options(run_options) if options.log_config else {}
        folder = None
        if options.logging_dir:
            folder = Path(options.logging_dir) / f"{options.log_prefix or ''}{time.strftime('%Y%m%d%H%M%S')}"
        if "tensorboard" in targets:
            assert folder is not None  # check_logging_options
            self._tensorboard = _EventFile(folder / name)
            if config:
                rows = "".join(f"|{key}|{_cell(value)}|\n" for key, value in config.items())
                self._tensorboard.add_text("config", f"|option|value|\n|---|---|\n{rows}")
        if "wandb" in targets:
            self._wandb = _start_wandb(options, name, config, folder)

    def log(self, values: Mapping[str, float], x: int, epoch: int, global_step: int | None = None) -> None:
        """Log scalars. ``x`` is the position on the curve: updates done, or the epoch for values of an epoch.

        ``epoch`` (1-based) and ``global_step`` (updates done; unset means ``x``) accompany the values in W&B.
        """
        if self._tensorboard is not None:
            self._tensorboard.add_scalars(values, x)
        if self._wandb is not None:
            with self._without_risk():
                steps = x if global_step is None else global_step
                self._wandb.log({**values, "global_step": steps, "epoch": epoch})

    def log_image(self, index: int, prompt: Any, image: Any) -> None:
        """Show a sample image (PIL) in W&B as ``sample_{index}``, with its prompt."""
        if self._wandb is None:
            return
        with self._without_risk():
            import wandb

            caption = getattr(prompt, "prompt", None) or str(prompt)
            self._wandb.log({f"sample_{index}": wandb.Image(image, caption=caption)}, commit=False)

    @contextlib.contextmanager
    def _without_risk(self) -> Iterator[None]:
        """Around calls of W&B: what fails there becomes a warning, given once."""
        try:
            yield
        except Exception as error:
            if not self._warned:
                warn(f"logging to W&B failed: {in_one_line(error)}. The training continues.")
                self._warned = True

    def finish(self) -> None:
        """Close the files and end the W&B run."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            with self._without_risk():
                self._wandb.finish()


def _start_wandb(options: LoggingOptions, project: str, config: dict[str, Any], folder: Path | None) -> Any:
    import wandb

    arguments: dict[str, Any] = {"project": project, "config": config, **_wandb_arguments(options)}
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        arguments.setdefault("dir", os.fspath(folder))
    try:
        if options.wandb_api_key:
            wandb.login(key=options.wandb_api_key)
        run = wandb.init(**arguments)
    except (wandb.errors.Error, TypeError, ValueError) as error:
        raise UserError(f"--log_with wandb: {error}") from error
    for metric in ("epoch", "val_step", "global_step"):
        run.define_metric(metric, hidden=True)
    return run


def _cell(value: Any) -> str:
    """A value for a cell of a table in Markdown: one line, without columns, links and markup of its own."""
    return re.sub(r"([\\|<\[`])", r"\\\1", " ".join(printable(str(value)).split()))


class _EventFile:
    """A TensorBoard event file. Each record is on its way to the disk at once, so that a killed run keeps its curves.

    Written with TensorBoard's own record writer; its usual front end would import all of TensorFlow where installed.
    """

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        try:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.0"
            self._writer = RecordWriter(open(path, "wb"))  # noqa: SIM115 (closed by close)
        except OSError as error:
            raise UserError(f"--logging_dir: cannot write in {folder} ({error.strerror}).") from None
        self._event = Event
        self._failed = False
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        say(f"training curves: tensorboard --logdir {folder.parent.parent}")

    def add_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Several scalars at one position."""
        event = self._event(wall_time=time.time(), step=step)
        for tag, value in values.items():
            event.summary.value.add(tag=tag, simple_value=float(value))
        self._write(event)

    def add_text(self, tag: str, markdown: str) -> None:
        """A text for TensorBoard's Text page."""
        event = self._event(wall_time=time.time(), step=0)
        value = event.summary.value.add(tag=f"{tag}/text_summary")
        value.metadata.plugin_data.plugin_name = "text"
        value.tensor.dtype = 7  # DT_STRING
        value.tensor.string_val.append(markdown.encode("utf-8", "replace"))
        self._write(event)

    def _write(self, event: Any) -> None:
        """A full disk costs the curves, not the training."""
        if self._failed:
            return
        try:
            self._writer.write(event.SerializeToString())
            self._writer.flush()
        except OSError as error:
            self._failed = True
            with contextlib.suppress(OSError):  # or what is left to write would be complained of at the very end
                self._writer.close()
            warn(f"--logging_dir: writing the training curves failed ({error.strerror}); they end here.")

    def close(self) -> None:
        """Close the file."""
        if not self._failed:
            with contextlib.suppress(OSError):  # every record is on its way already
                self._writer.close()


# --- which scalars ----------------------------------------------------------------------------------------------------


def learning_rate_scalars(
    optimizer: torch.optim.Optimizer, scheduler: Any, group_names: Sequence[str] | None, unet_only: bool = False
) -> dict[str, float]:
    """``lr/<group>`` for every parameter group, and ``lr/d*lr/<group>`` where the optimizer adapts a factor d.

    Without names the groups are textencoder (the first, unless ``unet_only``), group1, group2, ...
    """
    rates = scheduler.get_last_lr()
    names = list(group_names or _default_names(len(rates), unet_only))
    scalars = {f"lr/{name}": float(rate) for name, rate in zip(names, rates)}
    groups = optimizer.param_groups
    factors = [group.get("d") for group in groups]
    if (
        type(getattr(optimizer, "optimizer", optimizer)).__name__ == "ProdigyPlusScheduleFree"
        and factors[0] is not None
    ):
        scalars["lr/d*lr"] = float(factors[0] * groups[0]["lr"])
    else:
        for name, group, factor in zip(names, groups, factors):
            if factor is not None:
                scalars[f"lr/d*lr/{name}"] = float(factor * group["lr"])
    return scalars


def _default_names(count: int, unet_only: bool) -> list[str]:
    return [f"group{i}" if i or unet_only else "textencoder" for i in range(count)]


def norm_scalars(network: Any, max_norm_result: tuple[Any, Any, Any] | None) -> dict[str, float]:
    """Norms of the network's weights and gradients, as far as it measures them.

    ``max_norm_result`` is (keys scaled, mean norm, largest norm) from ``apply_max_norm_regularization``, or None.
    """
    if max_norm_result is not None:
        keys_scaled, mean, largest = max_norm_result
        found = {"max_norm/keys_scaled": keys_scaled, "norm/avg_key_norm": mean, "max_norm/max_key_norm": largest}
    elif hasattr(network, "weight_norms"):
        weights, gradients, combined = network.weight_norms(), network.grad_norms(), network.combined_weight_norms()
        found = {
            "norm/avg_key_norm": None if weights is None else weights.mean(),
            "max_norm/max_key_norm": None if weights is None else weights.max(),
            "norm/avg_grad_norm": None if gradients is None else gradients.mean(),
            "norm/avg_combined_norm": None if combined is None else combined.mean(),
        }
    else:
        found = {}
    known = {name: value for name, value in found.items() if value is not None}
    return dict(zip(known, _as_floats(list(known.values()))))


def _as_floats(values: list[Any]) -> list[float]:
    """Tensors of one device and dtype are read at once, so that the program waits for a GPU only once."""
    import torch

    kinds = {(value.device, value.dtype) if isinstance(value, torch.Tensor) else None for value in values}
    if len(kinds) == 1 and None not in kinds:
        return torch.stack([value.reshape(()) for value in values]).tolist()
    return [float(value) for value in values]
