"""python tests/update_readme.py   rewrites the help texts in docs/commands.md, between <!-- help:COMMAND --> and <!-- end -->."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click

REFERENCE = Path(__file__).parent.parent / "docs" / "commands.md"
WIDTH = 80
BLOCK = re.compile(r"<!-- help:([a-z ]+) -->\n(.*?)<!-- end -->\n", re.DOTALL)


def commands() -> Iterator[tuple[str, click.Context]]:
    """Every command by its full name (`edgeprune`, `edgeprune build`, `edgeprune targets show`), with its context."""
    from edgeprune.cli import cli

    def walk(command: click.Command, name: str, parent: click.Context | None) -> Iterator[tuple[str, click.Context]]:
        settings = {"terminal_width": WIDTH, "max_content_width": WIDTH, **command.context_settings}
        context = click.Context(command, parent=parent, info_name=name, **settings)
        yield context.command_path, context
        if isinstance(command, click.Group):
            for child in command.list_commands(context):
                found = command.get_command(context, child)
                assert found is not None
                yield from walk(found, child, context)

    yield from walk(cli, "edgeprune", None)


def block(context: click.Context) -> str:
    """What stands between the markers of a command."""
    return f"```console\n$ {context.command_path} --help\n{context.get_help()}\n```\n"


def blocks(text: str) -> dict[str, str]:
    """The blocks of the reference, by command."""
    return {match[1]: match[2] for match in BLOCK.finditer(text)}


def updated(text: str) -> str:
    """The reference with the help of every command; a command without markers follows the one before it."""
    previous = ""
    for name, context in commands():
        new = f"<!-- help:{name} -->\n{block(context)}<!-- end -->\n"
        start = text.find(f"<!-- help:{name} -->\n")
        if start < 0:
            if not previous:
                raise SystemExit(f"{REFERENCE.name} has no <!-- help:{name} --> to start from")
            at = text.index("<!-- end -->\n", text.index(f"<!-- help:{previous} -->\n")) + len("<!-- end -->\n")
            text = f"{text[:at]}\n{new}{text[at:]}"
        else:
            end = text.index("<!-- end -->\n", start) + len("<!-- end -->\n")
            text = text[:start] + new + text[end:]
        previous = name
    return text


if __name__ == "__main__":
    REFERENCE.write_text(updated(REFERENCE.read_text(encoding="utf-8")), encoding="utf-8")
