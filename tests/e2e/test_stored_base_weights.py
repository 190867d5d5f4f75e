"""Training on a base model in each storage format, as a user asks for it: options, what comes out, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from library.memory import formats
from library.memory.storage import BlocksStoredAs, Storage, block_linears
from library.memory.stored_linear import StoredLinear
from library.models.flux.checkpoint import open_transformer
from library.models.loading import LoadSpec
from tests.e2e.test_flux_training_options import SMALL
from tests.running import lycoris_package, make_trainer, no_weights_are_read, run_in_process, train

OPTIONS = {
    "--fp8_base_unet": Storage("fp8"),
    "--fp8_scaled": Storage("fp8", "block"),
    "--fp8_scaled --fp8_scaled_granularity tensor": Storage("fp8"),
    "--fp8_scaled --fp8_scaled_granularity channel": Storage("fp8", "channel"),
    "--base_format int8": Storage("int8"),
    "--base_format nf4": Storage("nf4"),
}
CACHED = ("--cache_latents", "--cache_text_encoder_outputs", "--network_train_unet_only")


@pytest.fixture
def given(flux_command, dataset_toml) -> list[object]:
    """A command line of four steps in bfloat16, on cached images and captions, but for the output folder."""
    words = [*flux_command, *CACHED, "--mixed_precision", "bf16", "--dataset_config", dataset_toml(**SMALL)]
    return [
        *words,
        "--seed",
        "3",
        "--max_train_steps",
        "4",
        "--max_data_loader_n_workers",
        "0",
        "--no_report",
        "--output_name",
        "lora",
    ]


@pytest.fixture
def rounded(tiny_flux, tmp_path):
    """A file of the transformer whose numbers are what a format makes of the original's."""

    def make(storage: Storage) -> Path:
        state = load_file(tiny_flux.transformer)
        for name in block_linears(open_transformer(tiny_flux.transformer).meta_module()):
            weight = formats.quantise(state[f"{name}.weight"], storage).to(torch.bfloat16)
            state[f"{name}.weight"] = weight.float()
        save_file(state, tmp_path / "rounded.safetensors")
        return tmp_path / "rounded.safetensors"

    return make


def lora(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "lora.safetensors")


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(tensor.any() for name, tensor in one.items() if name.endswith("lora_up.weight"))


@pytest.mark.parametrize(
    "options",
    [
        "--fp8_scaled --fp8_scaled_granularity channel",
        "--base_format nf4",
        *(
            pytest.param(options, marks=pytest.mark.thorough)
            for options in ("--fp8_scaled", "--fp8_scaled --fp8_scaled_granularity tensor", "--base_format int8")
        ),
    ],
)
def test_a_lora_is_to_the_bit_that_of_the_rounded_weights(given, rounded, tmp_path, options):
    """Blocks are streamed, and one format of each width is tried without that, too.

    With gradient checkpointing, accumulation and sample images; the optimizer is one that sees gradients' sizes.
    """
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2 --d 1\n", encoding="utf-8")
    learning = ["--optimizer_type", "SGD", "--learning_rate", "1", "--gradient_checkpointing", "--max_train_steps", "2"]
    learning += ["--gradient_accumulation_steps", "2", "--sample_every_n_steps", "2", "--sample_prompts", prompts]
    streamed = [*options.split(), "--blocks_to_swap", "2", "--output_dir", tmp_path / "streamed"]
    pipeline = train("flux", *given, *learning, *streamed).pipeline
    stream = pipeline.applied["transformer"].stream
    assert stream.loads > 0 and stream.misses == 0
    layers = [layer for layer in pipeline.load_transformer().modules() if isinstance(layer, StoredLinear)]
    assert len(layers) > 10
    folders = [tmp_path / "streamed"]
    if options in ("--fp8_scaled", "--base_format nf4"):
        train("flux", *given, *learning, *options.split(), "--output_dir", tmp_path / "stored")
        folders.append(tmp_path / "stored")
    plain = [*given, *learning, "--output_dir", tmp_path / "plain"]
    plain[plain.index("--pretrained_model_name_or_path") + 1] = rounded(OPTIONS[options])
    train("flux", *plain)
    for folder in folders:
        assert_equal(lora(folder), lora(tmp_path / "plain"))
    images = [next((folder / "sample").glob("*.png")) for folder in (*folders, tmp_path / "plain")]
    assert len({Image.open(image).tobytes() for image in images}) == 1


