"""ControlNets for FLUX.1: their files, how their outputs are spread, and the pipeline's part in it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from library.checkpoints import load_tensors
from library.errors import UserError
from library.memory.apply import apply_memory_plan
from library.memory.plan import MemoryPlan
from library.models.flux.checkpoint import TransformerFile, open_transformer
from library.models.flux.controlnet import ControlNetConfig, FluxControlNet, open_controlnet, spread
from library.models.flux.pipeline import FluxFiles, FluxPipeline, FluxRequest
from library.models.flux.transformer import FluxTransformer, image_ids, unpack_latents
from library.models.loading import LoadSpec
from library.randomness import draw_noise, seeded_generator
from library.safetensors_io import save_file
from tools.make_tiny_controlnet import HINT_CHANNELS, controlnet_config, make_tiny_controlnet
from tools.make_tiny_models import fill_randomly, transformer_config

LENGTH = 16


@pytest.fixture(scope="module")
def transformer(tiny_flux) -> TransformerFile:
    return open_transformer(tiny_flux.transformer)


def open_pipeline(tiny_flux, controlnet: Path | None, mode: int | None = None, **arguments) -> FluxPipeline:
    files = FluxFiles(**vars(tiny_flux), controlnet=controlnet, controlnet_mode=mode)
    return FluxPipeline(files, torch.float32, "cpu", t5xxl_max_token_length=LENGTH, **arguments)


@pytest.fixture(scope="module")
def pipeline(tiny_flux, tiny_controlnet) -> FluxPipeline:
    return open_pipeline(tiny_flux, tiny_controlnet)


@pytest.fixture(scope="module")
def net_of(tmp_path_factory):
    """A ControlNet of a kind, in the Diffusers layout."""
    return lambda kind, **options: make_tiny_controlnet(tmp_path_factory.mktemp(kind), "diffusers", kind, **options)


def inputs(batch: int = 2) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(3)
    return {
        "img": torch.randn(batch, 6, 64, generator=random),
        "img_ids": image_ids(4, 6),
        "txt": torch.randn(batch, 5, 64, generator=random),
        "txt_ids": torch.zeros(5, 3),
        "timesteps": torch.tensor([0.1, 0.9])[:batch],
        "y": torch.randn(batch, 64, generator=random),
        "guidance": torch.ones(batch),
    }


PIXELS = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(5)) * 2 - 1


class TestFiles:
    def test_both_layouts_hold_the_same_model(self, transformer, tiny_controlnet, net_of):
        folder = net_of("xlabs")
        models = [
            open_controlnet(path, transformer).load(LoadSpec.of(torch.float32)) for path in (tiny_controlnet, folder)
        ]
        first, second = (model.state_dict() for model in models)
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
        samples = [model(**inputs(), control=PIXELS)[0][0] for model in models]
        assert torch.equal(*samples) and samples[0].abs().max() > 0.1

    def test_the_weights_come_in_the_dtype_that_is_asked_for(self, transformer, tiny_controlnet, tmp_path):
        state = {key: value.to(torch.float8_e4m3fn) for key, value in load_tensors(tiny_controlnet)[0].items()}
        save_file(state, tmp_path / "net.safetensors")
        model = open_controlnet(tmp_path / "net.safetensors", transformer).load(LoadSpec.of(torch.bfloat16))
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        double, _ = model(**inputs(), control=PIXELS)
        assert double[0].dtype == torch.bfloat16 and double[0].isfinite().all()

    def test_what_shapes_cannot_tell_stands_in_the_config(self, transformer, net_of):
        folder = net_of("instantx", seed=3)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["axes_dims_rope"] = [8, 12, 12]
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        assert open_controlnet(folder, transformer).config.streams.axes_dims == (8, 12, 12)

    @pytest.mark.parametrize(
        ("keys", "words"),
        [
            (
                ["controlnet_cond_embedding.conv_in.weight"],
                "a Stable Diffusion ControlNet file in the Diffusers layout",
            ),
            (["control_model.input_hint_block.0.weight"], "a Stable Diffusion ControlNet file"),
            (["input_hint_block.0.weight", "zero_convs.0.0.weight"], "a Stable Diffusion ControlNet file"),
            (["controlnet_blocks.0.weight", "pos_embed.proj.weight"], "a ControlNet file of another model family"),
            (["lora_unet_x.lora_down.weight"], "a LoRA file"),
        ],
    )
    def test_another_kind_of_file_is_named(self, transformer, tmp_path, keys, words):
        path = tmp_path / "net.safetensors"
        save_file(dict.fromkeys(keys, torch.zeros(4, 4)), path)
        with pytest.raises(UserError) as error:
            open_controlnet(path, transformer)
        start = f"--controlnet_model_name_or_path: {path} is {words}"
        assert str(error.value) == f"{start}; a FLUX.1 ControlNet is needed here."

    def test_a_transformer_is_no_controlnet_and_the_other_way_round(
        self, transformer, tiny_flux, tiny_controlnet, net_of
    ):
        with pytest.raises(UserError, match="is a FLUX.1 file; a FLUX.1 ControlNet is needed here"):
            open_controlnet(tiny_flux.transformer, transformer)
        for path in (tiny_controlnet, net_of("instantx")):
            with pytest.raises(UserError, match="is a FLUX ControlNet file.*; a FLUX.1 transformer is needed here"):
                open_transformer(path)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"context_dim": 32}, "T5 states of 32, but .* has 64"),
            ({"vector_dim": 32}, "a pooled text of 32, but .* has 64"),
            ({"hidden_size": 96, "num_heads": 3}, "a width of 96, but .* has 64"),
            ({"in_channels": 32}, "input channels: 32, but .* has 64"),
        ],
    )
    def test_a_controlnet_for_other_sizes_is_refused(self, transformer, tmp_path, changes, words):
        config = controlnet_config()
        model = FluxControlNet(replace(config, streams=replace(config.streams, **changes)))
        save_file(model.state_dict(), tmp_path / "net.safetensors")
        with pytest.raises(UserError, match=f"made for a transformer with {words}.*: they don't belong together"):
            open_controlnet(tmp_path / "net.safetensors", transformer)

    def test_inputs_that_no_image_can_give_are_refused(self, transformer, tmp_path, net_of, tiny_controlnet):
        path, state = tmp_path / "net.safetensors", load_tensors(tiny_controlnet)[0]
        save_file({**state, "input_hint_block.0.weight": torch.zeros(16, 4, 3, 3)}, path)
        with pytest.raises(UserError, match="takes more than one control image"):
            open_controlnet(path, transformer)
        save_file({key: value for key, value in state.items() if "input_hint_block.14" not in key}, path)
        with pytest.raises(UserError, match="has 7 convolutions for its control image; only"):
            open_controlnet(path, transformer)
        folder = net_of("instantx", seed=4)
        file = folder / "diffusion_pytorch_model.safetensors"
        save_file({**load_tensors(file)[0], "controlnet_x_embedder.weight": torch.zeros(64, 128)}, file)
        with pytest.raises(UserError, match="takes more than one control image .128 channels"):
            open_controlnet(folder, transformer)
        with pytest.raises(UserError, match="made for latents of 8 pixels, but the autoencoder's have 16"):
            open_controlnet(tiny_controlnet, transformer, latent_stride=16)

    def test_a_missing_tensor_is_named(self, transformer, tmp_path, tiny_controlnet):
        state = load_tensors(tiny_controlnet)[0]
        del state["controlnet_blocks.0.bias"]
        save_file(state, tmp_path / "net.safetensors")
        with pytest.raises(UserError, match="1 tensor is missing .controlnet_blocks.0.bias"):
            open_controlnet(tmp_path / "net.safetensors", transformer).load(LoadSpec.of(torch.float32))

    def test_a_union_controlnet_needs_one_of_its_modes(self, transformer, net_of, tiny_controlnet):
        path = net_of("union")
        for mode, words in (
            (None, "--controlnet_mode is missing: .* is a union ControlNet with 3 kinds of control; give 0 to 2"),
            (3, "--controlnet_mode 3: .* has 3 kinds of control; give 0 to 2"),
        ):
            with pytest.raises(UserError, match=words):
                open_controlnet(path, transformer, mode=mode)
        with pytest.raises(UserError, match="--controlnet_mode is for union ControlNets, but .* leave it out"):
            open_controlnet(tiny_controlnet, transformer, mode=0)
        assert open_controlnet(path, transformer, mode=2).mode == 2


class TestResiduals:
    def test_samples_are_spread_over_the_blocks(self):
        a, b = torch.zeros(1), torch.ones(1)
        assert spread([a, b], 5, in_turn=True) == [a, b, a, b, a]
        assert spread([a, b], 5, in_turn=False) == [a, a, a, b, b]
        assert spread([a, b], 1, in_turn=False) == [a]
        assert spread([], 3, in_turn=True) is None

    def test_original_single_blocks_reach_text_and_image_in_turn(self):
        """By the original program's rule; with Diffusers' names the same blocks reach the image alone."""
        config = ControlNetConfig(replace(transformer_config(), depth=1, depth_single=2), HINT_CHANNELS)
        controlnet = FluxControlNet(config)
        fill_randomly(controlnet, 1, "test")
        found = controlnet.residuals(replace(transformer_config(), depth_single=3), **inputs(), control=PIXELS)
        first, second, third = found["single_residuals"]
        assert first is third and first.shape == second.shape == (2, 5 + 6, 64)
        controlnet.control = replace(config, original=False)
        found = controlnet.residuals(replace(transformer_config(), depth_single=3), **inputs(), control=PIXELS)
        assert torch.equal(found["single_residuals"][1], first[:, 5:]) and found["single_residuals"][0].shape[1] == 6

    def test_a_residual_is_added_after_its_block(self):
        """A residual after the last double block is as if the blocks had put it out."""
        transformer = FluxTransformer(replace(transformer_config(), depth=1, depth_single=2))
        fill_randomly(transformer, 1, "test")
        given, added = inputs(), torch.randn(2, 6, 64)
        plain = transformer(**given)
        block = transformer.double_blocks[0]
        hook = block.register_forward_hook(lambda *parts: (parts[-1][0] + added, parts[-1][1]))
        expected = transformer(**given)
        hook.remove()
        assert torch.equal(transformer(**given, double_residuals=[added]), expected)
        assert torch.equal(transformer(**given, double_residuals=[None], single_residuals=[None, None]), plain)
        whole = torch.randn(2, 11, 64)
        hook = transformer.single_blocks[1].register_forward_hook(lambda *parts: parts[-1] + whole)
        expected = transformer(**given)
        hook.remove()
        assert torch.equal(transformer(**given, single_residuals=[None, whole]), expected)
        on_image = torch.cat((torch.zeros(2, 5, 64), whole[:, 5:]), dim=1)
        first = transformer(**given, single_residuals=[on_image, None])
        assert torch.equal(transformer(**given, single_residuals=[whole[:, 5:], None]), first)

    def test_masked_text_reaches_no_residual(self, transformer, net_of):
        for kind, mode, control in (("xlabs", None, PIXELS), ("union", 1, torch.randn(2, 16, 4, 6))):
            model = open_controlnet(net_of(kind), transformer, mode=mode).load(LoadSpec.of(torch.float32))
            given, mask = inputs(), torch.tensor([[1, 1, 1, 0, 0]] * 2)
            other = {**given, "txt": torch.where(mask[..., None] > 0, given["txt"], 100.0)}
            samples = [
                model(**values, txt_attention_mask=mask, control=control, mode=mode)[0][0] for values in (given, other)
            ]
            assert torch.equal(*samples)
            assert not torch.equal(model(**other, control=control, mode=mode)[0][0], samples[0])


class TestPipeline:
    @pytest.fixture(scope="class")
    def conditioning(self, pipeline):
        return pipeline.encode_prompts(["a cat", "a dog"])

    def test_the_part_is_there_only_when_it_is_given(self, tiny_flux, pipeline):
        assert "controlnet" in pipeline.parts and "controlnet" not in open_pipeline(tiny_flux, None).parts
        first = pipeline.load("controlnet")
        assert pipeline.load("controlnet") is first and not any(p.requires_grad for p in first.parameters())
        pipeline.release("controlnet")
        assert "controlnet" not in pipeline.modules and pipeline.load("controlnet") is not first

    @pytest.mark.parametrize("kind", ["xlabs", "instantx", "union"])
    def test_prediction_with_control_differs_and_zero_weights_change_nothing(
        self, tiny_flux, net_of, conditioning, kind
    ):
        mode = 1 if kind == "union" else None
        latents, timesteps, guidance = torch.randn(2, 16, 4, 6), torch.tensor([0.1, 0.9]), torch.ones(2)
        given = (latents, timesteps, conditioning, guidance)
        trained = open_pipeline(tiny_flux, net_of(kind), mode)
        plain = trained.predict(*given)
        assert (trained.predict(*given, control_image=PIXELS) - plain).abs().max() > 1e-2
        untrained = open_pipeline(tiny_flux, net_of(kind, zero=True), mode)
        assert torch.equal(untrained.predict(*given, control_image=PIXELS), plain)

    def test_modes_of_a_union_controlnet_differ(self, tiny_flux, net_of, conditioning):
        path, results = net_of("union"), []
        for mode in (0, 1):
            pipeline = open_pipeline(tiny_flux, path, mode)
            given = (torch.ones(2, 16, 4, 6), torch.tensor([0.1, 0.9]), conditioning, torch.ones(2))
            results.append(pipeline.predict(*given, control_image=PIXELS))
        assert not torch.allclose(*results)

    def test_control_latents_are_those_of_the_autoencoder_without_noise(self, tiny_flux, net_of, pipeline):
        by_latents = open_pipeline(tiny_flux, net_of("instantx"))
        assert by_latents.control_takes_latents and not pipeline.control_takes_latents
        assert torch.equal(by_latents.encode_control(PIXELS), by_latents.encode_images(PIXELS, None))
        with torch.autocast("cpu", torch.bfloat16):
            inside = by_latents.encode_control(PIXELS)
        assert torch.equal(inside, by_latents.encode_control(PIXELS))
        assert torch.equal(pipeline.encode_control(PIXELS), PIXELS)

    def test_gradients_go_through_the_transformer_and_not_through_the_controlnet(self, pipeline, conditioning):
        transformer = pipeline.load_transformer()
        text = {**conditioning, "t5_out": conditioning["t5_out"].clone().requires_grad_()}
        given = (torch.randn(2, 16, 4, 6), torch.tensor([0.1, 0.9]), text, torch.ones(2), PIXELS)
        weight = transformer.double_blocks[0].img_attn.qkv.weight.requires_grad_(True)
        try:
            results = []
            for checkpointing in (False, True):
                with apply_memory_plan(pipeline.block_lists(), MemoryPlan(checkpointing)):
                    pipeline.predict(*given).square().mean().backward()
                results.append((weight.grad.clone(), text["t5_out"].grad.clone()))
                weight.grad = text["t5_out"].grad = None
            for plain, checkpointed in zip(*results):
                assert plain.abs().max() > 0
                assert torch.equal(checkpointed, plain)
        finally:
            weight.requires_grad_(False)
        assert all(parameter.grad is None for parameter in pipeline.load("controlnet").parameters())

    def test_a_image_is_drawn_with_its_control_image(self, pipeline):
        def latents(**arguments) -> Tensor:
            return pipeline.generate_latents(
                FluxRequest("a cat", width=48, height=32, seed=1, sample_steps=2, **arguments)
            )

        image = Image.effect_noise((96, 64), 80)
        plain = latents()
        controlled = latents(control_image=image)
        assert not torch.allclose(controlled, plain)
        assert torch.equal(latents(control_image=image, control_strength=0.0), plain)
        assert not torch.allclose(latents(control_image=image, control_strength=0.5), controlled)
        small = image.convert("RGB").resize((48, 32), Image.Resampling.LANCZOS)
        pixels = torch.tensor(list(small.getdata())).reshape(32, 48, 3).permute(2, 0, 1) / 127.5 - 1
        for tensor in (pixels, pixels[None]):
            torch.testing.assert_close(latents(control_image=tensor), controlled)

    def test_with_guidance_both_halves_are_controlled(self, pipeline):
        """By hand: v_neg + c (v_pos - v_neg), each with the ControlNet's own look at its text."""
        control = torch.rand(3, 32, 32) * 2 - 1
        request = FluxRequest("a cat", negative_prompt="dog", scale=3.0, width=32, height=32, seed=1, sample_steps=1)
        found = pipeline.generate_latents(replace(request, control_image=control))
        start = unpack_latents(draw_noise((4, 64), [seeded_generator(1)]), 4, 4)
        guidance = torch.full((1,), request.guidance_scale)
        negative, positive = (
            pipeline.predict(start, torch.ones(1), pipeline.encode_prompts([text]), guidance, control[None])
            for text in ("dog", "a cat")
        )
        expected = start - (negative + 3.0 * (positive - negative))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(pipeline.generate_latents(request), found)
