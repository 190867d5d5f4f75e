"""Learning rate schedules. A scheduler is stepped once per optimizer update, so all step counts are updates.

The common schedules are short formulas here, equal to those of transformers and diffusers, whose import takes seconds.
"""

from __future__ import annotations

import importlib
import inspect
import math
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from library.console import warn
from library.errors import UserError, did_you_mean
from library.options import StepsOrRatio
from library.training.optim.keyword_arguments import check_keyword_arguments, parse_keyword_arguments

if TYPE_CHECKING:
    import torch

    from library.training.optim.optimizers import CreatedOptimizer


@dataclass
class LRSchedulerOptions:
    """Learning rate schedule"""

    lr_scheduler: str = "constant"
    """Schedule: constant, constant_with_warmup, linear, cosine, cosine_with_restarts, polynomial, inverse_sqrt,
    cosine_with_min_lr, warmup_stable_decay, piecewise_constant, adafactor, or another name of transformers."""
    lr_scheduler_type: str = ""
    """Scheduler class instead of --lr_scheduler: a name of torch.optim.lr_scheduler, or package.module.Class."""
    lr_scheduler_args: list[str] = field(default_factory=list)
    """Further arguments of the schedule, each key=value, for example "T_max=100"."""
    lr_warmup_steps: StepsOrRatio = 0
    """Warm-up steps (optimizer updates) in which the rate rises from 0, or their share of all updates."""
    lr_decay_steps: StepsOrRatio = 0
    """Updates in which the rate falls at the end (warmup_stable_decay), or their share of all updates."""
    lr_scheduler_num_cycles: int = 1
    """Restarts of cosine_with_restarts; half waves of cosine_with_min_lr and warmup_stable_decay."""
    lr_scheduler_power: float = 1.0
    """Power of polynomial."""
    lr_scheduler_timescale: int | None = None
    """Time scale of inverse_sqrt; unset means the number of warm-up steps."""
    lr_scheduler_min_lr_ratio: float | None = None
    """Smallest rate of cosine_with_min_lr and warmup_stable_decay as a share of the learning rate."""


# --- formulas: the factor for the learning rate at a step (updates done) ----------------------------------------------


def _warmup(step: int, warmup: int) -> float:
    return step / max(1, warmup)


def _progress(step: int, warmup: int, total: int) -> float:
    """0 at the end of the warm-up, 1 at the end of the training."""
    return (step - warmup) / max(1, total - warmup)


def constant(step: int) -> float:
    """1."""
    return 1.0


def constant_with_warmup(step: int, num_warmup_steps: int) -> float:
    """Rising from 0 to 1, then 1."""
    return _warmup(step, num_warmup_steps) if step < num_warmup_steps else 1.0


def linear(step: int, num_warmup_steps: int, num_training_steps: int) -> float:
    """Rising, then falling to 0 in a straight line."""
    if step < num_warmup_steps:
        return _warmup(step, num_warmup_steps)
    return max(0.0, (num_training_steps - step) / max(1, num_training_steps - num_warmup_steps))


def cosine(step: int, num_warmup_steps: int, num_training_steps: int, num_cycles: float = 0.5) -> float:
    """Rising, then ``num_cycles`` waves of a cosine between 1 and 0."""
    if step < num_warmup_steps:
        return _warmup(step, num_warmup_steps)
    progress = _progress(step, num_warmup_steps, num_training_steps)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * num_cycles * 2.0 * progress)))


def cosine_with_restarts(step: int, num_warmup_steps: int, num_training_steps: int, num_cycles: float = 1) -> float:
    """Rising, then ``num_cycles`` half waves from 1 to 0, each starting at 1 again."""
    if step < num_warmup_steps:
        return _warmup(step, num_warmup_steps)
    progress = _progress(step, num_warmup_steps, num_training_steps)
    if progress >= 1.0:
        return 0.0
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((num_cycles * progress) % 1.0))))


def polynomial(
    step: int,
    num_warmup_steps: int,
    num_training_steps: int,
    lr_init: float,
    power: float = 1.0,
    lr_end: float = 1e-7,
) -> float:
    """Rising, then falling from ``lr_init`` to ``lr_end`` with a power of the remaining share."""
    if step < num_warmup_steps:
        return _warmup(step, num_warmup_steps)
    if step >= num_training_steps:
        return lr_end / lr_init
    remaining = 1 - _progress(step, num_warmup_steps, num_training_steps)
    return ((lr_init - lr_end) * remaining**power + lr_end) / lr_init


