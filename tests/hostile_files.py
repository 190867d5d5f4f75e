"""Safetensors files that are damaged or malicious in some fifty ways, made from a sound one."""

from __future__ import annotations

import json
import struct
from typing import Any

Header = dict[str, Any]


def taken_apart(sound: bytes) -> tuple[Header, bytes]:
    """The header and the data of a safetensors file."""
    length = struct.unpack("<Q", sound[:8])[0]
    return json.loads(sound[8 : 8 + length]), sound[8 + length :]


def put_together(header: Header | str | bytes, data: bytes = b"") -> bytes:
    """A file with this header, whatever it is."""
    text = json.dumps(header) if isinstance(header, dict | list) else header
    raw = text.encode("utf-8") if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw + data


class SoundFile:
    """A sound safetensors file in its parts, and what is easily made of it by changing its first tensor's entry."""

    def __init__(self, sound: bytes) -> None:
        self.header, self.data = taken_apart(sound)
        self.header.pop("__metadata__", None)
        named = sorted(self.header, key=lambda name: self.header[name]["data_offsets"])
        self.first, self.last = named[0], named[-1]
        self.begin, self.end = self.header[self.first]["data_offsets"]
        self.shape, self.dtype = self.header[self.first]["shape"], self.header[self.first]["dtype"]
        self.text = json.dumps(self.header)
        self.entry = json.dumps(self.header[self.first])

    def with_header(self, header: Header | str | bytes) -> bytes:
        """The file with another header before its data."""
        return put_together(header, self.data)

    def changed(self, name: str = "", **parts: Any) -> bytes:
        """With other parts in the entry of the tensor ``name``, else of the first."""
        name = name or self.first
        return self.with_header({**self.header, name: {**self.header[name], **parts}})

    def raw(self, name: str, value: str) -> bytes:
        """With the first tensor's part ``name`` written as ``value``, which need not be JSON."""
        parts = {key: json.dumps(part) for key, part in self.header[self.first].items()} | {name: value}
        made = "{" + ", ".join(f'"{key}": {part}' for key, part in parts.items()) + "}"
        return self.with_header(self.text.replace(self.entry, made))

    def without(self, part: str) -> bytes:
        """Without a part of the first tensor's entry."""
        left = {key: value for key, value in self.header[self.first].items() if key != part}
        return self.with_header({**self.header, self.first: left})

    def with_metadata(self, value: str) -> bytes:
        """With ``value`` as its metadata."""
        return self.with_header(f'{{"__metadata__": {value}, {self.text[1:]}')


def hostile_headers(sound: bytes) -> dict[str, bytes]:
    """Files by what is wrong with them; each must be refused. ``sound`` has two tensors with values at least."""
    file = SoundFile(sound)
    return {
        **wrong_lengths(sound),
        **wrong_json(file),
        **wrong_entries(file),
        **wrong_places(file),
        **wrong_metadata(file),
    }


def wrong_lengths(sound: bytes) -> dict[str, bytes]:
    """Files that end too soon or too late, or whose first eight bytes lie."""
    return {
        "no bytes": b"",
        "seven bytes": sound[:7],
        "length alone": sound[:8],
        "header cut": sound[:40],
        "data cut": sound[:-1],
        "trailing bytes": sound + b"\0",
        "header of no length": struct.pack("<Q", 0),
        "header of 2^63 bytes": struct.pack("<Q", 1 << 63) + sound[8:],
        "header of 2^64 - 1 bytes": b"\xff" * 8 + sound[8:],
        "header of 99 MB that is not there": struct.pack("<Q", 99_000_000) + sound[8:],
    }


def wrong_json(file: SoundFile) -> dict[str, bytes]:
    """Headers that are no JSON object, or not as safetensors has it."""
    text, entry = file.text, file.entry
    return {
        "header is a list": put_together("[]", b""),
        "header is null": put_together("null", b""),
        "header is a number": put_together("1", b""),
        "header is text": put_together('"text"', b""),
        "header is no JSON": put_together("{" + "x" * 50),
        "header is not UTF-8": file.with_header(text.encode().replace(file.first.encode(), b"\xff\xfe")),
        "header in UTF-16": file.with_header(text.encode("utf-16")),
        "lone surrogate in a name": file.with_header(text.replace(file.first, "\\ud800")),
        "nesting of arrays": put_together("[" * 100_000),
        "nesting of objects": put_together('{"a":' * 100_000),
        "nesting inside an entry": file.raw("shape", "[" * 100_000 + "]" * 100_000),
        "two values": file.with_header(text + text),
        "key twice": file.with_header(text[:-1] + f', "{file.first}": {entry}}}'),
        "dtype twice": file.with_header(text.replace(entry, entry[:-1] + f', "dtype": "{file.dtype}"}}')),
    }


