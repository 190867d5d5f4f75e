"""What becomes of a LoRA file of ours in another program: the file is made, opened there, and weights are compared."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from library.errors import UserError
from networks import dylora, lora_fa
from tests.interop.programs import in_comfyui, in_web_ui
from tests.interop.workbench import Weights, Workbench, randomised
from tests.running import lycoris_package

MODULES = {"lora_fa": lora_fa, "dylora": dylora}


@dataclass(frozen=True)
class Kind:
    """A kind of LoRA file: how it is made, and which of its layers are in question."""

    arguments: Mapping[str, str] = field(default_factory=dict)
    module: str = "lora"
    """lora or oft of the family, lora_fa, dylora or lycoris."""
    encoders: tuple[int, ...] = ()
    """Which text encoders it may train."""
    layers: Callable[[str], bool] = lambda name: True
    """Which names are in question; the others come along."""
    alpha: float = 2.0
    without: str = ""
    """Layers with this in their names are taken out of the file."""


@dataclass
class File:
    """A file, and the weights of all layers with it."""

    path: Path
    weights: Weights


def make(bench: Workbench, kind: Kind, path: Path) -> File:
    """A file of this kind with random numbers."""
    file = _make(bench, kind, path)
    if kind.without:
        tensors = {key: tensor for key, tensor in load_file(path).items() if kind.without not in key}
        save_file(tensors, path)
        file.weights |= {name: weight for name, weight in bench.weights.items() if kind.without in name}
    return file


def _make(bench: Workbench, kind: Kind, path: Path) -> File:
    encoders = [encoder if number in kind.encoders else None for number, encoder in enumerate(bench.encoders)]
    if kind.module == "lycoris":
        package = lycoris_package()
        given: Any = [encoder or torch.nn.Module() for encoder in encoders]
        given = given[0] if len(bench.encoders) == 1 and bench.family != "lumina" else given
        network = package.create_network(1.0, 4, kind.alpha, None, given, bench.tree, **kind.arguments)
        network.apply_to(given, bench.tree, True, True)
        randomised(network, 0.1)
        network.save_weights(str(path), torch.float32, {})
        weights = bench.merged(lambda: package.merge(network, 1.0))
        network.restore()
        return File(path, weights)
    module = MODULES.get(kind.module) or getattr(bench, kind.module)
    network = randomised(module.create_network(1.0, 4, kind.alpha, None, encoders, bench.unet, **kind.arguments))
    network.save_weights(path, None, {})
    return File(path, bench.merged(lambda: network.merge_to(None, None)))


def outcome(base: Weights, wanted: Weights, found: Weights, in_question: Callable[[str], bool]) -> str:
    """yes, dropped, in part or otherwise: what ``found`` has of what ``wanted`` has in the layers in question."""
    layers = [name for name in wanted if in_question(name) and not torch.equal(wanted[name], base[name])]
    assert layers, "the layers in question do nothing"
    right = [name for name in layers if _close(found[name], wanted[name], base[name])]
    left = [name for name in layers if _close(found[name], base[name], wanted[name])]
    assert all(_close(found[name], base[name], base[name]) for name in wanted.keys() - layers if in_question(name))
    if len(right) == len(layers):
        return "yes"
    if len(left) == len(layers):
        return "dropped"
    return "in part" if len(right) + len(left) == len(layers) else "otherwise"


def _close(one: Any, two: Any, other: Any) -> bool:
    scale = max(float((two - other).abs().max()), 1e-4)
    return bool((one - two).abs().max() <= 1e-3 * scale)


# ---- the programs ----------------------------------------------------------------------------------------------------


def comfyui(bench: Workbench, kind: Kind, file: File) -> str:
    """By its rules."""
    return outcome(bench.weights, file.weights, in_comfyui(bench, load_file(file.path)), kind.layers)


def web_ui(bench: Workbench, kind: Kind, file: File) -> str:
    """By its rules."""
    return outcome(bench.weights, file.weights, in_web_ui(bench, load_file(file.path)), kind.layers)


def lycoris(bench: Workbench, kind: Kind, file: File) -> str:
    """The package reads the file by its tensors alone."""
    package = lycoris_package()
    encoders: Any = [encoder or torch.nn.Module() for encoder in bench.encoders]
    encoders = encoders[0] if len(encoders) == 1 and bench.family != "lumina" else encoders
    try:
        network, _ = package.create_network_from_weights(
            1.0, file.path, None, encoders, bench.tree, weights_sd=load_file(file.path)
        )
    except UserError:
        return "refused"
    found = bench.merged(lambda: package.merge(network, 1.0))
    return outcome(bench.weights, file.weights, found, kind.layers)


def diffusers(bench: Workbench, kind: Kind, file: File) -> str:
    """Loaded by its pipeline; what its layers get is compared under its own names."""
    parts = {"unet": getattr(bench.pipeline, "unet", None) or getattr(bench.pipeline, "transformer", bench.pipeline)}
    for number in (1, 2):
        encoder = getattr(bench.pipeline, "text_encoder" + ("_2" if number == 2 else ""), None)
        if encoder is not None:
            parts[f"text encoder {number}"] = encoder
    load = getattr(bench.pipeline, "load_lora_weights", None) or bench.pipeline.load_lora_adapter
    try:
        load(str(file.path), adapter_name="ours")
    except (ValueError, RuntimeError, KeyError, AttributeError, NotImplementedError):
        _unload(bench)
        return "refused"
    base = bench.weights
    found = {name: weight.clone() for name, weight in base.items()}
    theirs = _differences(parts["unet"])
    layers = {id(layer): name for name, layer in bench.layers.items()}
    if bench.their_state is None:
        for path, difference in theirs.items():
            found[layers[id(parts["unet"].get_submodule(path).base_layer)]] += difference
    else:
        found |= _back(bench, theirs)
    found |= _encoder_differences(bench, parts, found)
    _unload(bench)
    return outcome(base, file.weights, found, kind.layers)


def _differences(model: Any) -> Weights:
    """What PEFT's layers add, by the path of each."""
    found = {}
    for path, module in model.named_modules():
        if getattr(module, "lora_A", None):
            found[path] = module.get_delta_weight("ours").detach().reshape(module.base_layer.weight.shape)
    return found


