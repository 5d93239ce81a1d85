"""Hooks of MkDocs (`make docs`): what pages refer to outside docs/, and the help texts of all commands."""

import re
from typing import Any

import click

from imnet_prep.cli.mobilenet import main as mbv2
from imnet_prep.cli.prep import main as imnet_prep

_ROLE = re.compile(r":(?:class|func|meth|data|mod):<code>~?(?:[\w.]+\.)?(\w+)</code>")


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Return the page with the commands, and with links out of docs/ as links to the repository."""
    if page.file.src_uri == "commands.md":
        markdown += "".join(_texts(imnet_prep, "imnet-prep")) + "".join(_texts(mbv2, "mbv2"))
    up = "../" * (page.file.src_uri.count("/") + 1)
    return re.sub(rf"\]\({re.escape(up)}(?=\w)", f"]({config.repo_url}/blob/main/", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Return the page with the names alone of what docstrings refer to."""
    return _ROLE.sub(r"<code>\1</code>", html)


def on_post_page(output: str, **_: Any) -> str:
    """Return the page without what makes the theme ask api.github.com how many stars the repository has."""
    return output.replace(' data-md-component="source"', "")


def _texts(group: click.Group, name: str) -> list[str]:
    context = click.Context(group, info_name=name, **{**group.context_settings, "terminal_width": 76})
    texts = [f"\n## {name}\n\n```text\n{context.get_help()}\n```\n"]
    for command in map(group.commands.__getitem__, group.list_commands(context)):
        help_text = click.Context(command, context, command.name).get_help()
        texts.append(f"\n### {name} {command.name}\n\n```text\n{help_text}\n```\n")
    return texts
