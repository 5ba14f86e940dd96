"""Seeded chaos: kills over every process and stage while studies arrive, then the ledger.

    python -m tests.end_to_end.chaos --seed 1 --kills 200 [--database postgresql]

Two PACS send without a pause, late slices and repeats among it, the receiver answers every fourth message badly or not
at all, two workers share the queue, and every few seconds a process dies in the middle of something. Exit code 0 when
nothing that was acknowledged is lost, nothing stood still for a minute, and no report was accepted twice.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from redis import Redis
from redis.exceptions import RedisError
from rich.console import Console
from rich.table import Table

from dicom_listener.server import quieten_libraries
from tests.conftest import free_port
from tests.end_to_end import chaos_ledger
from tests.end_to_end.chaos_ledger import STUCK_SECONDS, Verdict
from tests.end_to_end.chaos_load import Pacs
from tests.end_to_end.running_services import Services, settings
from tests.postgres import PostgresServer
from worker.core import logs, schema
from worker.core.database import Database
from worker.core.records import Attempt, Message, MessageState, Study, StudyStatus
from worker.core.settings import Settings
from worker.delivery.mllp_receiver import Behaviour, MllpReceiver
from worker.services import broker_service, listener_service, with_chosen_ports, worker_service
from worker.supervisor import Service

PACS = 2
WORKERS = ("worker-a", "worker-b")
BETWEEN_SECONDS = (0.5, 4.0)  # from the moment when somebody can work again
AT_ONCE_SHARE = 0.25
TICK_SECONDS = 0.5
AIM_SECONDS = 4.0  # how long a stage is waited for; then the kill falls where it falls
LOOK_SECONDS = 0.003
FINISH_SECONDS = 60.0
BAD_ANSWERS = (
    Behaviour.AE,
    Behaviour.CE,
    Behaviour.CLOSE,
    Behaviour.HANG,
    Behaviour.HANG,  # twice, because a sender is caught most easily while it waits
    Behaviour.GARBAGE,
    Behaviour.OTHER_CONTROL_ID,
    Behaviour.HALF,
)
GOOD_ANSWERS = (Behaviour.AA, Behaviour.CA, Behaviour.AA_THEN_CLOSE)
BAD_SHARE = 0.25
MOST_ANSWERS = 100_000


@dataclass(frozen=True)
class Blow:
    """What dies, and in which moment."""

    target: str
    moment: str


BLOWS = (
    Blow("listener", "receiving"),
    Blow("listener", "any"),
    Blow("worker", "preparing"),
    Blow("worker", "drafting"),
    Blow("both workers", "delivering"),
    Blow("worker", "any"),
    Blow("valkey", "any"),
    Blow("FLUSHALL", "any"),
    Blow("everything", "any"),
)


class Chaos:
    """One run."""

    def __init__(self, seed: int, kills: int, home: Path, console: Console, database_url: str = "") -> None:
        self.seed, self.kills, self.home, self.console = seed, kills, home, console
        self.database_url = database_url  # empty: SQLite
        self.blows: Counter[Blow] = Counter()
        self.on_target: Counter[Blow] = Counter()
        self.verdict = Verdict()
        self._random = random.Random(seed)
        self._deck: list[Blow] = []
        self._was_at_once = False
        self._stuck: set[str] = set()

    def run(self) -> Verdict:
        """Starts everything, strikes, waits for the end, reads the ledger."""
        with MllpReceiver(script=self._answers()) as receiver:
            config = _settings(self.home, receiver.port, self.database_url)
            self._services = Services.start(config, _services(config))
            try:
                self._pacs = [
                    Pacs(number, self.seed, config.dicom.port, self.home / "pacs") for number in range(1, PACS + 1)
                ]
                for pacs in self._pacs:
                    pacs.start()
                for number in range(1, self.kills + 1):
                    self._breathe()
                    self._strike(number, self._next_blow())
                self._settle()
                self._examine(receiver)
            finally:
                self._services.stop()
        return self.verdict

    def _breathe(self) -> None:
        """The pause before a blow.

        Mostly until somebody can work again, because a system whose every worker is killed while it starts stands still
        by the tester's hand; one blow in four follows the last at once, but never two in a row.
        """
        at_once = not self._was_at_once and self._random.random() < AT_ONCE_SHARE
        self._was_at_once = at_once
        if at_once:
            return
        limit = time.monotonic() + STUCK_SECONDS
        while not self._can_work():
            if time.monotonic() > limit:
                self.verdict.notes.append("stuck: services that did not come back")
                self._stuck.add(f"services {len(self._stuck)}")
                break
            self._wait(TICK_SECONDS)
        self._wait(self._random.uniform(*BETWEEN_SECONDS))

    def _can_work(self) -> bool:
        ready = self._services.supervisor.ready
        return ready["valkey"] and ready["listener"] and any(ready[name] for name in WORKERS)

    def _next_blow(self) -> Blow:
        """Every blow once in random order, then again: a short run meets them all."""
        if not self._deck:
            self._deck = self._random.sample(BLOWS, len(BLOWS))
        return self._deck.pop()

    def _strike(self, number: int, blow: Blow) -> None:
        hit, victim = self._aim(blow)
        self._fell(blow.target, victim)
        self.blows[blow] += 1
        self.on_target[blow] += hit
        self.console.print(f"{number:4d}  {blow.target:<12} {blow.moment:<10} {'' if hit else '(missed the moment)'}")

    def _aim(self, blow: Blow) -> tuple[bool, int | None]:
        """Waits for the moment; says whether it came, and which process is in it where that is known."""
        moments: dict[str, Callable[[], tuple[bool, int | None]]] = {
            "any": lambda: (True, None),
            "receiving": lambda: (any(p.is_sending.is_set() for p in self._pacs), None),
            "preparing": lambda: self._holder(StudyStatus.PREPARING),
            "drafting": lambda: self._holder(StudyStatus.DRAFTING),
            "delivering": self._delivering,
        }
        limit = time.monotonic() + AIM_SECONDS
        while time.monotonic() < limit:
            come, pid = moments[blow.moment]()
            if come:
                return True, pid
            time.sleep(LOOK_SECONDS)
        return False, None

    def _fell(self, target: str, victim: int | None) -> None:
        if target == "FLUSHALL":
            try:
                Redis(unix_socket_path=str(self._services.settings.broker_socket)).flushall()
            except RedisError:
                return  # the broker is down from the last blow: as empty as it gets
            return
        names = {
            "worker": [self._random.choice(WORKERS)],
            "both workers": list(WORKERS),
            "everything": [*WORKERS, "listener", "valkey"],
        }
        pids = [victim] if victim else [self._services.supervisor.pid(n) for n in names.get(target, [target])]
        for pid in filter(None, pids):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue  # fell already

    def _holder(self, status: StudyStatus) -> tuple[bool, int | None]:
        """Whether a study is under way there, and the process that has it."""
        with self._services.database.read() as session:
            worker = session.scalar(
                sa.select(Attempt.worker)
                .join(Study, Study.lease_token == Attempt.token)
                .where(Study.status == status)
                .limit(1)
            )
        pid = int(worker.split(":")[1]) if worker else 0
        return pid in {self._services.supervisor.pid(name) for name in WORKERS}, pid

    def _delivering(self) -> tuple[bool, int | None]:
        with self._services.database.read() as session:
            found = session.scalar(sa.select(Message.id).where(Message.state == MessageState.SENT).limit(1))
        return found is not None, None

    def _wait(self, seconds: float) -> None:
        """Waits, and looks out for whatever stands still."""
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            with self._services.database.read() as session:
                self._stuck |= chaos_ledger.stuck(session)
            time.sleep(min(TICK_SECONDS, max(0.0, limit - time.monotonic())))

    def _settle(self) -> None:
        """Lets the PACS end their studies and gives the system a minute to end its own work."""
        for pacs in self._pacs:
            pacs.finish(FINISH_SECONDS)
        limit = time.monotonic() + STUCK_SECONDS
        left = 1
        while left and time.monotonic() < limit:
            self._wait(0.5)
            with self._services.database.read() as session:
                left = chaos_ledger.unfinished(session)
        self.verdict.stuck = max(len(self._stuck), left)
        self.verdict.notes.extend(f"stuck: {what}" for what in sorted(self._stuck))

    def _examine(self, receiver: MllpReceiver) -> None:
        sent = [study for pacs in self._pacs for study in pacs.studies]
        accepting = {*GOOD_ANSWERS}
        accepted = [m.control_id for m in receiver.received if m.behaviour in accepting]
        with self._services.database.read() as session:
            chaos_ledger.examine(session, self._services.settings.store_root, sent, accepted, self.verdict)
        counts = self.verdict.counts
        counts["messages received"] = len(receiver.received)
        counts["studies not sent whole"] = sum(not study.whole for study in sent)
        counts["associations broken"] = sum(pacs.broken_associations for pacs in self._pacs)
        counts.update({f"restarts of {name}": n for name, n in self._services.supervisor.restarts.items()})

    def _answers(self) -> list[Behaviour]:
        answers = random.Random(f"{self.seed}-answers")
        return [
            answers.choice(BAD_ANSWERS if answers.random() < BAD_SHARE else GOOD_ANSWERS) for _ in range(MOST_ANSWERS)
        ]


def _settings(home: Path, receiver_port: int, database_url: str) -> Settings:
    destination = {
        "name": "ris",
        "host": "127.0.0.1",
        "port": receiver_port,
        "drafts": "R",
        "connect_seconds": 1.0,
        "answer_seconds": 1.0,
    }
    return with_chosen_ports(
        settings(
            home,
            dicom={"quiet_seconds": 1.0},
            # nothing is given up here: a study may die with its worker many times in a row
            queue={"max_attempts": 1000, "max_crashes": 1000, "lease_seconds": 4.0},
            hl7={"destinations": [destination], "max_attempts": 1000},
            database={"url": database_url},
        )
    )


def _services(config: Settings) -> list[Service]:
    other = config.model_copy(update={"worker": config.worker.model_copy(update={"metrics_port": free_port()})})
    return [
        broker_service(config),
        worker_service(config, WORKERS[0]),
        worker_service(other, WORKERS[1]),
        listener_service(config),
    ]


def _print(chaos: Chaos, seconds: float) -> None:
    table = Table(title=f"{chaos.kills} kills in {seconds:.0f} s, seed {chaos.seed}")
    table.add_column("what died, and when")
    table.add_column("kills", justify="right")
    table.add_column("in that moment", justify="right")
    for blow in BLOWS:
        table.add_row(f"{blow.target}, {blow.moment}", str(chaos.blows[blow]), str(chaos.on_target[blow]))
    chaos.console.print(table)
    for name, count in sorted(chaos.verdict.counts.items()):
        chaos.console.print(f"  {name:<28} {count:>7}")
    verdict = chaos.verdict
    for note in dict.fromkeys(verdict.notes):
        chaos.console.print(f"  {note} (x{verdict.notes.count(note)})")
    chaos.console.print(
        f"lost={verdict.lost} stuck={verdict.stuck} accepted_twice={verdict.accepted_twice} "
        f"out_of_order={verdict.out_of_order}"
    )


def _postgresql(home: Path) -> PostgresServer:
    """A server of its own, which no blow falls on: what it promises is its own affair."""
    server = PostgresServer(home / "postgresql", free_port())
    server.initialise()
    server.start()
    database = Database(server.url)
    schema.upgrade(database)
    database.close()
    return server


def main() -> int:
    """Runs the chaos; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="sqlite")
    arguments = parser.parse_args()
    for name in [name for name in os.environ if name.startswith("MU2_")]:
        del os.environ[name]
    os.environ["MU2_CONFIG"] = os.devnull
    os.environ["OMP_NUM_THREADS"] = "1"
    logs.configure("chaos", "critical")
    quieten_libraries()
    home = Path(tempfile.mkdtemp(prefix="mu2-chaos-"))
    console = Console(highlight=False, markup=False)
    server = _postgresql(home) if arguments.database == "postgresql" else None
    chaos = Chaos(arguments.seed, arguments.kills, home, console, server.url if server else "")
    started = time.monotonic()
    try:
        verdict = chaos.run()
    finally:
        if server:
            server.kill()
    _print(chaos, time.monotonic() - started)
    if not verdict.is_clean:
        console.print(f"Everything is kept in {home}.")
        return 1
    shutil.rmtree(home)
    return 0


if __name__ == "__main__":
    sys.exit(main())
