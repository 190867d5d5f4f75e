"""What the LoRA tools say about wrong input, and the two tools that only look."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from library.errors import UserError
from networks import check_lora_weights, merge_lora, resize_lora, sdxl_merge_lora, svd_merge_lora
from tests.networks.lora_tool_files import SD_LAYERS, SDXL_LAYERS, run, write_lora
from tests.running import ROOT, run_as_main
from tools import show_metadata

FLUX_LAYERS = {"lora_unet_double_blocks_0_img_attn_qkv": (12, 4), "lora_unet_single_blocks_0_linear1": (12, 4)}
HUNYUAN_LAYERS = {"lora_unet_double_blocks_0_img_mod_linear": (12, 4)}
SCRIPTS = [
    *(f"networks/{name}.py" for name in "merge_lora sdxl_merge_lora svd_merge_lora resize_lora".split()),
    *("networks/extract_lora_from_models.py", "networks/check_lora_weights.py", "tools/show_metadata.py"),
    *("networks/flux_merge_lora.py", "networks/flux_extract_lora.py", "tools/convert_diffusers_to_flux.py"),
    *("networks/lumina_merge_lora.py", "networks/lumina_extract_lora.py", "networks/convert_lumina_lora.py"),
    *("networks/hunyuan_image_merge_lora.py", "networks/hunyuan_image_extract_lora.py"),
    "networks/convert_hunyuan_image_lora_to_comfy.py",
]


@pytest.fixture
def a(tmp_path):
    return write_lora(tmp_path / "a.safetensors")


@pytest.fixture
def files(tmp_path, a):
    """Files by name; those that are no LoRA, or no LoRA of Stable Diffusion 1.x."""
    paths = {"a": a, "missing": tmp_path / "missing.safetensors", "out": tmp_path / "out.safetensors"}
    for name, layers in (("sdxl", SDXL_LAYERS), ("flux", FLUX_LAYERS), ("hunyuan", HUNYUAN_LAYERS)):
        paths[name] = write_lora(tmp_path / f"{name}.safetensors", layers, metadata=None)
    first = next(iter(SD_LAYERS))
    paths["other_size"] = write_lora(tmp_path / "other_size.safetensors", {first: (21, 12)})
    paths["peft"] = write_lora(
        tmp_path / "peft.safetensors", {"unet.down_blocks.0.x": (8, 8)}, form="peft", metadata=None
    )
    down, up = f"{first}.lora_down.weight", f"{first}.lora_up.weight"
    contents = {
        "model": {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(2, 2)},
        "loha": {f"{first}.hada_w1_a": torch.ones(2, 2)},
        "dora": {down: torch.ones(2, 12), up: torch.ones(20, 2), f"{first}.dora_scale": torch.ones(20, 1)},
        "scales": {f"{first}.dora_scale": torch.ones(20, 1)},
        "extra": {down: torch.ones(2, 12), up: torch.ones(20, 2), "x": torch.ones(1)},
        "misfit": {down: torch.ones(2, 12), up: torch.ones(20, 3)},
        "nan": {down: torch.full((2, 12), float("nan")), up: torch.ones(20, 2)},
    }
    for name, tensors in contents.items():
        paths[name] = tmp_path / f"{name}.safetensors"
        save_file(tensors, paths[name])
    return {name: str(path) for name, path in paths.items()}


ONES = "[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1]"
OTHER_SCRIPT = "is for Stable Diffusion {} .*networks/{}.py merges those"
# Script; what follows --models and --ratios (with --save_to); what the sentence says.
MERGES = [
    ("merge_lora", "{a} {a} --ratios 0.5", r"--ratios needs one number for each file of --models \(2\); 1 given"),
    ("merge_lora", "{a}", r"--ratios needs one number for each file of --models \(1\); 0 given"),
    ("merge_lora", "{a} --ratios nan", "--ratios must be a finite number"),
    ("merge_lora", "{a} --ratios half", "--ratios must be a list"),
    ("merge_lora", "{a} --ratios 0", "every ratio is 0"),
    ("merge_lora", "{missing} --ratios 1", "--models: .*missing.safetensors does not exist"),
    ("merge_lora", "{a} --ratios 1 --sd_model {missing}", "--sd_model: .*does not exist"),
    ("merge_lora", "{a} --ratios 1 --sd_model {a}", "--sd_model: .*is a LoRA file"),
    ("merge_lora", "{model} --ratios 1", "contains no LoRA modules"),
    ("merge_lora", "{sdxl} --ratios 1", OTHER_SCRIPT.format("XL", "sdxl_merge_lora")),
    ("merge_lora", "{flux} --ratios 1", "is for FLUX.1"),
    ("merge_lora", "{hunyuan} --ratios 1", "is for HunyuanImage-2.1"),
    ("merge_lora", "{peft} --ratios 1", r'names its modules differently \("unet.down_blocks.0.x"\)'),
    ("merge_lora", "{a} {other_size} --ratios 1 1", r"different models: lora_te_.* \[21, 12\] in one and \[20, 12\]"),
    ("merge_lora", "{extra} --ratios 1", "holds 1 tensors that belong to no LoRA module, .*: x"),
    ("merge_lora", "{misfit} --ratios 1", r"\[20, 3\] and \[2, 12\], do not fit together"),
    ("merge_lora", "{loha} --ratios 1", "holds LoHa weights"),
    ("merge_lora", "{dora} --ratios 1", "holds DoRA weights .*; --sd_model names the model to merge it into"),
    ("merge_lora", "{scales} --ratios 1", "holds DoRA scales without the LoRA"),
    ("svd_merge_lora", "{dora} --ratios 1", "holds DoRA weights"),
    ("merge_lora", "{nan} --ratios 1", "holds numbers that are not finite"),
    ("merge_lora", "{a} --ratios 1 --lbws [1]", "Unknown option --lbws"),
    ("merge_lora", "{a} --ratios 1 --precision half", "--precision must be one of float, fp16, bf16"),
    ("sdxl_merge_lora", "{a} --ratios 1", OTHER_SCRIPT.format("1.x or 2.x", "merge_lora")),
    ("sdxl_merge_lora", "{sdxl} --ratios 1 --lbws [1,2]", "must be a JSON list of 12 or 20"),
    ("sdxl_merge_lora", "{sdxl} --ratios 1 --lbws ones", "must be a JSON list of 12 or 20"),
    ("sdxl_merge_lora", "{sdxl} --ratios 1 --lbws [1] [1]", r"one list for each file of --models \(1\); 2 given"),
    ("sdxl_merge_lora", f"{{sdxl}} --ratios 1 --lbws {ONES}", "a list of 17 is for Stable Diffusion 1.x or 2.x"),
    ("svd_merge_lora", "{sdxl} {a} --ratios 1 1", "for different models: .*sdxl.safetensors for Stable Diffusion XL"),
    ("svd_merge_lora", "{a} --ratios 1 --new_rank 0", "--new_rank must be at least 1, not 0"),
    ("svd_merge_lora", "{a} --ratios 1 --new_conv_rank -2", "--new_conv_rank must be at least 1"),
    ("svd_merge_lora", "{a} --ratios 1 --device warp", '--device: "warp" is not a device'),
]  # fmt: skip
OTHERS = [
    ("merge_lora", "--save_to {out}", "--models needs the LoRA files"),
    ("merge_lora", "--models {a} --ratios 1", "--save_to needs the name"),
    ("merge_lora", "--models {a} --ratios 1 --save_to {a}", "a.safetensors is one of the inputs"),
    ("merge_lora", "--models {a} --ratios 1 --save_to {out}.txt", "must end in one of .safetensors"),
    ("resize_lora", "--save_to {out}", "--model needs the LoRA file"),
    ("resize_lora", "--model {a} --save_to {a}", "is one of the inputs"),
    ("resize_lora", "--model {dora} --save_to {out}", "holds DoRA weights"),
    ("resize_lora", "--model {a} --save_to {out} --new_rank 0", "--new_rank must be at least 1"),
    ("resize_lora", "--model {a} --save_to {out} --dynamic_method sv_fro", "sv_fro needs --dynamic_param"),
    ("resize_lora", "--model {a} --save_to {out} --dynamic_param 0.9", "only with --dynamic_method"),
    ("resize_lora", "{fro} --dynamic_param 1.5", "above 0 and at most 1, not 1.5"),
    ("resize_lora", "{ratio} --dynamic_param 0.5", "sv_ratio must be at least 1"),
    ("resize_lora", "{best}", "--dynamic_method must be one of sv_ratio, sv_fro, sv_cumulative"),
    ("check_lora_weights", "{missing}", "does not exist"),
    ("show_metadata", "{missing}", "No such file"),
    ("show_metadata", "{model}", "has no metadata"),
    ("show_metadata", "", "name one safetensors file"),
]
MAINS = {
    module.__name__.rpartition(".")[2]: module.main
    for module in (merge_lora, sdxl_merge_lora, svd_merge_lora, resize_lora, check_lora_weights, show_metadata)
}


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [*((script, f"--save_to {{out}} --models {words}", message) for script, words, message in MERGES), *OTHERS],
)
def test_wrong_input_is_one_sentence_and_writes_nothing(files, tmp_path, script, words, message):
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    resize = "--model {a} --save_to {out} --dynamic_method ".format(**files)
    given = {**files, "fro": f"{resize} sv_fro", "ratio": f"{resize} sv_ratio", "best": f"{resize} best"}
    with pytest.raises(UserError, match=message) as caught:
        run(MAINS[script], *words.format(**given).split())
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


HELP = """
import os, runpy, sys

