"""The --help of commands with many options: in groups, every option once, with its default."""

from __future__ import annotations

import argparse
import ast
import inspect
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any

METAVARS: dict[Any, str] = {int: "N", float: "X", str: "VALUE"}


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Shows an option by its first long spelling, and its default unless the text has it."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        name = next((name for name in action.option_strings if name.startswith("--")), action.option_strings[0])
        return name if action.nargs == 0 else f"{name} {self._format_args(action, '')}"

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.default in (None, argparse.SUPPRESS) or "default" in text or action.nargs == 0:
            return text
        shown = str(action.default).lower() if isinstance(action.default, bool) else action.default
        return f"{text} (default {shown})"


class _HelpAll(argparse.Action):
    """Print the help of all options."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        assert isinstance(parser, GroupedHelp)
        rare, parser.rare = parser.rare, frozenset()
        parser.print_help()
        parser.rare = rare
        parser.exit()


class GroupedHelp(argparse.ArgumentParser):
    """A parser whose --help leaves out the options in `rare`; --help-all shows all."""

    rare: frozenset[str] = frozenset()

    def describe_groups(self, rare: Iterable[str], descriptions: Mapping[str, str]) -> None:
        """Set what --help leaves out, and the line below the name of each group. Call it when all options are added."""
        self.formatter_class = _Formatter
        self.rare = frozenset(rare)
        self.usage = "%(prog)s [options]"
        self.add_argument(
            "--help-all", "--help_all", action=_HelpAll, nargs=0, dest="help", default=argparse.SUPPRESS,
            help="show all options, also those that are rarely needed",
        )  # fmt: skip
        for group in self._action_groups:
            group.description = descriptions.get(group.title or "")
        for action in self._actions:
            if action.option_strings and action.option_strings[0].startswith("--no_"):
                action.help = argparse.SUPPRESS
            elif action.nargs == "?" and action.const is True:
                action.metavar = "true|false"
            elif action.nargs != 0:
                action.metavar = METAVARS.get(action.type)

    def format_help(self) -> str:
        """Format the help without the rare options."""
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        for group in self._action_groups:
            formatter.start_section(group.title)
            formatter.add_text(group.description)
            formatter.add_arguments([action for action in group._group_actions if action.dest not in self.rare])
            formatter.end_section()
        return formatter.format_help()


def document(section: type, registries: Mapping[str, Iterable[str]]) -> None:
    """Use the docstring below each field as its --help text."""
    [definition] = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    assert isinstance(definition, ast.ClassDef)
    texts = {}
    for before, after in zip(definition.body, definition.body[1:], strict=False):
        is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if is_text and isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name):
            texts[before.target.id] = str(after.value.value)  # type: ignore[attr-defined]
    for item in fields(section):
        text = texts[item.name].replace("{names}", ", ".join(registries.get(item.name, ())))
        item.metadata = MappingProxyType({"help": text.replace("%", "%%")})
