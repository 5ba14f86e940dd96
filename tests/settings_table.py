"""The settings table of the README, made from the code: `python -m tests.settings_table` writes it anew."""

import re
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from worker.core.settings import Settings

README = Path(__file__).resolve().parents[1] / "README.md"
HEAD = "| variable | default | meaning |\n|---|---|---|\n"
_EMPTY = {"None", "", "()", "{}", "**********"}


def settings_of(model: type[BaseModel], above: str = "MU2_") -> Iterator[tuple[str, str, str]]:
    """(environment variable, default as text, sentence) of every setting."""
    for name, field in model.model_fields.items():
        variable = f"{above}{name.upper()}"
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from settings_of(kind, f"{variable}__")
        else:
            yield variable, str(field.default), field.description or ""


def table() -> str:
    """The rows as they stand in the README."""
    shown = (
        (name, "—" if default in _EMPTY else f"`{default}`", text) for name, default, text in settings_of(Settings)
    )
    return "".join(f"| `{name}` | {default} | {text} |\n" for name, default, text in shown)


def told(readme: str) -> str:
    """The rows that the README has now."""
    match = re.search(re.escape(HEAD) + r"((?:\| `MU2_.*\n)*)", readme)
    return match.group(1) if match else ""


if __name__ == "__main__":
    text = README.read_text()
    README.write_text(text.replace(HEAD + told(text), HEAD + table()))
