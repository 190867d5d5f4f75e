"""The table of docs/flux_lora_files.md: which layers of a file ComfyUI and diffusers load, and with which effect.

Diffusers is asked itself. ComfyUI cannot be installed beside this suite, so its rules for names and strength stand here
as they are in its own code (comfy/lora.py, comfy/weight_adapter): what they find in a file is compared with our merge.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from library.errors import UserError
from library.models.flux.checkpoint import SINGLE
from library.models.flux.transformer import FluxConfig, FluxTransformer
from library.models.loading import LoadSpec
from networks import lora_flux, oft_flux
from tests.interop.test_lora_flux_loads_in_diffusers import outputs, pipeline, randomise, tiny_pair
from tests.running import ROOT

pytest.importorskip("peft", reason="diffusers loads LoRA through peft")

BLOCKS = {"train_single_block_indices": "none"}


@dataclass(frozen=True)
class Kind:
    """A row of the table: how such a file is made, and what it has beside the layers in question."""

    arguments: Mapping[str, str] = field(default_factory=dict)
    beside: Mapping[str, str] | None = None
    """Arguments for the same file without those layers; None when it has nothing else."""
    encoders: tuple[str, ...] = ()
    alpha: float = 2.0
    module: Any = lora_flux
    layers: Callable[[str], bool] = lambda name: True
    """Which names in the file the row is about."""


KINDS = {
    "double blocks": Kind(BLOCKS),
    "single blocks: linear1": Kind({"network_reg_dims": "linear2=0,modulation=0", "train_blocks": "single"}),
    "single blocks: linear2, modulation": Kind({"network_reg_dims": "linear1=0", "train_blocks": "single"}),
    "ranks by layer, some blocks only": Kind(
        {"train_double_block_indices": "1", "train_single_block_indices": "0", "img_mlp_dim": "8", "txt_mod_dim": "0",
         "network_reg_dims": "linear1=0,img_attn_qkv=6"}
    ),
    "split_qkv=True": Kind({"split_qkv": "True", **BLOCKS}),
    "alpha left at 1, given, equal to the rank (0)": Kind(BLOCKS),
    "in_dims: conditioning layers": Kind(
        {"in_dims": "4,2,2,2,4", **BLOCKS}, BLOCKS, layers=lambda name: "blocks" not in name
    ),
    "CLIP-L": Kind(BLOCKS, BLOCKS, ("clip_l",), layers=lambda name: name.startswith("lora_te1")),
    "T5-XXL beside other layers": Kind(
        {"train_t5xxl": "True", **BLOCKS}, BLOCKS, ("t5xxl",), layers=lambda name: name.startswith("lora_te3")
    ),
    "T5-XXL alone": Kind({"train_t5xxl": "True", "train_blocks": "double", "train_double_block_indices": "none"},
                         None, ("t5xxl",)),
    "OFT": Kind(module=oft_flux, alpha=0.01),
}  # fmt: skip


@dataclass
class Models:
    """The same random models here and in diffusers."""

    ours: nn.Module
    theirs: nn.Module
    encoders: dict[str, nn.Module]
    their_encoders: dict[str, nn.Module]

    def apply(self, network: Any) -> None:
        network.apply_to([self.encoders["clip_l"], self.encoders["t5xxl"]], self.ours, True, True)

    def results(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What each model gives for fixed inputs, by its name: ours and diffusers'."""
        mine, other = outputs(self.ours, self.theirs)
        tokens = torch.arange(6)[None]
        found = []
        for result, encoders in ((mine, self.encoders), (other, self.their_encoders)):
            with torch.no_grad():
                clip = encoders["clip_l"](tokens).pooler_output
                found.append({"flux": result, "clip_l": clip, "t5xxl": encoders["t5xxl"](tokens).last_hidden_state})
        return found[0], found[1]


@pytest.fixture(scope="module")
def models() -> Models:
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    ours, theirs = tiny_pair()
    clip = CLIPTextConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=99,
        bos_token_id=97, eos_token_id=98,
    )  # fmt: skip
    t5 = T5Config(
        d_model=48, d_kv=12, d_ff=64, num_layers=2, num_heads=4, vocab_size=99, feed_forward_proj="gated-gelu"
    )
    pairs = [
        {
            "clip_l": CLIPTextModel(clip).requires_grad_(False).eval(),
            "t5xxl": T5EncoderModel(t5).requires_grad_(False).eval(),
        }
        for _ in range(2)
    ]
    for name in pairs[0]:
        pairs[1][name].load_state_dict(pairs[0][name].state_dict())
    return Models(ours, theirs, *pairs)


