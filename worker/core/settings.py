"""Every setting of the system: one frozen object, read once at a process's entry; long, so that there is one place to look.

Order of precedence: what a command line passes, environment (`MU2_` and `__` between the levels), `mu2.toml` in the
working folder or at `MU2_CONFIG`, default. Unknown keys are errors. A secret may come from a file: put its path in
the variable with `_FILE` appended (`MU2_DATABASE__URL_FILE`).
"""

import hashlib
import ipaddress
import os
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from worker.core.errors import SettingsError

PREFIX = "MU2_"
MOST_SOCKET_PATH_BYTES = 107  # of sockaddr_un on Linux
SHORTEST_PSEUDONYM_KEY = 32
DELIMITER = "__"
CONFIG_VARIABLE = "MU2_CONFIG"
BROKERS = ("redis", "rediss", "redis+socket")
DATABASES = ("sqlite", "postgresql+psycopg")
AeTitle = Annotated[str, Field(min_length=1, max_length=16, pattern=r"^[ -\[\]-~]+$")]
Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(gt=0)]
Minutes = Annotated[float, Field(gt=0)]


class _Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Peer(_Group):
    """A DICOM application entity that may connect, and how its studies rank."""

    ae_title: AeTitle = Field(description="Calling AE title of the peer.")
    address: str = Field(
        "", description="Address or network (CIDR), no host name, that it must come from; empty accepts any."
    )
    port: Port = Field(0, description="Its own DICOM port, for storage commitment reports; 0 when it has none.")
    priority: Literal["stat", "urgent", "routine"] | None = Field(None, description="Rank of all its studies.")
    tls: bool = Field(
        False, description="It speaks TLS and is refused without; storage commitment reports go to it by TLS."
    )

    @field_validator("address")
    @classmethod
    def _is_address(cls, value: str) -> str:
        try:
            if value:
                ipaddress.ip_network(value, strict=False)
            return value
        except ValueError:
            raise ValueError(
                "give the peer's IP address (10.1.2.3) or network (10.1.2.0/24); host names are not looked up"
            ) from None


class DicomSettings(_Group):
    """The listener."""

    ae_title: AeTitle = Field("MU2", description="Called AE title that peers must use.")
    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 for every interface.")
    port: Port = Field(11112, description="DICOM port; 0 takes a free one.")
    quiet_seconds: Seconds = Field(30.0, description="A study is complete when nothing arrived for this long.")
    open_association_limit_seconds: Seconds = Field(
        600.0, description="An open association that sent nothing for this long no longer holds its study back."
    )
    peers: tuple[Peer, ...] = Field((), description="Who may connect; empty accepts any caller from this machine only.")
    any_peer: bool = Field(False, description="Accept any calling AE title from any address (test networks only).")
    max_associations: int = Field(64, ge=1, description="Associations served at once; more are refused.")
    max_pdu_bytes: int = Field(262_144, ge=4_096, le=16_777_216, description="Largest P-DATA PDU we accept.")
    processes: int = Field(1, ge=1, le=32, description="Receiving processes that share the port.")
    artim_seconds: Seconds = Field(10.0, description="Wait for TLS handshake and association request.")
    idle_seconds: Seconds = Field(60.0, description="Wait for the next message, or the rest of one.")
    keep_other_objects: bool = Field(True, description="Keep objects that are not CT images (never reported).")
    storage_commitment: bool = Field(False, description="Offer Storage Commitment; a modality may then erase its copy.")
    tls_certificate: Path | None = Field(
        None, description="Certificate (PEM); with the key, the port speaks TLS only, or tls_port where that is set."
    )
    tls_port: Port | None = Field(
        None, description="A second port, which speaks TLS; the first then speaks plainly. 0 takes a free one."
    )
    tls_key: Path | None = Field(None, description="Private key (PEM) of the certificate.")
    tls_ca: Path | None = Field(
        None, description="CA (PEM) that client certificates must come from; unset asks for none."
    )
    metrics_host: str = Field("127.0.0.1", description="Address of /livez, /readyz and /metrics of the listener.")
    metrics_port: Port = Field(
        9101, description="Port of /livez, /readyz and /metrics of the listener; 0 takes a free one."
    )

    @model_validator(mode="after")
    def _ports_differ(self) -> Self:
        if self.tls_port and self.tls_port == self.port:
            raise ValueError("tls_port must differ from port; leave it out where the one port speaks TLS only")
        return self


