"""The files of gen_img.py: names, the text in them, --skip_existing, --grid and --report."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from library.errors import UserError
from library.generation.image_files import SUFFIXES, UsedLora, text_in_image
from library.generation.image_outputs import ImageOutputOptions, ImageOutputs, image_record
from library.generation.image_pages import contact_sheet
from library.generation.image_prompts import ImagePrompt
from library.generation.prompt_sources import ImagePromptOptions, ImagePrompts
from library.generation.recorded_prompts import recorded_line, recorded_lines
from library.html_pages import read_page_data
from tests.generation.test_image_files import web_ui_reading

DEFAULTS = ImagePrompt(width=64, height=64, sample_steps=2, scale=7.5, sample_sampler="k_euler_a")


def lines_of(tmp_path: Path, *lines: str, **options: object) -> ImagePrompts:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return ImagePrompts(ImagePromptOptions(from_file=str(path), **{"seed": 1, **options}), DEFAULTS)


def record(image: ImagePrompt, **arguments: object):
    return image_record("gen_img.py", image, "model.safetensors", "0123abcd", **{"sizes": False, **arguments})


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (16, 8), (number, 100, 0))


def draw(outputs: ImageOutputs, prompts: ImagePrompts, most: int = 1000) -> list[Path]:
    """Draw at most so many images; their files."""
    paths: list[Path] = []
    with outputs:
        for line in prompts:
            for image in outputs.wanted(line):
                if len(paths) == most:
                    return paths
                paths.append(outputs.save(picture(image.number), image, record(image)))
    return paths


@pytest.fixture
def outputs(tmp_path):
    """The outputs of a run with these options."""

    def make(start: tuple[Path, ...] = (), stage: int = 0, **options: object) -> ImageOutputs:
        image = (lambda number: start[number % len(start)]) if start else None
        return ImageOutputs(ImageOutputOptions(outdir=str(tmp_path / "out"), **options), image, stage)

    return make


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


# ---- names --------------------------------------------------------------------------------------------------------


def test_without_options_names_are_moment_place_in_batch_and_seed(outputs, tmp_path):
    run = outputs()
    (line,) = lines_of(tmp_path, "a --d 5,6", images_per_prompt=2)
    run.wanted(line)
    paths = [run.save(picture(0), image, record(image), position) for position, image in enumerate(line)]
    assert [re.sub(r"_\d{14}_", "_TIME_", name) for name in names(paths)] == ["im_TIME_000_5.png", "im_TIME_001_6.png"]
    assert all(path.parent == tmp_path / "out" for path in paths), "outdir"


def test_sequential_file_name_counts_on_over_iterations(outputs, tmp_path):
    paths = draw(outputs(sequential_file_name=True), lines_of(tmp_path, "a", "b", n_iter=2))
    assert names(paths) == [f"im_{number:06d}.png" for number in (1, 2, 3, 4)]


@pytest.mark.parametrize("options, first, second", [({}, r"_0000_\d+", r"_1000_\d+"), (None, "0000001", "1000001")])
def test_the_stages_of_highres_fix_have_a_digit(outputs, tmp_path, options, first, second):
    run = outputs(stage=2, sequential_file_name=options is None)
    ((image,),) = lines_of(tmp_path, "a")
    run.wanted([image])
    small = run.save_first_stage(picture(0), image, record(image))
    large = run.save(picture(1), image, record(image))
    assert re.fullmatch(rf"im(_\d{{14}})?_?{first.lstrip('_')}\.png", small.name)
    assert re.fullmatch(rf"im(_\d{{14}})?_?{second.lstrip('_')}\.png", large.name)


def test_use_original_file_name_and_its_repeats(outputs, tmp_path):
    start = (Path("x/cat.jpg"), Path("x/dog.v2.webp"))
    paths = draw(outputs(start, use_original_file_name=True), lines_of(tmp_path, "a", "b", "c"))
    assert names(paths) == ["cat.png", "dog.v2.png", "cat_001.png"]


def test_f_names_the_file_and_those_that_follow_get_a_number(outputs, tmp_path):
    lines = ["a --f one.png", "b --f sub/two.webp", "c --f v1.5", "d --f ONE.png", "e --f one_001.png"]
    run = outputs(sequential_file_name=True)
    paths = draw(run, lines_of(tmp_path, *lines, images_per_prompt=2))
    relative = [path.relative_to(tmp_path / "out").as_posix() for path in paths]
    assert relative == [
        *("one.png", "one_001.png", "sub/two.webp", "sub/two_001.webp", "v1.5.png", "v1.5_001.png"),
        *("ONE_002.png", "ONE_003.png", "one_001_001.png", "one_001_002.png"),
    ]


@pytest.mark.parametrize(
    "name", ["../a.png", "/a.png", "C:\\a.png", "x/../../a.png", "..", "", "a\x07b", "\\a", "x" * 300]
)
def test_f_stays_within_the_output_folder(tmp_path, name):
    with pytest.raises(UserError, match=r"line 1: --f must name a file within --outdir"):
        list(lines_of(tmp_path, f"a --f {name}"))


def test_no_file_is_replaced(outputs, tmp_path, caplog):
    first = draw(outputs(sequential_file_name=True), lines_of(tmp_path, "a", "b"))
    pixels = [path.read_bytes() for path in first]
    second = draw(outputs(sequential_file_name=True), lines_of(tmp_path, "c --d 3", "d --f im_000002.png"))
    assert names(second) == ["im_000001_001.png", "im_000002_001.png"]
    assert [path.read_bytes() for path in first] == pixels
    assert "im_000001.png is there already; the image is im_000001_001.png" in caplog.text


def test_images_of_the_same_moment_have_names_of_their_own(outputs, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("time.strftime", lambda form: "20300102030405")
    paths = draw(outputs(), lines_of(tmp_path, "a --d 7", n_iter=2))
    assert names(paths) == ["im_20300102030405_000_7.png", "im_20300102030405_000_7_001.png"]
    assert caplog.text == ""


# ---- text ---------------------------------------------------------------------------------------------------------

FULL = ImagePrompt(
    prompt='a "cat" 猫, {night}',
    negative_prompt="blurry: dark",
    width=64,
    height=64,
    seed=2**63,
    sample_steps=20,
    scale=4.0,
    sample_sampler="k_euler_a",
    negative_scale=2.0,
    strength=0.5,
    clip_prompt="cat",
    raw_prompt='a "cat" --nl 2',
    original_height=100,
)


def saved(tmp_path: Path, name: str, **arguments: object) -> Path:
    run = ImageOutputs(ImageOutputOptions(outdir=str(tmp_path)))
    image = ImagePrompt(**{**vars(FULL), "file_name": name})
    run.wanted([image])
    return run.save(picture(7), image, record(image, **arguments))


def test_the_keys_in_a_png(tmp_path):
    text = text_in_image(saved(tmp_path, "x.png", loras=[UsedLora("l.safetensors", 0.5, "f" * 64)]))
    expected = {
        "prompt": FULL.prompt,
        "negative-prompt": "blurry: dark",
        "seed": str(2**63),
        "sampler": "k_euler_a",
        "steps": "20",
        "scale": "4.0",
        "negative-scale": "2.0",
        "clip-prompt": "cat",
        "raw-prompt": 'a "cat" --nl 2',
        "strength": "0.5",
    }
    assert {key: text[key] for key in expected} == expected
    assert not [key for key in text if key.startswith(("original", "crop"))], "of XL only"


def test_sizes_of_xl_are_written_as_none_where_they_are_not_given(tmp_path):
    text = text_in_image(saved(tmp_path, "x.png", sizes=True))
    assert (text["original-height"], text["original-width"], text["crop-top"]) == ("100", "None", "None")
    assert (text["original-height-negative"], text["original-width-negative"]) == ("None", "None")
    assert text["crop-left"] == "None"


def test_what_is_not_given_is_left_out(tmp_path):
    run = ImageOutputs(ImageOutputOptions(outdir=str(tmp_path), sequential_file_name=True))
    run.wanted([DEFAULTS])
    text = text_in_image(run.save(picture(0), DEFAULTS, record(DEFAULTS)))
    assert not {"negative-scale", "clip-prompt", "strength", "raw-prompt", "negative-prompt"} & text.keys()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_web_uis_text_in_every_format(tmp_path, suffix):
    path = saved(tmp_path, f"x{suffix}")
    values = web_ui_reading(text_in_image(path)["parameters"])
    assert (values["prompt"], values["negative"]) == (FULL.prompt, "blurry: dark")
    assert (values["Sampler"], values["Steps"], values["Denoising strength"]) == ("Euler a", "20", "0.5")
    with Image.open(path) as image:
        assert image.format == {".png": "PNG", ".webp": "WEBP"}.get(suffix, "JPEG")
        assert max(abs(a - b) for a, b in zip(image.convert("RGB").getpixel((5, 5)), (7, 100, 0))) < 3


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_metadata(tmp_path, suffix):
    run = ImageOutputs(ImageOutputOptions(outdir=str(tmp_path), no_metadata=True))
    image = ImagePrompt(**{**vars(FULL), "file_name": f"x{suffix}"})
    run.wanted([image])
    assert text_in_image(run.save(picture(0), image, record(image))) == {}


# ---- prompts of images ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_recorded_prompt_is_read_as_it_was(tmp_path, suffix):
    lines = recorded_lines([saved(tmp_path, f"x{suffix}", loras=[UsedLora("l.safetensors", 0.5, "f")])])
    ((image,),) = ImagePrompts(ImagePromptOptions(), DEFAULTS, lines)
    assert (image.prompt, image.negative_prompt, image.dynamic) == (FULL.prompt, "blurry: dark", False)
    assert image.seed != FULL.seed and image.sample_steps == 2, "only the prompts are taken"


def write_text_chunk(path: Path, **chunks: str) -> Path:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in chunks.items():
        info.add_text(key, value)
    picture(0).save(path, pnginfo=info)
    return path


def test_prompts_of_a_web_ui(tmp_path):
    text = "a cat,\n<lora:x:0.8> sun --w 9\nNegative prompt: bad,\nworse\nSteps: 20, Sampler: Euler a, Seed: 1"
    assert recorded_line(write_text_chunk(tmp_path / "a.png", parameters=text)) == "a cat, sun - -w 9 --n bad, worse"
    assert recorded_line(write_text_chunk(tmp_path / "b.png", parameters="a cat")) == "a cat"


def test_images_without_a_prompt(tmp_path):
    for chunks in ({}, {"prompt": '{"3": {"class_type": "KSampler"}}', "workflow": "{}"}):
        path = write_text_chunk(tmp_path / "x.png", **chunks)
        with pytest.raises(UserError, match=r"--image_path: .*x.png holds no prompt; give --prompt or --from_file"):
            recorded_line(path)
    (tmp_path / "y.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"y.png: not an image in a known format"):
        recorded_line(tmp_path / "y.png")


# ---- runs that go on ------------------------------------------------------------------------------------------------


def test_skip_existing_draws_what_is_missing(outputs, tmp_path):
    prompts = lines_of(tmp_path, "a", "b --f b.webp", "{c|d}", images_per_prompt=2, n_iter=2)
    first = draw(outputs(skip_existing=True), prompts, most=5)
    assert outputs(skip_existing=True).existing(prompts) == 5 and outputs().existing(prompts) == 0
    first[1].unlink()
    second = draw(
        outputs(skip_existing=True), lines_of(tmp_path, *["a", "b --f b.webp", "{c|d}"], images_per_prompt=2, n_iter=2)
    )
    expected = ["im_000001.png", "im_000002.png", "b.webp", "b_001.webp", "im_000005.png", "im_000006.png"]
    expected += ["im_000007.png", "im_000008.png", "b_002.webp", "b_003.webp", "im_000011.png", "im_000012.png"]
    assert names(first) == expected[:5]
    assert names(second) == [expected[1], *expected[5:]]
    assert draw(outputs(skip_existing=True), prompts) == []


def test_skip_existing_keeps_the_names_of_start_images(outputs, tmp_path):
    start = (Path("cat.jpg"), Path("dog.jpg"))
    options = {"use_original_file_name": True, "skip_existing": True}
    draw(outputs(start, **options), lines_of(tmp_path, "a", "b", "c"), most=1)
    assert names(draw(outputs(start, **options), lines_of(tmp_path, "a", "b", "c"))) == ["dog.png", "cat_001.png"]


def test_skip_existing_refuses_the_images_of_other_prompts(outputs, tmp_path):
    draw(outputs(sequential_file_name=True), lines_of(tmp_path, "a", "b"))
    run, other = outputs(skip_existing=True), lines_of(tmp_path, "a", "c")
    with pytest.raises(
        UserError, match=r"--skip_existing: .*im_000002.png has another prompt than image 2 of this run"
    ):
        run.existing(other)
    with pytest.raises(UserError, match="another prompt than image 2"):
        draw(run, other)


def test_options_that_have_no_effect_are_named(outputs, caplog):
    caplog.set_level("INFO")
    outputs(use_original_file_name=True)
    outputs((Path("a.png"),), use_original_file_name=True, sequential_file_name=True)
    outputs(skip_existing=True)
    assert "--use_original_file_name has no effect without --image_path" in caplog.text
    assert "--sequential_file_name has no effect with --use_original_file_name" in caplog.text
    assert "--skip_existing: images are numbered" in caplog.text


# ---- grid and report ------------------------------------------------------------------------------------------------


def test_grid_has_a_row_for_each_prompt_line(outputs, tmp_path):
    draw(outputs(grid=True), lines_of(tmp_path, "a", "{e$$b|c|d}", images_per_prompt=2))
    with Image.open(tmp_path / "out" / "grid.png") as sheet:
        assert sheet.size == (6 * 16 + 5 * 4, 2 * 8 + 4)
        cells = [[sheet.getpixel((x * 20 + 8, y * 12 + 4)) for x in range(6)] for y in range(2)]
    assert cells[0] == [(0, 100, 0), (1, 100, 0), *[(255, 255, 255)] * 4]
    assert cells[1] == [(number, 100, 0) for number in range(2, 8)]


def test_grid_of_single_images_is_a_square_and_another_run_adds_another(outputs, tmp_path):
    for name in ("grid.png", "grid_001.png"):
        draw(outputs(grid=True), lines_of(tmp_path, *"abcde"))
        with Image.open(tmp_path / "out" / name) as sheet:
            assert sheet.size == (3 * 16 + 8, 2 * 8 + 4)


def test_large_images_are_shrunk_and_missing_ones_leave_their_cell_empty(tmp_path):
    Image.new("RGB", (2000, 1000), "red").save(tmp_path / "a.png")
    Image.new("RGB", (1000, 1000), "blue").save(tmp_path / "b.png")
    sheet = contact_sheet([[tmp_path / "a.png", tmp_path / "b.png", tmp_path / "gone.png"]])
    assert sheet.size == (3 * 512 + 8, 256)
    assert [sheet.getpixel((x, 128)) for x in (10, 520, 516 + 256, 1040 + 256)] == [
        (255, 0, 0),
        (255, 255, 255),
        (0, 0, 255),
        (255, 255, 255),
    ]


def test_report_names_every_image_with_its_prompt_and_settings(outputs, tmp_path):
    paths = draw(outputs(report=True), lines_of(tmp_path, "a <b> --n bad", "{e$$c|d}", images_per_prompt=1))
    data = read_page_data(tmp_path / "out" / "report.html")
    assert [[card["prompt"] for card in line] for line in data["lines"]] == [["a <b>"], ["c", "d"]]
    first = data["lines"][0][0]
    assert (first["name"], first["link"], first["negative"]) == (paths[0].name, paths[0].name, "bad")
    assert first["settings"].keys() == {"seed", "sampler", "steps", "scale", "model"} and first["size"] == [16, 8]
    assert first["image"].startswith("data:image/")


def test_report_and_grid_show_skipped_images_too_and_are_there_after_an_error(outputs, tmp_path):
    prompts = lines_of(tmp_path, "a", "b", "c")
    with pytest.raises(KeyboardInterrupt), outputs(skip_existing=True, report=True, grid=True) as run:
        for line in prompts:
            for image in run.wanted(line):
                run.save(picture(image.number), image, record(image))
            if line[0].prompt == "b":
                raise KeyboardInterrupt
    page = tmp_path / "out" / "report.html"
    assert [[card["prompt"] for card in line] for line in read_page_data(page)["lines"]] == [["a"], ["b"]]
    draw(outputs(skip_existing=True, report=True, grid=True), prompts)
    assert [line[0]["prompt"] for line in read_page_data(page)["lines"]] == ["a", "b", "c"]
    assert read_page_data(page)["lines"][0][0]["settings"]["seed"] == str(next(iter(prompts))[0].seed)


def test_a_run_that_goes_on_replaces_its_grid(outputs, tmp_path):
    prompts = lines_of(tmp_path, "a", "b")
    for most in (1, 2):
        draw(outputs(skip_existing=True, grid=True), prompts, most)
    assert [path.name for path in (tmp_path / "out").glob("grid*")] == ["grid.png"]
    with Image.open(tmp_path / "out" / "grid.png") as sheet:
        assert sheet.size == (2 * 16 + 4, 8)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"skip_existing": True}, "the same command generates the missing images"),
        ({"sequential_file_name": True}, "the same command with --skip_existing generates the missing images"),
        ({}, None),
    ],
)
def test_an_interrupted_run_says_how_to_go_on(outputs, tmp_path, caplog, options, said):
    caplog.set_level("INFO")
    with pytest.raises(KeyboardInterrupt), outputs(**options) as run:
        for line in lines_of(tmp_path, "a", "b"):
            run.wanted(line)
            run.save(picture(0), line[0], record(line[0]))
            raise KeyboardInterrupt
    assert said in caplog.text if said else "the same command" not in caplog.text
    caplog.clear()
    draw(outputs(**options), lines_of(tmp_path, "a", "b"))
    assert "the same command" not in caplog.text
    assert ("1 of 2 images already exist" in caplog.text) is False
    outputs(skip_existing=True).existing(lines_of(tmp_path, "a", "b", "c"))
    assert ("2 of 3 images already exist" in caplog.text) is bool(options)


def test_the_page_grows_while_images_are_drawn(outputs, tmp_path, monkeypatch):
    monkeypatch.setattr("library.generation.image_pages.EVERY", 0.0)
    run = outputs(report=True)
    for line in lines_of(tmp_path, "a", "b"):
        run.wanted(line)
        run.save(picture(0), line[0], record(line[0]))
        assert len(read_page_data(tmp_path / "out" / "report.html")["lines"]) == line[0].number + 1


def test_many_images_are_linked_instead_of_embedded(outputs, tmp_path, monkeypatch):
    monkeypatch.setattr("library.generation.image_pages.MOST_EMBEDDED", 100)
    paths = draw(outputs(report=True), lines_of(tmp_path, "a", "b", "c"))
    cards = [line[0] for line in read_page_data(tmp_path / "out" / "report.html")["lines"]]
    assert [card["image"].startswith("data:") for card in cards] == [True, False, False]
    assert cards[2]["image"] == cards[2]["link"] == paths[2].name


# ---- files that cannot be written -----------------------------------------------------------------------------------


def test_an_output_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="^--outdir: cannot write in"):
        ImageOutputs(ImageOutputOptions(outdir=str(tmp_path / "file")))


def test_an_image_that_cannot_be_written_is_named(outputs, tmp_path):
    run = outputs()
    (tmp_path / "out" / "file").write_text("", encoding="utf-8")
    ((image,),) = lines_of(tmp_path, "a --f file/x.png")
    run.wanted([image])
    with pytest.raises(UserError, match=r"x.png: cannot be written"):
        run.save(picture(0), image, record(image))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]
