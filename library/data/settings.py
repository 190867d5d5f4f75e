"""Datasets and subsets with all their values decided."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from library.data.captions import CaptionRules

Kind = Literal["dreambooth", "fine_tuning", "conditioning"]


AUGMENTATIONS = ("color_aug", "rotate_aug", "brightness_aug", "contrast_aug", "random_crop")


@dataclass(frozen=True)
class SubsetSettings:
    """One folder (or metadata file) of images, its options decided."""

    place: str
    """Where the user described it, for messages."""
    image_dir: str | None = None
    """As the user wrote it."""
    metadata_file: str | None = None
    conditioning_data_dir: str | None = None
    is_reg: bool = False
    class_tokens: str | None = None
    num_repeats: int = 1
    caption_extension: str = ".caption"
    captions: CaptionRules = field(default_factory=CaptionRules)
    cache_info: bool = False
    color_aug: bool = False
    rotate_aug: float = 0.0
    """Degrees."""
    brightness_aug: float = 0.0
    contrast_aug: float = 0.0
    flip_aug: bool = False
    random_crop: bool = False
    face_crop_aug_range: tuple[float, float] | None = None
    alpha_mask: bool = False
    resize_interpolation: str | None = None
    validation_split: float = 0.0
    validation_seed: int | None = None
    custom_attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def identity(self) -> tuple[str | None, ...]:
        """What makes two subsets of a dataset the same one."""
        if self.metadata_file:
            return (self.metadata_file,)
        return (self.image_dir, self.conditioning_data_dir)

    @property
    def augmentations(self) -> list[str]:
        """The options that are on and give an image other pixels each time, so that its latents cannot be cached."""
        return [name for name in AUGMENTATIONS if getattr(self, name)]

    @property
    def folder_name(self) -> str:
        """The base name under which LoRA files list this subset."""
        return Path(self.metadata_file or self.image_dir or "").name


@dataclass(frozen=True)
class DatasetSettings:
    """Subsets that share resolution, batch size and buckets."""

    place: str
    kind: Kind
    subsets: tuple[SubsetSettings, ...]
    resolution: tuple[int, int]
    """(width, height) in pixels."""
    batch_size: int = 1
    enable_bucket: bool = False
    min_bucket_reso: int = 256
    max_bucket_reso: int = 1024
    bucket_reso_steps: int = 64
    bucket_no_upscale: bool = False
    network_multiplier: float = 1.0
    resize_interpolation: str | None = None
    prior_loss_weight: float = 1.0
