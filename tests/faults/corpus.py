"""Bad input of every kind, made by this program: nothing of it is stored.

Each function gives files by what they are. An oddity is sound and must be read everywhere; what is broken must be named
in one sentence by everyone, without a traceback and without waiting.
"""

from __future__ import annotations

import functools
import io
import os
import pickle
import random
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image, features

SIZE = (72, 56)
NOISE = numpy.random.default_rng(0).integers(0, 256, (SIZE[1], SIZE[0], 4), dtype=numpy.uint8)
PIXELS = Image.fromarray(NOISE, "RGBA")
TURNED = Image.Exif()
TURNED[0x0112] = 6


# ---- images ----------------------------------------------------------------------------------------------------------


def encoded(format: str, mode: str = "RGB", size: tuple[int, int] = SIZE, **options: Any) -> bytes:
    """A small image of noise in a format and mode of Pillow's."""
    data = io.BytesIO()
    PIXELS.resize(size).convert(mode).save(data, format, **options)
    return data.getvalue()


def frames(format: str, mode: str = "RGB") -> bytes:
    """An animation of two frames."""
    return encoded(format, mode, save_all=True, append_images=[PIXELS.rotate(180).convert(mode)])


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file with its checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(size: tuple[int, int], rows: bytes = b"", *, depth: int = 8, colour: int = 2, more: bytes = b"") -> bytes:
    """A PNG file whose header says anything, with ``rows`` as its pixels and ``more`` chunks before them."""
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more + pixels + chunk(b"IEND", b"")


def sixteen_bits(channels: int) -> bytes:
    """A PNG file of 16 bits for each channel, which go from none to all along its width."""
    width, height = SIZE
    ramp = numpy.linspace(0, 65535, width).astype(">u2")
    row = b"\0" + numpy.repeat(ramp, channels).tobytes()
    return png(SIZE, row * height, depth=16, colour={1: 0, 2: 4, 3: 2, 4: 6}[channels])


def white_rows(size: tuple[int, int] = SIZE) -> bytes:
    """The pixels of a white RGB image as a PNG file has them."""
    return (b"\0" + b"\xff" * 3 * size[0]) * size[1]


@functools.cache
def odd_images() -> dict[str, bytes]:
    """Images that are unusual and sound, by name; all have ``SIZE`` as stored."""
    found = {
        **{f"{mode}.png": encoded("PNG", mode) for mode in ("1", "L", "LA", "P", "RGBA")},
        "transparent palette.png": encoded("PNG", "P", transparency=b"\0\x80\xff"),
        "one transparent colour.png": encoded("PNG", transparency=(1, 2, 3)),
        **{f"16 bits in {channels} channels.png": sixteen_bits(channels) for channels in (1, 2, 3, 4)},
        "animated.png": frames("PNG"),
        "turned.png": encoded("PNG", exif=TURNED),
        **{f"a JPEG in {mode}.jpg": encoded("JPEG", mode) for mode in ("L", "CMYK", "YCbCr")},
        "progressive.jpg": encoded("JPEG", progressive=True),
        "turned too.jpg": encoded("JPEG", exif=TURNED),
        "animated too.webp": frames("WEBP"),
        "lossless.webp": encoded("WEBP", "RGBA", lossless=True),
        "palette.bmp": encoded("BMP", "P"),
        "a JPEG.png": encoded("JPEG"),
        "a PNG.jpg": encoded("PNG"),
        "a WebP.bmp": encoded("WEBP"),
        "an animated GIF.png": frames("GIF", "P"),
        "a TIFF.jpg": encoded("TIFF"),
        "a TIFF of CMYK.png": encoded("TIFF", "CMYK"),
        "more bytes.png": encoded("PNG") + b"more",
        "no end mark.png": encoded("PNG")[:-12],
        "much text.png": png(SIZE, white_rows(), more=chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(3 << 20)))),
        "a damaged profile.png": png(SIZE, white_rows(), more=chunk(b"iCCP", b"k\0\0" + b"damaged")),
        "a damaged EXIF.png": png(SIZE, white_rows(), more=chunk(b"eXIf", b"II*\0\xff\xff\xff\xff")),
    }
    if features.check("avif"):
        found["an AVIF.png"] = encoded("AVIF")
    return found


