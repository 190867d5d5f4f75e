"""What each argument of networks.lora_flux trains: a table of modules, ranks, alphas and learning rates.

Every row is a LoRA that the real trainer has trained for a step; what is expected is written out here, name by name,
from the description of the arguments. ``pytest -s`` prints the tables.
"""

from __future__ import annotations

import fnmatch
import re
import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file

from library.errors import UserError
from library.options import parse_options
from tests.running import forget_accelerator, logged_rates, run_in_process, trainer_class

DOUBLE = ("mod_lin", "attn_qkv", "attn_proj", "mlp_0", "mlp_2")
SINGLE = ("linear1", "linear2", "modulation_lin")
IN_LAYERS = (
    *("img_in", "time_in_in_layer", "time_in_out_layer", "vector_in_in_layer", "vector_in_out_layer"),
    *("guidance_in_in_layer", "guidance_in_out_layer", "txt_in"),
)
CLIP = ("self_attn_q_proj", "self_attn_k_proj", "self_attn_v_proj", "self_attn_out_proj", "mlp_fc1", "mlp_fc2")
T5 = (
    *(f"layer_0_SelfAttention_{part}" for part in "qkvo"),
    *(f"layer_1_DenseReluDense_{part}" for part in ("wi_0", "wi_1", "wo")),
)


def block_names(double: int, single: int, chroma: bool = False) -> list[str]:
    """Every layer of the transformer's blocks; Chroma's have no modulations."""
    names = [f"double_blocks_{i}_{s}_{layer}" for i in range(double) for s in ("img", "txt") for layer in DOUBLE]
    names += [f"single_blocks_{i}_{layer}" for i in range(single) for layer in SINGLE]
    return [f"lora_unet_{name}" for name in names if not (chroma and name.endswith(("mod_lin", "modulation_lin")))]


IN_NAMES = [f"lora_unet_{layer}" for layer in IN_LAYERS]
CLIP_NAMES = [f"lora_te1_text_model_encoder_layers_{i}_{part}" for i in range(2) for part in CLIP]
T5_NAMES = [f"lora_te3_encoder_block_{i}_{part}" for i in range(2) for part in T5]


@dataclass(frozen=True)
class Module:
    """One row of the table: what a module is trained with."""

    rank: int = 4
    alpha: float = 1.0
    lr: float | None = 1e-3
    """None: in the file but not trained."""
    label: str = "unet"
    plus: float = 1.0
    """How much faster the up learns."""
    parts: int = 1
    """Separate low-rank products, which a file holds as one of that many times the rank."""

    def cells(self) -> list[str]:
        rates = ["-", "-", "not trained"]
        if self.lr is not None:
            up = f"{self.label} plus" if self.plus != 1 else self.label
            rates = [f"{self.lr:g}", f"{self.lr * self.plus:g}", self.label if up == self.label else f"{up} (up)"]
        return [str(self.rank), f"{self.alpha:g}", str(self.rank * self.parts), f"{self.alpha * self.parts:g}", *rates]


@dataclass(frozen=True)
class Case:
    """A command line and what it makes of the modules, as changes of a start (``everything``)."""

    arguments: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Pattern of names -> fields of ``Module`` that differ, or None for modules that don't exist; the last counts."""
    start: Module = Module()
    encoders: tuple[str, ...] = ()
    model: str = "flux"
    regularisation: Mapping[str, float] = field(default_factory=dict)

    @property
    def blocks(self) -> list[str]:
        """Every layer in the blocks of the case's model."""
        return block_names(*((19, 38) if self.model == "deep" else (2, 2)), self.model == "chroma")

    def expected(self) -> dict[str, Module]:
        table: dict[str, Module] = {}
        if "clip" in self.encoders:
            table |= dict.fromkeys(CLIP_NAMES, replace(self.start, label="textencoder 1"))
        if "t5" in self.encoders:
            table |= dict.fromkeys(T5_NAMES, replace(self.start, label="textencoder 2"))
        table |= dict.fromkeys(self.blocks, self.start)
        for pattern, change in self.changes.items():
            names = fnmatch.filter([*CLIP_NAMES, *T5_NAMES, *IN_NAMES, *block_names(19, 38)], pattern)
            for name in names:
                if change is None:
                    table.pop(name, None)
                elif name in table or name in IN_NAMES:
                    table[name] = replace(table.get(name, self.start), **change)
        return table


