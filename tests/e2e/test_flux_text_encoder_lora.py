"""LoRA of FLUX.1's text encoders: gradients as peft has them, what caching keeps, and which encoders stay loaded."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from library.errors import UserError
from library.models.flux.pipeline import FluxFiles, FluxPipeline
from library.options import parse_options
from networks import lora_flux
from tests.networks.conftest import randomise
from tests.running import forget_accelerator, trainer_class

CLIP_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
T5_LAYERS = ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]
PROMPTS = ["a red circle on a blue background", "cat"]


@pytest.fixture
def train(flux_command, dataset_toml, small_images, tmp_path):
    """Train in this process; ``watch`` is called with the trainer and each step's conditioning."""

    def run(
        *arguments: object,
        steps: int = 2,
        output: str = "out",
        watch: Any = None,
        command: Any = None,
        **dataset: object,
    ) -> Any:
        forget_accelerator()
        trainer_type: Any = trainer_class("flux")

        class Watched(trainer_type):
            def conditioning(self, batch):
                found = super().conditioning(batch)
                if watch is not None:
                    watch(self, batch, found)
                return found

        data = dataset_toml(**{"folder": small_images, "resolution": 64, **dataset})
        given = [*(command or flux_command), "--dataset_config", data, "--max_data_loader_n_workers", "0"]
        given += ["--max_train_steps", steps, "--output_dir", tmp_path / output, "--no_report", *arguments]
        trainer = Watched(parse_options(trainer_type.options_class, "test", [str(value) for value in given]))
        trainer.train()
        return trainer

    return run


