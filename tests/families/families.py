"""The tiny model of every model that a row of ``library/families.py`` names."""

from __future__ import annotations

from library import families
from tests.families.family import Family

TINY: dict[str, Family] = {
    model: families.load(f"tests.families.{model}:{model.upper()}")
    for row in families.FAMILIES
    for model in row.model_names
}
"""By the models' short names."""
FAMILIES = tuple(TINY.values())
