"""gen_img.py's options of prompts and files, through its command line with a tiny Stable Diffusion 1."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops

from gen_img import GenImg, GenImgOptions
from library.errors import UserError
from library.generation.image_files import text_in_image
from library.generation.image_outputs import ImageOutputs
from library.generation.image_prompts import ImagePrompt
from library.generation.sampling_options import SamplingOptions, request_fields
from library.html_pages import read_page_data
from library.models.stable_diffusion.pipeline import StableDiffusionFiles, StableDiffusionPipeline
from library.options import parse_options
from tests.generation.test_prompt_sources import PROMPTER, drawn


@pytest.fixture
def run(few_blocks_sd1, share_parts, tmp_path):
    """The script's run with more options, ready to draw."""

    def make(*arguments: object, outdir: Path = tmp_path / "out") -> GenImg:
        given = ["--ckpt", few_blocks_sd1, "--W", 64, "--H", 64, "--steps", 1, "--outdir", outdir, *arguments]
        return share_parts(GenImg(parse_options(GenImgOptions, "", [str(argument) for argument in given])))

    return make


@pytest.fixture
def draw(run, tmp_path):
    """Draw with more options; the new files, in the order of their names."""

    def make(*arguments: object, outdir: Path = tmp_path / "out") -> list[Path]:
        before = set(outdir.rglob("*"))
        run(*arguments, outdir=outdir).run()
        return sorted(path for path in set(outdir.rglob("*")) - before if path.is_file())

    return make


def texts(paths: list[Path], key: str) -> list[str]:
    return [text_in_image(path)[key] for path in paths]


def difference(one: Path, other: Path) -> int:
    """The largest difference of two images' values in 0..255."""
    with Image.open(one) as a, Image.open(other) as b:
        return max(high for _, high in ImageChops.difference(a.convert("RGB"), b.convert("RGB")).getextrema())


def prompt_file(folder: Path, *lines: str) -> Path:
    path = folder / "prompts.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_seeds_of_images_per_prompt_and_images_that_no_batch_size_changes(draw, tmp_path):
    options = ("--prompt", "a cat --n blurry", "--images_per_prompt", 3, "--seed", 7, "--sequential_file_name")
    paths = draw(*options, "--batch_size", 2)
    assert [path.name for path in paths] == [f"im_00000{number}.png" for number in (1, 2, 3)]
    assert texts(paths, "seed") == [str(seed) for seed in drawn(7, 3)]
    assert texts(paths, "negative-prompt") == ["blurry"] * 3
    (alone,) = draw("--prompt", f"a cat --n blurry --d {drawn(7, 3)[1]}", outdir=tmp_path / "alone")
    assert difference(alone, paths[1]) <= 1 < 5 < difference(alone, paths[0])
    assert alone.name.startswith("im_20") and alone.name.endswith(f"_000_{drawn(7, 3)[1]}.png")


def test_from_file_with_n_iter_iter_same_seed_and_shuffle_prompts(draw, tmp_path):
    file = prompt_file(tmp_path, *"abcde")
    options = ("--from_file", file, "--n_iter", 2, "--iter_same_seed", "--shuffle_prompts", "--seed", 1)
    paths = draw(*options, "--sequential_file_name", "--steps", 1)
    found = texts(paths, "prompt")
    assert sorted(found[:5]) == sorted(found[5:]) == list("abcde") and len({*map(str, (found[:5], found[5:]))}) == 2
    assert texts(paths, "seed") == [str(drawn(1, 1)[0])] * 5 + [str(drawn(1, 2)[1])] * 5


def test_from_module_with_prompter_module_args(draw, tmp_path):
    module = tmp_path / "prompts.py"
    module.write_text(PROMPTER.replace("return f", "return f'{args.W}{pipe.unet.config.in_channels} ' + f"), "utf-8")
    paths = draw("--from_module", module, "--prompter_module_args", "x y", "--seed", 3, "--sequential_file_name")
    assert texts(paths, "prompt") == ["644 x", "644 y"]
    assert texts(paths, "seed") == [str(seed) for seed in drawn(3, 2)]


def test_interactive_draws_line_by_line_and_survives_mistakes(draw, monkeypatch, capsys):
    typed = "a cat --d 1\na --w 65\na --s x\n{red|blue} dog --d 2 --f dog.png\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    paths = draw("--interactive", "--no_preview", "--batch_size", 4, "--use_original_file_name", "--n_iter", 5)
    assert texts(paths, "seed") == ["2", "1"] and paths[0].name == "dog.png"
    out = capsys.readouterr().out
    assert "--w must be a positive multiple of 8, not 65" in out and "--s must be a whole number" in out


