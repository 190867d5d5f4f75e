"""The option mechanism: one typed field is the command-line option, the configuration key, the type check and the docs.

An option group is a plain dataclass that stands beside the code which uses it. Its docstring is the heading, each field
has a default and a one-sentence docstring. A script combines groups in one dataclass (one field per group) and calls
``parse_options``. Precedence: command line, then ``--config_file``, then the default.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import math
import sys
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import pydantic

from library.errors import UserError, did_you_mean, nearest
from library.files import write_text
from library.text_files import read_toml

Options = TypeVar("Options")

# Keys that front ends, or scripts of kohya-ss/sd-scripts that are not in this suite, write into shared configuration
# files. They are named in one line and have no effect, as are the options of this suite's other scripts; a key in none
# of these places is a mistake.
FRONT_END_KEYS = frozenset(
    """
    additional_parameters epoch noise_offset_type num_cpu_threads_per_process num_processes num_machines
    main_process_port multi_gpu gpu_ids extra_accelerate_launch_args sd3_checkbox flux1_checkbox
    lumina_checkbox LoRA_type LyCORIS_preset LyCORIS model_list stop_text_encoder_training
    stop_text_encoder_training_pct max_resolution train_norm train_on_input folder_name_prefix byt5
    text_encoder fp8_vl text_encoder_cpu vae_chunk_size split_attn enable_scaled_pos_embed
    train_text_encoder train_t5xxl diffusers_xformers save_n_epoch_type learning_rate_te learning_rate_te1
    learning_rate_te2 no_token_padding no_token_frequency clip_g sd3_fused_mlp t5xxl_device save_t5xxl
    save_clip use_pinned_memory lowvram mem_eff_save single_blocks_to_swap double_blocks_to_swap
    blockwise_fused_optimizers loraplus_lr_ratio loraplus_text_encoder_lr_ratio loraplus_unet_lr_ratio
    clip_l_dropout_rate clip_g_dropout_rate t5_dropout_rate pos_emb_random_crop_rate train_blocks sample_dir
    block_lr fused_optimizer_groups dynamo_mode dynamo_use_fullgraph dynamo_use_dynamic output_path
    """.split()
)
SCRIPT = "script"
"""The key of a configuration file that names its script."""
SECRETS = frozenset({"wandb_api_key", "huggingface_token"})
NOT_IN_OUTPUT_CONFIG = SECRETS | {"config_file", "output_config"}


def parse_steps_or_ratio(value: str | int | float) -> int | float:
    """``"100"`` -> 100 steps; ``"0.1"`` and ``"10%"`` -> the ratio 0.1. A value of 1 or more must be a whole number.

    Raises ValueError for anything else.
    """
    try:
        if isinstance(value, str):
            text = value.strip()
            value = (
                float(text[:-1]) / 100
                if text.endswith("%")
                else (float(text) if "." in text or "e" in text else int(text))
            )
    except ValueError:
        raise ValueError(f"{value!r} is neither a number of steps nor a ratio") from None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{value!r} is neither a number of steps nor a ratio")
    if isinstance(value, float) and value >= 1:
        if not value.is_integer():
            raise ValueError(f"{value} is not a whole number of steps, and a ratio must be below 1")
        return int(value)
    return value


StepsOrRatio = Annotated[
    Union[int, float],  # noqa: UP007 (evaluated at run time on Python 3.10)
    pydantic.BeforeValidator(parse_steps_or_ratio),
]
"""Steps (a whole number) or a share of all steps (below 1, or ``"10%"``)."""

OneWaySwitch = Annotated[bool, "one way"]
"""A switch without a ``--no_`` twin, for where that is an option of its own."""


class Aliases:
    """Further names of an option, as metadata of its type: ``Annotated[int, Aliases("other_name")]``."""

    def __init__(self, *names: str):
        self.names = names


@dataclass
class ConfigOptions:
    """Configuration files"""

    config_file: str | None = None
    """TOML file with option values; sections are flattened and the command line overrides it."""
    output_config: bool = False
    """Write the options that differ from their defaults to --config_file, then exit."""


@dataclass(frozen=True)
class Option:
    """One option as declared: where it lives and what it accepts."""

    name: str
    group: str
    title: str
    type: Any
    default: Any
    help: str

    @property
    def names(self) -> tuple[str, ...]:
        """Its name, and the others under which it is understood."""
        marks = get_args(self.type)[1:] if get_origin(self.type) is Annotated else ()
        return (self.name, *itertools.chain.from_iterable(mark.names for mark in marks if isinstance(mark, Aliases)))


_DECLARED: dict[Any, dict[str, Option]] = {}


@functools.cache
def _class_bodies(module: str) -> dict[str, list[ast.stmt]]:
    """The statements of every class in a module's source, by the class's qualified name."""
    bodies: dict[str, list[ast.stmt]] = {}

    def collect(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                bodies[prefix + child.name] = child.body
                collect(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.stmt):
                collect(child, f"{prefix}{child.name}.<locals>." if isinstance(child, ast.FunctionDef) else prefix)

    collect(ast.parse(inspect.getsource(sys.modules[module])), "")
    return bodies


def field_docstrings(group: type) -> dict[str, str]:
    """The string literals below the fields of a dataclass, inherited ones included."""
    documents: dict[str, str] = {}
    for base in reversed(group.__mro__):
        if not dataclasses.is_dataclass(base) or all("help" in field.metadata for field in dataclasses.fields(base)):
            continue  # without source: made by make_dataclass
        for node, following in itertools.pairwise(_class_bodies(base.__module__)[base.__qualname__]):
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(following, ast.Expr)
                and isinstance(node.target, ast.Name)
            ):
                text = following.value.value if isinstance(following.value, ast.Constant) else ""
                documents[node.target.id] = " ".join(str(text).split())
    return documents


def declared_options(options_class: Any) -> dict[str, Option]:
    """Every option of a combined class by name, in the order of declaration.

    Raises ValueError when two groups declare the same name: an option is declared once.
    """
    if options_class in _DECLARED:
        return _DECLARED[options_class]
    options: dict[str, Option] = {}
    for group_name, group in typing.get_type_hints(options_class).items():
        hints = typing.get_type_hints(group, include_extras=True)
        documents = field_docstrings(group)
        for field in dataclasses.fields(group):
            if field.name in options:
                raise ValueError(f"option {field.name} is declared in {options[field.name].group} and in {group_name}")
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            title = (group.__doc__ or group.__name__).strip().splitlines()[0]
            help_text = documents.get(field.name) or field.metadata.get("help", "")
            options[field.name] = Option(field.name, group_name, title, hints[field.name], default, help_text)
    _DECLARED[options_class] = options
    return options


def by_every_name(known: dict[str, Option]) -> dict[str, Option]:
    """The options by their names, aliases among them."""
    return {name: option for option in known.values() for name in option.names}


def parse_options(
    options_class: type[Options],
    description: str,
    arguments: Sequence[str] | None = None,
) -> Options:
    """Read the command line and the ``--config_file`` it names into an instance of ``options_class``.

    ``options_class`` is a dataclass whose fields are option groups, one of them ``ConfigOptions``. Ends the process for
    ``--help`` and ``--output_config``. Raises UserError for unknown options and keys and for values of a wrong type.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    known = declared_options(options_class)
    if not {"-h", "--help"} & set(arguments):
        _refuse_unknown_options(arguments, known)
    options = options_class()
    config_path = _config_file_argument(arguments)
    if config_path is not None and "output_config" not in map(_named_option, arguments):
        for name, value in read_config_file(config_path, known).items():
            setattr(getattr(options, known[name].group), name, value)
    if {"-h", "--help"} & set(arguments):
        _show_help(options_class, options, description)
    _take_command_line(options, arguments, known)
    if any(o.name == "output_config" and option_value(options, o) for o in known.values()):
        output_config(options, config_path)
        sys.exit(0)
    return options


