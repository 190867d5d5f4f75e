"""Where gen_img.py's prompts come from, which seed each image gets, and what is said of mistakes."""

from __future__ import annotations

import io
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from library.errors import UserError
from library.generation.image_prompts import ImagePrompt
from library.generation.prompt_sources import ImagePromptOptions, ImagePrompts, PromptLine

DEFAULTS = ImagePrompt(width=64, height=64, sample_steps=2, scale=7.5)


def prompts(*recorded: PromptLine, **options: object) -> ImagePrompts:
    return ImagePrompts(ImagePromptOptions(**options), DEFAULTS, recorded)


def images(*recorded: PromptLine, **options: object) -> list[ImagePrompt]:
    return [image for line in prompts(*recorded, **options) for image in line]


def seeds(**options: object) -> list[int]:
    return [image.seed for image in images(**options)]


def drawn(seed: int, count: int) -> list[int]:
    """The seeds that --seed gives several images."""
    generator = random.Random(seed)
    return [generator.randint(0, 2**32 - 1) for _ in range(count)]


@pytest.fixture
def file(tmp_path):
    """Write a prompt file."""

    def write(*lines: str) -> str:
        path = tmp_path / "prompts.txt"
        path.write_text("\n".join(lines), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def module(tmp_path):
    """Write a module for --from_module."""

    def write(text: str) -> str:
        path = tmp_path / "my prompts.py"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


# ---- lines --------------------------------------------------------------------------------------------------------


def test_prompt_is_one_line_with_options():
    (image,) = images(prompt="a cat --n blurry --w 128")
    assert (image.prompt, image.negative_prompt, image.width, image.height) == ("a cat", "blurry", 128, 64)
    assert image.raw_prompt == "a cat --n blurry --w 128"


def test_an_empty_prompt_is_a_prompt():
    assert [image.prompt for image in images(prompt="")] == [""]


def test_from_file_leaves_out_empty_lines_and_comments(file):
    path = file("\ufeffa cat", "", "# a comment", "  a dog --d 3 --w 72", " # a hash", "猫")
    assert [image.prompt for image in images(from_file=path)] == ["a cat", "a dog", "# a hash", "猫"]
    assert images(from_file=path)[1].seed == 3
    assert images(from_file=path)[1].raw_prompt == "a dog --w 72", "--d is not in it"


def test_images_per_prompt_and_n_iter_count_on(file):
    all_images = images(from_file=file("a", "b"), images_per_prompt=2, n_iter=2)
    assert [image.prompt for image in all_images] == ["a", "a", "b", "b"] * 2
    assert [image.number for image in all_images] == list(range(8))
    assert [image.index for image in all_images] == [0, 1] * 4
    assert [image.iteration for image in all_images] == [0] * 4 + [1] * 4
    assert [len(line) for line in prompts(from_file=file("a", "b"), images_per_prompt=2, n_iter=2)] == [2] * 4


@pytest.mark.parametrize("lines", [["a", "b"], ["{e$$a|b|c} x", "{a|b}"], ["{e$$1-2$$a|b} --d 1,2,3"]])
def test_images_are_counted_ahead(file, lines):
    found = prompts(from_file=file(*lines), images_per_prompt=2, n_iter=3)
    assert found.known_ahead and found.count == sum(map(len, found))


def test_what_a_dynamic_prompt_gives(file):
    found = images(from_file=file("{e$$a|b} cat --s {e$$3|4}"), images_per_prompt=2, seed=5)
    assert [(image.prompt, image.sample_steps) for image in found[:4]] == [
        ("a cat", 3),
        ("a cat", 4),
        ("b cat", 3),
        ("b cat", 4),
    ]
    assert all(image.dynamic for image in found) and not images(prompt="a cat")[0].dynamic
    first, second = drawn(5, 2)
    assert [image.seed for image in found] == [first] * 4 + [second] * 4
    assert found[1].raw_prompt == "a cat --s 4"


def test_shuffle_prompts_gives_each_iteration_its_order(file):
    path = file(*"abcdefgh")
    orders = [image.prompt for image in images(from_file=path, shuffle_prompts=True, n_iter=3, seed=1)]
    rounds = ["".join(orders[start : start + 8]) for start in (0, 8, 16)]
    assert all(sorted(order) == list("abcdefgh") for order in rounds) and len({*rounds, "abcdefgh"}) == 4
    again = images(from_file=path, shuffle_prompts=True, n_iter=3, seed=1)
    assert [image.prompt for image in again] == orders
    assert [image.seed for image in again] == seeds(from_file=path, n_iter=3, seed=1), "of seeds the order is the same"


def test_prompts_of_images_are_the_last_choice(file):
    lines = [PromptLine("a cat --n blurry", "a.png"), PromptLine("a dog", "b.png")]
    assert [image.prompt for image in images(*lines)] == ["a cat", "a dog"]
    assert [image.prompt for image in images(*lines, prompt="a bird")] == ["a bird"]


def test_of_several_sources_the_first_counts(file, caplog):
    found = images(from_file=file("a"), prompt="b")
    assert [image.prompt for image in found] == ["a"]
    assert "--prompt has no effect with --from_file" in caplog.text


# ---- seeds --------------------------------------------------------------------------------------------------------


def test_seed_is_that_of_the_only_image_in_each_iteration():
    assert seeds(prompt="a", seed=7, n_iter=3) == [7, 7, 7]
    assert seeds(prompt="a", seed=2**64 - 1) == [2**64 - 1]
    assert seeds(prompt="a --d 4", seed=7, n_iter=2) == [4, 4]


def test_seed_draws_those_of_several_images(file):
    assert seeds(prompt="a", seed=7, images_per_prompt=3) == drawn(7, 3)
    assert seeds(from_file=file("a", "b"), seed=7, n_iter=2) == drawn(7, 4)
    assert seeds(from_file=file("a", "b --d 1", "c"), seed=7) == [drawn(7, 2)[0], 1, drawn(7, 2)[1]]


def test_without_seed_each_run_has_other_seeds_but_the_same_whenever_it_is_asked():
    one, other = prompts(prompt="a", images_per_prompt=4), prompts(prompt="a", images_per_prompt=4)
    assert list(one) == list(one)
    assert list(one) != list(other)
    assert len({image.seed for line in one for image in line}) == 4


def test_the_last_seed_of_d_is_used_again(caplog):
    found = prompts(prompt="a --d 5,6", images_per_prompt=4)
    found.check()
    assert [image.seed for line in found for image in line] == [5, 6, 6, 6]
    assert "--d gives 2 seeds for 4 images; the last one is used again" in caplog.text


def test_more_seeds_than_images_are_warned_of(caplog):
    found = prompts(prompt="a --d 5,6")
    found.check()
    assert [image.seed for line in found for image in line] == [5]
    assert "--d gives 2 seeds, but --images_per_prompt is 1" in caplog.text


def test_missing_seeds_of_a_dynamic_prompt_are_drawn():
    assert seeds(prompt="{a|b} --d 5", images_per_prompt=3, seed=9) == [5, *drawn(9, 2)]


def test_iter_same_seed_is_one_for_each_iteration(file):
    path = file("a", "b --d 3", "c", "{d|e}")
    found = seeds(from_file=path, iter_same_seed=True, n_iter=2, seed=7)
    first, dynamic, second, other = drawn(7, 4)
    assert found == [first, 3, first, dynamic, second, 3, second, other]


# ---- modules ------------------------------------------------------------------------------------------------------

PROMPTER = """
class Prompter:
    def __init__(self, args, pipe, networks):
        self.words, self.calls, self.pipe, self.networks = args.prompter_module_args.split(), [], pipe, networks
    def __len__(self):
        return len(self.words)
    def shuffle(self):
        self.words.reverse()
    def __call__(self, args, pipe, seed_random, iter_seed, prompt_index, global_step):
        self.calls.append((prompt_index, global_step, iter_seed))
        if prompt_index == len(self.words):
            return None
        return f"{self.words[prompt_index]} --d {seed_random.randint(0, 2**32 - 1)}"

def get_prompter(args, pipe, networks):
    return Prompter(args, pipe, networks)
"""


@dataclass
class ScriptOptions:
    """Options of a script."""

    prompts: ImagePromptOptions


def of_module(path: str, pipeline: object = None, **options: object) -> tuple[ImagePrompts, Any]:
    """The prompts, and the prompter of the module."""
    options = {"from_module": path, "prompter_module_args": "a b", **options}
    found = prompts(**options)
    found.check()
    found.open_module(ScriptOptions(ImagePromptOptions(**options)), pipeline, ["a network"])
    return found, found._prompter


def test_from_module_is_called_for_each_prompt_of_each_iteration(module):
    found, prompter = of_module(module(PROMPTER), n_iter=2, seed=3, images_per_prompt=2)
    assert not found.known_ahead and found.count is None
    lines = list(found)
    assert [[image.prompt for image in line] for line in lines] == [["a", "a"], ["b", "b"]] * 2
    assert [line[0].seed for line in lines] == drawn(3, 4)
    assert prompter.calls == [(0, 0, None), (1, 2, None), (2, 4, None)] * 2
    assert [image.number for line in lines for image in line] == list(range(8))


def test_from_module_with_iter_same_seed_and_shuffle(module):
    found, prompter = of_module(module(PROMPTER), n_iter=2, seed=3, iter_same_seed=True, shuffle_prompts=True)
    assert [line[0].prompt for line in found] == ["b", "a", "a", "b"]
    iteration_seeds = [call[2] for call in prompter.calls]
    assert iteration_seeds[0] == drawn(3, 1)[0] and len(set(iteration_seeds)) == 2


def test_a_bad_line_of_a_module_is_left_out(module, caplog):
    found, _ = of_module(module(PROMPTER.replace(" --d {seed", " --s {'x' if prompt_index == 0 else 3} --d {seed")))
    assert [image.prompt for line in found for image in line] == ["b"]
    assert '--from_module, prompt 1: --s must be a whole number, not "x". It is left out.' in caplog.text


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("", r"my prompts.py has no function get_prompter\(args, pipe, networks\)"),
        ("def f(:\n", "line 1: SyntaxError"),
        ("\nimport no_such_package", "my prompts.py, line 2: ModuleNotFoundError"),
        ("def get_prompter(args, pipe, networks):\n    return 1 / 0", "my prompts.py, line 2: ZeroDivisionError"),
        ("def get_prompter(a, pipe, n):\n    pipe.set_control_nets([])", "line 2: .*chosen by --control_net_models"),
        ("def get_prompter(a, pipe, n):\n    pipe.set_gradual_latent(None)", "line 2: .*or by --glt in a prompt line"),
        ("def get_prompter():\n    return 1", "my prompts.py: TypeError"),
        ("def get_prompter(*arguments):\n    return None", "must return something that can be called"),
        ("def get_prompter(*arguments):\n    return lambda *given: 5", "a prompt must be text, not 5"),
        ("def get_prompter(*arguments):\n    return lambda *given: given[99]", "line 2: IndexError"),
    ],
)
def test_modules_with_mistakes(module, text, sentence):
    with pytest.raises(UserError, match=rf"^--from_module: .*{sentence}"):
        list(of_module(module(text))[0])