@pytest.fixture
def small_images(tmp_path) -> Path:
    """Four images beside which a run may leave its caches."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (64, 64), (60 * number, 30, 200)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a circle, number {number}, on blue", encoding="utf-8")
    return folder


def equal_files(one: Path, two: Path, **tolerance: float) -> bool:
    a, b = load_file(one), load_file(two)
    assert a.keys() == b.keys()
    if not tolerance:
        return all(torch.equal(a[key], b[key]) for key in a)
    return all(torch.allclose(a[key], b[key], **tolerance) for key in a)


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.fixture
def pipeline(tiny_flux) -> FluxPipeline:
    files = FluxFiles(tiny_flux.transformer, tiny_flux.autoencoder, tiny_flux.clip_l, tiny_flux.t5xxl)
    return FluxPipeline(files, torch.float32, "cpu", t5xxl_max_token_length=16)


def peft_reference(kind: str, pipeline: FluxPipeline, network: Any) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """transformers' own encoder with a LoRA of peft that has the network's weights; its parameters by our names."""
    from peft import LoraConfig, get_peft_model
    from transformers import CLIPTextConfig, CLIPTextModel, T5EncoderModel

    encoder: Any = pipeline.load_text_encoders([kind])[0]
    state = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    if kind == "clip_l":
        model: Any = CLIPTextModel(CLIPTextConfig(**asdict(encoder.config)))
        model.load_state_dict({name.removeprefix("text_model."): tensor for name, tensor in state.items()})
        layers, below = CLIP_LAYERS, "encoder.layers"
    else:
        model = T5EncoderModel(encoder.config)
        model.load_state_dict({**state, "shared.weight": state["encoder.embed_tokens.weight"]})
        layers, below = T5_LAYERS, "encoder.block"
    rank, alpha = network.text_encoder_loras[0].lora_dim, network.text_encoder_loras[0].alpha
    adapted: Any = get_peft_model(model.eval(), LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers))
    parameters = {}
    loras = {lora.target.path: lora for lora in network.text_encoder_loras}
    for path, lora in loras.items():
        layer = adapted.base_model.model.get_submodule(path[path.index(below) :])
        for part, theirs in (("lora_down", layer.lora_A.default), ("lora_up", layer.lora_B.default)):
            ours = getattr(lora, part)
            with torch.no_grad():
                theirs.weight.copy_(ours.weight)
            parameters[f"{lora.lora_name}.{part}.weight"] = theirs.weight
    return adapted, parameters


@pytest.mark.parametrize(("kind", "masked"), [("clip_l", False), ("t5xxl", False), ("t5xxl", True)])
def test_gradients_are_those_of_peft(kind, masked, pipeline):
    pipeline.apply_t5_attn_mask = masked
    encoder = pipeline.load_text_encoders([kind])[0]
    encoders = [encoder, None] if kind == "clip_l" else [None, encoder]
    network = lora_flux.create_network(
        1.0, 4, 2.0, None, encoders, pipeline.load_transformer(), train_t5xxl="True", train_single_block_indices="none"
    )
    randomise(network, 0.3)
    reference, parameters = peft_reference(kind, pipeline, network)
    assert len(parameters) == 2 * 2 * (6 if kind == "clip_l" else 7)
    network.apply_to(encoders, None, True, False)
    name = "l_pooled" if kind == "clip_l" else "t5_out"
    mine = pipeline.encode_prompts(PROMPTS, [kind], trained=[kind])[name]
    tokens = pipeline.tokenize(PROMPTS, [kind])
    if kind == "clip_l":
        ids = tokens["l_tokens"]
        first_end = (ids == ids.max()).int().argmax(dim=1)  # the highest number of the vocabulary ends a text
        theirs = reference(input_ids=ids).last_hidden_state[torch.arange(len(ids)), first_end]
    else:
        mask = tokens["t5_attn_mask"] if masked else None
        theirs = reference(input_ids=tokens["t5_tokens"], attention_mask=mask).last_hidden_state
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    weights = torch.randn(mine.shape, generator=torch.Generator().manual_seed(5))
    for output in (mine, theirs):
        (output * weights).sum().backward()
    found = dict(network.named_parameters())
    for key, parameter in parameters.items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-3
        torch.testing.assert_close(found[key].grad, parameter.grad, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.thorough
def test_gradient_checkpointing_of_encoders_changes_nothing(train, tmp_path):
    both = ("--network_args", "train_t5xxl=True", "--text_encoder_lr", "1e-3", "1e-4", "--cache_latents")
    train(*both, output="a")
    train(*both, "--gradient_checkpointing", output="b")
    assert equal_files(tmp_path / "a" / "last.safetensors", tmp_path / "b" / "last.safetensors")


@pytest.mark.parametrize("t5", [pytest.param("False", marks=pytest.mark.thorough), "True"])
def test_no_encoder_drops_anything_in_training(train, t5):
    """Encoders come with dropouts of 0.1 in their configurations; all stay in eval mode, checkpointed or not."""
    seen = []

    def watch(trainer, batch, conditioning):
        assert not any(trainer.pipeline.modules[name].training for name in ("clip_l", "t5xxl"))
        again = trainer.pipeline.encode_prompts(batch.captions)
        for name, tensor in again.items():
            torch.testing.assert_close(tensor, conditioning[name].detach(), rtol=0, atol=0)
        seen.append(conditioning["l_pooled"].requires_grad and conditioning["t5_out"].requires_grad == (t5 == "True"))

    train("--gradient_checkpointing", "--network_args", f"train_t5xxl={t5}", watch=watch)
    assert seen == [True, True]


# ---- caching ---------------------------------------------------------------------------------------------------------

TO_DISK = "--cache_text_encoder_outputs_to_disk"


@pytest.mark.parametrize("cache", [pytest.param("--cache_text_encoder_outputs", marks=pytest.mark.thorough), TO_DISK])
def test_a_trained_clip_is_encoded_at_every_step_beside_the_cache(train, cache):
    """T5's part is the cache's to the bit, and T5 is not even there; CLIP's is new with each update."""
    pooled = []

    def watch(trainer, batch, conditioning):
        assert set(trainer.pipeline.modules) & {"clip_l", "t5xxl"} == {"clip_l"}
        for name in ("t5_out", "txt_ids", "t5_attn_mask"):
            assert torch.equal(conditioning[name], batch.text[name])
        assert conditioning["l_pooled"].requires_grad
        pooled.append((conditioning["l_pooled"].detach().clone(), batch.text["l_pooled"]))

    train(
        *(cache, "--cache_latents", "--learning_rate", "1e-2"),
        **{"watch": watch, "steps": 3, "batch_size": 2},
    )
    (first, cached), *later = pooled
    torch.testing.assert_close(first, cached.to(first), rtol=1e-5, atol=1e-6)  # the network does nothing yet
    assert all((new - old.to(new)).abs().max() > 1e-3 for new, old in later)