def option_value(options: Any, option: Option) -> Any:
    """The value of a declared option in a combined instance."""
    return getattr(getattr(options, option.group), option.name)


def all_values(options: Any) -> dict[str, Any]:
    """Every option's value by name."""
    return {name: option_value(options, option) for name, option in declared_options(type(options)).items()}


def changed_options(options: Any, among: Iterable[str] | None = None) -> dict[str, Any]:
    """Name and value of every option that differs from its default, ``among`` some names if these are given."""
    known = declared_options(type(options))
    names = known if among is None else [name for name in among if name in known]
    return {name: value for name in names if (value := option_value(options, known[name])) != known[name].default}


def _refuse_unknown_options(arguments: Sequence[str], known: dict[str, Option]) -> None:
    switches = [name for name, option in known.items() if option.type is bool]
    names = set(by_every_name(known)) | {f"no_{name}" for name in switches}
    for name in (name for name in map(_named_option, arguments) if name is not None):
        if name not in names:
            match = nearest(name, known)
            raise UserError(f"Unknown option --{name}." + (f" Did you mean --{match}?" if match else ""))


def _named_option(argument: str) -> str | None:
    """The option that an argument names; both ways of joining words are allowed on the command line."""
    return argument[2:].partition("=")[0].replace("-", "_") if argument.startswith("--") else None


