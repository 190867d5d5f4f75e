"""CLIP's text encoder is transformers' CLIPTextModel to the bit, from every layout, under the names of LoRA files."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from library.checkpoints import open_checkpoint
from library.errors import UserError
from library.models.clip import ACTIVATIONS, ClipConfig, ClipFile, ClipTextModel, open_clip
from library.models.loading import LoadSpec, TensorSource
from library.safetensors_io import save_file

END = 99


@pytest.fixture(scope="module")
def reference() -> CLIPTextModel:
    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=100,
        hidden_size=128,
        intermediate_size=200,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=20,
        hidden_act="quick_gelu",
        bos_token_id=98,
        eos_token_id=END,
        pad_token_id=END,
    )
    model = CLIPTextModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def tokens() -> torch.Tensor:
    rows = torch.randint(0, 98, (3, 20), generator=torch.Generator().manual_seed(0))
    rows[:, 0] = 98
    for row, end in enumerate((4, 19, 11)):
        rows[row, end:] = END
    return rows


def save(state: dict[str, torch.Tensor], path, prefix: str = "text_model.", **extra: torch.Tensor):
    save_file({prefix + key: value for key, value in state.items()} | extra, path)
    return path


def test_pooled_text_is_the_same_from_every_layout(reference, tmp_path):
    with torch.no_grad():
        expected = reference(tokens()).pooler_output
    state = reference.state_dict()
    reference.save_pretrained(tmp_path / "model" / "text_encoder")
    paths = [
        save(state, tmp_path / "clip_l.safetensors"),
        save(state, tmp_path / "bare.safetensors", prefix=""),
        save(
            state,
            tmp_path / "extras.safetensors",
            logit_scale=torch.ones(()),
            **{"text_projection.weight": torch.eye(128)},
        ),
        save(
            state,
            tmp_path / "all_in_one.safetensors",
            prefix="text_encoders.clip_l.transformer.text_model.",
            **{"model.diffusion_model.img_in.weight": torch.ones(1)},
        ),
        tmp_path / "model",
        tmp_path / "model" / "text_encoder",
    ]
    for path in paths:
        with torch.no_grad():
            actual = open_clip(path).load(LoadSpec.of(torch.float32))(tokens(), END)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


SIZES = {
    "narrow": {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 1},
    "heads of 64": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 2},
    "heads of 20": {"hidden_size": 100, "intermediate_size": 100, "num_hidden_layers": 1, "num_attention_heads": 5},
}
STD = {"narrow": 0.3, "heads of 64": 0.2, "heads of 20": 0.2}


def pair(size: str, activation: str, dtype: torch.dtype) -> tuple[ClipTextModel, CLIPTextModel]:
    """Ours and theirs, of the same weights."""
    torch.manual_seed(2)
    sizes: dict[str, Any] = {**SIZES[size], "vocab_size": 100, "hidden_act": activation}
    theirs = CLIPTextModel(CLIPTextConfig(**sizes, bos_token_id=98, eos_token_id=END, pad_token_id=END)).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=STD[size])
    ours = ClipTextModel(ClipConfig(**sizes)).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours.to(dtype), theirs.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size", SIZES)
def test_states_and_gradients_are_the_same_to_the_bit(size, activation, dtype):
    ours, theirs = pair(size, activation, dtype)
    for ids in (tokens(), tokens()[:1, :7]):
        mine, reference = ours(ids), theirs(ids, output_hidden_states=True)
        assert len(mine.hidden_states) == len(reference.hidden_states) == len(ours.encoder.layers) + 1
        for one, other in zip(mine.hidden_states, reference.hidden_states, strict=True):
            assert torch.equal(one, other)
        assert torch.equal(mine.last_hidden_state, reference.last_hidden_state)
        weights = torch.randn(mine.last_hidden_state.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
        for model, states in ((ours, mine.last_hidden_state), (theirs, reference.last_hidden_state)):
            model.zero_grad()
            (states * weights).sum().backward()
        for (name, parameter), (their_name, other) in zip(
            ours.named_parameters(), theirs.named_parameters(), strict=True
        ):
            assert name == their_name and torch.equal(parameter.grad, other.grad)


def test_under_autocast_states_are_the_same_to_the_bit():
    ours, theirs = pair("heads of 64", "quick_gelu", torch.float32)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(ours(tokens()).last_hidden_state, theirs(tokens()).last_hidden_state)


def test_an_unknown_activation_is_named(reference, tmp_path):
    config = {"config": '{"hidden_act": "swish"}'}
    state = {f"text_model.{key}": value for key, value in reference.state_dict().items()}
    save_file(state, tmp_path / "clip.safetensors", config)
    with pytest.raises(UserError, match=r'"hidden_act" in its configuration is "swish"; "quick_gelu" and "gelu" are'):
        open_clip(tmp_path / "clip.safetensors")


def test_the_activation_is_quick_gelu(reference, tmp_path):
    exact = CLIPTextModel(CLIPTextConfig(**reference.config.to_dict() | {"hidden_act": "gelu"})).eval()
    exact.load_state_dict(reference.state_dict())
    encoder = open_clip(save(reference.state_dict(), tmp_path / "clip.safetensors")).load(LoadSpec.of(torch.float32))
    with torch.no_grad():
        assert (encoder(tokens(), END) - exact(tokens()).pooler_output).abs().max() > 1e-3


def test_pooling_takes_the_first_end_token_even_where_ids_above_it_exist(reference, tmp_path):
    """Added embeddings have ids above the end token's; an argmax over ids would pool at them."""
    encoder = open_clip(save(reference.state_dict(), tmp_path / "clip.safetensors")).load(LoadSpec.of(torch.float32))
    rows = tokens()
    end = 50
    rows[rows == end] = 51
    rows[:, 7:] = end
    with torch.no_grad():
        hidden = reference(rows).last_hidden_state
        torch.testing.assert_close(encoder(rows, end), hidden[:, 7], atol=1e-5, rtol=1e-5)


