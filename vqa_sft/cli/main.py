"""The program `vqa-sft`: parses the command line and runs a command."""

import sys
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any

import typer
from typer.core import TyperCommand

from vqa_sft.errors import InputError, exits_with_message, printable

BARE = {"--json": "-"}  # options that may have no value, and what they mean then


class Command(TyperCommand):
    """A command that ends as our scripts do: InputError, Ctrl-C and closed pipes are not typer's to report."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        names = {name for param in self.params for name in param.opts}
        several = {name for param in self.params if getattr(param, "multiple", False) for name in param.opts}
        flags = {name for param in self.params if getattr(param, "is_flag", False) for name in param.opts}
        return super().parse_args(ctx, one_value_each(args, names, several, flags))

    def invoke(self, ctx: Any) -> Any:
        from vqa_sft.environment import set_library_defaults

        set_library_defaults()
        return exits_with_message(super().invoke)(ctx)


def one_value_each(
    tokens: Sequence[str], names: Collection[str], several: Collection[str], flags: Collection[str] = ()
) -> list[str]:
    """The tokens as typer reads them: `--a_b` is `--a-b`, `--weights 1 2` is `--weights 1 --weights 2` for the options
    that take `several` values, `--json` alone is `--json -`, and `--use_cpu true`, as a recipe has it, is the flag
    `--use-cpu`. Options that are not in `names` are left alone."""
    left, plain = deque(tokens), []
    while left:
        token = left.popleft()
        name, equals, value = token.partition("=")
        dashed = name.replace("_", "-")
        if not token.startswith("--") or dashed not in names:
            plain.append(token)
            continue
        if dashed in flags and (value if equals else left and left[0]) in ("true", "false"):
            plain += [dashed] if (value if equals else left.popleft()) == "true" else []
            continue
        values = [value] if equals else []
        while dashed in several and not equals and left and not left[0].startswith("--"):
            values.append(left.popleft())
        if dashed in BARE and not equals and (not left or (left[0].startswith("-") and left[0] != "-")):
            values = [BARE[dashed]]
        plain += [f"{dashed}={value}" for value in values] or [dashed]
    return plain


def build_app() -> typer.Typer:
    from vqa_sft.cli import candidates, classes, data, predictions, runs
    from vqa_sft.cli.options import SOURCE_EPILOG

    app = typer.Typer(
        help="Train and predict, check data, make folds, score and combine predictions, export and push runs.",
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    )
    fields = {"allow_extra_args": True, "ignore_unknown_options": True}  # those of a recipe may follow
    add(app, [runs.train, runs.predict], fields | {"help_option_names": []})  # the scripts have a --help of their own
    add(app, [data.check, data.folds], fields, epilog=SOURCE_EPILOG)
    add(app, [candidates.candidates], fields, epilog=SOURCE_EPILOG)
    add(app, [runs.memory, runs.blind], fields)
    add(app, [predictions.score, predictions.report, predictions.calibrate, predictions.ensemble])
    add(app, [predictions.submit, predictions.diff, predictions.uncertainty, predictions.label_errors])
    add(app, [classes.fuse])
    add(app, [runs.soup, runs.export, runs.push])
    add(app, [runs.try_run], name="try")

    @app.callback()
    def program() -> None:
        pass

    return app


def add(
    app: typer.Typer, commands: list[Callable[..., None]], settings: dict[str, Any] | None = None, **how: Any
) -> None:
    for command in commands:
        app.command(cls=Command, context_settings=settings, **how)(command)


def describe_use(error: typer.TyperException) -> str:
    """What typer says of a wrong use, with the value that it got."""
    message = " ".join(error.format_message().replace("Value error, ", "").split())
    name, is_number, _ = message.partition("Input should be a valid ")
    if is_number and error.__cause__ is not None:  # pydantic's error, which knows the value
        first = error.__cause__.errors()[0]  # type: ignore[attr-defined]
        kind = "a whole number" if first["type"].startswith("int") else "a number"
        message = f"{name}must be {kind}; got {printable(repr(first['input']))}"
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "vqa-sft"
    end = "" if message.endswith((".", "?")) else "."
    return f"{message}{end} See `{command} --help`."


@exits_with_message
def main() -> None:
    # A terminal may not know every letter of the data.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        code = build_app()(prog_name="vqa-sft", standalone_mode=False)
    except typer.TyperException as error:
        raise InputError(describe_use(error)) from error
    sys.exit(code or 0)