def inverse_sqrt(step: int, num_warmup_steps: int, timescale: int | None = None) -> float:
    """Rising, then 1 / sqrt(1 + (step - warm-up) / timescale)."""
    if step < num_warmup_steps:
        return _warmup(step, num_warmup_steps)
    scale = timescale or num_warmup_steps or 10_000
    return 1.0 / math.sqrt((step + scale - num_warmup_steps) / scale)


def cosine_with_min_lr(
    step: int, num_warmup_steps: int, num_training_steps: int, min_lr_rate: float, num_cycles: float = 0.5
) -> float:
    """Rising, then a cosine between 1 and ``min_lr_rate``."""
    if step < num_warmup_steps:
        return _warmup(step, num_warmup_steps)
    progress = _progress(step, num_warmup_steps, num_training_steps)
    factor = 0.5 * (1.0 + math.cos(math.pi * num_cycles * 2.0 * progress))
    return max(0.0, factor * (1 - min_lr_rate) + min_lr_rate)


_RISES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: progress,
    "cosine": lambda progress: 0.5 * (1.0 - math.cos(math.pi * progress)),
    "1-sqrt": lambda progress: 1.0 - math.sqrt(1.0 - progress),
}
_FALLS: dict[str, Callable[[float, float], float]] = {
    "linear": lambda progress, cycles: 1.0 - progress,
    "cosine": lambda progress, cycles: 0.5 * (1.0 + math.cos(math.pi * cycles * 2.0 * progress)),
    "1-sqrt": lambda progress, cycles: 1.0 - math.sqrt(progress),
}


def warmup_stable_decay(
    step: int,
    num_warmup_steps: int,
    num_stable_steps: int,
    num_decay_steps: int,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
    min_lr_ratio: float = 0.0,
    num_cycles: float = 0.5,
) -> float:
    """From ``min_lr_ratio`` up to 1, then 1, then down to ``min_lr_ratio``. The types are linear, cosine or 1-sqrt."""
    if step < num_warmup_steps:
        factor = _RISES[warmup_type](_warmup(step, num_warmup_steps))
    elif step < num_warmup_steps + num_stable_steps:
        return 1.0
    elif step < num_warmup_steps + num_stable_steps + num_decay_steps:
        factor = _FALLS[decay_type]((step - num_warmup_steps - num_stable_steps) / max(1, num_decay_steps), num_cycles)
    else:
        return min_lr_ratio
    return max(0.0, factor * (1.0 - min_lr_ratio) + min_lr_ratio)


def piecewise_constant(step: int, step_rules: str) -> float:
    """``"1:10,0.1:20,0.01"``: factor 1 before step 10, 0.1 before step 20, then 0.01."""
    *rules, last = step_rules.split(",")
    bounds = {int(steps): float(value) for value, steps in (rule.split(":") for rule in rules)}
    for bound in sorted(bounds):
        if step < bound:
            return bounds[bound]
    return float(last)


_FORMULAS: dict[str, Callable[..., float]] = {
    function.__name__: function
    for function in (
        constant,
        constant_with_warmup,
        linear,
        cosine,
        cosine_with_restarts,
        polynomial,
        inverse_sqrt,
        cosine_with_min_lr,
        warmup_stable_decay,
        piecewise_constant,
    )
}
_FROM_TRANSFORMERS = ("reduce_lr_on_plateau", "cosine_warmup_with_min_lr", "greedy")
_KNOWN = (*_FORMULAS, "adafactor", *_FROM_TRANSFORMERS)
_USED_BY = {
    "lr_warmup_steps": frozenset(_KNOWN) - {"piecewise_constant", "reduce_lr_on_plateau", "greedy"},
    "lr_decay_steps": frozenset({"warmup_stable_decay"}),
    "lr_scheduler_num_cycles": frozenset({"cosine_with_restarts", "cosine_with_min_lr", "warmup_stable_decay"}),
    "lr_scheduler_power": frozenset({"polynomial"}),
    "lr_scheduler_timescale": frozenset({"inverse_sqrt"}),
    "lr_scheduler_min_lr_ratio": frozenset({"cosine_with_min_lr", "warmup_stable_decay"}),
}
"""Which schedules an option is for; those without a warm-up refuse it themselves."""


# --- creation ---------------------------------------------------------------------------------------------------------


