"""``--debug_dataset``: what would be trained, printed and shown, without training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from library.console import say
from library.data.batch import Batch
from library.data.contact_sheet import to_image, write_contact_sheet
from library.data.dataset import DatasetGroup
from library.errors import UserError
from library.image_window import close_windows, show_image

ESCAPE = 27
KEY_HELP = "keys in the window: any for the next image, s for the next batch, e for the next epoch, Esc to end"


def show_dataset(
    group: DatasetGroup,
    *,
    seed: int,
    max_train_steps: int,
    page: Path | None = None,
    print_line: Callable[[str], None] = print,
) -> None:
    """Write the contact sheet ``page``, print every batch of epoch after epoch, and show its images until Esc.

    Where no window can be opened, one epoch is printed. Raises UserError when the page cannot be written.
    """
    if page is not None:
        try:
            count = write_contact_sheet(group, page, seed=seed, max_train_steps=max_train_steps)
        except OSError as error:
            raise UserError(f"{page}: cannot be written ({error.strerror}).") from None
        say(f"wrote {page}: {count} images as they are trained")
    windows = True
    epoch = 0
    while windows or epoch == 0:
        epoch += 1
        print_line(f"epoch {epoch}; {KEY_HELP}" if windows else f"epoch {epoch}")
        for number, plan in enumerate(group.plan(epoch, seed)):
            step = (epoch - 1) * group.batches_per_epoch() + number
            batch = group.load(plan, epoch=epoch, step=step, max_train_steps=max_train_steps, seed=seed)
            for row in range(len(batch)):
                print_line(describe_row(batch, row, number))
            key = _show(batch) if windows else "s"
            windows = windows and key is not None
            if key == "escape":
                return
            if key == "e":
                break


def describe_row(batch: Batch, row: int, number: int) -> str:
    """One line about one sample of a batch."""
    height, width = batch.target_sizes[row]
    original = batch.original_sizes[row]
    parts = [
        f"batch {number}",
        batch.image_keys[row],
        f"{original[1]}x{original[0]} -> {width}x{height}",
        f"crop from {batch.crop_top_lefts[row]}",
        f"weight {batch.loss_weights[row]:g}",
    ]
    if batch.flipped[row]:
        parts.append("mirrored")
    return ", ".join([*parts, f'caption "{batch.captions[row]}"'])


def _show(batch: Batch) -> str | None:
    """Show the images; the key that was pressed ("s", "e", "escape"), or None when there is no window."""
    if batch.images is None:
        return "s"
    for image in batch.images:
        key = show_image(to_image(image.numpy()), "dataset")
        if key is None:
            return None
        if key == ESCAPE:
            close_windows()
            return "escape"
        if key in (ord("s"), ord("e")):
            return chr(key)
    return "s"
