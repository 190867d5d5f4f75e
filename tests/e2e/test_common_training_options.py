"""Options that every script shares do what they say, in short runs of the Stable Diffusion trainer in this process."""

from __future__ import annotations

import base64
import json
import re
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from library.errors import UserError
from library.models import pipeline
from library.options import parse_options
from library.training.optim.lr_schedulers import create_lr_scheduler
from library.training.training_options import TrainingOptions
from tests.e2e.test_stable_diffusion_training_options import trainer_for


@pytest.fixture
def images(tmp_path) -> Path:
    """Four images of one size, so that an epoch has four steps."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(4):
        Image.effect_mandelbrot((64, 64), (-2, -1, 1, 1), 20 + number).convert("RGB").save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"circle {number}", encoding="utf-8")
    return folder


@pytest.fixture
def make(sd1_command, dataset_toml, images, tmp_path):
    """A trainer of the U-Net with these options."""

    def trainer(*arguments: object, output: str = "out", **dataset: object):
        toml = dataset_toml(images, **{"resolution": 64, "bucket_reso_steps": 64, "batch_size": 1, **dataset})
        given = ["--output_dir", tmp_path / output, "--no_report", "--network_train_unet_only"]
        return trainer_for({"sd1": sd1_command}, "sd1", (*given, "--dataset_config", toml, *arguments))

    yield trainer
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()


@pytest.fixture
def train(make):
    """Train; returns the trainer when it is done."""

    def run(*arguments: object, **settings: object):
        trainer = make(*arguments, **settings)
        trainer.train()
        return trainer

    return run


@pytest.fixture
def files(tmp_path):
    """The names in an output folder, without those below it."""
    return lambda output="out": {path.name for path in (tmp_path / output).iterdir()}


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every curve in a run's folder of TensorBoard files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(p.step, p.value) for p in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


# ---- files and states ----------------------------------------------------------------------------------------------


def test_the_last_epochs_stay(train, files):
    arguments = ["--max_train_epochs", "4", "--save_every_n_epochs", "1", "--save_last_n_epochs", "2", "--save_state"]
    train(*arguments, "--save_last_n_epochs_state", "1", "--output_name", "cat", batch_size=4)
    assert files() == {
        *("cat.safetensors", "cat-000002.safetensors", "cat-000003.safetensors"),
        *("cat-state", "cat-000003-state"),
    }


def test_the_last_steps_stay(train, files):
    arguments = ["--max_train_steps", "4", "--save_every_n_steps", "1", "--save_last_n_steps", "2", "--save_state"]
    train(*arguments, "--save_last_n_steps_state", "1")
    assert {name for name in files() if name.startswith("at-")} == {
        *("at-step00000002.safetensors", "at-step00000003.safetensors", "at-step00000004.safetensors"),
        *("at-step00000003-state", "at-step00000004-state"),
    }


def test_a_number_of_files_is_spread_over_the_epochs(train, files):
    arguments = ["--max_train_epochs", "4", "--save_n_epoch_ratio", "2", "--save_state_on_train_end"]
    train(*arguments, "--save_model_as", "ckpt", batch_size=4)
    assert files() == {"epoch-000002.ckpt", "last.ckpt", "last-state"}


def test_numbers_are_stored_in_the_format_asked_for(train, tmp_path):
    for precision, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        train("--max_train_steps", "1", "--save_precision", precision)
        assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "last.safetensors").values()} == {dtype}


def test_what_is_said_about_the_model_stands_in_its_file(train, tmp_path, images):
    texts = {
        "--metadata_title": "Cats",
        "--metadata_author": "Me",
        "--metadata_description": "All my cats",
        "--metadata_license": "CC0",
        "--metadata_tags": "cat,drawing",
        "--metadata_usage_hint": "weight 0.8",
        "--metadata_merged_from": "a, b",
        "--metadata_trigger_phrase": "mycat",
        "--metadata_preprocessor": "none",
        "--metadata_is_negative_embedding": "false",
    }
    arguments = [part for pair in texts.items() for part in pair]
    arguments += ["--metadata_thumbnail", images / "0.png", "--training_comment", "hello", "--max_train_steps", 1]
    train(*arguments, "--trigger_word", "sks")
    found = metadata(tmp_path / "out" / "last.safetensors")
    assert {name: found[name.replace("--metadata_", "modelspec.")] for name in texts} == texts
    assert found["ss_training_comment"] == "hello" and found["ss_trigger_word"] == "sks"
    kind, _, content = found["modelspec.thumbnail"].partition(",")
    assert kind == "data:image/png;base64" and base64.b64decode(content) == (images / "0.png").read_bytes()


def test_the_trigger_word_stands_in_captions_sample_prompts_and_the_file(train, tmp_path, caplog):
    (tmp_path / "prompts.txt").write_text("[trigger] in a park\n", encoding="utf-8")
    arguments = ["--sample_prompts", tmp_path / "prompts.txt", "--sample_every_n_steps", 9, "--max_train_steps", 1]
    caplog.set_level("INFO")
    trainer = train(*arguments, trigger_word="sks")
    assert [prompt.prompt for prompt in trainer.outputs.samples.prompts] == ["sks in a park"]
    assert '4 images x 1 repeats, trigger word "sks" put before 4 of 4 captions' in caplog.text
    found = metadata(tmp_path / "out" / "last.safetensors")
    assert found["modelspec.trigger_phrase"] == found["ss_trigger_word"] == "sks"


# ---- where a run starts and ends -----------------------------------------------------------------------------------


def test_an_initial_epoch_counts_the_earlier_ones_as_done(train, files, tmp_path):
    trainer = train("--max_train_epochs", "3", "--initial_epoch", "3", "--save_every_n_epochs", "1")
    assert trainer.progress.step == 12 and list(trainer.progress.record.losses) == [0, 1, 2, 3]
    assert metadata(tmp_path / "out" / "last.safetensors")["ss_steps"] == "12" and files() == {"last.safetensors"}


def test_batches_are_averaged_and_the_seed_decides_everything(train, tmp_path):
    assert train("--max_train_epochs", "1", "--gradient_accumulation_steps", "3", output="a").progress.step == 2
    for output, seed in (("b", "7"), ("c", "7"), ("d", "8")):
        train("--max_train_steps", "1", "--seed", seed, output=output)
    one, same, other = (load_file(tmp_path / name / "last.safetensors") for name in "bcd")
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not any(torch.equal(one[key], other[key]) for key in one if key.endswith("lora_down.weight"))
    assert metadata(tmp_path / "d" / "last.safetensors")["ss_seed"] == "8"


# ---- samples, validation, curves -----------------------------------------------------------------------------------


def test_samples_are_drawn_at_the_ends_of_epochs_by_the_sampler_asked_for(train, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2 --d 1\n", encoding="utf-8")
    arguments = ["--sample_prompts", prompts, "--sample_every_n_epochs", "2", "--sample_every_n_steps", "1"]
    train(*arguments, "--sample_at_first", "--max_train_epochs", "3", batch_size=4)
    names = sorted(path.name for path in (tmp_path / "out" / "sample").iterdir())
    assert [re.sub(r"_\d{14}_", "_*_", name) for name in names] == ["e000000_00_*_1.png", "e000002_00_*_1.png"]
    train(*arguments[:2], "--sample_at_first", "--sample_sampler", "euler_a", "--max_train_steps", "1", output="other")
    (other,) = (tmp_path / "other" / "sample").iterdir()
    assert other.read_bytes() != (tmp_path / "out" / "sample" / names[0]).read_bytes()


def test_validation_happens_when_asked_and_on_as_many_batches(train, tmp_path):
    arguments = ["--validation_split", "0.5", "--learning_rate", "1e-9", "--log_with", "tensorboard", "--logging_dir"]
    first = [*arguments, tmp_path / "logs", "--log_prefix", "cat-", "--log_tracker_name", "mine", "--log_config"]
    first += ["--validation_seed", "3", "--max_train_epochs", "2", "--validate_every_n_epochs", "2"]
    train(*first, "--validate_every_n_steps", "4")
    (run,) = (tmp_path / "logs").iterdir()
    assert re.fullmatch(r"cat-\d{14}", run.name)
    curves = scalars(run / "mine")
    assert [step for step, _ in curves["loss/validation/epoch_average"]] == [2]
    assert [step for step, _ in curves["loss/validation/step_average"]] == [0, 4]
    text = next((run / "mine").iterdir()).read_bytes()
    assert b"|validate_every_n_epochs|2|" in text and str(tmp_path).encode() not in text
    # The seed chooses the images and their noise; fewer batches give another average.
    values = {curves["loss/validation/epoch_average"][0][1]}
    for change in (["--validation_seed", "4"], ["--validation_seed", "3", "--max_validation_steps", "1"]):
        train(*arguments, tmp_path / str(len(values)), "--max_train_epochs", "1", *change)
        (run,) = (tmp_path / str(len(values))).iterdir()
        values.add(scalars(run / "network_train")["loss/validation/epoch_average"][0][1])
    assert len(values) == 3


def test_options_that_wait_for_others_are_named_when_data_and_processes_are_known(train, caplog):
    arguments = "--validation_seed 3 --validate_every_n_steps 1 --validate_every_n_epochs 1 --max_validation_steps 2"
    with caplog.at_level("INFO"):
        train(*arguments.split(), "--ddp_timeout", "5", "--lowram", "--noise_on_device", "--max_train_steps", "1")
    names = arguments.split()[::2]
    assert f"no effect without validation images: {', '.join(names)}" in caplog.text
    assert "no effect with one process: --ddp_timeout, --lowram" in caplog.text
    assert "no effect on a CPU: --noise_on_device" in caplog.text


# ---- optimizer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "description"),
    [
        ("--use_lion_optimizer", "lion_pytorch.lion_pytorch.Lion"),
        ("--use_8bit_adam", "bitsandbytes.optim.adamw.AdamW8bit"),
        ("--optimizer_type AdamW --optimizer_args weight_decay=0.5", "torch.optim.adamw.AdamW(weight_decay=0.5)"),
    ],
)
def test_the_optimizer_is_the_one_asked_for(train, tmp_path, arguments, description):
    if "8bit" in arguments:
        pytest.importorskip("bitsandbytes")
    train(*arguments.split(), "--max_train_steps", "1")
    assert metadata(tmp_path / "out" / "last.safetensors")["ss_optimizer"] == description


def test_gradients_are_cut_to_the_norm_asked_for(train, tmp_path):
    """After one step of plain descent the weights that were zero have moved by rate times gradient."""

    def moved(*arguments: str) -> float:
        train("--optimizer_type", "SGD", "--learning_rate", "2", "--max_train_steps", "1", *arguments)
        tensors = load_file(tmp_path / "out" / "last.safetensors")
        return sum(t.double().square().sum().item() for k, t in tensors.items() if "lora_up" in k) ** 0.5

    free = moved("--max_grad_norm", "0")
    assert moved("--max_grad_norm", str(free / 20)) == pytest.approx(free / 10, rel=1e-4)
    assert moved("--max_grad_norm", "0", "--unet_lr", "1") == pytest.approx(free / 2, rel=1e-4)


@pytest.mark.parametrize(
    ("schedule", "option"),
    [
        ("constant", "--lr_scheduler linear"),
        ("linear", "--lr_warmup_steps 4"),
        ("linear", "--lr_warmup_steps 25%"),
        ("warmup_stable_decay", "--lr_decay_steps 5"),
        ("cosine_with_restarts", "--lr_scheduler_num_cycles 3"),
        ("polynomial", "--lr_scheduler_power 2"),
        ("inverse_sqrt", "--lr_scheduler_timescale 3"),
        ("cosine_with_min_lr --lr_scheduler_min_lr_ratio 0.1", "--lr_scheduler_min_lr_ratio 0.5"),
        ("constant", "--lr_scheduler_type StepLR --lr_scheduler_args step_size=3"),
        ("warmup_stable_decay --lr_decay_steps 5", "--lr_scheduler_args decay_type='linear'"),
    ],
)
def test_the_schedule_follows_its_options(schedule, option):
    def rates(arguments: str) -> list[float]:
        options = parse_options(TrainingOptions, "test", ["--learning_rate", "0.1", *arguments.split()])
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=options.optimizer.learning_rate)
        scheduler = create_lr_scheduler(options.lr_scheduler, optimizer, 12)
        found = []
        for _ in range(12):
            found += scheduler.get_last_lr()
            optimizer.step()
            scheduler.step()
        return found

    plain = f"--lr_scheduler {schedule}"
    assert numpy.isfinite(rates(f"{plain} {option}")).all() and rates(f"{plain} {option}") != rates(plain)


# ---- the network ---------------------------------------------------------------------------------------------------


def test_the_network_has_the_rank_scale_and_parts_asked_for(train, tmp_path):
    def tensors(*arguments: str, output: str = "out") -> dict[str, torch.Tensor]:
        train("--max_train_steps", "1", "--optimizer_type", "SGD", *arguments, output=output)
        return load_file(tmp_path / output / "last.safetensors")

    plain = tensors("--network_dim", "3", "--network_alpha", "1.5")
    key = next(key for key in plain if key.endswith("lora_down.weight"))
    assert plain[key].shape[0] == 3 and plain[key.replace("lora_down.weight", "alpha")] == 1.5
    # Something is dropped, and a limit holds for every module.
    dropped = tensors("--network_dim", "3", "--network_alpha", "1.5", "--network_dropout", "0.5")
    assert any(not torch.equal(dropped[key], plain[key]) for key in plain)
    assert len(tensors("--network_args", "conv_dim=2")) > len(plain)
    limited = tensors("--learning_rate", "100", "--max_grad_norm", "0", "--scale_weight_norms", "0.01")
    names = [key.removesuffix(".alpha") for key in limited if key.endswith(".alpha")]
    for name in names:
        up, down = (limited[f"{name}.lora_{part}.weight"].flatten(1) for part in ("up", "down"))
        assert (up @ down).norm() * limited[f"{name}.alpha"] / len(down) <= 0.0101


# ---- models, caches, precision -------------------------------------------------------------------------------------


@pytest.fixture
def opened(make):
    """A trainer up to its filled caches."""

    def run(*arguments: object, **settings: object):
        trainer = make(*arguments, **settings)
        trainer.check_options()
        trainer.prepare_output()
        trainer.check_network()
        trainer.start_processes()
        trainer.read_data()
        trainer.open_pipeline()
        trainer.text.prepare([])
        trainer.fill_caches()
        return trainer

    return run


def test_the_autoencoder_stays_in_float32_and_freed_memory_is_kept_if_requested(opened, monkeypatch):
    for arguments, dtype in (("", torch.bfloat16), ("--no_half_vae", torch.float32)):
        autoencoder = opened("--mixed_precision", "bf16", *arguments.split()).pipeline.load_autoencoder()
        assert {parameter.dtype for parameter in autoencoder.parameters()} == {dtype}
    emptied: list[str] = []
    monkeypatch.setattr(pipeline, "empty_cache", lambda device: emptied.append(device.type))
    for arguments, device in (
        ("", "meta"),
        ("--highvram", "cpu"),
    ):  # "cpu": nothing to give back, whatever the run's is
        trainer = opened("--cache_latents", *arguments.split())
        assert "autoencoder" not in trainer.pipeline.modules
        trainer.pipeline.load_autoencoder()
        trainer.pipeline.device = torch.device("meta")
        emptied.clear()
        trainer.pipeline.release("autoencoder")
        assert emptied == [device]


def test_caches_are_trusted_if_asked_for(opened, images):
    arguments = ["--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk", "--vae_batch_size", "3"]
    opened(*arguments)
    written = {path: path.read_bytes() for path in images.glob("*.npz")}
    assert len(written) == 8
    for number in range(4):  # images and captions change after they were cached
        Image.new("RGB", (64, 64), (number, 9, 9)).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text(f"dog {number}", encoding="utf-8")
    opened(*arguments, "--skip_cache_check")
    assert {path: path.read_bytes() for path in images.glob("*.npz")} == written
    opened(*arguments)
    assert not any(path.read_bytes() == data for path, data in written.items())


def test_as_many_captions_and_images_are_encoded_together_as_asked_for(opened, images, monkeypatch):
    from library.models.stable_diffusion.pipeline import StableDiffusionPipeline

    counts: dict[str, list[int]] = {"encode_prompts": [], "encode_images": []}
    for name, found in counts.items():
        method = getattr(StableDiffusionPipeline, name)

        def counted(self, batch, *rest, method=method, found=found, **more):
            found.append(len(batch))
            return method(self, batch, *rest, **more)

        monkeypatch.setattr(StableDiffusionPipeline, name, counted)
    arguments = ["--cache_latents", "--vae_batch_size", "3", "--cache_text_encoder_outputs"]
    opened(*arguments, "--text_encoder_batch_size", "2")
    assert counts == {"encode_prompts": [2, 2], "encode_images": [3, 1]}


@pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("xformers") is not None, reason="xformers is installed here"
)
def test_attention_of_a_missing_package_is_replaced_by_torchs_own(opened, caplog):
    assert opened("--xformers").pipeline.attention_backend == "sdpa"
    assert "--xformers: the package xformers is not installed; attention is PyTorch's own" in caplog.text


def test_a_constant_schedule_with_warm_up_is_the_one_with_that_name(opened, caplog):
    caplog.set_level("INFO")
    trainer = opened("--lr_warmup_steps", "3")
    assert trainer.options.lr_scheduler.lr_scheduler == "constant_with_warmup"
    assert "--lr_scheduler constant with --lr_warmup_steps is constant_with_warmup" in caplog.text


def test_two_ways_of_coarse_noise_at_once_are_reported(opened, caplog):
    opened("--noise_offset", "0.05", "--multires_noise_iterations", "6")
    assert "--noise_offset and --multires_noise_iterations are meant to be used one without the other" in caplog.text


def test_attention_in_slices_gives_the_same_numbers(opened):
    inputs = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    outputs = []
    for arguments in ([], ["--sdpa"], ["--mem_eff_attn"]):
        trainer = opened(*arguments)
        trainer.load_models()
        conditioning = trainer.text.encode(["a cat"])
        with torch.no_grad():
            outputs.append(trainer.pipeline.predict(inputs, torch.tensor([500]), conditioning).numpy())
        outputs.append(trainer.pipeline.attention_backend)
    assert outputs[1::2] == ["sdpa", "sdpa", "split"]
    numpy.testing.assert_allclose(outputs[0], outputs[4], atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "unet", "text_encoder"),
    [
        ("--mixed_precision bf16", torch.bfloat16, torch.bfloat16),
        ("--mixed_precision bf16 --fp8_base", torch.float8_e4m3fn, torch.float8_e4m3fn),
        ("--mixed_precision bf16 --fp8_base_unet", torch.float8_e4m3fn, torch.bfloat16),
    ],
)
def test_models_are_kept_in_the_format_asked_for(opened, arguments, unet, text_encoder):
    trainer = opened(*arguments.split())
    trainer.load_models()
    (encoder,) = trainer.pipeline.load_text_encoders()
    queries = trainer.pipeline.load_transformer().mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    assert stored(queries) == unet and stored(encoder.text_model.encoder.layers[0].mlp.fc1) == text_encoder


def stored(layer: torch.nn.Module) -> torch.dtype:
    """The dtype of a Linear layer's weight in memory."""
    return layer.codes.dtype if hasattr(layer, "codes") else layer.weight.dtype


