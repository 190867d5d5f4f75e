"""A network module that somebody else wrote plugs in, and its mistakes are not hidden."""

from __future__ import annotations

import sys
import textwrap

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from library.errors import UserError
from library.training.network.contract import (
    NetworkOptions,
    create_network,
    import_network_module,
    load_first_weights,
    merge_base_weights,
    optimizer_groups,
    restore_training_state,
    training_state,
)
from library.training.network.saving import save_network

SOURCE = '''
import torch
from safetensors.torch import load_file, save_file


def create_network(multiplier, network_dim, network_alpha, vae, text_encoder, unet, neuron_dropout=None, **kwargs):
    encoders = text_encoder if isinstance(text_encoder, list) else [text_encoder]
    found = [len(list(encoder.modules())) for encoder in encoders]
    return Network(network_dim or 2, found, kwargs)


class Network(torch.nn.Module):
    """One scaled matrix; its file holds the product of both, as LyCORIS' files do."""

    def __init__(self, dim, encoders, given):
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.ones(dim, 3))
        self.scalar = torch.nn.Parameter(torch.tensor(1.0))
        self.register_buffer("limit", torch.tensor(2.0), persistent=False)
        self.encoders, self.given = encoders, given

    def state_dict(self, *arguments, **keywords):
        return {"lora_unet_x.product": self.matrix * self.scalar}

    def load_state_dict(self, state, strict=True):
        self.matrix.data.copy_(state["lora_unet_x.product"])
        self.scalar.data.fill_(1.0)
        return torch.nn.modules.module._IncompatibleKeys([], [])

    def apply_to(self, text_encoder, unet, apply_text_encoder=True, apply_unet=True):
        pass

    def set_multiplier(self, multiplier):
        self.multiplier = multiplier

    def prepare_grad_etc(self, text_encoder, unet):
        self.requires_grad_(True)

    def on_epoch_start(self, text_encoder, unet):
        pass

    def get_trainable_params(self):
        return self.parameters()

    def prepare_optimizer_params(self, PARAMETERS):
        BODY

    def save_weights(self, file, dtype, metadata):
        metadata["sshs_model_hash"] = "0xabc"
        save_file({key: tensor.contiguous() for key, tensor in self.state_dict().items()}, file, metadata)

    def load_weights(self, file):
        state = load_file(file)
        if set(state) != set(self.state_dict()):
            return {"missing keys": list(self.state_dict()), "unexpected keys": list(state)}
        if state["lora_unet_x.product"].shape != self.matrix.shape:
            raise RuntimeError("Error(s) in loading state_dict: size mismatch for matrix")
        return self.load_state_dict(state)
'''
GROUPS = 'return [{"params": self.parameters(), "lr": unet_lr or 1.0}]'


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write the module ``their_network`` with other parts; returns its options."""

    def module(
        parameters: str = "text_encoder_lr, unet_lr, default_lr",
        body: str = GROUPS,
        without: str = "",
        **options: object,
    ) -> NetworkOptions:
        source = SOURCE.replace("PARAMETERS", parameters).replace("BODY", textwrap.indent(body, " " * 8).strip())
        source = source.replace(f"def {without}(", "def something_else(") if without else source
        (tmp_path / "their_network.py").write_text(source, encoding="utf-8")
        monkeypatch.syspath_prepend(str(tmp_path))
        sys.modules.pop("their_network", None)
        return NetworkOptions(network_module="their_network", **options)

    yield module
    sys.modules.pop("their_network", None)


def created(options: NetworkOptions, encoders=(None,)):
    return create_network(import_network_module(options), options, None, list(encoders), nn.Linear(1, 1))


def test_an_encoder_that_is_not_trained_is_an_empty_module(write):
    network = created(write(), [None, nn.Sequential(nn.Linear(1, 1)), None])
    assert network.encoders == [1, 2, 1]
    assert create_network(import_network_module(write()), write(), None, nn.Linear(1, 1), None).encoders == [1]


def test_arguments_reach_it_untouched(write):
    options = write(network_args=["anything=[1, 2] = x", "flag=False"], network_dropout=0.25)
    assert created(options).given == {"anything": "[1, 2] = x", "flag": "False", "dropout": 0.25}


@pytest.mark.parametrize("parameters", ["text_encoder_lr, unet_lr, default_lr", "text_encoder_lr, unet_lr"])
def test_learning_rates_are_given_as_far_as_it_takes_them(write, parameters):
    groups, names = optimizer_groups(created(write(parameters)), [1e-3], 2e-3, 3e-3)
    assert names is None and groups[0]["lr"] == 2e-3


@pytest.mark.parametrize("parameters", ["text_encoder_lr, unet_lr, default_lr", "text_encoder_lr, unet_lr"])
def test_an_error_inside_it_is_not_hidden(write, parameters):
    network = created(write(parameters, "raise TypeError('inside')"))
    with pytest.raises(TypeError, match="^inside$"):
        optimizer_groups(network, None, None, 1e-3)


def test_no_group_at_all_is_a_mistake_in_the_learning_rates(write):
    with pytest.raises(UserError, match="nothing to train"):
        optimizer_groups(created(write(body="return []")), None, 0.0, 0.0)


def test_what_it_lacks_is_named_before_training(write):
    with pytest.raises(UserError, match="lacks set_multiplier, which training calls"):
        created(write(without="set_multiplier"))
    with pytest.raises(UserError, match="lacks prepare_optimizer_params, which"):
        created(write(without="prepare_optimizer_params"))
    with pytest.raises(UserError, match="--scale_weight_norms does not work with their_network"):
        created(write(scale_weight_norms=1.0))
    for options in ({"dim_from_weights": True}, {"base_weights": ["x.safetensors"]}):
        with pytest.raises(UserError, match=r"no create_network_from_weights, which --(dim_from|base)_weights needs"):
            import_network_module(write(**options))


def test_a_state_holds_parameters_and_buffers_as_they_are(write):
    one, two = created(write()), created(write())
    with torch.no_grad():
        one.matrix.mul_(3.0)
        one.scalar.fill_(0.1)
        one.limit.fill_(7.0)
    restore_training_state(two, training_state(one))
    assert torch.equal(one.matrix, two.matrix) and torch.equal(one.scalar, two.scalar) and two.limit == 7.0


def test_its_file_gets_the_hashes_that_front_ends_look_for(write, tmp_path):
    from library.checkpoints import load_tensors
    from library.safetensors_io import model_hash

    given = {"ss_output_name": "a"}
    save_network(created(write()), tmp_path / "a.safetensors", None, given)
    tensors, metadata = load_tensors(tmp_path / "a.safetensors")
    assert torch.equal(tensors["lora_unet_x.product"], torch.ones(2, 3))
    assert metadata["sshs_model_hash"] == model_hash(tmp_path / "a.safetensors") and metadata["sshs_legacy_hash"]
    assert metadata["ss_output_name"] == "a" and given == {"ss_output_name": "a"}


def test_first_weights_that_do_not_fit_are_refused(write, tmp_path):
    file = str(tmp_path / "file.safetensors")
    network = created(write())
    save_file({"lora_unet_x.product": torch.full((2, 3), 5.0)}, file)
    assert load_first_weights(network, file) == "all tensors fit"
    assert network.matrix[0, 0] == 5.0
    save_file({"lora_unet_x.product": torch.ones(4, 3)}, file)
    with pytest.raises(UserError, match="other sizes than this network"):
        load_first_weights(network, file)
    save_file({"other": torch.ones(1)}, file)
    with pytest.raises(UserError, match="nothing in .* fits this network"):
        load_first_weights(network, file)


def test_base_weights_are_merged_by_its_own_method(write, tmp_path):
    options = write(base_weights=["a.safetensors", "b.safetensors"], base_weights_multiplier=[0.5])
    module = tmp_path / "their_network.py"
    module.write_text(
        module.read_text(encoding="utf-8")
        + textwrap.dedent("""
        calls = []

        def create_network_from_weights(multiplier, file, vae, text_encoder, unet, weights_sd=None,
                                        for_inference=False, **kwargs):
            class Merged:
                def merge_to(self, text_encoder, unet, weights, dtype, device):
                    calls.append((multiplier, file, for_inference, weights, str(dtype), str(device)))

            return Merged(), {"x": 1}
        """),
        encoding="utf-8",
    )
    imported = import_network_module(options)
    merge_base_weights(imported, options, None, None, nn.Linear(1, 1))
    assert imported.calls == [
        (0.5, "a.safetensors", True, {"x": 1}, "torch.float32", "cpu"),
        (1.0, "b.safetensors", True, {"x": 1}, "torch.float32", "cpu"),
    ]