def only(*patterns: str) -> dict[str, None]:
    """Of the blocks' modules, those with these beginnings stay."""
    kept = tuple(f"lora_unet_{pattern}_" for pattern in patterns)
    return {name: None for name in block_names(19, 38) if not name.startswith(kept)}


# What section 9.3 of the format description, and chapters 6.3 to 6.6 and 7.1 of the users' guide, promise.
LAYERS = {
    "img_attn_dim": "*_img_attn_*",
    "txt_attn_dim": "*_txt_attn_*",
    "img_mlp_dim": "*_img_mlp_*",
    "txt_mlp_dim": "*_txt_mlp_*",
    "img_mod_dim": "*_img_mod_lin",
    "txt_mod_dim": "*_txt_mod_lin",
    "single_dim": "*_linear[12]",
    "single_mod_dim": "*_modulation_lin",
}
UNTRAINED = {"lr": None, "label": ""}
SPLIT = {"*_attn_qkv": {"parts": 3}, "*_linear1": {"parts": 4}}
TRANSFORMER = "--network_train_unet_only --network_args "
GUIDE_6_3 = (
    '"img_attn_dim=4" "img_mlp_dim=8" "txt_attn_dim=2" "txt_mlp_dim=2" "img_mod_dim=2" "txt_mod_dim=2" "single_dim=4"'
    ' "single_mod_dim=2"'
)
CASES = {
    "nothing": Case("--network_train_unet_only"),
    "rank and alpha": Case(
        "--network_train_unet_only --network_dim 8 --network_alpha 4", start=Module(rank=8, alpha=4.0)
    ),
    "alpha 0 is the rank": Case("--network_train_unet_only --network_alpha 0", start=Module(alpha=4.0)),
    "unet_lr": Case("--network_train_unet_only --unet_lr 5e-4", start=Module(lr=5e-4)),
    "conv_dim, conv_alpha": Case(TRANSFORMER + "conv_dim=8 conv_alpha=2"),
    "rank_dropout": Case(TRANSFORMER + "rank_dropout=0.1", regularisation={"rank_dropout": 0.1}),
    "module_dropout": Case(TRANSFORMER + "module_dropout=1e-9", regularisation={"module_dropout": 1e-9}),
    "network_dropout": Case("--network_train_unet_only --network_dropout 0.2", regularisation={"dropout": 0.2}),
    **{f"{name}=8": Case(f"{TRANSFORMER}{name}=8", {names: {"rank": 8}}) for name, names in LAYERS.items()},
    **{f"{name}=0": Case(f"{TRANSFORMER}{name}=0", {names: None}) for name, names in LAYERS.items()},
    "guide 6.3: layers": Case(
        TRANSFORMER + GUIDE_6_3,
        {
            "*_img_mlp_*": {"rank": 8},
            "*_txt_attn_*": {"rank": 2},
            "*_txt_mlp_*": {"rank": 2},
            "*_mod_lin": {"rank": 2},
            "*_modulation_lin": {"rank": 2},
        },
    ),
    **{
        f"in_dims={given}": Case(
            f"{TRANSFORMER}in_dims={given}",
            {"lora_unet_img_in": {"rank": 4}, "*_in_*_layer": {"rank": 2}, "lora_unet_txt_in": {"rank": 4}},
        )
        for given in ("[4,2,2,2,4]", "4,2,2,2,4")
    },
    "in_dims with zeros": Case(
        TRANSFORMER + "in_dims=[5,0,3,0,0]", {"lora_unet_img_in": {"rank": 5}, "*_vector_in_*": {"rank": 3}}
    ),
    "blocks: all": Case(TRANSFORMER + "train_double_block_indices=all train_single_block_indices=all"),
    "double blocks: none": Case(TRANSFORMER + "train_double_block_indices=none", {"*_double_*": None}),
    "double blocks: empty": Case(TRANSFORMER + "train_double_block_indices=", {"*_double_*": None}),
    "double blocks: 1": Case(TRANSFORMER + "train_double_block_indices=1", {"*_double_blocks_0_*": None}),
    "double blocks: 0-1": Case(TRANSFORMER + "train_double_block_indices=0-1"),
    "single blocks: 0": Case(TRANSFORMER + "train_single_block_indices=0", {"*_single_blocks_1_*": None}),
    "single blocks: none": Case(TRANSFORMER + "train_single_block_indices=none", {"*_single_*": None}),
    "train_blocks=all": Case(TRANSFORMER + "train_blocks=all"),
    "train_blocks=single": Case(TRANSFORMER + "train_blocks=single", {"*_double_*": None}),
    "train_blocks=double": Case(TRANSFORMER + "train_blocks=double", {"*_single_*": None}),
    "split_qkv=True": Case(TRANSFORMER + "split_qkv=True", SPLIT),
    "split_qkv=False": Case(TRANSFORMER + "split_qkv=False"),
    "split_qkv with rank_dropout": Case(
        TRANSFORMER + "split_qkv=True rank_dropout=0.1", SPLIT, regularisation={"rank_dropout": 0.1}
    ),
    "guide 6.5: network_reg_dims": Case(
        TRANSFORMER + '"network_reg_dims=single.*_modulation.*=4,img_attn=8" --network_dim 6',
        {"*_modulation_lin": {"rank": 4}, "*_img_attn_*": {"rank": 8}},
        Module(rank=6),
    ),
    "the last matching rank": Case(
        TRANSFORMER + "network_reg_dims=double=7,attn_qkv=9,img_attn=8,_1_img_attn=0",
        {"*_double_*": {"rank": 7}, "*_txt_attn_qkv": {"rank": 9}, "*_img_attn_*": {"rank": 8}, "*_1_img_attn_*": None},
    ),
    "ranks by pattern after all other rules": Case(
        TRANSFORMER + "single_dim=0 img_mlp_dim=3 train_double_block_indices=0 network_reg_dims=linear1=6,img_mlp=5",
        {
            "*_linear1": {"rank": 6},
            "*_linear2": None,
            "*_img_mlp_*": {"rank": 5},
            "*_double_blocks_1_*": None,
        },
    ),
    "ranks of text encoders and input layers by pattern": Case(
        "--network_args train_t5xxl=True in_dims=1,0,0,0,1 network_reg_dims=te1.*fc=2,te3_.*wo=3,img_in=5",
        {
            "lora_te1_*_fc?": {"rank": 2},
            "lora_te3_*_wo": {"rank": 3},
            "lora_unet_img_in": {"rank": 5},
            "lora_unet_txt_in": {"rank": 1},
        },
        encoders=("clip", "t5"),
    ),
    "the last matching learning rate": Case(
        "--network_args network_reg_lrs=single=2e-3,linear=5e-4,te1_.*fc=3e-5,linear2=0 --text_encoder_lr 1e-4",
        {
            "lora_te1_*": {"lr": 1e-4},
            "lora_te1_*_fc?": {"lr": 3e-5, "label": "textencoder 1 reg_lr_2"},
            "*_single_*": {"lr": 2e-3, "label": "unet reg_lr_0"},
            "*_linear1": {"lr": 5e-4, "label": "unet reg_lr_1"},
            "*_linear2": UNTRAINED,
        },
        encoders=("clip",),
    ),
    "guide 7.1: GGPO": Case(
        TRANSFORMER + '"ggpo_sigma=0.03" "ggpo_beta=0.01"', regularisation={"ggpo_sigma": 0.03, "ggpo_beta": 0.01}
    ),
    "loraplus_lr_ratio": Case(
        "--network_args loraplus_lr_ratio=4", start=Module(plus=4.0), encoders=("clip",)
    ),
    "loraplus_unet_lr_ratio": Case(
        "--network_args loraplus_unet_lr_ratio=4",
        {"lora_te1_*": {"plus": 1.0}},
        start=Module(plus=4.0),
        encoders=("clip",),
    ),
    "loraplus_text_encoder_lr_ratio": Case(
        "--network_args loraplus_text_encoder_lr_ratio=4", {"lora_te1_*": {"plus": 4.0}}, encoders=("clip",)
    ),
    "LoRA+, the special ratio and the general one": Case(
        "--network_args loraplus_lr_ratio=8 loraplus_text_encoder_lr_ratio=4 network_reg_lrs=img_mlp=1e-2",
        {"lora_te1_*": {"plus": 4.0}, "*_img_mlp_*": {"lr": 1e-2, "label": "unet reg_lr_0"}},
        start=Module(plus=8.0),
        encoders=("clip",),
    ),
    "verbose": Case(TRANSFORMER + "verbose=True"),
    "guide 6.6: FLUX.1 and CLIP-L": Case("", encoders=("clip",)),
    "guide 6.6: FLUX.1, CLIP-L and T5-XXL": Case('--network_args "train_t5xxl=True"', encoders=("clip", "t5")),
    "train_t5xxl=False": Case("--network_args train_t5xxl=False", encoders=("clip",)),
    "train_t5xxl with --network_train_unet_only": Case(TRANSFORMER + "train_t5xxl=True"),
    "guide 6.6: two rates": Case(
        "--network_args train_t5xxl=True --text_encoder_lr 1e-4 1e-5",
        {"lora_te1_*": {"lr": 1e-4}, "lora_te3_*": {"lr": 1e-5}},
        encoders=("clip", "t5"),
    ),
    "guide 6.6: one rate": Case(
        "--network_args train_t5xxl=True --text_encoder_lr 2e-4", {"lora_te?_*": {"lr": 2e-4}}, encoders=("clip", "t5")
    ),
    "rates of 0 for T5 and the transformer": Case(
        "--network_args train_t5xxl=True --text_encoder_lr 1e-4 0 --unet_lr 0",
        {"lora_te1_*": {"lr": 1e-4}, "lora_te3_*": UNTRAINED, "*_blocks_*": UNTRAINED},
        encoders=("clip", "t5"),
    ),
    "the text encoders alone": Case(
        "--network_args train_t5xxl=True --network_train_text_encoder_only",
        {"lora_unet_*": None},
        encoders=("clip", "t5"),
    ),
    # A model of 19 double and 38 single blocks, for the block numbers of the guide.
    "guide 6.4: two lists": Case(
        TRANSFORMER + '"train_double_block_indices=0,1,8-12,18" "train_single_block_indices=3,10,20-25,37"',
        only(
            *(f"double_blocks_{i}" for i in (0, 1, 8, 9, 10, 11, 12, 18)),
            *(f"single_blocks_{i}" for i in (3, 10, 20, 21, 22, 23, 24, 25, 37)),
        ),
        model="deep",
    ),
    "guide 6.4: one list": Case(
        TRANSFORMER + '"train_double_block_indices=none" "train_single_block_indices=10-15"',
        only(*(f"single_blocks_{i}" for i in range(10, 16))),
        model="deep",
    ),
    "guide 6.5: network_reg_lrs": Case(
        TRANSFORMER + r'"network_reg_lrs=single_blocks_(\d|10)_=1e-3,double_blocks=2e-3" --learning_rate 5e-4',
        {
            "*_double_blocks_*": {"lr": 2e-3, "label": "unet reg_lr_1"},
            "*_single_blocks_[0-9]_*": {"lr": 1e-3, "label": "unet reg_lr_0"},
            "*_single_blocks_10_*": {"lr": 1e-3, "label": "unet reg_lr_0"},
        },
        Module(lr=5e-4),
        model="deep",
    ),
}  # fmt: skip