def test_a_prompter_without_shuffle(module):
    with pytest.raises(UserError, match=r"--shuffle_prompts: the prompter of --from_module has no shuffle\(\)"):
        of_module(module("def get_prompter(*a):\n    return lambda *b: None"), shuffle_prompts=True)


def test_a_module_gets_networks_and_the_models_by_their_usual_names(module):
    pipeline = SimpleNamespace(
        denoiser="unet",
        encoders=("one", "two"),
        device="cpu",
        load=lambda part: f"the {part}",
        load_autoencoder=lambda: "the autoencoder",
        load_text_encoders=lambda: ["first", "second"],
        tokenizer=lambda encoder: f"tokenizer {encoder}",
        request=lambda prompt: prompt.sample_sampler,
        solver=lambda sampler: SimpleNamespace(scheduler=f"the scheduler of {sampler}"),
    )
    _, prompter = of_module(module(PROMPTER), pipeline)
    pipe = prompter.pipe
    assert (pipe.unet, pipe.vae, pipe.device, prompter.networks) == (
        "the unet",
        "the autoencoder",
        "cpu",
        ["a network"],
    )
    assert pipe.scheduler == f"the scheduler of {DEFAULTS.sample_sampler}"
    assert (pipe.text_encoders, pipe.tokenizers) == (["first", "second"], ["tokenizer one", "tokenizer two"])


