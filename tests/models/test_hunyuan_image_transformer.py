"""Behaviour of the transformer that training depends on: texts of several lengths, precision, memory features."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from library.errors import UserError
from library.models.hunyuan_image.transformer import (
    HunyuanImageConfig,
    HunyuanImageTransformer,
    MMDoubleStreamBlock,
    MMSingleStreamBlock,
)
from library.models.loading import on_meta
from library.models.transformer_parts import LARGEST_FLOAT16
from tools.make_tiny_models import HUNYUAN_IMAGE, fill_randomly

LENGTHS, GLYPHS = (3, 77, 256), (0, 30, 11)
SHORT = ((3, 7), (5, 0))


@pytest.fixture
def transformer() -> HunyuanImageTransformer:
    model = HunyuanImageTransformer(HUNYUAN_IMAGE)
    fill_randomly(model, 1, "behaviour")
    return model


def inputs(
    lengths: tuple[int, ...] = SHORT[0], glyphs: tuple[int, ...] = SHORT[1], padding: int = 0
) -> dict[str, torch.Tensor]:
    """The arguments of the forward pass; what is behind a text's last token is noise too."""
    random, batch, longest = torch.Generator().manual_seed(3), len(lengths), max(lengths) + padding
    return {
        "latents": torch.randn(batch, HUNYUAN_IMAGE.in_channels, 4, 6, generator=random),
        "timesteps": torch.linspace(100.5, 900.5, batch),
        "text": torch.randn(batch, longest, HUNYUAN_IMAGE.text_dim, generator=random),
        "text_mask": (torch.arange(longest) < torch.tensor(lengths)[:, None]).long(),
        "glyphs": torch.randn(batch, 40, HUNYUAN_IMAGE.glyph_dim, generator=random),
        "glyph_mask": (torch.arange(40) < torch.tensor(glyphs)[:, None]).long(),
    }


