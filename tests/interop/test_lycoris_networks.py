"""``--network_module lycoris.kohya``: the published package trains, saves, resumes and loads in the real trainers."""

from __future__ import annotations

import importlib
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from library.errors import UserError
from library.options import parse_options
from library.safetensors_io import model_hash
from library.training.objective.step_inputs import ItemDraws
from tests.families.families import TINY
from tests.running import forget_accelerator, lycoris_package, trainer_class

pytestmark = pytest.mark.skipif(find_spec("lycoris") is None, reason="lycoris-lora is in requirements-dev.txt")

FAMILIES = ("sd1", "sdxl", "flux", "lumina")
ALGORITHMS = {
    "lokr": ("algo=lokr", "factor=4", "conv_dim=1"),
    "loha": ("algo=loha", "conv_dim=1"),
    "dora": ("algo=lora", "dora_wd=True", "conv_dim=1"),
}
PAIRS = (
    *(("sd1", "lokr"), ("flux", "dora"), ("lumina", "lokr"), ("hunyuan_image", "lokr")),
    *(pytest.param(*pair, marks=pytest.mark.thorough) for pair in (("sdxl", "dora"), ("flux", "loha"))),
)
PREFIXES = {
    "sd1": ("lora_te_text_model_encoder_layers_0_", "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_"),
    "sdxl": (
        *("lora_te1_text_model_encoder_layers_0_", "lora_te2_text_model_encoder_layers_0_"),
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_",
    ),
    "flux": (
        *("lora_te1_text_model_encoder_layers_0_", "lora_unet_double_blocks_0_img_attn_"),
        "lora_unet_single_blocks_0_linear1",
    ),
    "hunyuan_image": ("lora_unet_double_blocks_0_txt_attn_qkv", "lora_unet_single_blocks_0_linear2"),
    "lumina": ("lora_te1_layers_0_self_attn_", "lora_unet_layers_0_attention_qkv", "lora_unet_final_layer_linear"),
}


@pytest.fixture
def make_trainer(request, tmp_path, dataset_toml):
    """A family's trainer with more options, before its first step."""

    def make(family: str, *arguments: object, steps: int = 2, output: str = "out", **dataset: object) -> Any:
        forget_accelerator()
        model = request.getfixturevalue(f"few_blocks_{family}" if family.startswith("sd") else f"tiny_{family}")
        given = [*TINY[family].command(model), "--network_module", "lycoris.kohya"]
        given += ["--network_dim", 2, "--network_alpha", 1, "--learning_rate", "1e-2", "--max_train_steps", steps]
        given += ["--output_dir", tmp_path / output, "--max_data_loader_n_workers", 0]
        dataset = {"bucket_reso_steps": 64, "resolution": 64, "max_bucket_reso": 128, **dataset}
        given += ["--dataset_config", dataset_toml(**dataset), *arguments]
        kind = trainer_class(family)
        return kind.of(parse_options(kind.options_class, "test", [str(value) for value in given]))

    return make


@pytest.fixture
def train(make_trainer):
    """Train a family for a few steps; returns the trainer when it is done."""

    def run(family: str, *arguments: object, **settings: Any) -> Any:
        trainer = make_trainer(family, *arguments, **settings)
        trainer.train()
        return trainer

    return run


def losses(trainer: Any, multiplier: float = 1.0) -> torch.Tensor:
    """Losses of the first batch at a fixed noise level, by the models as this trainer left them."""
    group = trainer.data.train
    batch = group.load(group.plan(1, 0)[0], epoch=1, step=0, max_train_steps=1, seed=0)
    trainer.network.eval()
    trainer.network.set_multiplier(multiplier)
    with torch.no_grad():
        return trainer.step_loss(batch, ItemDraws(0, 0, batch.item_ids), timestep=500)


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def close(one: torch.Tensor, two: torch.Tensor) -> bool:
    return torch.allclose(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "algorithm"), PAIRS)
