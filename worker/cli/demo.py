"""`mu2 demo`: one study through the whole system on this machine, every stage as it happens."""

import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from sqlalchemy.orm import Session

    from worker.core.records import Message, ReportVersion, Study
    from worker.demo.sender import Folder
    from worker.demo.study import Painted
    from worker.demo.system import System

WIDTH_WITHOUT_TERMINAL = 110
_SHORT_ID = 8


def demo(
    study: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Any folder of DICOM files instead of the synthetic study.")
    ] = None,
    serve: Annotated[bool, typer.Option("--serve", help="Keep everything up until Ctrl-C.")] = False,
    deadline: Annotated[float, typer.Option(min=1, metavar="SECONDS", help="Give up after this long.")] = 300.0,
) -> None:
    """Sends one study through the whole system on embedded parts; prints draft, ORU and acknowledgement.

    Nothing is left behind and nothing leaves this machine: Valkey, SQLite, the DICOM listener, the Celery worker and an
    HL7 receiver run on loopback ports in a temporary folder, or in MU2_HOME when that is set.
    """
    from rich.console import Console

    from dicom_listener.server import quieten_libraries
    from worker.core import logs, settings
    from worker.demo import sender, system
    from worker.demo import study as demo_study

    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = WIDTH_WITHOUT_TERMINAL
    logs.configure("demo", "error")
    quieten_libraries()
    current = settings.load()
    folder = study if study is not None else demo_study.FOLDER
    content = sender.read_folder(folder)
    console.print("Starting Valkey, the Celery worker and the DICOM listener ...")
    began = time.monotonic()
    with system.running(current, review=serve) as parts:
        dicom = parts.settings.dicom
        console.print(
            f"Ready after {time.monotonic() - began:.1f} s: DICOM {dicom.ae_title} on port {dicom.port}, "
            f"an HL7 receiver on port {parts.receiver.port}, everything else in {parts.settings.home}\n",
            soft_wrap=True,
        )
        run = _Run(console, parts, content, time.monotonic() + deadline)
        run.send()
        run.watch()
        drafted = run.show(demo_study.truth(folder))
        if serve:
            _serve(console, parts)
    if not drafted:
        raise typer.Exit(1)
    if not serve:
        _say_what_next(console)


