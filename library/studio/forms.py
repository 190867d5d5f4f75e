"""A script's options as a form: every field is made from an option's declaration, and checked as the script does."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from library.errors import UserError, did_you_mean
from library.options import (
    FRONT_END_KEYS,
    NOT_IN_OUTPUT_CONFIG,
    SCRIPT,
    SECRETS,
    Option,
    by_every_name,
    check_value,
    choices_of,
    declared_options,
    keys_of_other_scripts,
    plain_types,
)
from library.studio.settings_files import flat_keys, lines_of

PREFIX = "option-"
"""Before an option's name in the names of the form's fields."""
REST = "other-keys"
"""The field with the keys that are no options of the script."""
NAMES_A_PLACE = re.compile(r"(?:\S+ ){0,4}?\(?(file|folder|checkpoint|\.toml)\b", re.IGNORECASE)
"""The beginning of an option's sentence, where its text is a path."""
Kind = Literal["switch", "choice", "list", "text", "number", "none"]


@dataclass
class Field:
    """One option in a form: what stands in it, and what is wrong with that."""

    option: Option
    kind: Kind
    """``none``: shown, but not set here."""
    choices: tuple[str, ...] = ()
    text: str = ""
    """What stands in the field, nothing for the default; of a switch ``on`` or nothing."""
    error: str = ""

    @property
    def name(self) -> str:
        """Name of the field in the form."""
        return PREFIX + self.option.name

    @property
    def is_set(self) -> bool:
        """Whether it says something other than the default, right or wrong."""
        if self.error or self.kind == "none":
            return bool(self.error)
        value = value_of(self)
        return value is not None and value != self.option.default

    @property
    def default(self) -> str:
        """The default in a reader's words; empty where it is nothing."""
        value = self.option.default
        if isinstance(value, bool):
            return "on" if value else "off"
        return text_of(value).replace("\n", " ")

    @property
    def long(self) -> bool:
        """Whether the text has several lines."""
        return self.kind == "list" or "\n" in self.text

    @property
    def whole(self) -> bool:
        """Whether only whole numbers are taken."""
        return float not in plain_types(self.option.type)

    @property
    def names(self) -> Literal["folder", "file", ""]:
        """What on the disk its text names, as far as its sentence says so."""
        found = NAMES_A_PLACE.match(self.option.help)
        if self.kind != "text" or found is None or self.option.name.startswith("huggingface_"):
            return ""
        return "folder" if found[1].lower() == "folder" else "file"

    @property
    def reason(self) -> str:
        """Why it is not set here."""
        if self.option.name in SECRETS:
            return "Secrets are not written into files: log in with wandb login or huggingface-cli login."
        return "This page sets it."


@dataclass
class Group:
    """The fields under one heading."""

    title: str
    fields: list[Field] = field(default_factory=list)

    @property
    def set_fields(self) -> int:
        """How many of them say something."""
        return sum(entry.is_set for entry in self.fields)


@dataclass
class Form:
    """The options of a script with what a file or a user gave them."""

    script: str
    fields: dict[str, Field]
    """By the option's name, in the order of declaration."""
    rest: str = ""
    """TOML of the keys that are no options of the script; they stay in the file."""
    rest_error: str = ""
    left_out: list[str] = field(default_factory=list)
    """Secrets that a file held."""

    @property
    def groups(self) -> list[Group]:
        """The fields under their headings; groups of one heading are one."""
        found: dict[str, Group] = {}
        for entry in self.fields.values():
            found.setdefault(entry.option.title, Group(entry.option.title)).fields.append(entry)
        return list(found.values())

    @property
    def wrong(self) -> list[Field]:
        """The fields whose text their option refuses."""
        return [entry for entry in self.fields.values() if entry.error]

    @property
    def unknown(self) -> list[str]:
        """What is wrong with keys that nothing knows, so that the script will refuse the file; a sentence each."""
        if self.rest_error or not self.rest:
            return []
        strange = [key for key in flat_keys(self.rest, "other keys") if key not in FRONT_END_KEYS]
        others = keys_of_other_scripts() if strange else set()
        return [f'"{key}" is unknown.{did_you_mean(key, self.fields)}' for key in strange if key not in others]

    @property
    def ok(self) -> bool:
        """Whether every value is one that the script takes."""
        return not self.wrong and not self.rest_error

    def values(self) -> dict[str, Any]:
        """What belongs into the file: options that differ from their defaults, then the other keys."""
        found = {}
        for name, entry in self.fields.items():
            if entry.kind != "none" and not entry.error:
                value = value_of(entry)
                if value is not None and value != entry.option.default:
                    found[name] = value
        return {**found, **({} if self.rest_error else flat_keys(self.rest, "other keys"))}


