"""The builder of tiny models writes files that hold what it says, the same ones every time."""

from __future__ import annotations

import sys

import pytest

from library.models.flux.checkpoint import open_transformer
from library.models.hunyuan_image.checkpoint import open_transformer as open_hunyuan_image
from library.models.lumina.checkpoint import open_transformer as open_lumina
from library.models.stable_diffusion.checkpoint import open_stable_diffusion
from tests.families.stable_diffusion import make_few_blocks
from tools import make_tiny_models
from tools.make_tiny_stable_diffusion import make_tiny_stable_diffusion


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_the_same_seed_gives_the_same_files(tmp_path, layout):
    for name, seed in (("first", 1), ("second", 1), ("third", 2)):
        make_tiny_models.make_tiny_flux(tmp_path / name, layout=layout, seed=seed)
    written = [path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*") if path.is_file()]
    assert len(written) >= 8
    contents = [[(tmp_path / name / path).read_bytes() for path in written] for name in ("first", "second", "third")]
    assert contents[0] == contents[1] != contents[2]


def test_the_command_line_prints_the_paths(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["make_tiny_models.py", str(tmp_path), "--variant", "schnell", "--layout", "comfyui"]
    )
    make_tiny_models.main()
    printed = capsys.readouterr().out.split()
    assert len(printed) == 4
    opened = open_transformer(printed[0])
    assert opened.variant == "schnell" and all(
        key.startswith("model.diffusion_model.") for key in opened.source.checkpoint
    )


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_the_command_line_writes_chroma(tmp_path, monkeypatch, capsys, layout):
    arguments = [str(tmp_path / "printed"), "--family", "chroma", "--layout", layout, "--seed", "3"]
    monkeypatch.setattr(sys, "argv", ["make_tiny_models.py", *arguments])
    make_tiny_models.main()
    printed = capsys.readouterr().out.split()
    assert len(printed) == (1 if layout == "diffusers" else 3)
    assert open_transformer(printed[0], model_type="chroma").variant == "chroma"
    make_tiny_models.make_tiny_chroma(tmp_path / "again", layout, seed=3)
    assert contents(tmp_path / "printed") == contents(tmp_path / "again")


@pytest.mark.parametrize(("layout", "count"), [("original", 3), ("comfyui", 1), ("diffusers", 1)])
def test_the_command_line_writes_lumina(tmp_path, monkeypatch, capsys, layout, count):
    arguments = [str(tmp_path / "printed"), "--family", "lumina", "--layout", layout, "--seed", "3"]
    monkeypatch.setattr(sys, "argv", ["make_tiny_models.py", *arguments])
    make_tiny_models.main()
    printed = capsys.readouterr().out.split()
    assert len(printed) == count and open_lumina(printed[0]).config == make_tiny_models.LUMINA
    make_tiny_models.make_tiny_lumina(tmp_path / "again", layout, seed=3)
    assert contents(tmp_path / "printed") == contents(tmp_path / "again")


@pytest.mark.parametrize(("layout", "count"), [("original", 4), ("comfyui", 4), ("diffusers", 1)])
def test_the_command_line_writes_hunyuan_image(tmp_path, monkeypatch, capsys, layout, count):
    arguments = [str(tmp_path / "printed"), "--family", "hunyuan_image", "--layout", layout, "--seed", "3"]
    monkeypatch.setattr(sys, "argv", ["make_tiny_models.py", *arguments])
    make_tiny_models.main()
    printed = capsys.readouterr().out.split()
    assert len(printed) == count and open_hunyuan_image(printed[0]).config == make_tiny_models.HUNYUAN_IMAGE
    make_tiny_models.make_tiny_hunyuan_image(tmp_path / "again", layout, seed=3)
    assert contents(tmp_path / "printed") == contents(tmp_path / "again")


def test_options_of_other_families_are_refused(tmp_path, monkeypatch, capsys):
    for arguments, words in (
        (["--family", "lumina", "--variant", "dev"], "--variant is for FLUX.1"),
        (["--family", "chroma", "--variant", "dev"], "--variant is for FLUX.1"),
        (["--family", "lumina", "--v_prediction"], "--v_prediction is for Stable Diffusion"),
        (["--family", "sd1", "--layout", "comfyui"], "--layout comfyui is not for Stable Diffusion"),
    ):
        monkeypatch.setattr(sys, "argv", ["make_tiny_models.py", str(tmp_path), *arguments])
        with pytest.raises(SystemExit):
            make_tiny_models.main()
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(("family", "layout"), [("sd1", "original"), ("sd2", "diffusers"), ("sdxl", "original")])
def test_the_command_line_writes_stable_diffusion(tmp_path, monkeypatch, capsys, family, layout):
    arguments = ["--family", family, "--layout", layout, "--seed", "3", "--v_prediction"]
    monkeypatch.setattr(sys, "argv", ["make_tiny_models.py", str(tmp_path / "printed"), *arguments])
    make_tiny_models.main()
    path = capsys.readouterr().out.strip()
    opened = open_stable_diffusion(path)
    assert opened.variant == family and opened.predicts_v
    again = make_tiny_stable_diffusion(tmp_path / "again", family, layout, seed=3, v_prediction=True)
    assert contents(tmp_path / "printed") == contents(again if again.is_dir() else again.parent)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_diffusers_folder_is_a_whole_pipeline_for_diffusers(tmp_path, family):
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    path = make_few_blocks(tmp_path, family, "diffusers")
    pipeline_class = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    pipeline = pipeline_class.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a cat", negative_prompt="", num_inference_steps=1, width=64, height=64).images[0]
    colours = image.getextrema()
    assert image.size == (64, 64) and all(high - low > 20 for low, high in colours)
    padding = {"sd1": [513], "sd2": [0], "sdxl": [513, 0]}[family]
    tokenizers = [pipeline.tokenizer, getattr(pipeline, "tokenizer_2", None)]
    assert [tokenizer.pad_token_id for tokenizer in tokenizers if tokenizer is not None] == padding
