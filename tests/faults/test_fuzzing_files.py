"""No bytes that a file can hold end in a traceback or keep a program waiting: images, caches, models, LoRA files."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from library.checkpoints import open_checkpoint
from library.data import npz
from library.data.image_check import Look, look_at
from library.generation.image_files import text_in_image
from library.generation.latent_files import read_latents
from library.generation.textual_inversion import read_embedding
from library.image_reading import read_image
from library.safetensors_io import read_header
from tests.faults.corpus import archive, broken_images, odd_images, pickled
from tests.faults.fuzzing import endured, inputs, integers, json_of, mistaken, mistaken_bytes, nested, tables, texts
from tests.networks.lora_tool_files import write_lora

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzzed")


# ---- images ----------------------------------------------------------------------------------------------------------


@inputs(25)
@given(data=st.data())
def test_images(place, data):
    files = odd_images() | broken_images()
    name = data.draw(st.sampled_from(sorted(name for name, content in files.items() if content)))
    path = place / name
    path.write_bytes(data.draw(mistaken_bytes(files[name])))
    look = endured(lambda: look_at(path))
    assert isinstance(look, Look | str)
    pixels = endured(lambda: read_image(path, alpha=True), path)
    if not isinstance(look, str) and not isinstance(pixels, str):
        assert pixels[0].size == pixels[1].size == look.size
    endured(lambda: text_in_image(path), path)
    path.unlink()


# ---- caches ----------------------------------------------------------------------------------------------------------


CACHE = archive({f"{name}.npy": npz.encode_array(numpy.zeros((2, 3), "f4")) for name in ("latents", "identity")})


@inputs(25)
@given(data=mistaken_bytes(CACHE, head=len(CACHE)))
def test_cache_files(place, data):
    path = place / "a.npz"
    path.write_bytes(data)
    endured(lambda: npz.read_arrays_for_training(path, {"latents": (2, 3)}), path)

    def heads() -> None:
        with contextlib.suppress(*npz.DAMAGE):
            npz.read_heads(path)

    endured(heads, path)
    npz.update(path, {"new": npz.encode_array(numpy.ones(2))}, keep=lambda name: True)
    assert npz.read_arrays(path, ["new"])["new"].tolist() == [1, 1]


# ---- checkpoints -----------------------------------------------------------------------------------------------------


LORA = {
    f"{layer}.{part}": torch.ones(shape)
    for layer in ("lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_single_blocks_0_linear1", "lora_te1_x")
    for part, shape in (("lora_down.weight", (2, 8)), ("lora_up.weight", (8, 2)), ("alpha", ()))
}
METADATA = {"ss_network_module": "networks.lora", "ss_network_dim": "2", "ss_network_args": '{"conv_dim": 2}'}


@inputs(25)
@given(data=mistaken_bytes(save(LORA, METADATA), head=900))
def test_safetensors_files(place, data):
    path = place / "a.safetensors"
    path.write_bytes(data)
    endured(lambda: read_header(path), path)

    def load() -> None:
        checkpoint = open_checkpoint(path)
        for key in checkpoint:
            checkpoint.load(key)

    endured(load, path)


@inputs(20)
@given(data=st.data())
def test_indexes_of_shards(place, data):
    weights = st.dictionaries(texts, st.one_of(st.just("a-00001-of-00002.safetensors"), nested), max_size=3)
    text = json_of({"weight_map": data.draw(st.one_of(weights, nested)), "metadata": data.draw(nested)})
    path = place / "a.safetensors.index.json"
    path.write_text(data.draw(st.one_of(st.just(text), mistaken(text))), encoding="utf-8", errors="replace")
    endured(lambda: open_checkpoint(path), place)


@inputs(25)
@given(data=st.data())
def test_pickled_files(place, data):
    content = data.draw(
        st.sampled_from(({"latent": torch.ones(1, 4, 8, 8)}, torch.ones(1, 4, 8, 8), {"a": torch.ones(8)}))
    )
    path = place / "a.pt"
    path.write_bytes(data.draw(mistaken_bytes(pickled(content, data.draw(st.booleans())), head=700)))
    endured(lambda: open_checkpoint(path), path)
    endured(lambda: read_latents(path, 4, 8, 8), path)
    endured(lambda: read_embedding(path, "--textual_inversion_embeddings"), path)


# ---- tools -----------------------------------------------------------------------------------------------------------


TOOLS = {
    "networks.check_lora_weights": "FILE --show_all_keys",
    "networks.resize_lora": "--model FILE --save_to OUT --new_rank 1",
    "networks.svd_merge_lora": "--models FILE FILE --ratios 1 0.5 --save_to OUT --new_rank 2",
    "networks.merge_lora": "--models FILE FILE --ratios 1 0.5 --save_to OUT",
    "networks.flux_merge_lora": "--models FILE FILE --ratios 1 0.5 --save_to OUT",
    "networks.lumina_merge_lora": "--models FILE FILE --ratios 1 0.5 --save_to OUT",
    "networks.hunyuan_image_merge_lora": "--models FILE FILE --ratios 1 0.5 --save_to OUT",
    "networks.extract_lora_from_dylora": "--model FILE --save_to OUT --unit 1",
    "networks.convert_flux_lora": "--src_path FILE --dst_path OUT --src sd-scripts --dst ai-toolkit",
    "networks.convert_lumina_lora": "--src_path FILE --dst_path OUT",
    "networks.convert_hunyuan_image_lora_to_comfy": "FILE OUT",
    "tools.show_metadata": "FILE",
}

PARTS = (
    "lora_down.weight lora_up.weight alpha lora_A.weight lora_B.weight dora_scale lora_mid.weight hada_w1_a lokr_w1 "
    "diff bias oft_blocks lora_A.default.weight diff_b"
).split()
shapes = st.one_of(
    st.sampled_from(((), (2, 8), (8, 2), (1,), (2, 8, 1, 1), (8, 2, 3, 3))), st.lists(st.integers(0, 9), max_size=4)
)
dtypes = st.sampled_from((torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn))


def tensors() -> st.SearchStrategy[dict[str, torch.Tensor]]:
    """A LoRA file's tensors, some of which are others than they should be."""
    layers = (
        "lora_unet_double_blocks_0_img_attn_qkv",
        "transformer.single_transformer_blocks.0.attn.to_q",
        "lora_te_x",
    )
    names = st.one_of(
        st.builds("{}.{}".format, st.sampled_from(layers), st.sampled_from(PARTS)),
        st.sampled_from(sorted(LORA)),
        texts.filter(lambda text: not any("\ud800" <= letter <= "\udfff" for letter in text)),
    )

    def made(changes: list[tuple[str, Any, torch.dtype, float]], left_out: list[str]) -> dict[str, torch.Tensor]:
        found = {key: value for key, value in LORA.items() if key not in left_out}
        return found | {name: torch.full(tuple(shape), value).to(dtype) for name, shape, dtype, value in changes}

    values = st.sampled_from((1.0, 0.0, float("nan"), float("inf"), -1e30, 1e-30))
    changed = st.lists(st.tuples(names, shapes, dtypes, values), max_size=3)
    return st.builds(made, changed, st.lists(st.sampled_from(sorted(LORA)), max_size=2))