class StoreSettings(_Group):
    """The instance store."""

    url: str = Field("", description="Folder of the instance store; empty means MU2_HOME/store.")
    floor_bytes: int = Field(1_000_000_000, ge=0, description="Refuse instances (0xA700) below this much free disk.")

    @field_validator("url")
    @classmethod
    def _is_a_folder(cls, url: str) -> str:
        if "://" in url:
            raise ValueError("the store is a folder, local or shared; object stores are not supported")
        return url


class QueueSettings(_Group):
    """Redis or Valkey, the doorbell."""

    url: SecretStr = Field(SecretStr(""), description="Broker URL; empty means the embedded Valkey under MU2_HOME.")
    sweep_seconds: Seconds = Field(2.0, description="How often one worker re-submits what is due.")
    lease_seconds: Seconds = Field(60.0, description="A claim without heartbeat is free again after this long.")
    max_attempts: int = Field(8, ge=1, description="Attempts of one stage before the study fails.")
    max_crashes: int = Field(3, ge=1, description="Leases lost in one stage before the study is quarantined as failed.")
    backoff_seconds: Seconds = Field(5.0, description="First wait before a retry; doubles up to an hour.")
    priority_rules: dict[str, Literal["stat", "urgent", "routine"]] = Field(
        {}, description="Rank by a word in the study's requested priority or description."
    )

    @field_validator("url")
    @classmethod
    def _is_redis(cls, value: SecretStr) -> SecretStr:
        written = value.get_secret_value()
        if written and written.partition("://")[0] not in BROKERS:
            raise ValueError("the broker is Redis or Valkey; write redis://:PASSWORD@HOST:6379/0, or rediss:// for TLS")
        return value


class DatabaseSettings(_Group):
    """The truth."""

    url: SecretStr = Field(SecretStr(""), description="SQLAlchemy URL; empty means SQLite at MU2_HOME/mu2.sqlite.")
    busy_seconds: Seconds = Field(30.0, description="How long a locked or absent database is waited for.")

    @field_validator("url")
    @classmethod
    def _has_a_driver_here(cls, value: SecretStr) -> SecretStr:
        written = value.get_secret_value()
        try:
            known = not written or sa.make_url(written).drivername in DATABASES
        except (sa.exc.ArgumentError, ValueError):
            known = False
        if not known:
            raise ValueError("write postgresql+psycopg://USER:PASSWORD@HOST:5432/NAME or sqlite:////PATH")
        return value


class ImagingSettings(_Group):
    """Which series becomes a volume."""

    min_slices: int = Field(12, ge=2, description="Fewest slices of a series to report.")
    wanted_slice_mm: float = Field(3.0, gt=0, description="Preferred slice thickness.")
    max_gap_slices: int = Field(3, ge=0, description="Most missing slices in a row that are filled by interpolation.")
    max_gap_mm: float = Field(
        12.0, gt=0, description="Neighbouring slices farther apart than this leave tissue unseen."
    )
    threads: int = Field(2, ge=1, description="Threads that decode pixels.")
    preferences: tuple[str, ...] = Field(
        (), description="What decides between two series, most important first; empty takes the order in rules.py."
    )
    kernels: tuple[str, ...] = Field((), description="Kernel classes, best first; empty is soft, unknown, lung, bone.")
    reported_regions: tuple[str, ...] = Field((), description="Body regions this site reports; empty reports all.")
    never_descriptions: tuple[str, ...] = Field(
        (), description="More regular expressions over series descriptions that are never reported."
    )


class ModelSettings(_Group):
    """The reporter."""

    reporter: Literal["mu2", "fake"] = Field(
        "mu2", description="`mu2` runs the model; `fake` writes canned text (tests)."
    )
    path: Path | None = Field(None, description="Checkpoint folder; empty means mu2-phantom, trained on synthetic CTs.")
    allow_not_clinical: bool = Field(
        False, description="Send drafts of a model that was trained on no patient (demo and tests)."
    )
    device: str = Field("auto", description="`auto`, `cpu`, `cuda` or `cuda:N`.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Weights' type; auto suits the device."
    )
    max_batch: int = Field(4, ge=1, description="Most volumes drafted together.")
    batch_wait_seconds: float = Field(0.05, ge=0, description="How long a first volume waits for company.")
    deadline_seconds: Seconds = Field(300.0, description="Generation stops after this long and is tried again.")
    max_new_tokens: int = Field(512, ge=1, description="Longest draft in tokens.")
    question: str = Field(
        "Describe the findings and the impression of this CT.", description="What the model is asked for each volume."
    )


