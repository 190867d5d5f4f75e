"""Optimizers: by name from torch and the published packages, each imported only when it is needed."""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from library.console import say, warn
from library.deferred_compiler import defer_compiler
from library.errors import UserError, did_you_mean
from library.lean_imports import lean_module
from library.training.optim.ema import check_decay
from library.training.optim.keyword_arguments import check_keyword_arguments, parse_keyword_arguments

if TYPE_CHECKING:
    import torch


@dataclass
class OptimizerOptions:
    """Optimizer"""

    optimizer_type: str = ""
    """Optimizer: AdamW (default), AdamW8bit, PagedAdamW8bit, Lion, Lion8bit, SGDNesterov, DAdaptation, DAdaptAdam,
    Prodigy, Adafactor, AdamWScheduleFree and others, a class of torch.optim, or package.module.Class."""
    use_8bit_adam: bool = False
    """Same as --optimizer_type AdamW8bit."""
    use_lion_optimizer: bool = False
    """Same as --optimizer_type Lion."""
    optimizer_args: list[str] = field(default_factory=list)
    """Further arguments of the optimizer, each key=value, for example "weight_decay=0.01" "betas=0.9,0.999"."""
    learning_rate: float = 2.0e-6
    """Learning rate."""
    unet_lr: float | None = None
    """Learning rate of the image model's modules; unset means --learning_rate."""
    text_encoder_lr: list[float] | None = None
    """Learning rate of the text encoders' modules, one value or one per encoder; unset means --learning_rate."""
    max_grad_norm: float = 1.0
    """Gradient clipping norm; 0 switches clipping off."""
    fused_backward_pass: bool = False
    """Step each parameter during the backward pass and free its gradient at once (Adafactor only)."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the trained weights with this decay, such as 0.999: samples and validation
    use it, and every file has one beside it, NAME-ema."""


@dataclass(frozen=True)
class _Entry:
    module: str
    class_name: str
    defaults: tuple[tuple[str, Any], ...] = ()


def _entries(module: str, *class_names: str) -> dict[str, _Entry]:
    return {name.lower(): _Entry(module, name) for name in class_names}


_NAMED: dict[str, _Entry] = {
    **_entries("torch.optim", "AdamW"),
    **_entries("bitsandbytes.optim", "AdamW8bit", "Lion8bit", "PagedAdamW8bit", "PagedLion8bit"),
    **_entries("bitsandbytes.optim", "PagedAdamW", "PagedAdamW32bit"),
    "sgdnesterov": _Entry("torch.optim", "SGD", (("momentum", 0.9), ("nesterov", True))),
    "sgdnesterov8bit": _Entry("bitsandbytes.optim", "SGD8bit", (("momentum", 0.9), ("nesterov", True))),
    **_entries("lion_pytorch", "Lion"),
    "dadaptation": _Entry("dadaptation.experimental", "DAdaptAdamPreprint"),
    **_entries("dadaptation.experimental", "DAdaptAdamPreprint", "DAdaptAdanIP"),
    **_entries("dadaptation", "DAdaptAdaGrad", "DAdaptAdam", "DAdaptAdan", "DAdaptLion", "DAdaptSGD"),
    **_entries("prodigyopt", "Prodigy"),
    **_entries("transformers.optimization", "Adafactor"),
    **_entries("schedulefree", "RAdamScheduleFree", "AdamWScheduleFree", "SGDScheduleFree"),
    **_entries("prodigyplus", "ProdigyPlusScheduleFree"),
    "prodigyschedulefree": _Entry("prodigyplus", "ProdigyPlusScheduleFree"),
}
# Import name -> name to install, where they differ.
_PACKAGES = {"lion_pytorch": "lion-pytorch", "prodigyplus": "prodigy-plus-schedule-free"}
_UNSUITABLE = {"lbfgs": "it needs several evaluations per step", "sparseadam": "it takes sparse gradients only"}
# torch's classes whose steps can be taken faster without a difference in the result: see ``step_kernels``.
_FASTER_STEPS = {"AdamW", "Adam", "SGD"}
# These compare the groups' rates at every step and stop the run when they differ.
_ONE_RATE_ONLY = {"DAdaptAdam", "DAdaptLion", "DAdaptAdamPreprint", "DAdaptSGD", "Prodigy"}


