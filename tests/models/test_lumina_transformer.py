"""Behaviour of the transformer that training depends on: captions of several lengths, precision, memory features."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from library.errors import UserError
from library.models import transformer_parts
from library.models.loading import on_meta
from library.models.lumina import transformer as lumina
from library.models.lumina.transformer import (
    JointTransformerBlock,
    LuminaConfig,
    LuminaTransformer,
    patchify,
    unpatchify,
)
from library.models.transformer_parts import KEPT_GRIDS, LARGEST_FLOAT16, rope_rotations
from tools.make_tiny_models import LUMINA, fill_randomly

LENGTHS = (3, 77, 256)


@pytest.fixture
def transformer() -> LuminaTransformer:
    model = LuminaTransformer(LUMINA)
    fill_randomly(model, 1, "behaviour")
    return model


def inputs(lengths: tuple[int, ...] = (3, 7), padding: int = 0) -> dict[str, torch.Tensor]:
    """The arguments of the forward pass; what is behind a caption's last token is noise too."""
    random, batch, longest = torch.Generator().manual_seed(3), len(lengths), max(lengths) + padding
    return {
        "latents": torch.randn(batch, LUMINA.latent_channels, 4, 6, generator=random),
        "timesteps": torch.linspace(0.1, 0.9, batch),
        "text": torch.randn(batch, longest, LUMINA.text_dim, generator=random),
        "text_mask": (torch.arange(longest) < torch.tensor(lengths)[:, None]).long(),
    }