LIKE_OTHERS = {
    *(f"{name}=0" for name in LAYERS if name not in ("img_mod_dim", "single_dim")),
    *("alpha 0 is the rank", "in_dims=4,2,2,2,4", "blocks: all", "double blocks: empty"),
    *("double blocks: 0-1", "single blocks: none", "train_blocks=all", "train_blocks=double", "split_qkv=False"),
    *("split_qkv with rank_dropout", "loraplus_text_encoder_lr_ratio"),
    *("train_t5xxl=False", "train_t5xxl with --network_train_unet_only", "guide 6.6: one rate"),
    *("guide 6.6: FLUX.1, CLIP-L and T5-XXL", "the text encoders alone", "guide 6.4: one list"),
    "guide 6.5: network_reg_lrs",
}
"""Cases that show little beside the others."""

CHROMA_CASES = {
    "nothing": Case("--network_train_unet_only"),
    "no text encoder is trained": Case(""),
    "train_t5xxl=False": Case("--network_args train_t5xxl=False"),
    "guide 6.3: layers": Case(
        TRANSFORMER + GUIDE_6_3,
        {"*_img_mlp_*": {"rank": 8}, "*_txt_attn_*": {"rank": 2}, "*_txt_mlp_*": {"rank": 2}},
    ),
    "guide 6.3: in_dims": Case(
        TRANSFORMER + '"in_dims=[4,2,2,2,4]"', {"lora_unet_img_in": {"rank": 4}, "lora_unet_txt_in": {"rank": 4}}
    ),
    "blocks": Case(
        TRANSFORMER + "train_double_block_indices=none train_single_block_indices=1", only("single_blocks_1")
    ),
    "split_qkv=True": Case(TRANSFORMER + "split_qkv=True", SPLIT),
    "patterns": Case(
        TRANSFORMER + '"network_reg_dims=single.*_modulation.*=4,img_attn=8" network_reg_lrs=double_blocks=2e-3',
        {"*_double_*": {"lr": 2e-3, "label": "unet reg_lr_0"}, "*_img_attn_*": {"rank": 8}},
    ),
}


