"""What two runs of one training must share."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open

OWN = ("ss_training_started_at", "ss_training_finished_at", "ss_session_id", "modelspec.date")
"""Metadata that says when and in which session a file was made."""


def contents(path: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    """Metadata and tensors of a LoRA file, but for what is each run's own."""
    with safe_open(path, "pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key not in OWN}
        return metadata, {key: file.get_tensor(key).numpy().tobytes() for key in file.keys()}  # noqa: SIM118