class Destination(_Group):
    """One HL7 receiver. `drafts` has no default: a site must choose what a machine draft is to it."""

    name: str = Field(
        pattern=r"^[a-z0-9_-]{1,32}$", description="Short name; stands in logs and in `mu2 message list`."
    )
    host: str = Field(description="Host of the MLLP receiver.")
    port: Annotated[int, Field(ge=1, le=65535)] = Field(description="Port of the MLLP receiver.")
    drafts: Literal["none", "R", "P"] = Field(description="Send machine drafts: not at all, as R (stored) or as P.")
    preliminary: bool = Field(False, description="Send preliminary reports.")
    sending_application: str = Field("MU2", description="MSH-3.")
    sending_facility: str = Field("", description="MSH-4.")
    receiving_application: str = Field("", description="MSH-5.")
    receiving_facility: str = Field("", description="MSH-6.")
    processing_id: Literal["P", "T", "D"] = Field("T", description="MSH-11: production, training or debugging.")
    character_set: Literal["UNICODE UTF-8", "8859/1"] = Field("UNICODE UTF-8", description="MSH-18.")
    text_type: Literal["TX", "FT"] = Field("TX", description="OBX-2 of report text.")
    wait_for_application_answer: bool = Field(False, description="After CA, wait for the application's AA.")
    connect_seconds: Seconds = Field(5.0, description="Time-out of the connection.")
    answer_seconds: Seconds = Field(30.0, description="Time-out of the acknowledgement.")
    tls: bool = Field(False, description="Connect by TLS.")
    tls_ca: Path | None = Field(None, description="CA (PEM) of the receiver; empty means the system's.")
    tls_certificate: Path | None = Field(None, description="Client certificate (PEM).")
    tls_key: Path | None = Field(None, description="Client key (PEM).")

    @field_validator("host")
    @classmethod
    def _can_be_looked_up(cls, host: str) -> str:
        try:
            encoded = host.encode("idna")  # as every connection encodes it
        except UnicodeError:
            encoded = b""
        if not encoded or not encoded.isascii() or any(c.isspace() or not c.isprintable() for c in host):
            raise ValueError(
                "write a host name, whose parts between the dots have 1 to 63 characters, or an address, "
                "such as ris.hospital.example or 10.1.2.3"
            )
        return host


class Hl7Settings(_Group):
    """Where reports go."""

    destinations: tuple[Destination, ...] = Field(
        (), description="The HL7 receivers; a draft goes only where `drafts` allows."
    )
    max_attempts: int = Field(8, ge=1, description="Attempts before a message is parked.")
    backoff_seconds: Seconds = Field(
        2.0, description="First wait before a message is sent again; doubles up to ten minutes."
    )
    assigning_authority: str = Field("", description="PID-3 authority when DICOM names none.")
    procedure_codes: dict[str, str] = Field(
        {"chest": "24627-2^CT Chest^LN"},
        description="OBR-4 as code^text^system by study description, else, where DICOM brings no code, by regions joined by +.",
    )

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [d.name for d in self.destinations]
        if len(set(names)) != len(names):
            raise ValueError("two destinations share a name; give each its own")
        return self