def test_it_trains_saves_loads_again_and_merges(train, tmp_path, capsys, family, algorithm):
    first = train(family, "--network_args", *ALGORITHMS[algorithm], steps=1, output="first")
    file = tmp_path / "first" / "last.safetensors"
    tensors = load_file(file)
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    for prefix in PREFIXES[family]:
        assert any(name.startswith(prefix) for name in tensors)
    found = metadata(file)
    assert found["ss_network_module"] == "lycoris.kohya"
    assert json.loads(found["ss_network_args"])["algo"] == ALGORITHMS[algorithm][0].removeprefix("algo=")
    assert found["sshs_model_hash"] == model_hash(file) and len(found["sshs_legacy_hash"]) == 8

    trained, untrained = losses(first), losses(first, 0.0)
    assert not close(trained, untrained)
    again = train(family, "--dim_from_weights", "--network_weights", file, "--learning_rate", 1e-30, steps=1)
    assert close(losses(again), trained) and close(losses(again, 0.0), untrained)
    saved = load_file(tmp_path / "out" / "last.safetensors")
    assert saved.keys() == tensors.keys() and all(torch.equal(saved[name], tensors[name]) for name in tensors)
    if family in ("sd1", "flux"):
        given = ("--network_args", *ALGORITHMS[algorithm], "--base_weights", file, "--base_weights_multiplier", 0.5)
        merged = train(family, *given, "--learning_rate", 1e-30, steps=1)
        assert close(losses(merged), losses(first, 0.5))
    assert "LyCORIS" not in capsys.readouterr().out


def test_a_file_is_continued_by_the_network_of_the_same_arguments(train, tmp_path):
    arguments = ("--network_args", *ALGORITHMS["lokr"])
    first = train("flux", *arguments, output="first")
    file = tmp_path / "first" / "last.safetensors"
    continued = train("flux", *arguments, "--network_weights", file, "--learning_rate", 1e-30, steps=1)
    assert close(losses(continued), losses(first))


@pytest.mark.parametrize(
    "arguments",
    [
        # Its files hold a product with the scalar, and the norm's limit works on that scalar.
        ("algo=lora", "use_scalar=True", "dora_wd=True", "--scale_weight_norms", 0.1),
        pytest.param(("algo=lokr", "factor=2", "rank_dropout=0.3", "module_dropout=0.3"), marks=pytest.mark.thorough),
        pytest.param(("algo=full",), marks=pytest.mark.thorough),
    ],
)
def test_a_resumed_run_ends_in_the_same_bytes(train, tmp_path, arguments):
    given = ("--network_args", *arguments, "--no_metadata", "--metadata_title", "t")
    train("flux", *given, "--save_every_n_steps", 2, "--save_state", steps=4, output="whole")
    train("flux", *given, "--resume", tmp_path / "whole" / "at-step00000002-state", steps=4, output="resumed")
    one, two = (load_file(tmp_path / name / "last.safetensors") for name in ("whole", "resumed"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert not all(
        torch.equal(one[name], tensor)
        for name, tensor in load_file(tmp_path / "whole" / "at-step00000002.safetensors").items()
    )


@pytest.fixture
def opened(make_trainer):
    """A family's text encoders and transformer as network modules take them."""

    def open_models(family: str) -> tuple[Any, Any]:
        trainer = make_trainer(family)
        trainer.check_options()
        trainer.prepare_output()
        trainer.start_processes()
        trainer.read_data()
        trainer.open_pipeline()
        trainer.load_models()
        encoders = trainer.load_network_encoders(trainer.trained_encoders)
        return encoders, trainer.network_base()

    return open_models


def names(module: Any, encoders: Any, base: Any, **arguments: str) -> set[str]:
    from library.training.network.contract import without_gaps

    network = module.create_network(1.0, 2, 1.0, None, without_gaps(encoders), base, dropout=None, **arguments)
    return {lora.lora_name for lora in [*network.unet_loras, *network.text_encoder_loras]}


@pytest.mark.parametrize("family", FAMILIES)
def test_presets_find_the_modules_that_our_own_loras_name(opened, family):
    own = importlib.import_module(f"networks.{'lora' if family.startswith('sd') else f'lora_{family}'}")
    package = lycoris_package()
    encoders, base = opened(family)
    attention_and_mlp = names(own, encoders, base)
    if family == "lumina":  # the package numbers the only text encoder of a list
        attention_and_mlp = {name.replace("lora_te_", "lora_te1_") for name in attention_and_mlp}
    everything = names(own, encoders, base, conv_dim="2") if family.startswith("sd") else attention_and_mlp
    ends = ("conv_in", "conv_out", "time_embedding_linear_1", "time_embedding_linear_2") if family == "sd1" else ()
    assert names(package, encoders, base) == everything | {f"lora_unet_{name}" for name in ends}
    assert names(package, encoders, base, preset="attn-mlp") == attention_and_mlp
    attention = names(package, encoders, base, preset="attn-only")
    marks = {"flux": ("_attn_qkv", "_attn_proj"), "lumina": ("_attention_",)}.get(family, ("_attn1_", "_attn2_"))
    assert attention == {name for name in attention_and_mlp if any(mark in name for mark in (*marks, "self_attn"))}
    assert names(package, encoders, base) == everything | {f"lora_unet_{name}" for name in ends}


def test_a_preset_file_in_the_field_s_class_names_works(opened, tmp_path):
    path = tmp_path / "preset.toml"
    path.write_text(
        'enable_conv = false\nunet_target_module = ["CrossAttention", "FeedForward"]\nunet_target_name = []\n'
        "text_encoder_target_module = []\ntext_encoder_target_name = []\n"
        '[module_algo_map.CrossAttention]\nalgo = "lokr"\nfactor = 2\n',
        encoding="utf-8",
    )
    encoders, base = opened("sd1")
    package = lycoris_package()
    network = package.create_network(1.0, 2, 1.0, None, encoders, base, algo="loha", preset=str(path))
    kinds = {(type(lora).__name__, "_attn" in lora.lora_name) for lora in network.loras}
    assert kinds == {("LokrModule", True), ("LohaModule", False)}


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        ("flux", ("algo=lorka",), 'no algo "lorka", only lora, locon, loha, lokr'),
        ("flux", ("algo=tlora",), "algo=tlora does not work here: its ranks follow the noise level"),
        ("flux", ("algo=dylora",), "use networks.dylora"),
        ("flux", ("factor=big",), 'factor must be a whole number, not "big"'),
        ("flux", ("preset=ful",), 'no preset "ful".*Did you mean "full"'),
        ("flux", ("train_norm=True",), "train_norm finds no norm in this model"),
        ("flux", ("preset=unet-convblock-only",), "preset=unet-convblock-only of lycoris.kohya finds no module"),
    ],
)
def test_what_cannot_work_is_refused_with_its_reason(make_trainer, family, arguments, message):
    with pytest.raises(UserError, match=message):
        make_trainer(family, "--network_args", *arguments).train()


