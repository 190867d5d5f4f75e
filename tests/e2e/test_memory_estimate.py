"""The memory that the dry run expects is what torch's own profiler then measures."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from flux_train_network import FluxNetworkTrainer, FluxTrainingOptions
from library.memory.simulation import Effort, PeakMemory, Simulation
from library.options import parse_options
from library.training.evaluation import Evaluation
from library.training.objective.step_inputs import ItemDraws
from library.training.optim.optimizers import OptimizerOptions, create_optimizer
from library.training.plan import memory_estimate
from library.training.plan.dry_run import plan_of
from library.training.plan.memory_estimate import Largest, largest_batch, optimizer_state_bytes
from sdxl_train_network import SdxlNetworkTrainer, SdxlTrainingOptions
from tests.running import forget_accelerator
from train_network import StableDiffusionNetworkTrainer, StableDiffusionTrainingOptions

CLASSES = {
    "flux_command": (FluxNetworkTrainer, FluxTrainingOptions),
    "sd1_command": (StableDiffusionNetworkTrainer, StableDiffusionTrainingOptions),
    "sdxl_command": (SdxlNetworkTrainer, SdxlTrainingOptions),
}


FUSED = (
    "--cache_latents --gradient_checkpointing --network_train_unet_only --network_dim 256 --fused_backward_pass "
    "--optimizer_type adafactor --optimizer_args relative_step=False scale_parameter=False --max_grad_norm 0"
)


def attention_flops(products: int, first: int) -> Any:
    """Of so many products of all queries with all keys or values; ``first``: where the query's shape stands."""

    def count(*shapes: Any, out_shape: Any = None, **_: Any) -> int:
        (batch, heads, queries, width), keys = shapes[first], shapes[first + 1][2]
        return products * 2 * batch * heads * queries * keys * width

    return count


CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops(2, 0),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_flops(5, 1),
}
"""What torch's counter lacks; the backward pass makes the scores anew."""


@pytest.fixture
def make_trainer(request, tmp_path, dataset_toml):
    """A trainer as it stands when its checkpoint files are opened."""

    def make(command: str, arguments: str) -> Any:
        forget_accelerator()
        trainer_class, options_class = CLASSES[command]
        given = [*request.getfixturevalue(command), *arguments.split(), "--output_dir", tmp_path]
        given += ["--dataset_config", dataset_toml(bucket_reso_steps=64), "--max_train_steps", "2"]
        trainer = trainer_class(parse_options(options_class, "test", [str(value) for value in given]))
        for step in ("check_options", "prepare_output", "check_network", "start_processes", "read_data", "plan_steps"):
            getattr(trainer, step)()
        trainer.open_pipeline()
        trainer.pipeline.load_tokenizers()
        return trainer

    return make


def build(trainer: Any) -> None:
    trainer.load_models()
    trainer.pipeline.load_autoencoder()
    trainer.pipeline.load_text_encoders(trainer.pipeline.encoders)
    trainer.make_network()
    trainer.place_network()
    trainer.build_optimizer()


def training_peak(trainer: Any, size: Largest) -> int:
    return memory_estimate.training_peak(trainer.facts(), trainer.step_loss, size).device


