"""Networks of gen_img.py: beside the layers, merged or computed into the weights, they draw the same image."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.errors import UserError
from library.generation.network_options import NetworkOptions, parse_arguments
from library.models.stable_diffusion.original_names import under_original_names
from library.models.stable_diffusion.pipeline import StableDiffusionPipeline
from networks import dylora, lora, lora_fa, oft
from networks.adapters.image_networks import ImageNetworks, open_networks
from tests.families.stable_diffusion import loaded_pipelines
from tests.running import lycoris_package

MODULES: dict[str, tuple[Any, dict[str, str]]] = {
    "networks.lora": (lora, {"conv_dim": "2"}),
    "networks.lora_fa": (lora_fa, {}),
    "networks.dylora": (dylora, {"unit": "2"}),
    "networks.oft": (oft, {"enable_all_linear": "true"}),
}
VARIANTS = ("sd1", "sd2", "sdxl")


@pytest.fixture(scope="module")
def pipelines(few_blocks_sd1, few_blocks_sd2, few_blocks_sdxl):
    """A loaded pipeline of each variant."""
    loaded = loaded_pipelines(dict(zip(VARIANTS, (few_blocks_sd1, few_blocks_sd2, few_blocks_sdxl))))

    @cache
    def load(variant: str) -> StableDiffusionPipeline:
        pipeline = loaded(variant)
        pipeline.meta_module = cache(pipeline.meta_module)  # type: ignore[method-assign]
        return pipeline

    return load


def randomised(network: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return network


@pytest.fixture(scope="module")
def files(pipelines, tmp_path_factory):
    """Files with random weights, by variant, module and seed."""
    folder = tmp_path_factory.mktemp("networks")

    @cache
    def make(variant: str, module: str, seed: int = 1, algorithm: str = "") -> Path:
        pipeline = pipelines(variant)
        unet, encoders = pipeline.load("unet"), pipeline.load_text_encoders()
        path = folder / f"{variant}-{module}-{seed}-{algorithm}.safetensors"
        if module != "lycoris.kohya":
            made, arguments = MODULES[module]
            randomised(made.create_network(1.0, 4, 2.0, None, encoders, unet, **arguments), seed).save_weights(
                path, None, {}
            )
            return path
        is_xl, algo = variant == "sdxl", algorithm.partition("+")[0]
        arguments = {"algo": algo, **({"dora_wd": "True"} if algorithm.endswith("+dora") else {})}
        arguments |= {"train_norm": "True"} if algorithm.endswith("+norm") else {}
        network = lycoris_package().create_network(
            *(1.0, 4, 2.0, None, encoders if is_xl else encoders[0]),
            under_original_names(unet) if is_xl else unet,
            **arguments,
        )
        network.apply_to(encoders, unet, True, True)  # as in a training
        randomised(network, seed)
        metadata = {"ss_network_module": module, "ss_network_dim": "4", "ss_network_alpha": "2.0"}
        network.save_weights(str(path), torch.float32, metadata | {"ss_network_args": json.dumps(arguments)})
        network.restore()
        return path

    return make


@pytest.fixture
def networks(pipelines):
    """Open networks and let them act on every part; after the test they are taken out, and merged weights put back."""
    opened: list[tuple[StableDiffusionPipeline, ImageNetworks]] = []
    kept: dict[str, dict[str, Any]] = {}

    def open_(variant: str, given: list[tuple[str, Path]], **options: Any) -> ImageNetworks:
        pipeline = pipelines(variant)
        modules = {part: pipeline.modules[part] for part in ("unet", *pipeline.encoders)}
        merges = options.get("network_merge") or options.get("network_merge_n_models")
        if merges and variant not in kept:
            kept[variant] = {part: copy.deepcopy(module.state_dict()) for part, module in modules.items()}
        stack = open_networks(
            NetworkOptions([module for module, _ in given], [str(path) for _, path in given], **options), pipeline
        )
        for part, module in modules.items():
            stack.enter(part, module, "cpu")
        opened.append((pipeline, stack))
        return stack

    def close() -> None:
        while opened:
            pipeline, stack = opened.pop()
            for part in ("unet", *pipeline.encoders):
                stack.leave(part)
        for variant, states in kept.items():
            for part, state in states.items():
                pipelines(variant).modules[part].load_state_dict(state)

    open_.close = close  # type: ignore[attr-defined]
    yield open_
    close()


def prediction(pipeline: StableDiffusionPipeline) -> Tensor:
    """What the U-Net makes of fixed latents with the text encoders' outputs for a prompt."""
    generator = torch.Generator().manual_seed(3)
    conditioning = dict(pipeline.encode_prompts(["a cat on the table"]))
    if pipeline.variant == "sdxl":
        conditioning["time_ids"] = torch.tensor([[64.0, 64, 0, 0, 64, 64]])
    with torch.no_grad():
        return pipeline.predict(torch.randn(1, 4, 8, 8, generator=generator), torch.tensor([400]), conditioning)


