"""Pickled files: no code in them runs, wherever a program takes a file, and a damaged one is named in one sentence."""

from __future__ import annotations

import time
import zipfile
from pathlib import Path

import pytest
import torch

from library.checkpoints import open_checkpoint
from library.errors import UserError
from library.generation.latent_files import read_latents
from library.generation.textual_inversion import read_embedding
from tests.families.families import TINY
from tests.faults.corpus import archive, bomb, hostile_pickles, members_of, pickled
from tests.running import run_in_process

pytestmark = pytest.mark.filterwarnings("ignore")
SECONDS = 4.0
READERS = {
    "checkpoints": lambda path: open_checkpoint(path, option="--model"),
    "latents": lambda path: read_latents(path, 4, 8, 8),
    "embeddings": lambda path: read_embedding(path, "--textual_inversion_embeddings"),
}


@pytest.mark.parametrize("reader", READERS)
def test_hostile_pickles_are_refused_in_one_sentence(tmp_path, reader):
    touched = tmp_path / "touched"
    for what, data in hostile_pickles(touched).items():
        path = tmp_path / "hostile.pt"
        path.write_bytes(data)
        started = time.monotonic()
        with pytest.raises(UserError) as error:
            READERS[reader](path)
        assert str(path) in str(error.value) and "\n" not in str(error.value).strip(), what
        assert not touched.exists(), what
        assert time.monotonic() - started < SECONDS, what


@pytest.mark.parametrize("reader", READERS)
def test_archives_that_unpack_to_much_are_refused_at_once(tmp_path, reader):
    sound = members_of(pickled({"latent": torch.ones(1, 4, 8, 8)}))
    for name, start in sound.items():
        path = tmp_path / "bomb.ckpt"
        path.write_bytes(bomb(name, start, 1 << 31))
        assert path.stat().st_size < 1 << 25
        with pytest.raises(UserError, match=r"bomb\.ckpt is compressed, which PyTorch files are not"):
            READERS[reader](path)
    path.write_bytes(archive(sound, zipfile.ZIP_DEFLATED))
    with pytest.raises(UserError, match=r"bomb\.ckpt is compressed"):
        READERS[reader](path)


def test_sound_pickles_are_read(tmp_path):
    latents = torch.randn(1, 4, 8, 8)
    for zipped in (True, False):
        (tmp_path / "a.pt").write_bytes(pickled({"latent": latents, "epoch": 3}, zipped))
        assert torch.equal(read_latents(tmp_path / "a.pt", 4, 8, 8).latents, latents)
        assert torch.equal(open_checkpoint(tmp_path / "a.pt").load("latent"), latents)
        (tmp_path / "b.pt").write_bytes(pickled(latents, zipped))
        assert torch.equal(read_latents(tmp_path / "b.pt", 4, 8, 8).latents, latents)
        (tmp_path / "c.pt").write_bytes(pickled({"string_to_param": {"*": latents[0, 0]}}, zipped))
        assert torch.equal(read_embedding(tmp_path / "c.pt", "--x")["*"], latents[0, 0])


PLACES = [
    *((TINY[model].script, "--pretrained_model_name_or_path", model) for model in TINY),
    *(("flux_train_network.py", option, "flux") for option in ("--ae", "--clip_l", "--t5xxl", "--base_weights")),
    *(("train_network.py", option, "sd1") for option in ("--vae", "--network_weights", "--base_weights")),
]


@pytest.mark.parametrize("script, option, model", PLACES)
def test_training_runs_no_code_of_a_pickle(request, dataset_toml, tmp_path, script, option, model):
    files = request.getfixturevalue(f"{'few_blocks' if model.startswith('sd') else 'tiny'}_{model}")
    touched = tmp_path / "touched"
    path = tmp_path / "hostile.ckpt"
    path.write_bytes(hostile_pickles(touched)["code"])
    given = [*TINY[model].command(files), "--dataset_config", dataset_toml(bucket_reso_steps=64)]
    given += ["--output_dir", tmp_path / "out", "--max_train_steps", 1, option, path]
    refused(script, given, path)
    assert not touched.exists()


