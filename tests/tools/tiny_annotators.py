"""Tiny models that make captions and masks, with random weights, in the files of the large ones."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from library.lean_imports import transformers_class

TAGS = [
    ("general", 9),
    ("sensitive", 9),
    ("1girl", 0),
    ("long_hair", 0),
    ("^_^", 0),
    ("simple_background", 0),
    ("red_eyes", 0),
    ("hatsune_miku", 4),
    ("saber_(fate)", 4),
    ("artist", 1),
]
"""Names and categories of the tiny tagger's tags."""
SIDE = 16
"""Pixels of the images that the tiny tagger takes."""


# ---- a WD14 tagger -------------------------------------------------------------------------------------------------


def field(number: int, value: int | bytes | str) -> bytes:
    """A field of a protobuf message: https://protobuf.dev/programming-guides/encoding"""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def _tensor(name: str, values: numpy.ndarray) -> bytes:
    sizes = b"".join(field(1, size) for size in values.shape)
    return sizes + field(2, 1) + field(8, name) + field(9, values.astype("<f4").tobytes())


def _described(name: str, sizes: Sequence[int | str]) -> bytes:
    shape = b"".join(field(1, field(1 if isinstance(size, int) else 2, size)) for size in sizes)
    return field(1, name) + field(2, field(1, field(1, 1) + field(2, shape)))


def _node(kind: str, inputs: Sequence[str], output: str) -> bytes:
    return b"".join(field(1, name) for name in inputs) + field(2, output) + field(4, kind)


def onnx_of_tagger(weights: numpy.ndarray, bias: numpy.ndarray, batch: int | str = "batch") -> bytes:
    """``sigmoid(pixels @ weights + bias)`` of all pixels of an image [batch, SIDE, SIDE, 3], as an ONNX file."""
    nodes = [
        _node("Flatten", ["input"], "flat"),
        _node("MatMul", ["flat", "weights"], "product"),
        _node("Add", ["product", "bias"], "sum"),
        _node("Sigmoid", ["sum"], "output"),
    ]
    graph = b"".join(field(1, node) for node in nodes) + field(2, "tagger")
    graph += field(5, _tensor("weights", weights)) + field(5, _tensor("bias", bias))
    graph += field(11, _described("input", [batch, SIDE, SIDE, 3]))
    graph += field(12, _described("output", [batch, weights.shape[1]]))
    return field(1, 8) + field(7, graph) + field(8, field(1, "") + field(2, 13))


def tagger_weights(count: int = len(TAGS), seed: int = 0) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Random weights with which tags are sometimes found and sometimes not."""
    draws = numpy.random.default_rng(seed)
    weights = draws.normal(size=(SIDE * SIDE * 3, count)) * 3 / 255 / numpy.sqrt(SIDE * SIDE * 3)
    return weights.astype(numpy.float32), draws.normal(size=count).astype(numpy.float32)


def write_tagger(folder: Path, batch: int | str = "batch", tags: Sequence[tuple[str, int]] = TAGS) -> Path:
    """The two files of a tagger. ``tags`` may differ from those that the network knows."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(onnx_of_tagger(*tagger_weights(), batch))
    table = io.StringIO()
    rows = csv.writer(table)
    rows.writerow(["tag_id", "name", "category", "count"])
    rows.writerows([number, name, category, 1000 - number] for number, (name, category) in enumerate(tags))
    (folder / "selected_tags.csv").write_text(table.getvalue(), encoding="utf-8")
    return folder


# ---- models of transformers ----------------------------------------------------------------------------------------


def _byte_tokenizer(specials: Sequence[str], **named: Any) -> Any:
    """A tokenizer with one token for each byte, behind the special ones."""
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: place for place, token in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


def _saved(folder: Path, model: Any, *parts: Any, spread: float = 0.3) -> Path:
    """The files of a model and of what belongs to it; weights so large that the words depend on the image."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    for part in (model, *parts):
        part.save_pretrained(folder)
    return folder


def write_blip(folder: Path) -> Path:
    """BLIP, whose words are the letters."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]"]
    words += [*"abcdefghijklmnopqrstuvwxyz", *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")]
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    tokenizer = transformers_class("bert.tokenization_bert", "BertTokenizer").from_pretrained(folder)
    text = {"vocab_size": len(words), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"intermediate_size": 32, "encoder_hidden_size": 16, "max_position_embeddings": 64, "pad_token_id": 0}
    text |= {"bos_token_id": 5, "sep_token_id": 3, "eos_token_id": 3}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 8}
    config = transformers_class("blip.configuration_blip", "BlipConfig")(text_config=text, vision_config=vision)
    model = transformers_class("blip.modeling_blip", "BlipForConditionalGeneration")(config)
    images = transformers_class("blip.image_processing_pil_blip", "BlipImageProcessorPil")(
        size={"height": 32, "width": 32}
    )
    return _saved(folder, model, tokenizer, images)


