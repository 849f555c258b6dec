"""Build a command from a pydantic model: fields become options, descriptions become the help."""

import difflib
import inspect
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import typer
import typer.core
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from sfm.config_fields import select_values_refused_from_file
from sfm.error_reporting import exit_on_error, print_error_and_make_exit
from sfm.errors import InputError
from sfm.text import sanitize_line
from sfm.untrusted_files import MAX_EVALUATION_BYTES, OversizeError, parse_json, read_bounded_file

SHARED_PANEL = "Shared options"

MAX_PROBLEMS = 5
"""Validation errors that are printed."""

MAX_VALUE_LENGTH = 200
"""Characters of a value that an error message quotes."""

MAX_CONFIG_BYTES = MAX_EVALUATION_BYTES
"""Largest file that --config reads; every command writes smaller ones."""

SHELL_PIPE_PREFIXES = ("/dev/fd/", "/dev/stdin", "/proc/self/fd/")
"""Where the shell passes pipes, as in ``<(…)``; other pipes may have no writer and are refused."""

Function = TypeVar("Function", bound=Callable[..., Any])


def make_shared_typer_option(flag: str, help_text: str) -> Any:
    """Return the Typer option of a flag that every command has."""
    return typer.Option(flag, help=help_text, rich_help_panel=SHARED_PANEL, show_default=False)


JsonOption = Annotated[
    bool, make_shared_typer_option("--json", "Print one JSON document on stdout; progress goes to stderr.")
]
QuietOption = Annotated[bool, make_shared_typer_option("--quiet", "Show no progress.")]
ConfigOption = Annotated[
    Path | None,
    make_shared_typer_option(
        "--config", "Take the recipe of a run.json; options override it. Give paths and addresses as options."
    ),
]
TrustConfigOption = Annotated[
    bool,
    make_shared_typer_option(
        "--trust-config",
        "Also take paths and addresses from --config: where to read and write, schedulers, weight files. "
        "Only for files that you trust.",
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        "--threads", min=1, show_default=False, help="CPU threads to compute with. Default: one per core."
    ),
]


class CommandRefusingRepeatedOptions(typer.core.TyperCommand):
    """Command that refuses an option of one value when it is given twice, instead of taking the last."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse arguments; exit with status 2 if an option of one value is repeated."""
        arguments = list(args)
        remaining_args = super().parse_args(ctx, args)
        if arguments:
            _, _, order = self.make_parser(ctx).parse_args(args=arguments)
            for option in dict.fromkeys(order):
                count = order.count(option)
                if count > 1 and not (option.multiple or getattr(option, "is_flag", False)):
                    raise print_error_and_make_exit(
                        f"{option.opts[0]} takes one value and is given {count} times: give it once", 2
                    )
        return remaining_args


class TyperRefusingRepeatedOptions(typer.Typer):
    """Typer app whose commands are :class:`CommandRefusingRepeatedOptions`."""

    def command(self, *arguments: Any, **settings: Any) -> Callable[[Function], Function]:
        """Add a command, see :class:`typer.Typer`."""
        return super().command(*arguments, **{"cls": CommandRefusingRepeatedOptions} | settings)


