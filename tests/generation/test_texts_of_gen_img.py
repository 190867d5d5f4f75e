"""gen_img.py's options of models and texts, through its command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

import gen_img
from library.errors import UserError
from library.generation.xti import LAYERS
from library.models.stable_diffusion import pipeline
from library.models.stable_diffusion.checkpoint import open_stable_diffusion
from library.options import parse_options
from library.safetensors_io import save_file


@pytest.fixture(scope="module")
def draw(share_parts) -> Callable[..., list[bytes]]:
    """The pixels of the images that a command line draws with a model into a folder, in order."""

    def run(model: Path, folder: Path, *options: object) -> list[bytes]:
        arguments = ["--ckpt", model, "--outdir", folder, "--W", 64, "--H", 64, "--steps", 2, "--seed", 5, *options]
        if not {"--prompt", "--from_file"} & set(options):
            arguments += ["--prompt", "a (red:1.4) cat --n ugly"]
        parsed = parse_options(gen_img.GenImgOptions, "", [str(argument) for argument in arguments])
        share_parts(gen_img.GenImg(parsed)).run()
        images = []
        for path in sorted(folder.iterdir()):
            with Image.open(path) as image:
                images.append(image.tobytes())
        return images

    return run


@pytest.fixture(scope="module")
def plain(few_blocks_sd1, draw, tmp_path_factory) -> bytes:
    (image,) = draw(few_blocks_sd1, tmp_path_factory.mktemp("plain"))
    return image


def embedding(folder: Path, width: int, name: str = "goodembed") -> Path:
    vectors = torch.randn(2, width, generator=torch.Generator().manual_seed(0)) * 3
    save_file({"emb_params": vectors}, folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


@pytest.mark.parametrize(
    "options",
    [
        ("--v1",),
        ("--sdpa",),
        ("--vae_batch_size", 1),
        ("--max_embeddings_multiples", 3),
        ("--clip_skip", 1),
        ("--emb_normalize_mode", "original"),
    ],
)
def test_options_that_name_what_is_the_default_change_nothing(draw, few_blocks_sd1, plain, tmp_path, options):
    assert draw(few_blocks_sd1, tmp_path, *options) == [plain]


@pytest.mark.parametrize("options", [("--vae_slices", 4), ("--opt_channels_last",), ("--no_half_vae",)])
def test_options_that_only_change_how_it_is_computed_change_the_image_by_rounding_at_most(
    draw, few_blocks_sd1, plain, tmp_path, options, monkeypatch
):
    sliced: list[object] = []
    in_slices = pipeline.in_slices
    monkeypatch.setattr(pipeline, "in_slices", lambda *a: (sliced.append(a[1]), in_slices(*a))[1])
    (image,) = draw(few_blocks_sd1, tmp_path, *options)
    assert max(abs(a - b) for a, b in zip(image, plain)) <= 1
    assert sliced == [4 if options[0] == "--vae_slices" else None]


@pytest.mark.parametrize(
    "options",
    [
        ("--emb_normalize_mode", "none"),
        ("--clip_skip", 2),
        ("--v_parameterization",),
        ("--zero_terminal_snr",),
        ("--negative_scale", 3.0),
        ("--bf16",),
        ("--prompt", "a (red:0.2) cat --n ugly"),
        ("--prompt", "a (red:1.4) cat --n nice"),
        ("--prompt", "a (red:1.4) BREAK cat --n ugly", "--max_embeddings_multiples", 2),
        ("--prompt", "a (red:1.4) cat --n ugly --nl 3"),
    ],
)
def test_options_that_change_the_image(draw, few_blocks_sd1, plain, tmp_path, options):
    assert draw(few_blocks_sd1, tmp_path, *options) != [plain]


SIZES = [
    *(("--original_height", "--ow 64 --oh 900"), ("--original_width", "--oh 64 --ow 900")),
    *(("--original_height_negative", "--nw 64 --nh 900"), ("--original_width_negative", "--nh 64 --nw 900")),
    *(("--crop_top", "--ct 900"), ("--crop_left", "--cl 900")),
]


def test_sizes_and_layers_of_xl_change_the_image_from_the_command_line_and_in_a_prompt(draw, few_blocks_sdxl, tmp_path):
    """Each of the sizes alone, and --clip_skip; what is not given is as the image."""
    once = ("--steps", 1)
    plain = draw(few_blocks_sdxl, tmp_path / "plain", *once)
    seen = [plain]
    lines = [f"a (red:1.4) cat --n ugly --d 5 {sizes}" for _, sizes in SIZES]
    (tmp_path / "prompts.txt").write_text("\n".join(lines), encoding="utf-8")
    from_file = ("--from_file", tmp_path / "prompts.txt", "--sequential_file_name")
    in_prompts = draw(few_blocks_sdxl, tmp_path / "prompts", *from_file, *once)
    for (option, _), in_prompt in zip(SIZES, in_prompts):
        drawn = draw(few_blocks_sdxl, tmp_path / option, option, 900, *once)
        assert drawn == [in_prompt], option
        assert drawn not in seen, option
        seen.append(drawn)
    assert draw(few_blocks_sdxl, tmp_path / "layer", "--clip_skip", 1, *once) not in seen
    assert draw(few_blocks_sdxl, tmp_path / "same", "--clip_skip", 2, "--sdxl", *once) == plain


def test_embeddings_act_where_their_name_stands(draw, few_blocks_sd1, plain, tmp_path):
    """--textual_inversion_embeddings, in the prompt and in the negative prompt."""
    (encoder,) = open_stable_diffusion(few_blocks_sd1).text_encoders
    path = embedding(tmp_path, encoder.hidden_size)
    given = ("--textual_inversion_embeddings", path)
    assert draw(few_blocks_sd1, tmp_path / "unused", *given) == [plain]
    for number, text in enumerate(("a (red:1.4) cat goodembed --n ugly", "a (red:1.4) cat --n ugly goodembed")):
        images = [
            draw(few_blocks_sd1, tmp_path / f"{number}{len(more)}", "--prompt", text, *more) for more in ((), given)
        ]
        assert images[0] != images[1]


def test_an_image_of_a_long_and_a_short_prompt_together_is_the_one_drawn_alone(draw, few_blocks_sd1, tmp_path):
    """--max_embeddings_multiples: a text's chunks depend on its own image's texts only."""
    long, short = "a cat " * 30 + "--d 1", "a dog --d 2"
    (tmp_path / "prompts.txt").write_text(f"{short}\n{long}\n{short}", encoding="utf-8")
    more = ("--max_embeddings_multiples", 3, "--sequential_file_name")
    together = draw(few_blocks_sd1, tmp_path / "a", "--from_file", tmp_path / "prompts.txt", "--batch_size", 3, *more)
    alone = [
        draw(few_blocks_sd1, tmp_path / name, "--prompt", name_text, *more)[0]
        for name, name_text in (("b", short), ("c", long))
    ]
    assert together == [alone[0], alone[1], alone[0]]


def test_what_needs_guidance_is_named_where_there_is_none(draw, few_blocks_sd1, tmp_path, caplog):
    """--negative_scale and negative prompts with a --scale of 1."""
    plain = draw(few_blocks_sd1, tmp_path / "plain", "--scale", 1, "--prompt", "a cat")
    assert "no effect" not in caplog.text
    more = ("--scale", 1, "--prompt", "a cat --n ugly", "--negative_scale", 3)
    assert draw(few_blocks_sd1, tmp_path / "more", *more) == plain
    assert "a negative prompt has no effect without guidance" in caplog.text
    assert "--negative_scale has no effect without guidance" in caplog.text


def test_xti_acts_where_its_name_stands_and_not_beside_parts_of_a_prompt(draw, tiny_sd1, tmp_path):
    """--XTI_embeddings: the same vectors in all layers are a --textual_inversion_embeddings."""
    (encoder,) = open_stable_diffusion(tiny_sd1).text_encoders
    vectors = torch.randn(2, encoder.hidden_size, generator=torch.Generator().manual_seed(0)) * 3
    (tmp_path / "xti").mkdir()
    xti, plain = tmp_path / "xti" / "goodembed.safetensors", tmp_path / "goodembed.pt"
    save_file({layer: vectors for layer in LAYERS}, xti)
    torch.save({"emb_params": vectors}, plain)
    prompt = ("--prompt", "a (goodembed:1.2) cat --n ugly goodembed")
    drawn = draw(tiny_sd1, tmp_path / "a", "--XTI_embeddings", xti, *prompt)
    assert drawn == draw(tiny_sd1, tmp_path / "b", "--textual_inversion_embeddings", plain, *prompt)
    assert drawn != draw(tiny_sd1, tmp_path / "c", *prompt)
    with pytest.raises(UserError, match="--XTI_embeddings"):
        draw(tiny_sd1, tmp_path / "d", "--XTI_embeddings", xti, "--prompt", "goodembed AND a cat")
    with pytest.raises(UserError, match='there is another embedding of the name "goodembed"'):
        both = ("--XTI_embeddings", xti, "--textual_inversion_embeddings", plain)
        draw(tiny_sd1, tmp_path / "e", *both, *prompt)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--XTI_embeddings", "none.pt"), "--XTI_embeddings: there are such embeddings for the U-Net of"),
        (("--fp16", "--bf16"), "--fp16 and --bf16 cannot be used together"),
        (("--v2", "--sdxl"), "--v2 and --sdxl cannot be used together"),
        (("--emb_normalize_mode", "mean"), "--emb_normalize_mode must be one of original, none, abs"),
        (("--clip_skip", 9), "--clip_skip must be between 1 and 2"),
        (("--max_embeddings_multiples", 0), "--max_embeddings_multiples must be at least 1"),
        (("--textual_inversion_embeddings", "none.pt"), "--textual_inversion_embeddings: none.pt does not exist"),
        (("--vae", "none.safetensors"), "--vae: none.safetensors does not exist"),
    ],
)
def test_bad_input_is_one_sentence_before_a_model_is_loaded(draw, few_blocks_sd1, tmp_path, options, message):
    with pytest.raises(UserError, match=f"^{message}"):
        draw(few_blocks_sd1, tmp_path, *options)