@dataclass(frozen=True)
class CreatedOptimizer:
    """An optimizer and how it is named in logs and metadata."""

    optimizer: torch.optim.Optimizer
    name: str
    """``module.Class``"""
    args: str
    """``k=v,k=v``"""
    learning_rate: float | None
    """--learning_rate, or None when the optimizer finds its own (Adafactor with relative_step)."""
    forced_scheduler: str | None = None
    """``adafactor:<learning rate>`` when the optimizer brings its own schedule."""
    schedule_free: bool = False
    """Whether it averages its weights instead of following a schedule."""

    @property
    def description(self) -> str:
        """``module.Class(k=v,...)``, the value of ``ss_optimizer``."""
        return f"{self.name}({self.args})" if self.args else self.name


def optimizer_name(options: OptimizerOptions) -> str:
    """The name of the chosen optimizer with the two legacy switches resolved.

    Raises UserError when more than one of the three options is given.
    """
    if options.use_8bit_adam and options.use_lion_optimizer:
        raise UserError("--use_8bit_adam and --use_lion_optimizer are mutually exclusive.")
    legacy = "AdamW8bit" if options.use_8bit_adam else "Lion" if options.use_lion_optimizer else ""
    if legacy and options.optimizer_type:
        switch = "--use_8bit_adam" if options.use_8bit_adam else "--use_lion_optimizer"
        raise UserError(f"{switch} and --optimizer_type are mutually exclusive; use --optimizer_type alone.")
    return legacy or options.optimizer_type or "AdamW"


LARGEST_RATE = 1e36
"""What an optimizer makes of it in a step, such as its tenfold, is a float32 number."""


def check_optimizer_options(
    options: OptimizerOptions, gradient_accumulation_steps: int = 1, mixed_precision: str | None = None
) -> None:
    """Check what can be known before a model is loaded: names, packages, arguments, combinations.

    Raises UserError.
    """
    name = optimizer_name(options)
    if options.max_grad_norm < 0:
        raise UserError(f"--max_grad_norm {options.max_grad_norm} must not be negative.")
    for rate in (options.learning_rate, options.unet_lr, *(options.text_encoder_lr or [])):
        if rate is not None and rate < 0:
            raise UserError(f"A learning rate must not be negative: {rate}.")
        if rate is not None and rate > LARGEST_RATE:
            raise UserError(f"A learning rate of {rate:g} is too large for float32, in which steps are computed.")
    check_decay(options.ema_decay)
    if options.ema_decay is not None and is_schedule_free(options):
        raise UserError(f"--ema_decay: {name} averages the weights itself; leave it out.")
    if options.fused_backward_pass:
        if name.lower() != "adafactor":
            raise UserError(f"--fused_backward_pass works with --optimizer_type Adafactor only, not with {name}.")
        if gradient_accumulation_steps != 1:
            raise UserError("--fused_backward_pass cannot be used with --gradient_accumulation_steps above 1.")
        if mixed_precision == "fp16":
            raise UserError("--fused_backward_pass cannot be used with --mixed_precision fp16; use bf16.")
    if name.lower() == "adamw" and not options.optimizer_args:
        return  # nothing can be wrong, and torch need not be loaded yet
    import torch

    optimizer_class, arguments = _class_and_arguments(options)
    rate = None if _is_adafactor(optimizer_class) and arguments["relative_step"] else options.learning_rate
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = _construct(name, optimizer_class, [parameter], rate, arguments)
    if optimizer_class.__module__.startswith(("torch.", "transformers.")):  # others may need a GPU for a step
        parameter.grad = torch.ones_like(parameter)
        try:
            optimizer.step()
        except Exception as error:
            raise UserError(f"--optimizer_type {name} cannot make a step with its arguments: {error}") from error