@pytest.mark.parametrize(
    ("network", "options"),
    [
        pytest.param(
            "networks.oft_flux --network_args enable_all_linear=True",
            "--base_format nf4",
            marks=pytest.mark.thorough,
        ),
        ("networks.lora_flux --network_args ggpo_sigma=0.03 ggpo_beta=0.01", "--base_format int8"),
        pytest.param("lycoris.kohya --network_args algo=loha", "--fp8_scaled", marks=pytest.mark.thorough),
        pytest.param(
            "lycoris.kohya --network_args algo=lora dora_wd=True", "--base_format nf4", marks=pytest.mark.thorough
        ),
    ],
    ids=["oft", "ggpo", "loha", "dora"],
)
def test_so_is_every_other_network(given, rounded, tmp_path, network, options):
    """Also those that look at the weights themselves."""
    if "lycoris" in network:
        lycoris_package()
    words = [*given, "--network_module", *network.split(), "--learning_rate", "1e-2", "--max_train_steps", "2"]
    train("flux", *words, *options.split(), "--output_dir", tmp_path / "stored")
    words[words.index("--pretrained_model_name_or_path") + 1] = rounded(OPTIONS[options])
    train("flux", *words, "--output_dir", tmp_path / "plain")
    stored, plain = lora(tmp_path / "stored"), lora(tmp_path / "plain")
    assert stored.keys() == plain.keys()
    assert all(torch.equal(stored[name], plain[name]) for name in stored)


@pytest.mark.parametrize("options", ["--fp8_scaled", pytest.param("--base_format nf4", marks=pytest.mark.thorough)])
def test_a_lora_is_merged_into_the_base_model_beforehand_and_a_run_is_resumed(given, tiny_flux, tmp_path, options):
    """--base_weights: the sum of rounded weight and LoRA is rounded again. Then two steps and two more, which stream
    their blocks, are four."""
    learning = ["--learning_rate", "1", "--optimizer_type", "SGD", "--max_train_steps", "1"]
    train("flux", *given, *learning, "--output_dir", tmp_path / "first")
    base = ["--base_weights", tmp_path / "first" / "lora.safetensors", *options.split(), "--save_state"]
    words = [*given, *base, "--save_every_n_steps", "2"]
    trainer = train("flux", *words, "--output_dir", tmp_path / "whole")
    delta, storage = lora(tmp_path / "first"), OPTIONS[options]
    original = load_file(tiny_flux.transformer)
    transformer, seen = trainer.pipeline.load_transformer(), 0
    for name, layer in transformer.named_modules():
        if not isinstance(layer, StoredLinear):
            continue
        key = f"lora_unet_{name.replace('.', '_')}"
        before, after = original[f"{name}.weight"], layer.dense(torch.float32)
        unmerged = formats.quantise(before, storage).to(torch.float32)
        if f"{key}.alpha" not in delta:
            assert torch.equal(after, unmerged)
            continue
        down, up = delta[f"{key}.lora_down.weight"], delta[f"{key}.lora_up.weight"]
        change = up @ down * (delta[f"{key}.alpha"] / len(down))
        expected = formats.quantise(unmerged.bfloat16().float() + change, storage).to(torch.float32)
        assert (after != expected).float().mean() < 0.01  # a sum in another order may round to the next code
        seen += 1
    assert seen > 10
    state = tmp_path / "whole" / "lora-step00000002-state"
    train("flux", *words, "--resume", state, "--blocks_to_swap", "2", "--output_dir", tmp_path / "resumed")
    assert_equal(lora(tmp_path / "resumed"), lora(tmp_path / "whole"))


