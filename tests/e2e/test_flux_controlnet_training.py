"""A LoRA trained together with a frozen ControlNet: control images from the dataset, samples with ``--cn``."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from flux_train_network import FluxNetworkTrainer, FluxTrainingOptions
from library.errors import UserError
from library.models.loading import LoadSpec
from library.options import parse_options
from tests.e2e.test_flux_training_options import SMALL
from tests.running import forget_accelerator, run_in_process
from tools.cache_run import run_tool
from tools.make_tiny_controlnet import make_tiny_controlnet

OPTION = "--controlnet_model_name_or_path"


@pytest.fixture
def run(flux_command, dataset_toml, control_folder, tmp_path):
    """Train a step in this process; ``control`` is the folder of control images. Returns the trainer."""

    def train(
        *arguments: object, control: Path | None = control_folder, steps: int = 1, output: str = "out", **dataset
    ):
        forget_accelerator()
        if control is not None:
            dataset["subset"] = {"conditioning_data_dir": control.as_posix(), **dataset.get("subset", {})}
        given = [*flux_command, "--max_train_steps", steps, "--output_dir", tmp_path / output]
        given += ["--dataset_config", dataset_toml(**(SMALL | dataset)), "--max_data_loader_n_workers", "0", *arguments]
        trainer = FluxNetworkTrainer.of(parse_options(FluxTrainingOptions, "test", [str(value) for value in given]))
        trainer.train()
        return trainer

    return train


def weights(tmp_path: Path, output: str) -> dict[str, torch.Tensor]:
    return load_file(tmp_path / output / "last.safetensors")


def differ(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(first[key], second[key]) for key in first)


def test_training_through_the_command_line(flux_command, dataset_toml, control_folder, tiny_controlnet, tmp_path):
    """As a user does it, with cached latents and captions, sample images, checkpointing, and options from a file."""
    subset = {"conditioning_data_dir": control_folder.as_posix(), "flip_aug": True}
    prompts = tmp_path / "prompts.txt"
    control = sorted(control_folder.glob("*.png"))[0]
    prompts.write_text(
        f"a circle --w 64 --h 64 --s 2 --d 1 --cn {control}\na ring --w 64 --h 64 --s 2\n", encoding="utf-8"
    )
    finished = run_in_process(
        "flux_train_network.py",
        *(*flux_command, "--dataset_config", dataset_toml(subset=subset, **SMALL), "--output_dir", tmp_path / "out"),
        *(OPTION, tiny_controlnet, "--max_train_steps", "1", "--network_train_unet_only", "--gradient_checkpointing"),
        *("--cache_latents", "--cache_text_encoder_outputs", "--mixed_precision", "bf16", "--fp8_base"),
        *("--sample_prompts", prompts, "--sample_every_n_steps", "1"),
    )
    assert finished.returncode == 0, finished.stderr
    assert "no effect in sample prompts" not in finished.stdout + finished.stderr
    assert len(list((tmp_path / "out" / "sample").glob("*.png"))) == 2
    assert all(key.startswith("lora_unet_") for key in weights(tmp_path, "out"))
    with safe_open(tmp_path / "out" / "last.safetensors", "pt") as file:
        assert file.metadata()["ss_controlnet"] == "controlnet.safetensors"


@pytest.mark.parametrize("kind", ["xlabs", pytest.param("instantx", marks=pytest.mark.thorough)])
def test_the_controlnet_changes_what_is_learned_and_stays_as_it_is(run, tmp_path, kind):
    path = make_tiny_controlnet(tmp_path / "net", "diffusers", kind)
    without = run(control=None, output="without")
    trainer = run(OPTION, path, output="with")
    assert trainer.progress.record.average != without.progress.record.average
    assert differ(weights(tmp_path, "with"), weights(tmp_path, "without"))
    controlnet = trainer.pipeline.modules["controlnet"]
    assert not controlnet.training and not any(parameter.requires_grad for parameter in controlnet.parameters())
    assert all(parameter.grad is None for parameter in controlnet.parameters())
    fresh = trainer.pipeline.files.controlnet.load(LoadSpec.of(torch.float32)).state_dict()
    assert all(torch.equal(value, fresh[key]) for key, value in controlnet.state_dict().items())


def test_a_union_controlnet_is_trained_with_in_one_of_its_modes(run, tmp_path):
    path = make_tiny_controlnet(tmp_path / "net", "diffusers", "union")
    for mode in (0, 1):
        run(OPTION, path, "--controlnet_mode", mode, output=str(mode))
    assert differ(weights(tmp_path, "0"), weights(tmp_path, "1"))


def test_both_layouts_of_the_same_weights_train_the_same(run, tmp_path, tiny_controlnet):
    run(OPTION, tiny_controlnet, output="original")
    run(OPTION, make_tiny_controlnet(tmp_path / "net", "diffusers"), output="diffusers")
    assert not differ(weights(tmp_path, "original"), weights(tmp_path, "diffusers"))


def test_an_untrained_controlnet_changes_nothing(run, tmp_path):
    """Its outputs are exactly zero, and taking part draws no random number."""
    run(control=None, steps=2, output="without")
    for kind in ("xlabs", "instantx"):
        run(OPTION, make_tiny_controlnet(tmp_path / kind, "diffusers", kind, zero=True), steps=2, output=kind)
        assert not differ(weights(tmp_path, "without"), weights(tmp_path, kind))


def test_the_control_images_matter(run, tmp_path, tiny_controlnet, control_folder):
    other = tmp_path / "other"
    other.mkdir()
    for path in control_folder.glob("*.png"):
        with Image.open(path) as image:
            Image.new("RGB", image.size, "red").save(other / path.name)
    run(OPTION, tiny_controlnet, output="first")
    run(OPTION, tiny_controlnet, control=other, output="second")
    assert differ(weights(tmp_path, "first"), weights(tmp_path, "second"))


@pytest.mark.thorough
def test_gradient_checkpointing_changes_no_result(run, tmp_path, tiny_controlnet):
    run(OPTION, tiny_controlnet, output="plain")
    run(OPTION, tiny_controlnet, "--gradient_checkpointing", output="checkpointed")
    first, second = weights(tmp_path, "plain"), weights(tmp_path, "checkpointed")
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", ["xlabs", "instantx"])
def test_cached_latents_go_with_control_images(run, tmp_path, kind):
    """Control images aren't cached: they follow each item, mirrored where it is. The autoencoder stays if needed."""
    path = make_tiny_controlnet(tmp_path / "net", "diffusers", kind)
    trainer = run(OPTION, path, "--cache_latents", subset={"flip_aug": True})
    assert ("autoencoder" in trainer.pipeline.modules) == (kind == "instantx")
    group = trainer.data.train
    cached = load_all(group)
    for item in group.items:
        item.latents = None
    for batch, decoded in zip(cached, load_all(group), strict=True):
        assert batch.latents is not None and decoded.latents is None and batch.flipped == decoded.flipped
        assert torch.equal(batch.conditioning_images, decoded.conditioning_images)
    assert {flipped for batch in cached for flipped in batch.flipped} == {True, False}


