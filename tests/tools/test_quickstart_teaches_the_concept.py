"""The quick start's command, with the settings of each family's guide, teaches the tiny model the concept."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from tests.running import launched_script, run_in_process
from tools import quickstart, tiny_flux_drawings
from tools.score_concept import read_images, read_prompts, ring_coverage, score

DOCUMENTED = {
    "chroma": "--model_type=chroma --timestep_sampling=sigmoid --model_prediction_type=raw --guidance_scale=0.0 "
    "--apply_t5_attn_mask",
    "lumina": "--timestep_sampling=nextdit_shift --model_prediction_type=raw --discrete_flow_shift=6.0 "
    "'--system_prompt=You are an assistant designed to generate high-quality images based on user prompts.'",
    "sd15": "--learning_rate=0.008 --debiased_estimation_loss --network_module=networks.lora conv_dim=16",
    "hunyuan_image": "--model_prediction_type=raw --discrete_flow_shift=5.0 --network_train_unet_only",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "steps", "rings"),
    [
        pytest.param("chroma", 50, 0.04, marks=pytest.mark.thorough),
        *(("lumina", 24, 0.04), ("hunyuan_image", 24, 0.04), ("sd15", 24, 0.002)),
    ],
)
def test_a_fraction_of_the_steps_brings_the_first_rings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thorough: bool, name: str, steps: int, rings: float
) -> None:
    """And only where they are asked for; the samples are few and coarse. ``rings`` is how much of them is yellow.

    The command runs in this process, its launcher's words through the launcher's own parser. The other families
    than HunyuanImage learn with ``--thorough`` only; otherwise their quick starts go all the way with a few steps.
    """
    learns = thorough or name == "hunyuan_image"
    steps = steps if learns else 3
    family = quickstart.FAMILIES[name]
    ordinary = tiny_flux_drawings.ordinary_images(16 if learns else 4, quickstart.PIXELS, seed=0)
    monkeypatch.setattr(tiny_flux_drawings, "ordinary_images", lambda *_, **__: ordinary)
    monkeypatch.setattr(quickstart, "PROMPTS", (*quickstart.PROMPTS[: 3 if learns else 1], quickstart.PROMPTS[-2]))
    monkeypatch.setattr(quickstart, "SEEDS", quickstart.SEEDS[:1])
    monkeypatch.setattr(quickstart, "sample_interval", lambda steps: steps)
    coarse = quickstart.sample_options(family).replace("--s 20", "--s 10" if learns else "--s 2")
    monkeypatch.setattr(quickstart, "sample_options", lambda family: coarse)

    def start(command: list[str], _: object) -> int:
        if command[:2] == [sys.executable, str(quickstart.ROOT / "gen_img.py")]:
            done = run_in_process("gen_img.py", *command[2:])
        else:
            assert command[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
            script, arguments = launched_script(["accelerate", "launch", *command[3:]])
            done = run_in_process(Path(script).name, *arguments, f"--validate_every_n_steps={steps}")
        assert done.returncode == 0, done.stderr[-3000:]
        return done.returncode

    monkeypatch.setattr(quickstart.environment, "run_to_its_end", start)
    folders = quickstart.Folders(tmp_path / "out", name)
    quickstart.quickstart(folders, steps, seed=1, threads=1)

    prompts = read_prompts(folders.prompts)
    images = [read_images(files) for files in quickstart.images_before_and_after(folders, steps).values()]
    before, after = (score(drawn, prompts) for drawn in images)
    validation = quickstart.read_scalars(folders.logs)["loss/validation/step_average"]
    assert [step for step, _ in validation] == [0, steps] and validation[1][1] < validation[0][1]
    if learns:
        assert before.coverage < min(0.005, rings) and after.coverage > rings
        assert validation[1][1] < 0.85 * validation[0][1]
        assert after.background > 0.9 and ring_coverage(images[1][-1]) < 0.01
    report = (folders.root / "report.md").read_text(encoding="utf-8")
    command = shlex.split(report.split("```")[1].replace("\\\n", ""))
    assert set(shlex.split(DOCUMENTED[name])) < set(command)
    assert not any(part.startswith("--clip_l") for part in command)