def network_of(kind: Kind, models: Models, arguments: Mapping[str, str] | None = None) -> Any:
    encoders = [models.encoders[name] if name in kind.encoders else None for name in ("clip_l", "t5xxl")]
    given = kind.arguments if arguments is None else arguments
    network = kind.module.create_network(1.0, 4, kind.alpha, None, encoders, models.ours, **given)
    randomise(network, 0.3)
    return network


# ---- diffusers -------------------------------------------------------------------------------------------------------


def close(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    return all(torch.allclose(one[name], two[name], rtol=1e-3, atol=1e-3) for name in one)


def in_diffusers(kind: Kind, models: Models, path: Path, network: Any) -> str:
    """yes, dropped, refused, or what came out instead; ``path`` holds ``network``."""
    plain, _ = models.results()
    models.apply(network)
    wanted, _ = models.results()
    network.remove()
    less = plain
    if kind.beside is not None:
        kept = {lora.lora_name: lora for lora in network.loras if not kind.layers(lora.lora_name)}
        for lora in kept.values():
            lora.apply_to()
        less, _ = models.results()
        for lora in kept.values():
            lora.remove()
    assert not close(wanted, less), "the layers in question do nothing"
    pipe = pipeline(models.theirs, models.their_encoders["clip_l"])
    pipe.text_encoder_2 = models.their_encoders["t5xxl"]
    try:
        pipe.load_lora_weights(path)
    except ValueError:
        return "refused"
    _, found = models.results()
    pipe.unload_lora_weights()
    return "yes" if close(found, wanted) else "dropped" if close(found, less) else "something else"


@pytest.mark.parametrize("row", [row for row in KINDS if not row.startswith(("alpha", "single blocks: linear1"))])
def test_diffusers_loads_what_the_table_says(row, models, tmp_path, documented_table):
    kind = KINDS[row]
    network = network_of(kind, models)
    network.save_weights(tmp_path / "file.safetensors", None, None)
    assert in_diffusers(kind, models, tmp_path / "file.safetensors", network) == documented_table[row][1]


@pytest.mark.parametrize("alpha", [1, 0.5, 0])
def test_every_alpha_counts_in_diffusers(alpha, models, tmp_path, documented_table):
    row = "alpha left at 1, given, equal to the rank (0)"
    kind = Kind(BLOCKS, alpha=alpha)
    network = network_of(kind, models)
    path = tmp_path / "file.safetensors"
    network.save_weights(path, None, None)
    assert in_diffusers(kind, models, path, network) == documented_table[row][1]
    assert in_diffusers(kind, models, converted(path), network) == documented_table[row][2]


@pytest.mark.parametrize("split", ["False", "True"])
def test_diffusers_takes_linear1_of_the_full_model(split, documented_table, tmp_path):
    """Its converter knows one size only: parts of 3072, 3072, 3072 and 12288 outputs."""
    from diffusers import FluxPipeline

    with torch.device("meta"):
        ours = FluxTransformer(FluxConfig(depth=1, depth_single=1))
    network = lora_flux.create_network(1.0, 2, 1.0, None, [None], ours, network_reg_dims="^((?!linear1).)*$=0",
                                       split_qkv=split)  # fmt: skip
    randomise(network)
    network.save_weights(tmp_path / "file.safetensors", None, None)
    found = FluxPipeline.lora_state_dict(tmp_path / "file.safetensors")
    (lora,) = network.loras
    assert lora.lora_name == "lora_unet_single_blocks_0_linear1"
    parts = [f"transformer.single_transformer_blocks.0.{part}" for part in SINGLE["linear1"]]
    assert set(found) == {f"{part}.lora_{matrix}.weight" for part in parts for matrix in "AB"}
    x = torch.randn(3, 3072)
    outputs = [x @ found[f"{part}.lora_A.weight"].T @ found[f"{part}.lora_B.weight"].T for part in parts]
    mine = lora.scale * x @ lora.down_matrix.detach().T @ lora.up_matrix.detach().T
    torch.testing.assert_close(torch.cat(outputs, dim=1), mine, rtol=1e-4, atol=1e-4)
    assert documented_table["single blocks: linear1"][1] == "yes"


def converted(path: Path) -> Path:
    """The file for AI-toolkit beside the file at ``path``. Raises UserError."""
    from networks import convert_flux_lora

    result = path.with_name("converted.safetensors")
    given = ["--src", "sd-scripts", "--dst", "ai-toolkit", "--src_path", str(path), "--dst_path", str(result)]
    convert_flux_lora.main(given)
    return result


@pytest.mark.parametrize("row", [row for row in KINDS if not row.startswith("alpha")])
def test_diffusers_loads_what_the_table_says_after_conversion(row, models, tmp_path, documented_table):
    kind = KINDS[row]
    network = network_of(kind, models)
    network.save_weights(tmp_path / "file.safetensors", None, None)
    try:
        found = in_diffusers(kind, models, converted(tmp_path / "file.safetensors"), network)
    except UserError:
        found = "not converted"
    assert found == documented_table[row][2]


@pytest.fixture(scope="module")
def chroma(tmp_path_factory) -> tuple[nn.Module, nn.Module]:
    """The same tiny Chroma here and in diffusers."""
    from diffusers import ChromaTransformer2DModel

    from library.models.flux.checkpoint import open_transformer
    from tools.make_tiny_models import make_tiny_chroma

    folder = make_tiny_chroma(tmp_path_factory.mktemp("chroma"), layout="diffusers").transformer
    theirs = ChromaTransformer2DModel.from_pretrained(folder / "transformer").eval()
    return open_transformer(folder, model_type="chroma").load(LoadSpec.of(torch.float32)).eval(), theirs


def chroma_outputs(ours: nn.Module, theirs: nn.Module) -> tuple[Tensor, Tensor]:
    """Of both, for a text of five tokens whose last is no padding."""
    torch.manual_seed(1)
    image, text, time = torch.randn(2, 16, 64), torch.randn(2, 5, 64), torch.tensor([0.3, 0.8])
    image_ids, text_ids = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)), torch.zeros(5, 3)
    with torch.no_grad():
        mine = ours(image, image_ids, text, text_ids, time, txt_attention_mask=torch.ones(2, 5))
        other = theirs(
            hidden_states=image, encoder_hidden_states=text, timestep=time, img_ids=image_ids, txt_ids=text_ids
        ).sample  # fmt: skip
    return mine, other


