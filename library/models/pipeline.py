"""What every model family shares: opened files that load themselves, and the pipeline that works with the parts.

A family says which parts it has, how images and texts are encoded, what its denoiser predicts, and how an image is
requested. Loading, releasing, moving, tokenizers and drawing images stand here once.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from library.console import say
from library.devices import empty_cache, move_module
from library.errors import NotFiniteError, UserError
from library.memory.apply import AppliedPlan, apply_memory_plan
from library.memory.formats import require
from library.memory.plan import MemoryPlan, Sharding
from library.memory.sharding import ShardedBlocks
from library.memory.storage import BlocksStoredAs, Storage, StorageDtype, block_linears
from library.memory.stream_choice import BlockSizes, StreamedBlocks, choose_blocks
from library.memory.streaming import aligned, streamed_tensors
from library.models.attention import AttentionBackend, require_backend
from library.models.fingerprint import fingerprint
from library.models.loading import LoadSpec, Place, TensorSource, load_module, loaded_bytes
from library.models.sampling import (
    ClassifierFree,
    Guidance,
    ModelCall,
    Role,
    Solver,
    Step,
    StepHook,
    Unguided,
    denoise,
)
from library.models.tokenizer_files import Tokenizer, TokenizerKind, load_tokenizer
from library.prompt_options import PromptOptions
from library.randomness import draw_noise, seeded_generator

if TYPE_CHECKING:
    from PIL import Image

Conditioning = Mapping[str, Tensor]
"""A denoiser's conditioning beside latents and timesteps, batch first, by name."""
BYTES_OF_WIDEST_VALUE = 8
"""No weight takes more: as float64, or in a storage format with its scales."""
Text = tuple[str, Role]
Request = TypeVar("Request", bound="ImageRequest")
Module = TypeVar("Module", covariant=True)


# ---- files ----------------------------------------------------------------------------------------------------------


class OpenedPart(ABC, Generic[Module]):
    """A part of a model whose file has been opened by its headers: recognised, its sizes known, ready to be loaded."""

    source: TensorSource
    """Its tensors under the names of the module."""

    @abstractmethod
    def meta_module(self) -> Module:
        """The module on torch's meta device: its structure without its values."""

    def kept_in_float32(self, compute: torch.dtype | None) -> tuple[str, ...]:
        """Endings of the names of tensors that stay float32 where the others are in ``compute``."""
        return ()

    def load(self, spec: LoadSpec) -> Module:
        """The module, frozen and in eval mode. Raises UserError where tensors don't fit."""
        module: Any = self.meta_module()
        load_module(module, self.source, spec, self.kept_in_float32(spec.compute))
        return module


class OpenedTextEncoder(OpenedPart[Module]):
    """A text encoder's."""

    sizes: dict[str, Any]
    """Arguments of its configuration in transformers."""

    @property
    def vocabulary(self) -> int:
        """Rows of the token embedding."""
        return self.sizes["vocab_size"]

    @property
    def hidden_size(self) -> int:
        """Width of the states."""
        return self.sizes["hidden_size"]


# ---- requests -------------------------------------------------------------------------------------------------------


CONDITIONINGS: dict[Role, str] = {
    "positive": "conditioning",
    "negative": "negative_conditioning",
    "unconditional": "unconditional_conditioning",
}
"""The fields of a request that hold the conditioning for each role."""