def empty_form(script: str, options_class: Any) -> Form:
    """The form of a script with every option at its default."""
    fields = {}
    for name, option in declared_options(options_class).items():
        kind = "none" if name in NOT_IN_OUTPUT_CONFIG else kind_of(option)
        choices = tuple(map(str, choices_of(option.type))) if kind == "choice" else ()
        fields[name] = Field(option, kind, choices, text_of(option.default) if kind == "switch" else "")
    return Form(script, fields)


def kind_of(option: Option) -> Kind:
    """How a form shows an option."""
    kinds = plain_types(option.type)
    if bool in kinds:
        return "switch"
    if list in kinds:
        return "list"
    if kinds == {Literal}:
        return "choice"
    return "number" if kinds <= {int, float} else "text"


def text_of(value: Any) -> str:
    """A value as it stands in a field: one line for each part of a list, ``on`` for a switch that is on."""
    if value is None or value is False:
        return ""
    if value is True:
        return "on"
    if isinstance(value, (list, tuple)):
        return "\n".join(map(str, value))
    return str(value)


def value_of(entry: Field) -> Any:
    """The value of what stands in a field; None when nothing does. Raises UserError as the script would."""
    option, text = entry.option, entry.text
    if entry.kind == "switch":
        return text == "on"
    if entry.kind == "list":
        parts = [line for line in text.split("\n") if line]
        return check_value(parts, option) if parts else None
    if text == "" or (entry.kind == "number" and not text.strip()):
        return None
    return check_value(text.strip() if entry.kind == "number" else text, option)


def _take(entry: Field, text: str) -> None:
    """Put a text into a field and check it."""
    entry.text, entry.error = text, ""
    try:
        value_of(entry)
    except UserError as error:
        entry.error = str(error)


def form_of_keys(script: str, options_class: Any, keys: Mapping[str, Any]) -> Form:
    """The form filled with the keys of a file; a wrong value stands in its field with what is wrong."""
    form = empty_form(script, options_class)
    known = by_every_name({name: entry.option for name, entry in form.fields.items()})
    rest = {}
    for key, value in keys.items():
        if key == SCRIPT:
            continue
        if key not in known:
            rest[key] = value
            continue
        entry = form.fields[known[key].name]
        if entry.kind == "none":
            form.left_out.append(key)
        elif value not in ("", []):
            _take_value(entry, value)
    form.rest = lines_of(rest)
    return form


def _take_value(entry: Field, value: Any) -> None:
    """Put a value of a file into a field."""
    try:
        value = check_value(value, entry.option)
    except UserError as error:
        entry.error = str(error)
    else:
        entry.error = ""
    is_default = value == entry.option.default and entry.kind != "switch"
    entry.text = "" if is_default else text_of(value)


def form_of_fields(script: str, options_class: Any, given: Mapping[str, str]) -> Form:
    """The form as a browser has sent it; a field that is missing is empty, as a browser sends switches."""
    form = empty_form(script, options_class)
    for entry in form.fields.values():
        if entry.kind == "none":
            continue
        _take(entry, given.get(entry.name, "").replace("\r\n", "\n"))
    form.rest = given.get(REST, "").replace("\r\n", "\n")
    try:
        keys = flat_keys(form.rest, "other keys")
    except UserError as error:
        form.rest_error = str(error)
        return form
    options = by_every_name({name: entry.option for name, entry in form.fields.items()})
    doubled = [key for key in keys if key in options or key == SCRIPT]
    if doubled:
        form.rest_error = f"{', '.join(doubled)}: set in the fields above."
    return form