@pytest.mark.parametrize("cache", ["--cache_text_encoder_outputs", pytest.param(TO_DISK, marks=pytest.mark.thorough)])
def test_a_trained_clip_learns_the_same_with_and_without_a_cache(train, tmp_path, cache):
    captions = {"caption_prefix": "photo of", "caption_suffix": "in red"}
    for output, given in (("plain", ()), ("cached", (cache,))):
        train("--cache_latents", *given, output=output, steps=3, subset=captions)
    files = [tmp_path / output / "last.safetensors" for output in ("plain", "cached")]
    assert equal_files(*files, rtol=1e-4, atol=1e-6)


def test_without_trained_encoders_the_cache_lets_all_of_them_go(train, monkeypatch):
    loaded: list[str] = []
    load = FluxPipeline.load_text_encoders

    def counted(self, encoders=("clip_l", "t5xxl")):
        loaded.extend(encoders)
        return load(self, encoders)

    monkeypatch.setattr(FluxPipeline, "load_text_encoders", counted)

    def watch(trainer, batch, conditioning):
        assert not set(trainer.pipeline.modules) & {"clip_l", "t5xxl"}
        assert all(torch.equal(tensor, batch.text[name]) for name, tensor in conditioning.items())

    given = (TO_DISK, "--cache_latents", "--network_train_unet_only")
    train(*given, watch=watch, output="first")
    assert set(loaded) == {"clip_l", "t5xxl"}
    loaded.clear()
    train(*given, watch=watch, output="second")
    assert not loaded  # every caption came from the disk


