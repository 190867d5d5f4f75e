"""Regions of an image in the U-Net: each has its own text in cross-attention, and networks that act there only.

Attention Couple: a position attends to the text of each region, and gets their mean, weighted by the regions' masks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from library.models.attention import AttentionBackend, attention
from library.models.sampling import ModelCall

Change = Callable[[Tensor, Tensor], Tensor]
"""``change(x, y)``: what a network adds to the output ``y`` of a layer for the input ``x``."""
SMALLEST_WEIGHT = 1e-4
"""Below this sum of masks, a position gets less than a mean of texts; where all masks are 0 it gets none."""


class Regions:
    """The regions of one batch of images: ``contexts``, a text [B, tokens, width] for each, and their masks.

    ``masks_at(height, width)`` gives the masks [regions, height, width] in 0..1 for a size of latents or features.
    """

    def __init__(self, contexts: Sequence[Tensor], masks_at: Callable[[int, int], Tensor], backend: AttentionBackend):
        self.contexts = list(contexts)
        self.masks_at = masks_at
        self.backend: AttentionBackend = backend
        self.call: ModelCall | None = None
        """What the U-Net is called with now."""
        self.size = (0, 0)
        """Of the features in the transformer that is running."""
        self.made: dict[tuple[int, int], Tensor] = {}

    def masks(self, size: tuple[int, int]) -> Tensor:
        """The masks at that size, made once."""
        if size not in self.made:
            self.made[size] = self.masks_at(*size)
        return self.made[size]

    @contextlib.contextmanager
    def attached(self, unet: Any, changes: Mapping[nn.Module, Sequence[Change | None]]) -> Iterator[None]:
        """While it is active, ``unet`` (diffusers') works by regions.

        ``changes``: what networks would add to its layers, one for each region in their order, None for nothing.
        """
        cross = [module for path, module in unet.named_modules() if path.endswith(".attn2")]
        own = {layer for attn in cross for layer in (attn.to_k, attn.to_v, attn.to_out[0])}
        with contextlib.ExitStack() as stack:
            for module in unet.modules():
                if type(module).__name__ == "Transformer2DModel":
                    hook = module.register_forward_pre_hook(self._remember_size, with_kwargs=True)
                    stack.callback(hook.remove)
            for attn in cross:
                stack.callback(setattr, attn, "processor", attn.processor)
                attn.processor = CoupledAttention(self, changes)
            for layer, added in changes.items():
                if layer not in own:
                    stack.enter_context(self._masked(layer, added))
            yield

    def _remember_size(self, module: nn.Module, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> None:
        states = arguments[0] if arguments else keywords["hidden_states"]
        self.size = (states.shape[2], states.shape[3])

    @contextlib.contextmanager
    def _masked(self, layer: Any, changes: Sequence[Change | None]) -> Iterator[None]:
        """Let each of ``changes`` act on the layer's output in its region."""
        replaced, forward = vars(layer).get("forward"), layer.forward

        def masked(x: Tensor) -> Tensor:
            y = forward(x)
            shares = self._shares(y)
            return y + sum(share * change(x, y) for share, change in zip(shares, changes) if change is not None)

        layer.forward = masked
        try:
            yield
        finally:
            if replaced is None:
                del layer.forward
            else:
                layer.forward = replaced

    def _shares(self, features: Tensor) -> Sequence[Any]:
        """The masks in a shape that is multiplied with ``features``; where those have no places, equal shares."""
        if features.dim() == 4:
            return [mask.to(features.dtype) for mask in self.masks((features.shape[2], features.shape[3]))]
        if features.dim() == 3 and features.shape[1] == self.size[0] * self.size[1]:
            return [mask.flatten()[:, None].to(features.dtype) for mask in self.masks(self.size)]
        return [1 / len(self.contexts)] * len(self.contexts)


class CoupledAttention:
    """The processor of a cross-attention in which the rows of positive prompts attend to the texts of the regions."""

    def __init__(self, regions: Regions, changes: Mapping[nn.Module, Sequence[Change | None]]):
        self.regions = regions
        self.changes = changes

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        """[rows, positions, channels] to the same; other rows attend to ``encoder_hidden_states``."""
        call = self.regions.call
        assert call is not None
        queries = attn.to_q(hidden_states).chunk(len(call.roles))
        texts = encoder_hidden_states.chunk(len(call.roles))
        outputs = []
        for role, query, text in zip(call.roles, queries, texts):
            if role == "positive":
                outputs.append(self._coupled(attn, query))
            else:
                outputs.append(attn.to_out[0](self._attend(attn, query, attn.to_k(text), attn.to_v(text))))
        return torch.cat(outputs)

    def _coupled(self, attn: Any, query: Tensor) -> Tensor:
        """The mean of what each region's text gives, and what the region's network adds to it."""
        masks = self.regions.masks(self.regions.size).flatten(1)[..., None].to(query.dtype)
        total = masks.sum(0).clamp(min=SMALLEST_WEIGHT)
        result: Any = 0
        for region, (context, mask) in enumerate(zip(self.regions.contexts, masks)):
            key, value = (self._changed(layer, region, context) for layer in (attn.to_k, attn.to_v))
            attended = self._attend(attn, query, key, value)
            output = attn.to_out[0](attended)
            result = result + mask / total * output
            change = self._change(attn.to_out[0], region)
            if change is not None:
                result = result + mask * change(attended, output)
        return result

    def _changed(self, layer: Any, region: int, x: Tensor) -> Tensor:
        """The layer's output with what the region's network adds to it."""
        y, change = layer(x), self._change(layer, region)
        return y if change is None else y + change(x, y)

    def _change(self, layer: nn.Module, region: int) -> Change | None:
        changes = self.changes.get(layer, ())
        return changes[region] if region < len(changes) else None

    def _attend(self, attn: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads = [tensor.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for tensor in (query, key, value)]
        return attention(heads[0], heads[1], heads[2], backend=self.regions.backend)