class ReviewSettings(_Group):
    """The review page."""

    host: str = Field("127.0.0.1", description="Address of the review page; any but this machine's own needs TLS.")
    port: Port = Field(8080, description="Port of the review page; 0 takes a free one.")
    public_url: str = Field("", description="Address that readers type, when a proxy stands before the page.")
    tls_certificate: Path | None = Field(None, description="Certificate (PEM); with the key, the page speaks TLS.")
    tls_key: Path | None = Field(None, description="Private key (PEM) of the certificate.")
    behind_tls_proxy: bool = Field(False, description="A proxy speaks TLS to the readers and passes on to this page.")
    trusted_proxies: str = Field("127.0.0.1", description="Addresses whose X-Forwarded-For is believed, with commas.")
    idle_minutes: Minutes = Field(15.0, description="A session locks after this long without its person.")
    session_hours: float = Field(12.0, gt=0, le=24, description="A session ends after this long, used or not.")
    fresh_seconds: float = Field(120.0, gt=0, le=300, description="A proof of identity signs within this time, once.")
    correction_minutes: Minutes = Field(
        60.0, description="A signed report is corrected within this time, then addended."
    )
    lockout_failures: int = Field(5, ge=1, le=20, description="Wrong passwords in a row that lock an account.")
    lockout_minutes: Minutes = Field(15.0, description="How long a locked account stays locked.")
    low_confidence: float = Field(-0.7, le=0, description="Mean log-probability below which a sentence is marked.")
    weak_support: float = Field(0.1, ge=0, description="Support by the image below which a sentence is marked.")
    slice_cache_mib: int = Field(256, ge=16, description="Memory for compressed slices of the viewer.")
    oidc_issuer: str = Field("", description="Issuer of the identity provider (OIDC); empty means local accounts only.")
    oidc_client_id: str = Field("", description="Client id of this page at the provider.")
    oidc_client_secret: SecretStr = Field(SecretStr(""), description="Client secret of this page at the provider.")
    oidc_username_claim: str = Field("preferred_username", description="Claim that holds the account's user name.")
    metrics_host: str = Field("127.0.0.1", description="Address of /livez, /readyz and /metrics of the review page.")
    metrics_port: Port = Field(
        9103, description="Port of /livez, /readyz and /metrics of the review page; 0 takes a free one."
    )

    @model_validator(mode="after")
    def _is_encrypted(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("the review page needs both tls_certificate and tls_key, or neither")
        if self.host not in {"127.0.0.1", "::1", "localhost"} and not self.encrypted:
            raise ValueError(
                "passwords would cross the network in clear: set tls_certificate and tls_key, or behind_tls_proxy"
            )
        if self.oidc_issuer and not self.oidc_client_id:
            raise ValueError("oidc_issuer needs oidc_client_id")
        return self

    @property
    def encrypted(self) -> bool:
        """Whether readers reach the page by TLS."""
        return self.tls_certificate is not None or self.behind_tls_proxy


class RetentionSettings(_Group):
    """How long things are kept."""

    pixels_days: int = Field(14, ge=1, description="Instances and model inputs of studies that are done.")
    drafts_days: int = Field(365, ge=1, description="Unsigned reports; signed ones stay.")


class TrainingSettings(_Group):
    """Fine-tuning on the hospital's own studies."""

    export: bool = Field(
        False, description="Allow `mu2 study export-training`; only studies with a recorded consent ever leave."
    )
    pseudonym_key: SecretStr = Field(
        SecretStr(""),
        description="Secret that pseudonyms are made with, 32 characters or more; with another, a patient changes split.",
    )

    @model_validator(mode="after")
    def _has_a_key(self) -> Self:
        if self.export and len(self.pseudonym_key.get_secret_value()) < SHORTEST_PSEUDONYM_KEY:
            raise ValueError(
                "export needs pseudonym_key: make one with `openssl rand -hex 32` and keep it as you keep the database"
            )
        return self


class WorkerSettings(_Group):
    """The Celery worker."""

    concurrency: int = Field(16, ge=1, description="Threads of one worker process; one is always left for doorbells.")
    prepare_slots: int = Field(0, ge=0, description="Studies prepared at once by one process; 0 is half the cores.")
    stop_seconds: Seconds = Field(
        20.0, description="A worker told to stop finishes drafts and messages under way for this long."
    )
    metrics_host: str = Field("127.0.0.1", description="Address of /livez, /readyz and /metrics of the worker.")
    metrics_port: Port = Field(
        9102, description="Port of /livez, /readyz and /metrics of the worker; 0 takes a free one."
    )


class LogSettings(_Group):
    """The logs."""

    level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe line that is written."
    )


class _Environment(EnvSettingsSource):
    """The environment, in which `MU2_X__Y_FILE` names a file that holds the value of `MU2_X__Y`."""

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        """Raises `SettingsError` for what is no JSON; the library's own message names its classes and no key."""
        try:
            return super().decode_complex_value(field_name, field, value)
        except ValueError:
            raise SettingsError(
                f"{field_name} is no JSON; in a variable, lists and tables are written as JSON"
            ) from None

    def _load_env_vars(self) -> dict[str, str | None]:
        values: dict[str, str | None] = {}
        for name, value in os.environ.items():
            upper = name.upper()
            if not upper.startswith(PREFIX):
                continue
            if upper.endswith("_FILE"):
                values.setdefault(name.lower().removesuffix("_file"), _read_secret(name, value))
            else:
                values[name.lower()] = value
        return values


