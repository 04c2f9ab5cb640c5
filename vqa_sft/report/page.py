"""What the pages share: how a template is filled, and how texts of the data are shown. No torch."""

import functools
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

_FOLDER = Path(__file__).parent
_MAX_CHARS = 600


def shown(text: str, limit: int = _MAX_CHARS) -> str:
    """Data on the page: not endless, and without characters that turn or hide the text around them."""
    text = text if len(text) <= limit else text[:limit] + " ..."
    # The joiners are part of words in many scripts, and of emoji.
    return "".join(c if c.isprintable() or c in "\n\u200c\u200d" else ascii(c)[1:-1] for c in text)


def render(template: str, **values: Any) -> str:
    """A template of this folder, filled; whatever is put into it is escaped, unless it is Markup."""
    return _find_template(template).render(style=read_markup("page.css"), **values)


@functools.cache
def _find_template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["shown"] = shown
    return environment.from_string((_FOLDER / name).read_text(encoding="utf-8"))


@functools.cache
def read_markup(name: str) -> Markup:
    """A file of this folder, such as the style, as it is."""
    return Markup((_FOLDER / name).read_text(encoding="utf-8"))
