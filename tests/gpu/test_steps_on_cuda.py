"""On a CUDA device: how noise is drawn and steps are taken there, and that the program need not wait for either."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch

from library.training.objective.ddpm import Ddpm, noise_schedule
from library.training.objective.flow_matching import FlowMatching, FlowMatchingOptions
from library.training.objective.noise_options import NoiseOptions, StableDiffusionNoiseOptions
from library.training.objective.objective import Objective
from library.training.objective.step_inputs import ItemDraws
from library.training.optim.optimizers import OptimizerOptions, create_optimizer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

NOISE = NoiseOptions(ip_noise_gamma=0.1, ip_noise_gamma_random_strength=True)
OBJECTIVES: dict[str, Objective] = {
    "ddpm": Ddpm(
        NOISE,
        StableDiffusionNoiseOptions(
            noise_offset=0.1, noise_offset_random_strength=True, multires_noise_iterations=4, min_snr_gamma=5
        ),
        True,
        noise_schedule(),
    ),
    "flow": FlowMatching(FlowMatchingOptions(), NOISE),
}


@pytest.fixture
def without_waiting() -> Iterator[None]:
    """An operation that waits for the device raises an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("noise_device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_draw_of_a_step_waits_for_the_device(name, noise_device, without_waiting):
    latents = torch.ones(2, 4, 16, 16, device="cuda")
    noisy = OBJECTIVES[name].noisy_input(latents, ItemDraws(7, 1, [3, 4], noise_device))
    assert noisy.latents.is_cuda and noisy.weights.is_cuda


@pytest.mark.parametrize("name", OBJECTIVES)
def test_noise_on_the_device_depends_on_seed_epoch_and_item_alone(name):
    def latents(items: list[int], epoch: int = 1, noise_device: str = "cuda") -> torch.Tensor:
        clean = torch.zeros(len(items), 4, 64, 64, device="cuda")
        return OBJECTIVES[name].noisy_input(clean, ItemDraws(7, epoch, items, noise_device), timestep=500).latents

    both = latents([3, 4])
    assert torch.equal(both, latents([3, 4])) and torch.equal(both[1:], latents([4]))
    assert not torch.equal(both, latents([3, 4], epoch=2)) and not torch.equal(both[0], both[1])
    on_cpu = latents([3, 4], noise_device="cpu")
    assert not torch.equal(both, on_cpu)
    torch.testing.assert_close(both.std(), on_cpu.std(), rtol=0.1, atol=0.0)


@pytest.mark.parametrize("name", ["AdamW", "torch.optim.Adam", "SGDNesterov"])
def test_fused_steps_continue_a_state_of_other_steps(name):
    def start(device: str) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 64, device="cpu").reshape(8, 8).to(device))
        options = OptimizerOptions(optimizer_type=name, learning_rate=1e-2)
        return parameter, create_optimizer(options, [parameter]).optimizer

    def steps(parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            parameter.grad = torch.sin(3 * parameter.detach())
            optimizer.step()

    (on_cpu, reference), (fused, optimizer) = start("cpu"), start("cuda")
    steps(on_cpu, reference, 3)
    with torch.no_grad():
        fused.copy_(on_cpu)
    optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    steps(on_cpu, reference, 3)
    steps(fused, optimizer, 3)
    torch.testing.assert_close(fused.cpu(), on_cpu, rtol=1e-5, atol=1e-6)
    assert optimizer.state_dict()["param_groups"] == reference.state_dict()["param_groups"]
