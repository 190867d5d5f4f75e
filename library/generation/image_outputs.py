"""The files of ``gen_img.py``: names, the text in them, and pages that show all images of a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ImageOutputOptions:
    """Files"""

    outdir: str = "outputs"
    """Folder for the images."""
    sequential_file_name: bool = False
    """Number the images: im_000001.png and so on."""
    use_original_file_name: bool = False
    """Name each image after the start image that it was made from."""
    skip_existing: bool = False
    """Draw only the images whose files are not there yet, so that an interrupted run goes on; without another naming,
    it chooses --sequential_file_name."""
    grid: bool = False
    """Also write one image with all images of the run."""
    report: bool = False
    """Also write an HTML page with all images of the run, their prompts and settings."""
    no_metadata: bool = False
    """Write no text into the images."""