@pytest.mark.parametrize("convert", [False, True])
def test_diffusers_loads_chroma(chroma, convert, tmp_path, documented_table):
    from diffusers import ChromaPipeline, FlowMatchEulerDiscreteScheduler

    ours, theirs = chroma
    plain, their_plain = chroma_outputs(ours, theirs)
    torch.testing.assert_close(plain, their_plain, rtol=1e-3, atol=1e-3)
    # The tiny linear1 comes through after conversion only, see the test of linear1.
    arguments = {} if convert else {"network_reg_dims": "linear1=0"}
    network = lora_flux.create_network(1.0, 4, 2.0, None, [None], ours, **arguments)
    randomise(network, 0.1)
    path = tmp_path / "file.safetensors"
    network.save_weights(path, None, None)
    network.apply_to(None, ours)
    pipe = ChromaPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, theirs)
    pipe.load_lora_weights(converted(path) if convert else path)
    mine, other = chroma_outputs(ours, theirs)
    network.remove()
    pipe.unload_lora_weights()
    assert (mine - plain).abs().max() > 0.05
    torch.testing.assert_close(other, mine, rtol=1e-3, atol=1e-3)
    assert documented_table["Chroma"][2 if convert else 1] == "yes"


# ---- ComfyUI ---------------------------------------------------------------------------------------------------------

CLIP_LAYERS = ("mlp.fc1", "mlp.fc2", "self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj", "self_attn.out_proj")


