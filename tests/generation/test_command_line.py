"""flux_minimal_inference.py as a user runs it."""

from __future__ import annotations

import io
import sys

from PIL import Image

from tests.running import run_in_process

SCRIPT = "flux_minimal_inference.py"


def test_a_session_through_a_pipe(inference_command, lora, tmp_path, monkeypatch):
    """A pipe's bytes are UTF-8, whatever the system's encoding."""
    lines = ["赤い猫 --d 1 --w 32 --s 1", "a dog --d 2 --m 0.2", "a dog --d x", "a dog --cn none.png", "", "not drawn"]
    arguments = [*inference_command, "--interactive", "--output_dir", tmp_path, "--lora_weights", lora("one", 1)]
    pipe = io.TextIOWrapper(io.BytesIO("\n".join(lines).encode("utf-8")), encoding="ascii")
    monkeypatch.setattr(sys, "stdin", pipe)
    result = run_in_process(SCRIPT, *arguments)
    assert result.returncode == 0, result.stderr
    printed = result.stdout
    assert "--m 0.8,0.5" in printed
    assert '--d must be a whole number, not "x"' in printed
    assert "error: --cn needs --controlnet_model_name_or_path" in printed
    texts = []
    for path in sorted(tmp_path.glob("*.png")):
        with Image.open(path) as image:
            texts.append(image.text)
    assert [(t["prompt"], t["seed"], t["width"], t["steps"]) for t in texts] == [
        ("赤い猫", "1", "32", "1"),
        ("a dog", "2", "32", "1"),
    ]
    assert [t["lora-weights"] for t in texts] == ['["one.safetensors;1"]', '["one.safetensors;0.2"]']


def test_a_mistake_is_one_sentence_and_nothing_is_drawn(inference_command, tiny_flux, tmp_path):
    result = run_in_process(SCRIPT, *inference_command, "--ae", tiny_flux.t5xxl, "--output_dir", tmp_path / "out")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.startswith("error: --ae: ") and len(result.stderr.strip().splitlines()) == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_a_trainings_configuration_file_gives_the_model_files(inference_command, tiny_flux, tmp_path):
    """What only training knows has no effect, which is said; a mistyped key stays a mistake."""
    config = tmp_path / "my_flux_lora.toml"
    lines = [f'{name} = "{path.as_posix()}"' for name, path in vars(tiny_flux).items() if name in ("clip_l", "t5xxl")]
    config.write_text("\n".join([*lines, "learning_rate = 1e-4", "network_dim = 4", "steps = 1"]), encoding="utf-8")
    command_line = [str(word) for word in inference_command]
    for option in ("--clip_l", "--t5xxl", "--steps"):
        if option in command_line:
            place = command_line.index(option)
            del command_line[place : place + 2]
    done = run_in_process(SCRIPT, *command_line, "--config_file", config, "--output_dir", tmp_path / "out", "--seed", 1)
    assert done.returncode == 0, done.stderr
    assert "no effect in this script: learning_rate, network_dim" in done.stderr
    (picture,) = (tmp_path / "out").glob("*.png")
    with Image.open(picture) as image:
        assert image.text["steps"] == "1"
    config.write_text("lerning_rate = 1e-4", encoding="utf-8")
    done = run_in_process(SCRIPT, *command_line, "--config_file", config)
    assert done.returncode == 2 and 'unknown key "lerning_rate"' in done.stderr