@pytest.mark.parametrize("arguments", ["", "--mixed_precision bf16", "--mixed_precision bf16 --full_bf16"])
def test_the_network_is_trained_in_float32_unless_half_precision_is_asked_for(opened, arguments):
    trainer = opened(*arguments.split())
    trainer.load_models()
    trainer.make_network()
    trainer.place_network()
    expected = torch.bfloat16 if "full" in arguments else torch.float32
    assert {parameter.dtype for parameter in trainer.network.parameters()} == {expected}


def test_the_blocks_are_checkpointed_and_compiled_if_requested(opened):
    from library.memory.plan import MemoryPlan

    def plan(*arguments: str) -> MemoryPlan:
        trainer = opened(*arguments)
        trainer.load_models()
        return trainer.pipeline.applied[trainer.pipeline.denoiser].plan

    assert plan() == MemoryPlan() == plan("--torch_compile", "--dynamo_backend", "no")
    assert plan("--gradient_checkpointing") == MemoryPlan(checkpointing=True)
    offloaded = plan("--gradient_checkpointing", "--cpu_offload_checkpointing")
    assert offloaded == MemoryPlan(checkpointing=True, offload_inputs=True)
    one, other = (plan("--torch_compile", "--compile_dynamic", value) for value in ("true", "false"))
    assert (one, other) == tuple(MemoryPlan(compiler="inductor", dynamic=value) for value in (True, False))
    kept = plan("--gradient_checkpointing", "--keep_attention_outputs")
    assert kept == MemoryPlan(checkpointing=True, keep_attention=True)
    assert plan("--torch_compile", "--dynamo_backend", "eager") == MemoryPlan(compiler="eager")
    with pytest.raises(UserError, match="--dynamo_backend ofi is unavailable on this machine; torch provides inductor"):
        plan("--torch_compile", "--dynamo_backend", "ofi")