def names_in_comfyui(models: Models) -> dict[str, nn.Module]:
    """The names that ComfyUI looks for, and the layer that each is for: FLUX.1 with CLIP-L and T5."""
    names: dict[str, nn.Module] = {}
    for path, module in models.ours.named_modules():
        if isinstance(getattr(module, "weight", None), Tensor):
            names[f"lora_unet_{path.replace('.', '_')}"] = module
            names[f"diffusion_model.{path}"] = module
    clip = models.encoders["clip_l"]
    for number in range(2):
        for layer in CLIP_LAYERS:
            module = clip.get_submodule(f"encoder.layers.{number}.{layer}")
            for prefix in ("lora_te_", "lora_te1_"):
                names[f"{prefix}text_model_encoder_layers_{number}_{layer.replace('.', '_')}"] = module
    for path, module in models.encoders["t5xxl"].named_modules():
        if isinstance(getattr(module, "weight", None), Tensor):
            for prefix in ("lora_te2_", "lora_te3_"):
                names[f"{prefix}{path.replace('.', '_')}"] = module
    return names


def patches_of_comfyui(tensors: Mapping[str, Tensor], names: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """What ComfyUI adds to weights at strength 1, by name in the file."""
    patches = {}
    for name, module in names.items():
        up, down = tensors.get(f"{name}.lora_up.weight"), tensors.get(f"{name}.lora_down.weight")
        if up is not None and down is not None:
            alpha = tensors.get(f"{name}.alpha")
            scale = 1.0 if alpha is None else alpha.item() / len(down)
            patches[name] = (scale * up @ down).reshape(module.weight.shape)
        assert f"{name}.oft_blocks" not in tensors, "a name that ComfyUI knows: the table must say what becomes of it"
    return patches


def in_comfyui(kind: Kind, models: Models, path: Path, network: Any) -> str:
    patches = patches_of_comfyui(load_file(path), names_in_comfyui(models))
    mine = {
        lora.lora_name: lora.scale * lora.up_matrix.detach() @ lora.down_matrix.detach()
        for lora in network.loras
        if kind.layers(lora.lora_name) and kind.module is lora_flux
    }
    if not patches.keys() & mine.keys():
        return "dropped"
    equal = all(
        name in patches and torch.allclose(patches[name], delta, rtol=1e-4, atol=1e-5) for name, delta in mine.items()
    )
    return "yes" if equal else "something else"


@pytest.mark.parametrize("row", KINDS)
def test_comfyui_finds_what_the_table_says(row, models, tmp_path, documented_table):
    kind = KINDS[row]
    for alpha in (1, 0.5, 0) if row.startswith("alpha") else (kind.alpha,):
        network = network_of(Kind(kind.arguments, alpha=alpha) if row.startswith("alpha") else kind, models)
        network.save_weights(tmp_path / "file.safetensors", None, None)
        assert in_comfyui(kind, models, tmp_path / "file.safetensors", network) == documented_table[row][0]


def test_comfyui_finds_chroma(chroma, tmp_path, documented_table):
    """Its model has the original names too; with T5 alone, T5's LoRA would be lora_te1, which no file of ours has."""
    ours, _ = chroma
    network = lora_flux.create_network(1.0, 4, 2.0, None, [None], ours, in_dims="4,4,4,4,4", split_qkv="True")
    randomise(network)
    network.save_weights(tmp_path / "file.safetensors", None, None)
    names = {f"lora_unet_{path.replace('.', '_')}": module for path, module in ours.named_modules()}
    patches = patches_of_comfyui(load_file(tmp_path / "file.safetensors"), names)
    assert patches.keys() == {lora.lora_name for lora in network.loras}
    for lora in network.loras:
        delta = lora.scale * lora.up_matrix.detach() @ lora.down_matrix.detach()
        torch.testing.assert_close(patches[lora.lora_name], delta, rtol=1e-4, atol=1e-5)
    assert documented_table["Chroma"][0] == "yes"


# ---- the table -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def documented_table() -> dict[str, list[str]]:
    """Rows of the page's table: what is in the file -> ComfyUI, diffusers, diffusers after conversion."""
    page = (ROOT / "docs" / "flux_lora_files.md").read_text(encoding="utf-8")
    table = page.split("| in the file |")[1].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in table]
    return {row[0]: row[1:] for row in rows}


def test_every_row_of_the_table_is_tested(documented_table):
    assert set(documented_table) == {*KINDS, "Chroma"}


def test_the_page_names_the_version_that_is_tested():
    import diffusers

    page = (ROOT / "docs" / "flux_lora_files.md").read_text(encoding="utf-8")
    assert re.search(r"measured with Diffusers ([\d.]+\d)", page)[1] == diffusers.__version__