# ---- the table -------------------------------------------------------------------------------------------------------

COLUMNS = [
    "modules",
    "blocks",
    "number",
    "rank",
    "alpha",
    "rank in file",
    "alpha in file",
    "lr",
    "lr of up",
    "logged as",
]

ABSENT = ["-"] * 6 + ["absent"]
KIND = re.compile(
    r"(.*(?:_attn|_mlp|SelfAttention|DenseReluDense)_|lora_unet_(?:time|vector|guidance)_in_|.*?_(?=linear\d|mod|\w+_in$))(.+)"
)


def lines(table: Mapping[str, Module], blocks: Collection[str]) -> list[str]:
    """The table as text: one line for the modules of a kind that have everything in common, or that don't exist."""
    rows: dict[tuple[str, ...], tuple[list[str], list[str]]] = {}
    for name in sorted(
        {*table, *blocks}, key=lambda name: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)]
    ):
        block = re.search(r"_(\d+)_", name)
        kind, layer = KIND.match(name.replace(block[0], "_*_", 1) if block else name).groups()
        values = table[name].cells() if name in table else ABSENT
        numbers, layers = rows.setdefault((kind, *values), ([], []))
        numbers.append(block[1] if block else "-")
        layers.append(layer)
    cells = [COLUMNS]
    for (kind, *values), (numbers, layers) in rows.items():
        names = ",".join(dict.fromkeys(layers))
        title = f"{kind}{{{names}}}" if "," in names else f"{kind}{names}"
        cells.append([title, ",".join(dict.fromkeys(numbers)), str(len(numbers)), *values])
    widths = [max(map(len, column)) for column in zip(*cells)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells]


