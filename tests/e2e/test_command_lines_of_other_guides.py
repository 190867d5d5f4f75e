"""Command lines as guides for kohya-ss/sd-scripts and the kohya_ss GUI have them are planned, and trained, as they are.

The models are tiny (FLUX.1 with all its blocks, because guides say how many are swapped), images and resolutions small.
Whatever this suite does otherwise is said, each in one line.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from library.models.flux.transformer import FluxTransformer
from library.models.loading import on_meta
from tests.families.families import TINY
from tests.families.stable_diffusion import make_few_blocks
from tests.full_size import write_hollow
from tests.running import launched_script, run_in_process
from tools.make_tiny_models import transformer_config

LAUNCH = "accelerate launch --mixed_precision bf16 --num_cpu_threads_per_process 1"
FLUX_FILES = (
    "--pretrained_model_name_or_path {flux}/flux.safetensors --clip_l {flux}/clip_l.safetensors "
    "--t5xxl {flux}/t5xxl.safetensors --ae {flux}/ae.safetensors"
)
FLUX_24_GB = f"""
{LAUNCH} flux_train_network.py {FLUX_FILES} --dataset_config {{dataset}} --output_dir {{out}} --output_name lora
  --cache_latents_to_disk --cache_text_encoder_outputs --cache_text_encoder_outputs_to_disk --save_model_as safetensors
  --sdpa --persistent_data_loader_workers --max_data_loader_n_workers 2 --seed 42 --gradient_checkpointing
  --mixed_precision bf16 --save_precision bf16 --network_module networks.lora_flux --network_dim 4
  --network_train_unet_only --optimizer_type adamw8bit --learning_rate 1e-4 --fp8_base --highvram --max_train_epochs 4
  --save_every_n_epochs 1 --timestep_sampling shift --discrete_flow_shift 3.1582 --model_prediction_type raw
  --guidance_scale 1.0
"""
FLUX_12_GB = f"""
{LAUNCH} flux_train_network.py {FLUX_FILES} --dataset_config {{dataset}} --output_dir {{out}} --output_name lora
  --cache_latents_to_disk --cache_text_encoder_outputs --cache_text_encoder_outputs_to_disk --save_model_as safetensors
  --sdpa --persistent_data_loader_workers --max_data_loader_n_workers 2 --seed 42 --gradient_checkpointing
  --mixed_precision bf16 --save_precision bf16 --network_module networks.lora_flux --network_dim 4 --optimizer_type
  adafactor --optimizer_args "relative_step=False" "scale_parameter=False" "warmup_init=False" --split_mode
  --network_args "train_blocks=single" --lr_scheduler constant_with_warmup --max_grad_norm 0.0 --learning_rate 8e-4
  --fp8_base --highvram --max_train_epochs 16 --save_every_n_epochs 4 --timestep_sampling shift
  --discrete_flow_shift 3.1582 --model_prediction_type raw --guidance_scale 1 --loss_type l2
"""
SDXL_FOLDERS = """
accelerate launch --num_cpu_threads_per_process=2 "./sdxl_train_network.py" --enable_bucket --min_bucket_reso=64
  --max_bucket_reso=256 --pretrained_model_name_or_path="{sdxl}" --train_data_dir="{folders}"
  --reg_data_dir="{regularisation}" --resolution="128,128" --output_dir="{out}" --logging_dir="{logs}"
  --network_alpha="16" --save_model_as=safetensors --network_module=networks.lora --text_encoder_lr=5e-05
  --unet_lr=0.0001 --network_dim=32 --output_name="lora" --lr_scheduler_num_cycles="10" --no_half_vae
  --learning_rate="0.0001" --lr_scheduler="constant" --lr_warmup_steps="4" --train_batch_size="2"
  --max_train_steps="40" --save_every_n_epochs="1" --mixed_precision="bf16" --save_precision="bf16"
  --caption_extension=".txt" --cache_latents --cache_latents_to_disk --optimizer_type="AdamW8bit"
  --max_data_loader_n_workers="0" --clip_skip=2 --bucket_reso_steps=64 --gradient_checkpointing --xformers
  --bucket_no_upscale --noise_offset=0.0357 --adaptive_noise_scale=0.00357 --prior_loss_weight=1 --max_token_length=225
