"""What is killed at random moments and started again by the same command line ends in the same bytes."""

from __future__ import annotations

import random
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
import pytest
from PIL import Image

from networks.flux_merge_lora import main as merge_lora
from tests.families.families import TINY
from tests.faults.killing import Work, broken_files, kill_again_and_again, leftovers
from tests.faults.lora_files import contents
from tests.networks.lora_tool_files import write_lora
from tests.processes import ForkServer, Started
from tools.make_tiny_models import make_tiny_flux

SEED = 14


@pytest.fixture(scope="module")
def few_images(image_folder, tmp_path_factory) -> Path:
    """Six images of all shapes with captions: every kind of writing happens, and no more of it than needed."""
    folder = tmp_path_factory.mktemp("few_images")
    for number in range(6):
        for suffix in (".png", ".txt"):
            shutil.copy(image_folder / f"{number:02d}{suffix}", folder)
    return folder


def timed_run(work: Work) -> float:
    """Let a work be done undisturbed; the seconds that it took."""
    start = time.monotonic()
    process = work.start()
    assert process.wait() == 0, process.output[-3000:]
    assert broken_files(work.folder) == leftovers(work.folder) == []
    return time.monotonic() - start


# ---- training ------------------------------------------------------------------------------------------------------


@dataclass
class Training:
    """A training in folders of its own."""

    server: ForkServer
    script: str
    command: list[object]
    folder: Path
    images: Path

    def __post_init__(self) -> None:
        shutil.copytree(self.images, self.folder / "images")
        (self.folder / "dataset.toml").write_text(
            "[general]\nresolution = 64\nbatch_size = 2\nenable_bucket = true\nmin_bucket_reso = 64\n"
            "max_bucket_reso = 128\nvalidation_split = 0.2\nvalidation_seed = 3\n"
            f'[[datasets]]\n[[datasets.subsets]]\nimage_dir = "{(self.folder / "images").as_posix()}"\n'
            'caption_extension = ".txt"\nflip_aug = true\n',
            encoding="utf-8",
        )
        (self.folder / "prompts.txt").write_text("a red circle --w 64 --h 64 --d 1 --s 1\n", encoding="utf-8")

    @property
    def output(self) -> Path:
        return self.folder / "out"

    @property
    def places(self) -> list[Path]:
        """Where files are written."""
        return [self.output, self.output / "sample", self.folder / "images", self.folder / "log"]

    def start(self) -> Started:
        return self.server.start(
            self.script,
            *self.command,
            *("--dataset_config", self.folder / "dataset.toml", "--output_dir", self.output, "--output_name", "lora"),
            *("--logging_dir", self.folder / "log", "--sample_prompts", self.folder / "prompts.txt"),
            *("--max_train_epochs", 2, "--gradient_accumulation_steps", 2, "--network_dropout", 0.1, "--seed", 7),
            *("--save_every_n_epochs", 1, "--save_last_n_epochs", 1),
            *("--save_every_n_steps", 2, "--save_last_n_steps", 2, "--save_state", "--sample_every_n_steps", 4),
            *(
                "--sample_at_first",
                "--validate_every_n_steps",
                4,
                "--max_validation_steps",
                1,
                "--cache_latents_to_disk",
                "--resume",
                "auto",
            ),
        )

    def names(self) -> set[str]:
        """What stands in the output folder; of sample images, the moment and the prompt."""
        names = {path.name for path in self.output.iterdir()}
        samples = {re.sub(r"_\d{14}", "", path.name) for path in (self.output / "sample").iterdir()}
        return names | {f"sample/{name}" for name in samples}


@pytest.mark.parametrize("family", ["flux", pytest.param("sd1", marks=pytest.mark.thorough)])
def test_a_run_that_is_killed_again_and_again_ends_in_the_same_bytes(
    request, family, fork_server, thorough, few_images, tmp_path
):
    kills = 100 if thorough else 3
    script = "flux_train_network.py" if family == "flux" else "train_network.py"
    command = [*request.getfixturevalue(f"{family}_command"), "--network_train_unet_only"]
    command += ["--cache_text_encoder_outputs_to_disk", "--optimizer_type", "AdamW", "--ema_decay", 0.9]

    def training(name: str) -> Training:
        (tmp_path / name).mkdir()
        return Training(fork_server, script, command, tmp_path / name, few_images)

    whole = training("whole")
    length = timed_run(whole)
    files = ("lora.safetensors", "lora-ema.safetensors")
    expected, names = [contents(whole.output / name) for name in files], whole.names()

    chance = random.Random(f"{SEED} {family}")
    for broken, how in kill_again_and_again(lambda number: training(str(number)), kills, chance, length):
        assert [contents(broken.output / name) for name in files] == expected, how
        assert broken.names() == names, how


# ---- caching tools -------------------------------------------------------------------------------------------------


