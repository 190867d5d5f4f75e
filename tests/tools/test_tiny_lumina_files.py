"""The tiny pretrained Lumina Image 2.0 that ships with the project: its files, how they are made, and what it draws."""

from __future__ import annotations

from pathlib import Path

import torch

from library.models.lumina.pipeline import LuminaRequest
from tools.build_tiny_flux import open_pipeline
from tools.tiny_lumina_training import LuminaPainter, export_lumina, open_lumina, train_lumina

ASSETS = Path(__file__).resolve().parents[2] / "assets"
FLUX = ASSETS / "tiny_flux"


def test_every_stage_runs_and_its_files_open(tmp_path: Path) -> None:
    train_lumina(tmp_path, open_pipeline(FLUX), 2, images=8)
    made = torch.load(tmp_path / "lumina.pt", weights_only=True)["modules"]["painter"]
    begun = LuminaPainter().state_dict()
    for name in ("gemma.layers.0.self_attn.q_proj.weight", "transformer.layers.0.adaLN_modulation.1.weight"):
        assert not torch.equal(made[name], begun[name])
    export_lumina(tmp_path, tmp_path / "out")
    request = LuminaRequest("a red circle", width=64, height=64, seed=1, sample_steps=1)
    assert open_lumina(tmp_path / "out", FLUX).generate(request).size == (64, 64)
