"""Command lines out of dataclasses: one place for the name, the default, the type and the help text of a setting."""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any


def option(default: Any, text: str, *choices: str) -> Any:
    """A dataclass field with the help text, and perhaps the choices, of its command-line flag."""
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices or None})


def flag(name: str) -> str:
    """The command-line flag of a field."""
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line, and flags cannot be shortened.

    `prog` is the script's path from the root of the project.
    """

    def __init__(self, **more: Any):
        super().__init__(allow_abbrev=False, **more)

    def error(self, message: str) -> None:
        self.exit(2, f"{Path(self.prog).name}: {message:.300} (see python {self.prog} --help)\n")

    def add_fields(self, cls: type, title: str, varied: set[str] | None = None) -> None:
        """A flag for each field of a dataclass that has a help text, without a default of its own: with
        `argument_default=argparse.SUPPRESS` only what was given ends up in the namespace.

        The help names the field's default, or, if `varied` is given, says which defaults vary with it.
        """
        group = self.add_argument_group(title)
        for f in (f for f in dataclasses.fields(cls) if "help" in f.metadata):
            text, choices, kind = f.metadata["help"].replace("%", "%%"), f.metadata["choices"], type(f.default)
            if "(default" not in text and varied is not None:
                text += f" (default: {f.default}{', or that of the preset' if f.name in varied else ''})"
            if kind is bool:
                group.add_argument(flag(f.name), action=argparse.BooleanOptionalAction, help=text)
            else:
                metavar = f"{{{','.join(choices)}}}" if choices else {int: "N", float: "X", str: "TEXT"}[kind]
                read = folder_name if f.name.endswith("_dir") else kind
                group.add_argument(flag(f.name), type=read, metavar=metavar, help=text)


def folder_name(text: str) -> str:
    """For argparse: the type of a flag that names a folder, perhaps below ~; an empty one stays empty."""
    try:
        return str(Path(text).expanduser()) if text else ""
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text:.40}: there is no such user") from None


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """For argparse: the type of a flag that takes a whole number from `low` to `high`."""

    def number(text: str) -> int:
        with contextlib.suppress(ValueError):
            if low <= int(text) <= high:
                return int(text)
        raise argparse.ArgumentTypeError(f"{text:.40} is not a whole number from {low:,} to {high:,}")

    return number