@dataclass
class ImageRequest:
    """What is drawn. Prompts may be given as conditioning, as ``encode_prompts`` gives it for one prompt."""

    prompt: str = ""
    negative_prompt: str | None = None
    """Used with classifier-free guidance; None is an empty one."""
    width: int = 512
    """Pixels; a family rounds them to what it can draw."""
    height: int = 512
    seed: int | None = None
    """None: another image each time."""
    sample_steps: int = 20
    scale: float = 1.0
    """Classifier-free guidance; 1 turns it off."""
    conditioning: Conditioning | None = None
    sub_conditionings: Sequence[Conditioning] = ()
    """Of the parts of a prompt that are for regions of the image."""
    negative_conditioning: Conditioning | None = None
    unconditional_conditioning: Conditioning | None = None
    """Of the empty prompt, for guidance that has it beside the negative one."""
    start_latents: Tensor | None = None
    """Latents [C, h, w], as the denoiser takes them, that are drawn over; None: the image begins as noise."""
    first_step: int = 0
    """The step whose amount of noise ``start_latents`` get."""

    def common(self) -> tuple[Any, ...]:
        """What requests share that may be generated together: all but texts, seed and start latents."""
        own = ("prompt", "negative_prompt", "seed", "start_latents", "sub_conditionings", *CONDITIONINGS.values())
        values = [value for name, value in vars(self).items() if name not in own]
        return tuple(value if isinstance(value, Hashable) else id(value) for value in values)


def from_image(image: Image.Image, width: int, height: int) -> Tensor:
    """Pixels [3, height, width], float32 in -1..1, of a PIL image stretched to that size."""
    import numpy
    from PIL import Image

    image = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1) / 127.5 - 1.0


def to_image(pixels: Tensor) -> Image.Image:
    """A PIL image of ``pixels`` [3, H, W] in -1..1, rounded to the nearest of 256 levels."""
    from PIL import Image

    return Image.fromarray((127.5 * (pixels.permute(1, 2, 0) + 1)).round().to(torch.uint8).cpu().numpy())


# ---- pipelines ------------------------------------------------------------------------------------------------------