def wrong_entries(file: SoundFile) -> dict[str, bytes]:
    """Entries of tensors with parts missing, of wrong kinds, with impossible shapes."""
    shape, dtype = file.shape, file.dtype
    return {
        "entry is null": file.with_header({**file.header, file.first: None}),
        "entry is a list": file.with_header({**file.header, file.first: [dtype, shape, [file.begin, file.end]]}),
        "no dtype": file.without("dtype"),
        "no shape": file.without("shape"),
        "no positions": file.without("data_offsets"),
        "dtype is a number": file.changed(dtype=32),
        "dtype is a list": file.changed(dtype=[dtype]),
        "dtype of another width": file.changed(dtype="F64" if dtype != "F64" else "F16"),
        "shape is infinite": file.raw("shape", "[Infinity]"),
        "shape is not a number": file.raw("shape", "[NaN]"),
        "shape is 1e400": file.raw("shape", "[1e400]"),
        "shape has a fraction": file.raw("shape", "[1.5]"),
        "shape is a text": file.changed(shape="4"),
        "shape has a truth value": file.changed(shape=[True, *shape]),
        "shape has 5,000 digits": file.raw("shape", "[" + "9" * 5000 + "]"),
        "negative shape": file.changed(shape=[-size for size in shape]),
        "two negative lengths": file.changed(shape=[-1, -1, *shape]),
        "shape of 2^64": file.changed(shape=[1 << 64]),
        "shape whose product is 0 modulo 2^64": file.changed(shape=[1 << 32, 1 << 32]),
        "empty shape beyond 2^63": file.with_header(
            {**file.header, "empty": {"dtype": "F32", "shape": [0, 1 << 62, 4], "data_offsets": [0, 0]}}
        ),
        "a thousand dimensions": file.changed(shape=[1] * 1000 + shape),
        "shape too large for the data": file.changed(shape=[2, *shape]),
    }


def wrong_places(file: SoundFile) -> dict[str, bytes]:
    """Positions outside of the data, in each other's place, or none at all."""
    begin, end = file.begin, file.end
    return {
        "positions infinite": file.raw("data_offsets", "[0, Infinity]"),
        "one position": file.changed(data_offsets=[begin]),
        "three positions": file.changed(data_offsets=[begin, end, end]),
        "positions are text": file.changed(data_offsets=[str(begin), str(end)]),
        "negative positions": file.changed(data_offsets=[-8, end - begin - 8]),
        "positions turned round": file.changed(data_offsets=[end, begin]),
        "positions outside": file.changed(data_offsets=[begin + (1 << 40), end + (1 << 40)]),
        "overlap": file.changed(file.last, data_offsets=[begin, end]),
        "hole": file.with_header({key: value for key, value in file.header.items() if key != file.first}),
    }


def wrong_metadata(file: SoundFile) -> dict[str, bytes]:
    """Metadata that are no object of texts."""
    return {
        "metadata is a list": file.with_metadata("[]"),
        "metadata is a text": file.with_metadata('"x"'),
        "metadata value is a number": file.with_metadata('{"a": 1}'),
        "metadata value is an object": file.with_metadata('{"a": {"b": "c"}}'),
        "metadata value is null": file.with_metadata('{"a": null}'),
        "metadata value is infinite": file.with_metadata('{"a": Infinity}'),
        "metadata nested": file.with_metadata('{"a": ' * 100_000 + "1" + "}" * 100_000),
    }


DEEP = "[" * 100_000 + "]" * 100_000


def hostile_metadata() -> dict[str, dict[str, str]]:
    """Metadata that are sound to the format and hold nonsense for whoever looks into them."""
    entries = ("config", "ss_network_args", "lora_adapter_metadata", "ss_network_dim", "ss_network_alpha")
    values = {
        "nested": DEEP,
        "nested objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
        "infinite": '{"conv_dim": Infinity, "transformer.lora_alpha": Infinity, "lora_alpha": NaN}',
        "no JSON": "{",
        "list": "[1, 2]",
        "5,000 digits": '{"lora_alpha": ' + "9" * 5000 + "}",
        "objects for numbers": '{"lora_alpha": {"a": []}, "alpha_pattern": {"(": 1}, "conv_dim": [[]]}',
        "text for numbers": '{"lora_alpha": "many", "alpha_pattern": "x", "transformer.lora_alpha": "1e999"}',
        "pattern without end": '{"lora_alpha": 4, "alpha_pattern": {"(a+)+$": 2, "*": 3}}',
        "no text": "",
    }
    return {
        name: {"ss_network_module": "networks.lora", "format": "pt", **dict.fromkeys(entries, value)}
        for name, value in values.items()
    }
