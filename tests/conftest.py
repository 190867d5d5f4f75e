"""Settings for every test: one thread per process, no network; and what several rooms need to run a script."""

from __future__ import annotations

import gc
import logging
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import hypothesis
import pytest

from library import console
from tests.documented import DATASETS
from tests.families.families import TINY
from tests.families.stable_diffusion import make_few_blocks
from tests.forked import keep_freed_memory
from tests.processes import ForkServer
from tests.running import forget_accelerator, toml_value

# A busy machine must not fail a property test.
hypothesis.settings.register_profile("ordinary", deadline=None, max_examples=50)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=5000)
hypothesis.settings.load_profile("ordinary")


# A background job of a shell ignores Ctrl-C, and so would every process that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.fsync = lambda descriptor: None  # no test cuts the power, and to wait for the disk takes a tenth of the time


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="many more kills, inputs and steps")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("thorough"):
        hypothesis.settings.load_profile("thorough")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked ``thorough`` unless it is requested."""
    if not config.getoption("thorough"):
        left_out = [item for item in items if item.get_closest_marker("thorough")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("thorough")]


def pytest_collection() -> None:
    """What collecting imports and makes stays for good: to look for garbage in it takes seconds."""
    gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.set_threshold(50_000)  # as the scripts have it
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """caplog sees the suite's messages even after a test has set up the console."""
    logging.getLogger("library").propagate = True


_kept_modules = 0
"""How many modules had been imported when the collector of garbage last was told to leave alone what is there."""
SLOW_SEARCH = 0.02
"""Processor seconds of a search for garbage after which what there is counts as lasting."""
_searches: list[float] = []
"""Processor seconds of each full search for garbage since then."""


def _time_search(phase: str, info: dict[str, int]) -> None:
    if info["generation"] == 2:
        if phase == "start":
            _searches.append(-time.process_time())
        else:
            _searches[-1] += time.process_time()


gc.callbacks.append(_time_search)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """A test that looks at accelerate or at messages does not meet what a run before it has set up or held back.

    What imported modules, a compiler or fixtures hold stays for long: a run's searches for garbage need not look at it
    again and again. And loggers pass on what they are told: those that don't, dozens of torch, pytest visits six times
    in every test.
    """
    global _kept_modules
    forget_accelerator()
    console._waiting.clear()
    has_new_modules = len(sys.modules) > _kept_modules + 100
    if has_new_modules or max(_searches, default=0) > SLOW_SEARCH:
        gc.collect()
        gc.freeze()
        _searches.clear()
    if has_new_modules:
        _kept_modules = len(sys.modules)
        for name, logger in logging.root.manager.loggerDict.items():
            if name.startswith("torch") and isinstance(logger, logging.Logger):
                logger.propagate = True


@pytest.fixture(scope="session")
def thorough(request: pytest.FixtureRequest) -> bool:
    """Whether ``--thorough`` asks for the large numbers of kills, inputs and steps."""
    return request.config.getoption("thorough")


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """Starts scripts as processes of their own in a fraction of a second; all workers share it."""
    folder = tmp_path_factory.getbasetemp()
    with ForkServer(folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) as server:
        yield server


@pytest.fixture(autouse=True, scope="session")
def settings_of_what_is_tested() -> None:
    """One thread for torch, freed memory at hand, and memory features that take tiny models seriously.

    Imported here: the process that hands tests to its workers needs none of it.
    """
    import torch

    from library.memory.activations import OffloadedInputs
    from library.memory.streaming import BlockStream

    torch.set_num_threads(1)
    keep_freed_memory(True)
    BlockStream.poisons = True  # a streamed weight that is used where it isn't there makes every result NaN
    OffloadedInputs.smallest = 1  # the inputs of tiny models are worth the way too


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory):
    """A random tiny FLUX.1 dev in the real files' layouts."""
    return TINY["flux"].make(tmp_path_factory.mktemp("tiny_flux"))


@pytest.fixture(scope="session")
def tiny_chroma(tmp_path_factory):
    """A random tiny Chroma in the real files' layouts."""
    return TINY["chroma"].make(tmp_path_factory.mktemp("tiny_chroma"))


@pytest.fixture(scope="session")
def tiny_lumina(tmp_path_factory):
    """A random tiny Lumina Image 2.0 in the real files' layouts."""
    return TINY["lumina"].make(tmp_path_factory.mktemp("tiny_lumina"))


@pytest.fixture(scope="session")
def tiny_hunyuan_image(tmp_path_factory):
    """A random tiny HunyuanImage-2.1 in the real files' layouts."""
    return TINY["hunyuan_image"].make(tmp_path_factory.mktemp("tiny_hunyuan_image"))


@pytest.fixture(scope="session")
def tiny_controlnet(tmp_path_factory) -> Path:
    """A random tiny ControlNet for ``tiny_flux``: a file in the original layout, which takes pixels."""
    from tools.make_tiny_controlnet import make_tiny_controlnet

    return make_tiny_controlnet(tmp_path_factory.mktemp("tiny_controlnet"))