def error(values: Tensor, expected: Tensor) -> float:
    return ((values - expected).abs().max() / expected.abs().max()).item()


def state_of(pipeline: StableDiffusionPipeline) -> dict[str, Tensor]:
    parts = ("unet", *pipeline.encoders)
    return {
        f"{part}.{key}": value.clone() for part in parts for key, value in pipeline.modules[part].state_dict().items()
    }


@pytest.mark.parametrize(
    ("variant", "modules"),
    [("sd1", ("networks.lora", "networks.oft")), ("sdxl", ("networks.lora_fa", "networks.dylora"))],
)
def test_applied_merged_and_pre_calculated_networks_act_alike(pipelines, files, networks, variant, modules):
    """Also mixed: --network_merge_n_models 1 and the other beside it, in the order of the files."""
    pipeline = pipelines(variant)
    plain = prediction(pipeline)
    given = [(module, files(variant, module, seed)) for seed, module in enumerate(modules, 1)]
    results = {}
    modes: dict[str, dict[str, Any]] = {"beside": {}, "merged": {"network_merge": True}}
    if "networks.oft" in modules:
        modes["pre-calculated"] = {"network_pre_calc": True}
        modes["first merged"] = {"network_merge_n_models": 1}
        modes["first merged, other pre-calculated"] = {"network_merge_n_models": 1, "network_pre_calc": True}
    for name, options in modes.items():
        networks(variant, given, network_mul=[0.8, 0.7], **options)
        results[name] = prediction(pipeline)
        networks.close()
    for result in results.values():
        assert error(result, results["beside"]) < 1e-3 < error(result, plain)
    if "networks.oft" in modules:
        networks(variant, given[::-1], network_mul=[0.7, 0.8])
        assert error(prediction(pipeline), results["beside"]) > 1e-3, "OFT turns what the networks before it make"


@pytest.mark.parametrize("algorithm", ["full", "lora+dora", pytest.param("lora+norm", marks=pytest.mark.thorough)])
def test_lycoris_acts_as_in_training(pipelines, files, networks, algorithm):
    pipeline, path = pipelines("sd1"), files("sd1", "lycoris.kohya", 1, algorithm)
    plain, before = prediction(pipeline), state_of(pipeline)
    encoder, unet = pipeline.modules["text_encoder"], pipeline.modules["unet"]
    module = lycoris_package()
    network, _ = module.create_network_from_weights(1.0, path, None, encoder, unet)
    network.apply_to(encoder, unet, True, True)
    expected = prediction(pipeline)
    network.restore()
    stack = networks("sd1", [("lycoris.kohya", path)])
    assert error(prediction(pipeline), expected) < 1e-3 < error(expected, plain)
    stack.set_multipliers([0.0])
    assert torch.equal(prediction(pipeline), plain)
    stack.set_multipliers([0.5])
    half = prediction(pipeline)
    networks.close()
    assert_equal_states(state_of(pipeline), before)
    networks("sd1", [("lycoris.kohya", path)], network_merge=True, network_mul=[0.5])
    assert error(prediction(pipeline), half) < 1e-3


@pytest.mark.thorough
def test_lycoris_of_xl(pipelines, files, networks):
    pipeline = pipelines("sdxl")
    plain = prediction(pipeline)
    path = files("sdxl", "lycoris.kohya", 1, "loha")
    assert all(networks("sdxl", [("lycoris.kohya", path)]).acts_on(part) for part in ("unet", *pipeline.encoders))
    assert error(prediction(pipeline), plain) > 1e-3


