"""A run of any length takes the memory, files and threads of its beginning; a dataset of any size is read in step."""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

import flux_train_network
from benchmarks.many_images import link_images, write_datasets
from benchmarks.measuring import present_memory
from library.data.build import build_dataset_groups
from library.data.options import DatasetOptions
from library.training.training_loop import TrainingLoop

MIB = 1 << 20


@dataclass(frozen=True)
class Usage:
    """What the process has after some step."""

    step: int
    memory: int
    files: int
    threads: int
    objects: int
    """That Python's garbage collector knows."""


def test_memory_files_and_threads_do_not_grow(train, prompts, thorough, tmp_path, dataset_toml, monkeypatch):
    """With samples, validation, savings, states, curves and the report; between two savings the run is as at first."""
    steps, every = (2000, 20) if thorough else (32, 4)
    process, used = psutil.Process(), []

    class WatchedLoop(TrainingLoop):
        def after_step(self, interruption: object) -> None:
            super().after_step(interruption)
            if self.progress.step % every == every - 1:
                gc.collect()
                memory = process.memory_info().rss
                counts = (process.num_fds(), process.num_threads(), len(gc.get_objects()))
                used.append(Usage(self.progress.step, memory, *counts))

    monkeypatch.setattr(flux_train_network.FluxNetworkTrainer, "loop_class", WatchedLoop)
    prompts.write_text("a circle --w 64 --h 64 --s 1 --d 3", encoding="utf-8")
    small = dataset_toml(resolution=64, min_bucket_reso=32, max_bucket_reso=96, batch_size=1)
    arguments = ["--dataset_config", small, "--sample_prompts", prompts, "--sample_every_n_steps", every]
    arguments += ["--validate_every_n_steps", every, "--validation_split", 0.2, "--max_validation_steps", 1]
    arguments += ["--save_every_n_steps", every, "--save_last_n_steps", every, "--save_state"]
    arguments += ["--logging_dir", tmp_path / "log", "--report", "--max_data_loader_n_workers", 2]
    assert train(*arguments, "--max_train_steps", steps) == 0
    assert len(used) == steps // every
    table = [
        f"step {u.step}: {u.memory / MIB:.1f} MiB, {u.files} files, {u.threads} threads, {u.objects} objects"
        for u in used
    ]
    print("\n".join(table[:: max(1, len(table) // 12)]))
    settled = used[len(used) // 3 :]
    early, late = settled[: len(settled) // 2], settled[len(settled) // 2 :]
    for count in ("files", "threads"):
        assert max(getattr(u, count) for u in late) <= max(getattr(u, count) for u in early), table
    grown = statistics.median(u.memory for u in late) - statistics.median(u.memory for u in early)
    assert grown < 8 * MIB, table
    # Names of files and points of curves are noted at each saving; of a step nothing stays.
    objects = statistics.median(u.objects for u in late) - statistics.median(u.objects for u in early)
    assert objects < 20 * len(settled), table
    kept = [path for path in Path(tmp_path / "out").iterdir() if path.name.startswith("lora-step")]
    assert len(kept) <= 4, kept


def test_an_image_of_a_large_dataset_takes_no_more_than_one_of_a_small_one(tmp_path):
    """In a folder and in a metadata file; ``benchmarks/many_images.py`` measures 100,000 of them."""
    many, few = (read_images(tmp_path / str(count), count) for count in (1800, 300))
    for kind in ("folder", "metadata"):
        (seconds, memory), (few_seconds, _) = many[kind], few[kind]
        assert seconds / 1800 < 3 * few_seconds / 300 + 0.0002, (many, few)  # with every image compared, six times
        assert memory / 1800 < 8000, (many, few)


def read_images(folder: Path, count: int) -> dict[str, tuple[float, int]]:
    """Seconds of processor time and bytes that reading so many images takes, by kind of dataset."""
    folder.mkdir()
    found = {}
    for kind, dataset in write_datasets(folder, link_images(folder / "images", count)).items():
        gc.collect()
        memory, start = present_memory(), time.process_time()
        group, _ = build_dataset_groups(DatasetOptions(dataset_config=str(dataset)), bucket_divisor=16)
        found[kind] = (time.process_time() - start, present_memory() - memory)
        assert len(group.datasets[0].items) == count
    return found