@dataclass
class Caching:
    """One of the tools that fill caches ahead of training, over a folder of its own."""

    server: ForkServer
    tool: str
    command: list[object]
    folder: Path
    images: Path

    def __post_init__(self) -> None:
        shutil.copytree(self.images, self.folder / "images")

    @property
    def places(self) -> list[Path]:
        return [self.folder / "images"]

    def start(self) -> Started:
        return self.server.start(self.tool, "--flux", *self.command, *self.data())

    def data(self) -> list[object]:
        """The images, each with its caption."""
        config = self.folder / "dataset.toml"
        config.write_text(
            "[[datasets]]\nresolution = 64\nbatch_size = 2\nenable_bucket = true\nmin_bucket_reso = 64\n"
            f'max_bucket_reso = 128\n[[datasets.subsets]]\nimage_dir = "{(self.folder / "images").as_posix()}"\n'
            'caption_extension = ".txt"\nflip_aug = true\n',
            encoding="utf-8",
        )
        return ["--dataset_config", config]

    def cached(self) -> dict[str, dict[str, bytes]]:
        """Arrays of each cache file, by its name."""
        found = {}
        for path in (self.folder / "images").glob("*.npz"):
            with numpy.load(path) as arrays:
                found[path.name] = {name: arrays[name].tobytes() for name in arrays}
        return found


@pytest.mark.parametrize(
    "tool", ["cache_latents", pytest.param("cache_text_encoder_outputs", marks=pytest.mark.thorough)]
)
def test_caching_that_is_killed_goes_on_to_the_same_caches(
    tool, flux_command, fork_server, thorough, few_images, tmp_path
):
    def caching(name: str) -> Caching:
        (tmp_path / name).mkdir()
        return Caching(fork_server, f"tools/{tool}.py", flux_command, tmp_path / name, few_images)

    whole = caching("whole")
    length = timed_run(whole)
    expected = whole.cached()
    assert len(expected) == 6
    chance, kills = random.Random(f"{SEED} {tool}"), 50 if thorough else 2
    for broken, how in kill_again_and_again(lambda number: caching(str(number)), kills, chance, length):
        assert broken.cached() == expected, how


# ---- images --------------------------------------------------------------------------------------------------------


