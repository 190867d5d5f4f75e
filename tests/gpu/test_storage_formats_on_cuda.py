"""On a CUDA device: storage formats give what they give on the CPU, and products in fp8 keep their bound."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from library.memory import formats
from library.memory.fp8_compute import FIRST_CAPABILITY
from tests.memory.test_fp8_compute import IN, OUT, bound, layer_of, normal
from tests.memory.test_storage_formats import FORMATS
from tests.running import train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
multiplies_in_fp8 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < FIRST_CAPABILITY,
    reason="needs a GPU that multiplies in fp8",
)


@pytest.mark.parametrize("storage", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("deviation", [0.02, 1e-4])
def test_a_weight_becomes_the_same_numbers_as_on_the_cpu(storage, dtype, deviation):
    """Also in float16, which would lose digits of the scales of small weights."""
    weight = normal(96, 256, purpose="weight") * deviation
    here, there = (formats.quantise(one, storage) for one in (weight, weight.cuda()))
    ours, reference = there.to(dtype).cpu(), here.to(dtype)
    assert (ours != reference).float().mean() < 1e-3  # a quotient between two codes may be rounded either way
    torch.testing.assert_close(ours, reference, rtol=0.3, atol=0.2 * deviation)


@multiplies_in_fp8
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_products_in_fp8_keep_their_bound(granularity, dtype, rows):
    layer = layer_of(granularity, dtype).cuda()
    x = normal(2, rows, IN, purpose="x").to("cuda", dtype).requires_grad_()
    grad = normal(2, rows, OUT, purpose="grad").to("cuda", dtype)
    y = layer(x)
    y.backward(grad)
    weight, bias = layer.dense(torch.float64), layer.bias.double()
    exact = x.detach().double().view(-1, IN) @ weight.t() + bias
    limit = bound(x.detach().double().view(-1, IN), weight.t(), exact)
    assert ((y.detach().double().view(-1, OUT) - exact).abs() <= 1.1 * limit).all()
    back = grad.double().view(-1, OUT) @ weight
    assert (x.grad.double().view(-1, IN) - back).norm() < 0.035 * back.norm()


@pytest.mark.parametrize(
    "options",
    [
        "bf16 --fp8_scaled",
        "fp16 --fp8_scaled",
        "bf16 --base_format int8",
        "bf16 --base_format nf4",
        "fp16 --base_format nf4",
        pytest.param("bf16 --fp8_scaled --fp8_fast", marks=multiplies_in_fp8),
        pytest.param("fp16 --fp8_base --fp8_fast", marks=multiplies_in_fp8),
    ],
)
def test_each_format_trains(flux_command, dataset_toml, tmp_path, options):
    given = [*flux_command, "--dataset_config", dataset_toml(), "--output_dir", tmp_path, "--max_train_steps", 10]
    train("flux", *given, "--mixed_precision", *options.split(), "--gradient_checkpointing")
    tensors = load_file(tmp_path / "last.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert any(tensor.any() for key, tensor in tensors.items() if key.endswith("lora_up.weight"))