def trained_table(trainer: Any) -> dict[str, Module]:
    """What the run trained: the network's modules, the optimizer's rates, and the names that they are logged under."""
    rates: dict[int, tuple[float, str]] = {}
    logged = logged_rates(trainer)
    for label, group in zip(trainer.optimization.group_names, trainer.optimization.optimizer.param_groups):
        assert logged[f"lr/{label}"] == group["lr"]
        rates |= {id(parameter): (group["lr"], label) for parameter in group["params"]}
    table = {}
    for lora in trainer.network.loras:
        downs, ups = ({rates.get(id(p)) for p in part.parameters()} for part in (lora.lora_down, lora.lora_up))
        ((down,), (up,)) = downs, ups
        assert all(p.requires_grad == (down is not None) for p in lora.parameters())
        module = Module(lora.lora_dim, lora.alpha, None, "", 1.0, len(lora.split_rows or [0]))
        if down is not None:
            assert up is not None and up[1] in (down[1], f"{down[1]} plus")
            plus = round(up[0] / down[0], 6)
            assert (plus != 1) == up[1].endswith(" plus")
            module = replace(module, lr=round(down[0], 12), label=down[1], plus=plus)
        table[lora.lora_name] = module
    return table


def file_table(path: Path, trained: Mapping[str, Module], first: Path | None = None) -> dict[str, Module]:
    """The same from the file, which holds joined parts as one module; ups began at zero, or as in ``first``."""
    tensors, began = load_file(path), load_file(first) if first else {}
    names = {key.split(".")[0] for key in tensors}
    assert set(tensors) == {f"{n}.{end}" for n in names for end in ("lora_down.weight", "lora_up.weight", "alpha")}
    table = {}
    for name in sorted(names, key=list(trained).index):
        down, up, alpha = (tensors[f"{name}.{end}"] for end in ("lora_down.weight", "lora_up.weight", "alpha"))
        module = trained[name]
        assert down.shape[0] == up.shape[1] and down.shape[0] % module.parts == 0
        # AdamW's first step moves a weight by the learning rate, whatever the size of its gradient.
        moved = (up - began.get(f"{name}.lora_up.weight", 0)).abs().max().item()
        assert moved == pytest.approx((module.lr or 0.0) * module.plus, rel=0.02), name
        table[name] = replace(module, rank=down.shape[0] // module.parts, alpha=alpha.item() / module.parts)
    return table


def table_of_verbose(printed: str) -> dict[str, list[str]]:
    """Rank, alpha and learning rate of each module as ``verbose`` prints them."""
    found = re.findall(r"^(lora_\w+) +(\d+) +([\d.e+-]+) +([\d.e+-]+)\s*$", printed, re.MULTILINE)
    return {name: list(values) for name, *values in found}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Two small images; the runs share their caches."""
    folder = tmp_path_factory.mktemp("images")
    for number, colour in enumerate(((200, 30, 30), (20, 60, 180))):
        Image.new("RGB", (64, 64), colour).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a square, number {number}", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def dataset(images) -> Path:
    path = images / "dataset.toml"
    path.write_text(
        "[[datasets]]\nresolution = 64\nbatch_size = 2\n[[datasets.subsets]]\n"
        f'image_dir = "{images.as_posix()}"\ncaption_extension = ".txt"\n',
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="module")
def deep_flux(tmp_path_factory) -> Path:
    """A narrow transformer with as many blocks as the real one."""
    from library.models.flux.transformer import FluxTransformer
    from library.safetensors_io import save_file
    from tools.make_tiny_models import fill_randomly, transformer_config

    model = FluxTransformer(replace(transformer_config(), depth=19, depth_single=38))
    fill_randomly(model, 0, "deep flux")
    path = tmp_path_factory.mktemp("deep") / "flux.safetensors"
    save_file(dict(model.state_dict()), path)
    return path


@pytest.fixture
def command(request, flux_command, dataset, tmp_path):
    """Options of a run of a case: its model, the shared data, one step."""

    def options(case: Case) -> list[str]:
        given = request.getfixturevalue("chroma_command") if case.model == "chroma" else flux_command
        given = [*given, "--dataset_config", dataset, "--max_train_steps", 1, "--cache_latents_to_disk"]
        given += ["--output_dir", tmp_path / "out", "--max_data_loader_n_workers", 0, "--no_report"]
        if case.model == "deep":
            given += ["--pretrained_model_name_or_path", request.getfixturevalue("deep_flux")]
        if not case.encoders:
            given.append("--cache_text_encoder_outputs_to_disk")
        return [str(value) for value in [*given, *shlex.split(case.arguments)]]

    return options


@pytest.fixture
def run(command):
    """Train a case in this process; returns its trainer."""

    def train(case: Case) -> Any:
        forget_accelerator()
        trainer_type = trainer_class("flux")
        trainer = trainer_type.of(parse_options(trainer_type.options_class, "test", command(case)))
        trainer.train()
        return trainer

    return train


def check(case: Case, title: str, trainer: Any, file: Path, first: Path | None = None) -> None:
    trained = trained_table(trainer)
    print(f"\n{title}: {case.arguments}\n" + "\n".join(lines(trained, case.blocks)))
    assert lines(trained, case.blocks) == lines(case.expected(), case.blocks)
    assert trained == case.expected()
    assert file_table(file, trained, first) == trained
    for lora in trainer.network.loras:
        settings = lora.regularisation
        given = {name: getattr(settings, name) for name in vars(settings) if getattr(settings, name)}
        assert given == dict(case.regularisation)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.thorough) if name in LIKE_OTHERS else name for name in CASES]
)
def test_the_modules_of_an_argument(name, run, tmp_path):
    case = CASES[name]
    check(case, name, run(case), tmp_path / "out" / "last.safetensors")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.thorough) if name in ("train_t5xxl=False", "blocks", "patterns") else name
        for name in CHROMA_CASES
    ],
)
def test_the_modules_of_an_argument_in_chroma(name, run, tmp_path):
    case = replace(CHROMA_CASES[name], model="chroma")
    check(case, name, run(case), tmp_path / "out" / "last.safetensors")


@pytest.mark.parametrize(
    "name",
    [
        "guide 6.6: two rates",
        pytest.param("the last matching learning rate", marks=pytest.mark.thorough),
        pytest.param("LoRA+, the special ratio and the general one", marks=pytest.mark.thorough),
    ],
)
def test_the_same_from_the_command_line(name, command, tmp_path):
    """Ranks, alphas and rates as ``verbose`` prints them, and the names in the curves."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    case = CASES[name]
    given = [*command(case), "--logging_dir", tmp_path / "log"]
    given.insert(given.index("--network_args") + 1, "verbose=True")
    result = run_in_process("flux_train_network.py", *given)
    assert result.returncode == 0, result.stderr
    expected = case.expected()
    printed = table_of_verbose(result.stdout + result.stderr)
    assert printed == {name: [str(m.rank), f"{m.alpha:g}", f"{m.lr or 0:g}"] for name, m in expected.items()}
    assert file_table(tmp_path / "out" / "last.safetensors", expected) == expected
    (events,) = (tmp_path / "log").rglob("events.*")
    curves = EventAccumulator(str(events))
    curves.Reload()
    rates = {tag: curves.Scalars(tag)[-1].value for tag in curves.Tags()["scalars"] if tag.startswith("lr/")}
    wanted = {f"lr/{m.label}": m.lr for m in expected.values() if m.lr}
    wanted |= {f"lr/{m.label} plus": m.lr * m.plus for m in expected.values() if m.lr and m.plus != 1}
    assert rates == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ('"train_double_block_indices=0,1,8-12,18"', "names block 12, but this model has the blocks 0 to 1"),
        ("train_single_block_indices=2", "names block 2, but this model has the blocks 0 to 1"),
        ("in_dims=[4,2,2,2]", "in_dims must be 5 whole numbers"),
        ("train_blocks=none", "train_blocks must be one of all, single, double"),
        ("ggpo_sigma=0.03", '"ggpo_beta" is missing'),
        ("ggpo_beta=0.03", '"ggpo_sigma" is missing'),
        ("network_reg_dims=img_attn", "pattern=number"),
        ("split_qkv=yes", "split_qkv must be True or False"),
        ("train_blocks=single single_dim=0 single_mod_dim=0", "leave no module to train"),
    ],
)
def test_wrong_values_are_refused(run, arguments, words):
    with pytest.raises(UserError) as refused:
        run(Case(TRANSFORMER + arguments))
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (TRANSFORMER + "train_t5xxl=True", "train_t5xxl has no effect"),
        ("--text_encoder_lr 1e-4 1e-5", "--text_encoder_lr: 1e-05 has no effect"),
        (TRANSFORMER + "network_reg_dims=img_atn=8", 'the pattern "img_atn" of network_reg_dims matches no trained'),
        (TRANSFORMER + "conv_dim=8 conv_alpha=2", "conv_dim, conv_alpha have no effect"),
    ],
)
def test_what_has_no_effect_is_said(run, arguments, words, caplog):
    with caplog.at_level("WARNING", logger="library"):
        run(Case(arguments))
    assert words in caplog.text


