"""Write the tables of docs/lora_formats.md from what stands here: which LoRA files go from program to program.

``python tools/make_lora_formats.py`` rewrites what stands between the page's markers; ``--check`` writes nothing and
ends with 1 when the page is not current. The tests in ``tests/interop/`` measure every cell.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from library.console import run_script  # noqa: E402
from tools.page_tables import Table, run  # noqa: E402

PAGE = "docs/lora_formats.md"
PROGRAM = "tools/make_lora_formats.py"


@dataclass(frozen=True)
class Ours(Table):
    """What becomes of our files of some families: a row for each kind of file, a column for each program."""

    families: Sequence[str]
    """Short names of the models; the same cells hold for all of them."""


def _ours(name: str, families: Sequence[str], columns: Sequence[str], rows: dict[str, Sequence[str]]) -> Ours:
    return Ours(name, PROGRAM, "in the file", columns, rows, families)


UNETS = ("ComfyUI", "web UI", "Diffusers", "LyCORIS")
TRANSFORMERS = ("ComfyUI", "ComfyUI, converted", "Diffusers", "Diffusers, converted", "LyCORIS")
_EVERYWHERE = ("yes",) * 4
_STABLE_DIFFUSION = {
    "LoRA with text encoders": _EVERYWHERE,
    "convolutions (`conv_dim`)": _EVERYWHERE,
    "LoRA-FA, DyLoRA": _EVERYWHERE,
    "OFT": ("dropped", "dropped", "refused", "refused"),
    "LyCORIS LoHa, LoKr": ("yes", "yes", "refused", "yes"),
    "LyCORIS DoRA": ("otherwise", "otherwise", "otherwise", "yes"),
    "LyCORIS DoRA, `wd_on_output=False`": ("yes", "yes", "otherwise", "refused"),
    "LyCORIS `train_norm`": ("yes", "yes", "refused", "yes"),
}
_OF_NO_LORA = {
    "OFT": ("dropped", "not converted", "refused", "not converted", "refused"),
    "LyCORIS LoHa, LoKr": ("yes", "not converted", "dropped", "not converted", "yes"),
}
_STREAMS = {
    "double and single blocks": ("yes",) * 5,
    "ranks by layer, some blocks only": ("yes",) * 5,
    "`split_qkv=True`": ("yes",) * 5,
    "alpha left at 1, given, equal to the rank (0)": ("yes",) * 5,
}
_DORA = {"LyCORIS DoRA": ("otherwise", "not converted", "otherwise", "not converted", "yes")}
OURS = (
    _ours("Stable Diffusion", ("sd1", "sd2"), UNETS, _STABLE_DIFFUSION),
    _ours(
        "Stable Diffusion XL", ("sdxl",), UNETS, {**_STABLE_DIFFUSION, "OFT": ("dropped", "yes", "refused", "refused")}
    ),
    _ours(
        "FLUX.1",
        ("flux",),
        TRANSFORMERS,
        {
            **_STREAMS,
            "`in_dims`: conditioning layers": ("yes", "yes", "dropped", "yes", "yes"),
            "CLIP-L": ("yes",) * 5,
            "T5-XXL beside other layers": ("yes", "yes", "dropped", "dropped", "dropped"),
            "T5-XXL alone": ("yes", "yes", "refused", "dropped", "refused"),
            **_OF_NO_LORA,
            **_DORA,
        },
    ),
    _ours(
        "Chroma",
        ("chroma",),
        TRANSFORMERS,
        {
            **_STREAMS,
            "T5-XXL beside other layers": ("dropped", "yes", "dropped", "dropped", "dropped"),
            **_OF_NO_LORA,
            **_DORA,
        },
    ),
    _ours(
        "Lumina Image 2.0",
        ("lumina",),
        TRANSFORMERS,
        {
            "all blocks": ("yes", "yes", "dropped", "yes", "yes"),
            "`split_qkv=True`": ("yes", "yes", "dropped", "yes", "yes"),
            "`embedder_dims`": ("yes", "yes", "dropped", "yes", "yes"),
            "Gemma 2": ("yes", "yes", "dropped", "dropped", "dropped"),
            **_OF_NO_LORA,
            "LyCORIS DoRA": ("otherwise", "not converted", "dropped", "not converted", "yes"),
        },
    ),
    _ours(
        "HunyuanImage-2.1",
        ("hunyuan_image",),
        ("ComfyUI", "ComfyUI, converted", "Diffusers", "LyCORIS"),
        {
            "all blocks": ("in part", "yes", "dropped", "yes"),
            "`split_qkv=True`": ("in part", "yes", "dropped", "yes"),
            "OFT": ("dropped", "not converted", "dropped", "refused"),
            "LyCORIS LoHa, LoKr": ("in part", "not converted", "dropped", "yes"),
            "LyCORIS DoRA": ("otherwise", "not converted", "dropped", "yes"),
        },
    ),
)
"""Files that this suite writes, in other programs."""
HERE = {"sd1": "Stable Diffusion", "sdxl": "XL", "flux": "FLUX.1", "chroma": "Chroma", "lumina": "Lumina"}
HERE |= {"hunyuan_image": "HunyuanImage"}
"""Families in the table of files that this suite reads, as it names them."""
THEIRS = Table(
    "other programs' files",
    PROGRAM,
    "written by",
    ("a key in it", *HERE.values()),
    {
        "sd-scripts, musubi-tuner, fluxgym": (
            "`lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight`",
            *("yes",) * 6,
        ),
        "AI-toolkit": (
            "`transformer.transformer_blocks.0.attn.to_q.lora_A.weight`",
            *("yes",) * 5,
            "-",
        ),
        "OneTrainer": (
            "`lora_transformer_transformer_blocks_0_attn_to_q.lora_down.weight`",
            *("yes",) * 4,
            *("-",) * 2,
        ),
        "OneTrainer, OMI names": (
            "`transformer.double_blocks.0.img_attn.qkv.0.lora_down.weight`",
            *("yes",) * 4,
            *("-",) * 2,
        ),
        "OneTrainer, DoRA": (
            "`lora_transformer_transformer_blocks_0_attn_to_q.dora_scale`",
            *("applied",) * 4,
            *("-",) * 2,
        ),
        "SimpleTuner, Diffusers, PEFT": (
            "`transformer.single_transformer_blocks.0.proj_mlp.lora_B.weight`",
            *("yes",) * 6,
        ),
        "SimpleTuner, LyCORIS names": (
            "`lycoris_transformer_blocks_0_attn_to_q.lora_up.weight`",
            *("yes",) * 6,
        ),
        "PEFT, DoRA": (
            "`transformer.transformer_blocks.0.attn.to_q.lora_magnitude_vector`",
            *("applied", "-", "applied", "-", "applied", "applied"),
        ),
        "diffusion-pipe, ComfyUI": ("`diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight`", *("yes",) * 6),
        "XLabs": ("`double_blocks.0.processor.qkv_lora1.down.weight`", "-", "-", "yes", "-", "-", "-"),
    },
)
"""Files of other programs, here."""


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Rewrite or check the page below ``root``; returns the exit code."""
    return run(PAGE, [*OURS, THEIRS], __doc__, arguments, root)


if __name__ == "__main__":
    run_script(lambda: sys.exit(main()))
