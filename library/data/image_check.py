"""A quick look at image files before anything heavy: their sizes, whether they are whole, what is worth telling.

Of JPEG, WebP and BMP files only headers and ends are read; the chunks of PNG files have checksums, which are verified;
other formats are opened by Pillow. Pixels are decoded only where a file seems to be damaged, and then Pillow's word
counts.
"""

from __future__ import annotations

import enum
import io
import os
import stat
import struct
import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from library.data.images import NAMES_SHOWN, first_names
from library.data.threads import in_threads
from library.errors import UserError
from library.files import open_without_waiting
from library.image_reading import open_image, reason

if TYPE_CHECKING:
    from PIL import Image

Size = tuple[int, int]

PROBLEMS_SHOWN = 20
HEAD_BYTES = 64
SMALL_BYTES = 1 << 16
"""Smaller files are read at once, which costs less than to look for their parts."""
VERIFIED_BYTES = 1 << 32
"""As many bytes of PNG files are read whole at a start; of those beyond, only headers and ends."""
SCAN_BYTES = 1 << 16
BLOCK_BYTES = 1 << 20
EXIF_BYTES = 1 << 16
ORIENTATION = 0x0112
TURNED = range(2, 9)
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
"""Bits that the channels of each kind of colour may have."""
JPEG_END = b"\xff\xd9"
EXIF_MARK = b"Exif\0\0"


class Trait(enum.Flag):
    """What an image has that changes when it becomes 8-bit RGB."""

    NONE = 0
    CMYK = enum.auto()
    SIXTEEN_BIT = enum.auto()
    TURNED = enum.auto()
    TRANSPARENT = enum.auto()
    PALETTE = enum.auto()
    ANIMATED = enum.auto()
    CUT = enum.auto()
    ALTERED = enum.auto()


MEANINGS = {
    Trait.CMYK: "CMYK: converted to RGB without a colour profile",
    Trait.SIXTEEN_BIT: "16 bits per channel: reduced to 8",
    Trait.TURNED: "an EXIF orientation, which is not applied: trained as stored",
    Trait.TRANSPARENT: "transparency: dropped, unless alpha_mask is on",
    Trait.PALETTE: "a colour palette: converted to RGB",
    Trait.ANIMATED: "animated: only the first frame is used",
    Trait.CUT: "truncated, but every pixel is there",
    Trait.ALTERED: "a wrong checksum: the file was altered or damaged after it was written, but can be decoded",
}


@dataclass(frozen=True, slots=True)
class Look:
    """What the structure of one file says."""

    size: Size
    """(width, height) as stored."""
    traits: Trait
    whole: bool
    """Whether the file reaches as far as its structure says."""


@dataclass(frozen=True)
class ImageCheck:
    """Sizes of all files, and lines about what is converted."""

    sizes: dict[Path, Size]
    notes: list[str]


def check_images(images: Sequence[Path], masks: Sequence[Path] = ()) -> ImageCheck:
    """Look at every file once, in threads.

    Raises one UserError that counts the files which cannot be used and names the first of them.
    """
    paths = list(dict.fromkeys([*images, *masks]))
    told = set(images)
    sizes: dict[Path, Size] = {}
    problems: list[str] = []
    found: dict[Trait, list[Path]] = {trait: [] for trait in MEANINGS}
    counts = dict.fromkeys(MEANINGS, 0)
    broken = 0
    budget = ReadingBudget(VERIFIED_BYTES)
    looks = in_threads(lambda path: look_at(path, budget), paths)
    for path, look in zip(paths, looks):
        if isinstance(look, str):
            broken += 1
            if len(problems) < PROBLEMS_SHOWN:
                problems.append(f"  {path} ({look})")
            continue
        sizes[path] = look.size
        if not look.traits or path not in told:
            continue
        for trait in MEANINGS:
            if trait not in look.traits:
                continue
            counts[trait] += 1
            if len(found[trait]) <= NAMES_SHOWN:
                found[trait].append(path)
    if broken:
        more = [f"  and {broken - len(problems)} more"] if broken > len(problems) else []
        raise UserError("\n".join([f"{broken} of {len(paths)} images cannot be read:", *problems, *more]))
    return ImageCheck(sizes, [_note(trait, counts[trait], found[trait]) for trait in MEANINGS if counts[trait]])


