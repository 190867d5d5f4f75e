"""What the guides for gen_img.py say works: a walk along tests/reference_data/gen_img_guide_walk.toml."""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from gen_img import GenImg, GenImgOptions
from library.errors import UserError
from library.generation.image_files import save_image, text_in_image
from library.generation.image_prompts import LETTERS
from library.generation.xti import LAYERS
from library.models.stable_diffusion.checkpoint import open_stable_diffusion
from library.models.stable_diffusion.pipeline import StableDiffusionFiles, StableDiffusionPipeline
from library.options import declared_options, parse_options
from networks import lora
from tests.docs.pages import Block, blocks, commands
from tests.documented import WALKS, Entry, cases
from tests.e2e.test_every_option_is_exercised import source_of
from tests.families.stable_diffusion import few_blocks, make_few_blocks
from tests.generation.drawing import pixels, write_random_network
from tests.guide_walk import with_files
from tests.running import run_in_process
from tools.latent_upscaler import Upscaler
from tools.make_tiny_control import make_tiny_clip, make_tiny_control_net, make_tiny_lllite, make_tiny_vgg16

WALK = WALKS["gen"]
COMMANDS = [entry for entry in WALK if entry.kind == "command"]
RUNS = [entry for entry in WALK if entry.kind in ("options", "prompt")]
ELSEWHERE = [entry for entry in WALK if entry.kind == "elsewhere"]
SMALL = "--W 64 --H 96 --steps 2 --device cpu"
"""Options at the end of a command of the guides; ``beside`` comes after them."""
SHORT = "--W 64 --H 64 --steps 2 --scale 3 --device cpu"
STANDS_FOR = {
    "<model_name>": "model.safetensors",
    "<sdxl_model>": "sdxl.safetensors",
    "<image_output_destination>": "out",
    "<number_of_images_to_generate>": "3",
    "<prompt_file_name>": "prompts.txt",
    "<prompt>": "a red cat",
    ".ckpt": ".safetensors",  # a pickled file cannot say that it is tiny
}
TYPED = "a red cat, goodembed --w 65\na dog --d 1\na red cat --n dog --d 2\n"
SHARED = {"device", "streaming", "config", "console"}
"""Groups of options that every script has."""


@dataclass
class Outcome:
    """What a run left behind."""

    folder: Path
    said: str = ""
    printed: str = ""
    refused: str = ""

    @property
    def images(self) -> list[Path]:
        """The images, the one that was drawn last at the end."""
        return sorted(self.folder.rglob("*.png"), key=lambda path: path.stat().st_mtime_ns)


def size_of(path: Path) -> list[int]:
    with Image.open(path) as image:
        return list(image.size)


CHECKS: Mapping[str, Callable[[Outcome, Any], bool]] = {
    "drawn": lambda outcome, count: len(outcome.images) == count,
    "size": lambda outcome, size: size_of(outcome.images[-1]) == list(size),
    "sizes": lambda outcome, sizes: sorted(map(tuple, sizes)) == sorted({tuple(size_of(p)) for p in outcome.images}),
    "said": lambda outcome, texts: all(text in outcome.said for text in texts),
    "printed": lambda outcome, texts: all(text in outcome.printed for text in texts),
    "text": lambda outcome, texts: dict(texts).items() <= text_in_image(outcome.images[-1]).items(),
}
"""Check -> whether an outcome is as it says; ``image`` and ``refused`` are looked at beside these."""


@pytest.fixture(scope="module")
def models(few_blocks_sd1, few_blocks_sdxl, tiny_sd1) -> dict[str, Path]:
    return {"gen": few_blocks_sd1, "sdxl": few_blocks_sdxl, "tiny": tiny_sd1}


@pytest.fixture(scope="module")
def named(few_blocks_sd1, tiny_sd1, tmp_path_factory) -> dict[str, Path]:
    """The files that entries name in angle brackets."""
    folder = tmp_path_factory.mktemp("named")
    Image.effect_mandelbrot((96, 64), (-2, -1.5, 1, 1.5), 20).convert("RGB").save(folder / "picture.png")
    mask = Image.new("RGB", (64, 64), (255, 0, 0))
    mask.paste((0, 255, 0), (32, 0, 64, 64))
    mask.save(folder / "mask.png")
    upscaler = Upscaler()
    torch.nn.init.constant_(upscaler.conv_final.weight, 0.05)
    save_file(upscaler.state_dict(), folder / "upscaler.safetensors")
    pipeline = StableDiffusionPipeline(StableDiffusionFiles(few_blocks_sd1), torch.float32, "cpu")
    encoders, unet = pipeline.load_text_encoders(), pipeline.load("unet")
    return {
        "picture": folder / "picture.png",
        "mask": folder / "mask.png",
        "upscaler": folder / "upscaler.safetensors",
        "control": make_tiny_control_net(folder, "sd1", "difference", shape=few_blocks("sd1")),
        "lllite": make_tiny_lllite(folder, shape=few_blocks("sdxl")),
        "clip": make_tiny_clip(folder / "clip"),
        "vgg16": make_tiny_vgg16(folder),
        "xti": embedding_of_layers(folder / "xti.safetensors", tiny_sd1),
        "lora": write_random_network(folder / "lora.safetensors", lora, encoders, unet, 1, 4.0),
    }