class _Run:
    """One sending and what became of it."""

    def __init__(self, console: "Console", parts: "System", content: "Folder", deadline: float) -> None:
        self._console = console
        self._parts = parts
        self._content = content
        self._deadline = deadline
        self._began = time.monotonic()
        self._study_uids = sorted({o.study_uid for o in content.objects if o.study_uid})
        self._arriving: set[str] = set()  # those of which something was accepted

    def send(self) -> None:
        """Sends the folder and says what was refused."""
        from worker.demo import sender

        objects = self._content.objects
        self._line(
            "sending", f"{len(objects)} objects of {_count(self._study_uids, 'study', 'studies')}" + self._oddities()
        )
        dicom = self._parts.settings.dicom
        with self._console.status("") as status:
            sent = sender.send(
                objects,
                "127.0.0.1",
                dicom.port,
                called_ae=dicom.ae_title,
                progress=lambda done: status.update(f"{done} of {len(objects)} objects sent"),
            )
        self._arriving = sent.study_uids
        self._line("sent", f"{sent.accepted} accepted, {sent.bytes / 1e6:.1f} MB in {sent.seconds:.2f} s")
        for reason, count in sorted(sent.refused.items()):
            self._line("refused", f"{count} objects: {reason}")

    def watch(self) -> None:
        """Shows each change of state as it happens, of every study of which something was accepted."""
        from worker.demo import journey

        several = len(self._study_uids) > 1
        with self._console.status("") as status:
            steps = journey.follow(self._parts.database, self._arriving, self._deadline, self._parts.supervisor.check)
            for step in steps:
                name = f"{step.study_id[:_SHORT_ID]}  " if several else ""
                self._line(str(step.status), name + step.note)
                status.update("" if step.ended else f"{step.status} ...")

    def show(self, truth: "list[Painted] | None") -> bool:
        """Prints what came of every study; says whether each has an acknowledged draft."""
        import sqlalchemy as sa

        from worker.core.records import Study

        with self._parts.database.read() as session:
            studies = session.scalars(
                sa.select(Study).where(Study.study_instance_uid.in_(self._study_uids)).order_by(Study.id)
            ).all()
            if len(studies) < len(self._study_uids):
                self._console.print("\nNot every study arrived; see the refusals above.")
            shown = [self._show_study(session, row, truth) for row in studies]
        return bool(shown) and all(shown) and len(shown) == len(self._study_uids)

    def _show_study(self, session: "Session", study: "Study", truth: "list[Painted] | None") -> bool:
        from worker.core import reports
        from worker.core.records import MessageState
        from worker.demo import journey

        version = reports.latest(session, study.id)
        if version is None:
            self._explain(study)
            return False
        self._print_draft(version, truth)
        messages = journey.messages(session, study.id)
        for message in messages:
            self._print_message(message)
        if not messages:
            self._title("No message could be written for this draft")
            self._console.print("An ORU needs a patient id; this study names none. The draft is stored all the same.")
        self._title("Times")
        for timing in journey.timings(session, study):
            self._console.print(f"{timing.seconds:8.2f} s  {timing.stage}")
        return all(m.state is MessageState.ACKNOWLEDGED for m in messages)

    def _explain(self, study: "Study") -> None:
        logs = self._parts.settings.home / "logs"
        why = study.reason or f"it is still {study.status} at the deadline; the logs in {logs} say more"
        self._title(f"No draft: the study is {study.status}")
        self._console.print(why)
        for series in (study.choice or {}).get("series", []):
            self._console.print(f"  series {series['series_number']}: {series['reason']}")

    def _print_draft(self, version: "ReportVersion", truth: "list[Painted] | None") -> None:
        from rich.text import Text

        from worker.core import reports
        from worker.core.report import DISCLOSURE, canonical_text

        provenance = version.provenance or {}
        model = f"{provenance.get('model_name', '?')} {provenance.get('model_version', '')}".strip()
        self._title(f"Draft, version {version.number}, by {model}")
        text = canonical_text(reports.to_sentence(row) for row in version.sentences)
        self._console.print(Text(text))
        self._console.print(Text(f"\n{DISCLOSURE}"))
        if truth is not None:
            self._print_truth(truth, text)

    def _print_truth(self, truth: "list[Painted]", text: str) -> None:
        from rich.table import Table

        from worker.cli import demo_truth

        self._title("The known truth of this synthetic study beside the draft")
        rows = demo_truth.compare(truth, text)
        table = Table("finding", "known truth", "in the draft")
        for row in rows:
            table.add_row(row.finding, row.painted, row.drafted)
        self._console.print(table)
        named = sum(row.painted != demo_truth.NOT_PAINTED and row.drafted != demo_truth.NOT_NAMED for row in rows)
        beside = sum(row.painted == demo_truth.NOT_PAINTED for row in rows)
        self._console.print(
            f"The draft names {named} of {len(truth)} findings with their side, and {_count_of(beside, 'other')}; "
            "read from its text by rules."
        )

    def _print_message(self, message: "Message") -> None:
        from rich.text import Text

        self._title(f"ORU^R01 as sent to destination {message.destination}")
        for segment in message.payload.decode("utf-8", errors="replace").split("\r"):
            self._console.print(Text(segment), soft_wrap=True)
        self._title("Acknowledgement")
        answer = message.acknowledgement or "none"
        self._console.print(f"MSA|{answer}|{message.control_id}  ({message.state}, {message.attempts} tries)")
        if message.error:
            self._console.print(message.error)

    def _oddities(self) -> str:
        odd = []
        if self._content.foreign:
            odd.append(f"{self._content.foreign} files that are no DICOM objects left out")
        if self._content.directories:
            odd.append(f"{self._content.directories} DICOMDIR left out")
        return f" ({', '.join(odd)})" if odd else ""

    def _line(self, state: str, note: str) -> None:
        self._console.print(f"{time.monotonic() - self._began:7.2f} s  {state:<10} {note}".rstrip())

    def _title(self, text: str) -> None:
        self._console.print()
        self._console.rule(text, align="left", characters="─")


def _count_of(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'s' if number > 1 else ''}"


def _count(things: list[str], one: str, many: str) -> str:
    return f"{len(things)} {one if len(things) == 1 else many}"


def _serve(console: "Console", parts: "System") -> None:
    import signal

    from worker.demo import account as demo_account

    dicom = parts.settings.dicom
    console.print(
        f"\nEverything stays up. Send more studies to {dicom.ae_title} on 127.0.0.1:{dicom.port}, for example:"
    )
    console.print(f"  storescu -aec {dicom.ae_title} 127.0.0.1 {dicom.port} FILE ...")
    console.print(f"Look at them from another terminal:\n  MU2_HOME={parts.settings.home} mu2 study list")
    page = parts.settings.review
    user, password = demo_account.make(parts.database)
    console.print(f"Read, correct and sign: http://{page.host}:{page.port} as {user} with password {password}")
    console.print("Ctrl-C stops.")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    while not stop.wait(0.5):
        parts.supervisor.check()


def _say_what_next(console: "Console") -> None:
    console.print("\nWhat next:")
    console.print("  mu2 demo --study DIR   the same with your own DICOM files (nothing leaves this machine)")
    console.print("  mu2 demo --serve       keep it up and send to it")
    console.print(
        "  mu2 up                 the services for real use; mu2.toml names peers and destinations (README.md)"
    )
    console.print("  mu2 doctor             says what is missing and what to do")