def items(given: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Each item of a batch as a batch of one."""
    return [{name: value[i : i + 1] for name, value in given.items()} for i in range(len(given["latents"]))]


def gradients(loss: torch.Tensor, model: LuminaTransformer) -> dict[str, torch.Tensor]:
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()))))


@pytest.mark.parametrize("backend", ["sdpa", "split"])
def test_captions_of_every_length_in_one_batch_equal_batches_of_one(transformer, backend):
    transformer.requires_grad_(True).set_attention_backend(backend)
    given = inputs(LENGTHS, padding=5)
    given["text"].requires_grad_()
    target = torch.randn(given["latents"].shape, generator=torch.Generator().manual_seed(5))
    together = transformer(**given)
    losses = (together - target).square().mean(dim=(1, 2, 3))
    grads = gradients(losses.mean(), transformer)
    (text_grad,) = torch.autograd.grad(transformer(**given).square().sum(), given["text"])

    totals = {name: torch.zeros_like(grad) for name, grad in grads.items()}
    for number, alone in enumerate(items(given)):
        velocity = transformer(**alone)
        torch.testing.assert_close(together[number : number + 1], velocity, atol=1e-5, rtol=1e-5)
        loss = (velocity - target[number]).square().mean()
        torch.testing.assert_close(losses[number], loss, atol=1e-5, rtol=1e-5)
        for name, grad in gradients(loss / len(LENGTHS), transformer).items():
            totals[name] += grad
        (alone_grad,) = torch.autograd.grad(transformer(**alone).square().sum(), given["text"])
        torch.testing.assert_close(text_grad[number], alone_grad[number], atol=1e-5, rtol=1e-5)
        assert not text_grad[number, LENGTHS[number] :].any() and text_grad[number, : LENGTHS[number]].any()
    for name, grad in grads.items():
        assert grad.any(), name
        torch.testing.assert_close(grad, totals[name], atol=1e-5, rtol=1e-4, msg=name)


def test_padding_is_never_seen(transformer):
    given, longer = inputs((3, 7)), inputs((3, 7), padding=9)
    longer["text"][:, :7] = given["text"]
    longer["text"][0, 3:] = 1e4
    longer["text"][1, 7:] = torch.nan
    longer["latents"] = given["latents"]
    torch.testing.assert_close(transformer(**given), transformer(**longer), atol=1e-5, rtol=1e-5)


def test_a_batch_is_masked_only_where_its_captions_differ_in_length(transformer):
    masks: list[torch.Tensor | None] = []
    for blocks in (transformer.context_refiner, transformer.noise_refiner, transformer.layers):
        blocks[0].register_forward_pre_hook(lambda block, given: masks.append(given[2]))
    transformer(**inputs((7, 7), padding=2))
    assert masks == [None, None, None]
    masks.clear()
    transformer(**inputs((3, 7), padding=2))
    refined, _, joint = masks
    assert refined.tolist() == [[True] * 3 + [False] * 4, [True] * 7]
    assert joint.tolist() == [[True] * 3 + [False] * 4 + [True] * 6, [True] * 13]


def test_a_dry_run_needs_no_numbers_and_leaves_none(transformer):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        given = {name: mode.from_tensor(value) for name, value in inputs((3, 7)).items()}
        given["latents"].requires_grad_()
        out = transformer(**given)
        out.sum().backward()
        assert out.shape == (2, 16, 4, 6) and given["latents"].grad.shape == out.shape
    assert not transformer.grids.kept and transformer.kept_captions is None
    assert transformer(**inputs()).isfinite().all()


def test_rotations_are_computed_once_for_a_size_and_are_those_of_every_position(transformer, monkeypatch):
    computed = []
    ours = rope_rotations
    for module in (lumina, transformer_parts):
        monkeypatch.setattr(module, "rope_rotations", lambda ids, *rest: (computed.append(1), ours(ids, *rest))[1])
    sizes = [(rows, 3) for rows in range(2, 2 + KEPT_GRIDS)]
    for _ in range(3):
        for rows, columns in sizes:
            captions, images = transformer.rotations([3, 270], rows, columns)
            assert captions.shape == (1, 1, 270, 6) and images.shape == (2, 1, rows * columns, 6)
            ids = torch.tensor([[token, 0, 0] for token in range(270)])[None]
            assert torch.equal(captions, ours(ids, LUMINA.axes_dims, 10000.0))
            grid = [[length, row, column] for length in (3, 270) for row in range(rows) for column in range(columns)]
            ids = torch.tensor(grid).reshape(2, rows * columns, 3)
            assert torch.equal(images, ours(ids, LUMINA.axes_dims, 10000.0))
    assert len(computed) == len(sizes) + 1
    assert transformer.rotations([5, 5], 2, 3)[1].shape[0] == 1, "equal captions share what is theirs"
    transformer.rotations([5], 99, 3)
    assert len(transformer.grids.kept) == KEPT_GRIDS


def test_times_are_never_rounded_to_the_weights_dtype(transformer):
    """In bfloat16, 0.9001 and 0.9 would be the same."""
    transformer.to(torch.bfloat16)
    first, second = (transformer(**inputs() | {"timesteps": torch.tensor([time, time])}) for time in (0.9, 0.9001))
    assert torch.tensor(0.9).bfloat16() == torch.tensor(0.9001).bfloat16()
    assert first.dtype == torch.bfloat16 and not torch.equal(first, second)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_autocast_stays_close_to_float32(transformer, stored):
    expected = transformer(**inputs())
    transformer.to(stored)
    with torch.autocast("cpu", torch.bfloat16):
        actual = transformer(**inputs())
    assert (actual.float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_float16_stays_finite():
    block = JointTransformerBlock(LUMINA)
    fill_randomly(block, 0, "float16")
    for layer in (block.feed_forward.w1, block.feed_forward.w3):
        layer.weight.data.mul_(400)
    product = block.feed_forward.w1(torch.ones(1, 4, LUMINA.dim)) * block.feed_forward.w3(torch.ones(1, 4, LUMINA.dim))
    assert product.abs().max() > LARGEST_FLOAT16
    rope = rope_rotations(torch.zeros(1, 4, 3), LUMINA.axes_dims, 10000.0)
    out = block.half()(torch.ones(1, 4, LUMINA.dim).half(), rope, None, torch.zeros(1, LUMINA.time_dim).half())
    assert out.isfinite().all()


def test_caption_features_beyond_the_range_of_float16_are_no_limit_of_it(transformer):
    """Gemma 2 was trained in bfloat16. The first thing that happens to its features is a norm."""
    given = inputs()
    expected = transformer(**given)
    given["text"] = 1e6 * given["text"]
    torch.testing.assert_close(transformer(**given), expected, atol=1e-4, rtol=1e-4)
    actual = transformer.half()(**given)
    assert (actual.float() - expected).abs().max() < 0.02 * expected.abs().max()


def test_patches_hold_their_pixels_channel_by_channel():
    latents = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6).float()
    tokens = patchify(latents)
    assert tokens[1, 4].tolist() == [latents[1, c, 2 + y, 2 + x] for y in (0, 1) for x in (0, 1) for c in range(3)]
    assert torch.equal(unpatchify(tokens, 4, 6), latents)


def test_latents_that_cannot_be_cut_into_patches_are_refused(transformer):
    with pytest.raises(ValueError, match="5 x 4"):
        transformer(**inputs() | {"latents": torch.zeros(2, 16, 4, 5)})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"axes_dims": (4, 4, 2)}, "axes"),
        ({"axes_dims": (6, 3, 3)}, "axes"),
        ({"axes_dims": (6, 6)}, "axes"),
        ({"kv_heads": 3}, "4 heads of queries cannot share 3"),
        ({"kv_heads": 0}, "cannot share 0"),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        replace(LUMINA, **changes)


def test_lora_target_classes_hold_the_known_linears():
    with on_meta():
        model = LuminaTransformer(LuminaConfig())
    targets = [m for m in model.modules() if type(m).__name__ in ("JointTransformerBlock", "FinalLayer")]
    assert sum(isinstance(module, torch.nn.Linear) for block in targets for module in block.modules()) == 180


@pytest.mark.parametrize("backend", ["xformers", "flash", "sage"])
def test_an_attention_backend_that_is_not_there_is_named(transformer, backend):
    with pytest.raises(UserError, match=backend):
        transformer.set_attention_backend(backend)