def embedding_of_layers(path: Path, model: Path) -> Path:
    """An Extended Textual Inversion of two vectors for each layer."""
    (encoder,) = open_stable_diffusion(model).text_encoders
    generator = torch.Generator().manual_seed(0)
    save_file({layer: torch.randn(2, encoder.hidden_size, generator=generator) for layer in LAYERS}, path)
    return path


# ---- options and prompts ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def draw(models, named, tmp_path_factory):
    """Draw an image with more options; parts of the models are loaded once."""
    parts: dict[str, dict[str, Any]] = {name: {} for name in models}

    def run(entry: Entry, text: str) -> Outcome:
        options = f"{SHORT} {entry.beside}"
        words = with_files(options if entry.kind == "prompt" else f"{options} {text}", named)
        prompt = text if entry.kind == "prompt" else "a red cat --n dog --d 1"
        given = words if "--prompt" in words else ["--prompt", prompt, *words]
        outcome = Outcome(tmp_path_factory.mktemp("out"))
        command = ["--ckpt", str(models[entry.model]), "--outdir", str(outcome.folder), *given]
        keeps = not {"--network_module", "--XTI_embeddings"} & set(given)
        try:
            script = GenImg(parse_options(GenImgOptions, "", command))
            script.pipeline.modules.update(parts[entry.model] if keeps else {})
            script.run()
            parts[entry.model] |= script.pipeline.modules if keeps else {}
        except UserError as error:
            outcome.refused = str(error)
        return outcome

    return run


@pytest.fixture(scope="module")
def compared(draw):
    """The run that an entry's is compared with; entries with the same one share it."""
    done: dict[tuple[str, ...], Outcome] = {}

    def of(entry: Entry) -> Outcome:
        key = (entry.model, entry.kind, entry.beside, entry.against or "")
        if key not in done:
            done[key] = draw(entry, entry.against or "")
            assert not done[key].refused
        return done[key]

    return of


def require(entry: Entry, outcome: Outcome) -> None:
    """An outcome is as its entry says, but for its image."""
    refused = entry.shows.get("refused", "")
    assert refused in outcome.refused and bool(refused) == bool(outcome.refused), outcome.refused
    for name, value in entry.shows.items():
        assert name in ("image", "refused") or CHECKS[name](outcome, value), (name, value)


@pytest.mark.parametrize("entry", cases(RUNS))
def test_what_the_guides_say_works(entry, draw, compared, caplog):
    outcome = draw(entry, entry.text)
    outcome.said = caplog.text
    require(entry, outcome)
    if "image" in entry.shows:
        same = pixels(outcome.images[-1]) == pixels(compared(entry).images[-1])
        assert ("same" if same else "differs") == entry.shows["image"]


# ---- commands --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(models, named, tmp_path_factory) -> Path:
    """A folder with what the commands of the guides name."""
    place = tmp_path_factory.mktemp("walk") / "here"
    place.mkdir()
    state = load_file(models["gen"])
    for name in ("model", "trinart_characters_it4_v1_vae_merged", "v1-5-pruned-emaonly", "wd-v1-3-full-pruned-half"):
        shutil.copy(models["gen"], place / f"{name}.safetensors")
    shutil.copy(models["sdxl"], place / "sdxl.safetensors")
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(models["sdxl"].parent / name, place / name)
    make_few_blocks(place / "model_ckpt", "sd1", "diffusers")
    for number in (1, 2):
        shutil.copy(named["lora"], place / f"model{number}.safetensors")
    shutil.copy(named["control"], place / "diff_control_sd15_canny.safetensors")
    (width,) = {t.shape[-1] for key, t in state.items() if key.endswith("token_embedding.weight")}
    vectors = torch.randn(2, width, generator=torch.Generator().manual_seed(0))
    save_file({"emb_params": vectors}, place / "goodembed.safetensors")
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "a"}, place / "negprompt.pt")
    (place.parent / "src_image").mkdir()
    with Image.open(named["picture"]) as picture:
        for name in ("template.png", "guide.png", "YUKA160113420I9A4104_TP_V.jpg", "../src_image/1.png"):
            picture.save(place / name)
    (place / "prompts.txt").write_text(
        "# two\na red cat --n dog --d 1\n\na dog --w 72 --h 64 --d 2\n", encoding="utf-8"
    )
    return place