def measured_peak(work: Any) -> int:
    """The most bytes that were allocated at once while ``work`` ran, by the records of torch's CPU allocator."""
    work()  # what is made once stays out of the count
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as records:
        work()
    live = peak = 0
    for event in records.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def test_fused_steps_free_gradients_in_the_plan_too(make_trainer):
    peaks = []
    for arguments in (FUSED, FUSED.replace("--fused_backward_pass ", "")):
        trainer = make_trainer("flux_command", arguments)
        with Simulation(trainer.pipeline).running():
            build(trainer)
            peaks.append(training_peak(trainer, largest_batch(trainer.data.train)))
    gradients = sum(parameter.nbytes for parameter in trainer.optimization.parameters)
    assert peaks[1] - peaks[0] > 0.5 * gradients


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("flux_command", "--cache_latents"),
        pytest.param(
            "flux_command",
            "--cache_latents --gradient_checkpointing --network_train_unet_only",
            marks=pytest.mark.thorough,
        ),
        pytest.param(
            "flux_command",
            "--cache_latents --mixed_precision bf16 --cache_text_encoder_outputs",
            marks=pytest.mark.thorough,
        ),
        pytest.param(
            "sd1_command", "--cache_latents --gradient_checkpointing --mixed_precision bf16", marks=pytest.mark.slow
        ),
        pytest.param("sdxl_command", "--cache_latents --network_train_unet_only", marks=pytest.mark.thorough),
    ],
)
def test_the_peak_of_a_training_step(make_trainer, command, arguments):
    trainer = make_trainer(command, arguments)
    size = largest_batch(trainer.data.train)
    assert size.count == 2
    simulation = Simulation(trainer.pipeline)
    with simulation.running():
        build(trainer)
        found = memory_estimate.training_peak(trainer.facts(), trainer.step_loss, size)
    expected, effort = found.device, found.effort
    trainer.pipeline.modules.clear()
    build(trainer)
    batch = memory_estimate.empty_batch(trainer.facts(), trainer, size)
    for tensors in ({"latents": batch.latents}, batch.text or {}):
        for tensor in tensors.values():
            tensor.fill_(0.5)
    trainer.network.train()
    trainer.network.set_multiplier(1.0)

    def step() -> None:
        trainer.step_loss(batch, ItemDraws(7, 0, batch.item_ids)).mean().backward()
        for parameter in trainer.optimization.parameters:
            parameter.grad = None

    assert expected == pytest.approx(measured_peak(step), rel=0.1)
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        step()
    assert effort.flops == counter.get_total_flops() > 0 and effort.operations > 100


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("flux_command", "--keep_attention_outputs"),
        pytest.param("sd1_command", "", marks=pytest.mark.thorough),
        pytest.param(  # autocast keeps casts of its weights
            "sd1_command", "--network_train_unet_only --network_args conv_dim=2", marks=pytest.mark.thorough
        ),
    ],
)
def test_a_block_of_each_kind_stands_for_all(make_trainer, command, arguments):
    trainer = make_trainer(command, f"--cache_latents --mixed_precision bf16 {arguments}")
    size = Largest(128, 128, 2)
    with Simulation(trainer.pipeline).running():
        build(trainer)
        for checkpointing in (False, True):
            with memory_estimate.checkpointing_is(trainer.pipeline, checkpointing):
                once, each = (
                    memory_estimate._step_peak(trainer.facts(), trainer.step_loss, size, every_block=every)
                    for every in (False, True)
                )
                assert once == each and once.forward_flops > 0


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param("", marks=pytest.mark.thorough),
        "--gradient_checkpointing --fp8_scaled",
        "--gradient_checkpointing --blocks_to_swap 2",
    ],
)
def test_the_peak_from_loading_to_the_first_gradients(make_trainer, arguments):
    """Weights on the device and in system RAM, which are the same here, the LoRA, and a step."""
    common = "--cache_latents --cache_text_encoder_outputs --network_train_unet_only --mixed_precision bf16"
    trainer = make_trainer("flux_command", f"{common} {arguments}")
    size = largest_batch(trainer.data.train)
    phase = next(phase for phase in plan_of(trainer).phases if phase.name.startswith("training"))
    expected = phase.total - phase.optimizer + phase.host.get("streamed blocks", 0)

    def work() -> None:
        trainer.pipeline.modules.clear()
        trainer.pipeline.applied.clear()
        trainer.load_models()
        trainer.make_network()
        trainer.place_network()
        trainer.build_optimizer()
        batch = memory_estimate.empty_batch(trainer.facts(), trainer, size)
        for tensor in (batch.latents, *(batch.text or {}).values()):
            tensor.fill_(0.5)
        trainer.network.train()
        trainer.network.set_multiplier(1.0)
        trainer.step_loss(batch, ItemDraws(7, 0, batch.item_ids)).mean().backward()

    measured = measured_peak(work)
    assert expected == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("command", ["flux_command", pytest.param("sd1_command", marks=pytest.mark.thorough)])
