"""``--network_module lycoris.kohya``: the published package ``lycoris-lora`` behind the contract of network modules.

The package answers nearly the whole contract by itself. What stands here is what it leaves open or gets wrong (as of
4.1.3), each with its reason; https://github.com/KohakuBlueleaf/LyCORIS.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints import load_tensors
from library.console import LOGGER, say, warn
from library.errors import UserError, did_you_mean
from library.generation.lora_files import left_out
from library.lean_imports import lean_module
from library.safetensors_io import json_object

if TYPE_CHECKING:
    from torch import Tensor

NAME = "lycoris.kohya"
"""What --network_module calls it."""
WHOLE_NUMBERS = ("conv_dim", "factor", "block_size")
NUMBERS = (
    *("conv_alpha", "dropout", "rank_dropout", "module_dropout", "constraint"),
    *("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio"),
)
UNAVAILABLE = {
    "dylora": "its ranks are drawn outside of every seed and its files do not load again; use networks.dylora",
    "tlora": "its ranks follow the noise level, which the package wants to be told by a trainer made for it",
}
ATTENTION_CLASSES = {"CrossAttention": "Attention", "SelfAttention": "JointAttention"}
"""Classes that presets name -> what Stable Diffusion of diffusers, and Lumina, have in their place."""
ATTENTION_LAYERS = {"MMDoubleStreamBlock": ("img_attn_qkv", "img_attn_proj", "txt_attn_qkv", "txt_attn_proj")}
"""Classes of blocks without a module for their attention -> its layers, for presets that name "SelfAttention"."""
PRESET_KEYS = (
    *("ENABLE_CONV", "UNET_TARGET_REPLACE_MODULE", "UNET_TARGET_REPLACE_NAME", "TEXT_ENCODER_TARGET_REPLACE_MODULE"),
    *("TEXT_ENCODER_TARGET_REPLACE_NAME", "MODULE_ALGO_MAP", "NAME_ALGO_MAP", "USE_FNMATCH", "TARGET_EXCLUDE_NAME"),
)
"""The class attributes in which the package keeps a preset."""


def open_lycoris() -> LycorisModule:
    """The installed package. Raises ImportError where it is missing or broken."""
    return LycorisModule(lean_module(NAME))


class LycorisModule:
    """``lycoris.kohya`` as a network module of this suite: the same two functions, and checks ahead of them."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.network_class = module.LycorisNetworkKohya
        self.untouched = {name: getattr(self.network_class, name) for name in PRESET_KEYS}
        self.merge_scale_twice = {kind for kind in (module.LohaModule, module.LokrModule) if _merges_scale_twice(kind)}
        self._route_messages()

    def _route_messages(self) -> None:
        """The package logs in colours to stdout; its warnings go where this suite's messages go."""
        logger = logging.getLogger("LyCORIS")
        logger.handlers.clear()
        logger.parent, logger.propagate = LOGGER, True
        logger.setLevel(max(logging.WARNING, LOGGER.getEffectiveLevel()))

    def check_network_args(self, arguments: Mapping[str, str]) -> None:
        """Raises UserError for what the package would end on with a traceback; unknown arguments are its own matter."""
        algorithm = (arguments.get("algo") or "lora").lower()
        known = list(self.module.network_module_dict)
        if algorithm not in known:
            raise UserError(f'--network_args: lycoris.kohya has no algo "{algorithm}", only {", ".join(known)}.')
        if algorithm in UNAVAILABLE:
            raise UserError(f"--network_args: algo={algorithm} does not work here: {UNAVAILABLE[algorithm]}.")
        for names, kind, meaning in ((WHOLE_NUMBERS, int, "a whole number"), (NUMBERS, float, "a number")):
            for name in names:
                self._require(name, arguments.get(name), kind, meaning)
        self._preset(arguments)

    def _require(self, name: str, value: str | None, kind: Callable[[str], Any], meaning: str) -> None:
        try:
            kind(value or "0")
        except ValueError:
            raise UserError(f'--network_args: {name} must be {meaning}, not "{value}".') from None

    def _preset(self, arguments: Mapping[str, str]) -> dict[str, Any]:
        """The preset that ``preset=`` names, one of the package's or a TOML file."""
        name = arguments.get("preset", "full")
        if name in self.module.PRESET:
            return copy.deepcopy(self.module.PRESET[name])
        if not Path(name).is_file():
            known = list(self.module.PRESET)
            raise UserError(
                f'--network_args: lycoris.kohya has no preset "{name}" ({", ".join(known)}), and there is no such '
                f"file.{did_you_mean(name, known)}"
            )
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            preset = self.module.read_preset(name)
        if preset is None:
            raise UserError(f"--network_args: preset={name}: {printed.getvalue().strip()}")
        return preset

    def create_network(
        self,
        multiplier: float,
        network_dim: Any,
        network_alpha: Any,
        vae: Any,
        text_encoder: Any,
        unet: Any,
        **given: Any,
    ) -> Any:
        """As the package's own, for the models at hand. Raises UserError when it finds nothing to train in them."""
        given = {"warn_on_unmatched": False, **given}  # its presets name the classes of twenty model families
        if str(given.get("decompose_both", "")).lower() == "false":
            del given["decompose_both"]  # to the package any text is true here
        chosen = given.get("preset", "full")
        preset = self._preset(given)
        targets = preset.setdefault("unet_target_module", list(self.untouched["UNET_TARGET_REPLACE_MODULE"]))
        if chosen in self.module.PRESET and "time_embedding.linear_1" in dict(unet.named_modules()):
            # Listed for another model (Anima). In Stable Diffusion it is found a second time by its name, which ends
            # the package on an assertion.
            targets[:] = [target for target in targets if target != "TimestepEmbedding"]
        _name_attention_as_here(preset, unet)
        fitted = f"{chosen} (for this model)"
        with self._class_state(), said_once():
            self.module.PRESET[fitted] = preset
            try:
                network = self.module.create_network(
                    multiplier, network_dim, network_alpha, vae, text_encoder, unet, **{**given, "preset": fitted}
                )
            finally:
                del self.module.PRESET[fitted]
        if not network.loras:
            raise UserError(f"--network_args: preset={chosen} of lycoris.kohya finds no module to train in this model.")
        _prepare_norms(network, str(given.get("train_norm", False)).lower() != "false")
        _switch_off_at_zero(network)
        _introduce(network, given.get("algo") or "lora")
        return network

    def create_network_from_weights(
        self,
        multiplier: float,
        file: Any,
        vae: Any,
        text_encoder: Any,
        unet: Any,
        weights_sd: Mapping[str, Tensor] | None = None,
        for_inference: bool = False,
        keep: Callable[[str], bool] | None = None,
        **given: Any,
    ) -> tuple[Any, Mapping[str, Tensor]]:
        """The network of a file with its weights: as its metadata describes it, else as the package reads it.

        With ``keep``, only those of its tensors whose key it says yes to. The package tells a network by its tensors
        alone, which fails for LoKr's convolutions, (IA)^3 and others. Raises UserError when the file holds nothing for
        these models or cannot be read that way.
        """
        metadata: Mapping[str, str] = {}
        if weights_sd is None:
            weights_sd, metadata = load_tensors(file, finite=True)
        if keep is not None:
            weights_sd = {key: tensor for key, tensor in weights_sd.items() if keep(key)}
        network = self._from_recipe(multiplier, metadata, weights_sd, vae, text_encoder, unet, given)
        if network is None:
            network = self._from_tensors(multiplier, file, weights_sd, vae, text_encoder, unet)
        in_file = {key.partition(".")[0] for key in weights_sd}
        absent = sorted(in_file - {lora.lora_name for lora in network.loras})
        if len(absent) == len(in_file):
            raise UserError(f"{file}: none of its {len(in_file)} modules belongs to this model.")
        if absent:
            warn(f"{file}: {left_out(absent, in_file)}")
        _switch_off_at_zero(network)
        return network, weights_sd

    def _from_recipe(
        self,
        multiplier: float,
        metadata: Mapping[str, str],
        weights: Mapping[str, Tensor],
        vae: Any,
        text_encoder: Any,
        unet: Any,
        given: Mapping[str, Any],
    ) -> Any:
        """The network that was made with the arguments in the metadata; None when they don't lead to these tensors."""
        recipe = _recipe(metadata)
        if recipe is None:
            return None
        dim, alpha, arguments = recipe
        arguments |= {name: value for name, value in given.items() if value is not None}
        try:
            self.check_network_args(arguments)
            network = self.create_network(multiplier, dim, alpha, vae, text_encoder, unet, **arguments)
        except UserError:
            return None
        in_file = {key.partition(".")[0] for key in weights}
        for loras in (network.text_encoder_loras, network.unet_loras):
            loras[:] = [lora for lora in loras if lora.lora_name in in_file]
        network.loras = network.text_encoder_loras + network.unet_loras
        for lora in network.loras:
            network.add_module(lora.lora_name, lora)
        names = {lora.lora_name for lora in network.loras}
        own = {key: tensor for key, tensor in weights.items() if key.partition(".")[0] in names}
        try:
            missing, unexpected = network.load_state_dict(own, strict=False)
        except RuntimeError:  # another rank than the metadata's, as after a resize
            return None
        return None if missing or unexpected else network

    def _from_tensors(
        self, multiplier: float, file: Any, weights: Mapping[str, Tensor], vae: Any, text_encoder: Any, unet: Any
    ) -> Any:
        with self._class_state(), said_once():
            # The package first builds a whole new network by its preset, only to empty it; without targets it is small.
            for name in PRESET_KEYS[1:5]:
                setattr(self.network_class, name, [])
            try:
                network, _ = self.module.create_network_from_weights(
                    multiplier, str(file), vae, text_encoder, unet, weights
                )
            except (RuntimeError, TypeError) as error:
                raise UserError(
                    f"{file}: lycoris.kohya cannot tell from the tensors what network this is ({error}), and the file "
                    "has no metadata (ss_network_args) that says it."
                ) from error
        network.loras = network.text_encoder_loras + network.unet_loras  # the package leaves those of the emptied one
        _introduce(network, "network")
        return network

    @contextlib.contextmanager
    def _class_state(self) -> Iterator[None]:
        """A preset lives in the package's class and would stay for the next network; here it does not."""
        try:
            for name, value in self.untouched.items():
                setattr(self.network_class, name, value)
            yield
        finally:
            for name, value in self.untouched.items():
                setattr(self.network_class, name, value)

    def merge(self, network: Any, multiplier: float) -> None:
        """Merge a network into its models at ``multiplier``, for good; it is of no use afterwards.

        Sums are rounded once, to each weight's own dtype.

        The package's ``merge_to`` always merges at full strength, whatever multiplier the network was made with.
        """
        import torch

        with torch.no_grad():
            for lora in network.loras:
                if type(lora) in self.merge_scale_twice:
                    lora.scale = lora.scale**0.5
                if not getattr(lora, "not_supported", False):
                    _merge_module(lora, multiplier)


