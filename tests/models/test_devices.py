"""Names of dtypes."""

from __future__ import annotations

import pytest
import torch

from library.devices import default_device, empty_cache, is_fp8, parse_dtype
from library.errors import UserError


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("bf16", torch.bfloat16),
        ("FP16", torch.float16),
        ("float", torch.float32),
        ("fp32", torch.float32),
        ("fp8", torch.float8_e4m3fn),
        ("fp8_e5m2", torch.float8_e5m2),
        ("torch.bfloat16", torch.bfloat16),
    ],
)
def test_names_in_use_are_understood(name, dtype):
    assert parse_dtype(name) == dtype


def test_an_unknown_name_is_refused_with_the_nearest_one():
    with pytest.raises(UserError, match='^--dtype: "bfloat61".*Did you mean "bfloat16"'):
        parse_dtype("bfloat61", "--dtype")


def test_fp8_is_told_from_other_formats_of_one_byte():
    assert is_fp8(torch.float8_e4m3fn) and not is_fp8(torch.int8) and not is_fp8(torch.float16) and not is_fp8(None)


def test_memory_of_the_default_device_can_be_given_back():
    assert torch.ones(2, device=default_device()).sum() == 2
    empty_cache()