"""
SDXL_PRODIGY = """
accelerate launch --num_cpu_threads_per_process=2 sdxl_train_network.py --pretrained_model_name_or_path="{sdxl}"
  --train_data_dir="{folders}" --resolution="128,128" --output_dir="{out}" --output_name="lora" --enable_bucket
  --min_bucket_reso=64 --max_bucket_reso=256 --network_module=lycoris.kohya --network_dim=16 --network_alpha=8
  --network_args "algo=locon" "preset=full" "conv_dim=8" "conv_alpha=4" "rank_dropout=0" "module_dropout=0"
  "use_tucker=False" "use_scalar=False" "rank_dropout_scale=False" "train_norm=False" --optimizer_type="Prodigy"
  --optimizer_args "decouple=True" "weight_decay=0.01" "d_coef=2" "use_bias_correction=True" "safeguard_warmup=True"
  "betas=0.9,0.99" --learning_rate=1 --unet_lr=1 --text_encoder_lr=1 --lr_scheduler=cosine --train_batch_size=2
  --max_train_epochs=10 --save_every_n_epochs=1 --mixed_precision=bf16 --save_precision=bf16 --caption_extension=".txt"
  --cache_latents --gradient_checkpointing --sdpa --min_snr_gamma=5 --shuffle_caption --keep_tokens=1 --seed=1234
  --multires_noise_iterations=6 --multires_noise_discount=0.3 --persistent_data_loader_workers
"""
GUI_FILE = """
accelerate launch --dynamo_backend no --mixed_precision bf16 --num_processes 1 --num_machines 1
  --num_cpu_threads_per_process 2 sdxl_train_network.py --config_file {gui}
"""
GUI_KEYS = """
ae = ""
bucket_no_upscale = true
bucket_reso_steps = 64
cache_latents = true
caption_extension = ".txt"
clip_skip = 1
dynamo_backend = "no"
enable_bucket = true
epoch = 10
huber_c = 0.1
huber_scale = 1
huber_schedule = "snr"
huggingface_path_in_repo = ""
huggingface_repo_id = ""
huggingface_token = ""
learning_rate = 0.0001
logging_dir = "{logs}"
loss_type = "l2"
lr_scheduler = "cosine"
lr_scheduler_args = []
lr_scheduler_num_cycles = 1
lr_scheduler_power = 1
lr_scheduler_type = ""
lr_warmup_steps = 0
max_bucket_reso = 256
max_data_loader_n_workers = 0
max_grad_norm = 1
max_timestep = 1000
max_token_length = 75
max_train_epochs = 10
max_train_steps = 1600
min_bucket_reso = 64
mixed_precision = "bf16"
network_alpha = 1
network_args = []
network_dim = 8
network_module = "networks.lora"
noise_offset_type = "Original"
optimizer_args = []
optimizer_type = "AdamW8bit"
output_dir = "{out}"
output_name = "lora"
pretrained_model_name_or_path = "{sdxl}"
prior_loss_weight = 1
resolution = "128,128"
sample_prompts = "{prompts}"
sample_sampler = "euler_a"
save_every_n_epochs = 1
save_model_as = "safetensors"
save_precision = "bf16"
sdpa = true
text_encoder_lr = [ 0.0001,]
train_batch_size = 1
train_data_dir = "{folders}"
training_comment = ""
unet_lr = 0.0001
v_pred_like_loss = 0
vae = ""
wandb_run_name = "lora"
"""
DATASET = """
[general]
shuffle_caption = false
caption_extension = ".txt"
keep_tokens = 1

[[datasets]]
resolution = 128
batch_size = 1
enable_bucket = true
min_bucket_reso = 64
keep_tokens = 1

  [[datasets.subsets]]
  image_dir = "{images}"
  class_tokens = "ohwx"
  num_repeats = 10
