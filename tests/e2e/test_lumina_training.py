"""lumina_train_network.py: what only this family does, through the command line."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from library.training.objective.flow_matching import FlowMatchingOptions, sample_sigmas, sigma_table
from lumina_train_network import LuminaFlowOptions
from tests.families.lumina import lumina_options
from tests.running import run_in_process, toml_value
from tools.make_tiny_models import LUMINA

Train = Callable[..., str]


@pytest.fixture(scope="module")
def images(image_folder, tmp_path_factory) -> Path:
    """Four images with captions of different lengths, beside which caches may be written."""
    folder = tmp_path_factory.mktemp("lumina_images")
    for number in range(4):
        shutil.copy(image_folder / f"{number:02d}.png", folder)
        (folder / f"{number:02d}.txt").write_text("a cat" + " and a dog" * number, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def train(tiny_lumina, images) -> Train:
    """Run the script into a folder; returns what it said."""
    dataset = images.parent / "lumina.toml"
    dataset.write_text(
        "[[datasets]]\nresolution = 64\nbatch_size = 2\nenable_bucket = true\n"
        "min_bucket_reso = 64\nmax_bucket_reso = 64\n"
        "[[datasets.subsets]]\n"
        f'image_dir = {toml_value(images.as_posix())}\ncaption_extension = ".txt"\n',
        encoding="utf-8",
    )

    def run(folder: Path, *arguments: object) -> str:
        done = run_in_process(
            "lumina_train_network.py",
            *(*lumina_options(tiny_lumina), "--dataset_config", dataset, "--output_dir", folder, "--no_report"),
            *("--max_data_loader_n_workers", "0", "--max_train_steps", "2", "--output_name", "lora", *arguments),
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stderr

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "lora.safetensors")


def equal(one: Path, two: Path) -> bool:
    first, second = weights(one), weights(two)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def pixels(path: Path) -> numpy.ndarray:
    with Image.open(path) as image:
        return numpy.asarray(image.convert("RGB"), dtype=int)


PROMPTS = """a cat --w 64 --h 64 --s 3 --d 1
a very small dog in a red hat --w 64 --h 64 --s 3 --d 2 --n blurry
a bird --w 100 --h 64 --s 3 --d 3
a fish --w 64 --h 64 --s 3 --d 4 --ctr 1 --rcfg 0
a horse --w 64 --h 64 --s 3 --d 5
"""


def test_images_that_are_drawn_together_are_those_drawn_alone(train, tmp_path, monkeypatch):
    """Captions differ in length, seeds differ; prompts with other sizes or guidance don't come into the batch."""
    from library.models.lumina.transformer import LuminaTransformer

    prompts = tmp_path / "prompts.txt"
    prompts.write_text(PROMPTS, encoding="utf-8")
    batches: list[int] = []
    forward = LuminaTransformer.forward

    def counted(self, latents, *rest):
        batches.append(len(latents))
        return forward(self, latents, *rest)

    monkeypatch.setattr(LuminaTransformer, "forward", counted)
    drawn = {}
    for size in (1, 2):
        batches.clear()
        folder = tmp_path / str(size)
        said = train(
            *(folder, "--sample_prompts", prompts, "--sample_at_first", "--sample_batch_size", size),
            *("--max_train_steps", "1", "--network_train_unet_only", "--sample_every_n_epochs", "9"),
        )
        assert "prompt 3: 100x64 is rounded to 96x64" in said
        drawn[size] = [pixels(path) for path in sorted((folder / "sample").glob("*.png"))]
        assert set(batches[:-1]) == ({1, 2} if size == 1 else {1, 2, 4})  # with guidance twice as many
        assert batches[-1] == 2  # the training step
    assert len(drawn[1]) == len(drawn[2]) == 5
    for alone, together in zip(drawn[1], drawn[2]):
        assert abs(alone - together).max() <= 1
    assert abs(drawn[1][0] - drawn[1][1]).max() > 8  # of different prompts and seeds


def test_a_batch_that_fails_is_drawn_one_by_one(train, tmp_path, monkeypatch):
    from library.models.lumina.pipeline import LuminaPipeline

    prompts = tmp_path / "prompts.txt"
    prompts.write_text(PROMPTS, encoding="utf-8")
    generate = LuminaPipeline.generate_batch

    def too_large(self, requests, **arguments):
        if len(requests) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return generate(self, requests, **arguments)

    monkeypatch.setattr(LuminaPipeline, "generate_batch", too_large)
    given = ["--sample_prompts", prompts, "--sample_every_n_steps", "1", "--max_train_steps", "1"]
    said = train(tmp_path, *given, "--sample_batch_size", "3")
    assert "3 sample images together failed: " in said and "Each is generated alone." in said
    assert len(list((tmp_path / "sample").glob("*.png"))) == 5 and (tmp_path / "lora.safetensors").is_file()