def test_skip_existing_continues_an_interrupted_run_to_the_same_images(draw, tmp_path, monkeypatch):
    file = prompt_file(tmp_path, "a", "{red|green} b --s 2", "c --f sub/c.webp", "{e$$d|e}")
    options = (
        "--from_file",
        file,
        "--seed",
        4,
        "--images_per_prompt",
        2,
        "--steps",
        1,
        "--sampler",
        "euler_a",
        "--skip_existing",
    )
    whole = draw(*options, outdir=tmp_path / "whole")

    save = ImageOutputs.save

    def stop(self, image, prompt, *rest):
        if prompt.number == 3:
            raise KeyboardInterrupt
        return save(self, image, prompt, *rest)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(ImageOutputs, "save", stop)
        draw(*options, "--report", "--batch_size", 2)
    out = tmp_path / "out"
    first = {path.relative_to(out) for path in out.rglob("*.*")} - {Path("report.html")}
    assert len(first) == 3
    rest = draw(*options, "--report", "--grid", "--batch_size", 4)
    assert {path.name for path in rest} >= {"grid.png"}
    names = {path.relative_to(tmp_path / "whole") for path in whole}
    assert {path.relative_to(out) for path in out.rglob("*.*")} == names | {Path("report.html"), Path("grid.png")}
    assert max(difference(tmp_path / "whole" / name, out / name) for name in names) <= 4, "WebP loses a little"
    assert sum(map(len, read_page_data(out / "report.html")["lines"])) == len(names) == 10
    assert draw(*options) == []


def test_prompts_and_names_of_images_that_are_drawn_over(draw, tmp_path):
    file = prompt_file(tmp_path, r"a \{cat\} --n dark --f one.png", "a dog --f two.png")
    folder = tmp_path / "start"
    start = draw("--from_file", file, "--grid", outdir=folder)
    assert [path.name for path in start] == ["grid.png", "one.png", "two.png"]
    again = draw("--image_path", folder, "--strength", 0.5, "--images_per_prompt", 2, "--use_original_file_name")
    assert [path.name for path in again] == ["one.png", "one_001.png", "two.png", "two_001.png"]
    assert texts(again, "prompt") == ["a {cat}"] * 2 + ["a dog"] * 2
    assert texts(again[:2], "negative-prompt") == ["dark"] * 2


def test_no_metadata_leaves_the_text_out(draw):
    (path,) = draw("--prompt", "a cat", "--no_metadata")
    assert text_in_image(path) == {}


@pytest.mark.parametrize(
    "lines, sentence",
    [
        (["a", "b --w 100"], "line 2: --w must be a positive multiple of 8, not 100"),
        (["{e$$a|b --s x}"], "line 1: --s must be a whole number"),
        ([""], "holds no prompts"),
    ],
)
def test_a_prompt_file_is_checked_before_the_model_is_loaded(run, tmp_path, monkeypatch, lines, sentence):
    monkeypatch.setattr("library.models.pipeline.Pipeline.load", lambda self, part: pytest.fail("loaded"))
    with pytest.raises(UserError, match=sentence):
        run("--from_file", prompt_file(tmp_path, *lines)).run()


def test_without_prompts_nothing_is_loaded(run):
    with pytest.raises(UserError, match="^Nothing to generate"):
        run()


def test_files_of_other_prompts_are_not_taken_for_those_of_this_run(run, draw, tmp_path, monkeypatch):
    draw("--prompt", "a cat", "--sequential_file_name")
    monkeypatch.setattr("library.models.pipeline.Pipeline.load", lambda self, part: pytest.fail("loaded"))
    with pytest.raises(UserError, match="im_000001.png has another prompt than image 1 of this run"):
        run("--prompt", "a dog", "--skip_existing").run()


def test_a_run_goes_on_after_a_start_image_that_is_cut_off(draw, tmp_path):
    start = draw(
        "--from_file", prompt_file(tmp_path, "a --f 1.png", "b --f 2.png", "c --f 3.png"), outdir=tmp_path / "in"
    )
    start[1].write_bytes(start[1].read_bytes()[:-4000])
    with pytest.raises(UserError, match="^image 2 could not be generated"):
        draw("--image_path", tmp_path / "in", "--use_original_file_name")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["1.png", "3.png"]


@pytest.mark.parametrize("sampler", ["ddim", "pndm", "heun", "euler_a", "dpmsolver++"])
def test_a_thousand_steps_take_each_timestep_once(few_blocks_sd1, sampler):
    pipeline = StableDiffusionPipeline(StableDiffusionFiles(few_blocks_sd1), torch.float32, "cpu")
    request = pipeline.request(ImagePrompt(sample_steps=1000), sampler=sampler, **request_fields(SamplingOptions()))
    timesteps = pipeline.solver(request).timesteps
    assert timesteps.min() >= 0 and timesteps.max() <= 999