def _back(bench: Workbench, theirs: Weights) -> Weights:
    """The weights of our transformer with what stands under Diffusers' names added: tried one number at a time.

    The names are followed forward only: each layer's rows are marked, and looked for among theirs.
    """
    assert bench.their_state is not None
    state = bench.unet.state_dict()
    marks = {key: torch.arange(value.numel(), dtype=torch.float64).reshape(value.shape) for key, value in state.items()}
    owners = {key: torch.full(value.shape, number) for number, (key, value) in enumerate(state.items())}
    names = list(state)
    changed = {key: value.clone() for key, value in state.items()}
    where, owner = bench.their_state(marks), bench.their_state(owners)  # type: ignore[arg-type]
    for path, difference in theirs.items():
        key = f"{path}.weight"
        ours = changed[names[int(owner[key].flatten()[0])]]
        ours.view(-1)[where[key].flatten().long()] += difference.flatten()
    return {
        f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}": value
        for key, value in changed.items()
        if f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}" in bench.layers
    }


def _encoder_differences(bench: Workbench, parts: Mapping[str, Any], found: Weights) -> Weights:
    changed = {}
    for number, (table, encoder) in enumerate(zip(bench.rules.text_encoders, bench.encoders), start=1):
        model = parts.get(f"text encoder {number}") if encoder is not None else None
        for path, difference in _differences(model).items() if model is not None else ():
            name = f"{table.prefix}.{table.file_path(path)}".replace(".", "_")
            changed[name] = found[name] + difference
    return changed


def _unload(bench: Workbench) -> None:
    unload = getattr(bench.pipeline, "unload_lora_weights", None)
    if unload is not None:
        unload()
    elif getattr(bench.pipeline, "peft_config", None):
        bench.pipeline.unload_lora()


def converted(bench: Workbench, file: File, program: str) -> File | None:
    """The same file by this suite's tool under the names of ``program``; None where the tool refuses it."""
    name = {"chroma": "flux"}.get(bench.family, bench.family)
    target = file.path.with_name(f"{program}.safetensors")
    if name == "hunyuan_image":
        module, given = "networks.convert_hunyuan_image_lora_to_comfy", [file.path, target]
    else:
        module = f"networks.convert_{name}_lora"
        given = ["--src_path", file.path, "--dst_path", target, "--dst", program]
    try:
        importlib.import_module(module).main([str(word) for word in given])
    except UserError:
        return None
    return File(target, file.weights)