def add_command(
    app: typer.Typer,
    command_name: str,
    config_model: type[BaseModel],
    run_command: Callable[[Any, JsonOption, QuietOption], None],
    *,
    summary: str,
    examples: list[str],
) -> None:
    """Add a command whose options are the fields of a model.

    Parameters
    ----------
    app : typer.Typer
    command_name : str
    config_model : type of BaseModel
        Fields marked ``json_schema_extra={"argument": True}`` become arguments.
    run_command : callable
        Called with (config, as_json, quiet).
    summary : str
        First line of the help.
    examples : list of str
        Command lines shown below the options.
    """

    def command(**options: Any) -> None:
        as_json, quiet = options.pop("json"), options.pop("quiet")
        file, is_trusted = options.pop("config"), options.pop("trust_config")
        with exit_on_error():
            run_command(
                make_config_from_file_and_options(
                    config_model, command_name, file, options, is_file_trusted=is_trusted
                ),
                as_json,
                quiet,
            )

    parameters = [
        *(
            make_typer_parameter_from_field(field_name, field)
            for field_name, field in config_model.model_fields.items()
        ),
        make_keyword_only_parameter("config", ConfigOption, None),
        make_keyword_only_parameter("trust_config", TrustConfigOption, False),
        make_keyword_only_parameter("json", JsonOption, False),
        make_keyword_only_parameter("quiet", QuietOption, False),
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    epilog = "\n\n".join(["Examples:", *(f"  $ {example}" for example in examples)])
    app.command(command_name, help=summary, epilog=epilog, no_args_is_help=True)(command)


def make_keyword_only_parameter(parameter_name: str, annotation: Any, default: Any) -> inspect.Parameter:
    """Return a keyword-only parameter for the signature of a command."""
    return inspect.Parameter(
        parameter_name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def make_typer_parameter_from_field(field_name: str, field: FieldInfo) -> inspect.Parameter:
    """Return the command-line parameter of a field: None if left out, so that the model's default applies."""
    metavar = get_metavar_if_argument(field_name, field)
    info: Any = (
        typer.Argument(help=field.description, metavar=metavar, show_default=False)
        if metavar
        else typer.Option(
            get_option_declaration(field_name, field),
            help=field.description,
            metavar=format_choices_for_help(field.annotation),
            show_default=format_default_for_help(field),
        )
    )
    return make_keyword_only_parameter(
        field_name, Annotated[get_typer_option_type(field.annotation), info], None
    )


def get_metavar_if_argument(field_name: str, field: FieldInfo) -> str | None:
    """Return how the help writes an argument, as in ``RUN...``; None for an option."""
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    return str(extra.get("metavar", field_name.upper())) if extra.get("argument") else None


def get_option_or_argument_name(config_model: type[BaseModel], field_name: str) -> str:
    """Return the name of a field on the command line, as in ``--image-size`` or ``DATASET``."""
    field = config_model.model_fields.get(field_name)
    metavar = get_metavar_if_argument(field_name, field) if field else None
    return metavar.rstrip(".") if metavar else "--" + field_name.replace("_", "-")


def get_option_declaration(field_name: str, field: FieldInfo) -> str:
    """Return how an option is declared: ``--x``, or ``--x/--no-x`` for a switch that is on by default."""
    option = "--" + field_name.replace("_", "-")
    return f"{option}/--no-{option.removeprefix('--')}" if field.default is True else option


def format_default_for_help(field: FieldInfo) -> str | Literal[False]:
    """Return how the help shows a field's default; False if it shows none."""
    if field.is_required():
        return "required"
    default = field.default
    if default is True:
        return "on"
    if default is None or default is False or default == []:
        return False
    return ",".join(map(str, default)) if isinstance(default, tuple | list) else str(default)


def format_choices_for_help(annotation: Any) -> str | None:
    """Return the choices of a field as ``a|b``; None if it has no fixed set of them."""
    if get_origin(annotation) is list:
        annotation = get_args(annotation)[0]
    return "|".join(get_args(annotation)) if get_origin(annotation) is Literal else None


def get_typer_option_type(annotation: Any) -> Any:
    """Return the type that Typer parses an option as; str for types that it cannot parse, such as tuples."""
    members = [a for a in get_args(annotation) if a is not type(None)]
    # Of several types, the first is that of the command line; others come from a run.json.
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = members[0]
    if get_origin(annotation) in (tuple, Literal):
        return str | None
    if get_origin(annotation) is list:
        return list[str] | None
    return annotation | None


def make_config_from_file_and_options(
    config_model: type[BaseModel],
    command_name: str,
    config_file: Path | None,
    options: dict[str, Any],
    *,
    is_file_trusted: bool = False,
) -> BaseModel:
    """Return the config: the values of a file, overridden by the options given on the command line.

    Parameters
    ----------
    config_model : type of BaseModel
    command_name : str
    config_file : Path or None
        Value of ``--config``.
    options : dict
        By field name; None and empty lists are options that were left out.
    is_file_trusted : bool
        Whether the file may name places too.

    Raises
    ------
    InputError
        If the file is not a config of this command or, unless it is trusted, names places that are not
        given as options; or if a value is missing or not valid.
    """
    file_values = read_config_file(config_file, command_name) if config_file else {}
    if file_values:
        file_values = {**getattr(config_model, "VALUES_OF_VERSION_0_1_0", {}), **file_values}
    options = {name: value for name, value in options.items() if value not in (None, [])}
    if config_file and not is_file_trusted:
        refuse_restricted_file_values(
            config_model, config_file, {n: v for n, v in file_values.items() if n not in options}
        )
    try:
        return config_model(**file_values | options)
    except ValidationError as error:
        problems = [
            format_validation_error(config_model, error_details)
            for error_details in error.errors(include_url=False)[:MAX_PROBLEMS]
        ]
        raise InputError("; ".join(dict.fromkeys(problems))) from error


def read_config_file(config_file: Path, expected_command_name: str) -> dict[str, Any]:
    """Return the config that a ``run.json`` holds; the file may be a pipe of the shell."""
    try:
        if str(config_file).startswith(SHELL_PIPE_PREFIXES):
            with config_file.open("rb") as pipe:
                data = pipe.read(MAX_CONFIG_BYTES + 1)
        else:
            data = read_bounded_file(config_file, MAX_CONFIG_BYTES)
        record = parse_json(data, MAX_CONFIG_BYTES)
        found_name, values = record["command"], {**record["config"]}
    except OSError as error:
        raise InputError(f"--config {config_file}: {error.strerror}") from error
    except OversizeError as error:
        raise InputError(
            f"--config {config_file} is too long: at most {MAX_CONFIG_BYTES} bytes are read"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"--config {config_file} is not a run.json: it needs `command` and `config`"
        ) from error
    if found_name != expected_command_name:
        shown_name = sanitize_line(str(found_name), MAX_VALUE_LENGTH)
        raise InputError(
            f"--config {config_file} is of `sfm {shown_name}`, not of `sfm {expected_command_name}`"
        )
    return values


def refuse_restricted_file_values(
    config_model: type[BaseModel], config_file: Path, file_values: dict[str, Any]
) -> None:
    """Refuse values of a config file that name places, let data leave, or take much memory.

    Raises
    ------
    InputError
        If there are such values; says which options to give instead.
    """
    refused = {
        get_option_or_argument_name(config_model, n): v
        for n, v in select_values_refused_from_file(config_model, file_values).items()
    }
    if refused:
        settings = ", ".join(f"{n} {sanitize_line(str(v), MAX_VALUE_LENGTH)}" for n, v in refused.items())
        raise InputError(
            f"--config {config_file} sets {settings}: a file gives the recipe only, of usual size; give "
            f"{' '.join(refused)} on the command line, or --trust-config if the file is your own"
        )


def format_validation_error(config_model: type[BaseModel], error_details: ErrorDetails) -> str:
    """Return the message for a pydantic validation error, with the option's name."""
    name = str(error_details["loc"][0]) if error_details["loc"] else ""
    option_name = get_option_or_argument_name(config_model, name)
    if error_details["type"] == "missing":
        return f"{option_name} is required; see `--help`"
    if error_details["type"] == "extra_forbidden":
        return f"unknown setting '{sanitize_line(name, MAX_VALUE_LENGTH)}' in the configuration"
    message = error_details["msg"].removeprefix("Value error, ")
    if error_details["type"] == "literal_error" and name in config_model.model_fields:
        choices = (format_choices_for_help(config_model.model_fields[name].annotation) or "").split("|")
        close = difflib.get_close_matches(str(error_details["input"])[:MAX_VALUE_LENGTH], choices)
        message += f": did you mean {' or '.join(close)}?" if close else ""
    value = sanitize_line(str(error_details["input"]), MAX_VALUE_LENGTH)
    return f"{option_name} {value}: {message[0].lower()}{message[1:]}"
