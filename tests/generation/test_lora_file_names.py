"""``--lora_weights``: a path, or a path and a strength."""

from __future__ import annotations

import pytest

from library.errors import UserError
from library.generation.lora_files import LoraFileOptions, parse_lora_files


@pytest.mark.parametrize(
    ("given", "name", "multiplier"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors;0.5", "a.safetensors", 0.5),
        ("b;1.safetensors", "b;1.safetensors", 1.0),
        ("b;1.safetensors;0.8", "b;1.safetensors", 0.8),
        ("c;2", "c;2", 1.0),
    ],
)
def test_a_semicolon_may_belong_to_the_files_name(tmp_path, given, name, multiplier):
    (tmp_path / name).touch()
    (file,) = parse_lora_files(LoraFileOptions([str(tmp_path / given)]))
    assert (file.path.name, file.multiplier) == (name, multiplier)


@pytest.mark.parametrize("strength", ["nan", "inf", "strong", ""])
def test_a_strength_that_is_no_number_is_named(tmp_path, strength):
    (tmp_path / "a").touch()
    with pytest.raises(UserError, match="a multiplier must be a number"):
        parse_lora_files(LoraFileOptions([f"{tmp_path / 'a'};{strength}"]))