def measure(bench: Workbench, kinds: Iterable[Kind], columns: Sequence[str], folder: Path) -> list[str]:
    """A row of the table: what becomes of files of these kinds in the columns' programs; "/" between several answers.

    A column "ComfyUI, converted" is about the file that this suite's tool makes for that program.
    """
    rows = []
    for kind in kinds:
        file = make(bench, kind, folder / "ours.safetensors")
        cells = []
        for column in columns:
            name, _, after = column.partition(", ")
            given = converted(bench, file, name.lower()) if after else file
            cells.append("not converted" if given is None else PROGRAMS[name](bench, kind, given))
        rows.append(cells)
    return ["/".join(dict.fromkeys(cells)) for cells in zip(*rows)]


PROGRAMS: Mapping[str, Callable[[Workbench, Kind, File], str]] = {
    "ComfyUI": comfyui,
    "web UI": web_ui,
    "Diffusers": diffusers,
    "LyCORIS": lycoris,
}


def beginning(prefix: str) -> Callable[[str], bool]:
    """For ``Kind.layers``: names that begin so."""
    return lambda name: name.startswith(prefix)


BOTH = (0, 1)
ALIKE = {  # of every family
    "OFT": [Kind(module="oft", alpha=0.01)],
    "LyCORIS LoHa, LoKr": [Kind({"algo": "loha"}, "lycoris"), Kind({"algo": "lokr", "factor": "4"}, "lycoris")],
    "LyCORIS DoRA": [Kind({"algo": "lora", "dora_wd": "True"}, "lycoris")],
}
STABLE_DIFFUSION = {
    "LoRA with text encoders": [Kind(encoders=BOTH)],
    "convolutions (`conv_dim`)": [Kind({"conv_dim": "3", "conv_alpha": "1"})],
    "LoRA-FA, DyLoRA": [Kind(module="lora_fa"), Kind({"conv_dim": "4"}, "dylora")],
    **ALIKE,
    "LyCORIS DoRA, `wd_on_output=False`": [
        Kind({"algo": "lora", "dora_wd": "True", "wd_on_output": "False"}, "lycoris", BOTH)
    ],
    "LyCORIS `train_norm`": [Kind({"algo": "lora", "train_norm": "True"}, "lycoris", layers=lambda n: "norm" in n)],
}
# Diffusers takes the sizes of linear1 from the full model; a test of its own compares it.
BLOCKS = {"network_reg_dims": "linear1=0"}
STREAMS = {
    "double and single blocks": [Kind(BLOCKS)],
    "ranks by layer, some blocks only": [
        Kind({"train_double_block_indices": "1", "train_single_block_indices": "0", "img_mlp_dim": "8",
              "network_reg_dims": "linear1=0,img_attn_qkv=6"})
    ],
    "`split_qkv=True`": [Kind({"split_qkv": "True", **BLOCKS})],
    "alpha left at 1, given, equal to the rank (0)": [Kind(BLOCKS, alpha=alpha) for alpha in (1, 0.5, 0)],
    "T5-XXL beside other layers": [
        Kind({"train_t5xxl": "True", **BLOCKS}, encoders=(1,), layers=beginning("lora_te3"))
    ],
    **{row: [replace(kind, without="linear1") for kind in kinds] for row, kinds in ALIKE.items()},
}  # fmt: skip
ONLY_FLUX = {
    "`in_dims`: conditioning layers": [
        Kind({"in_dims": "4,2,2,2,4", **BLOCKS}, layers=lambda name: "blocks" not in name)
    ],
    "CLIP-L": [Kind(BLOCKS, encoders=(0,), layers=beginning("lora_te1"))],
    "T5-XXL alone": [
        Kind({"train_t5xxl": "True", "train_blocks": "double", "train_double_block_indices": "none"}, encoders=(1,))
    ],
}
KINDS: Mapping[str, Mapping[str, list[Kind]]] = {
    "sd1": STABLE_DIFFUSION,
    "sd2": STABLE_DIFFUSION,
    "sdxl": STABLE_DIFFUSION,
    "flux": {**STREAMS, **ONLY_FLUX},
    "chroma": STREAMS,
    "lumina": {
        "all blocks": [Kind()],
        "`split_qkv=True`": [Kind({"split_qkv": "True"})],
        "`embedder_dims`": [Kind({"embedder_dims": "2,3,4"}, layers=lambda name: "embedder" in name)],
        "Gemma 2": [Kind(encoders=(0,), layers=beginning("lora_te"))],
        **ALIKE,
    },
    "hunyuan_image": {"all blocks": [Kind()], "`split_qkv=True`": [Kind({"split_qkv": "True"})], **ALIKE},
}
"""By family and by row of its table on the page: all of a row's kinds have the same outcome."""