def create_optimizer(
    options: OptimizerOptions,
    params: Iterable[torch.nn.Parameter] | Sequence[dict[str, Any]],
    lr_scheduler: str = "constant",
) -> CreatedOptimizer:
    """Make the optimizer for ``params``: parameters, or groups ``{"params": [...], "lr": rate}``.

    Every group without its own rate gets ``--learning_rate``. ``lr_scheduler`` is only looked at for advice. The
    optimizer is left in training mode. Raises UserError for unknown names, missing packages and refused arguments.
    """
    name = optimizer_name(options)
    optimizer_class, arguments = _class_and_arguments(options)
    groups: list[Any] = list(params)
    if not groups:
        raise UserError("There is nothing to train: no parameter has a learning rate above 0.")
    rate: float | None = options.learning_rate
    scheduler = None
    if _is_adafactor(optimizer_class) and arguments["relative_step"]:
        groups, rate, scheduler = _without_rates(groups, lr_scheduler), None, f"adafactor:{options.learning_rate}"
    elif _is_adafactor(optimizer_class):
        _advise_on_adafactor(options, arguments, lr_scheduler)
    elif _adapts_its_rate(optimizer_class):
        _check_rates(optimizer_class.__name__, groups, options.learning_rate)
    optimizer = _construct(name, optimizer_class, groups, rate, arguments)
    set_train_mode(optimizer)
    full_name = f"{optimizer_class.__module__}.{optimizer_class.__name__}"
    given = ",".join(f"{key}={value}" for key, value in arguments.items())
    return CreatedOptimizer(optimizer, full_name, given, rate, scheduler, is_schedule_free(options))


def _class_and_arguments(options: OptimizerOptions) -> tuple[Any, dict[str, Any]]:
    """The optimizer's class and its arguments other than params and lr."""
    optimizer_class, defaults = _find_class(optimizer_name(options))
    arguments = parse_keyword_arguments("optimizer_args", options.optimizer_args)
    check_keyword_arguments("optimizer_args", optimizer_class, arguments, ("params", "lr"))
    for key, value in defaults.items():
        arguments.setdefault(key, value)
    if _is_adafactor(optimizer_class):
        arguments.setdefault("relative_step", True)
        if arguments.get("warmup_init") and not arguments["relative_step"]:
            warn("Adafactor: warmup_init=True needs relative_step=True, which is used.")
            arguments["relative_step"] = True
    return optimizer_class, arguments


def _construct(
    name: str, optimizer_class: Any, groups: list[Any], rate: float | None, arguments: dict[str, Any]
) -> Any:
    parameters = [p for group in groups for p in (group["params"] if isinstance(group, dict) else [group])]
    kernels = step_kernels(optimizer_class, arguments, parameters)
    used_class = optimizer_class if kernels is None else _with_kernels(optimizer_class, kernels)
    defer_compiler()  # each method of an optimizer is marked as not to be compiled
    try:
        with contextlib.redirect_stdout(None):  # Prodigy says what was given to it
            optimizer = used_class(groups, lr=rate, **arguments)
    except Exception as error:
        raise UserError(f"--optimizer_type {name} refuses its arguments: {error}") from error
    if not hasattr(optimizer, "param_groups") or not callable(getattr(optimizer, "step", None)):
        raise UserError(f"--optimizer_type {name} is not an optimizer.")
    return optimizer


def step_kernels(
    optimizer_class: type, arguments: Mapping[str, Any], parameters: Sequence[torch.Tensor]
) -> Literal["fused", "foreach"] | None:
    """Which argument of a class of ``torch.optim`` makes its steps fastest here; None: the class is left its choice.

    On CUDA ``fused``, one kernel for all parameters. On a CPU ``foreach``, which takes less time than one parameter
    after another and ends at the same bits in float32. Whoever gives one of the two in ``--optimizer_args`` has chosen.
    """
    import torch

    own = {"fused", "foreach", "differentiable"} & arguments.keys()
    if own or optimizer_class.__module__.rpartition(".")[0] != "torch.optim":
        return None
    if optimizer_class.__name__ not in _FASTER_STEPS:
        return None
    if all(parameter.is_cuda and parameter.is_floating_point() for parameter in parameters):
        return "fused"
    if all(parameter.device.type == "cpu" and parameter.dtype == torch.float32 for parameter in parameters):
        return "foreach"
    return None


def _with_kernels(optimizer_class: type, kernels: str) -> Any:
    """The class with an argument of ``step_kernels`` that stands in the optimizer's groups only during a step.

    So saved states are the same whatever is chosen, and any state continues with what is fastest on this machine.
    """
    import torch

    step = inspect.unwrap(optimizer_class.step)  # type: ignore[attr-defined]

    @torch.no_grad()
    def step_with_kernels(self: Any, closure: Any = None) -> Any:
        if kernels == "fused":
            _counters_to_parameters(self)
        before = [group[kernels] for group in self.param_groups]
        try:
            for group in self.param_groups:
                group[kernels] = True
            return step(self, closure)
        finally:
            for group, value in zip(self.param_groups, before):
                group[kernels] = value

    return type(optimizer_class.__name__, (optimizer_class,), {"step": step_with_kernels})