def _merge_module(lora: Any, multiplier: float) -> None:
    import torch

    from library.memory.stored_linear import write_weight

    layer = lora.org_module[0]
    lora.to(layer.weight.device, torch.float32)
    weight, bias = lora.get_merged_weight(multiplier, layer.weight.shape, layer.weight.device)
    write_weight(layer, weight)
    if bias is not None and layer.bias is not None:
        layer.bias.copy_(bias)
    elif bias is not None:
        layer.bias = torch.nn.Parameter(bias.to(layer.weight.dtype), requires_grad=False)


def _merges_scale_twice(kind: type) -> bool:
    """Whether this class multiplies by alpha / rank twice where it merges, and once in its forward: tried on a layer.

    LoHa and LoKr of 4.1.3 do.
    """
    import torch

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        layer = torch.nn.Linear(6, 6, bias=False)
        lora = kind("probe", layer, 1.0, 1, 0.5)
        for parameter in lora.parameters():
            parameter.fill_(1.0)
        seen = lora(torch.eye(6)) - layer(torch.eye(6))
        merged = lora.get_merged_weight(1.0)[0] - layer.weight
    return bool((merged.abs().sum() < 0.75 * seen.abs().sum()).item())


def _name_attention_as_here(preset: dict[str, Any], unet: Any) -> None:
    """Let the classes of attention that presets name mean those that a model here has in their place."""
    classes = {type(module).__name__ for module in unet.modules()}
    for named, own in ATTENTION_CLASSES.items():
        if own not in classes or named in classes:
            continue
        if named in preset["unet_target_module"]:
            preset["unet_target_module"].append(own)
        algorithms = preset.get("module_algo_map") or {}
        if named in algorithms:
            preset["module_algo_map"] = {own: algorithms[named], **algorithms}
    targets = preset["unet_target_module"]
    if "SelfAttention" in targets and ATTENTION_LAYERS.keys().isdisjoint(targets):
        blocks = [(path, type(module).__name__) for path, module in unet.named_modules()]
        layers = [f"{path}.{layer}" for path, block in blocks for layer in ATTENTION_LAYERS.get(block, ())]
        preset["unet_target_name"] = [*preset.get("unet_target_name", ()), *layers]


