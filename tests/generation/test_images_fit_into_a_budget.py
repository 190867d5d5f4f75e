"""--vram_budget and --blocks_to_swap auto of inference scripts choose what fits, and change no image."""

from __future__ import annotations

import re

import pytest
import torch

from library.errors import UserError
from library.generation.fitting import Phase, phases_of
from library.memory.simulation import PeakMemory
from tests.generation.drawing import latents
from tests.running import no_weights_are_read

GIB = 1 << 30


@pytest.fixture(autouse=True)
def nothing_is_reserved(monkeypatch):
    """The models of these tests are smaller than what is left to the libraries of a real device."""
    monkeypatch.setattr("library.memory.budget.RESERVED_BYTES", 0)
    monkeypatch.setattr("library.memory.budget.RESERVED_SHARE", 0.0)


def choice(run) -> tuple[int, bool, bool]:
    """Streamed blocks, streamed text encoders, offload: as the run has them now."""
    streaming = run.options.streaming
    return streaming.blocks_to_swap or 0, streaming.stream_text_encoders, run.options.device.offload


def expected(run, phases: list[Phase] | None = None) -> int:
    """Bytes on the device at the peak, phase by phase from its parts as they are streamed."""
    pipeline, most = run.pipeline, 0
    for phase in phases or phases_of(run, run.file_prompts[0]):
        size, beside = phase.bytes, () if run.options.device.offload else phase.beside
        for part in {*phase.works, *beside}:
            size += pipeline.part_bytes(part) + run.stack.part_bytes(part)
            size -= pipeline.streamed[part].freed if part in pipeline.streamed else 0
        most = max(most, size)
    return most


def test_a_smaller_budget_saves_more_and_always_fits(inference, lora, monkeypatch):
    arguments = ["--interactive", "--flux_dtype", "fp8", "--cfg_scale", 2, "--lora_weights", lora("one", 1)]
    run = inference(*arguments)
    phases = phases_of(run, run.defaults)
    monkeypatch.setattr("library.generation.fitting.phases_of", lambda run, prompt: phases)  # the same each time
    size, choices = expected(run, phases), []
    while True:
        try:
            with no_weights_are_read():
                run = inference(*arguments, "--vram_budget", size / GIB)
        except UserError as error:
            refused = str(error)
            break
        needed = expected(run, phases)
        assert needed <= size
        assert not run.pipeline.modules, "nothing is loaded by then"
        choices.append(choice(run))
        size = min(needed - 1, round(0.95 * size))
    assert choices[0] == (0, False, False) and choices == sorted(choices) and len(set(choices)) >= 3
    assert "an image of 48x32 does not fit into" in refused
    least = float(re.search(r"--vram_budget (\S+) is the least", refused)[1])
    assert inference(*arguments, "--vram_budget", least)
    assert [phase.works for phase in phases] == [("clip_l",), ("t5xxl",), ("transformer",), ("autoencoder",)]
    assert all(set((*phase.works, *phase.beside)) == set(run.pipeline.parts) for phase in phases), "all stay"


def test_the_simulated_work_is_what_an_image_takes(inference):
    run = inference("--cfg_scale", 2, "--seed", 3)
    prompt = run.prompts()[0]
    planned = {phase.works[0]: phase.bytes for phase in phases_of(run, prompt)}
    run.encode([prompt])
    with run.at_work("transformer"), torch.no_grad(), PeakMemory([run.pipeline.load("transformer")]) as denoising:
        drawn = run.pipeline.generate_latents(run.encoded_request(prompt))
    with run.at_work("autoencoder"), PeakMemory([run.pipeline.load("autoencoder")]) as decoding:
        run.decode(drawn)
    for part, measured in (("transformer", denoising), ("autoencoder", decoding)):
        assert 0.95 * planned[part] <= measured.peak.device <= 1.2 * planned[part]


def test_the_image_stays_the_same(inference, caplog):
    plain = inference("--seed", 3)
    least = inference("--seed", 3, "--offload", "--blocks_to_swap", 1)
    run = inference("--seed", 3, "--vram_budget", expected(least) / GIB)
    assert choice(run)[0] == 1
    assert re.search(
        r"--vram_budget \S+ chooses --offload .*--blocks_to_swap 1: .* on the device at the peak", caplog.text
    )
    assert torch.equal(latents(run), latents(plain))
    assert run.pipeline.streamed["transformer"].places


def test_what_is_given_stays_and_auto_only_streams(inference):
    given = inference("--blocks_to_swap", 2, "--stream_text_encoders")
    run = inference("--blocks_to_swap", 2, "--stream_text_encoders", "--vram_budget", expected(given) / GIB)
    assert choice(run) == (2, True, False)
    with pytest.raises(UserError, match="cpu has no memory of its own; give a number or --vram_budget"):
        inference("--blocks_to_swap", "auto")
    run = inference("--blocks_to_swap", "auto", "--vram_budget", 1)
    assert choice(run) == (0, False, False)


@pytest.mark.parametrize("value", [0, -1])
def test_a_budget_is_above_0(inference, value):
    with pytest.raises(UserError, match="--vram_budget must be above 0 GiB"):
        inference("--vram_budget", value)