def drawn_below(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Name and pixels of each image in ``folder / "out"``."""
    for path in (folder / "out").rglob("*.png"):
        with Image.open(path) as image:
            yield path.name, image.tobytes()


@dataclass
class Drawing:
    """gen_img.py with the images of a prompt file."""

    server: ForkServer
    model: Path
    folder: Path

    @property
    def places(self) -> list[Path]:
        return [self.folder / "out"]

    def start(self) -> Started:
        prompts = self.folder / "prompts.txt"
        prompts.write_text("a cat --d 1\na dog --d 2\n{a|the} bird --d 3 --f sub/bird.png\n", encoding="utf-8")
        sizes = ["--W", 64, "--H", 64, "--steps", 1, "--images_per_prompt", 2]
        files = ["--ckpt", self.model, "--from_file", prompts, "--outdir", self.folder / "out"]
        return self.server.start("gen_img.py", *files, *sizes, "--skip_existing", "--report", "--grid", "--seed", 4)

    def images(self) -> dict[str, bytes]:
        """The pixels of each image, by its name."""
        return dict(drawn_below(self.folder))


def test_drawing_that_is_killed_goes_on_to_the_same_images(few_blocks_sd1, fork_server, thorough, tmp_path):
    def drawing(name: str) -> Drawing:
        (tmp_path / name).mkdir()
        return Drawing(fork_server, few_blocks_sd1, tmp_path / name)

    whole = drawing("whole")
    length = timed_run(whole)
    expected = whole.images()
    assert len(expected) == 7
    chance, kills = random.Random(f"{SEED} gen_img"), 50 if thorough else 2
    for broken, how in kill_again_and_again(lambda number: drawing(str(number)), kills, chance, length):
        assert broken.images() == expected, how


# ---- the inference scripts of the other families: images under names of their own -----------------------------------


@dataclass
class InferenceScript:
    """A minimal inference script with the images of a prompt file; started again, it draws all of them again."""

    server: ForkServer
    script: str
    command: list[object]
    folder: Path

    @property
    def places(self) -> list[Path]:
        return [self.folder / "out"]

    def start(self) -> Started:
        prompts = self.folder / "prompts.txt"
        prompts.write_text("a cat --w 64 --h 64 --d 1 --s 1\na dog --w 64 --h 96 --d 2 --s 1\n", encoding="utf-8")
        return self.server.start(self.script, *self.command, "--from_file", prompts)

    def images(self) -> set[bytes]:
        """The pixels of each image."""
        return {pixels for _, pixels in drawn_below(self.folder)}


@pytest.mark.parametrize(
    "family",
    [pytest.param(TINY[name], id=name, marks=pytest.mark.thorough) for name in ("flux", "lumina", "hunyuan_image")],
)
def test_an_inference_script_that_is_killed_leaves_whole_images(family, request, fork_server, tmp_path):
    files = request.getfixturevalue(f"tiny_{family.name}")

    def drawing(name: str) -> InferenceScript:
        folder = tmp_path / name
        folder.mkdir()
        command = [*family.drawing(files), *family.dtypes["fp32"], family.output_option, folder / "out"]
        return InferenceScript(fork_server, family.inference, command, folder)

    whole = drawing("whole")
    length = timed_run(whole)
    expected = whole.images()
    assert len(expected) == 2
    chance = random.Random(f"{SEED} {family.name} images")
    for broken, how in kill_again_and_again(lambda number: drawing(str(number)), 20, chance, length):
        assert broken.images() == expected, how


# ---- tools for LoRA files --------------------------------------------------------------------------------------------


@dataclass
class Tool:
    """A tool that makes one file."""

    server: ForkServer
    script: str
    command: list[object]
    folder: Path

    @property
    def places(self) -> list[Path]:
        return [self.folder]

    @property
    def made(self) -> Path:
        return self.folder / "made.safetensors"

    def start(self) -> Started:
        return self.server.start(self.script, *self.command, self.made)


FLUX_LAYERS = {f"lora_unet_double_blocks_0_{name}": (64, 64) for name in ("img_attn_proj", "txt_attn_proj")}
TOOLS = {
    "merge files": "networks/flux_merge_lora.py --models LORA LORA --ratios 1 0.5 --save_to",
    "merge into a model": "networks/flux_merge_lora.py --flux_model MODEL --models LORA --ratios 1 --save_to",
    "extract": "networks/flux_extract_lora.py --model_org MODEL --model_tuned TUNED --dim 2 --save_to",
    "resize": "networks/resize_lora.py --model LORA --new_rank 2 --save_to",
    "join": "networks/svd_merge_lora.py --models LORA LORA --ratios 1 0.5 --new_rank 2 --save_to",
    "convert": "networks/convert_flux_lora.py --src sd-scripts --dst ai-toolkit --src_path LORA --dst_path",
    "convert a model": "tools/convert_diffusers_to_flux.py --diffusers_path FOLDER --save_to",
}


@pytest.mark.parametrize(
    "tool", [pytest.param(name, marks=[] if name == "extract" else [pytest.mark.thorough]) for name in TOOLS]
)
def test_a_tool_that_is_killed_leaves_a_whole_file_or_none(tool, tiny_flux, fork_server, thorough, tmp_path):
    script, *words = TOOLS[tool].split()
    files = {
        "LORA": tmp_path / "lora.safetensors",
        "MODEL": tiny_flux.transformer,
        "TUNED": tmp_path / "tuned.safetensors",
    }
    write_lora(files["LORA"], FLUX_LAYERS)
    if "TUNED" in words:
        merge_lora(
            [
                "--flux_model",
                str(files["MODEL"]),
                "--models",
                str(files["LORA"]),
                "--ratios",
                "1",
                "--save_to",
                str(files["TUNED"]),
            ]
        )
    if "FOLDER" in words:
        files["FOLDER"] = make_tiny_flux(tmp_path / "model", layout="diffusers").transformer

    def work(name: str) -> Tool:
        (tmp_path / name).mkdir()
        return Tool(fork_server, script, [files.get(word, word) for word in words], tmp_path / name)

    whole = work("whole")
    length = timed_run(whole)
    expected = contents(whole.made)
    chance, kills = random.Random(f"{SEED} {tool}"), 20 if thorough else 2
    for broken, how in kill_again_and_again(lambda number: work(str(number)), kills, chance, length):
        assert contents(broken.made) == expected, how


@dataclass
class Masks:
    """tools/make_masks.py over a folder of images; started again, it makes the masks that are not there."""

    server: ForkServer
    images: Path
    folder: Path

    @property
    def places(self) -> list[Path]:
        return [self.folder / "masks"]

    def start(self) -> Started:
        where = ["--image_dir", self.images, "--mask_dir", self.folder / "masks"]
        return self.server.start("tools/make_masks.py", *where, "--color", "white", "--feather", 2)

    def masks(self) -> dict[str, bytes]:
        """The pixels of each, by the file's name."""
        found = {}
        for path in self.folder.rglob("*.png"):
            with Image.open(path) as image:
                found[path.name] = image.tobytes()
        return found


@pytest.mark.thorough
def test_masks_whose_making_is_killed_are_whole(image_folder, fork_server, tmp_path):
    def making(name: str) -> Masks:
        (tmp_path / name).mkdir()
        return Masks(fork_server, image_folder, tmp_path / name)

    whole = making("whole")
    length = timed_run(whole)
    expected = whole.masks()
    assert len(expected) == len(list(image_folder.glob("*.png")))
    chance = random.Random(f"{SEED} masks")
    for broken, how in kill_again_and_again(lambda number: making(str(number)), 20, chance, length):
        assert broken.masks() == expected, how