# ---- sessions -----------------------------------------------------------------------------------------------------


def typed(monkeypatch: pytest.MonkeyPatch, text: str, draw=None, **options: object) -> list[list[ImagePrompt]]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    found: list[list[ImagePrompt]] = []

    def take(line: list[ImagePrompt]) -> None:
        found.append(line)
        if draw is not None:
            draw(line)

    prompts(interactive=True, **options).session(take)
    return found


def test_interactive_takes_lines_until_the_end(monkeypatch, capsys):
    found = typed(monkeypatch, "a cat\n\n--n only options\n  \na dog --w 128 --d 5\n", seed=3, n_iter=4)
    assert [line[0].prompt for line in found] == ["a cat", "a dog"]
    assert [line[0].seed for line in found] == [drawn(3, 1)[0], 5]
    assert [line[0].number for line in found] == [0, 1]
    assert capsys.readouterr().out.count("Type prompt:") == 6


def test_interactive_survives_mistakes_and_ctrl_c(monkeypatch, capsys):
    def draw(line: list[ImagePrompt]) -> None:
        if line[0].prompt == "stop":
            raise KeyboardInterrupt
        if line[0].prompt == "bad":
            raise UserError("No such thing.")
        if line[0].prompt == "worse":
            raise ZeroDivisionError

    found = typed(monkeypatch, "a --w wide\na --d x\n{1-2-3$$a|b}\nbad\nstop\nworse\nb\n", draw)
    assert [line[0].prompt for line in found] == ["bad", "stop", "worse", "b"]
    out, trace = capsys.readouterr()
    assert "ZeroDivisionError" in trace and "the session continues" in out
    assert 'error: the prompt line: --w must be a whole number, not "wide".' in out
    assert "error: No such thing." in out and "stopped" in out


