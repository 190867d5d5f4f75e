"""Processes that train together."""

from __future__ import annotations

import threading

import pytest
import torch

from library.options import parse_options
from library.training.distribution import average_gradients
from tests.running import free_port
from train_network import StableDiffusionNetworkTrainer, StableDiffusionTrainingOptions

PROGRAM = """
import torch
from library.options import parse_options
from library.training.distribution import make_accelerator
from library.training.training_options import TrainingOptions
options = parse_options(TrainingOptions, "test", ["--ddp_timeout", "7"])
make_accelerator(options.precision, options.distribution)
print(torch.distributed.group.WORLD._get_backend(torch.device("cpu")).options._timeout)
"""


def test_processes_wait_for_each_other_as_long_as_asked(fork_server, tmp_path):
    launched = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    environment = {name: str(value) for name, value in launched.items()} | {"ACCELERATE_USE_CPU": "true"}
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    result = fork_server.run(str(program), environment=environment)
    assert "0:07:00" in result.output.splitlines(), result.output[-2000:]


@pytest.mark.parametrize(("arguments", "at_once"), [([], 3), (["--lowram"], 1)])
def test_processes_load_one_after_another_if_asked_for(arguments, at_once):
    """Threads in place of processes, with a barrier as accelerate has one."""
    barrier, together = threading.Barrier(3), threading.Barrier(3)
    options = parse_options(StableDiffusionTrainingOptions, "test", arguments)
    loading: list[int] = []
    most: list[int] = []

    class Process:
        num_processes = 3

        def __init__(self, index: int) -> None:
            self.process_index = index

        def wait_for_everyone(self) -> None:
            barrier.wait(timeout=20)

    def load(index: int) -> None:
        trainer = StableDiffusionNetworkTrainer(options)
        trainer.accelerator = Process(index)
        with trainer.load_in_turn():
            loading.append(index)
            if at_once == 3:
                together.wait(timeout=20)
            most.append(len(loading))
            if at_once == 3:
                together.wait(timeout=20)
            loading.remove(index)

    threads = [threading.Thread(target=load, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert most == [at_once] * 3


def test_gradients_are_averaged_and_where_no_process_has_one_there_is_none():
    """Threads in place of processes; an optimizer decays weights that have a gradient, if only a zero one."""
    sums, barrier, lock = [], threading.Barrier(2), threading.Lock()

    class Process:
        num_processes = 2

        def reduce(self, flat: torch.Tensor, reduction: str) -> torch.Tensor:
            with lock:
                sums.append(flat)
            barrier.wait(timeout=20)
            assert reduction == "mean"
            return torch.stack(sums).mean(0)

    given = {0: [torch.tensor([1.0, 3.0]), None, None], 1: [torch.tensor([3.0, 5.0]), torch.tensor([[4.0]]), None]}
    averaged: dict[int, list[torch.Tensor | None]] = {}

    def average(index: int) -> None:
        parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((2,), (1, 1), (3,))]
        for parameter, gradient in zip(parameters, given[index]):
            parameter.grad = gradient
        average_gradients(parameters, Process())
        averaged[index] = [parameter.grad for parameter in parameters]

    threads = [threading.Thread(target=average, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    for index in range(2):
        first, second, third = averaged[index]
        assert first is not None and first.tolist() == [2, 4]
        assert second is not None and second.tolist() == [[2]]
        assert third is None