@pytest.mark.parametrize(
    ("module", "algorithm"),
    [("networks.lora", ""), ("networks.oft", ""), ("lycoris.kohya", "lora+norm")],
)
def test_changes_of_single_layers_are_what_a_network_does(pipelines, files, networks, module, algorithm):
    """What regions of an image get of each kind of network."""
    pipeline = pipelines("sd1")
    stack = networks("sd1", [(module, files("sd1", module, 1, algorithm))], network_mul=[0.6])
    expected = prediction(pipeline)
    with stack.changes("unet") as changes:
        plain = prediction(pipeline)
        hooks = [
            layer.register_forward_hook(lambda _, inputs, y, change=change: y + change(inputs[0], y))
            for layer, (change,) in changes.items()
        ]
        assert error(prediction(pipeline), expected) < 1e-4 < 1e-3 < error(plain, expected)
        for hook in hooks:
            hook.remove()
    assert torch.equal(prediction(pipeline), expected)


def assert_equal_states(state: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    assert state.keys() == before.keys()
    assert all(torch.equal(state[key], before[key]) for key in before)


@pytest.mark.parametrize(
    "pre_calc", [False, pytest.param(True, marks=pytest.mark.thorough)], ids=["beside", "pre-calculated"]
)
def test_strengths_of_a_prompt_change_what_is_not_merged(pipelines, files, networks, pre_calc):
    """--am: as if they had been given with --network_mul; 0 is no network at all; then everything is as it was."""
    pipeline = pipelines("sd1")
    plain, before = prediction(pipeline), state_of(pipeline)
    given = [("networks.lora", files("sd1", "networks.lora", seed)) for seed in (1, 2)]
    networks("sd1", given, network_mul=[0.3, -0.5])
    expected = prediction(pipeline)
    networks.close()
    stack = networks("sd1", given, network_pre_calc=pre_calc)
    first = prediction(pipeline)
    stack.set_multipliers(stack.strengths((0.3, -0.5)))
    assert error(prediction(pipeline), expected) < 1e-4
    stack.set_multipliers(stack.strengths((0.0,)))
    assert torch.equal(prediction(pipeline), plain)
    stack.set_multipliers(stack.strengths(None))
    assert torch.equal(prediction(pipeline), first)
    networks.close()
    assert_equal_states(state_of(pipeline), before)


def test_weights_are_computed_for_the_parts_that_work_next(pipelines, files, networks):
    """--network_pre_calc: where only texts are encoded with other strengths, the U-Net keeps its weights."""
    pipeline = pipelines("sd1")
    stack = networks("sd1", [("networks.lora", files("sd1", "networks.lora"))], network_pre_calc=True)
    before = state_of(pipeline)
    stack.set_multipliers([0.2], "text_encoder")
    changed = {
        key.partition(".")[0] for key, value in state_of(pipeline).items() if not torch.equal(value, before[key])
    }
    assert changed == {"text_encoder"}
    stack.set_multipliers([0.2], "unet")
    result = prediction(pipeline)
    networks.close()
    networks("sd1", [("networks.lora", files("sd1", "networks.lora"))], network_mul=[0.2])
    assert error(result, prediction(pipeline)) < 1e-3


def test_strengths_of_a_prompt_count_from_the_first_that_is_not_merged(pipelines, files, networks):
    given = [("networks.lora", files("sd1", "networks.lora", seed)) for seed in (1, 2, 3)]
    stack = networks("sd1", given, network_mul=[0.5, 0.6], network_merge_n_models=1)
    assert stack.strengths(None) == (0.6, 1.0) and stack.strengths((0.2,)) == (0.2, 0.2)
    stack.set_multipliers((0.2, 0.4))
    assert stack.multipliers == [0.5, 0.2, 0.4]
    result = prediction(pipelines("sd1"))
    networks.close()
    networks("sd1", given, network_mul=[0.5, 0.2, 0.4])
    assert error(result, prediction(pipelines("sd1"))) < 1e-3


# ---- options --------------------------------------------------------------------------------------------------------


def test_arguments_of_networks_take_both_separators():
    """--network_args: the comma of the documentation and the semicolon of the program."""
    assert parse_arguments("alpha=1.0,dropout=0.1") == {"alpha": "1.0", "dropout": "0.1"}
    assert parse_arguments("dims=1,2,3; algo=loha;") == {"dims": "1,2,3", "algo": "loha"}


def test_arguments_without_effect_are_named(pipelines, files, networks, caplog):
    networks("sd1", [("networks.lora", files("sd1", "networks.lora"))], network_args=["alpha=1.0,dropout=0.1"])
    assert "alpha, dropout of networks.lora concern training and have no effect on images" in caplog.text


def test_metadata_are_printed_if_requested(pipelines, files, networks, capsys):
    """--network_show_meta"""
    lycoris_package()
    networks("sd1", [("lycoris.kohya", files("sd1", "lycoris.kohya", 1, "loha"))], network_show_meta=True)
    assert '"ss_network_module": "lycoris.kohya"' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"network_module": []}, "--network_weights needs --network_module"),
        ({"network_module": ["networks.lora"] * 2}, "1 of 2 files are given, one for each module; there is no weight"),
        ({"network_weights": ["missing.safetensors"]}, "there is no file missing.safetensors"),
        ({"network_module": ["networks.lorra"]}, r'"networks.lorra" is unknown here.*"networks.lora"'),
        ({"network_mul": [1.0, 2.0]}, r"--network_mul has more values \(2\) than --network_module has modules \(1\)"),
        ({"network_mul": [float("nan")]}, "--network_mul must be finite numbers"),
        ({"network_args": ["algo"]}, '"algo" must have the form key=value'),
        ({"network_args": ["a=1", "b=2"]}, "one string for each network, but 2 are given for 1"),
        ({"network_merge": True, "network_pre_calc": True}, "--network_merge and --network_pre_calc are mutually"),
        ({"network_merge_n_models": 2}, "--network_merge_n_models 2: only 1 networks are given"),
        ({"network_merge_n_models": -1}, "--network_merge_n_models must be 0 or more"),
        ({"network_module": ["lycoris.kohya"], "network_args": ["algo=lohha"]}, 'has no algo "lohha"'),
    ],
)
def test_mistakes(pipelines, files, options, sentence):
    given = {"network_module": ["networks.lora"], "network_weights": [str(files("sd1", "networks.lora"))], **options}
    with pytest.raises(UserError, match=sentence):
        open_networks(NetworkOptions(**given), pipelines("sd1"))