path = list(sys.path)
for script in sys.argv[1:]:
    for name in [name for name in sys.modules if name.split(".")[0] in ("library", "networks", "tools")]:
        del sys.modules[name]  # each script finds the project by itself
    sys.argv, sys.path[:] = [script, "--help"], [os.path.dirname(script), *path[1:]]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, script
    assert not {"torch", "diffusers", "transformers"} & set(sys.modules), script
"""


def test_every_tool_runs_from_any_folder_and_its_help_loads_no_torch(tmp_path):
    words = [sys.executable, "-c", HELP, *(str(ROOT / script) for script in SCRIPTS)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ") == len(SCRIPTS)


def test_a_mistake_ends_with_exit_code_2(tmp_path):
    missing = tmp_path / "no.safetensors"
    words = ("--models", missing, "--ratios", "1", "--save_to", tmp_path / "m.safetensors")
    done = run_as_main("networks/merge_lora.py", *words)
    assert done.returncode == 2 and done.stderr == f"error: --models: {missing} does not exist.\n"


def test_negative_ratios_are_numbers_and_not_options(a, tmp_path):
    run(merge_lora.main, "--models", a, a, "--ratios", "-0.5", "-1", "--save_to", tmp_path / "m.safetensors")
    assert (tmp_path / "m.safetensors").exists()


def test_options_without_effect_are_named(a, tmp_path, capsys):
    run(merge_lora.main, "--models", a, "--ratios", "1", "--save_to", tmp_path / "m.safetensors", "--v2")
    assert "--v2 has no effect without --sd_model" in capsys.readouterr().err
    words = ("--models", a, "--ratios", "1", "--save_to", tmp_path / "n.safetensors", "--sd_model", tmp_path / "no")
    with pytest.raises(UserError):
        run(merge_lora.main, *words, "--concat")
    assert "--concat and --shuffle have no effect with --sd_model" in capsys.readouterr().err


# ---- looking at files ----------------------------------------------------------------------------------------------


def test_check_lora_weights_lists_every_matrix(a, capsys):
    run(check_lora_weights.main, a)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"number of LoRA modules: {2 * len(SD_LAYERS)}" and len(lines) == 1 + 2 * len(SD_LAYERS)
    rows = dict(line.split(",", 1) for line in lines[1:])
    shape, mean, smallest = rows["lora_unet_up_blocks_3_resnets_1_conv1.lora_down.weight"].split(",")
    assert shape == "(4-10-3-3)" and 0 <= float(smallest) < float(mean) < 2


def test_check_lora_weights_shows_the_rest_and_tells_what_is_wrong(files, capsys):
    run(check_lora_weights.main, "--show_all_keys", files["a"])
    lines = capsys.readouterr().out.splitlines()
    assert f"number of all modules: {3 * len(SD_LAYERS)}" in lines and sum(".alpha," in line for line in lines) == 5
    run(check_lora_weights.main, files["nan"])
    assert "1 tensors hold infinity or NaN" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["{a}"], ["--model", "{a}"]])
def test_show_metadata_prints_sorted_json(a, capsys, words):
    run(show_metadata.main, *(word.format(a=a) for word in words))
    shown = capsys.readouterr().out
    found = json.loads(shown)
    assert list(found) == sorted(found) and found["ss_network_module"] == "networks.lora"
    assert shown.startswith('{\n    "')