def odd_shapes() -> dict[str, bytes]:
    """Sound images that are very narrow or very small, by name."""
    return {f"{width}x{height}.png": encoded("PNG", size=(width, height)) for width, height in SHAPES}


SHAPES = ((1, 5000), (5000, 1), (1, 1), (3, 2))


@functools.cache
def broken_images() -> dict[str, bytes]:
    """Files that are called images and of which no image can be made, by name."""
    whole = {
        "png": encoded("PNG"),
        "jpg": encoded("JPEG"),
        "progressive.jpg": encoded("JPEG", progressive=True),
        "webp": encoded("WEBP"),
        "bmp": encoded("BMP"),
        "gif.png": encoded("GIF", "P"),
        "tiff.png": encoded("TIFF"),
    }
    if features.check("avif"):
        whole["avif.png"] = encoded("AVIF")
    sound = whole["png"]
    flipped = bytearray(sound)
    flipped[len(sound) // 2] ^= 0xFF
    rows = zlib.compress(white_rows())
    huge = (20_000, 20_000)
    return {
        **{f"half.{name}": data[: len(data) // 2] for name, data in whole.items()},
        **{f"head.{name}": data[:30] for name, data in whole.items()},
        **{f"{count} bytes.png": sound[:count] for count in (0, 1, 8, 16, 33)},
        "text.png": b"this is no image\n",
        "zeros.jpg": bytes(4096),
        "a page.png": b"<!DOCTYPE html><html><body>404</body></html>",
        "a drawing.png": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "a program.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 72 56\n%%EndComments\nshowpage\n%%EOF\n",
        "an HEIC.jpg": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64),
        "an AVIF of nothing.png": b"\0\0\0\x18ftypavif\0\0\0\0mif1avif" + bytes(64),
        "a JPEG XL.png": b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(64),
        "a film.webp": b"RIFF\x40\0\0\0AVI LIST" + bytes(56),
        "a flipped byte.png": bytes(flipped),
        "no size.png": png((0, 56)),
        "missing pixels.png": png(SIZE, white_rows()[:2000]),
        "no pixels.png": png(SIZE, b""),
        "pixels that are none.png": png(SIZE).replace(chunk(b"IDAT", zlib.compress(b"")), chunk(b"IDAT", b"none")),
        "pixels cut.png": png(SIZE).replace(chunk(b"IDAT", zlib.compress(b"")), chunk(b"IDAT", rows[: len(rows) // 2])),
        "7 bits.png": png(SIZE, white_rows(), depth=7),
        "20,000 by 20,000 in words.png": png(huge),
        "20,000 by 20,000.png": png(huge, (b"\0" + bytes(2500)) * 20_000, depth=1, colour=0),
        "2,147,483,647 wide.png": png(((1 << 31) - 1, 1 << 20)),
        "65,535 by 65,535.jpg": whole["jpg"].replace(struct.pack(">HH", SIZE[1], SIZE[0]), b"\xff\xff\xff\xff", 1),
        "no scan.jpg": whole["jpg"][: whole["jpg"].index(b"\xff\xda")] + b"\xff\xd9",
        "16,384 by 16,384.webp": b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0\xff\x3f\0\xff\x3f\0",
        "2,147,483,647 high.bmp": whole["bmp"][:22] + struct.pack("<i", (1 << 31) - 1) + whole["bmp"][26:],
        "a netpbm of much.png": b"P6 99999 99999 255\n" + bytes(99),
    }


def special_files(folder: Path) -> dict[str, Path]:
    """What is called an image and is no file with bytes, put into ``folder``, by name."""
    os.mkfifo(folder / "a pipe.png")
    (folder / "a loop.png").symlink_to(folder / "a loop.png")
    (folder / "nowhere.png").symlink_to(folder / "is nothing")
    (folder / "without end.png").symlink_to("/dev/zero")
    return {name: folder / name for name in ("a pipe.png", "a loop.png", "nowhere.png", "without end.png")}


def written(files: dict[str, bytes], folder: Path) -> dict[str, Path]:
    """The files in ``folder``, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return {name: folder / name for name in files}


# ---- caches ----------------------------------------------------------------------------------------------------------


def npy_file(description: str, shape: str, data: bytes = b"", version: tuple[int, int] = (1, 0)) -> bytes:
    """An array in NumPy's format whose header says anything."""
    return npy_header(f"{{'descr': {description}, 'fortran_order': False, 'shape': {shape}, }}", data, version)


def npy_header(text: str, data: bytes = b"", version: tuple[int, int] = (1, 0)) -> bytes:
    """NumPy's format with any text as its header."""
    raw = text.encode("latin-1")
    raw += b" " * (-(len(raw) + 11) % 64) + b"\n"
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H" if version == (1, 0) else "<I", len(raw)) + raw + data


def archive(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return buffer.getvalue()


def bomb(name: str, start: bytes, size: int) -> bytes:
    """A zip archive of a few kilobytes whose only member is ``start`` and then zeros, ``size`` bytes in all."""
    zeros = bytes(1 << 20)
    pack = zlib.compressobj(9, zlib.DEFLATED, -15)
    head = pack.compress(start) + pack.flush(zlib.Z_FULL_FLUSH)
    block = pack.compress(zeros) + pack.flush(zlib.Z_FULL_FLUSH)  # after a full flush, blocks stand for themselves
    count, rest = divmod(size - len(start), len(zeros))
    data = head + block * count + pack.compress(bytes(rest)) + pack.flush()
    checksum = 0  # wrong, which shows only to whoever unpacks all of it
    raw = name.encode()
    fields = struct.pack("<HHHHHIIIHH", 20, 0, 8, 0, 33, checksum, len(data), size, len(raw), 0)
    local = b"PK\3\4" + fields + raw + data
    entry = b"PK\1\2" + struct.pack("<H", 20) + fields + struct.pack("<HHHII", 0, 0, 0, 0, 0) + raw
    return local + entry + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(entry), len(local), 0)


def members_of(data: bytes) -> dict[str, bytes]:
    """What is in a zip archive."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return {name: file.read(name) for name in file.namelist()}


def hostile_arrays(shape: tuple[int, ...], touched: Path) -> dict[str, bytes]:
    """Arrays that cannot be taken for one of numbers of this shape; ``touched`` is the file that code in them makes."""
    count = int(numpy.prod(shape))
    code = pickle.dumps(RunsCode(touched))
    return {
        "no bytes": b"",
        "no header": b"\x93NUMPY\1\0\xff\xff",
        "4 GiB of header": b"\x93NUMPY\2\0\xff\xff\xff\xff",
        "a format of the future": npy_file("'<f4'", str(shape), bytes(4 * count), (9, 0)),
        "a shape of 4 TB": npy_file("'<f4'", "(1000000, 1000000)"),
        "a shape of 2^70": npy_file("'<f4'", f"({1 << 70},)"),
        "a negative shape": npy_file("'<f4'", "(-1, 4)", bytes(64)),
        "a fraction in the shape": npy_file("'<f4'", "(1.5,)", bytes(64)),
        "a hundred dimensions": npy_file("'<f4'", "(" + "1," * 100 + ")", bytes(4)),
        "9,000 digits": npy_file("'<f4'", "(" + "9" * 9000 + ",)"),
        "nothing in it": npy_file("'<f4'", f"(0, {1 << 40})"),
        "cut": npy_file("'<f4'", str(shape), bytes(4 * count - 4)),
        "more bytes": npy_file("'<f4'", str(shape), bytes(4 * count + 4)),
        "another shape": npy_file("'<f4'", str((*shape, 1)), bytes(4 * count)),
        "another size": npy_file("'<f4'", str((2 * shape[0], *shape[1:])), bytes(8 * count)),
        "objects": npy_file("'|O'", str(shape), code),
        "objects in fields": npy_file("[('a', '|O')]", str(shape), code),
        "text": npy_file("'<U4'", str(shape), bytes(16 * count)),
        "dates": npy_file("'<M8[s]'", str(shape), bytes(8 * count)),
        "complex numbers": npy_file("'<c8'", str(shape), bytes(8 * count)),
        "numbers of 16 bytes": npy_file("'<f16'", str(shape), bytes(16 * count)),
        "the other byte order": npy_file("'>f4'", str(shape), bytes(4 * count)),
        "no dtype": npy_file("None", str(shape), bytes(4 * count)),
        "nested brackets": npy_header("(" * 4000 + ")" * 4000),
        "a call": npy_header(f"__import__('pathlib').Path({str(touched)!r}).touch()"),
        "NaN": npy_file("'<f4'", str(shape), numpy.full(shape, numpy.nan, "<f4").tobytes()),
        "infinity": npy_file("'<f4'", str(shape), numpy.full(shape, numpy.inf, "<f4").tobytes()),
    }


def hostile_archives(sound: bytes) -> dict[str, bytes]:
    """Archives that are damaged or lie about their members, made from a sound one that is not compressed."""
    entry = sound.index(b"PK\1\2")
    end = sound.rindex(b"PK\5\6")

    def changed(start: int, *values: int, size: str = "<I") -> bytes:
        written = b"".join(struct.pack(size, value) for value in values)
        return sound[:start] + written + sound[start + len(written) :]

    encrypted = bytearray(changed(entry + 8, 1, size="<H"))
    encrypted[int.from_bytes(sound[entry + 42 : entry + 46], "little") + 6] |= 1
    return {
        "no bytes": b"",
        "text": b"no archive" * 20,
        "no members": archive({}),
        "a directory alone": sound[end:],
        **{f"cut at {part} of 4": sound[: len(sound) * part // 4] for part in (1, 2, 3)},
        "the last byte missing": sound[:-1],
        "encrypted": bytes(encrypted),
        "an unknown compression": changed(entry + 10, 99, size="<H"),
        "a version of the future": changed(entry + 6, 999, size="<H"),
        "a member of 4 GB": changed(entry + 20, 0xFFFFFFF0, 0xFFFFFFF0),
        "a member beyond the end": changed(entry + 42, 0x7FFFFFF0),
        "a wrong checksum": changed(entry + 16, 1),
        "a directory of 4 GB": changed(end + 12, 0xFFFFFFF0),
    }


def decayed_archives(sound: bytes) -> list[bytes]:
    """The archive with a byte of its first member's data changed, as a bad disk does."""
    draw = random.Random(0)
    start = 200  # behind the member's head
    end = sound.index(b"PK\3\4", start)
    positions = [draw.randrange(start, end) for _ in range(8)]
    return [sound[:at] + bytes([sound[at] ^ 0xFF]) + sound[at + 1 :] for at in positions]


class RunsCode:
    """What a pickle makes of it calls ``open``, which stands for anything: it leaves the file ``touched``."""

    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.touched), "w")


# ---- text ------------------------------------------------------------------------------------------------------------


CONTROLS = "".join(map(chr, [*range(1, 9), *range(14, 32), 127, *range(128, 160)]))
"""Control characters, those that begin a terminal's escape sequences among them."""
BIDI = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c"
"""Characters that turn the direction of the text behind them, so that it reads as something else."""
SURPRISING = "\x1b]0;title\x07\x1b[2J\x1b[31mred" + CONTROLS + BIDI
MARKUP = "</script><script>alert(1)</script><img src=x onerror=alert(1)>&amp;\"'`{{data}}]]>--><!--"


def broken_captions() -> dict[str, bytes]:
    """Caption files of which no caption can be made, by what is wrong."""
    text = "a photo of a café, 猫"
    return {
        "empty": b"",
        "UTF-16 with a mark": text.encode("utf-16"),
        "UTF-16": "a photo".encode("utf-16-le"),
        "UTF-32": text.encode("utf-32"),
        "Latin-1": "a café".encode("latin-1"),
        "Shift JIS": "猫の写真".encode("shift_jis"),
        "half a character": text.encode()[:-1],
        "zero bytes": b"a\0photo",
        "only zero bytes": bytes(64),
        "a surrogate": b"a \xed\xa0\x80 photo",
        "an image": encoded("PNG"),
        "10 MB": b"tag, " * 2_000_000,
    }


def odd_captions() -> dict[str, bytes]:
    """Caption files that are unusual and sound, by what is odd."""
    return {
        "only separators": b" , ,, ,",
        "only blanks": " \t\u3000\u00a0".encode(),
        "only a line end": b"\n",
        "a byte-order mark": b"\xef\xbb\xbfa cat",
        "old line ends": b"a cat\ra dog\r",
        "Windows line ends": b"a cat\r\na dog\r\n",
        "control characters": SURPRISING.encode(),
        "markup": MARKUP.encode(),
        "unicode separators": "a cat\u2028a dog\u0085x\u001cy".encode(),
        "emoji": "👩‍👩‍👧‍👦 🏴󠁧󠁢󠁥󠁮󠁧󠁿".encode(),
        "combining marks": ("e" + "\u0301" * 500).encode(),
        "weights": b"((((a:1e999)[b:-nan]:0.5\\(",
        "braces": b"{{{|}}} {a|b",
        "options": b"a cat --n x --w 99999",
        "900 kB": b"tag, " * 180_000,
    }


# ---- pickles ---------------------------------------------------------------------------------------------------------


def pickled(content: Any, zipped: bool = True) -> bytes:
    """What ``torch.save`` writes, as an archive or in the format before PyTorch 1.6."""
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def hostile_pickles(touched: Path) -> dict[str, bytes]:
    """Pickled files that hold code, are damaged, or hold tensors that are none; ``touched`` is what the code leaves."""
    ones = torch.ones(1, 4, 8, 8)
    sound, older = pickled({"latent": ones}), pickled({"latent": ones}, zipped=False)
    members = members_of(sound)
    index = next(name for name in members if name.endswith("data.pkl"))
    values = next(name for name in members if name.endswith("data/0"))
    code = RunsCode(touched)
    return {
        "code": pickle.dumps({"latent": code}),
        "code in an archive": pickled({"latent": code}),
        "code in an older file": pickled({"latent": code}, zipped=False),
        "code as the archive's index": archive(members | {index: pickle.dumps({"latent": code}, 2)}),
        "code in a state_dict": pickled({"state_dict": {"latent": code}}),
        "no bytes": b"",
        "no index": archive({name: data for name, data in members.items() if name != index}),
        "no values": archive({name: data for name, data in members.items() if name != values}),
        "few values": archive(members | {values: members[values][:100]}),
        "a program of TorchScript": archive(members | {index.replace("data.pkl", "constants.pkl"): b"x"}),
        "a path that climbs": archive(members | {"../../climbs": b"x"}),
        "nested lists": b"\x80\x02" + b"]" * 100_000 + b".",
        "lists of lists of lists": b"\x80\x02]q\0" + b"(h\0h\0h\0h\0lq\0" * 40 + b".",
        "a text of 2^63 bytes": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7fN.",
        "a place of 2^31 in the memo": b"\x80\x02Nr\xff\xff\xff\x7f.",
        "an empty stack": b"\x80\x02su.",
        "a list as a key": b"\x80\x02}]Ns.",
        "a tensor without arguments": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
        "sparse": pickled({"latent": ones.to_sparse()}),
        "quantized": pickled({"latent": torch.quantize_per_tensor(ones, 1.0, 0, torch.qint8)}),
        "without values": pickled({"latent": torch.empty(1, 4, 8, 8, device="meta")}),
        "40 billion elements of one": pickled({"latent": torch.ones(1).expand(1, 4, 100_000, 100_000)}),
        "a number": pickled(3),
        "a text": pickled("x"),
        "nothing": pickled(None),
        **{f"older, cut at {end}": older[:end] for end in range(0, len(older) // 2, 50)},
        **{f"cut at {part} of 8": sound[: len(sound) * part // 8] for part in range(1, 8)},
    }