def test_the_peaks_of_encoding_and_of_samples(make_trainer, command, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 128 --h 64 --s 2\n", encoding="utf-8")
    trainer = make_trainer(command, f"--sample_prompts {prompts} --sample_every_n_steps 1")
    size = Largest(128, 192, 3)
    with Simulation(trainer.pipeline).running():
        build(trainer)
        expected = memory_estimate.encoding_peak(trainer, size).device
        image = memory_estimate.sampling_peak(trainer.facts(), trainer).device
    trainer.pipeline.modules.clear()
    build(trainer)
    pixels = torch.zeros(size.count, 3, size.height, size.width)
    generators = [torch.Generator() for _ in range(size.count)]
    # Convolutions take memory of their own while they run, which no tensor shows.
    assert 0.98 * expected <= measured_peak(lambda: trainer.latents.encode(pixels, generators)) <= 1.6 * expected
    trainer.network.eval()
    evaluation = Evaluation(trainer, trainer.facts(), report=None, tracker=None, clock=trainer.clock)

    def draw() -> None:
        with torch.no_grad():
            evaluation.draw_batch(trainer.outputs.samples.prompts[:1])

    # What is expected is for a batch of two, which FLUX.1 has only with a negative prompt.
    assert 0.5 * image <= measured_peak(draw) <= 1.6 * image


def test_nothing_is_allocated_by_a_simulation(make_trainer):
    trainer = make_trainer("flux_command", "--network_train_unet_only --cache_text_encoder_outputs")

    def simulate() -> None:
        trainer.pipeline.modules.clear()
        with Simulation(trainer.pipeline).running():
            build(trainer)
            training_peak(trainer, Largest(1024, 1024, 8))

    assert measured_peak(simulate) < 1 << 20


def test_peak_memory_counts_live_storages_once(make_trainer):
    given = torch.ones(1000)
    with PeakMemory([given]) as memory:
        double = given * 2  # 4000 bytes
        view = double[:10]
        del double
        other = view + 1  # 40 more
        assert memory.live == 4040
        del view, other
        assert memory.live == 0
        given.add_(1)
    assert memory.peak.device == 4040


def test_the_effort_of_products_and_of_what_stands_between_them():
    left, right, new = torch.ones(4, 8, dtype=torch.bfloat16), torch.ones(8, 16, dtype=torch.bfloat16), torch.ones(9)
    with PeakMemory([left, right, new]) as memory:
        torch.addmm(torch.ones(16, dtype=torch.bfloat16), left, right)
        before = memory.effort
        left @ right[:, :2]
        (new * new).view(3, 3).T.add_(1)
        torch.empty(1000)
    assert before == Effort(2 * 4 * 8 * 16, 32, 2, (4, 8, 16))  # the ones are written
    assert memory.effort - before == Effort(2 * 4 * 8 * 2, 36, 2, (4, 8, 16))


SHAPES = [(16, 300), (300, 16), (16, 300), (8, 4, 3, 3), (7,)]


@pytest.mark.parametrize(
    ("optimizer_type", "arguments"),
    [
        ("AdamW", []),
        ("AdamW", ["amsgrad=True"]),
        ("Lion", []),
        ("SGDNesterov", []),
        ("Prodigy", []),
        ("DAdaptAdam", []),
        ("Adafactor", ["relative_step=False", "scale_parameter=False", "warmup_init=False"]),
        ("AdamWScheduleFree", []),
        ("torch.optim.SGD", []),
    ],
)
def test_the_state_of_optimizers(optimizer_type, arguments):
    options = OptimizerOptions(optimizer_type=optimizer_type, optimizer_args=arguments, learning_rate=1.0)
    parameters = [torch.nn.Parameter(torch.rand(shape)) for shape in SHAPES]
    expected, note = optimizer_state_bytes(options, parameters)
    optimizer = create_optimizer(options, parameters).optimizer
    for parameter in parameters:
        parameter.grad = torch.rand_like(parameter)
    optimizer.step()
    tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    assert note == "" and expected == sum(t.numel() * t.element_size() for t in tensors if t.numel() > 1)


def test_the_state_of_an_8_bit_optimizer():
    """Two bytes per value, and two scales (float32) for each 256 of them; small parameters stay in float32."""
    pytest.importorskip("bitsandbytes")
    parameters = [torch.nn.Parameter(torch.rand(shape)) for shape in ((64, 128), (64, 128), (4, 128))]
    expected, note = optimizer_state_bytes(OptimizerOptions(optimizer_type="AdamW8bit"), parameters)
    assert (expected, note) == (2 * (2 * 8192 + 2 * 4 * 32) + 2 * 4 * 512, "")


def test_very_large_parameters_are_measured_at_a_part(monkeypatch):
    parameters = [torch.nn.Parameter(torch.rand(64, 48))]
    whole = optimizer_state_bytes(OptimizerOptions(), parameters)
    monkeypatch.setattr(memory_estimate, "LARGEST_MEASURED", 480)
    assert optimizer_state_bytes(OptimizerOptions(), parameters) == whole == (2 * 64 * 48 * 4, "")


def test_an_optimizer_for_another_device_is_assumed(monkeypatch):
    monkeypatch.setattr(memory_estimate, "create_optimizer", lambda *_: pytest.fail("kernels are missing"))
    monkeypatch.setattr(memory_estimate, "_state_sizes", lambda *_: 1 / 0)
    parameters = [torch.nn.Parameter(torch.rand(100))]
    assert optimizer_state_bytes(OptimizerOptions(optimizer_type="AdamW8bit"), parameters)[0] == 200
    assert optimizer_state_bytes(OptimizerOptions(), parameters)[0] == 800
    assert optimizer_state_bytes(OptimizerOptions(ema_decay=0.9), parameters)[0] == 800 + 4 * 100