def _note(trait: Trait, count: int, first: list[Path]) -> str:
    names = first_names([path.name for path in first])
    return f"{count} image{'s' if count > 1 else ''} with {MEANINGS[trait]} ({names})"


class ReadingBudget:
    """How many bytes of large files may still be read whole, for all threads together."""

    def __init__(self, byte_count: int) -> None:
        self._left = byte_count
        self._lock = threading.Lock()

    def take(self, byte_count: int) -> bool:
        """Whether there were as many left; they are taken."""
        with self._lock:
            enough = byte_count <= self._left
            self._left -= byte_count if enough else 0
        return enough


def look_at(path: Path, budget: ReadingBudget | None = None) -> Look | str:
    """What one image file is, or what is wrong with it.

    The checksums of large PNG files are verified within ``budget`` (None: always).
    """
    try:
        with open(path, "rb", buffering=0, opener=open_without_waiting) as file:
            data = file.read(SMALL_BYTES)
            small = data is not None and len(data) < SMALL_BYTES
            if not data or not small:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    return "it is not a regular file"
                if not data:
                    return "the file is empty"
            length = len(data) if small else status.st_size
            look = _structure(io.BytesIO(data) if small else file, data[:HEAD_BYTES], length, budget)
        if look is not None and (problem := _too_large(look.size)):
            return problem
        if look is None or not look.whole or Trait.ALTERED in look.traits:
            look = _decoded(path, look)
        return _too_large(look.size) or look
    except (UserError, OSError, SyntaxError, ValueError, struct.error) as error:
        return reason(error).removeprefix(f"{path}: ")


def _structure(file: IO[bytes], head: bytes, length: int, budget: ReadingBudget | None) -> Look | None:
    """What headers and ends say; None for a format or a structure that is not known here."""
    try:
        if head.startswith(b"\x89PNG\r\n\x1a\n"):
            return _png(file, head, length, budget)
        if head.startswith(b"\xff\xd8"):
            return _jpeg(file, length)
        if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
            return _webp(file, head, length)
        if head.startswith(b"BM"):
            return _bmp(head, length)
    except (struct.error, IndexError):
        pass  # the file ends inside its headers
    return None


def _decoded(path: Path, look: Look | None) -> Look:
    """What Pillow says after decoding every pixel. Raises UserError for a file that cannot be decoded or was cut."""
    altered = look is not None and Trait.ALTERED in look.traits
    known = Trait.NONE if look is None else Trait.ALTERED if altered else Trait.CUT
    try:
        with open_image(path) as image:
            if look is not None or not _boxes_fill_file(path):
                image.load()
            return Look(image.size, _traits_of(image) | known, True)
    except Exception as error:  # for damaged bytes each decoder raises what it likes
        if altered:
            raise UserError("a checksum in the file is wrong: it is damaged") from None
        if look is not None:
            raise UserError("the file ends too early: it is truncated") from None
        raise error if isinstance(error, UserError) else UserError(reason(error)) from None


def _too_large(size: Size) -> str | None:
    from PIL import Image

    limit = Image.MAX_IMAGE_PIXELS
    if limit is None or size[0] * size[1] <= 2 * limit:
        return None
    return f"{size[0]}x{size[1]} pixels are more than Pillow's limit of {2 * limit:,}"


