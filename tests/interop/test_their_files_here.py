"""LoRA files of other programs, with and without DoRA's scales: every layer acts here as its program means it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library.errors import UserError
from tests.interop.layouts import LAYOUTS
from tests.interop.workbench import Workbench
from tools.make_lora_formats import HERE, THEIRS

LAST = {(family, layout): program for program in LAYOUTS for family, layout in LAYOUTS[program].items()}
"""A layout of a family -> the last of the programs that share it."""
FILES = [pytest.param(program, family, id=f"{program}-{family}") for (family, _), program in LAST.items()]


def file_of(bench: Workbench, program: str, path: Path):
    tensors, wanted = LAYOUTS[program][bench.family].file(bench)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return path, wanted


@pytest.mark.parametrize(("program", "family"), FILES)
def test_every_layer_acts_as_it_is_meant(bench, program, family, tmp_path, caplog):
    models = bench(family)
    path, wanted = file_of(models, program, tmp_path / "theirs.safetensors")
    network, _ = models.lora.create_network_from_weights(
        1.0, path, None, models.encoders, models.unet, for_inference=True
    )
    assert "fit no layer" not in caplog.text
    found = models.merged(lambda: network.merge_to(None, None))
    for name, weight in wanted.items():
        scale = (weight - models.weights[name]).abs().max().clamp(min=1e-3)
        assert (found[name] - weight).abs().max() <= 1e-4 * scale, name
    changed = [name for name, weight in wanted.items() if not torch.equal(weight, models.weights[name])]
    assert len(changed) == len(network.loras) > 5


def test_the_table_of_the_page_is_what_is_tested(bench):
    assert list(THEIRS.rows) == list(LAYOUTS)
    for program, (key, *cells) in THEIRS.rows.items():
        said = "applied" if "DoRA" in program else "yes"
        assert dict(zip(HERE, cells)) == {family: said if family in LAYOUTS[program] else "-" for family in HERE}
        assert key.strip("`") in LAYOUTS[program]["flux"].file(bench("flux"))[0]


@pytest.mark.parametrize(("program", "family"), [file for file in FILES if "DoRA" in file.id])
def test_dora_is_applied_but_not_trained(bench, program, family, tmp_path):
    models = bench(family)
    path, _ = file_of(models, program, tmp_path / "theirs.safetensors")
    with pytest.raises(UserError, match=r"theirs.safetensors: the file holds DoRA scales .* algo=lora dora_wd=True"):
        models.lora.create_network_from_weights(1.0, path, None, models.encoders, models.unet)
    network = models.lora.create_network(1.0, 3, 6.0, None, models.encoders, models.unet)
    with pytest.raises(UserError, match="the file holds DoRA scales"):
        network.load_weights(path)