def _prepare_norms(network: Any, wanted: bool) -> None:
    """Make ``train_norm`` safe. Raises UserError where it would do nothing, or end at the first step."""
    norms = [lora for lora in network.loras if type(lora).__name__ == "NormModule" and not lora.not_supported]
    if wanted and not norms:
        raise UserError("--network_args: train_norm finds no norm in this model that lycoris.kohya can train.")
    for lora in norms:
        layer = lora.org_module[0]
        if layer.weight is None or getattr(layer, "bias", 0) is None:
            raise UserError(
                f"--network_args: train_norm does not work for this model: {lora.lora_name} has no weights of its own."
            )
        if lora.module_type == "groupnorm":
            lora.op = _group_norm


def _group_norm(x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
    """On the CPU, torch 2.13 crashes in the backward pass of a channels-last input that needs no gradient itself."""
    from torch.nn import functional

    return functional.group_norm(x.contiguous() if x.device.type == "cpu" else x, *arguments, **keywords)


def _recipe(metadata: Mapping[str, str]) -> tuple[int, float, dict[str, Any]] | None:
    """Rank, alpha and arguments that a file of this module was made with."""
    if metadata.get("ss_network_module") != NAME:
        return None
    try:
        arguments = json_object(metadata.get("ss_network_args"))
        return int(metadata["ss_network_dim"]), float(metadata["ss_network_alpha"]), arguments
    except (KeyError, ValueError):
        return None


def _switch_off_at_zero(network: Any) -> None:
    """At multiplier 0 DoRA of 4.1.3 adds its low-rank part at full strength; the layer itself is what is meant."""

    def set_multiplier(multiplier: float) -> None:
        type(network).set_multiplier(network, multiplier)
        for lora in network.loras:
            if getattr(lora, "wd", False):
                lora.org_module[0].forward = lora.org_forward if multiplier == 0 else lora.forward

    network.set_multiplier = set_multiplier


def _introduce(network: Any, algorithm: str) -> None:
    count = sum(parameter.numel() for lora in network.loras for parameter in lora.parameters())
    say(
        f"LyCORIS {algorithm} with {len(network.unet_loras)} transformer and {len(network.text_encoder_loras)} text "
        f"encoder modules, {count:,} parameters"
    )


@contextlib.contextmanager
def said_once() -> Iterator[None]:
    """What is printed inside becomes one warning a line; the package prints some lines once for every module."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        yield
    for line in dict.fromkeys(printed.getvalue().splitlines()):
        if line.strip():
            warn(f"lycoris.kohya: {line.strip().removeprefix('[WARN]')}")