def _config_file_argument(arguments: Sequence[str]) -> Path | None:
    """The file of the last ``--config_file``."""
    path = None
    for index, argument in enumerate(arguments):
        if _named_option(argument) == "config_file":
            if "=" not in argument and index + 1 == len(arguments):
                raise UserError("--config_file needs the path of a TOML file.")
            path = argument.partition("=")[2] if "=" in argument else arguments[index + 1]
    return None if path is None else _with_toml_suffix(path)


def _with_toml_suffix(path: str) -> Path:
    return Path(path if path.endswith(".toml") else path + ".toml")


def _show_help(options_class: type[Options], defaults: Options, description: str) -> None:
    """Print every option by group, with its default or what a --config_file sets it to, and end the process."""
    import argparse

    script = Path(sys.argv[0]).name
    notes = "A switch that a --config_file turns on is turned off by --no_ before its name."
    shape: Any = functools.partial(argparse.HelpFormatter, max_help_position=32)
    purpose = description.strip().split("\n")[0]
    parser = argparse.ArgumentParser(
        script, f"{script} [options]", purpose, notes, formatter_class=shape, add_help=False, allow_abbrev=False
    )
    groups: dict[str, Any] = {}
    for option in declared_options(options_class).values():
        group = groups.get(option.group) or groups.setdefault(option.group, parser.add_argument_group(option.title))
        value, kinds = option_value(defaults, option), plain_types(option.type)
        how = "default" if value == option.default else "--config_file"
        text = option.help if value in (None, False, []) else f"{option.help} ({how}: {_as_typed(value)})"
        shown: dict[str, Any] = {"action": "store_true"}
        if bool not in kinds:
            shown = {"metavar": _metavar(option.type), "nargs": "+" if list in kinds else None}
        group.add_argument(*(f"--{name}" for name in option.names), help=text.replace("%", "%%"), **shown)
    parser.add_argument_group("Help").add_argument("-h", "--help", action="store_true", help="Show this and exit.")
    parser.print_help()
    sys.exit(0)


def _metavar(kind: Any) -> str:
    """What stands behind an option in the help: its choices, or the kind of its value."""
    if kind is StepsOrRatio:
        return "STEPS|RATIO"
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Annotated, list):
        return _metavar(parts[0])
    if origin in (Union, types.UnionType):
        return "|".join(dict.fromkeys(_metavar(part) for part in parts if part is not type(None)))
    if origin is Literal:
        return "{" + ",".join(map(str, parts)) + "}"
    return {str: "TEXT", float: "NUMBER", int: "INTEGER"}[kind]