# ---- bad input ----------------------------------------------------------------------------------------------------


def test_nothing_to_draw():
    with pytest.raises(
        UserError, match="^Nothing to generate: give --prompt, --from_file, --from_module or --interactive"
    ):
        prompts()


@pytest.mark.parametrize("name", ["images_per_prompt", "batch_size", "n_iter"])
@pytest.mark.parametrize("value", [0, -1])
def test_numbers_that_cannot_be(name, value):
    with pytest.raises(UserError, match=f"--{name} must be at least 1, not {value}"):
        prompts(prompt="a", **{name: value})


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_a_seed_of_more_than_64_bits(seed):
    with pytest.raises(UserError, match="--seed .* does not fit into 64 bits"):
        prompts(prompt="a", seed=seed)


def test_files_that_hold_no_prompts(tmp_path, file):
    with pytest.raises(UserError, match="--from_file: there is no file"):
        prompts(from_file=str(tmp_path / "missing.txt"))
    with pytest.raises(UserError, match="holds no prompts"):
        prompts(from_file=file("", "# nothing"))
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        prompts(from_file=str(tmp_path / "bytes.txt"))
    with pytest.raises(UserError, match="--from_module: there is no file"):
        prompts(from_module=str(tmp_path / "missing.py"))
    with pytest.raises(UserError, match="prompts.JSON must be a text file with one prompt line on each line"):
        prompts(from_file=str(tmp_path / "prompts.JSON"))
    with pytest.raises(UserError, match=r"must be a Python file"):
        prompts(from_module=file("a"))


@pytest.mark.parametrize(
    "line, sentence",
    [
        ("c --w 100", "--w must be a positive multiple of 8"),
        ("c --d 1,x", "--d must be whole numbers"),
        ("c {1-2-3$$a|b}", "must be a number or a range"),
        ("c --s {e$$1|x}", "--s must be a whole number"),
    ],
)
def test_every_line_is_checked_ahead_with_its_place(file, line, sentence):
    path = file("a", "", line)
    with pytest.raises(UserError, match=rf"{Path(path).name}, line 3: .*{sentence}"):
        prompts(from_file=path).check()


def test_features_check_every_line_and_every_image_of_dynamic_ones(file):
    seen: list[tuple[str, str]] = []
    found = prompts(from_file=file("a", "{e$$b|c}"), images_per_prompt=2)
    found.check(lambda image, place: seen.append((image.prompt, place.rsplit(", ", 1)[1])))
    assert seen == [("a", "line 1: "), *[("b", "line 2: "), ("c", "line 2: ")] * 2]


def test_an_unknown_option_is_warned_of_once(file, caplog):
    found = prompts(from_file=file("a --x 3", "b --x 3"), images_per_prompt=2, n_iter=3)
    found.check()
    assert len(list(found)) == 6
    assert caplog.text.count("is not a prompt option") == 2