def full_size(tmp_path) -> ClipFile:
    sizes = dict(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=77,
        hidden_act="quick_gelu",
    )
    save_file({"any": torch.ones(1)}, tmp_path / "any.safetensors")
    return ClipFile(TensorSource(open_checkpoint(tmp_path / "any.safetensors")), sizes)


def test_modules_keep_the_names_that_lora_files_use(tmp_path, monkeypatch):
    monkeypatch.setattr("library.models.pipeline.load_module", lambda module, *_: module)
    encoder = full_size(tmp_path).load(LoadSpec.of(torch.float32))
    assert len(encoder.state_dict()) == 196
    owners = [
        (name, module)
        for name, module in encoder.named_modules()
        if type(module).__name__ in ("CLIPAttention", "CLIPMLP")
    ]
    linears = [
        f"{name}.{child}"
        for name, owner in owners
        for child, module in owner.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    assert len(linears) == 72
    assert "text_model.encoder.layers.0.self_attn.q_proj" in linears
    assert "text_model.encoder.layers.11.mlp.fc2" in linears


def test_a_width_without_heads_of_64_takes_them_from_the_metadata(tmp_path):
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=100,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=3,
        max_position_embeddings=20,
        eos_token_id=END,
        bos_token_id=98,
        pad_token_id=END,
    )
    model = CLIPTextModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    state = {f"text_model.{key}": value for key, value in model.state_dict().items()}
    save_file(state, tmp_path / "clip.safetensors", {"config": '{"num_attention_heads": 3}'})
    with torch.no_grad():
        actual = open_clip(tmp_path / "clip.safetensors").load(LoadSpec.of(torch.float32))(tokens(), END)
        torch.testing.assert_close(actual, model(tokens()).pooler_output, atol=1e-5, rtol=1e-5)
    save_file(state, tmp_path / "wrong.safetensors", {"config": '{"num_attention_heads": 5}'})
    with pytest.raises(UserError, match="5 attention heads"):
        open_clip(tmp_path / "wrong.safetensors")