@pytest.mark.parametrize(("options", "transformer"), [("--fp8_scaled", "float8_e4m3fn"), ("--base_format nf4", "nf4")])
def test_text_encoders_follow_fp8_base(flux_command, dataset_toml, tmp_path, options, transformer):
    words = [*flux_command, "--dataset_config", dataset_toml(**SMALL), "--max_train_steps", "1"]
    words += [
        "--output_dir",
        tmp_path,
        "--mixed_precision",
        "bf16",
        "--fp8_base",
        "--max_data_loader_n_workers",
        "0",
        "--no_report",
    ]
    modules = train("flux", *words, *options.split()).pipeline.modules
    kept = {
        part: {layer.format_name for layer in modules[part].modules() if isinstance(layer, StoredLinear)}
        for part in ("transformer", "clip_l", "t5xxl")
    }
    assert kept == {"transformer": {transformer}, "clip_l": {"float8_e4m3fn"}, "t5xxl": {"float8_e4m3fn"}}


@pytest.mark.parametrize("options", OPTIONS)
def test_options_name_a_format(given, tmp_path, options):
    trainer = make_trainer("flux", *given, *options.split(), "--output_dir", tmp_path)
    for step in "check_options prepare_output check_network start_processes read_data open_pipeline".split():
        getattr(trainer, step)()
    assert trainer.pipeline.dtypes["transformer"].storage == OPTIONS[options]


# ---- before anything is loaded ---------------------------------------------------------------------------------------


FORMATS = {"--fp8_scaled": "float8_e4m3fn", "--base_format int8": "int8", "--base_format nf4": "nf4"}


@pytest.mark.parametrize(
    "options", [pytest.param("--base_format int8", marks=pytest.mark.thorough), "--fp8_scaled", "--base_format nf4"]
)
def test_a_dry_run_plans_the_memory_that_is_then_used_and_reads_no_weights(given, tiny_flux, tmp_path, options):
    with no_weights_are_read():
        done = run_in_process("flux_train_network.py", *given, "--dry_run", *options.split(), "--output_dir", tmp_path)
    assert done.returncode == 0 and "All checks passed" in done.stderr and "unknown" not in done.stderr
    layers = BlocksStoredAs(torch.bfloat16, OPTIONS[options])
    loaded = open_transformer(tiny_flux.transformer).load(LoadSpec.of(layers))
    size = sum(t.numel() * t.element_size() for t in (*loaded.parameters(), *loaded.buffers()))
    values = sum(value.numel() for value in load_file(tiny_flux.transformer).values())
    (line,) = [line.split() for line in done.stderr.splitlines() if line.startswith("    transformer ")]
    kib = f"{size / 1024:.0f}"
    assert line == ["transformer", f"{values:,}", "parameters", FORMATS[options], kib, "KiB"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--fp8_scaled --mixed_precision no", "--fp8_scaled needs --mixed_precision fp16 or bf16."),
        ("--base_format nf4 --mixed_precision no", "--base_format needs --mixed_precision fp16 or bf16."),
        ("--base_format int8 --fp8_scaled", "--base_format and --fp8_scaled are mutually exclusive: both say how"),
        ("--base_format nf4 --fp8_base_unet", "--base_format and --fp8_base_unet are mutually exclusive: both say how"),
        ("--fp8_fast", "--fp8_fast needs weights in fp8: --fp8_base, --fp8_base_unet or --fp8_scaled."),
        ("--fp8_fast --fp8_base --base_format int8", "--fp8_fast multiplies weights in fp8, and --base_format keeps"),
        (
            "--fp8_fast --fp8_scaled --fp8_scaled_granularity block",
            "--fp8_fast needs --fp8_scaled_granularity tensor or channel, not block.",
        ),
        ("--base_format int4", "--base_format must be one of int8, nf4, not 'int4'."),
    ],
)
def test_what_cannot_be_is_one_sentence(given, tmp_path, options, sentence):
    with no_weights_are_read():
        done = run_in_process("flux_train_network.py", *given, *options.split(), "--output_dir", tmp_path / "out")
    assert done.returncode == 2 and sentence in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
@pytest.mark.parametrize("options", ["--fp8_scaled", "--fp8_base", "--fp8_base_unet", "--fp8_scaled --dry_run"])
def test_products_in_fp8_need_hardware_for_them(given, tmp_path, options):
    with no_weights_are_read():
        words = [*given, "--fp8_fast", *options.split(), "--output_dir", tmp_path / "out"]
        done = run_in_process("flux_train_network.py", *words)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "error: --fp8_fast needs an NVIDIA GPU that multiplies in fp8 (compute capability 8.9 or above: RTX 40 series, "
        "H100 and later), and this run is on the device cpu; leave it out."
    )