def _read_secret(name: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise SettingsError(
            f"{name} names a file that cannot be read ({error.strerror}); mend the path or its rights"
        ) from error


class Settings(BaseSettings):
    """All settings of the system. Frozen; build it with `load()`."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_nested_delimiter=DELIMITER, extra="forbid", frozen=True, toml_file="mu2.toml"
    )

    home: Path = Field(Path(".mu2"), description="Folder of SQLite file, store, broker's append-only file and logs.")
    dicom: DicomSettings = DicomSettings()
    store: StoreSettings = StoreSettings()
    queue: QueueSettings = QueueSettings()
    database: DatabaseSettings = DatabaseSettings()
    imaging: ImagingSettings = ImagingSettings()
    model: ModelSettings = ModelSettings()
    hl7: Hl7Settings = Hl7Settings()
    review: ReviewSettings = ReviewSettings()
    retention: RetentionSettings = RetentionSettings()
    training: TrainingSettings = TrainingSettings()
    worker: WorkerSettings = WorkerSettings()
    log: LogSettings = LogSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Command line, environment with its `*_FILE` secrets, `mu2.toml`, in this order."""
        config = Path(os.environ.get(CONFIG_VARIABLE, "mu2.toml"))
        if CONFIG_VARIABLE in os.environ and not config.exists():
            raise SettingsError(f"{CONFIG_VARIABLE} names a file that is not there; mend the path")
        toml = TomlConfigSettingsSource(settings_cls, config)
        return init_settings, _Environment(settings_cls), toml

    def make_home(self) -> None:
        """Makes MU2_HOME, closed to others; raises `SettingsError` when that cannot be."""
        try:
            self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(f"MU2_HOME ({self.home}) cannot be made ({error.strerror}); name another") from error

    @property
    def database_url(self) -> str:
        """The SQLAlchemy URL in force."""
        return self.database.url.get_secret_value() or f"sqlite:///{self.home.resolve() / 'mu2.sqlite'}"

    @property
    def broker_socket(self) -> Path:
        """Where the embedded Valkey listens when no broker URL is set.

        Below MU2_HOME, or for a path that is too long for a unix socket in a folder of its own among the temporary
        files, which every process of the same MU2_HOME finds by the hash of its path.
        """
        below_home = self.broker_folder / "valkey.sock"
        if len(os.fsencode(below_home)) <= MOST_SOCKET_PATH_BYTES:
            return below_home
        name = hashlib.sha256(os.fsencode(self.home.resolve())).hexdigest()[:16]
        elsewhere = Path(f"mu2-{os.getuid()}-{name}", "valkey.sock")
        temporary = Path(tempfile.gettempdir(), elsewhere)
        return temporary if len(os.fsencode(temporary)) <= MOST_SOCKET_PATH_BYTES else Path("/tmp", elsewhere)

    @property
    def broker_folder(self) -> Path:
        """Where the embedded Valkey keeps its append-only file."""
        return self.home.resolve() / "valkey"

    @property
    def broker_url(self) -> str:
        """The broker URL in force."""
        return self.queue.url.get_secret_value() or f"redis+socket://{self.broker_socket}"

    @property
    def store_root(self) -> Path:
        """The folder of the instance store."""
        return Path(self.store.url).resolve() if self.store.url else self.home.resolve() / "store"


_NOT_SETTINGS = {CONFIG_VARIABLE}


def load(**overrides: Any) -> Settings:
    """Reads the settings; raises `SettingsError` that names each wrong key and never shows a value."""
    _refuse_unknown_environment()
    try:
        return Settings(**overrides)
    except ValidationError as error:
        lines = [f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors(include_input=False)]
        raise SettingsError("settings are wrong; " + "; ".join(lines)) from None
    except (OSError, ValueError) as error:
        raise SettingsError(f"mu2.toml or the environment cannot be read: {error}") from None


def _refuse_unknown_environment() -> None:
    """pydantic-settings ignores environment variables that name no field; a typo must not pass silently."""
    for name in os.environ:
        upper = name.upper()
        if not upper.startswith(PREFIX) or upper in _NOT_SETTINGS:
            continue
        group = upper.removeprefix(PREFIX).split(DELIMITER)[0].removesuffix("_FILE")
        if group.lower() not in Settings.model_fields:
            raise SettingsError(f"{name} is no setting; see the table in README.md")


@lru_cache(maxsize=1)
def current() -> Settings:
    """The settings of this process, read once; for entries that get no argument (the Celery command)."""
    return load()
