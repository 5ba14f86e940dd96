"""Templates and what they print: names, times, ages, and the words that stand on every page."""

import html
import re
from collections.abc import Mapping
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from fastapi import Request
from fastapi.responses import HTMLResponse, Response
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from worker.core.records import Priority
from worker.core.report import DISCLOSURE
from worker.core.settings import Settings
from worker.review.access import Login
from worker.review.desk import Office

TEMPLATES = Path(__file__).parent / "templates"


def make_templates(settings: Settings) -> Environment:
    """The template environment: every value is escaped, a name that is not there is an error."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        person=person_name,
        age=age,
        clock=clock,
        day=day,
        why=why,
        priority=priority_name,
    )
    environment.globals.update(disclosure=DISCLOSURE, review=settings.review)
    return environment


def render(found: Office, login: Login | None, name: str, *, status: int = 200, **values: Any) -> HTMLResponse:
    """A page or a piece of one."""
    text = found.templates.get_template(name).render(login=login, **values)
    return HTMLResponse(text, status_code=status)


def is_fragment(request: Request) -> bool:
    """Whether htmx asks for a piece of a page."""
    return request.headers.get("HX-Request") == "true"


def error_page(status: int, sentence: str, headers: Mapping[str, str] | None = None) -> Response:
    """A page with one sentence; it needs no template, so that it shows whatever is broken."""
    body = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Review</title>'
        '<meta name="viewport" content="width=device-width">'
        '<link rel="stylesheet" href="/static/review.css"></head><body class="plain"><main class="card">'
        f'<h1>{status}</h1><p role="alert">{html.escape(sentence)}</p><p><a href="/">Worklist</a></p>'
        f'<p class="warning" role="note">{DISCLOSURE}</p></main></body></html>'
    )
    return HTMLResponse(body, status_code=status, headers=dict(headers or {}))


def person_name(name: str) -> str:
    """A DICOM person name (`DOE^JANE^M`) as people write it in lists: `DOE, JANE M`."""
    group = next((g for g in name.split("=") if g.strip("^ ")), "")
    family, _, rest = group.partition("^")
    given = " ".join(part for part in rest.split("^") if part)
    return ", ".join(part for part in (family.strip(), given.strip()) if part) or "(no name)"


def age(at: datetime | None) -> str:
    """How long ago, in the largest whole unit."""
    if at is None:
        return ""
    seconds = max(0, int((datetime.now(UTC) - at).total_seconds()))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return "now"


def clock(at: datetime | None) -> str:
    """A time to the minute in the server's zone; a scanner's clock as it stands."""
    if at is None:
        return ""
    return (at.astimezone() if at.tzinfo else at).strftime("%Y-%m-%d %H:%M")


def day(value: date | None) -> str:
    """A date."""
    return value.isoformat() if value else ""


def why(reason: str) -> str:
    """A reason as readers need it: without the name of the error's class, which stands in the queue's page."""
    return re.sub(r"^[A-Z]\w*Error: ", "", reason)


def priority_name(value: int) -> str:
    """The rank as a word."""
    return Priority(value).name
