"""Every model family, for tests that hold for each of them."""

from __future__ import annotations

from tests.families.chroma import CHROMA
from tests.families.flux import FLUX
from tests.families.sd15 import SD15
from tests.families.sd21 import SD21
from tests.families.sdxl import SDXL

FAMILIES = (SD15, SD21, SDXL, FLUX, CHROMA)