def test_files_for_another_model_are_refused_by_name(pipelines, files):
    path = files("sdxl", "networks.lora")
    with pytest.raises(UserError, match=r"is a LoRA for Stable Diffusion XL; one for Stable Diffusion 1.x or 2.x"):
        open_networks(NetworkOptions(["networks.lora"], [str(path)]), pipelines("sd1"))
    foreign = files("sd1", "networks.oft")
    with pytest.raises(UserError, match="none of its tensors belongs to a module that lycoris.kohya knows"):
        open_networks(NetworkOptions(["lycoris.kohya"], [str(foreign)]), pipelines("sd1"))


def test_modules_of_a_lycoris_file_that_the_model_lacks_are_counted_and_named(
    pipelines, files, networks, tmp_path, caplog
):
    path = files("sd1", "lycoris.kohya", 1, "loha")
    tensors = load_file(path)
    some = next(name.partition(".")[0] for name in tensors if name.startswith("lora_unet_"))
    for name in ("lora_unet_x", "lora_te3_y"):  # no layer, and no part
        own = {key: tensor for key, tensor in tensors.items() if key.startswith(f"{some}.")}
        tensors |= {key.replace(some, name): tensor.clone() for key, tensor in own.items()}
    save_file(tensors, tmp_path / "other.safetensors")
    networks("sd1", [("lycoris.kohya", tmp_path / "other.safetensors")])
    found = [line for line in caplog.messages if "left out" in line]
    assert len(found) == 2 and all(" fit no layer of this model" in line for line in found)
    assert found[0].endswith(": lora_te3_y") and found[1].endswith(": lora_unet_x")


def test_options_without_a_network_are_named(pipelines, caplog):
    caplog.set_level("INFO", logger="library")
    assert not open_networks(NetworkOptions(network_pre_calc=True), pipelines("sd1")).acts_on("unet")
    assert "--network_pre_calc has no effect without --network_module" in caplog.text