@pytest.fixture(scope="session")
def tiny_sd1(tmp_path_factory) -> Path:
    """The single file of a random tiny Stable Diffusion 1 under the real file's key names, with its tokenizer."""
    return TINY["sd1"].make(tmp_path_factory.mktemp("tiny_sd1"))


@pytest.fixture(scope="session")
def tiny_sd2(tmp_path_factory) -> Path:
    """The same of Stable Diffusion 2."""
    return TINY["sd2"].make(tmp_path_factory.mktemp("tiny_sd2"))


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory) -> Path:
    """The same of Stable Diffusion XL, with two tokenizers."""
    return TINY["sdxl"].make(tmp_path_factory.mktemp("tiny_sdxl"))


@pytest.fixture(scope="session")
def few_blocks_sd1(tmp_path_factory) -> Path:
    """A tiny Stable Diffusion 1 with few blocks, for tests that train often."""
    return make_few_blocks(tmp_path_factory.mktemp("few_blocks_sd1"), "sd1")


@pytest.fixture(scope="session")
def few_blocks_sd2(tmp_path_factory) -> Path:
    """The same of Stable Diffusion 2."""
    return make_few_blocks(tmp_path_factory.mktemp("few_blocks_sd2"), "sd2")


@pytest.fixture(scope="session")
def few_blocks_sdxl(tmp_path_factory) -> Path:
    """The same of Stable Diffusion XL."""
    return make_few_blocks(tmp_path_factory.mktemp("few_blocks_sdxl"), "sdxl")


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """Twelve small images of several shapes with captions."""
    from PIL import Image, ImageDraw

    folder = tmp_path_factory.mktemp("images")
    draw = random.Random(0)
    sizes = [(128, 128), (160, 96), (200, 100), (90, 170)]
    for number in range(12):
        size = sizes[number % 4]
        image = Image.new("RGB", size, tuple(draw.randrange(256) for _ in range(3)))
        colour = tuple(draw.randrange(256) for _ in range(3))
        ImageDraw.Draw(image).ellipse((20, 20, size[0] - 20, size[1] - 20), fill=colour)
        image.save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"a circle, number {number}, on a background", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def few_images(image_folder, tmp_path_factory) -> Path:
    """Four of the images, one of each shape, with their captions: for runs that are about something else."""
    folder = tmp_path_factory.mktemp("few_images")
    for number in range(4):
        for suffix in (".png", ".txt"):
            shutil.copy(image_folder / f"{number:02d}{suffix}", folder)
    return folder


@pytest.fixture(scope="session")
def control_folder(image_folder, tmp_path_factory) -> Path:
    """For each of the images a control image of its size: where it is bright."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("control")
    for path in sorted(image_folder.glob("*.png")):
        with Image.open(path) as picture:
            picture.convert("L").point(lambda value: 255 * (value > 127)).convert("RGB").save(folder / path.name)
    return folder


@pytest.fixture(scope="session")
def flux_command(tiny_flux):
    """Options of the FLUX script that name the tiny model and a small quick LoRA."""
    return TINY["flux"].command(tiny_flux)


@pytest.fixture(scope="session")
def chroma_command(tiny_chroma):
    """The same for Chroma, with the settings that are recommended for it."""
    return TINY["chroma"].command(tiny_chroma)


@pytest.fixture(scope="session")
def sd1_command(few_blocks_sd1):
    """For train_network.py, with a model of few blocks."""
    return TINY["sd1"].command(few_blocks_sd1)


@pytest.fixture(scope="session")
def sd2_command(few_blocks_sd2):
    """For train_network.py, with a model of few blocks of 2.x that predicts v."""
    return TINY["sd2"].command(few_blocks_sd2)


@pytest.fixture(scope="session")
def sdxl_command(few_blocks_sdxl):
    """For sdxl_train_network.py, with a model of few blocks."""
    return TINY["sdxl"].command(few_blocks_sdxl)


@pytest.fixture
def dataset_toml(tmp_path, image_folder):
    """Write a dataset description over the images; ``subset`` holds subset keys, the others are dataset keys."""

    def write(folder: Path = image_folder, subset: dict[str, object] | None = None, **keys: object) -> Path:
        path = tmp_path / "dataset.toml"
        settings = {"resolution": 128, "enable_bucket": True, "min_bucket_reso": 64, "max_bucket_reso": 256}
        settings |= {"bucket_reso_steps": 32, "caption_extension": ".txt", "batch_size": 2, **keys}
        lines = ["[[datasets]]", *(f"{key} = {toml_value(value)}" for key, value in settings.items())]
        lines += ["[[datasets.subsets]]", f"image_dir = {toml_value(folder.as_posix())}"]
        lines += [f"{key} = {toml_value(value)}" for key, value in (subset or {}).items()]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write


@pytest.fixture
def documented() -> dict[str, str]:
    """The dataset configurations of the FLUX.1 guide."""
    return DATASETS
