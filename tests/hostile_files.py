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


def _set(header: Header, name: str, **parts: Any) -> Header:
    return {**header, name: {**header[name], **parts}}


def hostile_headers(sound: bytes) -> dict[str, bytes]:
    """Files by what is wrong with them; each must be refused. ``sound`` has two tensors with values at least."""
    header, data = taken_apart(sound)
    header.pop("__metadata__", None)
    named = sorted(header, key=lambda name: header[name]["data_offsets"])
    first, last = named[0], named[-1]
    begin, end = header[first]["data_offsets"]
    shape, dtype = header[first]["shape"], header[first]["dtype"]
    text = json.dumps(header)
    entry = json.dumps(header[first])

    def changed(**parts: Any) -> bytes:
        return put_together(_set(header, first, **parts), data)

    def raw(name: str, value: str) -> bytes:
        """The first tensor's part ``name`` written as ``value``, which need not be JSON."""
        parts = {key: json.dumps(part) for key, part in header[first].items()} | {name: value}
        made = "{" + ", ".join(f'"{key}": {part}' for key, part in parts.items()) + "}"
        return put_together(text.replace(entry, made), data)

    def without(part: str) -> bytes:
        left = {key: value for key, value in header[first].items() if key != part}
        return put_together({**header, first: left}, data)

    def with_metadata(value: str) -> bytes:
        return put_together(f'{{"__metadata__": {value}, {text[1:]}', data)

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
        "header is a list": put_together("[]", b""),
        "header is null": put_together("null", b""),
        "header is a number": put_together("1", b""),
        "header is text": put_together('"text"', b""),
        "header is no JSON": put_together("{" + "x" * 50),
        "header is not UTF-8": put_together(text.encode().replace(first.encode(), b"\xff\xfe"), data),
        "header in UTF-16": put_together(text.encode("utf-16"), data),
        "lone surrogate in a name": put_together(text.replace(first, "\\ud800"), data),
        "nesting of arrays": put_together("[" * 100_000),
        "nesting of objects": put_together('{"a":' * 100_000),
        "nesting inside an entry": raw("shape", "[" * 100_000 + "]" * 100_000),
        "two values": put_together(text + text, data),
        "key twice": put_together(text[:-1] + f', "{first}": {entry}}}', data),
        "dtype twice": put_together(text.replace(entry, entry[:-1] + f', "dtype": "{dtype}"}}'), data),
        "entry is null": put_together({**header, first: None}, data),
        "entry is a list": put_together({**header, first: [dtype, shape, [begin, end]]}, data),
        "no dtype": without("dtype"),
        "no shape": without("shape"),
        "no positions": without("data_offsets"),
        "dtype is a number": changed(dtype=32),
        "dtype is a list": changed(dtype=[dtype]),
        "dtype of another width": changed(dtype="F64" if dtype != "F64" else "F16"),
        "shape is infinite": raw("shape", "[Infinity]"),
        "shape is not a number": raw("shape", "[NaN]"),
        "shape is 1e400": raw("shape", "[1e400]"),
        "shape has a fraction": raw("shape", "[1.5]"),
        "shape is a text": changed(shape="4"),
        "shape has a truth value": changed(shape=[True, *shape]),
        "shape has 5,000 digits": raw("shape", "[" + "9" * 5000 + "]"),
        "negative shape": changed(shape=[-size for size in shape]),
        "two negative lengths": changed(shape=[-1, -1, *shape]),
        "shape of 2^64": changed(shape=[1 << 64]),
        "shape whose product is 0 modulo 2^64": changed(shape=[1 << 32, 1 << 32]),
        "empty shape beyond 2^63": put_together(
            {**header, "empty": {"dtype": "F32", "shape": [0, 1 << 62, 4], "data_offsets": [0, 0]}}, data
        ),
        "a thousand dimensions": changed(shape=[1] * 1000 + shape),
        "shape too large for the data": changed(shape=[2, *shape]),
        "positions infinite": raw("data_offsets", "[0, Infinity]"),
        "one position": changed(data_offsets=[begin]),
        "three positions": changed(data_offsets=[begin, end, end]),
        "positions are text": changed(data_offsets=[str(begin), str(end)]),
        "negative positions": changed(data_offsets=[-8, end - begin - 8]),
        "positions turned round": changed(data_offsets=[end, begin]),
        "positions outside": changed(data_offsets=[begin + (1 << 40), end + (1 << 40)]),
        "overlap": put_together(_set(header, last, data_offsets=header[first]["data_offsets"]), data),
        "hole": put_together({key: value for key, value in header.items() if key != first}, data),
        "metadata is a list": with_metadata("[]"),
        "metadata is a text": with_metadata('"x"'),
        "metadata value is a number": with_metadata('{"a": 1}'),
        "metadata value is an object": with_metadata('{"a": {"b": "c"}}'),
        "metadata value is null": with_metadata('{"a": null}'),
        "metadata value is infinite": with_metadata('{"a": Infinity}'),
        "metadata nested": with_metadata('{"a": ' * 100_000 + "1" + "}" * 100_000),
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