class ReportedLearningRate:
    """Stands in for a scheduler when the optimizer does without one: reports the rates and changes nothing."""

    def __init__(self, optimizer: Any, initial: float | None = None) -> None:
        self.optimizer = optimizer
        self.initial = initial

    def step(self) -> None:
        """Nothing."""

    def get_last_lr(self) -> list[float]:
        """The rate of each group; for Adafactor with relative_step what its first parameter was updated with."""
        return [self._rate(group) for group in self.optimizer.param_groups]

    def _rate(self, group: dict[str, Any]) -> float:
        if not group.get("relative_step"):
            return group["lr"]
        state = self.optimizer.state.get(group["params"][0])
        return float(self.optimizer._get_lr(group, state)) if state else float(self.initial or 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Empty: the optimizer's state holds everything."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""


def steps_of(value: int | float, total: int) -> int:
    """A number of steps, or a ratio of ``total``, as steps."""
    return int(value * total) if isinstance(value, float) else value


def check_lr_scheduler_options(options: LRSchedulerOptions) -> None:
    """Check what can be known before a model is loaded. Raises UserError."""
    arguments = parse_keyword_arguments("lr_scheduler_args", options.lr_scheduler_args)
    if options.lr_scheduler_type:
        if options.lr_warmup_steps:
            raise UserError("--lr_warmup_steps cannot be combined with --lr_scheduler_type; use its own arguments.")
        _check_class_arguments(options, arguments)
        return
    name = options.lr_scheduler.partition(":")[0]
    if name not in _KNOWN:
        hint = " A scheduler class is given with --lr_scheduler_type." if "." in name else did_you_mean(name, _KNOWN)
        raise UserError(f"--lr_scheduler {options.lr_scheduler} is unknown.{hint}")
    if name in ("constant", "adafactor") and options.lr_warmup_steps:
        raise UserError(
            f"--lr_scheduler {name} has no warm-up; use constant_with_warmup, or leave out --lr_warmup_steps."
        )
    if name in _FORMULAS:
        _parameters(name, options, arguments, num_training_steps=1, lr_init=1.0)
    elif name == "reduce_lr_on_plateau" and arguments:
        plateau = replace(options, lr_scheduler_type="torch.optim.lr_scheduler.ReduceLROnPlateau")
        _check_class_arguments(plateau, arguments)


def unused_schedule_options(options: LRSchedulerOptions) -> list[tuple[str, list[str]]]:
    """Reasons and names of options that the chosen schedule does not look at."""
    if options.lr_scheduler_type:
        return [("beside --lr_scheduler_type", ["lr_scheduler", *_USED_BY])]
    name = options.lr_scheduler.partition(":")[0]
    return [(f"with --lr_scheduler {name}", [option for option, users in _USED_BY.items() if name not in users])]


def create_lr_scheduler(
    options: LRSchedulerOptions,
    optimizer: torch.optim.Optimizer | CreatedOptimizer,
    num_training_steps: int,
) -> Any:
    """The scheduler for ``num_training_steps`` optimizer updates: ``step``, ``get_last_lr``, ``state_dict``.

    A ``CreatedOptimizer`` brings its forced schedule along; a schedule-free one gets a stand-in that changes nothing.
    Raises UserError.
    """
    forced = getattr(optimizer, "forced_scheduler", None)
    inner: Any = getattr(optimizer, "optimizer", optimizer)
    if getattr(optimizer, "schedule_free", False):
        if options.lr_scheduler != "constant" or options.lr_scheduler_type or options.lr_warmup_steps:
            warn(
                "--lr_scheduler and --lr_warmup_steps have no effect on a schedule-free optimizer; "
                '--optimizer_args "warmup_steps=100" warms it up.'
            )
        return ReportedLearningRate(inner)
    name, _, initial = (forced or options.lr_scheduler).partition(":")
    if forced or (name == "adafactor" and not options.lr_scheduler_type):
        return _adafactor_scheduler(inner, initial)
    check_lr_scheduler_options(options)
    arguments = parse_keyword_arguments("lr_scheduler_args", options.lr_scheduler_args)
    if options.lr_scheduler_type:
        scheduler_class = _scheduler_class(options)
        try:
            return scheduler_class(inner, **arguments)
        except (TypeError, ValueError, AssertionError) as error:
            raise UserError(
                f"--lr_scheduler_type {options.lr_scheduler_type} refuses its arguments: {error}"
            ) from error
    if name not in _FORMULAS:
        return _transformers_scheduler(name, options, inner, num_training_steps, arguments)
    from torch.optim.lr_scheduler import LambdaLR

    _check_lengths(name, options, num_training_steps)
    parameters = _parameters(name, options, arguments, num_training_steps, inner.defaults["lr"])
    return LambdaLR(inner, partial(_FORMULAS[name], **parameters))


def _parameters(
    name: str, options: LRSchedulerOptions, arguments: dict[str, Any], num_training_steps: int, lr_init: float
) -> dict[str, Any]:
    """The arguments of a formula: from the options, completed and overruled by ``--lr_scheduler_args``."""
    formula = _FORMULAS[name]
    warmup = steps_of(options.lr_warmup_steps, num_training_steps)
    decay = steps_of(options.lr_decay_steps, num_training_steps)
    half_waves = options.lr_scheduler_num_cycles / 2
    ratio = options.lr_scheduler_min_lr_ratio
    offered: dict[str, Any] = {"num_warmup_steps": warmup, "num_training_steps": num_training_steps}
    offered |= {"num_stable_steps": num_training_steps - warmup - decay, "num_decay_steps": decay, "lr_init": lr_init}
    special: dict[str, dict[str, Any]] = {
        "cosine_with_restarts": {"num_cycles": options.lr_scheduler_num_cycles},
        "polynomial": {"power": options.lr_scheduler_power},
        "inverse_sqrt": {"timescale": options.lr_scheduler_timescale},
        "cosine_with_min_lr": {"num_cycles": half_waves, "min_lr_rate": ratio},
        "warmup_stable_decay": {"num_cycles": half_waves, "min_lr_ratio": ratio or 0.0},
    }
    if name == "cosine_with_min_lr" and "min_lr" in arguments:
        arguments = dict(arguments)
        arguments["min_lr_rate"] = arguments.pop("min_lr") / lr_init
    check_keyword_arguments("lr_scheduler_args", formula, arguments, ("step", "lr_init", *offered))
    takes = inspect.signature(formula).parameters
    parameters = {k: v for k, v in offered.items() if k in takes} | special.get(name, {}) | arguments
    _check_parameters(name, parameters, formula)
    return parameters


def _check_parameters(name: str, parameters: dict[str, Any], formula: Callable[..., float]) -> None:
    if name == "cosine_with_min_lr" and parameters["min_lr_rate"] is None:
        raise UserError("--lr_scheduler cosine_with_min_lr needs --lr_scheduler_min_lr_ratio, for example 0.1.")
    if name == "piecewise_constant" and "step_rules" not in parameters:
        raise UserError(
            "--lr_scheduler piecewise_constant needs --lr_scheduler_args \"step_rules='1:10,0.1:20,0.01'\"."
        )
    if name == "polynomial" and not parameters["lr_init"] > parameters.get("lr_end", 1e-7):
        raise UserError(
            f"--lr_scheduler polynomial ends at {parameters.get('lr_end', 1e-7)}, which must be below --learning_rate."
        )
    for key in ("warmup_type", "decay_type"):
        if parameters.get(key, "linear") not in _RISES:
            raise UserError(f"--lr_scheduler_args {key}={parameters[key]!r} must be one of {', '.join(_RISES)}.")
    total = parameters.get("num_training_steps", 0)
    for step in sorted({0, 1, 2, 10, 100, 1000, 10_000, total // 2, total}):
        try:
            factor = formula(step, **parameters)
            finite = math.isfinite(factor)
        except (TypeError, ValueError, ArithmeticError) as error:
            raise UserError(f"--lr_scheduler {name} refuses its arguments: {error}.") from error
        if not finite:
            raise UserError(f"--lr_scheduler {name}: the learning rate of step {step} would be {factor}.")


def _check_lengths(name: str, options: LRSchedulerOptions, num_training_steps: int) -> None:
    warmup = steps_of(options.lr_warmup_steps, num_training_steps)
    decay = steps_of(options.lr_decay_steps, num_training_steps)
    if name == "warmup_stable_decay" and warmup + decay > num_training_steps:
        raise UserError(
            f"--lr_warmup_steps {warmup} and --lr_decay_steps {decay} are together more than the run's "
            f"{num_training_steps} updates."
        )
    if warmup > num_training_steps and name != "piecewise_constant":
        warn(
            f"--lr_warmup_steps {warmup} is more than the run's {num_training_steps} updates: it ends while warming up."
        )


def _adafactor_scheduler(optimizer: Any, initial: str) -> ReportedLearningRate:
    if not any(group.get("relative_step") for group in optimizer.param_groups):
        raise UserError("--lr_scheduler adafactor needs --optimizer_type Adafactor with relative_step=True.")
    try:
        return ReportedLearningRate(optimizer, float(initial or 0.0))
    except ValueError:
        raise UserError(f'--lr_scheduler adafactor:{initial}: "{initial}" must be a number.') from None


def _scheduler_class(options: LRSchedulerOptions) -> Any:
    name = options.lr_scheduler_type
    if not all(part.isidentifier() for part in name.split(".")):
        raise UserError(f"--lr_scheduler_type {name} is not a name; a class is given as package.module.Class.")
    module_name, _, class_name = name.rpartition(".")
    try:
        module = importlib.import_module(module_name or "torch.optim.lr_scheduler")
    except ImportError as error:
        raise UserError(f"--lr_scheduler_type {name}: {module_name} cannot be imported ({error}).") from None
    if not isinstance(getattr(module, class_name, None), type):
        raise UserError(
            f"--lr_scheduler_type {name}: {module.__name__} has no class {class_name}."
            f"{did_you_mean(class_name, vars(module))}"
        )
    return getattr(module, class_name)


def _check_class_arguments(options: LRSchedulerOptions, arguments: dict[str, Any]) -> None:
    """Unknown and missing arguments of a scheduler class are known without an optimizer."""
    scheduler_class = _scheduler_class(options)
    check_keyword_arguments("lr_scheduler_args", scheduler_class, arguments, ("optimizer",))
    try:
        inspect.signature(scheduler_class).bind(None, **arguments)
    except TypeError as error:
        raise UserError(
            f"--lr_scheduler_type {options.lr_scheduler_type}: {error}; give it in --lr_scheduler_args as key=value."
        ) from None
    _try_scheduler(options.lr_scheduler_type, scheduler_class, arguments)


def _try_scheduler(name: str, scheduler_class: Any, arguments: dict[str, Any]) -> None:
    """Let a scheduler class make two steps on an optimizer of its own. Raises UserError when it cannot."""
    import torch

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no step of the optimizer comes before the scheduler's
            scheduler = scheduler_class(optimizer, **arguments)
            if "metrics" not in inspect.signature(scheduler.step).parameters:
                for _ in range(2):
                    scheduler.step()
    except Exception as error:
        raise UserError(f"--lr_scheduler_type {name} refuses its arguments: {error}.") from error
    if not all(math.isfinite(group["lr"]) for group in optimizer.param_groups):
        raise UserError(f"--lr_scheduler_type {name}: its arguments make a learning rate that is not finite.")


def _transformers_scheduler(
    name: str, options: LRSchedulerOptions, optimizer: Any, num_training_steps: int, arguments: dict[str, Any]
) -> Any:
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, SchedulerType

    function: Any = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]
    offered = {
        "num_warmup_steps": steps_of(options.lr_warmup_steps, num_training_steps),
        "num_training_steps": num_training_steps,
    }
    takes = inspect.signature(function).parameters
    offered = {key: value for key, value in offered.items() if key in takes}
    try:
        return function(optimizer, **{**offered, **arguments})
    except (TypeError, ValueError) as error:
        raise UserError(f"--lr_scheduler {name} refuses its arguments: {error}") from error


# --- stepping and state -----------------------------------------------------------------------------------------------


def step_scheduler(scheduler: Any, loss: float) -> None:
    """Step once after an optimizer update; ``loss`` goes to schedulers that watch one (ReduceLROnPlateau)."""
    if "metrics" in inspect.signature(scheduler.step).parameters:
        scheduler.step(loss)
    else:
        scheduler.step()


def scheduler_state(scheduler: Any) -> dict[str, Any]:
    """The scheduler's state as plain JSON values. Raises TypeError for a scheduler that holds other objects."""
    return {key: _to_json(value) for key, value in scheduler.state_dict().items()}


def load_scheduler_state(scheduler: Any, state: dict[str, Any]) -> None:
    """Restore what ``scheduler_state`` gave, after the optimizer's own state has been restored."""
    scheduler.load_state_dict({key: _from_json(value) for key, value in state.items()})


def _to_json(value: Any) -> Any:
    """JSON has no tuples and no keys that are numbers: those are written as ``{"type": ..., "value": ...}``."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        items = [_to_json(item) for item in value]
        return items if isinstance(value, list) else {"type": "tuple", "value": items}
    if isinstance(value, dict):
        kind = "counter" if isinstance(value, Counter) else "dict"
        return {"type": kind, "value": [[_to_json(key), _to_json(item)] for key, item in value.items()]}
    if hasattr(value, "tolist"):  # tensors and NumPy values of schedulers that keep rates in them
        return _to_json(value.tolist())
    raise TypeError(f"a learning rate scheduler with a {type(value).__name__} in its state cannot be saved")


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value["type"] == "tuple":
        return tuple(_from_json(item) for item in value["value"])
    pairs = {_from_json(key): _from_json(item) for key, item in value["value"]}
    return Counter(pairs) if value["type"] == "counter" else pairs
