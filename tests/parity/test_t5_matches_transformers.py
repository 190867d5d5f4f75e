"""T5's states are those of transformers' T5EncoderModel, from every layout."""

from __future__ import annotations

import pytest
import torch
from transformers import T5Config, T5EncoderModel

from library.errors import UserError
from library.models.loading import LoadSpec
from library.models.t5 import open_t5
from library.safetensors_io import save_file


@pytest.fixture(scope="module")
def reference() -> T5EncoderModel:
    torch.manual_seed(1)
    config = T5Config(
        vocab_size=100,
        d_model=48,
        d_kv=12,
        d_ff=80,
        num_layers=3,
        num_heads=5,
        relative_attention_num_buckets=32,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    model = T5EncoderModel(config).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)
    model.encoder.embed_tokens.weight = model.shared.weight
    return model


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(2, 100, (2, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    ids[mask == 0] = 0
    return ids, mask


@pytest.mark.parametrize("masked", [False, True])
def test_states_are_the_same(reference, tmp_path, masked):
    state = reference.state_dict()
    state.pop("encoder.embed_tokens.weight", None)
    save_file(state, tmp_path / "t5xxl.safetensors")
    ids, mask = tokens()
    mask = mask if masked else None
    with torch.no_grad():
        expected = reference(ids, attention_mask=mask).last_hidden_state
        actual = open_t5(tmp_path / "t5xxl.safetensors").load(LoadSpec.of(torch.float32))(ids, mask)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_every_layout_loads_to_the_same_weights(reference, tmp_path):
    shared = reference.shared.weight.detach()
    body = dict(reference.state_dict())
    body.pop("shared.weight"), body.pop("encoder.embed_tokens.weight", None)
    layouts = {
        "shared": {"shared.weight": shared},
        "embedded": {"encoder.embed_tokens.weight": shared},
        "both": {"shared.weight": shared, "encoder.embed_tokens.weight": shared},
        "full": {"shared.weight": shared, "decoder.block.0.layer.0.SelfAttention.q.weight": shared},
    }
    paths = []
    for name, embeddings in layouts.items():
        paths.append(tmp_path / f"{name}.safetensors")
        save_file(body | embeddings, paths[-1])
    reference.save_pretrained(tmp_path / "model" / "text_encoder_2", max_shard_size="50KB")
    paths.append(tmp_path / "model")
    for path in paths:
        loaded = open_t5(path).load(LoadSpec.of(torch.float32)).state_dict()
        assert torch.equal(loaded.pop("encoder.embed_tokens.weight"), shared)
        assert loaded.keys() == body.keys()
        assert all(torch.equal(loaded[key], value) for key, value in body.items())


def test_scaled_fp8_weights_are_multiplied_by_their_scales(reference, tmp_path):
    state = dict(reference.state_dict()) | {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    expected = {}
    for key in [key for key in state if "SelfAttention" in key and "bias" not in key]:
        scale = state[key].abs().max() / 448
        state[key] = (state[key] / scale).to(torch.float8_e4m3fn)
        state[key.replace(".weight", ".scale_weight")] = scale
        expected[key] = state[key].float() * scale
    save_file(state, tmp_path / "t5xxl_fp8_e4m3fn_scaled.safetensors")
    loaded = open_t5(tmp_path / "t5xxl_fp8_e4m3fn_scaled.safetensors").load(LoadSpec.of(torch.float32)).state_dict()
    assert len(expected) == 12 and all(torch.equal(loaded[key], value) for key, value in expected.items())


def test_states_do_not_change_from_call_to_call_even_in_train_mode(reference, tmp_path):
    """T5 is trained with dropout; prompts of a frozen encoder must not be dropped at random."""
    save_file(reference.state_dict(), tmp_path / "t5.safetensors")
    encoder = open_t5(tmp_path / "t5.safetensors").load(LoadSpec.of(torch.float32))
    assert not encoder.training and not any(parameter.requires_grad for parameter in encoder.parameters())
    ids, mask = tokens()
    with torch.no_grad():
        expected = encoder(ids, mask)
        assert torch.equal(encoder.train()(ids, mask), expected)


def test_float16_keeps_the_last_feed_forward_matrix_in_float32(reference, tmp_path):
    save_file(reference.state_dict(), tmp_path / "t5.safetensors")
    encoder = open_t5(tmp_path / "t5.safetensors").load(LoadSpec.of(torch.float16))
    kept = {name for name, value in encoder.state_dict().items() if value.dtype == torch.float32}
    assert kept == {f"encoder.block.{block}.layer.1.DenseReluDense.wo.weight" for block in range(3)}
    ids, mask = tokens()
    with torch.no_grad():
        expected = reference(ids, attention_mask=mask).last_hidden_state
        actual = encoder(ids, mask)
    assert (actual.float() - expected).abs().mean() < 0.03 * expected.abs().mean()


def test_modules_keep_the_names_that_lora_files_use(reference, tmp_path):
    save_file(reference.state_dict(), tmp_path / "t5.safetensors")
    encoder = open_t5(tmp_path / "t5.safetensors").load(LoadSpec.of(torch.float32))
    owners = {name: type(module).__name__ for name, module in encoder.named_modules()}
    assert owners["encoder.block.2.layer.0.SelfAttention"] == "T5Attention"
    assert owners["encoder.block.2.layer.1.DenseReluDense"] == "T5DenseGatedActDense"
    assert {"encoder.block.0.layer.0.SelfAttention.q", "encoder.block.0.layer.1.DenseReluDense.wi_1"} <= owners.keys()


def test_t5_version_1_0_is_named(reference, tmp_path):
    state = {key.replace("wi_0", "wi"): value for key, value in reference.state_dict().items() if "wi_1" not in key}
    save_file(state, tmp_path / "t5.safetensors")
    with pytest.raises(UserError, match=r"--t5xxl.*is a T5 v1\.0"):
        open_t5(tmp_path / "t5.safetensors", option="--t5xxl")