def test_files_are_read_without_memory_maps_if_asked_for(opened, monkeypatch):
    def refuse(*arguments, **more):
        raise OSError

    monkeypatch.setattr(numpy, "memmap", refuse)
    opened("--disable_mmap_load_safetensors").load_models()
    with pytest.raises(UserError, match="cannot be read"):
        opened().load_models()


def test_a_tokenizer_of_ones_own_is_used(opened, tiny_sd1, tmp_path):
    folder = tmp_path / "tokenizers" / "openai_clip-vit-large-patch14"
    shutil.copytree(tiny_sd1.parent / "tokenizer", folder)
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    vocabulary["a</w>"], vocabulary["b</w>"] = vocabulary["b</w>"], vocabulary["a</w>"]
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "tokenizer.json").unlink(missing_ok=True)
    usual, own = opened(), opened("--tokenizer_cache_dir", tmp_path / "tokenizers")
    for text, other in (("a", "b"), ("b", "a")):
        one, two = (trainer.text.encode([words])["hidden_state"] for trainer, words in ((usual, text), (own, other)))
        assert torch.equal(one, two)
    with pytest.raises(UserError, match="--tokenizer_cache_dir"):
        shutil.rmtree(folder)
        folder.mkdir()
        opened("--tokenizer_cache_dir", tmp_path / "tokenizers")
