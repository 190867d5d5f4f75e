"""The commands of the guides train: with tiny weights and few small pictures where a user has real ones.

Everything else is as the documentation shows it: commands, options, TOML and prompt files.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from library.console import LOGGER
from tests.docs.pages import Block, blocks, commands, launched
from tests.running import ROOT

GUIDES = (
    *("train_network", "sdxl_train_network", "train_network_advanced", "validation", "config_README-en"),
    *("caching", "lycoris"),
)
SHOWN = [(block, words) for block in blocks("bash") if block.page.stem in GUIDES for words in commands(block)]
LAUNCHES = [
    pytest.param(block, words, id=str(block), marks=[pytest.mark.slow] if "--dry_run" in words else [])
    for block, words in SHOWN
    if launched(words) is not None
]
IN_ONE_PROCESS = [shown for shown in LAUNCHES if "--multi_gpu" not in shown.values[1]]
IN_SEVERAL = [shown for shown in LAUNCHES if shown not in IN_ONE_PROCESS]
FRAGMENTS = [pytest.param(block, words, id=str(block)) for block, words in SHOWN if words[0].startswith("--")]

SMALL = {
    "max_train_epochs": "2",
    "max_train_steps": "2",
    "lr_warmup_steps": "1",
    "validate_every_n_steps": "1",
    "validation_split": "0.5",
    "resolution": "64",
}
"""What the tests give in place of a documented value, so that a run takes seconds."""
SMALL_TOML = {
    "resolution": "64\nmin_bucket_reso = 64",
    "num_repeats": "1",
    "max_train_epochs": "2",
    "lr_warmup_steps": "1",
}
SMALL_PROMPT = {r"--([wh]) \d+": r"--\1 64", r"--d (\d+)": r"--d \1 --s 2"}
"""The first of repeated options counts."""


@pytest.fixture
def models(tiny_sd1, tiny_sd2, tiny_sdxl, tiny_flux):
    """The options that name the models of a script, by what a command says of them."""

    def named(script: str, words: list[str]) -> list[str]:
        if "flux" in script or "--flux" in words:
            names = ("pretrained_model_name_or_path", "clip_l", "t5xxl", "ae")
            files = (tiny_flux.transformer, tiny_flux.clip_l, tiny_flux.t5xxl, tiny_flux.autoencoder)
            return [f"--{name}={file}" for name, file in zip(names, files)]
        is_xl = "sdxl" in script or "--sdxl" in words
        model = tiny_sdxl if is_xl else tiny_sd2 if "--v2" in words else tiny_sd1
        return [f"--pretrained_model_name_or_path={model}"]

    return named


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder that holds what the documentation's commands name, apart from models."""
    from PIL import Image

    shown = [block for block in blocks("toml", "text") if block.page.stem in GUIDES]
    folders = set(re.findall(r'(?:image_dir|conditioning_data_dir) = "(.+?)"', "".join(block.text for block in shown)))
    for name in {*folders, "dreambooth/10_sks girl", "regularisation/1_girl"}:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        for number, size in enumerate([(64, 64), (96, 64), (65, 65), (80, 80)]):
            picture = Image.effect_mandelbrot(size, (-2, -1, 1, 1), 20 + number)
            picture.convert("RGB").save(folder / f"{number}.png")
            (folder / f"{number}.txt").write_text(f"a photo of sks girl, number {number}", encoding="utf-8")
    for block in shown:
        if block.name:
            (tmp_path / block.name).write_text(smaller(block), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    yield tmp_path


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
    wanted = [f"--{name}={SMALL[name]}" for name in given if name in SMALL]
    return [*wanted, "--min_bucket_reso=64"] if "resolution" in given else wanted


@pytest.fixture
def run(models, capfd):
    """Run a script of the project in this process, as ``python script ...`` does; returns what it said."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    handlers, level, propagates = LOGGER.handlers[:], LOGGER.level, LOGGER.propagate

    def in_this_process(script: str, words: list[str]) -> str:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        given = [script, *words, *models(script, words), *small_options(words)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", given)
            importlib.import_module(script.removesuffix(".py").replace("/", ".")).main()
        return capfd.readouterr().err

    yield in_this_process
    AcceleratorState._reset_state()
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
    script, *arguments = words[launched(words) :]
    said = run(script, arguments)
    require_nothing_to_complain(said)
    if script.startswith("tools/"):
        assert re.search(r"finished; .* 0 kept, [1-9]\d* made", said) and list(place.rglob("*.npz"))
    elif "--dry_run" in arguments:
        assert "All checks passed" in said and "unknown" not in said and not (place / "output").exists()
    else:
        require_trained(place / "output")


@pytest.mark.slow
@pytest.mark.parametrize(("block", "words"), IN_SEVERAL)
def test_command_for_several_processes(block, words, place, models):
    """The launcher's own options, and a working directory that is not the project's."""
    index = launched(words)
    script, arguments = words[index], words[index + 1 :]
    given = [*arguments, *models(script, words), *small_options(words)]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *words[2:index]]
    result = subprocess.run(
        [*launcher, str(ROOT / script), *given], capture_output=True, text=True, encoding="utf-8", timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    require_trained(place / "output")


# ---- options on their own ------------------------------------------------------------------------------------------


def base_command(words: list[str]) -> list[str]:
    """A short command that a page's options are added to; theirs win."""
    data = [] if "--train_data_dir" in words else ["--dataset_config", "dataset.toml"]
    network = ["--network_module", "networks.lora", "--network_dim", "4"]
    return [*data, *network, "--learning_rate", "1e-3", "--max_train_steps", "1", "--output_dir", "output"]


@pytest.mark.parametrize(("block", "words"), FRAGMENTS)
def test_options(block, words, place, run):
    said = run(block.script, [*base_command(words), *words])
    assert "no effect" not in said
    require_trained(place / "output")
    if "--sample_prompts" in words:
        assert len(list((place / "output" / "sample").glob("*.png"))) == 4  # two prompts, at first and at the end
    if "--validation_split" in words:
        assert "validation loss" in said


@pytest.mark.slow
def test_programs_that_take_a_trained_file(place, run):
    """networks.dylora's file is cut, and shown."""
    fragments = [words for block, words in SHOWN if "networks.dylora" in words]
    programs = [words for block, words in SHOWN if words[0] == "python"]
    assert len(fragments) == 1 and len(programs) == 2
    run("train_network.py", [*base_command([]), *fragments[0], "--output_name", "my_lora"])
    for words in programs:
        result = subprocess.run(
            [sys.executable, str(ROOT / words[1]), *words[2:]], capture_output=True, text=True, encoding="utf-8"
        )
        assert result.returncode == 0, result.stderr
    cut = {path.name: load_file(path) for path in (place / "output").glob("cut-*.safetensors")}
    ranks = {name: {len(t) for key, t in file.items() if "lora_down" in key} for name, file in cut.items()}
    assert ranks == {f"cut-{rank:04d}.safetensors": {rank} for rank in (4, 8, 12)}