def items(given: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Each item of a batch as a batch of one."""
    return [{name: value[i : i + 1] for name, value in given.items()} for i in range(len(given["latents"]))]


def gradients(loss: torch.Tensor, model: HunyuanImageTransformer) -> dict[str, torch.Tensor]:
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: grad if grad is not None else torch.zeros_like(named[name]) for name, grad in zip(named, found)}


@pytest.mark.parametrize("backend", ["sdpa", "split"])
def test_texts_of_every_length_in_one_batch_equal_batches_of_one(transformer, backend):
    transformer.requires_grad_(True).set_attention_backend(backend)
    given = inputs(LENGTHS, GLYPHS, padding=5)
    features = [given["text"].requires_grad_(), given["glyphs"].requires_grad_()]
    target = torch.randn(given["latents"].shape, generator=torch.Generator().manual_seed(5))
    together = transformer(**given)
    losses = (together - target).square().mean(dim=(1, 2, 3))
    grads = gradients(losses.mean(), transformer)
    feature_grads = torch.autograd.grad(transformer(**given).square().sum(), features)

    totals = {name: torch.zeros_like(grad) for name, grad in grads.items()}
    for number, alone in enumerate(items(given)):
        velocity = transformer(**alone)
        torch.testing.assert_close(together[number : number + 1], velocity, atol=1e-5, rtol=1e-5)
        loss = (velocity - target[number]).square().mean()
        torch.testing.assert_close(losses[number], loss, atol=1e-5, rtol=1e-5)
        for name, grad in gradients(loss / len(LENGTHS), transformer).items():
            totals[name] += grad
        found = torch.autograd.grad(transformer(**alone).square().sum(), features, allow_unused=True)
        for together_grad, alone_grad, count in zip(feature_grads, found, (LENGTHS[number], GLYPHS[number])):
            assert not together_grad[number, count:].any() and bool(together_grad[number, :count].any()) == bool(count)
            expected = torch.zeros_like(together_grad) if alone_grad is None else alone_grad
            torch.testing.assert_close(together_grad[number], expected[number], atol=1e-5, rtol=1e-5)
    for name, grad in grads.items():
        assert grad.any(), name
        torch.testing.assert_close(grad, totals[name], atol=1e-5, rtol=1e-4, msg=name)


def test_attention_item_by_item_equals_masked_attention(transformer):
    given = inputs(LENGTHS, GLYPHS)
    masked = transformer(**given)
    transformer.set_attention_backend("split")
    torch.testing.assert_close(transformer(**given), masked, atol=1e-5, rtol=1e-5)


def test_padding_is_never_seen(transformer):
    given, longer = inputs(), inputs(padding=9)
    longer["text"][:, :7] = given["text"]
    longer["text"][0, 3:], longer["text"][1, 7:] = 1e4, torch.nan
    longer["latents"], longer["glyphs"] = given["latents"], given["glyphs"].clone()
    longer["glyphs"][0, 5:], longer["glyphs"][1] = torch.nan, 1e4
    torch.testing.assert_close(transformer(**given), transformer(**longer), atol=1e-5, rtol=1e-5)


def test_a_batch_is_masked_only_where_its_texts_differ_in_length(transformer):
    masks: list[torch.Tensor | None] = []
    refiner = transformer.txt_in.individual_token_refiner.blocks
    for blocks, place in ((refiner, 2), (transformer.double_blocks, 4), (transformer.single_blocks, 3)):
        blocks[0].register_forward_pre_hook(lambda block, given, place=place: masks.append(given[place]))
    transformer(**inputs((7, 7), (4, 4), padding=2))
    assert masks == [None, None, None]
    masks.clear()
    transformer(**inputs((3, 7), (5, 1)))
    refined, *joint = masks
    assert refined.tolist() == [[True] * 3 + [False] * 4, [True] * 7] and joint == [None, None], "equal sums"
    masks.clear()
    transformer(**inputs((3, 7), (6, 0), padding=2))
    _, double, single = masks
    image = [True] * 24
    assert double.dtype == torch.bool and torch.equal(double, single)
    assert double.tolist() == [[*image] + [True] * 9, [*image] + [True] * 7 + [False] * 2]


def test_an_item_has_no_more_text_than_its_glyphs_and_its_prompt(transformer):
    """Not the longest glyphs and the longest prompt, which may be in two items."""
    shapes = []
    transformer.double_blocks[0].register_forward_pre_hook(lambda block, given: shapes.append(tuple(given[1].shape)))
    transformer(**inputs((20, 3), (0, 15)))
    transformer(**inputs((20, 3), (0, 0)))
    assert shapes == [(2, 20, 64), (2, 20, 64)]


def test_glyphs_count_only_where_something_is_quoted(transformer):
    calls = []
    transformer.byt5_in.register_forward_hook(lambda *_: calls.append(1))
    plain, quoted = inputs((4,), (0,)), inputs((4,), (6,))
    nothing = transformer(**plain)
    assert not calls and torch.equal(nothing, transformer(**plain | {"glyphs": 100 * plain["glyphs"]}))
    one, other = transformer(**quoted), transformer(**quoted | {"glyphs": -quoted["glyphs"]})
    assert len(calls) == 2 and (one - other).abs().max() > 1e-2 and (one - nothing).abs().max() > 1e-2


def test_a_dry_run_needs_no_numbers_and_leaves_none(transformer):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        given = {name: mode.from_tensor(value) for name, value in inputs().items()}
        given["latents"].requires_grad_()
        shapes = []
        hook = transformer.double_blocks[0].register_forward_pre_hook(lambda _, given: shapes.append(given[1].shape))
        out = transformer(**given)
        out.sum().backward()
        hook.remove()
        assert out.shape == given["latents"].grad.shape == (2, 64, 4, 6)
        assert shapes == [(2, 40 + 7, 64)], "room for all glyphs"
    assert not transformer.grids.kept
    assert transformer(**inputs()).isfinite().all()


def test_blocks_compile_without_a_break(transformer):
    blocks = transformer.double_blocks[1], transformer.single_blocks[0]
    given = inputs((7, 7), (5, 0))
    given["latents"].requires_grad_()
    results = []
    torch._dynamo.reset()
    for compiles in (False, True):
        for block in blocks if compiles else ():
            block.forward = torch.compile(block.forward, backend="eager", fullgraph=True)
        out = transformer(**given)
        results.append((out, *torch.autograd.grad(out.square().sum(), given["latents"])))
    torch._dynamo.reset()
    for eager, compiled in zip(*results):
        torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=1e-5)


def test_times_are_neither_cut_to_integers_nor_rounded_to_the_weights_dtype(transformer):
    """In bfloat16, 833 and 834 would be the same."""
    transformer.to(torch.bfloat16)
    results = [transformer(**inputs() | {"timesteps": torch.tensor([t, t])}) for t in (833.0, 833.33, 834.0)]
    assert torch.tensor(833.0).bfloat16() == torch.tensor(834.0).bfloat16()
    assert results[0].dtype == torch.bfloat16
    assert not torch.equal(results[0], results[1]) and not torch.equal(results[1], results[2])


def test_hundreds_of_tokens_are_all_counted_in_bfloat16(transformer):
    """A sum of 301 ones in bfloat16 is 300: the last token would be lost, or the mean be wrong."""
    transformer.to(torch.bfloat16)
    given = inputs((301, 290), (0, 0))
    given = {name: value.bfloat16() if value.is_floating_point() else value for name, value in given.items()}
    given["timesteps"] = given["timesteps"].float()
    means = []
    transformer.txt_in.c_embedder.register_forward_pre_hook(lambda _, args: means.append(args[0]))
    first = transformer(**given)
    expected = [given["text"][item, :count].float().mean(dim=0) for item, count in enumerate((301, 290))]
    assert torch.equal(means[0], torch.stack(expected).bfloat16())
    given["text"][0, 300] += 10
    assert not torch.equal(transformer(**given), first)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_autocast_stays_close_to_float32(transformer, stored):
    expected = transformer(**inputs())
    transformer.to(stored)
    with torch.autocast("cpu", torch.bfloat16):
        actual = transformer(**inputs())
    assert (actual.float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_float16_stays_finite():
    double, single = MMDoubleStreamBlock(HUNYUAN_IMAGE), MMSingleStreamBlock(HUNYUAN_IMAGE)
    for block in (double, single):
        fill_randomly(block, 0, "float16")
    for layer in (double.img_mod.linear, double.txt_mod.linear, single.modulation.linear):
        layer.bias.data[-64:] = 6e4  # the last gate
    img, txt, vec = torch.randn(3, 1, 4, 64, generator=torch.Generator().manual_seed(1)).half()
    rope = torch.ones(1, 1, 8, 16, dtype=torch.complex64)
    vec, joined = vec[:, 0], torch.cat((img, txt), dim=1)
    for out in (*double.half()(img, txt, vec, rope), single.half()(joined, vec, rope)):
        assert out.isfinite().all() and out.abs().max() == LARGEST_FLOAT16


def test_patches_of_several_latents_are_put_back_where_they_were_taken():
    config = replace(HUNYUAN_IMAGE, patch_size=2)
    model = HunyuanImageTransformer(config)
    fill_randomly(model, 1, "patches")
    given = inputs()
    assert model(**given).shape == given["latents"].shape
    with pytest.raises(ValueError, match="5 x 4"):
        model(**given | {"latents": torch.zeros(2, 64, 4, 5)})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"axes_dims": (16, 8)}, "axes"),
        ({"axes_dims": (17, 15)}, "axes"),
        ({"axes_dims": (8, 8, 16)}, "axes"),
        ({"num_heads": 3}, "64 is not a multiple of 3"),
        ({"num_heads": 0}, "multiple of 0"),
        ({"single_mlp_hidden": 0}, "too few rows"),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        replace(HUNYUAN_IMAGE, **changes)


def test_lora_target_classes_hold_the_known_linears():
    """Ten in a double block, three in a single one."""
    with on_meta():
        model = HunyuanImageTransformer(HunyuanImageConfig())
    targets = [m for m in model.modules() if type(m).__name__ in ("MMDoubleStreamBlock", "MMSingleStreamBlock")]
    assert sum(isinstance(module, torch.nn.Linear) for block in targets for module in block.modules()) == 320


@pytest.mark.parametrize("backend", ["xformers", "flash", "sage"])
def test_an_attention_backend_that_is_not_there_is_named(transformer, backend):
    with pytest.raises(UserError, match=backend):
        transformer.set_attention_backend(backend)
