"""Extended Textual Inversion: words that stand for other vectors in each layer of the U-Net that reads the text.

Voynov et al., "P+: Extended Textual Conditioning in Text-to-Image Generation", arXiv 2303.09522. A file holds vectors
for each of the 16 layers of Stable Diffusion 1.x and 2.x, by the layer's name, as kohya-ss/sd-scripts writes it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from library.errors import UserError
from library.generation.features import Batch, Feature
from library.generation.textual_inversion import add_word, read_embedding
from library.models.sampling import ModelCall, RunModel, StepHook

if TYPE_CHECKING:
    from library.models.stable_diffusion.pipeline import StableDiffusionPipeline

OPTION = "--XTI_embeddings"
LAYERS = {
    **{f"IN{3 * level + n + 1:02d}": f"down_blocks.{level}.attentions.{n}" for level in range(3) for n in range(2)},
    "MID": "mid_block.attentions.0",
    **{f"OUT{3 * level + n:02d}": f"up_blocks.{level}.attentions.{n}" for level in range(1, 4) for n in range(3)},
}
"""The U-Net's layers that read the text, by their names in files."""
ORDINARY = "MID"
"""The layer whose vectors stand for a word wherever there are no layers, as in a ControlNet."""


def open_xti(paths: Sequence[str], pipeline: StableDiffusionPipeline) -> Xti | None:
    """Let texts of images have the words that the files ``paths`` are named after; None where there are no files.

    Raises UserError, naming the file, for one that is no such embedding for this model, and for a name that is taken.
    """
    if not paths:
        return None
    blocks = {name.partition(".transformer_blocks.")[0] for name in pipeline.opened("unet").source.names()}
    if pipeline.variant == "sdxl" or not blocks.issuperset(LAYERS.values()):
        raise UserError(f"{OPTION}: there are such embeddings for the U-Net of Stable Diffusion 1.x and 2.x only.")
    for name in paths:
        path = Path(name)
        tensors = read_embedding(path, OPTION)
        if tensors.keys() != LAYERS.keys():
            raise UserError(
                f"{OPTION}: {path} is not an Extended Textual Inversion: it does not hold vectors for the layers "
                f"{', '.join(LAYERS)} and nothing else."
            )
        shapes = {tuple(tensor.shape) for tensor in tensors.values()}
        if len(shapes) > 1:
            raise UserError(f"{OPTION}: {path} holds vectors of different numbers or lengths for its layers.")
        add_word(path, {"text_encoder": tensors[ORDINARY]}, pipeline, OPTION)
        for layer, vectors in tensors.items():
            pipeline.layer_words.setdefault(layer, {})[path.stem] = vectors
    return Xti()


class Xti(Feature):
    """Gives each layer of the U-Net its own text, which the pipeline has encoded beside the ordinary one."""

    option = OPTION

    def hook(self, batch: Batch) -> StepHook:
        """The same for every batch: the texts come with the model's calls."""
        return LayerTexts()


class LayerTexts(StepHook):
    """While the U-Net runs, each of ``LAYERS`` attends to the conditioning ``hidden_state.LAYER``."""

    def __init__(self) -> None:
        self.call: ModelCall | None = None

    @contextlib.contextmanager
    def attached(self, denoiser: Any) -> Iterator[None]:
        """Each layer is given its text in the place of the ordinary one."""

        def give_text(layer: str) -> Any:
            def give(module: Any, arguments: Any, keywords: dict[str, Any]) -> Any:
                ordinary: Tensor = keywords["encoder_hidden_states"]
                assert self.call is not None
                own = self.call.conditioning[f"hidden_state.{layer}"]
                return arguments, {**keywords, "encoder_hidden_states": own.to(ordinary)}

            return give

        handles = [
            denoiser.get_submodule(path).register_forward_pre_hook(give_text(layer), with_kwargs=True)
            for layer, path in LAYERS.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def around(self, run: RunModel, call: ModelCall) -> Tensor:
        """The texts of this call are those of its conditioning."""
        before, self.call = self.call, call
        try:
            return run(call)
        finally:
            self.call = before