def test_a_file_that_does_not_fit_is_refused(train, tmp_path):
    train("flux", "--network_args", "algo=lora", output="lora", steps=1)
    file = tmp_path / "lora" / "last.safetensors"
    with pytest.raises(UserError, match="nothing in .* fits this network"):
        train("flux", "--network_args", "algo=loha", "--network_weights", file)
    with pytest.raises(UserError, match="tensors of other sizes than this network"):
        train("flux", "--network_args", "algo=lora", "--network_weights", file, "--network_dim", 4)
    with pytest.raises(UserError, match="trained with other alphas .* such as 1 in place of 2"):
        train("flux", "--network_args", "algo=lora", "--network_weights", file, "--network_alpha", 2)


def test_norms_are_trained_and_continued_in_stable_diffusion(train, tmp_path):
    given = ("--network_args", "algo=lora", "train_norm=True", "preset=unet-transformer-only")
    train("sd1", *given, "--mixed_precision", "bf16", "--gradient_checkpointing", steps=1, output="first")
    tensors = load_file(tmp_path / "first" / "last.safetensors")
    assert {name.rpartition(".")[2] for name in tensors if "_norm" in name} == {"w_norm", "b_norm"}
    assert any(tensor.any() for name, tensor in tensors.items() if name.endswith("w_norm"))
    again = train("sd1", *given, "--network_weights", tmp_path / "first" / "last.safetensors", steps=1)
    assert again.progress.position.step == 1


def test_dora_at_multiplier_zero_is_the_base_model(train):
    trainer = train("flux", "--network_args", "algo=lora", "dora_wd=True", "--network_train_unet_only")
    untouched = losses(trainer, 0.0)
    assert not close(losses(trainer), untouched)
    trainer.pipeline.release("transformer")  # it is loaded anew, without the network
    assert torch.equal(losses(trainer), untouched)


def test_a_dry_run_plans_it_and_writes_nothing(train, tmp_path):
    train("flux", "--network_args", "algo=lokr", steps=1, output="first")
    file = tmp_path / "first" / "last.safetensors"
    train("flux", "--network_args", "algo=loha", "--base_weights", file, "--dry_run", output="planned")
    assert not (tmp_path / "planned").exists()