class Pipeline(ABC, Generic[Request]):
    """A model's opened files, its loaded parts, and everything that is done with them.

    ``dtype`` is every part's dtype unless ``dtypes`` names another for it (None there: as in the file). A subclass
    opens its files by their headers, sets ``files``, ``encoders`` and ``parts``, and raises UserError, before anything
    is loaded, when they aren't what they should be. Methods that take ``encoders`` mean all of them by None.
    """

    all_parts: ClassVar[tuple[Any, ...]]
    """Every part that a model of this family may have."""
    denoiser: ClassVar[str]
    """The part that predicts noise or velocity."""
    request_class: ClassVar[type[Any]]
    """The ``ImageRequest`` of this family."""
    block_list_names: ClassVar[tuple[str, ...]]
    """The denoiser's lists of blocks, in the order in which they run (for ``block_lists``)."""
    streams_first: ClassVar[Literal["small", "large"]] = "small"
    """Which blocks are streamed first: of equal work, small ones are faster to copy."""

    read_on_host: ClassVar[frozenset[str]] = frozenset()
    """Conditioning whose values the program reads: kept in system RAM, or it would wait for the device at each step."""

    files: Any
    """The opened files: an attribute for each part, None for one that isn't there."""
    encoders: tuple[Any, ...]
    """The text encoders among the parts."""
    parts: tuple[Any, ...]
    """The parts that are there."""

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device | str,
        dtypes: Mapping[Any, StorageDtype | None] | None,
        attention_backend: AttentionBackend,
        tokenizer_cache_dir: Path | str | None,
    ):
        require_backend(attention_backend)
        self.dtype = dtype
        self.device = torch.device(device)
        self.dtypes: dict[str, StorageDtype | None] = {part: dtype for part in self.all_parts}
        self.dtypes.update(dtypes or {})
        self.attention_backend = attention_backend
        self.tokenizer_cache_dir = tokenizer_cache_dir
        self.places: dict[str, Place] = {}
        """Where the tensors of a part are wanted, by part; of one that isn't named, on ``device``."""
        self.mapped: dict[str, Collection[str]] = {}
        """The tensors that lie on their mapped file until ``shard``, by part."""
        self.plans: dict[str, MemoryPlan] = {}
        """What is done to the blocks of the denoiser and of text encoders when they are loaded, by part."""
        self.streamed: dict[str, StreamedBlocks] = {}
        """The blocks that are streamed according to ``plans``, by part."""
        self.sharded: dict[str, ShardedBlocks] = {}
        """The blocks that are spread over processes according to ``plans``, by part."""
        self.applied: dict[str, AppliedPlan] = {}
        """The plans that are in force, by loaded part."""
        self.modules: dict[str, nn.Module] = {}
        """The loaded parts; a trainer may put a wrapped module in the place of the original."""
        self.tokenizers: dict[str, Tokenizer] = {}
        self.sound: set[str] = set()
        """Parts whose files were read and hold neither NaN nor infinity."""
        self.on_host: Collection[str] = ()
        """Parts that work on the CPU, whatever ``device`` is."""
        self.kept: Collection[str] = ()
        """Parts that ``release`` leaves where they are."""
        self.empties_cache = True
        """Whether the device gets back what its allocator holds when a part goes; otherwise the next part takes it."""

    # Parts

    def opened(self, part: str) -> Any:
        """A part's opened file. Raises KeyError for one that this pipeline was opened without."""
        opened = getattr(self.files, part, None)
        if opened is None:
            raise KeyError(f"the pipeline was opened without its {part}")
        return opened

    def meta_module(self, part: str) -> Any:
        """A part's module on torch's meta device: its structure without its values."""
        return self.opened(part).meta_module()

    def device_of(self, part: str) -> torch.device:
        """Where a part works."""
        return torch.device("cpu") if part in self.on_host else self.device

    def load(self, part: str) -> Any:
        """Load a part, or give the loaded one."""
        if part not in self.modules:
            host: Place = lambda name: "cpu"  # noqa: E731
            place = host if part in self.on_host else self.places.get(part, lambda name: self.device)
            module = self.opened(part).load(LoadSpec.of(self.dtypes[part], place, self.mapped.get(part, ())))
            self.prepare(part, module)
            self.modules[part] = module
            if part in (self.denoiser, *self.encoders):
                plan = self.plans.get(part, MemoryPlan())
                self.applied[part] = apply_memory_plan(self.blocks_of(part, module), plan, self.device)
        return self.modules[part]

    def prepare(self, part: str, module: Any) -> None:
        """Make a part that has just been loaded ready for work."""

    def load_transformer(self) -> Any:
        """Load the denoiser, whatever this family calls it, or give the loaded one."""
        return self.load(self.denoiser)

    def load_autoencoder(self) -> Any:
        """Load the autoencoder, or give the loaded one."""
        return self.load("autoencoder")

    def load_text_encoders(self, encoders: Collection[str] | None = None) -> list[Any]:
        """Load text encoders with their tokenizers, or give the loaded ones."""
        encoders = self.encoders if encoders is None else encoders
        self.load_tokenizers(encoders)
        return [self.load(encoder) for encoder in encoders]

    @abstractmethod
    def tokenizer_kind(self, encoder: str) -> TokenizerKind:
        """Which tokenizer a text encoder takes."""

    def load_tokenizers(self, encoders: Collection[str] | None = None) -> None:
        """Find the tokenizers. Raises UserError when there is none or one is too large for its encoder."""
        for encoder in self.encoders if encoders is None else encoders:
            self.tokenizer(encoder)

    def tokenizer(self, encoder: str) -> Tokenizer:
        """A text encoder's tokenizer. Raises UserError when there is none or it is too large for its encoder."""
        if encoder not in self.tokenizers:
            opened = self.opened(encoder)
            self.tokenizers[encoder] = load_tokenizer(
                self.tokenizer_kind(encoder), opened.source.checkpoint, opened.vocabulary, self.tokenizer_cache_dir
            )
        return self.tokenizers[encoder]

    def release(self, part: str) -> None:
        """Forget a part (or all ``text_encoders``) and free its memory; it can be loaded again.

        Those that are ``kept`` stay.
        """
        names = [name for name in self._named(part) if name not in self.kept]
        for name in names:
            if name in self.applied:
                self.applied.pop(name).remove()
        if any([self.modules.pop(name, None) is not None for name in names]):
            empty_cache(
                self.device if self.empties_cache else torch.device("cpu")
            )  # objects that nobody reaches at least

    def move(self, part: str, device: torch.device | str) -> None:
        """Move a loaded part (or all ``text_encoders``), e.g. to the CPU while others work on the accelerator.

        Streamed blocks stay where they are; the memory that they need on the device is given back.
        """
        for name in self._named(part):
            if name in self.modules:
                if name in self.applied:
                    self.applied[name].rest()
                move_module(self.modules[name], "cpu" if name in self.on_host else device)
        if torch.device(device) != self.device:
            empty_cache(self.device)

    def require_storable(self) -> None:
        """Raises UserError when a part is to be stored in a format that the device or the part's file does not allow.

        Fp8 cannot be made of a file that holds another kind of 8-bit floats.
        """
        for part in self.parts:
            storage = self._storage(part)
            if storage is not None:
                require(storage, self.device)
            if storage is not None and storage.kind == "fp8":
                self.opened(part).source.require_e4m3fn()

    def require_finite_files(self, *parts: str) -> None:
        """Read the files of these parts, each once, because something that they gave is not finite.

        Raises UserError that names the first tensor that holds NaN or infinity.
        """
        unread = [part for part in parts if part not in self.sound]
        if unread:
            say(f"looking for NaN in the files of {', '.join(unread)}")
        for part in unread:
            self.opened(part).source.require_finite()
            self.sound.add(part)

    @contextlib.contextmanager
    def blaming_files(self, *parts: str) -> Iterator[None]:
        """Around work of these parts: a NotFiniteError that a file causes names that file instead."""
        try:
            yield
        except NotFiniteError:
            self.require_finite_files(*parts)
            raise

    def identity(self, *parts: str) -> str:
        """Text that changes with the files of these parts, and with the storage format of their weights."""
        files = fingerprint(file for part in parts for file in self.opened(part).source.checkpoint.files)
        storages = [(part, self._storage(part)) for part in parts]
        return " ".join([files, *(f"{part} {storage.label}" for part, storage in storages if storage is not None)])

    def _storage(self, part: str) -> Storage | None:
        """The format of the weights of a part's blocks; None where they are tensors."""
        dtype = self.dtypes[part]
        return dtype.storage if isinstance(dtype, BlocksStoredAs) else None

    def _named(self, part: str) -> tuple[str, ...]:
        return self.encoders if part == "text_encoders" else (part,)

    def block_lists(self, denoiser: Any = None) -> dict[str, Sequence[nn.Module]]:
        """The blocks of the loaded denoiser, or of another, list by list in the order in which they run.

        They are what memory features attach to. A block gets every tensor that it needs as an argument, so that it can
        be computed again.
        """
        denoiser = self.load(self.denoiser) if denoiser is None else denoiser
        return {name: list(getattr(denoiser, name)) for name in self.block_list_names}

    # Streaming

    def blocks_of(self, part: str, module: Any) -> dict[str, Sequence[nn.Module]]:
        """The blocks of the denoiser or a text encoder, list by list in the order in which they run."""
        return self.block_lists(module) if part == self.denoiser else module.block_lists()

    def block_sizes(self, part: str | None = None) -> dict[str, list[int]]:
        """The bytes of each block of a part that can be streamed, list by list; of the denoiser by default."""
        part = part or self.denoiser
        sizes = self._tensor_bytes(part)
        blocks = self._streamed_names(part)
        return {
            name: [sum(aligned(sizes[tensor]) for tensor in tensors) for tensors in blocks[name]] for name in blocks
        }

    def _streamed_names(self, part: str) -> dict[str, list[list[str]]]:
        """The names of a part's tensors that are streamed with each block, list by list."""
        meta = self.meta_module(part)
        paths = {id(module): path for path, module in meta.named_modules()}
        return {
            name: [[f"{paths[id(owner)]}.{tensor}" for owner, tensor in streamed_tensors(block)] for block in blocks]
            for name, blocks in self.blocks_of(part, meta).items()
        }

    def _tensor_bytes(self, part: str, with_scales: bool = False) -> dict[str, int]:
        """The bytes that each tensor of a part takes once it is loaded, by name."""
        opened, spec = self.opened(part), LoadSpec.of(self.dtypes[part])
        kept = opened.kept_in_float32(spec.compute)
        return loaded_bytes(opened.meta_module(), opened.source, spec, kept, with_scales)

    def part_bytes(self, part: str, spread: bool = False) -> int:
        """The memory of a part's weights once it is loaded; if ``spread``, in one process of those that share it."""
        freed = self.sharded[part].freed if spread and part in self.sharded else 0
        return sum(self._tensor_bytes(part, with_scales=True).values()) - freed

    def most_part_bytes(self, part: str) -> int:
        """A size that ``part_bytes`` never exceeds, from the file's header alone: no dtype or format takes more."""
        source = self.opened(part).source
        return BYTES_OF_WIDEST_VALUE * sum(math.prod(source.shape(name)) for name in source.names())

    def dense_bytes(self, part: str) -> int:
        """The largest weight that a storage format makes dense for a product; 0 where there is no such format."""
        dtype, meta = self.dtypes[part], self.meta_module(part)
        if not isinstance(dtype, BlocksStoredAs):
            return 0
        layers = block_linears(meta, getattr(meta, "kept_dense", ())).values()
        return max((layer.weight.numel() for layer in layers), default=0) * dtype.compute.itemsize

    def most_to_swap(self, sizes: BlockSizes) -> int:
        """The largest number that ``--blocks_to_swap`` may be."""
        return sum(len(blocks) for blocks in sizes.values())

    def swapped_bytes(self, count: int, sizes: BlockSizes) -> int:
        """The memory of the device that ``--blocks_to_swap count`` frees, as it is documented for this family."""
        return sum(sorted((size for blocks in sizes.values() for size in blocks), reverse=True)[:count])

    def swap_blocks(self, count: int, slots: int) -> StreamedBlocks:
        """The blocks that are streamed for ``--blocks_to_swap count``. Raises UserError for too large a number."""
        sizes = self.block_sizes()
        most = self.most_to_swap(sizes)
        if count > most:
            raise UserError(
                f"--blocks_to_swap {count}: this model has {sum(map(len, sizes.values()))} blocks, all of which are "
                f"streamed with {most}."
            )
        return self.blocks_for(count, sizes, slots)

    def blocks_for(self, count: int, sizes: BlockSizes, slots: int) -> StreamedBlocks:
        """The blocks of a denoiser of these sizes that are streamed for a number that it allows."""
        return choose_blocks(sizes, self.swapped_bytes(count, sizes), slots, self.streams_first)

    def every_block(self, part: str, slots: int) -> StreamedBlocks:
        """All blocks of a part, to be streamed."""
        sizes = self.block_sizes(part)
        return choose_blocks(sizes, sum(map(sum, sizes.values())), slots, "small")

    def stream(self, part: str, blocks: StreamedBlocks, pinned: bool) -> None:
        """Let these blocks be streamed once the part is loaded."""
        self.streamed[part] = blocks
        self.plans[part] = replace(self.plans.get(part, MemoryPlan()), streaming=blocks.streaming(pinned))
        names = self._streamed_names(part)
        streamed = {tensor for name, index in blocks.places for tensor in names[name][index]}
        self.places[part] = lambda tensor: "cpu" if tensor in streamed else self.device

    # Sharding

    def spread(self, sharding: Sharding) -> None:
        """Let the denoiser's blocks be spread over processes.

        They are shared out by ``shard``: out of the file itself, of which all processes see the same memory, or out of
        system RAM where the file's tensors had to be changed.
        """
        part = self.denoiser
        meta, sizes = self.meta_module(part), self._tensor_bytes(part)
        paths = {id(module): path for path, module in meta.named_modules()}
        blocks = [
            [f"{paths[id(block)]}.{name}" for name, tensor in block.named_parameters() if tensor.dim() > 0]
            for blocks in self.block_lists(meta).values()
            for block in blocks
        ]
        self.sharded[part] = ShardedBlocks(
            tuple(sum(sizes[name] for name in names) for names in blocks), sharding.processes
        )
        self.plans[part] = replace(self.plans.get(part, MemoryPlan()), sharding=sharding)
        spread = {name for names in blocks for name in names}
        self.places[part] = lambda tensor: "cpu" if tensor in spread else self.device
        self.mapped[part] = spread

    def shard(self) -> None:
        """Share out the loaded denoiser's blocks if its plan says so; every process must come here."""
        denoiser = self.load(self.denoiser)
        self.applied[self.denoiser].shard(denoiser, self.block_lists(), self.device)

    # Images and texts

    @property
    @abstractmethod
    def latent_stride(self) -> int:
        """Pixels per latent position."""

    @property
    @abstractmethod
    def latent_channels(self) -> int:
        """Channels of a latent."""

    @abstractmethod
    def encode_images(self, pixels: Tensor, generators: Sequence[torch.Generator] | None) -> Tensor:
        """Latents [B, C, h, w], float32 as caches keep them, of ``pixels`` [B, 3, H, W] in -1..1.

        Item i is drawn from its posterior by the CPU generator ``generators[i]``; None takes the posterior's mean.
        """

    @abstractmethod
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W], float32 in -1..1, of ``latents`` [B, C, h, w] as the denoiser gives them."""

    @abstractmethod
    def encode_prompts(
        self,
        prompts: Sequence[str],
        encoders: Collection[Any] | None = None,
        role: Role = "positive",
        trained: Collection[Any] = (),
    ) -> dict[str, Tensor]:
        """The conditioning of ``prompts``, batch first, from the named ``encoders``.

        ``role`` is what the prompts are for, in families that encode positive and negative ones differently. Gradients
        flow through the ``trained`` encoders.
        """

    def encode_texts(
        self, texts: Collection[Text], encoders: Collection[Any] | None = None, batch_size: int = 1
    ) -> dict[Text, dict[str, Tensor]]:
        """The conditioning [1, ...] of each of ``texts``, every one made once.

        ``batch_size`` texts go through the encoders together: faster, but the last bits of a matrix product may depend
        on its size, so only 1 gives exactly what ``encode_prompts`` gives for one prompt.
        """
        made: dict[Text, dict[str, Tensor]] = {}
        for role in dict.fromkeys(role for _, role in texts):
            prompts = list(dict.fromkeys(text for text, its_role in texts if its_role == role))
            for start in range(0, len(prompts), batch_size):
                batch = prompts[start : start + batch_size]
                encoded = self.encode_prompts(batch, encoders, role)
                for row, prompt in enumerate(batch):
                    made[prompt, role] = {name: values[row : row + 1] for name, values in encoded.items()}
        return made

    @abstractmethod
    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """What the denoiser predicts [B, C, h, w] for noisy ``latents`` at ``timesteps`` [B]."""

    # Drawing

    def request(self, prompt: PromptOptions, **fields: Any) -> Request:
        """A request for ``prompt``, with this family's defaults for what it leaves open; ``fields`` come on top."""
        known = self.request_class.__dataclass_fields__
        given = {name: value for name, value in vars(prompt).items() if value is not None and name in known}
        return self.request_class(**{**given, **fields})

    @abstractmethod
    def image_size(self, request: Request) -> tuple[int, int]:
        """Height and width, in pixels, of the image that a request gets."""

    @abstractmethod
    def solver(self, request: Request) -> Solver:
        """The way from noise to image. Raises UserError for an unknown sampler."""

    def first_step(self, request: Request, solver: Any) -> int:
        """The step that drawing over ``start_latents`` begins with."""
        return request.first_step

    def guidance(self, request: Request) -> Guidance:
        """How the predictions for positive and negative prompts become one."""
        return Unguided() if request.scale == 1 else ClassifierFree(request.scale)

    def generator(self, request: Request) -> torch.Generator:
        """The one generator of an image, from its seed: so an image depends on nothing before or beside it."""
        return seeded_generator(request.seed)

    def start_noise(self, request: Request, generators: Sequence[torch.Generator]) -> Tensor:
        """Noise [B, C, h, w] of unit variance on the device, an item from each generator."""
        height, width = (side // self.latent_stride for side in self.image_size(request))
        return draw_noise((self.latent_channels, height, width), generators).to(self.device)

    def request_conditioning(self, request: Request, role: Role) -> Conditioning:
        """The conditioning [1, ...] of a request's prompt of that role, encoded unless it is given."""
        given = getattr(request, CONDITIONINGS[role])
        texts = {"positive": request.prompt, "negative": request.negative_prompt or "", "unconditional": ""}
        return given or self.encode_prompts([texts[role]], role=role)

    def predictor(self, requests: Sequence[Request]) -> Callable[..., Tensor]:
        """``predict`` with what else these requests say; it is given their batch once or several times over.

        Beside latents, timesteps and conditioning it takes what hooks add to a call (``ModelCall.extras``).
        """
        return self.predict

    @torch.no_grad()
    def generate_latents(self, *requests: Request, hooks: Sequence[StepHook] = (), progress: bool = False) -> Tensor:
        """The latents [B, C, h, w], float32, of an image for each request; ``progress`` shows a progress bar.

        Requests generated together differ in prompts, seeds and start latents only; the first one's other values
        count. Raises UserError for an unknown sampler.
        """
        first = requests[0]
        guidance, solver = self.guidance(first), self.solver(first)
        texts = {role: [self.request_conditioning(request, role) for request in requests] for role in guidance.roles}
        predictor = self.predictor(requests)
        joined: dict[tuple[Role, ...], Conditioning] = {}

        def run(call: ModelCall) -> Tensor:
            return predictor(call.latents, call.timesteps, call.conditioning, **call.extras)

        for hook in hooks:
            run = partial(hook.around, run)

        def predict(latents: Tensor, step: Step, roles: Sequence[Role]) -> Sequence[Tensor]:
            key = tuple(roles)
            if key not in joined:
                joined[key] = joined_conditioning([text for role in roles for text in texts[role]])
            inputs = torch.cat([latents] * len(key))
            return run(ModelCall(inputs, step.timestep.expand(len(inputs)), joined[key], key, step)).chunk(len(key))

        generators = [self.generator(request) for request in requests]
        start = [request.start_latents for request in requests if request.start_latents is not None]
        with contextlib.ExitStack() as attached:
            for hook in hooks:
                attached.enter_context(hook.attached(self.load(self.denoiser)))
            return denoise(
                predict,
                solver,
                self.start_noise(first, generators),
                guidance,
                generators=generators,
                hooks=hooks,
                image=torch.stack(start).to(self.device) if start else None,
                first=self.first_step(first, solver) if start else 0,
                progress=progress,
            )

    @torch.no_grad()
    def generate(self, request: Request, progress: bool = False) -> Image.Image:
        """One image. Raises UserError for an unknown sampler."""
        return self.generate_batch([request], progress=progress)[0]

    @torch.no_grad()
    def generate_batch(
        self, requests: Sequence[Request], hooks: Sequence[StepHook] = (), progress: bool = False
    ) -> list[Image.Image]:
        """An image for each of ``requests``, generated together; see ``generate_latents``."""
        latents = self.generate_latents(*requests, hooks=hooks, progress=progress)
        return [to_image(pixels) for pixels in self.decode_latents(latents)]


def joined_conditioning(conditionings: Sequence[Conditioning]) -> Conditioning:
    """Several conditionings as one batch; tensors go to the device of the last one, shorter texts end in zeros."""
    last = conditionings[-1]
    return {name: _concatenated([one[name].to(value) for one in conditionings]) for name, value in last.items()}


def _concatenated(texts: Sequence[Tensor]) -> Tensor:
    """Tensors [B, L, ...] of different lengths L as one."""
    if len({text.shape[1:] for text in texts}) == 1:
        return torch.cat(list(texts))
    longest = max(text.shape[1] for text in texts)
    joined = texts[0].new_zeros((sum(map(len, texts)), longest, *texts[0].shape[2:]))
    for rows, text in zip(joined.split([*map(len, texts)]), texts):
        rows[:, : text.shape[1]] = text
    return joined
