"""How close latent caching comes to what the encoder alone can do.

    python benchmarks/caching.py --images 64 --resolution 512 --source 1024
    python benchmarks/caching.py --device cuda --dtype bfloat16 --channels 128 --resolution 1024 --source 1536 \\
        --images 200

Caching reads, resizes, encodes and writes; everything but the encoding should happen beside it, in threads. Images of
``--source`` x ``--source`` pixels are cached to disk by the code that training uses. Against that stands the same
encoder over the same batches, which lie in memory already. Both take turns over ``--rounds``, medians count. Shown too:
what decoding alone takes in one thread, and the rate if nothing overlapped. With ``--channels 128`` the autoencoder has
the size of the real one.

An encoder on the CPU shares the cores with the threads that decode, so decoding costs time wherever no core is free.
``--encoder_ms`` takes, in place of the autoencoder, one that needs that much time and no processor for each image, as
an encoder on a GPU does; with images much larger than the images (``--source``) that is the hard case.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measuring import Measure, machine, parser, report
from benchmarks.tiny_run import make_images, write_dataset

if TYPE_CHECKING:
    import torch

    from library.data.cache import LatentCache
    from library.data.dataset import DatasetGroup
    from library.models.autoencoder_kl import AutoencoderKL

    Encode = Callable[[torch.Tensor, list[torch.Generator]], torch.Tensor]

LIMIT = 0.9


def random_autoencoder(channels: int, device: str, dtype: str) -> AutoencoderKL:
    """An autoencoder with the real one's shape, ``channels`` wide at its finest level (the real one: 128)."""
    import torch

    from library.models.autoencoder_kl import AutoencoderConfig, AutoencoderKL
    from tools.make_tiny_models import fill_randomly

    groups = min(channels, 32)
    model = AutoencoderKL(AutoencoderConfig(channels, (1, 2, 4, 4), res_blocks=2, latent_channels=16, groups=groups))
    fill_randomly(model, 0, "benchmark autoencoder")
    return model.requires_grad_(False).to(torch.device(device), getattr(torch, dtype))


def encoder(options: argparse.Namespace) -> Encode:
    """The encode function of the autoencoder, or of its stand-in that only takes time."""
    import torch

    if options.encoder_ms:

        def wait_instead(pixels: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
            time.sleep(len(pixels) * options.encoder_ms / 1000)
            return pixels.new_zeros(len(pixels), 16, pixels.shape[2] // 8, pixels.shape[3] // 8)

        return wait_instead
    model = random_autoencoder(options.channels, options.device, options.dtype)

    @torch.no_grad()
    def encode(pixels: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
        return model.encode(pixels.to(options.device), generators)

    return encode


def open_group(dataset: Path) -> DatasetGroup:
    """The dataset, as a training with cached latents opens it."""
    from library.data.build import build_dataset_groups
    from library.data.options import CacheOptions, DatasetOptions

    return build_dataset_groups(
        DatasetOptions(dataset_config=str(dataset)), bucket_divisor=32, cache=CacheOptions(cache_latents_to_disk=True)
    )[0]


def new_cache(dataset: Path, files: Path) -> LatentCache:
    """A cache without any entries."""
    from library.data.cache import LatentCache, LatentFormat

    for file in files.glob("*.npz"):
        file.unlink()
    return LatentCache(open_group(dataset), LatentFormat(suffix="_flux.npz"), to_disk=True, identity="benchmark")


class Timed:
    """An encode function that notes how long its calls take and, if requested, its batches."""

    def __init__(self, encode: Encode, wait: Callable[[], None]) -> None:
        self.encode, self.wait = encode, wait
        self.seconds = 0.0
        self.batches: list[tuple[Any, list[Any]]] | None = None

    def __call__(self, pixels: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
        if self.batches is not None:
            self.batches.append((pixels.clone(), [generator.clone_state() for generator in generators]))
        start = time.perf_counter()
        latents = self.encode(pixels, generators)
        self.wait()
        self.seconds += time.perf_counter() - start
        return latents


def seconds_of(work: Callable[[], object]) -> float:
    """Seconds on the clock of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """A round's seconds, as medians: ``alone``, ``cached``, ``encoding`` within; ``decode`` of all images, one thread.

    ``ratio`` is the median of alone / cached in the same round, so that slow changes of the machine cancel out.
    """
    import torch

    torch.set_num_threads(options.threads)
    encode = encoder(options)
    files = make_images(folder / "images", options.images, options.source or options.resolution)
    dataset = write_dataset(folder / "dataset.toml", files, options.resolution, options.batch_size)

    def wait() -> None:
        if options.device.startswith("cuda"):
            torch.cuda.synchronize()

    fill = {"batch_size": options.batch_size, "workers": options.workers}
    first = Timed(encode, wait)
    first.batches = []
    new_cache(dataset, files).fill(first, **fill)
    batches = first.batches

    def encode_all() -> None:
        for pixels, generators in batches:
            encode(pixels, generators)
        wait()

    alone, cached, encoding = [], [], []
    for _ in range(options.rounds):
        alone.append(seconds_of(encode_all))
        timed = Timed(encode, lambda: None)
        cached.append(seconds_of(functools.partial(new_cache(dataset, files).fill, timed, **fill)))
        encoding.append(timed.seconds)
    decode = seconds_of(lambda: read_all(open_group(dataset)))
    return {
        "ratio": statistics.median(one / other for one, other in zip(alone, cached)),
        "alone": statistics.median(alone),
        "cached": statistics.median(cached),
        "encoding": statistics.median(encoding),
        "decode": decode,
    }


def read_all(group: DatasetGroup) -> None:
    """Read and resize every image in this thread."""
    for dataset in group.datasets:
        for item in dataset.used_items:
            dataset.read_pixels(item, dataset.fixed_geometry(item))


def main() -> None:
    """Measure and report."""
    arguments = parser(__doc__)
    arguments.add_argument("--images", type=int, default=32)
    arguments.add_argument("--resolution", type=int, default=256, help="side of the cached images in pixels")
    arguments.add_argument("--source", type=int, help="side of the image files in pixels; unset: the resolution")
    arguments.add_argument("--batch_size", type=int, default=4, help="images in one call of the encoder")
    arguments.add_argument("--channels", type=int, default=32, help="width of the autoencoder; the real one has 128")
    arguments.add_argument("--encoder_ms", type=float, help="milliseconds per image of an encoder that only waits")
    arguments.add_argument("--workers", type=int, default=8, help="most threads that decode")
    arguments.add_argument("--threads", type=int, default=1, help="threads of the encoder on a CPU")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--dtype", default="float32", help="dtype of the autoencoder")
    options = arguments.parse_args()
    quiet = contextlib.redirect_stderr(io.StringIO())  # the progress bars
    with quiet, tempfile.TemporaryDirectory() as name:
        seconds = measure(options, Path(name))
    images = options.images
    one_by_one = seconds["alone"] + seconds["decode"]
    report(
        "caching",
        [
            Measure("caching / encoder alone", seconds["ratio"], "x", LIMIT, "higher"),
            Measure("encoder alone", images / seconds["alone"], "images/s"),
            Measure("caching", images / seconds["cached"], "images/s"),
            Measure("caching if nothing overlapped (without writing)", images / one_by_one, "images/s"),
            Measure("share of caching's time inside the encoder", seconds["encoding"] / seconds["cached"], "x"),
            Measure("decoding one image, one thread", 1000 * seconds["decode"] / images, "ms"),
        ],
        options,
        machine(options.device, options.threads),
    )


if __name__ == "__main__":
    main()