def test_t5_is_not_trained_for_chroma(run):
    with pytest.raises(UserError, match="train_t5xxl"):
        run(Case("--network_args train_t5xxl=True", model="chroma"))


def test_layers_that_chroma_lacks_are_named(run, caplog):
    with caplog.at_level("WARNING", logger="library"):
        run(Case(TRANSFORMER + "in_dims=[4,2,2,2,4] img_mod_dim=4 txt_mod_dim=0", model="chroma"))
    assert "no effect of img_mod_dim; in_dims for time_in, vector_in, guidance_in" in caplog.text


def test_ranks_alphas_and_t5_come_from_the_file_of_dim_from_weights(run, tmp_path):
    """``network_dim`` and the arguments about ranks count no more; T5-XXL is trained because it is in the file."""
    arguments = "train_t5xxl=True img_attn_dim=8 in_dims=3,0,0,0,0 split_qkv=True network_reg_dims=te3=2"
    run(Case(f"--network_args {arguments} --network_alpha 2 --output_name first", encoders=("clip", "t5")))
    first = tmp_path / "out" / "first.safetensors"
    case = Case(
        f"--network_weights {first.as_posix()} --dim_from_weights --network_dim 16 --network_alpha 5 "
        "--text_encoder_lr 1e-4 1e-5",
        {
            "lora_te1_*": {"lr": 1e-4},
            "lora_te3_*": {"lr": 1e-5, "rank": 2},
            "*_attn_qkv": {"rank": 12, "alpha": 6.0},
            "*_img_attn_proj": {"rank": 8},
            "*_img_attn_qkv": {"rank": 24},
            "*_linear1": {"rank": 16, "alpha": 8.0},
            "lora_unet_img_in": {"rank": 3},
        },
        start=Module(alpha=2.0),
        encoders=("clip", "t5"),
    )
    trainer = run(case)
    assert trainer.trained_encoders == ("clip_l", "t5xxl")
    check(case, "dim_from_weights", trainer, tmp_path / "out" / "last.safetensors", first)
    with pytest.raises(UserError, match="the file of --dim_from_weights holds it"):
        run(Case(f"--network_weights {first.as_posix()} --dim_from_weights"))


def test_the_norms_of_ggpo_are_logged_from_the_first_step_on(run, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(Case(TRANSFORMER + f"ggpo_sigma=0.03 ggpo_beta=0.01 --logging_dir {(tmp_path / 'log').as_posix()}"))
    (events,) = (tmp_path / "log").rglob("events.*")
    curves = EventAccumulator(str(events))
    curves.Reload()
    tags = {"norm/avg_key_norm", "max_norm/max_key_norm", "norm/avg_grad_norm", "norm/avg_combined_norm"}
    assert tags <= set(curves.Tags()["scalars"])
    assert all(curves.Scalars(tag)[0].value > 0 for tag in tags)


def test_ggpo_is_refused_with_a_fused_backward_pass(run):
    with pytest.raises(UserError, match="ggpo_sigma and ggpo_beta need all gradients at once"):
        run(
            Case(
                TRANSFORMER + "ggpo_sigma=0.03 ggpo_beta=0.01 --optimizer_type adafactor --fused_backward_pass"
                " --max_grad_norm 0 --optimizer_args relative_step=False scale_parameter=False warmup_init=False"
            )
        )