def test_sample_prompts_follow_the_trained_encoder(train, tmp_path):
    """Their T5 part is encoded ahead, before T5 goes; CLIP's part shows what was trained."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --n dog --l 2 --w 64 --h 64 --s 1 --d 1\n", encoding="utf-8")
    trainer = train(
        *("--cache_text_encoder_outputs", "--cache_latents", "--learning_rate", "1e-2"),
        *("--sample_prompts", prompts, "--sample_every_n_steps", "2", "--sample_at_first"),
    )
    assert set(trainer.text.prompts) == {("a cat", "positive"), ("dog", "negative")}
    assert "t5xxl" not in trainer.pipeline.modules
    now, ahead = trainer.text.of_prompt("a cat"), trainer.text.prompts["a cat", "positive"]
    assert torch.equal(now["t5_out"], ahead["t5_out"])
    assert (now["l_pooled"] - ahead["l_pooled"]).abs().max() > 1e-3


@pytest.mark.parametrize("encoders", [(), ("--network_train_unet_only",)])
@pytest.mark.parametrize("cache", ["--cache_text_encoder_outputs", TO_DISK])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("caption_dropout_rate", 0.1),
        ("caption_dropout_every_n_epochs", 2),
        ("caption_tag_dropout_rate", 0.1),
        ("shuffle_caption", True),
        ("token_warmup_step", 3),
    ],
)
def test_captions_that_change_are_refused_with_a_cache(train, name, value, cache, encoders):
    with pytest.raises(UserError) as refused:
        train(cache, *encoders, subset={name: value})
    assert name in str(refused.value) and "cannot be cached" in str(refused.value)


def test_captions_may_change_without_a_cache(train):
    subset = {"caption_dropout_rate": 0.5, "caption_dropout_every_n_epochs": 2, "shuffle_caption": True}
    captions: list[str] = []
    train(watch=lambda trainer, batch, conditioning: captions.extend(batch.captions), steps=12, subset=subset)
    assert "" in captions and any(captions)


@pytest.mark.parametrize("cache", ["--cache_text_encoder_outputs", TO_DISK])
def test_a_trained_t5_is_refused_with_a_cache(train, cache):
    with pytest.raises(UserError, match="T5-XXL is trained .*leave out --cache_text_encoder_outputs"):
        train(cache, "--network_args", "train_t5xxl= true")


# ---- networks without text encoders ----------------------------------------------------------------------------------


def test_a_network_without_text_encoders_needs_none(train, flux_command, caplog, tmp_path):
    """networks.oft_flux turns layers of the transformer only: encoders go as with --network_train_unet_only."""
    command = [*flux_command, "--network_module", "networks.oft_flux", "--network_dim", "4", "--network_alpha", "1e-3"]

    def watch(trainer, batch, conditioning):
        assert not set(trainer.pipeline.modules) & {"clip_l", "t5xxl"}

    with caplog.at_level("INFO", logger="library"):
        trainer = train(
            *("--cache_text_encoder_outputs", "--cache_latents", "--text_encoder_lr", "1e-4"),
            **{"watch": watch, "command": command},
        )
    assert "networks.oft_flux trains no text encoder" in caplog.text and "text_encoder_lr" in trainer.no_effect
    tensors = load_file(tmp_path / "out" / "last.safetensors")
    assert {key.split("_double")[0] for key in tensors} == {"oft_unet"}
    assert all(tensor.any() for tensor in tensors.values())
    with pytest.raises(UserError, match="--network_train_text_encoder_only: networks.oft_flux trains no text encoder"):
        train("--network_train_text_encoder_only", command=command)


@pytest.mark.slow
def test_oft_trains_saves_and_goes_on_from_the_command_line(flux_command, dataset_toml, small_images, tmp_path):
    """Four steps at once and two runs of two give the same file to the bit; the second takes the first's blocks."""
    from tests.running import run_in_process

    common = [*flux_command, "--network_module", "networks.oft_flux", "--network_alpha", "1e-2", "--no_report"]
    common += [
        "--dataset_config",
        dataset_toml(small_images, resolution=64),
        "--max_data_loader_n_workers",
        "0",
        "--learning_rate",
        "1e-2",
    ]
    common += ["--network_train_unet_only", "--network_args", "enable_all_linear=True", "--no_metadata"]
    runs = {
        "whole": ["--max_train_steps", "4"],
        "half": ["--max_train_steps", "2", "--save_state"],
        "rest": ["--max_train_steps", "4", "--resume", tmp_path / "half" / "last-state"],
    }
    for name, given in runs.items():
        result = run_in_process("flux_train_network.py", *common, *given, "--output_dir", tmp_path / name)
        assert result.returncode == 0, result.stderr
    assert equal_files(tmp_path / "whole" / "last.safetensors", tmp_path / "rest" / "last.safetensors")
    tensors = load_file(tmp_path / "whole" / "last.safetensors")
    assert tensors["oft_unet_single_blocks_1_linear1.oft_blocks.3"].shape == (4, 64, 64)
    first = tmp_path / "half" / "last.safetensors"
    again = ["--network_weights", first, "--dim_from_weights", "--base_weights", first, "--max_train_steps", "1"]
    result = run_in_process("flux_train_network.py", *common, *again, "--output_dir", tmp_path / "again")
    assert result.returncode == 0, result.stderr
    assert load_file(tmp_path / "again" / "last.safetensors").keys() == tensors.keys()
