"""The most memory that loading a checkpoint takes, against the size of the loaded model.

    python benchmarks/load_memory.py --gigabytes 2
    python benchmarks/load_memory.py --layout diffusers --dtypes bfloat16 float32
    python benchmarks/load_memory.py --checkpoint flux1-dev.safetensors --dtypes bfloat16

Writes a FLUX.1 transformer with random bfloat16 weights into a temporary folder (``--folder`` says where; as much disk
as the checkpoint, and for the Diffusers layout about twice as much memory to make it), loads it in a fresh process
through the code that training uses, and removes it. Counted is what the process held at most, pages of the mapped file
included, less what it held after its imports, over the bytes of the loaded weights.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measuring import Measure, parser, peak_memory, present_memory, report, run_measured

if TYPE_CHECKING:
    from library.models.flux.transformer import FluxConfig

LIMIT = 1.15
SHARDS = 3


def config_of_size(parameters: float) -> FluxConfig:
    """A FLUX.1 transformer with at least that many parameters, in blocks half as wide as the real ones."""
    import torch

    from library.models.flux.transformer import FluxConfig, FluxTransformer, rope_axes

    singles = 1
    while True:
        config = FluxConfig(
            hidden_size=1536, num_heads=12, depth=3, depth_single=singles, mlp_hidden=6144, axes_dims=rope_axes(128)
        )
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in FluxTransformer(config).parameters())
        if count >= parameters:
            return config
        singles += 1


def write_checkpoint(folder: Path, layout: str, gigabytes: float) -> Path:
    """A random bfloat16 checkpoint: one file in the original layout, or shards with Diffusers' names."""
    import torch

    from library.models.flux.transformer import FluxTransformer
    from library.safetensors_io import save_file
    from tools.other_layouts import diffusers_transformer_state

    config = config_of_size(gigabytes * 1e9 / 2)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in FluxTransformer(config).state_dict().items()}
    random = torch.Generator().manual_seed(0)
    state = {
        name: torch.randint(0, 1 << 14, shape, generator=random, dtype=torch.int16).view(torch.bfloat16)
        for name, shape in shapes.items()
    }
    if layout == "original":
        save_file(state, folder / "flux.safetensors")
        return folder / "flux.safetensors"
    state = diffusers_transformer_state(state, config)
    names = sorted(state)
    for index in range(SHARDS):
        file = folder / f"diffusion_pytorch_model-{index + 1:05d}-of-{SHARDS:05d}.safetensors"
        part = names[index * len(names) // SHARDS : (index + 1) * len(names) // SHARDS]
        save_file({name: state[name] for name in part}, file)
    return folder


def load_here(checkpoint: Path, dtype: str, disable_mmap: bool) -> None:
    """Load in this process and print what it took as JSON."""
    import torch

    from library.models.flux.checkpoint import open_transformer
    from library.models.loading import LoadSpec

    torch.ones(8).to(getattr(torch, dtype))
    opened = open_transformer(checkpoint, disable_mmap)
    before, start = present_memory(), time.perf_counter()
    model = opened.load(LoadSpec.of(getattr(torch, dtype)))
    seconds = time.perf_counter() - start
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    print(json.dumps({"size": size, "extra": peak_memory() - before, "before": before, "seconds": seconds}))


def load_elsewhere(checkpoint: Path, dtype: str, options: argparse.Namespace) -> dict[str, float]:
    """What ``load_here`` prints in a fresh process."""
    command = [sys.executable, __file__, "--checkpoint", checkpoint.resolve(), "--dtypes", dtype, "--load_here"]
    if options.disable_mmap:
        command.append("--disable_mmap")
    return json.loads(run_measured(command).output.splitlines()[-1])


def main() -> None:
    """Measure and report."""
    arguments = parser(__doc__)
    arguments.add_argument("--gigabytes", type=float, default=2.0, help="size of the random checkpoint, in 10^9 bytes")
    arguments.add_argument("--layout", choices=["original", "diffusers"], default="original", help="names and files")
    arguments.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], help="dtypes to load to")
    arguments.add_argument("--disable_mmap", action="store_true", help="read the file instead of mapping it")
    arguments.add_argument("--checkpoint", type=Path, help="load this file or folder instead of a random one")
    arguments.add_argument("--folder", type=Path, help="where the random checkpoint is put for a while")
    arguments.add_argument("--load_here", action="store_true", help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.load_here:
        load_here(options.checkpoint, options.dtypes[0], options.disable_mmap)
        return
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        checkpoint = options.checkpoint or write_checkpoint(folder, options.layout, options.gigabytes)
        taken = {dtype: load_elsewhere(checkpoint, dtype, options) for dtype in options.dtypes}
    finally:
        shutil.rmtree(folder)
    measures = []
    for dtype, numbers in taken.items():
        name = f"{checkpoint.name if options.checkpoint else options.layout} to {dtype}"
        measures += [
            Measure(f"{name}: peak / size", numbers["extra"] / numbers["size"], "x", LIMIT),
            Measure(f"{name}: size", numbers["size"] / 1e9, "GB"),
            Measure(f"{name}: time", numbers["seconds"], "s"),
        ]
    report("load_memory", measures, options)


if __name__ == "__main__":
    main()