@pytest.mark.slow
@pytest.mark.parametrize("entry", cases(COMMANDS))
def test_the_commands_of_the_guides(entry, place, named, tmp_path, monkeypatch):
    """Word for word, but with smaller images and fewer steps; what a session asks for is typed."""
    monkeypatch.chdir(place)
    monkeypatch.setattr("sys.stdin", io.StringIO(TYPED))
    text = entry.text.replace("\\\n", " ")
    for name, value in STANDS_FOR.items():
        text = text.replace(name, value)
    python, script, *words = shlex.split(text)
    assert python == "python"
    end = [*shlex.split(SMALL), *with_files(entry.beside, named), "--outdir", str(tmp_path)]
    end += ["--no_preview"] if "--interactive" in words else []
    result = run_in_process(script, *words, *end)
    assert result.returncode == 0, result.stderr[-3000:]
    require(entry, Outcome(tmp_path, said=result.stderr, printed=result.stdout))
    assert ("xformers is not installed" in result.stderr) == ("--xformers" in words)


# ---- our own guide ---------------------------------------------------------------------------------------------------


OURS = [
    (block, words) for block in blocks("bash") if block.page.name == "gen_img_README.md" for words in commands(block)
]


@pytest.fixture(scope="module")
def our_place(place, named, tmp_path_factory) -> Path:
    """A folder with what the commands of our own guide name, too."""
    ours = tmp_path_factory.mktemp("our_walk") / "here"
    shutil.copytree(place, ours, copy_function=os.link)
    for name in ("style", "character", "left", "right"):
        shutil.copy(named["lora"], ours / f"{name}.safetensors")
    shutil.copy(named["control"], ours / "control_sd15_canny.safetensors")
    shutil.copy(named["upscaler"], ours / "upscaler-v1-e100-220.safetensors")
    os.link(ours / "sdxl.safetensors", ours / "sd_xl_base_1.0.safetensors")
    shutil.copy(named["mask"], ours / "mask.png")
    shutil.copy(named["picture"], ours / "photo.png")
    for folder in ("src_image", "images"):
        (ours / folder).mkdir()
        with Image.open(named["picture"]) as picture:
            save_image(picture.copy(), ours / folder, "1", {"prompt": "a red cat"})
    for block in blocks("text"):
        if block.page.name == "gen_img_README.md" and block.name:
            text = re.sub(r"--([wh]) \d+", r"--\1 64", block.text)
            (ours / block.name).unlink(missing_ok=True)  # linked
            (ours / block.name).write_text(text, encoding="utf-8")
    return ours


@pytest.mark.slow
@pytest.mark.parametrize(("block", "words"), OURS, ids=lambda value: str(value) if isinstance(value, Block) else "")
def test_the_commands_of_our_own_guide(block, words, our_place, named, tmp_path, monkeypatch):
    """With fewer and smaller images, fewer steps and tiny models; nothing is warned about."""
    monkeypatch.chdir(our_place)
    monkeypatch.setattr("sys.stdin", io.StringIO("a red cat\n"))
    _, script, *given = words
    instead = {"--clip_model": "<clip>", "--vgg16_weights": "<vgg16>", "--ds_depth_1": "1", "--steps": "2"}
    instead |= {"--images_per_prompt": "2"}
    end = [] if script != "gen_img.py" else [*shlex.split(SMALL), "--no_half_vae"]
    end += [word for name in instead if name in given for word in (name, *with_files(instead[name], named))]
    end += ["--W", "128", "--H", "128", "--highres_fix_steps", "2"] if "--highres_fix_scale" in given else []
    end += ["--steps", "16"] if "--gradual_latent_timesteps" in given else []  # time to grow
    end += ["--no_preview"] if "--interactive" in given else []
    result = run_in_process(script, *given, *end, "--outdir" if end else "--output_dir", str(tmp_path))
    assert result.returncode == 0, result.stderr[-3000:]
    assert list(tmp_path.glob("*.png"))
    assert [line for line in result.stderr.splitlines() if " WARNING " in line or "no effect" in line] == []


# ---- the table -------------------------------------------------------------------------------------------------------


def test_every_option_and_every_option_of_prompts_stands_in_one_entry():
    declared = [option for option in declared_options(GenImgOptions).values() if option.group not in SHARED]
    wanted = [name for option in declared for name in option.names] + [f"--{letter}" for letter in (*LETTERS, "d")]
    assert sorted(name for entry in WALK for name in entry.names.split()) == sorted(wanted)


@pytest.mark.parametrize("entry", ELSEWHERE, ids=lambda entry: entry.id)
def test_the_tests_named_exist_and_name_what_they_show(entry):
    source = source_of(entry.test)
    assert [name for name in entry.names.split() if not re.search(rf"(?<![\w-]){name}\b|\b{name}\b", source)] == []


def test_the_list_is_well_formed():
    assert len({entry.id for entry in WALK}) == len(WALK)
    for entry in WALK:
        if entry.kind == "elsewhere":
            assert entry.test and entry.names and not entry.shows, entry.id
            continue
        assert entry.shows and set(entry.shows) <= {*CHECKS, "image", "refused"} and not entry.test, entry.id
        assert "<pattern>" not in str(entry) and "<each>" not in str(entry), entry.id
        assert not ("image" in entry.shows and entry.against is None), entry.id