def write_florence(folder: Path) -> Path:
    """Florence-2, whose tokens are bytes."""
    specials = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"}
    tokenizer = _byte_tokenizer(
        [*specials.values(), "<image>"],
        **{f"{name}_token": token for name, token in specials.items()},
        extra_special_tokens={"image_token": "<image>"},
    )
    text = {"model_type": "bart", "vocab_size": 262, "d_model": 16, "max_position_embeddings": 128, "pad_token_id": 1}
    text |= {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in _LAYERS.items()}
    text |= {"bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2}
    vision = {"depths": [1] * 4, "embed_dim": [8, 8, 8, 16], "num_heads": [2] * 4, "num_groups": [2] * 4}
    vision |= {"window_size": 2, "projection_dim": 16, "drop_path_rate": 0.0}
    config = transformers_class("florence2.configuration_florence2", "Florence2Config")(
        text_config=text, vision_config=vision, image_token_id=5
    )
    model = transformers_class("florence2.modeling_florence2", "Florence2ForConditionalGeneration")(config)
    images = transformers_class("clip.image_processing_pil_clip", "CLIPImageProcessorPil")(
        size={"height": 64, "width": 64}, do_center_crop=False
    )
    images.image_seq_length = 5
    return _saved(folder, model, tokenizer, images, spread=0.5)


_LAYERS = {"layers": 1, "attention_heads": 2, "ffn_dim": 32}


def write_qwen(folder: Path) -> Path:
    """Qwen2.5-VL, whose tokens are bytes."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    tokenizer = _byte_tokenizer(
        [*specials, "<|video_pad|>"],
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=specials[1:],
    )
    text = {"vocab_size": 263, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 1024}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
    text |= {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
    vision = {"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 16}
    vision |= {"patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]}
    config = transformers_class("qwen2_5_vl.configuration_qwen2_5_vl", "Qwen2_5_VLConfig")(
        text_config=text, vision_config=vision, image_token_id=5, video_token_id=6, vision_start_token_id=3
    )
    config.vision_end_token_id = 4
    model = transformers_class("qwen2_5_vl.modeling_qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration")(config)
    model.generation_config.eos_token_id = [2, 0]
    images = transformers_class("qwen2_vl.image_processing_pil_qwen2_vl", "Qwen2VLImageProcessorPil")(
        size={"shortest_edge": 56 * 56, "longest_edge": 56 * 112}
    )
    return _saved(folder, model, tokenizer, images)


def change_config(folder: Path, **keys: Any) -> None:
    """Change keys of a model's ``config.json``; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | keys
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}), encoding="utf-8")


LABELS = ["wall", "cat", "sofa", "dog"]
"""What the tiny segmenters tell apart."""


def write_segformer(folder: Path) -> Path:
    """SegFormer for ``LABELS``."""
    config = transformers_class("segformer.configuration_segformer", "SegformerConfig")(
        depths=[1] * 4,
        hidden_sizes=[8] * 4,
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16,
        **_labels(),
    )
    model = transformers_class("segformer.modeling_segformer", "SegformerForSemanticSegmentation")(config)
    images = transformers_class("segformer.image_processing_pil_segformer", "SegformerImageProcessorPil")(
        size={"height": 64, "width": 64}
    )
    return _saved(folder, model, images, spread=0.5)


def write_mask2former(folder: Path) -> Path:
    """Mask2Former for ``LABELS``; images keep their shape, so that a batch of several shapes is padded."""
    swin = transformers_class("swin.configuration_swin", "SwinConfig")(
        image_size=64,
        embed_dim=8,
        depths=[1] * 4,
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = transformers_class("mask2former.configuration_mask2former", "Mask2FormerConfig")(
        backbone_config=swin,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=6,
        **_labels(),
    )
    model = transformers_class("mask2former.modeling_mask2former", "Mask2FormerForUniversalSegmentation")(config)
    images = transformers_class("mask2former.image_processing_pil_mask2former", "Mask2FormerImageProcessorPil")(
        size={"shortest_edge": 64, "longest_edge": 160}
    )
    return _saved(folder, model, images, spread=0.4)


def write_clipseg(folder: Path) -> Path:
    """CLIPSeg, whose tokens are bytes."""
    tokenizer = _byte_tokenizer(
        ["<|startoftext|>", "<|endoftext|>"], bos_token="<|startoftext|>", eos_token="<|endoftext|>",
        pad_token="<|endoftext|>", model_max_length=32,
    )  # fmt: skip
    text = {"vocab_size": 258, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 8}
    config = transformers_class("clipseg.configuration_clipseg", "CLIPSegConfig")(
        text_config=text, vision_config=vision, projection_dim=16, reduce_dim=8, extract_layers=[0, 1, 2],
        decoder_num_attention_heads=2, decoder_intermediate_size=16, use_complex_transposed_convolution=False,
    )  # fmt: skip
    model = transformers_class("clipseg.modeling_clipseg", "CLIPSegForImageSegmentation")(config)
    images = transformers_class("vit.image_processing_pil_vit", "ViTImageProcessorPil")(
        size={"height": 32, "width": 32}
    )
    return _saved(folder, model, tokenizer, images)


def _labels() -> dict[str, Any]:
    return {"id2label": dict(enumerate(LABELS)), "label2id": {label: number for number, label in enumerate(LABELS)}}
