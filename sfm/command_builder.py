"""A pydantic model becomes a command: its fields are the options, its descriptions the help."""

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

from sfm.config_fields import select_refused_values
from sfm.errors import InputError
from sfm.terminal import exit_on_error, report_error
from sfm.text import sanitize_line
from sfm.untrusted_files import MAX_EVALUATION_BYTES, OversizeError, parse_json, read_bounded_file

SHARED_PANEL = "Shared options"

MAX_PROBLEMS, MAX_VALUE_LENGTH = 5, 200
"""Problems that are told at once, and characters of a value in them."""

MAX_CONFIG_BYTES = MAX_EVALUATION_BYTES
"""Longest file that --config reads: it takes any that a command writes."""

SHELL_PIPE_PREFIXES = ("/dev/fd/", "/dev/stdin", "/proc/self/fd/")
"""Where the shell passes pipes, as in ``<(…)``: somebody writes them, which of others nobody knows."""

Function = TypeVar("Function", bound=Callable[..., Any])

AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout.", rich_help_panel=SHARED_PANEL)
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", min=1, show_default=False, help="CPU threads to compute with. Default: one per core."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.", rich_help_panel=SHARED_PANEL)]


class SingleValueCommand(typer.core.TyperCommand):
    """A command that refuses an option of one value when it is given again, rather than take the last."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse arguments; exit with status 2 if an option of one value is repeated."""
        given = list(args)
        rest = super().parse_args(ctx, args)
        if given:
            _, _, order = self.make_parser(ctx).parse_args(args=given)
            for option in dict.fromkeys(order):
                if order.count(option) > 1 and not (option.multiple or getattr(option, "is_flag", False)):
                    raise report_error(
                        f"{option.opts[0]} takes one value and is given {order.count(option)} times: give it "
                        "once",
                        2,
                    )
        return rest


class StrictTyper(typer.Typer):
    """Commands that are :class:`SingleValueCommand`."""

    def command(self, *arguments: Any, **settings: Any) -> Callable[[Function], Function]:
        """Add a command, see :class:`typer.Typer`."""
        return super().command(*arguments, **{"cls": SingleValueCommand} | settings)


def add_command(
    app: typer.Typer,
    name: str,
    model: type[BaseModel],
    run: Callable[[Any, bool, bool], None],
    *,
    summary: str,
    examples: list[str],
) -> None:
    """Add a command whose options are the fields of a model.

    Parameters
    ----------
    app : typer.Typer
    name : str
    model : type of BaseModel
        Fields marked ``json_schema_extra={"argument": True}`` become arguments.
    run : callable
        Called with (config, as_json, quiet).
    summary : str
        First line of the help.
    examples : list of str
        Command lines shown below the options.
    """

    def command(**given: Any) -> None:
        as_json, quiet = given.pop("json"), given.pop("quiet")
        file, trusted = given.pop("config"), given.pop("trust_config")
        with exit_on_error():
            run(make_config(model, name, file, given, trusted=trusted), as_json, quiet)

    parameters = [make_parameter(field_name, field) for field_name, field in model.model_fields.items()]
    parameters += [
        make_shared_option(
            "config",
            Path | None,
            "--config",
            "Take the recipe of a run.json; options override it. Places are given beside it.",
        ),
        make_shared_option(
            "trust_config",
            bool,
            "--trust-config",
            "Take the places that --config names too: where to read and write, schedulers, files of weights. "
            "For files of your own.",
            default=False,
        ),
        make_shared_option(
            "json",
            bool,
            "--json",
            "Print one JSON document on stdout; progress goes to stderr.",
            default=False,
        ),
        make_shared_option("quiet", bool, "--quiet", "No progress.", default=False),
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    shown = "\n\n".join(["Examples:", *(f"  $ {example}" for example in examples)])
    app.command(name, help=summary, epilog=shown, no_args_is_help=True)(command)


def make_shared_option(
    name: str, annotation: Any, flag: str, text: str, *, default: Any = None
) -> inspect.Parameter:
    """Return an option that every command has."""
    info = typer.Option(flag, help=text, rich_help_panel=SHARED_PANEL, show_default=False)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, info]
    )


def make_parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    """Return the command-line parameter of a field. Absent means None: the model knows the defaults."""
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    text = field.description or ""
    if extra.get("argument"):
        info: Any = typer.Argument(
            help=text, metavar=str(extra.get("metavar", name.upper())), show_default=False
        )
    else:
        flag = "--" + name.replace("_", "-")
        info = typer.Option(
            flag, help=text, metavar=format_choices(field.annotation), show_default=format_default(field)
        )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[get_option_type(field.annotation), info],
    )


