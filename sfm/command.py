"""A pydantic model becomes a command: its fields are the options, its descriptions the help."""

import difflib
import inspect
import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import typer
import typer.core
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from sfm.errors import InputError
from sfm.terminal import fail, reporting

SHARED = "Shared options"

Function = TypeVar("Function", bound=Callable[..., Any])

AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout.", rich_help_panel=SHARED)
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", min=1, show_default=False, help="CPU threads to compute with. Default: one per core."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.", rich_help_panel=SHARED)]


class OnceCommand(typer.core.TyperCommand):
    """A command that refuses an option of one value when it is given again, rather than take the last."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse arguments; exit with status 2 if an option of one value is repeated."""
        given = list(args)
        rest = super().parse_args(ctx, args)
        if given:
            _, _, order = self.make_parser(ctx).parse_args(args=given)
            for option in dict.fromkeys(order):
                if order.count(option) > 1 and not (option.multiple or getattr(option, "is_flag", False)):
                    raise fail(
                        f"{option.opts[0]} takes one value and is given {order.count(option)} times: give it "
                        "once",
                        2,
                    )
        return rest


class App(typer.Typer):
    """Commands that are :class:`OnceCommand`."""

    def command(self, *arguments: Any, **settings: Any) -> Callable[[Function], Function]:
        """Add a command, see :class:`typer.Typer`."""
        return super().command(*arguments, **{"cls": OnceCommand} | settings)


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
        as_json, quiet, file = given.pop("json"), given.pop("quiet"), given.pop("config")
        with reporting():
            run(configured(model, name, file, given), as_json, quiet)

    parameters = [parameter(field_name, field) for field_name, field in model.model_fields.items()]
    parameters += [
        option(
            "config", Path | None, "--config", "Take the configuration of a run.json; options override it."
        ),
        option(
            "json",
            bool,
            "--json",
            "Print one JSON document on stdout; progress goes to stderr.",
            default=False,
        ),
        option("quiet", bool, "--quiet", "No progress.", default=False),
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    shown = "\n\n".join(["Examples:", *(f"  $ {example}" for example in examples)])
    app.command(name, help=summary, epilog=shown, no_args_is_help=True)(command)


def option(name: str, annotation: Any, flag: str, text: str, *, default: Any = None) -> inspect.Parameter:
    """Return an option that every command has."""
    info = typer.Option(flag, help=text, rich_help_panel=SHARED, show_default=False)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, info]
    )


def parameter(name: str, field: FieldInfo) -> inspect.Parameter:
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
            flag, help=text, metavar=choices(field.annotation), show_default=default_shown(field)
        )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[parsed_as(field.annotation), info],
    )


def default_shown(field: FieldInfo) -> str | bool:
    """Return how the help shows a field's default."""
    if field.is_required():
        return "required"
    default = field.default
    if default is None or default is False or default == []:
        return False
    return ",".join(map(str, default)) if isinstance(default, tuple | list) else str(default)


def choices(annotation: Any) -> str | None:
    """Return the values a field of a fixed set may take, for the help; None for any other field."""
    if get_origin(annotation) is list:
        annotation = get_args(annotation)[0]
    return "|".join(get_args(annotation)) if get_origin(annotation) is Literal else None


def parsed_as(annotation: Any) -> Any:
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


def configured(model: type[BaseModel], name: str, file: Path | None, given: dict[str, Any]) -> BaseModel:
    """Return the configuration: the file's values, overridden by what was given.

    Raises
    ------
    InputError
        If the file is not a configuration of this command, or a value is missing or not valid.
    """
    values = from_file(file, name) if file else {}
    values |= {key: value for key, value in given.items() if value not in (None, [])}
    try:
        return model(**values)
    except ValidationError as error:
        problems = [problem(model, detail) for detail in error.errors()]
        raise InputError("; ".join(dict.fromkeys(problems))) from error


def from_file(file: Path, name: str) -> dict[str, Any]:
    """Read the configuration in a ``run.json``."""
    try:
        record = json.loads(file.read_bytes())
        command, values = record["command"], dict(record["config"])
    except OSError as error:
        raise InputError(f"--config {file}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"--config {file} is not a run.json: it needs `command` and `config`") from error
    if command != name:
        raise InputError(f"--config {file} is of `sfm {command}`, not of `sfm {name}`")
    return values


def problem(model: type[BaseModel], detail: Any) -> str:
    """Return one validation error in the words of the command line."""
    name = str(detail["loc"][0]) if detail["loc"] else ""
    field = model.model_fields.get(name)
    extra = field.json_schema_extra if field and isinstance(field.json_schema_extra, dict) else {}
    shown = name.upper() if extra.get("argument") else "--" + name.replace("_", "-")
    if detail["type"] == "missing":
        return f"{shown} is required; see `--help`"
    if detail["type"] == "extra_forbidden":
        return f"unknown setting {name!r} in the configuration"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "literal_error" and field is not None:
        known = choices(field.annotation)
        close = difflib.get_close_matches(str(detail["input"]), known.split("|") if known else [])
        message += f": did you mean {' or '.join(close)}?" if close else ""
    return f"{shown} {detail['input']}: {message[0].lower()}{message[1:]}"