def _traits_of(image: Image.Image) -> Trait:
    """The traits of an opened image."""
    traits = Trait.NONE
    if image.mode == "CMYK":
        traits |= Trait.CMYK
    if image.mode.startswith("I"):
        traits |= Trait.SIXTEEN_BIT
    if image.mode in ("P", "PA"):
        traits |= Trait.PALETTE
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        traits |= Trait.TRANSPARENT
    if getattr(image, "is_animated", False):
        traits |= Trait.ANIMATED
    if image.getexif().get(ORIENTATION, 1) in TURNED:
        traits |= Trait.TURNED
    return traits


# ---- formats -----------------------------------------------------------------------------------------------------


def _png(file: IO[bytes], head: bytes, length: int, budget: ReadingBudget | None) -> Look | None:
    """Chunks up to IEND with their checksums; beyond the budget only those up to the first pixels, and the end."""
    size = struct.unpack(">II", head[16:24])
    depth, colour = head[24], head[25]
    if head[12:16] != b"IHDR" or 0 in size or depth not in PNG_DEPTHS.get(colour, ()):
        return None
    traits = Trait.SIXTEEN_BIT if depth == 16 else Trait.NONE
    traits |= Trait.PALETTE if colour == 3 else Trait.NONE
    traits |= Trait.TRANSPARENT if colour in (4, 6) else Trait.NONE
    verify = length < SMALL_BYTES or budget is None or budget.take(length)
    position, at_pixels = 8, False
    while position + 8 <= length:
        file.seek(position)
        count, kind = struct.unpack(">I4s", file.read(8))
        if kind == b"IDAT" and not at_pixels:
            at_pixels = True
            if not verify and _ends_with(file, length, PNG_END):
                return Look(size, traits, True)
        elif kind == b"tRNS":
            traits |= Trait.TRANSPARENT
        elif kind == b"acTL" and struct.unpack(">I", file.read(4))[0] > 1:
            traits |= Trait.ANIMATED
        elif kind == b"eXIf" and _is_turned(file.read(min(count, EXIF_BYTES))):
            traits |= Trait.TURNED
        if not kind.isalpha():
            break
        end = position + 12 + count
        if verify and end <= length and not _checksum_fits(file, position + 4, count + 4):
            traits |= Trait.ALTERED
        position = end
        if kind == b"IEND":
            return Look(size, traits, at_pixels and position <= length)
    return Look(size, traits, False)


def _checksum_fits(file: IO[bytes], start: int, count: int) -> bool:
    """Whether the 4 bytes after ``count`` bytes from ``start`` are their CRC-32."""
    file.seek(start)
    checksum = 0
    while count:
        block = file.read(min(count, BLOCK_BYTES))
        if not block:
            return False
        checksum = zlib.crc32(block, checksum)
        count -= len(block)
    return file.read(4) == checksum.to_bytes(4, "big")


def _jpeg(file: IO[bytes], length: int) -> Look | None:
    """Markers up to the first scan; then the end of the file, or if that is no end mark the first one in the rest.

    An end mark cannot stand inside a scan, where every FF is followed by 00 or by a restart mark.
    """
    size: Size | None = None
    traits = Trait.NONE
    position = 2
    while True:
        file.seek(position)
        start, marker = struct.unpack(">BB", file.read(2))
        if start != 0xFF:
            return None
        if marker in (0xFF, 0x01) or 0xD0 <= marker <= 0xD8:
            position += 1 if marker == 0xFF else 2
            continue
        (count,) = struct.unpack(">H", file.read(2))
        if count < 2:
            return None
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            bits, height, width, channels = struct.unpack(">BHHB", file.read(6))
            if bits != 8 or not width or not height:
                return None
            size = (width, height)
            traits |= Trait.CMYK if channels == 4 else Trait.NONE
        elif marker == 0xE1:
            block = file.read(count - 2)
            if block.startswith(EXIF_MARK) and _is_turned(block[len(EXIF_MARK) :]):
                traits |= Trait.TURNED
        position += 2 + count
        if marker == 0xDA and size is not None:
            whole = _ends_with(file, length, JPEG_END) or _holds(file, position, JPEG_END)
            return Look(size, traits, position <= length and whole)
        if position >= length:
            return Look(size, traits, False) if size else None