def test_another_system_prompt_makes_cached_captions_anew(train, images, tmp_path):
    cached = ("--cache_text_encoder_outputs_to_disk", "--network_train_unet_only")
    first = train(tmp_path / "1", *cached)
    assert re.search(r"text encoder cache: 0 kept, 4 made", first)
    entry = next(images.glob("*_lumina_te.npz"))
    with numpy.load(entry) as arrays:
        assert arrays["hidden_state"].shape == (32, LUMINA.text_dim)
        assert arrays["hidden_state"].dtype == numpy.float32
        assert arrays["attention_mask"].shape == arrays["input_ids"].shape == (32,)
        assert arrays["attention_mask"].dtype == arrays["input_ids"].dtype == numpy.int64
    assert re.search(r"text encoder cache: 4 kept, 0 made", train(tmp_path / "2", *cached))
    assert equal(tmp_path / "1", tmp_path / "2")
    other = train(tmp_path / "3", *cached, "--system_prompt", "Draw well.")
    assert re.search(r"text encoder cache: 0 kept, 4 made", other)
    assert not equal(tmp_path / "1", tmp_path / "3")


def test_the_system_prompt_goes_before_positive_prompts_alone(tiny_lumina):
    from library.models.lumina.pipeline import LuminaFiles, LuminaPipeline

    files = LuminaFiles(tiny_lumina.transformer, tiny_lumina.gemma2, tiny_lumina.autoencoder)
    told = LuminaPipeline(files, torch.float32, "cpu", system_prompt="Draw well.", gemma2_max_token_length=24)
    plain = LuminaPipeline(files, torch.float32, "cpu", gemma2_max_token_length=24)
    texts = told.encode_texts([("a cat", "positive"), ("a cat", "negative")])
    expected = plain.encode_prompts(["Draw well. <Prompt Start> a cat", "a cat"])
    for row, role in enumerate(("positive", "negative")):
        assert torch.equal(texts["a cat", role]["input_ids"][0], expected["input_ids"][row])
    both = LuminaPipeline(
        files, torch.float32, "cpu", system_prompt="Draw well.", gemma2_max_token_length=24,
        system_prompt_in_negative=True,
    )  # fmt: skip
    assert torch.equal(both.encode_prompts(["a cat"], role="negative")["input_ids"][0], expected["input_ids"][0])


def test_sage_attention_draws_and_does_not_train(train, tmp_path, monkeypatch):
    """A package of that name with PyTorch's attention behind it, which counts its calls and has no backward pass."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "sageattention.py").write_text(
        "import torch\n\ncalls = 0\n\n\n@torch.no_grad()\ndef sageattn(q, k, v, tensor_layout='HND', **given):\n"
        "    global calls\n    calls += 1\n"
        "    q, k, v = (t.transpose(1, 2) if tensor_layout == 'NHD' else t for t in (q, k, v))\n"
        "    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)\n"
        "    return out.transpose(1, 2) if tensor_layout == 'NHD' else out\n\n\nsageattn_varlen = None\n",
        encoding="utf-8",
    )
    monkeypatch.setitem(sys.modules, "sageattention", None)  # whatever is imported goes again with this test
    del sys.modules["sageattention"]
    monkeypatch.syspath_prepend(tmp_path / "package")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2 --d 1 --l 1\n", encoding="utf-8")
    given = ["--sample_prompts", prompts, "--sample_every_n_steps", "1"]
    said = train(tmp_path / "sage", *given, "--use_sage_attn")
    train(tmp_path / "plain", *given)
    import sageattention

    assert "it has no backward pass, so sdpa attention trains" in said
    assert sageattention.calls > 0
    assert equal(tmp_path / "sage", tmp_path / "plain")


def test_luminas_table_follows_the_flow_shift():
    generators = [torch.Generator().manual_seed(number) for number in range(200)]
    for shift in (6.0, 2.0):
        options = LuminaFlowOptions(timestep_sampling="sigma", discrete_flow_shift=shift)
        assert torch.isin(sample_sigmas(options, generators, 1), sigma_table(shift)).all()


def test_defaults_are_those_of_the_guide():
    changed = {"timestep_sampling": "shift", "model_prediction_type": "raw", "discrete_flow_shift": 6.0}
    assert vars(LuminaFlowOptions()) == vars(FlowMatchingOptions()) | changed
