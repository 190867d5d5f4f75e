"""Write the table of docs/reliability.md that says which options do not change what a run learns.

``python tools/make_equality_table.py`` rewrites what stands between the page's markers; ``--check`` writes nothing and
ends with 1 when the page is not current. ``tests/conformance/test_what_changes_no_number.py`` measures every cell.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from library.console import run_script  # noqa: E402
from library.families import FAMILIES  # noqa: E402
from tools.page_tables import Table, run  # noqa: E402

PAGE = "docs/reliability.md"
PROGRAM = "tools/make_equality_table.py"
MODELS = tuple(model for family in FAMILIES for model in family.model_names)
BITS = "to the bit"
ROUNDING = 0.05
"""Bound where other shapes of matrices round otherwise: AdamW makes steps of one size of gradients of any size."""


@dataclass(frozen=True)
class Neutral:
    """Options that must not change what a run learns."""

    name: str
    """In the table."""
    words: str
    """On the command line of the run that is compared; {folder} is one for its files."""
    group: str
    """Rows of one group are tried in one run, and alone only if that run differs."""
    bounds: Mapping[str, float] = field(default_factory=dict)
    """By the model's short name: the largest difference as a share of the largest weight; others are equal."""
    beside: str = ""
    """Options of both runs."""
    models: tuple[str, ...] = MODELS
    """Those that have the options."""

    def cell(self, model: str) -> str:
        """What the table says of a model."""
        if model not in self.models:
            return "-"
        return f"within {100 * self.bounds[model]:g} %" if model in self.bounds else BITS


def bound(share: float) -> dict[str, float]:
    """The same bound for all models."""
    return dict.fromkeys(MODELS, share)


NEUTRAL = (
    Neutral(
        "threads that load: `--max_data_loader_n_workers`, `--persistent_data_loader_workers`",
        "--max_data_loader_n_workers 2 --persistent_data_loader_workers",
        "beside",
    ),
    Neutral(
        "how files are read: `--disable_mmap_load_safetensors`, `--cache_info`",
        "--disable_mmap_load_safetensors --cache_info",
        "beside",
    ),
    Neutral("`--lowram`, `--highvram`", "--lowram --highvram", "beside"),
    Neutral("samples", "--sample_at_first --sample_every_n_steps 2 --sample_prompts {folder}/prompts.txt", "beside"),
    Neutral("when validation happens", "--validate_every_n_steps 1 --max_validation_steps 1", "beside"),
    Neutral(
        "logs, curves and the report",
        "--logging_dir {folder}/logs --log_with tensorboard --log_config --report",
        "beside",
    ),
    Neutral("when files and states are saved", "--save_every_n_steps 1 --save_state", "beside"),
    Neutral("metadata", "--no_metadata --training_comment comment", "beside"),
    Neutral("a dataset file, or the same folders on the command line", "", "command line"),
    Neutral("stopped and resumed", "--resume {folder}/lora-step00000001-state", "resumed"),
    Neutral(
        "`--blocks_to_swap`, `--block_swap_ring_size`, `--stream_text_encoders`",
        "--blocks_to_swap 2 --block_swap_ring_size 1 --stream_text_encoders",
        "streamed",
    ),
    Neutral(
        "`--gradient_checkpointing`, `--cpu_offload_checkpointing`, `--keep_attention_outputs`",
        "--gradient_checkpointing --cpu_offload_checkpointing --keep_attention_outputs",
        "recomputed",
    ),
    Neutral("`--gradient_checkpointing` alone", "--gradient_checkpointing", "recomputed alone"),
)
"""Compared with a run without these options."""
CACHED = (
    Neutral("caches in files", "--cache_latents_to_disk --cache_text_encoder_outputs_to_disk", "made"),
    Neutral(
        "caches that are there already, `--skip_cache_check`",
        "--cache_latents_to_disk --cache_text_encoder_outputs_to_disk --skip_cache_check",
        "kept",
    ),
    Neutral("texts encoded in each step", "--cache_latents", "texts", {"sdxl": ROUNDING}),
    Neutral(
        "`--vae_batch_size`, `--text_encoder_batch_size`",
        "--cache_latents --cache_text_encoder_outputs --vae_batch_size 3 --text_encoder_batch_size 3",
        "batches",
        bound(ROUNDING),
    ),
)
"""Compared with a run whose latents and texts are cached in memory, one at a time."""
BATCH = "--dataset_config {folder}/whole.toml --optimizer_type SGD --learning_rate 1"
SUMS = bound(1e-5)
"""Where the same numbers are added in another order."""
IN_BF16 = f"{BATCH} --mixed_precision bf16"
ROUNDED = (
    Neutral("the order of images in a batch", "", "backwards", SUMS, BATCH),
    Neutral(
        "`--gradient_accumulation_steps` in place of a larger batch",
        "--dataset_config {folder}/single.toml --gradient_accumulation_steps 3",
        "accumulated",
        SUMS,
        BATCH,
    ),
    Neutral("attention: `--sdpa`", "--sdpa", "sdpa", {}, BATCH),
    Neutral("attention: `--mem_eff_attn`", "--mem_eff_attn", "slices", SUMS, BATCH, MODELS[:3]),
    Neutral("attention: `--split_attn`", "--split_attn", "each image", SUMS, BATCH, MODELS[-1:]),
    Neutral(
        "`--torch_compile --dynamo_backend eager`", "--torch_compile --dynamo_backend eager", "compiled", {}, BATCH
    ),
    Neutral("`--fp8_base`", "--fp8_base", "fp8", bound(0.2), IN_BF16, MODELS[:-1]),
    Neutral("`--fp8_scaled`", "--fp8_scaled", "fp8 scaled", {**bound(0.1), "lumina": 0.15}, IN_BF16),
    Neutral("`--base_format int8`", "--base_format int8", "int8", bound(0.05), IN_BF16),
    Neutral(
        "`--blocks_to_swap` beside `--fp8_scaled`", "--blocks_to_swap 2", "fp8 streamed", {}, f"{IN_BF16} --fp8_scaled"
    ),
    Neutral(
        "`--gradient_checkpointing` beside `--fp8_scaled`",
        "--gradient_checkpointing",
        "fp8 recomputed",
        {},
        f"{IN_BF16} --fp8_scaled",
    ),
)
"""Compared with a run that has only the options beside them."""
TABLE = Table(
    "what changes no number",
    PROGRAM,
    "option",
    MODELS,
    {row.name: [row.cell(model) for model in MODELS] for row in (*NEUTRAL, *CACHED, *ROUNDED)},
)


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Rewrite or check the page below ``root``; returns the exit code."""
    return run(PAGE, [TABLE], __doc__, arguments, root)


if __name__ == "__main__":
    run_script(lambda: sys.exit(main()))