"""
THREADS = "no effect (the loader's threads always stay): --persistent_data_loader_workers"
SIDES = "no effect with bucket_no_upscale: --min_bucket_reso, --max_bucket_reso"
KEEP = "no effect without shuffle_caption, token_warmup_step or caption_tag_dropout_rate: keep_tokens"
CLIP_SKIP = "no effect for Stable Diffusion XL: --clip_skip"
DIFFERENCES: dict[str, tuple[str, list[str]]] = {
    "FLUX, 24 GB": (FLUX_24_GB, [THREADS, KEEP]),
    "FLUX, 12 GB": (FLUX_12_GB, ["--split_mode is deprecated; use --blocks_to_swap.", THREADS, KEEP]),
    "SDXL, folders": (
        SDXL_FOLDERS,
        [
            "--lr_scheduler constant with --lr_warmup_steps is constant_with_warmup",
            "--xformers: the package xformers is not installed; attention is PyTorch's own (--sdpa).",
            CLIP_SKIP,
            "no effect with --lr_scheduler constant_with_warmup: --lr_scheduler_num_cycles",
            SIDES,
        ],
    ),
    "SDXL, Prodigy": (SDXL_PRODIGY, [THREADS]),
    "a file of the GUI": (
        GUI_FILE,
        [
            "{gui}: no effect in this script: ae, epoch, noise_offset_type",
            CLIP_SKIP,
            "no effect without --sample_every_n_epochs: --sample_prompts, --sample_sampler",
            "no effect without --log_with wandb: --wandb_run_name",
            SIDES,
        ],
    ),
}
"""Each command line, and what is said of it before the data are read, in that order."""
NO_DIFFERENCE = ("Training the flow velocity (--model_prediction_type raw).",)


@pytest.fixture(autouse=True)
def no_xformers(monkeypatch):
    """A machine may have the package; these lines are for one without it."""
    monkeypatch.setitem(sys.modules, "xformers", None)


@pytest.fixture(scope="module")
def places(tmp_path_factory, image_folder) -> dict[str, Path]:
    """What stands for the paths of the command lines."""
    place = tmp_path_factory.mktemp("guides")
    found = {name: place / name for name in ("flux", "folders", "regularisation", "out", "logs")}
    images = found["folders"] / "10_ohwx woman"
    for folder in (images, found["regularisation"] / "1_woman"):
        folder.mkdir(parents=True)
        for number in range(4):
            for suffix in (".png", ".txt"):
                shutil.copy(image_folder / f"{number:02d}{suffix}", folder)
    (place / "prompt.txt").touch()
    found |= {
        "images": images,
        "prompts": place / "prompt.txt",
        "dataset": place / "data.toml",
        "gui": place / "gui.toml",
    }
    found["sdxl"] = make_few_blocks(place, "sdxl")
    found["flux"].mkdir()
    TINY["flux"].make(found["flux"])
    with on_meta():
        all_blocks = FluxTransformer(replace(transformer_config(), depth=19, depth_single=38))
    write_hollow(found["flux"] / "flux.safetensors", all_blocks.state_dict(), torch.bfloat16)
    for name, text in (("dataset", DATASET), ("gui", GUI_KEYS)):
        found[name].write_text(text.format(**found), encoding="utf-8")
    return found


def begun(line: str, places: dict[str, Path], *more: str) -> subprocess.CompletedProcess[str]:
    """What becomes of the script that a command line launches, with ``more`` at its end."""
    script, arguments = launched_script(shlex.split(line.format(**places)))
    result = run_in_process(script.removeprefix("./"), *arguments, *more)
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def said_ahead(stderr: str) -> list[str]:
    """The messages before the data are read."""
    messages = re.findall(
        r"^\d\d:\d\d:\d\d (?:INFO|WARNING) +(.*)$", stderr.partition("Training data:")[0], re.MULTILINE
    )
    return [message for message in messages if message and message not in NO_DIFFERENCE]


@pytest.mark.parametrize("name", DIFFERENCES)
def test_it_is_planned_and_each_difference_is_said_once(places, name):
    line, differences = DIFFERENCES[name]
    result = begun(line, places, "--dry_run")
    assert said_ahead(result.stderr) == [text.format(**places) for text in differences]
    assert result.stderr.count("no effect") == sum("no effect" in text for text in differences)
    assert result.stdout == "" and "WARNING" not in result.stderr.partition("Training data:")[2]
    assert result.stderr.splitlines()[-1].startswith("Verdict: fits on GPUs of 8, 12, 16 and 24 GB (")
    assert not places["out"].exists()


@pytest.mark.thorough
@pytest.mark.parametrize("name", DIFFERENCES)
def test_it_is_trained(places, name):
    begun(DIFFERENCES[name][0], places, "--max_train_epochs", "None", "--max_train_steps", "1")
    assert (places["out"] / "lora.safetensors").is_file()
    shutil.rmtree(places["out"])