def _webp(file: IO[bytes], head: bytes, length: int) -> Look | None:
    """One RIFF chunk around everything."""
    whole = length >= 8 + struct.unpack("<I", head[4:8])[0]
    kind, traits = head[12:16], Trait.NONE
    if kind == b"VP8 " and head[23:26] == b"\x9d\x01\x2a":
        width, height = (side & 0x3FFF for side in struct.unpack("<HH", head[26:30]))
    elif kind == b"VP8L" and head[20] == 0x2F:
        (bits,) = struct.unpack("<I", head[21:25])
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        traits |= Trait.TRANSPARENT if bits >> 28 & 1 else Trait.NONE
    elif kind == b"VP8X":
        flags = head[20]
        width, height = (1 + int.from_bytes(head[start : start + 3], "little") for start in (24, 27))
        traits |= Trait.TRANSPARENT if flags & 0x10 else Trait.NONE
        traits |= Trait.ANIMATED if flags & 0x02 else Trait.NONE
        traits |= Trait.TURNED if flags & 0x08 and _webp_is_turned(file, length) else Trait.NONE
    else:
        return None
    return Look((width, height), traits, whole) if width and height else None


def _webp_is_turned(file: IO[bytes], length: int) -> bool:
    position = 12
    while position + 8 <= length:
        file.seek(position)
        kind, count = struct.unpack("<4sI", file.read(8))
        if kind == b"EXIF":
            return _is_turned(file.read(min(count, EXIF_BYTES)).removeprefix(EXIF_MARK))
        position += 8 + count + count % 2
    return False


def _bmp(head: bytes, length: int) -> Look | None:
    """The place of the pixels and their number."""
    start, header = struct.unpack("<II", head[10:18])
    if header == 12:
        width, height, _, depth = struct.unpack("<HHHH", head[18:26])
        compression, stored = 0, 0
    else:
        width, height, _, depth, compression, stored = struct.unpack("<iiHHII", head[18:38])
    height = abs(height)  # negative: rows from the top
    if width <= 0 or not height or not depth:
        return None
    run_length = compression in (1, 2)
    pixels = stored if run_length else (width * depth + 31) // 32 * 4 * height
    return Look((width, height), Trait.NONE, length >= start + pixels)


def _boxes_fill_file(path: Path) -> bool:
    """Whether this is an AVIF or JPEG XL file whose boxes fill it exactly (a cut file ends inside its last box)."""
    position = 0
    with open(path, "rb") as file:
        length = file.seek(0, 2)
        file.seek(4)
        if file.read(4) not in (b"ftyp", b"JXL "):
            return False
        while position < length:
            file.seek(position)
            size = int.from_bytes(file.read(4), "big")
            if size == 0:  # "up to the end of the file", wherever that is
                return False
            if size == 1:
                file.seek(position + 8)
                size = int.from_bytes(file.read(8), "big")
            position += max(size, 8)
    return position == length


def _ends_with(file: IO[bytes], length: int, end: bytes) -> bool:
    file.seek(max(0, length - len(end)))
    return file.read(len(end)) == end


def _holds(file: IO[bytes], position: int, mark: bytes) -> bool:
    """Whether ``mark`` stands anywhere from ``position`` on."""
    file.seek(position)
    rest = b""
    while block := file.read(SCAN_BYTES):
        if mark in rest + block:
            return True
        rest = block[1 - len(mark) :]
    return False


def _is_turned(exif: bytes) -> bool:
    """Whether an EXIF block (in TIFF's form) holds an orientation other than 1, the upright one."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return False
    try:
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", exif, entry)
            if tag == ORIENTATION and kind == 3:
                return struct.unpack_from(f"{order}H", exif, entry + 8)[0] in TURNED
    except (struct.error, IndexError):
        pass  # damaged EXIF does not keep an image from being read
    return False