def format_default(field: FieldInfo) -> str | bool:
    """Return how the help shows a field's default."""
    if field.is_required():
        return "required"
    default = field.default
    if default is None or default is False or default == []:
        return False
    return ",".join(map(str, default)) if isinstance(default, tuple | list) else str(default)


def format_choices(annotation: Any) -> str | None:
    """Return the values a field of a fixed set may take, for the help; None for any other field."""
    if get_origin(annotation) is list:
        annotation = get_args(annotation)[0]
    return "|".join(get_args(annotation)) if get_origin(annotation) is Literal else None


def get_option_type(annotation: Any) -> Any:
    """Return the type Typer reads an option as; what it cannot read (a tuple of numbers) it reads as text."""
    members = [a for a in get_args(annotation) if a is not type(None)]
    # Of several types, the first is that of the command line; others come from a run.json.
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = members[0]
    if get_origin(annotation) is tuple:
        return str | None
    if get_origin(annotation) is list:
        return list[str] | None
    if get_origin(annotation) is Literal:
        return str | None
    return annotation | None


def make_config(
    model: type[BaseModel], name: str, file: Path | None, given: dict[str, Any], *, trusted: bool = False
) -> BaseModel:
    """Return the configuration: the file's values, overridden by what was given.

    Raises
    ------
    InputError
        If the file is not a configuration of this command or, unless it is trusted, names places that were
        not given; or if a value is missing or not valid.
    """
    values = read_config_file(file, name) if file else {}
    given = {key: value for key, value in given.items() if value not in (None, [])}
    if file and not trusted:
        require_no_locations(model, file, {key: value for key, value in values.items() if key not in given})
    try:
        return model(**values | given)
    except ValidationError as error:
        problems = [
            format_problem(model, detail) for detail in error.errors(include_url=False)[:MAX_PROBLEMS]
        ]
        raise InputError("; ".join(dict.fromkeys(problems))) from error


def read_config_file(file: Path, name: str) -> dict[str, Any]:
    """Read the configuration in a ``run.json``; from a pipe of the shell too."""
    try:
        if str(file).startswith(SHELL_PIPE_PREFIXES):
            with file.open("rb") as opened:
                data = opened.read(MAX_CONFIG_BYTES + 1)
        else:
            data = read_bounded_file(file, MAX_CONFIG_BYTES)
        record = parse_json(data, MAX_CONFIG_BYTES)
        command, values = record["command"], {**record["config"]}
    except OSError as error:
        raise InputError(f"--config {file}: {error.strerror}") from error
    except OversizeError as error:
        raise InputError(f"--config {file} is too long: at most {MAX_CONFIG_BYTES} bytes are read") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"--config {file} is not a run.json: it needs `command` and `config`") from error
    if command != name:
        shown = sanitize_line(str(command), MAX_VALUE_LENGTH)
        raise InputError(f"--config {file} is of `sfm {shown}`, not of `sfm {name}`")
    return values


def require_no_locations(model: type[BaseModel], file: Path, values: dict[str, Any]) -> None:
    """Refuse a file that says where to read or write, what may leave, or to take much memory."""
    places = select_refused_values(model, values)
    if not places:
        return
    named = ", ".join(
        f"{get_option_name(model, name)} {sanitize_line(str(value), MAX_VALUE_LENGTH)}"
        for name, value in places.items()
    )
    wanted = " ".join(get_option_name(model, name) for name in places)
    raise InputError(
        f"--config {file} sets {named}: a file gives the recipe only, of usual size; give {wanted} on the "
        "command line, or --trust-config if the file is your own"
    )


def get_option_name(model: type[BaseModel], name: str) -> str:
    """Return what a field is called on the command line."""
    field = model.model_fields.get(name)
    extra = field.json_schema_extra if field and isinstance(field.json_schema_extra, dict) else {}
    if extra.get("argument"):
        return str(extra.get("metavar", name.upper())).rstrip(".")
    return "--" + name.replace("_", "-")


def format_problem(model: type[BaseModel], detail: Any) -> str:
    """Return one validation error in the words of the command line."""
    name = str(detail["loc"][0]) if detail["loc"] else ""
    field = model.model_fields.get(name)
    shown = get_option_name(model, name)
    if detail["type"] == "missing":
        return f"{shown} is required; see `--help`"
    if detail["type"] == "extra_forbidden":
        return f"unknown setting '{sanitize_line(name, MAX_VALUE_LENGTH)}' in the configuration"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "literal_error" and field is not None:
        known = format_choices(field.annotation)
        asked = str(detail["input"])[:MAX_VALUE_LENGTH]
        close = difflib.get_close_matches(asked, known.split("|") if known else [])
        message += f": did you mean {' or '.join(close)}?" if close else ""
    given = sanitize_line(str(detail["input"]), MAX_VALUE_LENGTH)
    return f"{shown} {given}: {message[0].lower()}{message[1:]}"
