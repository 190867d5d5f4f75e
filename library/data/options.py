"""The command line of the data room: what a dataset is, and what is cached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class DatasetOptions:
    """Dataset"""

    dataset_config: str | None = None
    """Dataset description (.toml or .json); the folder options below are then ignored."""

    train_data_dir: str | None = None
    """Folder whose sub-folders are named N_class: their images are trained N times per epoch."""

    reg_data_dir: str | None = None
    """Folder of regularisation images, with sub-folders named N_class."""

    in_json: str | None = None
    """Metadata file (.json or .jsonl) with a caption for each image of train_data_dir."""

    dataset_repeats: int = 1
    """How often each image of in_json is trained per epoch."""

    dataset_class: str | None = None
    """A dataset class of your own, as package.module.ClassName."""

    train_batch_size: int = 1
    """Images per batch and process."""

    resolution: str | None = None
    """Training resolution: "512" or "width,height"."""

    enable_bucket: bool = False
    """Train in several aspect ratios, each image in the bucket that fits it best."""

    min_bucket_reso: int = 256
    """Shortest bucket side in pixels."""

    max_bucket_reso: int = 1024
    """Longest bucket side in pixels."""

    bucket_reso_steps: int = 64
    """Bucket sides are multiples of this many pixels."""

    bucket_no_upscale: bool = False
    """Make buckets from the image sizes and never enlarge an image."""

    resize_interpolation: Literal["lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area"] | None = None
    """Interpolation when images are resized (unset: bicubic); shrinking is always antialiased, except with nearest."""

    caption_extension: str = ".caption"
    """Extension of the caption files."""

    caption_extention: str | None = None
    """The same as caption_extension, in its old spelling."""

    caption_separator: str = ","
    """What separates the tags of a caption."""

    shuffle_caption: bool = False
    """Shuffle the tags of a caption each time it is used."""

    keep_tokens: int = 0
    """Leave the first N tags of a caption in place."""

    keep_tokens_separator: str = ""
    """Text that ends the tags which stay in place (and, a second time, begins those at the end)."""

    secondary_separator: str | None = None
    """A separator inside a tag, for tags that stay together when shuffled; becomes caption_separator at the end."""

    enable_wildcard: bool = False
    """Choose one of {a|b|c}, and one line of a caption with several lines, each time."""

    trigger_word: str | None = None
    """Word put before each caption that lacks it, but those of regularisation images; [trigger] in captions and sample
    prompts stands for it."""

    caption_prefix: str | None = None
    """Text put before each caption."""

    caption_suffix: str | None = None
    """Text put after each caption."""

    caption_dropout_rate: float = 0.0
    """Share of captions that are replaced by the empty text."""

    caption_dropout_every_n_epochs: int = 0
    """Train every Nth epoch without captions."""

    caption_tag_dropout_rate: float = 0.0
    """Share of the tags that are left out."""

    token_warmup_min: int = 1
    """Number of tags to begin with when the number of tags grows during training."""

    token_warmup_step: float = 0.0
    """Step (or, below 1, share of all steps) at which all tags are used."""

    color_aug: bool = False
    """Vary hue and gamma a little."""

    rotate_aug: float = 0.0
    """Turn each image by up to this many degrees (at most 45), enlarged as much as it takes to fill its frame."""

    brightness_aug: float = 0.0
    """Make each image brighter or darker by up to this share (below 1)."""

    contrast_aug: float = 0.0
    """Change the contrast of each image by up to this share (below 1)."""

    flip_aug: bool = False
    """Mirror half of the images left to right."""

    face_crop_aug_range: str | None = None
    """Crop around the face named in the file name, at a size in this range ("2.0,4.0")."""

    random_crop: bool = False
    """Crop at a random place instead of the centre."""

    alpha_mask: bool = False
    """Use the transparency of the images as a mask for the loss."""

    masked_loss: bool = False
    """Weight the loss with the masks in the conditioning_data_dir of each subset, or with alpha_mask."""

    conditioning_data_dir: str | None = None
    """Has no effect here: give conditioning_data_dir in a subset of the dataset configuration."""

    prior_loss_weight: float = 1.0
    """Weight of regularisation images in the loss."""

    cache_info: bool = False
    """Keep image sizes and captions in metadata_cache.json, for a quicker start."""

    max_data_loader_n_workers: int = 8
    """Threads that prepare batches ahead of training (at most one per CPU; 0: none)."""

    persistent_data_loader_workers: bool = False
    """Keep the loader's workers between epochs (they always are)."""

    debug_dataset: bool = False
    """Show what would be trained, and do not train."""


@dataclass
class CacheOptions:
    """Latent cache"""

    cache_latents: bool = False
    """Encode each image once and keep the latents in memory."""

    cache_latents_to_disk: bool = False
    """Keep the latents in files beside the images (implies cache_latents)."""

    vae_batch_size: int = 1
    """Images that are encoded together when latents are cached."""

    skip_cache_check: bool = False
    """Trust every cache file that exists."""


@dataclass
class TextCacheOptions:
    """Text encoder cache"""

    cache_text_encoder_outputs: bool = False
    """Encode each caption once and keep the result in memory."""

    cache_text_encoder_outputs_to_disk: bool = False
    """Keep the encoded captions in files beside the images (implies cache_text_encoder_outputs)."""

    text_encoder_batch_size: int | None = None
    """Captions that are encoded together when they are cached (unset: the dataset's batch size)."""