def load_all(group):
    """The batches of the first epoch."""
    return [group.load(plan, epoch=1, step=0, max_train_steps=2, seed=7) for plan in group.plan(1, 7)]


def test_the_caching_tools_take_the_same_dataset(
    run, flux_command, dataset_toml, control_folder, tmp_path, image_folder
):
    """Nothing of the ControlNet is in the caches; its file is not even opened."""
    folder = tmp_path / "images"
    shutil.copytree(image_folder, folder)
    config = dataset_toml(folder=folder, subset={"conditioning_data_dir": control_folder.as_posix()})
    given = ["--flux", *flux_command, "--dataset_config", config, OPTION, "anything"]
    report = run_tool("latents", "", [str(value) for value in given])
    assert report.made == len(list(folder.glob("*_flux.npz"))) == 12


def test_validation_and_regularisation_images_have_control_images_too(
    flux_command, image_folder, control_folder, tiny_controlnet, tmp_path
):
    common = f"image_dir = '{image_folder.as_posix()}'\nconditioning_data_dir = '{control_folder.as_posix()}'"
    reg, reg_control = tmp_path / "reg", tmp_path / "reg_control"
    for folder in (reg, reg_control):
        folder.mkdir()
        Image.new("RGB", (128, 128), "blue").save(folder / "a.png")
    config = tmp_path / "set.toml"
    config.write_text(
        "resolution = 64\nenable_bucket = true\nmin_bucket_reso = 64\nbucket_reso_steps = 32\nbatch_size = 2\n"
        f"[[datasets]]\n[[datasets.subsets]]\n{common}\nvalidation_split = 0.25\n"
        f"[[datasets.subsets]]\nimage_dir = '{reg.as_posix()}'\nis_reg = true\n"
        f"conditioning_data_dir = '{reg_control.as_posix()}'\n",
        encoding="utf-8",
    )
    given = [*flux_command, "--dataset_config", config, OPTION, tiny_controlnet, "--max_train_steps", "1"]
    given += ["--output_dir", tmp_path / "out", "--validate_every_n_steps", "1", "--max_data_loader_n_workers", "0"]
    trainer = FluxNetworkTrainer.of(parse_options(FluxTrainingOptions, "test", [str(value) for value in given]))
    trainer.train()
    assert trainer.progress.validation_losses and trainer.data.train.reg_image_count > 0