def _counters_to_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Fused steps want the step counters, which a loaded state leaves on the CPU, beside the parameters."""
    for parameter, state in optimizer.state.items():
        counter = state.get("step")
        if counter is not None and counter.device != parameter.device:
            state["step"] = counter.to(parameter.device)


def _find_class(name: str) -> tuple[Any, dict[str, Any]]:
    """The class for a name of the table, of torch.optim or ``package.module.Class``, and arguments it always gets."""
    entry = _NAMED.get(name.lower())
    if entry is not None:
        return getattr(_import(entry.module, name), entry.class_name), dict(entry.defaults)
    if "." in name:
        if not all(part.isidentifier() for part in name.split(".")):
            raise UserError(
                f"--optimizer_type {name} is not a name; a class of another package is given as package.module.Class."
            )
        module_name, _, class_name = name.rpartition(".")
        module = _import(module_name, name)
        if not isinstance(getattr(module, class_name, None), type):
            raise UserError(f"--optimizer_type {name}: {module_name} has no class {class_name}.")
        return getattr(module, class_name), {}
    lowered = name.lower()
    library = "bitsandbytes.optim" if lowered.endswith("bit") else "torch.optim"
    if lowered in _UNSUITABLE:
        raise UserError(f"--optimizer_type {name} cannot be used here: {_UNSUITABLE[lowered]}.")
    import torch

    module = _import(library, name)
    classes = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and key != "Optimizer"
    }
    for key, value in classes.items():
        if key.lower() == lowered:
            return value, {}
    known = {**{entry.class_name: 0 for entry in _NAMED.values()}, "SGDNesterov": 0, "DAdaptation": 0, **classes}
    raise UserError(
        f"--optimizer_type {name} is unknown.{did_you_mean(name, known)} A class of another package is given as "
        "package.module.Class."
    )


def _import(module_name: str, optimizer: str) -> Any:
    package = module_name.partition(".")[0]
    try:
        if package in ("bitsandbytes", "transformers"):
            return lean_module(module_name)
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] == package and error.name != package:
            raise UserError(f"--optimizer_type {optimizer}: {package} has no module {error.name}.") from None
        missing = (error.name or package).partition(".")[0]
        raise UserError(
            f"--optimizer_type {optimizer} needs the package {missing}, which is not installed: "
            f'run "pip install {_PACKAGES.get(missing, missing)}".'
        ) from None
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(f"--optimizer_type {optimizer}: the package {package} cannot be used: {error}") from error


def _is_adafactor(optimizer_class: type) -> bool:
    return optimizer_class.__name__ == "Adafactor" and optimizer_class.__module__.startswith("transformers.")


def _without_rates(groups: list[Any], lr_scheduler: str) -> list[Any]:
    """Groups for Adafactor with relative_step, which has its own rate and schedule."""
    say("Adafactor with relative_step=True finds its own learning rate; --learning_rate is only its initial value.")
    if any(isinstance(group, dict) and "lr" in group for group in groups):
        say("The learning rates of single parts (--unet_lr, --text_encoder_lr) have no effect with it.")
        groups = [{k: v for k, v in group.items() if k != "lr"} for group in groups]
    if lr_scheduler != "constant" and not lr_scheduler.startswith("adafactor"):
        warn(f"--lr_scheduler {lr_scheduler} has no effect: Adafactor with relative_step=True has its own.")
    return groups


def _advise_on_adafactor(options: OptimizerOptions, arguments: dict[str, Any], lr_scheduler: str) -> None:
    """What is known to work for Adafactor with a given learning rate."""
    if options.max_grad_norm != 0:
        warn("Adafactor limits its updates itself; --max_grad_norm 0 is recommended with relative_step=False.")
    if lr_scheduler != "constant_with_warmup":
        warn("--lr_scheduler constant_with_warmup is recommended for Adafactor with relative_step=False.")
    if arguments.get("clip_threshold", 1.0) != 1.0:
        warn("Adafactor: clip_threshold=1.0 is recommended with relative_step=False.")


def _adapts_its_rate(optimizer_class: type) -> bool:
    return optimizer_class.__module__.partition(".")[0] in ("dadaptation", "prodigyopt", "prodigyplus")


def _check_rates(name: str, groups: list[Any], learning_rate: float) -> None:
    """D-Adaptation and Prodigy multiply what they find by the rate, so it must be near 1 and the same everywhere."""
    rates = [group.get("lr", learning_rate) if isinstance(group, dict) else learning_rate for group in groups]
    if len(set(rates) - {0.0}) > 1:
        found = ", ".join(map(str, dict.fromkeys(rates)))
        if name in _ONE_RATE_ONLY:
            raise UserError(
                f"{name} takes one learning rate for everything, but the parts have {found}; leave out --unet_lr, "
                "--text_encoder_lr and LoRA+ ratios."
            )
        warn(f"{name} uses one learning rate for everything, the first of {found}.")
    if rates[0] <= 0.1:
        warn(f"{name} finds its own rate and multiplies it by --learning_rate; 1.0 is recommended, not {rates[0]}.")


# --- schedule-free optimizers -----------------------------------------------------------------------------------------


def is_schedule_free(options: OptimizerOptions) -> bool:
    """Whether the optimizer averages its weights instead of following a schedule (any name ending in schedulefree)."""
    return optimizer_name(options).lower().endswith("schedulefree")


def has_eval_mode(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the weights have averaged values in addition to those that are trained."""
    return callable(getattr(optimizer, "eval", None))