def _as_typed(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else "on" if value is True else str(value)


def _take_command_line(options: Any, arguments: Sequence[str], known: dict[str, Option]) -> None:
    """Set the values of a command line in ``options``; of an option that is given twice the last one counts.

    Raises UserError for the first value that its option's type refuses.
    """
    given: list[tuple[str, list[str]]] = []
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            given.append((name.replace("-", "_"), [value] if equals else []))
        elif given:
            given[-1][1].append(argument)
        else:
            raise UserError(f'"{argument}" belongs to no option; options begin with "--".')
    options_by_name = by_every_name(known)
    for name, values in given:
        option = options_by_name.get(name) or known[name.removeprefix("no_")]
        setattr(getattr(options, option.group), option.name, _given_value(name, values, option))


def _given_value(name: str, values: list[str], option: Option) -> Any:
    """The value of ``--name values...``; the word ``None`` unsets an option that may be unset."""
    kinds = plain_types(option.type)
    if bool in kinds:
        if values:
            raise UserError(f'--{name} is a switch and takes no value, but "{values[0]}" follows it.')
        return name in option.names
    if values == ["None"] and type(None) in get_args(option.type):
        return None
    if list in kinds:
        return check_value(values, option)
    if len(values) != 1:
        raise UserError(f"--{name} takes one value, {describe_type(option.type)}; {len(values)} given.")
    return check_value(values[0], option)


def keys_of_other_scripts() -> set[str]:
    """Every option of every family's scripts and of the caching tools: a configuration file may serve several."""
    from library import families

    names = {*families.switches(), *vars(families.load(families.CACHING_OPTIONS)())}
    return names.union(*map(declared_options, families.script_options()))


def read_config_file(path: Path, known: dict[str, Option]) -> dict[str, Any]:
    """Checked option values of a ``--config_file``: sections flattened one level, empty strings and lists left out.

    Raises UserError for an unknown key (with the nearest known one) or a value that the option's type refuses.
    """
    flat = flattened_keys(path)
    values: dict[str, Any] = {}
    without_effect: list[str] = []
    by_name = by_every_name(known)
    for key, value in flat.items():
        if key == SCRIPT:
            _require_script(value, path)
        elif key not in by_name:
            if key not in FRONT_END_KEYS and key not in keys_of_other_scripts():
                raise UserError(f'{path}: unknown key "{key}".{did_you_mean(key, known)}')
            without_effect.append(key)
        elif value not in ("", []):
            values[by_name[key].name] = check_value(value, by_name[key], path)
    if without_effect:
        from library.console import say_when_set_up

        say_when_set_up(f"{path}: no effect in this script: {', '.join(without_effect)}")
    return values


def _require_script(value: Any, path: Path) -> None:
    """Raises UserError when ``script`` in a configuration file is not the script that has been started."""
    from library import families

    started, scripts = Path(sys.argv[0]).name, [family.file for family in families.FAMILIES]
    if started in scripts and str(value).removesuffix(".py") != started.removesuffix(".py"):
        raise UserError(f'{path}: script = "{value}": these are options of another script than {started}.')


def configured_value(arguments: Sequence[str], name: str) -> Any:
    """One key of the ``--config_file`` that a command line names, as it stands there; None where it doesn't."""
    path = _config_file_argument(arguments)
    return None if path is None or not path.is_file() else flattened_keys(path).get(name)


def flattened_keys(path: Path) -> dict[str, Any]:
    """A TOML file's keys, with those of its sections among them."""
    flat: dict[str, Any] = {}
    for key, value in read_toml(path).items():
        flat.update(value if isinstance(value, dict) else {key: value})
    return flat


def check_value(value: Any, option: Option, path: Path | None = None) -> Any:
    """``value``, from a file or as typed text, as the option's type.

    TOML's freedom (numbers for text, one value for a list) is allowed for. Raises UserError that names the option, in
    the file ``path`` or on the command line.
    """
    place = f'{path}: "{option.name}"' if path else f"--{option.name}"
    kinds = plain_types(option.type)
    if str in kinds and isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    elif str in kinds and isinstance(value, list) and all(isinstance(part, int) for part in value):
        value = ",".join(map(str, value))
    elif list in kinds and not isinstance(value, list):
        value = [value]
    elif Literal in kinds and isinstance(value, str):
        value = next((choice for choice in choices_of(option.type) if str(choice) == value), value)
    if isinstance(value, bool) and bool not in kinds:
        raise UserError(f"{place} must be {describe_type(option.type)}, not {str(value).lower()}.")
    try:
        return _validator(option.type).validate_python(value)
    except pydantic.ValidationError as error:
        found = error.errors()[0]
        if found["type"] == "finite_number":
            raise UserError(f"{place} must be a finite number, not {found['input']}.") from None
        raise UserError(f"{place} must be {describe_type(option.type)}, not {_shown(value)}.") from None


@functools.cache
def _validator(kind: Any) -> pydantic.TypeAdapter[Any]:
    """Checks values of a type; floats are finite."""
    return pydantic.TypeAdapter(kind, config=pydantic.ConfigDict(allow_inf_nan=False))


def choices_of(kind: Any) -> tuple[Any, ...]:
    """The values of ``Literal[...]`` or ``Literal[...] | None``."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    return tuple(itertools.chain.from_iterable(map(choices_of, get_args(kind))))


def _shown(value: Any, length: int = 80) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}..."


def plain_types(kind: Any) -> set[Any]:
    """The types that an annotation allows at its top level: ``int | None`` -> {int}, ``list[str]`` -> {list}."""
    origin = get_origin(kind)
    if origin is Annotated:
        return plain_types(get_args(kind)[0])
    if origin in (Union, types.UnionType):
        return set().union(*(plain_types(part) for part in get_args(kind))) - {type(None)}
    if origin is Literal:
        return {Literal}
    return {origin or kind}


def describe_type(kind: Any) -> str:
    """An option's type in a reader's words, for messages and tables."""
    if kind is StepsOrRatio:
        return "a number of steps, or a ratio below 1"
    origin = get_origin(kind)
    if origin is Annotated:
        return describe_type(get_args(kind)[0])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe_type(part) for part in get_args(kind) if part is not type(None)))
    if origin is Literal:
        choices = [str(part) for part in get_args(kind)]
        return choices[0] if len(choices) == 1 else "one of " + ", ".join(choices)
    if origin is list:
        return f"a list ({describe_type(get_args(kind)[0])} each)"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(kind, str(kind))


def output_config(options: Any, path: Path | None) -> None:
    """Write every option that differs from its default to ``path`` as flat TOML, without secrets.

    Raises UserError when ``path`` is missing or exists.
    """
    import toml

    if path is None:
        raise UserError("--output_config needs --config_file: the name of the file to write.")
    if path.exists():
        raise UserError(f"--output_config: {path} exists already; choose another --config_file or remove it.")
    values = {k: v for k, v in changed_options(options).items() if k not in NOT_IN_OUTPUT_CONFIG and v is not None}
    write_text(path, toml.dumps(values))