@pytest.mark.parametrize(
    "script, arguments",
    [
        ("networks/check_lora_weights.py", "FILE"),
        ("networks/resize_lora.py", "--model FILE --save_to OUT --new_rank 2"),
        ("networks/merge_lora.py", "--models FILE --ratios 1 --save_to OUT"),
        ("networks/sdxl_merge_lora.py", "--models FILE --ratios 1 --save_to OUT"),
        ("networks/svd_merge_lora.py", "--models FILE --ratios 1 --save_to OUT --new_rank 2"),
        ("networks/flux_merge_lora.py", "--models FILE --ratios 1 --save_to OUT"),
        ("networks/lumina_merge_lora.py", "--models FILE --ratios 1 --save_to OUT"),
        ("networks/hunyuan_image_merge_lora.py", "--models FILE --ratios 1 --save_to OUT"),
        ("networks/extract_lora_from_models.py", "--model_org FILE --model_tuned FILE --save_to OUT --dim 2"),
        ("networks/extract_lora_from_dylora.py", "--model FILE --save_to OUT --unit 1"),
        ("networks/flux_extract_lora.py", "--model_org FILE --model_tuned FILE --save_to OUT --dim 2"),
        ("networks/lumina_extract_lora.py", "--model_org FILE --model_tuned FILE --save_to OUT --dim 2"),
        ("networks/hunyuan_image_extract_lora.py", "--model_org FILE --model_tuned FILE --save_to OUT --dim 2"),
        ("networks/convert_flux_lora.py", "--src_path FILE --dst_path OUT --src sd-scripts --dst ai-toolkit"),
        ("networks/convert_lumina_lora.py", "--src_path FILE --dst_path OUT"),
        ("networks/convert_hunyuan_image_lora_to_comfy.py", "FILE OUT"),
        ("tools/convert_diffusers_to_flux.py", "--diffusers_path FILE --save_to OUT"),
        ("tools/show_metadata.py", "FILE"),
        ("gen_img.py", "--ckpt FILE --prompt a --outdir FOLDER"),
        ("gen_img.py", "--ckpt SD1 --prompt a --outdir FOLDER --vae FILE"),
        ("gen_img.py", "--ckpt SD1 --prompt a --outdir FOLDER --network_module networks.lora --network_weights FILE"),
        ("gen_img.py", "--ckpt SD1 --prompt a --outdir FOLDER --textual_inversion_embeddings FILE"),
        ("gen_img.py", "--ckpt WHOLE --prompt a --outdir FOLDER --XTI_embeddings FILE"),
        ("flux_minimal_inference.py", "--ckpt_path FILE --clip_l FILE --t5xxl FILE --ae FILE --output_dir FOLDER"),
        ("lumina_minimal_inference.py", "--pretrained_model_name_or_path FILE --gemma2_path FILE --ae_path FILE"),
        (
            "hunyuan_image_minimal_inference.py",
            "--dit FILE --text_encoder FILE --byt5 FILE --vae FILE --save_path FOLDER",
        ),
    ],
)
def test_programs_run_no_code_of_a_pickle(few_blocks_sd1, tiny_sd1, tmp_path, script, arguments):
    touched = tmp_path / "touched"
    path = tmp_path / "hostile.pt"
    path.write_bytes(hostile_pickles(touched)["code"])
    words = {"FILE": path, "OUT": tmp_path / "out.safetensors", "FOLDER": tmp_path / "out"}
    words |= {"SD1": few_blocks_sd1, "WHOLE": tiny_sd1}
    more = ["--prompt", "a"] if "minimal" in script else []
    refused(script, [*(words.get(word, word) for word in arguments.split()), *more], path)
    assert not touched.exists() and not (tmp_path / "out.safetensors").exists()


def refused(script: str, given: list[object], path: Path) -> None:
    result = run_in_process(script, *given)
    _, _, said = result.stderr.partition("error: ")
    assert result.returncode == 2 and path.name in said and len(said.splitlines()) == 1, result.stderr[-2000:]
