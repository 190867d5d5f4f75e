"""Nothing is written outside the folders that the command line names, whatever names and metadata say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library.checkpoints import open_checkpoint
from library.errors import UserError
from library.generation.image_outputs import ImageOutputOptions, ImageOutputs
from library.generation.image_prompts import ImagePrompt
from tests.faults.corpus import encoded
from tests.running import run_in_process

CLIMBING = ("../x", "..\\x", "/tmp/x", "C:\\x", "a/../../x", "..")


@pytest.mark.parametrize("name", CLIMBING)
@pytest.mark.parametrize("option", ["--output_name", "--log_prefix", "--log_tracker_name"])
def test_names_of_a_run_stay_in_its_folders(flux_command, dataset_toml, tmp_path, option, name):
    given = [*flux_command, "--dataset_config", dataset_toml(), "--output_dir", tmp_path / "out", option, name]
    result = run_in_process("flux_train_network.py", *given, "--logging_dir", tmp_path / "logs")
    assert result.returncode == 2 and f"error: {option} " in result.stderr, result.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".toml"]


@pytest.mark.parametrize("name", [*CLIMBING, "sub/x.safetensors"])
def test_an_index_of_shards_names_files_beside_it(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "x")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}), encoding="utf-8")
    with pytest.raises(UserError, match="is not a valid index of shards: .* is not beside it"):
        open_checkpoint(index)


def test_the_name_of_a_start_image_stays_in_the_output_folder(tmp_path):
    source = tmp_path / "in" / "..x...png"
    source.parent.mkdir()
    source.write_bytes(encoded("PNG"))
    options = ImageOutputOptions(outdir=str(tmp_path / "out"), use_original_file_name=True)
    outputs = ImageOutputs(options, lambda number: source)
    (image,) = outputs.wanted([ImagePrompt(prompt="a", seed=1)])
    name = outputs._names[image.number]
    assert name is not None and next(name.paths()).parent == tmp_path / "out"


def test_metadata_of_a_lora_file_decide_no_path(tmp_path):
    """All that programs write into a LoRA file and other programs read, as paths that lead elsewhere."""
    keys = "ss_output_name ss_tag_frequency ss_dataset_dirs modelspec.title modelspec.thumbnail ss_sd_model_name"
    keys += " ss_vae_name ss_training_comment ss_network_module ss_session_id ss_new_sd_model_hash"
    climbing = str(tmp_path / "climbed")
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    lora = {f"{layer}.lora_down.weight": torch.ones(2, 320), f"{layer}.lora_up.weight": torch.ones(320, 2)}
    path, out = tmp_path / "in" / "lora.safetensors", tmp_path / "out" / "merged.safetensors"
    path.parent.mkdir()
    out.parent.mkdir()
    for value in (climbing, "../../climbed", json.dumps({climbing: {"../climbed": 1}})):
        save_file(lora, path, dict.fromkeys(keys.split(), value))
        for script, words in (
            ("networks/merge_lora.py", ["--models", path, "--ratios", 1, "--save_to", out]),
            ("networks/svd_merge_lora.py", ["--models", path, "--ratios", 1, "--save_to", out, "--new_rank", 1]),
            ("networks/resize_lora.py", ["--model", path, "--save_to", out, "--new_rank", 1]),
            ("networks/extract_lora_from_dylora.py", ["--model", path, "--save_to", out, "--unit", 1]),
            ("tools/show_metadata.py", [path]),
        ):
            result = run_in_process(script, *words)
            assert result.returncode == 0, result.stderr
    found = {file.relative_to(tmp_path).parts[0] for file in tmp_path.rglob("*") if file.is_file()}
    assert found == {"in", "out"} and not Path("climbed").exists()
