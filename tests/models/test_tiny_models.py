"""The builder of tiny models writes files that hold what it says, the same ones every time."""

from __future__ import annotations

import sys

import pytest

from library.models.flux.checkpoint import open_transformer
from tools import make_tiny_models


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_the_same_seed_gives_the_same_files(tmp_path, layout):
    for name, seed in (("first", 1), ("second", 1), ("third", 2)):
        make_tiny_models.make_tiny_flux(tmp_path / name, layout=layout, seed=seed)
    written = [path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*") if path.is_file()]
    assert len(written) >= 8
    contents = [[(tmp_path / name / path).read_bytes() for path in written] for name in ("first", "second", "third")]
    assert contents[0] == contents[1] != contents[2]


def test_the_command_line_prints_the_paths(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["make_tiny_models.py", str(tmp_path), "--variant", "schnell", "--layout", "comfyui"]
    )
    make_tiny_models.main()
    printed = capsys.readouterr().out.split()
    assert len(printed) == 4
    opened = open_transformer(printed[0])
    assert opened.variant == "schnell" and all(
        key.startswith("model.diffusion_model.") for key in opened.source.checkpoint
    )
