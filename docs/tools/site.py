"""Hooks of MkDocs: formulas become MathML, pictures become part of their page, commands get tables of their options.

A built page needs no other host and no JavaScript for any of these. `mkdocs.yml` names this file.
"""

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

PICTURES = Path(__file__).resolve().parents[1] / "pictures"

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_PICTURE = re.compile(r'<img alt="([^"]*)" src="[^"]*pictures/([\w-]+\.svg)"[^>]*/?>')
_OPTIONS = re.compile(r"^<!-- options of (\w+) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace `<!-- options of COMMAND -->` by a table of what `twa-scale COMMAND --help` lists."""
    return _OPTIONS.sub(lambda match: options(match[1]), markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Replace formulas by MathML, and references to our SVG files by the files."""
    content = _FORMULA.sub(lambda match: formula(html.unescape(match[3]), block=match[2] == "["), content)
    return _PICTURE.sub(lambda match: picture(match[2], match[1]), content)


def formula(latex: str, *, block: bool) -> str:
    """Return MathML of one formula in LaTeX."""
    return convert(latex.strip(), display="block" if block else "inline")


def picture(name: str, description: str) -> str:
    """Return an SVG file as an element of the page, which then follows the colors that the reader has chosen."""
    svg = (PICTURES / name).read_text(encoding="utf-8")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{description}" class="picture" ', 1)


def options(command: str) -> str:
    """Return a Markdown table of the arguments and options of one command."""
    import typer.main

    from twa_scale.cli import app

    command_object = typer.main.get_command(app).commands[command]  # type: ignore[attr-defined]
    rows = ["| argument or option | default | meaning |", "| --- | --- | --- |"]
    for parameter in command_object.params:
        if parameter.name != "help" and not getattr(parameter, "hidden", False):
            rows.append("| " + " | ".join(_escaped(cell) for cell in _cells(parameter)) + " |")
    return "\n".join(rows)


def _cells(parameter: Any) -> tuple[str, str, str]:
    names = parameter.opts + parameter.secondary_opts
    if parameter.param_type_name == "argument":
        names = [parameter.metavar or parameter.name.upper()]
    default = parameter.default
    default_text = (
        "" if default is None or default is False or callable(default) or default in ((), []) else f"`{default}`"
    )
    if parameter.required:
        default_text = "required"
    return ", ".join(f"`{name}`" for name in names), default_text, " ".join((parameter.help or "").split())


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")