def test_masks_come_from_transparency_beside_control_images(
    run, tmp_path, image_folder, control_folder, tiny_controlnet, caplog
):
    caplog.set_level("INFO")
    clear = tmp_path / "clear"
    clear.mkdir()
    for path in image_folder.glob("*.png"):
        with Image.open(path) as image:
            image.putalpha(0)
            image.save(clear / path.name)
    trainer = run(OPTION, tiny_controlnet, "--masked_loss", folder=clear, subset={"alpha_mask": True})
    assert trainer.progress.record.average == 0.0 and "masks come from alpha_mask." in caplog.text
    trainer = run(OPTION, tiny_controlnet, "--masked_loss", output="plain")
    assert trainer.progress.record.average > 0 and "which no subset has: nothing is masked" in caplog.text


def test_samples_with_an_image_are_controlled_and_others_are_not(run, tmp_path, tiny_controlnet, control_folder):
    control = sorted(control_folder.glob("*.png"))[0]
    line = "a circle --w 64 --h 64 --s 2 --d 1"
    pictures = []
    for output, extra, text in (
        ("plain", [], line),
        ("uncontrolled", [OPTION, tiny_controlnet], line),
        ("controlled", [OPTION, tiny_controlnet], f"{line} --cn {control}"),
        ("guided", [OPTION, tiny_controlnet], f"{line} --cn {control} --l 3 --n ring"),
    ):
        prompts = tmp_path / f"{output}.txt"
        prompts.write_text(text, encoding="utf-8")
        arguments = [*extra, "--sample_prompts", prompts, "--sample_at_first"]
        run(*arguments, control=control_folder if extra else None, output=output, steps=1)
        (picture,) = (tmp_path / output / "sample").glob("*.png")
        pictures.append(picture.read_bytes())
    assert pictures[0] == pictures[1]
    assert len(set(pictures)) == 3


def test_the_dry_run_counts_the_controlnet(run, tiny_controlnet, caplog):
    caplog.set_level("INFO")
    run(OPTION, tiny_controlnet, "--dry_run", "--cache_latents")
    assert "controlnet" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "dataset", "words"),
    [
        ([], {"control": None}, r"dataset\.toml: .*number 1.*conditioning_data_dir is missing"),
        (["--controlnet_mode", "1"], {}, "--controlnet_mode is for union ControlNets"),
        (
            ["--sample_at_first", "--sample_prompts", "{prompts}"],
            {},
            r"prompts\.txt, prompt 2: control image: no\.png: there is no such image",
        ),
    ],
)
def test_what_is_missing_or_too_much_is_named(
    run, tmp_path, tiny_controlnet, control_folder, arguments, dataset, words
):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog --cn no.png\n", encoding="utf-8")
    with pytest.raises(UserError, match=words):
        run(OPTION, tiny_controlnet, *(str(part).format(prompts=prompts) for part in arguments), **dataset)


def test_images_without_a_control_image_are_listed(run, tmp_path, tiny_controlnet, control_folder):
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted(control_folder.glob("*.png"))[1:]:
        (few / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=r"1 images have no counterpart in .*few:\n  00\.png"):
        run(OPTION, tiny_controlnet, control=few)


def test_folders_on_the_command_line_cannot_bring_control_images(flux_command, image_folder, tiny_controlnet, tmp_path):
    (tmp_path / "train" / "1_a").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(tmp_path / "train" / "1_a" / "a.png")
    given = [*flux_command, "--train_data_dir", tmp_path / "train", "--resolution", "64", OPTION, tiny_controlnet]
    trainer = FluxNetworkTrainer(
        parse_options(FluxTrainingOptions, "test", [str(value) for value in [*given, "--output_dir", tmp_path]])
    )
    with pytest.raises(UserError, match="use --dataset_config with conditioning_data_dir in every subset"):
        trainer.train()


def test_chroma_takes_no_controlnet(chroma_command, dataset_toml, control_folder, tiny_controlnet, tmp_path):
    config = dataset_toml(subset={"conditioning_data_dir": control_folder.as_posix()})
    given = [*chroma_command, "--dataset_config", config, OPTION, tiny_controlnet, "--output_dir", tmp_path]
    trainer = FluxNetworkTrainer.of(parse_options(FluxTrainingOptions, "test", [str(value) for value in given]))
    with pytest.raises(UserError, match=f"{OPTION}: there are no ControlNets for Chroma"):
        trainer.train()


def test_only_the_lora_is_trained(run, tiny_controlnet):
    """The text encoder's LoRA too, but not by way of the ControlNet."""
    trainer = run(OPTION, tiny_controlnet, steps=1)
    for module in trainer.pipeline.modules.values():
        assert all(parameter.grad is None for parameter in module.parameters())
    trained = trainer.network.state_dict().items()
    assert {name.split("_")[1] for name, value in trained if "lora_up" in name and value.any()} == {"unet", "te1"}
