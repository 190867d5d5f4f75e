"""The commands of the guides train: with tiny weights and few small images where a user has real ones.

Everything else is as the documentation shows it: commands, options, TOML and prompt files. Options that the walk along
the users' guide runs (test_flux_guide_walk.py) are not run a second time.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from _pytest.mark.structures import ParameterSet
from safetensors.torch import load_file, save_file

from library.console import LOGGER
from library.prompt_options import read_prompt_file
from tests.docs.pages import TRAINERS, Block, blocks, commands, launched
from tests.documented import WALKS
from tests.families.families import TINY
from tests.running import ROOT, forget_accelerator, launched_script

GUIDES = (
    *("train_network", "sdxl_train_network", "train_network_advanced", "validation", "config_README-en"),
    *("caching", "lycoris", "flux_train_network", "flux_controlnet", "flux_minimal_inference", "README"),
    *("hunyuan_image_train_network", "lora_tools", "lumina_train_network", "lumina_minimal_inference"),
    "hunyuan_image_minimal_inference",
)
WALKED = [shlex.split(entry.text) for walk in WALKS.values() for entry in walk if entry.kind == "options"]
Fragment = tuple[Block, list[str]]
"""Options of a page."""
SHOWN = [(block, words) for block in blocks("bash") if block.page.stem in GUIDES for words in commands(block)]
LAUNCHES = [
    pytest.param(block, words, id=str(block), marks=[pytest.mark.slow] if "--dry_run" in words else [])
    for block, words in SHOWN
    if launched(words) is not None
]
IN_ONE_PROCESS = [shown for shown in LAUNCHES if "--multi_gpu" not in shown.values[1]]
IN_SEVERAL = [shown for shown in LAUNCHES if shown not in IN_ONE_PROCESS]
FRAGMENTS = [(block, words) for block, words in SHOWN if words[0].startswith("--") and words not in WALKED]
IMAGE = {
    "flux_minimal_inference.py": ["--width=64", "--height=64", "--steps=2"],
    "lumina_minimal_inference.py": ["--image_width=64", "--image_height=64", "--steps=2"],
    "hunyuan_image_minimal_inference.py": ["--image_size", "64", "64", "--infer_steps=2"],
}
"""The scripts that draw, and how each is told a small size and few steps."""
DRAWINGS = [(block, words) for block, words in SHOWN if words[0] == "python" and words[1] in IMAGE]

SMALL = {
    "max_train_epochs": "1",
    "max_train_steps": "1",
    "lr_warmup_steps": "1",
    "save_every_n_steps": "1",
    "validate_every_n_steps": "1",
    "validation_split": "0.25",
    "blocks_to_swap": "2",
    "resolution": "64",
}
"""What the tests give in place of a documented value, so that a run takes seconds."""
SMALL_TOML = {
    "resolution": "64\nmin_bucket_reso = 64",
    "num_repeats": "1",
    "max_train_epochs": "1",
    "lr_warmup_steps": "1",
    "blocks_to_swap": "2",
}
SMALL_PROMPT = {r"--([wh]) \d+": r"--\1 64", r"--d (\d+)": r"--d \1 --s 2"}
"""The first of repeated options counts."""


@pytest.fixture
def models(request):
    """The options that name the models of a script, by what a command says of them."""

    def named(script: str, words: list[str]) -> list[str]:
        if not (script in (*TRAINERS, *IMAGE) or script.startswith("tools/cache_")):
            return []
        if "hunyuan_image" in script or "--hunyuan_image" in words:
            tiny, denoiser = request.getfixturevalue("tiny_hunyuan_image"), "pretrained_model_name_or_path"
            files = {"dit" if script in IMAGE else denoiser: tiny.transformer, "text_encoder": tiny.text_encoder}
            files |= {"byt5": tiny.byt5, "vae": tiny.autoencoder}
            return [f"--{name}={file}" for name, file in files.items()]
        if "lumina" in script or "--lumina" in words:
            tiny, ending = request.getfixturevalue("tiny_lumina"), "_path" if script in IMAGE else ""
            return [
                f"--pretrained_model_name_or_path={tiny.transformer}",
                f"--gemma2{ending}={tiny.gemma2}",
                f"--ae{ending}={tiny.autoencoder}",
            ]
        if "flux" not in script and "--flux" not in words:
            is_xl = "sdxl" in script or "--sdxl" in words
            names_blocks = any("lr_weight=" in word for word in words)
            model = "sdxl" if is_xl else "sd2" if "--v2" in words else "sd1"
            model = request.getfixturevalue(f"{'tiny' if names_blocks else 'few_blocks'}_{model}")
            return [f"--pretrained_model_name_or_path={model}"]
        is_chroma = "chroma" in words or "--model_type=chroma" in words
        tiny = request.getfixturevalue("tiny_chroma" if is_chroma else "tiny_flux")
        transformer = "ckpt_path" if script in IMAGE else "pretrained_model_name_or_path"
        files = {transformer: tiny.transformer, "clip_l": tiny.clip_l, "t5xxl": tiny.t5xxl, "ae": tiny.autoencoder}
        if "--controlnet_model_name_or_path" in words:
            files["controlnet_model_name_or_path"] = request.getfixturevalue("tiny_controlnet")
        return [f"--{name}={file}" for name, file in files.items() if file]

    return named


SHOWN_FILES = blocks("toml", "text")
IMAGES_AT = re.compile(r'(?:image_dir|conditioning_data_dir) = "(.+?)"')


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Four images with captions, of two shapes."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("images")
    for number, size in enumerate([(64, 64), (96, 64), (65, 65), (97, 65)]):
        image = Image.effect_mandelbrot(size, (-2, -1, 1, 1), 20 + number)
        image.convert("RGB").save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a photo of sks girl, number {number}", encoding="utf-8")
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder that holds the files that the guides show; ``run`` adds the images that a command needs."""
    for block in SHOWN_FILES:
        if block.name and block.page.stem in GUIDES:
            (tmp_path / block.name).write_text(smaller(block), encoding="utf-8")
    for path in (ROOT / "configs").rglob("*.toml"):
        preset = tmp_path / path.relative_to(ROOT)
        preset.parent.mkdir(parents=True, exist_ok=True)
        preset.write_text(smaller(Block(path, "toml", 1, path.read_text(encoding="utf-8"))), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    yield tmp_path


def folders_of_images(words: list[str]) -> set[str]:
    """The folders whose images a command needs, by its own words and by the TOML files that it names."""
    text = " ".join(words)
    found = {"dreambooth": "dreambooth/10_sks girl", "regularisation": "regularisation/1_girl"}
    folders = {folder for name, folder in found.items() if name in words}
    for name in re.findall(r"[\w./-]+\.toml", text):
        file = Path(name).read_text(encoding="utf-8")
        further = re.search(r'^dataset_config = "(.+)"', file, flags=re.MULTILINE)
        folders |= {*IMAGES_AT.findall(file)} | (folders_of_images([further[1]]) if further else set())
    return folders


def write_own_files(place: Path, page: Path) -> None:
    """Several pages show a file of the same name; the commands of a page mean its own."""
    for block in SHOWN_FILES:
        if block.name and block.page == page:
            (place / block.name).write_text(smaller(block), encoding="utf-8")


def smaller(block: Block) -> str:
    """A documented file with small numbers."""
    text = block.text
    if block.language == "toml":
        for name, value in SMALL_TOML.items():
            text = re.sub(rf"^( *){name} = .+$", rf"\1{name} = {value}", text, flags=re.MULTILINE)
    else:
        for pattern, value in SMALL_PROMPT.items():
            text = re.sub(pattern, value, text)
    return text


def small_options(words: list[str]) -> list[str]:
    """Options for the end of a command line: those that it gives, with small numbers."""
    given = [word[2:].partition("=")[0] for word in words if word.startswith("--")]
    small = SMALL | ({"max_train_steps": "2"} if "lr_warmup_steps" in given else {})  # the first step's rate is zero
    wanted = [f"--{name}={small[name]}" for name in given if name in small]
    return [*wanted, "--min_bucket_reso=64"] if "resolution" in given else wanted


@pytest.fixture
def run(models, images, capfd):
    """Run a script of the project in this process, as ``python script ...`` does; returns what it said."""
    handlers, level, propagates = LOGGER.handlers[:], LOGGER.level, LOGGER.propagate

    def in_this_process(script: str, words: list[str]) -> str:
        forget_accelerator()
        for folder in folders_of_images(words):
            if not Path(folder).exists():
                shutil.copytree(images, folder, copy_function=os.link)
        given = [script, *words, *models(script, words), *small_options(words)]
        if script not in IMAGE and any(word.startswith("--output_dir") for word in words):
            given.append("--output_dir=output")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", given)
            importlib.import_module(script.removesuffix(".py").replace("/", ".")).main()
        return capfd.readouterr().err

    yield in_this_process
    forget_accelerator()
    LOGGER.handlers[:], LOGGER.propagate = handlers, propagates
    LOGGER.setLevel(level)


def require_trained(folder: Path) -> None:
    """The last file's numbers are finite, and what begins at zero has moved."""
    (path,) = (path for path in folder.glob("*.safetensors") if not re.search(r"-(step)?\d+$", path.stem))
    tensors = load_file(path)
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    begin_at_zero = [tensor for key, tensor in tensors.items() if re.search("lora_up|oft_blocks|lokr_w2", key)]
    assert any(tensor.any() for tensor in begin_at_zero)


def require_nothing_to_complain(said: str) -> None:
    assert [line for line in said.splitlines() if " WARNING " in line or "no effect" in line] == []


@pytest.mark.parametrize(("block", "words"), IN_ONE_PROCESS)
def test_command(block, words, place, run):
    write_own_files(place, block.page)
    script, *arguments = words[launched(words) :]
    if "--resume" in arguments:
        make_state(block, place, run, Path(arguments[arguments.index("--resume") + 1]))
    said = run(script, arguments)
    require_nothing_to_complain(said)
    if script.startswith("tools/"):
        assert re.search(r"finished; .* 0 kept, [1-9]\d* made", said) and list(place.rglob("*.npz"))
    elif "--dry_run" in arguments:
        assert "All checks passed" in said and "unknown" not in said and not (place / "output").exists()
    else:
        require_trained(place / "output")


def make_state(block: Block, place: Path, run, wanted: Path) -> None:
    """The state that a command resumes from: that of the page's command before it, after a step."""
    before = [words for other, words in SHOWN if other.page == block.page and "--save_state" in words]
    script, *arguments = before[-1][launched(before[-1]) :]
    run(script, [*arguments, "--no_report"])
    name = re.sub(r"-step\d+", "-step00000001", wanted.name)
    (place / wanted.parent / name).rename(place / wanted)
    for path in (place / "output").glob("*.safetensors"):
        path.unlink()


@pytest.mark.parametrize(("block", "words"), IN_SEVERAL)
def test_command_for_several_processes(block, words, place, run):
    """The launcher knows its options; what several processes do is held by tests/conformance/."""
    script, arguments = launched_script(words)
    run(script, arguments)
    require_trained(place / "output")


# ---- options on their own ------------------------------------------------------------------------------------------


def base_command(words: list[str], script: str = "train_network.py") -> list[str]:
    """A short command that a page's options are added to; theirs win."""
    data = [] if "--train_data_dir" in words else ["--dataset_config", "dataset.toml"]
    family = next((name for name in ("flux", "lumina", "hunyuan_image") if name in script), "")
    network = ["--network_module", "networks.lora" + (f"_{family}" if family else ""), "--network_dim", "4"]
    network += ["--network_train_unet_only"] if family == "hunyuan_image" else []
    return [*data, *network, "--learning_rate", "1e-3", "--max_train_steps", "1", "--output_dir", "output"]


def by_option(words: list[str]) -> dict[str, list[str]]:
    """The values of each option."""
    found: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            found[word] = []
        else:
            found[list(found)[-1]].append(word)
    return found


def agree(one: list[str], two: list[str]) -> bool:
    """Whether no subject of options (``--optimizer_...``) is given in both, unless it is in the same words."""
    a, b = ({(name.split("_")[0], name): given for name, given in by_option(words).items()} for words in (one, two))
    shared = {subject for subject, _ in a} & {subject for subject, _ in b}
    return all(a.get(key) == b.get(key) for key in {**a, **b} if key[0] in shared)


def together(fragments: list[Fragment]) -> list[list[Fragment]]:
    """Fragments for one script, in as few runs as their subjects let them be; another model is a run of its own."""
    runs: list[list[Fragment]] = []
    for block, words in fragments:
        alike = (run for run in runs if run[0][0].script == block.script and "--model_type" not in words)
        for run in alike:
            if all(agree(words, others) for _, others in run):
                run.append((block, words))
                break
        else:
            runs.append([(block, words)])
    return runs


def names_of(fragments: list[Fragment]) -> str:
    return ", ".join(str(block) for block, _ in fragments)


EACH = [[fragment] for fragment in FRAGMENTS]
AT_ONCE = together(FRAGMENTS)
ALONE = [pytest.param(one, id=names_of(one), marks=pytest.mark.thorough) for one in EACH if one not in AT_ONCE]


@pytest.mark.parametrize("fragments", [*(pytest.param(several, id=names_of(several)) for several in AT_ONCE), *ALONE])
def test_options(fragments, place, run):
    """Several blocks in one run where they do not contradict each other, each alone with ``--thorough``."""
    words = [word for _, given in fragments for word in given]
    script = fragments[0][0].script
    for block, _ in fragments:
        write_own_files(place, block.page)
    said = run(script, [*base_command(words, script), *words])
    assert "no effect" not in said
    require_trained(place / "output")
    if "--sample_prompts" in words:
        prompts = read_prompt_file(Path(words[words.index("--sample_prompts") + 1]))
        times = 1 + ("--sample_at_first" in words)
        assert len(list((place / "output" / "sample").glob("*.png"))) == times * len(prompts)
    if "--validation_split" in words:
        assert "validation loss" in said


@pytest.mark.slow
def test_programs_that_take_a_trained_file(place, run):
    """networks.dylora's file is cut, and shown."""
    fragments = [words for block, words in SHOWN if "networks.dylora" in words]
    page = ("python", "train_network_advanced")
    programs = [words for block, words in SHOWN if (words[0], block.page.stem) == page]
    assert len(fragments) == 1 and len(programs) == 2
    run("train_network.py", [*base_command([]), *fragments[0], "--output_name", "my_lora"])
    for words in programs:
        run(words[1], words[2:])
    cut = {path.name: load_file(path) for path in (place / "output").glob("cut-*.safetensors")}
    ranks = {name: {len(t) for key, t in file.items() if "lora_down" in key} for name, file in cut.items()}
    assert ranks == {f"cut-{rank:04d}.safetensors": {rank} for rank in (4, 8, 12)}


# ---- images ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora_for(request, image_folder, tmp_path_factory) -> Callable[[str], Path]:
    """A LoRA file of one step for a model."""
    from library.options import parse_options
    from tests.running import trainer_class

    @cache
    def trained(model: str) -> Path:
        forget_accelerator()
        folder, trainer = tmp_path_factory.mktemp("small_lora"), trainer_class(model)
        dataset = folder / "dataset.toml"
        images = f'image_dir = "{image_folder.as_posix()}"\ncaption_extension = ".txt"\n'
        dataset.write_text(f"{SMALL_DATASET}[[datasets.subsets]]\n{images}", encoding="utf-8")
        given = TINY[model].command(request.getfixturevalue(f"tiny_{model}"))
        given += ["--dataset_config", dataset, "--output_dir", folder, "--max_train_steps", 1]
        trainer.of(parse_options(trainer.options_class, "", [str(word) for word in given])).train()
        forget_accelerator()
        return folder / "last.safetensors"

    return trained


@pytest.fixture
def small_lora(lora_for) -> Path:
    """A LoRA file of one step for FLUX.1."""
    return lora_for("flux")


SMALL_DATASET = "[[datasets]]\nresolution = 64\nenable_bucket = true\nmin_bucket_reso = 64\n"


def drawings() -> list[ParameterSet]:
    """Each command; one whose options all stand in another one for the same script is run with ``--thorough``."""
    options = [{words[1], *by_option(words[2:])} for _, words in DRAWINGS]
    found: list[ParameterSet] = []
    for number, (block, words) in enumerate(DRAWINGS):
        own = options[number]
        covered = own in options[:number] or any(own < other for other in options)
        found.append(pytest.param(block, words, id=str(block), marks=[pytest.mark.thorough] if covered else []))
    return found


@pytest.mark.parametrize(("block", "words"), drawings())
def test_images(block, words, place, run, lora_for):
    write_own_files(place, block.page)
    for name in re.findall(r"[\w./-]+\.safetensors", " ".join(words)):  # models, too, but those are named again
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("_latent.safetensors"):
            save_file({"latent": torch.ones(1, 64, 2, 2)}, place / name)
        else:
            shutil.copy(lora_for(words[1].partition("_minimal")[0]), place / name)
    said = run(words[1], [*words[2:], *IMAGE[words[1]], "--device=cpu"])
    require_nothing_to_complain(said)
    given = dict(pairwise(words))
    output = Path(given.get("--output_dir") or given.get("--save_path") or "")
    prompts = given.get("--from_file")
    drawn = 0 if "--save_merged_model" in given else len(read_prompt_file(Path(prompts))) if prompts else 1
    assert len(list((place / output).glob("*.png"))) == drawn
    if not drawn:
        assert "double_blocks.0.img_attn_qkv.weight" in load_file(place / given["--save_merged_model"])


# ---- tools for FLUX.1 ----------------------------------------------------------------------------------------------

MODELS = {"flux_model": "transformer", "clip_l": "clip_l", "t5xxl": "t5xxl"}
MODELS |= dict.fromkeys(("model_org", "model_tuned"), "transformer")
WRITTEN = {"save_to", "dst_path", "clip_l_save_to", "t5xxl_save_to"}
TOOLS = [
    pytest.param(block, words, id=str(block))
    for block, words in SHOWN
    if words[0] == "python" and words[1] not in IMAGE and "flux" in words[1]
]


def files_by_option(words: list[str]) -> list[tuple[str, Path]]:
    """The files that a command names, each with its option."""
    option, found = "", []
    for word in words:
        option = word[2:] if word.startswith("--") else option
        found += [(option, Path(word))] if word.endswith(".safetensors") else []
    return found


@pytest.mark.parametrize(("block", "words"), TOOLS)
def test_tools_for_flux(block, words, place, run, small_lora, tiny_flux):
    """The files that a command reads are a tiny model's or a LoRA for it, under the names that it tells."""
    from tools.make_tiny_models import make_tiny_flux

    if "--diffusers_path" in words:
        make_tiny_flux(words[words.index("--diffusers_path") + 1], layout="diffusers")
    tuned = make_tiny_flux(place / "tuned", seed=1) if "--model_tuned" in words else None
    for option, path in files_by_option(words):
        path.parent.mkdir(parents=True, exist_ok=True)
        if option in WRITTEN:
            continue
        if "--src" in words:
            dialect = words[words.index("--src") + 1]
            run(words[1], ["--src_path", str(small_lora), "--dst_path", str(path), "--dst", dialect])
        else:
            model = tuned if option == "model_tuned" else tiny_flux
            shutil.copy(getattr(model, MODELS[option]) if option in MODELS else small_lora, path)
    said = run(words[1], [*words[2:], *(["--device=cpu"] if "--device" in words else [])])
    require_nothing_to_complain(said)
    written = [path for option, path in files_by_option(words) if option in WRITTEN]
    assert written and all(path.is_file() for path in written)
