"""Optimizers by name: each one trains, is named as in the metadata, and refuses mistakes in one sentence."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from library.console import LOGGER
from library.errors import UserError
from library.training.optim.lr_schedulers import LRSchedulerOptions, create_lr_scheduler
from library.training.optim.optimizers import (
    CreatedOptimizer,
    FusedBackward,
    OptimizerOptions,
    check_optimizer_options,
    create_optimizer,
    is_schedule_free,
    set_eval_mode,
    set_train_mode,
    step_kernels,
)

ROOT = Path(__file__).parents[2]

# name -> (learning rate, package, class of the metadata)
TABLE = {
    "AdamW": (1e-2, "torch", "torch.optim.adamw.AdamW"),
    "adamw8bit": (1e-2, "bitsandbytes", "bitsandbytes.optim.adamw.AdamW8bit"),
    "Lion8bit": (1e-2, "bitsandbytes", "bitsandbytes.optim.lion.Lion8bit"),
    "PagedAdamW8bit": (1e-2, "bitsandbytes", "bitsandbytes.optim.adamw.PagedAdamW8bit"),
    "PagedLion8bit": (1e-2, "bitsandbytes", "bitsandbytes.optim.lion.PagedLion8bit"),
    "PagedAdamW": (1e-2, "bitsandbytes", "bitsandbytes.optim.adamw.PagedAdamW"),
    "PagedAdamW32bit": (1e-2, "bitsandbytes", "bitsandbytes.optim.adamw.PagedAdamW32bit"),
    "SGDNesterov": (1e-1, "torch", "torch.optim.sgd.SGD"),
    "SGDNesterov8bit": (1e-1, "bitsandbytes", "bitsandbytes.optim.sgd.SGD8bit"),
    "Lion": (1e-2, "lion_pytorch", "lion_pytorch.lion_pytorch.Lion"),
    "DAdaptation": (1.0, "dadaptation", "dadaptation.experimental.dadapt_adam_preprint.DAdaptAdamPreprint"),
    "DAdaptAdamPreprint": (1.0, "dadaptation", "dadaptation.experimental.dadapt_adam_preprint.DAdaptAdamPreprint"),
    "DAdaptAdanIP": (1.0, "dadaptation", "dadaptation.experimental.dadapt_adan_ip.DAdaptAdanIP"),
    "DAdaptAdaGrad": (1.0, "dadaptation", "dadaptation.dadapt_adagrad.DAdaptAdaGrad"),
    "DAdaptAdam": (1.0, "dadaptation", "dadaptation.dadapt_adam.DAdaptAdam"),
    "DAdaptAdan": (1.0, "dadaptation", "dadaptation.dadapt_adan.DAdaptAdan"),
    "DAdaptLion": (1.0, "dadaptation", "dadaptation.dadapt_lion.DAdaptLion"),
    "DAdaptSGD": (1.0, "dadaptation", "dadaptation.dadapt_sgd.DAdaptSGD"),
    "Prodigy": (1.0, "prodigyopt", "prodigyopt.prodigy.Prodigy"),
    "Adafactor": (1e-2, "transformers", "transformers.optimization.Adafactor"),
    "RAdamScheduleFree": (1e-1, "schedulefree", "schedulefree.radam_schedulefree.RAdamScheduleFree"),
    "AdamWScheduleFree": (1e-1, "schedulefree", "schedulefree.adamw_schedulefree.AdamWScheduleFree"),
    "SGDScheduleFree": (1.0, "schedulefree", "schedulefree.sgd_schedulefree.SGDScheduleFree"),
    "ProdigyPlusScheduleFree": (1.0, "prodigyplus", "prodigyplus.prodigy_plus_schedulefree.ProdigyPlusScheduleFree"),
    "ProdigyScheduleFree": (1.0, "prodigyplus", "prodigyplus.prodigy_plus_schedulefree.ProdigyPlusScheduleFree"),
    "RMSprop": (1e-2, "torch", "torch.optim.rmsprop.RMSprop"),
    "AdEMAMix8bit": (1e-2, "bitsandbytes", "bitsandbytes.optim.ademamix.AdEMAMix8bit"),
    "bitsandbytes.optim.AdEMAMix8bit": (1e-2, "bitsandbytes", "bitsandbytes.optim.ademamix.AdEMAMix8bit"),
    "torch.optim.Adam": (1e-2, "torch", "torch.optim.adam.Adam"),
}


class Regression:
    """A linear regression of 64 inputs: large enough for 8-bit states, small enough for milliseconds."""

    def __init__(self) -> None:
        made = torch.Generator().manual_seed(0)
        self.x = torch.randn(128, 64, generator=made)
        self.y = self.x @ torch.randn(64, 64, generator=made) * 0.1
        self.weight = torch.nn.Parameter(torch.zeros(64, 64))

    def loss(self) -> torch.Tensor:
        return ((self.x @ self.weight - self.y) ** 2).mean()

    def train(self, created: CreatedOptimizer, steps: int) -> float:
        for _ in range(steps):
            self.loss().backward()
            created.optimizer.step()
            created.optimizer.zero_grad()
        set_eval_mode(created.optimizer)
        return self.loss().item()


def parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(4, 4))


@pytest.fixture
def messages(caplog):
    propagate, LOGGER.propagate = LOGGER.propagate, True
    caplog.set_level("INFO", LOGGER.name)
    yield lambda: "\n".join(record.getMessage() for record in caplog.records)
    LOGGER.propagate = propagate


@pytest.mark.filterwarnings("ignore:Paged optimizers")
@pytest.mark.parametrize("name", TABLE)
def test_every_named_optimizer_lowers_the_loss_on_this_machine(name):
    rate, package, class_name = TABLE[name]
    pytest.importorskip(package)
    problem = Regression()
    before = problem.loss().item()
    options = OptimizerOptions(optimizer_type=name, learning_rate=rate)
    check_optimizer_options(options)
    created = create_optimizer(options, [{"params": [problem.weight], "lr": rate}])
    assert created.name == class_name
    # Adafactor's own rate is a share of the weights' size, which begins at nothing
    assert problem.train(created, 120) < (0.999 if name == "Adafactor" else 0.9) * before


@pytest.mark.thorough
def test_the_default_is_adamw_and_imports_nothing_else():
    code = (
        "import sys, torch\n"
        "from library.training.optim.optimizers import OptimizerOptions, check_optimizer_options, create_optimizer\n"
        "from library.training.optim.lr_schedulers import LRSchedulerOptions, create_lr_scheduler\n"
        "options = OptimizerOptions()\n"
        "check_optimizer_options(options)\n"
        "weight = torch.nn.Parameter(torch.zeros(2))\n"
        "created = create_optimizer(options, [weight])\n"
        "create_lr_scheduler(LRSchedulerOptions(lr_scheduler='cosine', lr_warmup_steps=0.1), created, 100)\n"
        "weight.grad = torch.ones(2)\n"
        "created.optimizer.step()\n"
        "created.optimizer.zero_grad()\n"
        "heavy = {'transformers', 'diffusers', 'bitsandbytes', 'accelerate', 'peft', 'sympy'}\n"
        "heavy.add('torch._dynamo.eval_frame')\n"
        "heavy &= set(sys.modules)\n"
        "print(created.name, heavy)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[0] == "torch.optim.adamw.AdamW set()"


def test_arguments_are_python_literals_and_named_as_in_the_metadata():
    options = OptimizerOptions(optimizer_args=["weight_decay=0.1", "betas=0.9,0.95", "amsgrad=True"])
    created = create_optimizer(options, [parameter()])
    group = created.optimizer.param_groups[0]
    assert (group["weight_decay"], group["betas"], group["amsgrad"]) == (0.1, (0.9, 0.95), True)
    assert created.description == "torch.optim.adamw.AdamW(weight_decay=0.1,betas=(0.9, 0.95),amsgrad=True)"
    assert create_optimizer(OptimizerOptions(), [parameter()]).description == "torch.optim.adamw.AdamW"


def test_groups_keep_their_own_rates_and_others_get_the_learning_rate():
    groups = [{"params": [parameter()], "lr": 0.5}, {"params": [parameter()]}]
    created = create_optimizer(OptimizerOptions(learning_rate=1e-4), groups)
    assert [group["lr"] for group in created.optimizer.param_groups] == [0.5, 1e-4]


def test_nesterov_gets_its_usual_momentum_unless_told_otherwise():
    usual = create_optimizer(OptimizerOptions(optimizer_type="SGDNesterov"), [parameter()])
    given = create_optimizer(
        OptimizerOptions(optimizer_type="sgdnesterov", optimizer_args=["momentum=0.5"]), [parameter()]
    )
    assert [c.optimizer.param_groups[0]["momentum"] for c in (usual, given)] == [0.9, 0.5]
    assert all(c.optimizer.param_groups[0]["nesterov"] for c in (usual, given))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("AdamW", ["weight_decay=0.1"]), ("torch.optim.Adam", ["amsgrad=True"]), ("SGDNesterov", []), ("SGD", [])],
)
def test_steps_over_all_parameters_at_once_end_at_the_bits_of_steps_one_by_one(name, arguments):
    """Their states too, groups included; and one that single steps have left continues so."""

    def start(*more: str) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
        made = torch.Generator().manual_seed(1)
        sizes = [(16, 64), (3, 7), (1, 33), (64, 16), (1,)]
        parameters = [torch.nn.Parameter(torch.randn(size, generator=made)) for size in sizes]
        groups = [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 3e-3}]
        options = OptimizerOptions(optimizer_type=name, learning_rate=1e-2, optimizer_args=[*arguments, *more])
        return parameters, create_optimizer(options, groups).optimizer

    def steps(parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for number in numbers:
            for parameter in parameters:
                parameter.grad = torch.sin(parameter.detach() * number + number)
            optimizer.step()

    at_once, one_by_one, resumed = start(), start("foreach=False"), start()
    steps(*one_by_one, range(3))
    with torch.no_grad():
        for target, source in zip(resumed[0], one_by_one[0]):
            target.copy_(source)
    earlier = copy.deepcopy(one_by_one[1].state_dict())  # to load it copies nothing
    for group in earlier["param_groups"]:
        group["foreach"] = None
    resumed[1].load_state_dict(earlier)
    steps(*one_by_one, range(3, 6))
    steps(*resumed, range(3, 6))
    steps(*at_once, range(6))
    for parameters, optimizer in (at_once, resumed):
        assert all(torch.equal(a, b) for a, b in zip(parameters, one_by_one[0]))
        state, expected = optimizer.state_dict(), one_by_one[1].state_dict()
        assert state["param_groups"] == [{**group, "foreach": None} for group in expected["param_groups"]]
        for number, values in expected["state"].items():
            assert state["state"][number].keys() == values.keys()
            for key, value in values.items():
                assert value is None or torch.equal(state["state"][number][key], value)


def test_how_steps_are_taken_depends_on_where_the_parameters_are_and_who_chose():
    def kernels(name: str = "AdamW", device: str = "cpu", dtype: torch.dtype = torch.float32, **given: bool):
        with FakeTensorMode():
            parameters = [torch.nn.Parameter(torch.empty(2, 2, device=device, dtype=dtype)) for _ in range(2)]
        return step_kernels(getattr(torch.optim, name), given, parameters)

    for name in ("AdamW", "Adam", "SGD"):
        assert kernels(name) == "foreach"
        assert kernels(name, "cuda") == kernels(name, "cuda", torch.bfloat16) == "fused"
    assert kernels(dtype=torch.bfloat16) is None  # rounded at other places
    assert kernels("RAdam") is kernels("RAdam", "cuda") is None
    for given in ("fused", "foreach", "differentiable"):
        assert kernels(**{given: False}) is kernels(device="cuda", **{given: True}) is None


def test_legacy_switches_stand_for_their_optimizers():
    pytest.importorskip("lion_pytorch")
    assert create_optimizer(OptimizerOptions(use_lion_optimizer=True), [parameter()]).name.endswith(".Lion")
    for options in (
        OptimizerOptions(use_8bit_adam=True, optimizer_type="AdamW"),
        OptimizerOptions(use_lion_optimizer=True, optimizer_type="Lion"),
        OptimizerOptions(use_8bit_adam=True, use_lion_optimizer=True),
    ):
        with pytest.raises(UserError, match="mutually exclusive"):
            check_optimizer_options(options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"optimizer_type": "AdamWW"}, 'AdamWW is unknown. Did you mean "AdamW"'),
        ({"optimizer_type": "Prodgy"}, 'Did you mean "Prodigy"'),
        ({"optimizer_type": "AdamW8bits"}, 'Did you mean "AdamW8bit"'),
        ({"optimizer_type": "LBFGS"}, "cannot be used here"),
        ({"optimizer_type": "no_such_package.Optimizer"}, "pip install no_such_package"),
        ({"optimizer_type": "torch.no_such_module.Optimizer"}, "torch has no module torch.no_such_module"),
        ({"optimizer_type": "torch.optim.NoSuch"}, "torch.optim has no class NoSuch"),
        ({"optimizer_args": ["weight_decay"]}, '"weight_decay" is not of the form key=value'),
        ({"optimizer_args": ["weight_decay=abc"]}, '"abc" must be a number'),
        ({"optimizer_args": ["weight_decay=0.1", "weight_decay=0.2"]}, "given twice"),
        ({"optimizer_args": ["wait_decay=0.1"]}, 'AdamW has no argument "wait_decay". Did you mean "weight_decay"'),
        ({"optimizer_args": ["lr=0.1"]}, '"lr" has its own option'),
        ({"optimizer_args": ["betas=2.0,0.9"]}, "refuses its arguments: Invalid beta"),
        ({"optimizer_args": ["betas=0.9"]}, "must be 2 numbers"),
        ({"learning_rate": -1.0}, "must not be negative"),
        ({"unet_lr": 1e38}, "1e+38 is too large for float32"),
        ({"max_grad_norm": -1.0}, "max_grad_norm"),
        ({"fused_backward_pass": True}, "Adafactor only, not with AdamW"),
    ],
)
def test_mistakes_are_named_in_one_sentence(options, sentence):
    with pytest.raises(UserError) as error:
        check_optimizer_options(OptimizerOptions(**options))
    assert sentence in str(error.value)


def test_a_missing_package_is_named_with_its_install_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "lion_pytorch", None)  # Python's own way to make an import fail
    with pytest.raises(UserError, match=r'needs the package lion_pytorch.*"pip install lion-pytorch"'):
        check_optimizer_options(OptimizerOptions(optimizer_type="Lion"))


def test_an_empty_network_is_refused():
    with pytest.raises(UserError, match="nothing to train"):
        create_optimizer(OptimizerOptions(), [])


def test_adafactor_finds_its_own_rate_and_brings_its_schedule(messages):
    pytest.importorskip("transformers")
    options = OptimizerOptions(optimizer_type="adafactor", learning_rate=1e-3)
    weight = parameter()
    created = create_optimizer(options, [{"params": [weight], "lr": 5e-4}], "cosine")
    assert created.description == "transformers.optimization.Adafactor(relative_step=True)"
    assert created.learning_rate is None
    assert created.forced_scheduler == "adafactor:0.001"
    assert "lr_scheduler cosine has no effect" in messages()
    scheduler = create_lr_scheduler(LRSchedulerOptions(lr_scheduler="cosine", lr_warmup_steps=5), created, 10)
    assert scheduler.get_last_lr() == [0.001]
    weight.grad = torch.ones(4, 4)
    created.optimizer.step()
    scheduler.step()
    # min(1e-2, 1/sqrt(step)) * max(eps2, RMS of the parameter before the step)
    assert scheduler.get_last_lr() == pytest.approx([1e-2 * 1e-3])


def test_adafactor_with_a_fixed_rate_keeps_the_groups_rates(messages):
    pytest.importorskip("transformers")
    arguments = ["relative_step=False", "scale_parameter=False", "warmup_init=False"]
    options = OptimizerOptions(optimizer_type="adafactor", learning_rate=1e-3, optimizer_args=arguments)
    created = create_optimizer(options, [{"params": [parameter()], "lr": 5e-4}], "constant_with_warmup")
    assert created.optimizer.param_groups[0]["lr"] == 5e-4
    check_optimizer_options(options)
    assert created.forced_scheduler is None
    assert "max_grad_norm 0 is recommended" in messages()
    assert "lr_scheduler" not in messages()


def test_adafactor_warmup_init_forces_relative_steps():
    pytest.importorskip("transformers")
    options = OptimizerOptions(optimizer_type="Adafactor", optimizer_args=["relative_step=False", "warmup_init=True"])
    assert create_optimizer(options, [parameter()]).forced_scheduler == "adafactor:2e-06"


def test_optimizers_that_find_their_rate_warn_about_a_small_one(messages):
    pytest.importorskip("prodigyopt")
    create_optimizer(OptimizerOptions(optimizer_type="Prodigy", learning_rate=1e-4), [parameter()])
    assert "1.0 is recommended, not 0.0001" in messages()


def test_different_rates_are_refused_where_the_optimizer_would_stop_the_run():
    pytest.importorskip("prodigyopt")
    groups = [{"params": [parameter()], "lr": 1.0}, {"params": [parameter()], "lr": 0.5}]
    with pytest.raises(UserError, match=r"Prodigy takes one learning rate for everything, but the parts have 1.0, 0.5"):
        create_optimizer(OptimizerOptions(optimizer_type="Prodigy", learning_rate=1.0), groups)


def test_schedule_free_weights_are_averaged_for_saving_and_return_for_training(messages):
    pytest.importorskip("schedulefree")
    problem = Regression()
    options = OptimizerOptions(optimizer_type="AdamWScheduleFree", learning_rate=1e-1)
    assert is_schedule_free(options)
    created = create_optimizer(options, [problem.weight])
    scheduler = create_lr_scheduler(LRSchedulerOptions(lr_scheduler="cosine"), created, 10)
    assert "have no effect on a schedule-free optimizer" in messages()
    problem.train(created, 20)
    scheduler.step()
    assert scheduler.get_last_lr() == [1e-1]
    averaged = problem.weight.detach().clone()
    set_train_mode(created.optimizer)
    training = problem.weight.detach().clone()
    assert not torch.equal(averaged, training)
    set_eval_mode(created.optimizer)
    torch.testing.assert_close(problem.weight.detach(), averaged)


def test_modes_change_nothing_for_other_optimizers():
    created = create_optimizer(OptimizerOptions(), [parameter()])
    set_eval_mode(created.optimizer)
    set_train_mode(created.optimizer)


@pytest.mark.parametrize(
    "name", ["AdamW", "AdamW8bit", "Lion", "Prodigy", "AdamWScheduleFree", "ProdigyPlusScheduleFree"]
)
def test_training_goes_on_to_the_same_numbers_from_a_saved_optimizer(name):
    rate, package, _ = {**TABLE, "AdamW8bit": TABLE["adamw8bit"]}[name]
    pytest.importorskip(package)
    options = OptimizerOptions(optimizer_type=name, learning_rate=rate)
    straight, resumed = Regression(), Regression()
    created = create_optimizer(options, [straight.weight])
    straight.train(created, 5)
    set_train_mode(created.optimizer)
    state, weight = created.optimizer.state_dict(), straight.weight.detach().clone()
    saved = {key: value for key, value in state.items()}
    again = create_optimizer(options, [resumed.weight])
    resumed.weight.data.copy_(weight)
    again.optimizer.load_state_dict(torch.load(_saved(saved), weights_only=True))
    straight.train(created, 5)
    resumed.train(again, 5)
    assert torch.equal(straight.weight, resumed.weight)


def _saved(state: dict) -> object:
    import io

    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer


def test_fused_backward_gives_the_weights_of_ordinary_steps_and_frees_gradients():
    pytest.importorskip("transformers")
    arguments = ["relative_step=False", "scale_parameter=False", "warmup_init=False"]
    options = OptimizerOptions(optimizer_type="Adafactor", learning_rate=1e-2, optimizer_args=arguments)
    made = torch.Generator().manual_seed(0)
    x = torch.randn(8, 6, generator=made)

    def build() -> torch.nn.Sequential:
        torch.manual_seed(1)
        return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))

    plain, fused = build(), build()
    plain_optimizer = create_optimizer(options, plain.parameters()).optimizer
    created = create_optimizer(options, [{"params": [p], "lr": 1e-2} for p in fused.parameters()])
    created.optimizer.load_state_dict(created.optimizer.state_dict())  # what accelerate and resuming do
    stepping = FusedBackward(created.optimizer, max_grad_norm=0.01)
    for _ in range(4):
        plain(x).pow(2).mean().backward()
        for p in plain.parameters():
            torch.nn.utils.clip_grad_norm_([p], 0.01)
        plain_optimizer.step()
        plain_optimizer.zero_grad()
        fused(x).pow(2).mean().backward()
        assert all(p.grad is None for p in fused.parameters())
    for expected, found in zip(plain.parameters(), fused.parameters()):
        torch.testing.assert_close(found, expected)
    stepping.remove()
    fused(x).pow(2).mean().backward()
    assert all(p.grad is not None for p in fused.parameters())


def test_fused_backward_follows_the_schedule():
    pytest.importorskip("transformers")
    options = OptimizerOptions(
        optimizer_type="Adafactor", learning_rate=1.0, optimizer_args=["relative_step=False", "scale_parameter=False"]
    )
    weight = parameter()
    created = create_optimizer(options, [weight])
    FusedBackward(created.optimizer, 0)
    created.optimizer.param_groups[0]["lr"] = 0.0
    weight.sum().backward()
    assert weight.eq(0).all()
    assert len(created.optimizer.param_groups[0]["params"]) == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps"), ({"mixed_precision": "fp16"}, "fp16")],
)
def test_fused_backward_refuses_what_it_cannot_do(arguments, sentence):
    options = OptimizerOptions(optimizer_type="Adafactor", fused_backward_pass=True)
    with pytest.raises(UserError, match=sentence):
        check_optimizer_options(options, **arguments)
    check_optimizer_options(options)