@inputs(30)
@given(data=st.data())
def test_tools_for_lora_files(place, data):
    tool = data.draw(st.sampled_from(sorted(TOOLS)))
    path, out = place / "lora.safetensors", place / "out.safetensors"
    metadata = METADATA | data.draw(
        st.dictionaries(st.sampled_from(sorted(METADATA)), nested.map(json.dumps), max_size=2)
    )
    sound = save(data.draw(tensors()), metadata)
    path.write_bytes(data.draw(st.one_of(st.just(sound), st.just(sound), mistaken_bytes(sound, head=900))))
    words = [{"FILE": str(path), "OUT": str(out)}.get(word, word) for word in TOOLS[tool].split()]
    main = importlib.import_module(tool).main
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        endured(lambda: main(words), path.name, "lora", "a given LoRA file is damaged")
    out.unlink(missing_ok=True)


MODEL_TOOLS = {
    "tiny_flux": "networks.flux_extract_lora --model_org SOUND --model_tuned FILE --dim 1 --save_to OUT",
    "tiny_chroma": "networks.flux_merge_lora --flux_model FILE --models LORA --ratios 1 --save_to OUT",
    "tiny_lumina": "networks.lumina_extract_lora --model_org SOUND --model_tuned FILE --dim 1 --save_to OUT",
    "tiny_hunyuan_image": "networks.hunyuan_image_extract_lora --model_org FILE --model_tuned SOUND --save_to OUT",
    "few_blocks_sd1": "networks.extract_lora_from_models --model_org SOUND --model_tuned FILE --dim 1 --save_to OUT",
}
"""Tools that read a whole model, by the fixture that makes one."""


def models(sound: bytes) -> st.SearchStrategy[bytes]:
    """The bytes of a model in which some were changed, or some of whose tensors are others than they should be."""
    tensors, header = load(sound), 8 + int.from_bytes(sound[:8], "little")

    def made(changes: list[tuple[str, Any, torch.dtype, float]], left_out: list[str]) -> bytes:
        found = {key: value for key, value in tensors.items() if key not in left_out}
        changed = {key: torch.full(shape or tensors[key].shape, value).to(kind) for key, shape, kind, value in changes}
        return save(found | changed, {"format": "pt"})

    names = st.sampled_from(sorted(tensors))
    values = st.sampled_from((1.0, 0.0, float("nan"), float("inf"), -1e30, 1e-30))
    shapes_or_own = st.one_of(st.none(), shapes.map(tuple))
    changes = st.lists(st.tuples(names, shapes_or_own, dtypes, values), min_size=1, max_size=3)
    return st.one_of(mistaken_bytes(sound, head=header), st.builds(made, changes, st.lists(names, max_size=2)))


@pytest.mark.thorough
@pytest.mark.parametrize("maker", MODEL_TOOLS)
def test_tools_for_models(request, place, maker):
    files, (tool, *words) = request.getfixturevalue(maker), MODEL_TOOLS[maker].split()
    whole = Path(getattr(files, "transformer", files))
    path, lora, out = place / "model.safetensors", place / "lora.safetensors", place / "out.safetensors"
    write_lora(lora, {"lora_unet_double_blocks_0_img_attn_proj": (64, 64)})
    known = {"SOUND": str(whole), "FILE": str(path), "LORA": str(lora), "OUT": str(out)}
    main, given_words = importlib.import_module(tool).main, [known.get(word, word) for word in words]

    @inputs(8)
    @given(content=models(whole.read_bytes()))
    def try_one(content: bytes) -> None:
        path.write_bytes(content)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            endured(lambda: main(given_words), path.name, str(whole), "model")
        out.unlink(missing_ok=True)

    try_one()


@inputs(15)
@given(data=st.data())
def test_metadata_viewer(place, data):
    from tools import show_metadata

    name = data.draw(st.sampled_from(("a.safetensors", "a.png", "a.webp", "a.jpg", "a")))
    path = place / name
    path.write_bytes(
        data.draw(st.one_of(st.binary(max_size=300), tables({"a": integers}).map(json_of).map(str.encode)))
    )
    with contextlib.redirect_stdout(io.StringIO()):
        endured(lambda: show_metadata.main([str(path)]), path)