def set_train_mode(optimizer: torch.optim.Optimizer) -> None:
    """Give the weights their training values; nothing happens for optimizers without modes."""
    _switch(optimizer, "train")


def set_eval_mode(optimizer: torch.optim.Optimizer) -> None:
    """Give the weights the averaged values to sample, save and validate; nothing happens without modes."""
    _switch(optimizer, "eval")


def _switch(optimizer: torch.optim.Optimizer, mode: str) -> None:
    method = getattr(optimizer, mode, None)
    if callable(method):
        method()


# --- stepping during the backward pass --------------------------------------------------------------------------------


class FusedBackward:
    """Steps every parameter as soon as its gradient is complete and frees the gradient (``--fused_backward_pass``).

    While it is active the loop calls neither ``optimizer.step`` nor ``zero_grad`` nor clips: each parameter's gradient
    is clipped to ``max_grad_norm`` on its own. For one process and no accumulation.
    """

    only_frees = False
    """Set, gradients are freed without a step, as a run that is only planned needs it: it has no values."""

    def __init__(self, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> None:
        self.optimizer = getattr(optimizer, "optimizer", optimizer)
        self.max_grad_norm = max_grad_norm
        self._finite: torch.Tensor | None = None
        self._handles = [
            parameter.register_post_accumulate_grad_hook(lambda parameter, index=index: self._step(parameter, index))
            for index, group in enumerate(self.optimizer.param_groups)
            for parameter in group["params"]
        ]

    def _step(self, parameter: torch.Tensor, group_index: int) -> None:
        if not self.only_frees:
            self._clip_and_step(parameter, group_index)
        parameter.grad = None

    def _clip_and_step(self, parameter: torch.Tensor, group_index: int) -> None:
        import torch

        assert parameter.grad is not None
        if self.max_grad_norm > 0:
            norm = torch.nn.utils.clip_grad_norm_([parameter], self.max_grad_norm)
        else:
            norm = torch.linalg.vector_norm(parameter.grad)
        finite = norm.isfinite()
        parameter.grad = torch.where(finite, parameter.grad, 0)  # no NaN reaches a weight, and no step waits for it
        self._finite = finite if self._finite is None else self._finite & finite
        groups = self.optimizer.param_groups  # looked up now: loading a state replaces the groups
        self.optimizer.param_groups = [{**groups[group_index], "params": [parameter]}]
        try:
            self.optimizer.step()
        finally:
            self.optimizer.param_groups = groups

    def was_finite(self) -> bool:
        """Whether every gradient since the last call was; the steps of those that were not left their weights alone."""
        finite, self._finite = self._finite, None
        return finite is None or bool(finite)

    def remove(self) -> None:
        """Return to ordinary steps."""
        for handle in self._handles:
            handle.remove()
