"""Settings come from the environment, secrets' files and mu2.toml; a typo is an error."""

from pathlib import Path

import pytest

from worker.core import settings
from worker.core.errors import SettingsError


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder without a mu2.toml."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_defaults_need_nothing() -> None:
    loaded = settings.load()
    assert loaded.database_url.endswith("/.mu2/mu2.sqlite")
    assert loaded.broker_url.startswith("redis+socket://")


def test_environment_goes_before_the_file_and_the_file_before_defaults(empty_folder, monkeypatch) -> None:
    Path("mu2.toml").write_text("[dicom]\nport = 1\nae_title = 'FILE'\n")
    monkeypatch.setenv("MU2_DICOM__PORT", "2")
    loaded = settings.load()
    assert (loaded.dicom.port, loaded.dicom.ae_title, loaded.dicom.quiet_seconds) == (2, "FILE", 30.0)


def test_secret_is_read_from_its_file_and_not_shown(empty_folder, monkeypatch) -> None:
    Path("secret").write_text("postgresql+psycopg://u:hidden@db/mu2\n")
    monkeypatch.setenv("MU2_DATABASE__URL_FILE", "secret")
    loaded = settings.load()
    assert loaded.database_url == "postgresql+psycopg://u:hidden@db/mu2"
    assert "hidden" not in repr(loaded)


@pytest.mark.parametrize("name", ["MU2_DICOM__PROT", "MU2_DICM__PORT", "MU2_HOEM"])
def test_misspelt_variable_is_an_error_that_names_it(monkeypatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(SettingsError, match=name.split("__")[-1].removeprefix("MU2_").lower() + "|" + name):
        settings.load()


def test_unknown_key_in_the_file_is_an_error() -> None:
    Path("mu2.toml").write_text("[dicom]\nquiet = 3\n")
    with pytest.raises(SettingsError, match="quiet"):
        settings.load()


def test_wrong_value_is_named_but_never_shown(monkeypatch) -> None:
    monkeypatch.setenv("MU2_DICOM__PORT", "secret-value")
    with pytest.raises(SettingsError) as raised:
        settings.load()
    assert "dicom.port" in str(raised.value)
    assert "secret-value" not in str(raised.value)


def test_destination_must_choose_what_a_draft_is(monkeypatch) -> None:
    monkeypatch.setenv("MU2_HL7__DESTINATIONS", '[{"name": "ris", "host": "h", "port": 2575}]')
    with pytest.raises(SettingsError, match="drafts"):
        settings.load()


@pytest.mark.parametrize("host", ["", " ", "ris..hospital", ".hospital", "x" * 64, "ris hospital", "ris\n"])
def test_a_destination_needs_a_host_that_can_be_looked_up(host: str) -> None:
    with pytest.raises(SettingsError, match=r"host.*write a host name"):
        settings.load(hl7={"destinations": [{"name": "ris", "host": host, "port": 2575, "drafts": "none"}]})


@pytest.mark.parametrize("host", ["ris", "ris.hospital.example.", "10.1.2.3", "::1", "röntgen.example", "a_b.local"])
def test_a_destination_may_be_a_name_or_an_address(host: str) -> None:
    found = settings.load(hl7={"destinations": [{"name": "ris", "host": host, "port": 2575, "drafts": "none"}]})
    assert found.hl7.destinations[0].host == host


def test_two_destinations_of_one_name_are_refused() -> None:
    one = {"name": "ris", "host": "h", "port": 1, "drafts": "none"}
    with pytest.raises(SettingsError, match="share a name"):
        settings.load(hl7={"destinations": [one, one]})


@pytest.mark.parametrize(
    "url", ["postgresql://mu2@db/mu2", "mysql://db/mu2", "postgresql+psycopg://mu2@db:port/mu2", "/srv/mu2.sqlite"]
)
def test_database_that_no_driver_here_reaches_is_refused_with_what_to_write(monkeypatch, url: str) -> None:
    monkeypatch.setenv("MU2_DATABASE__URL", url)
    with pytest.raises(SettingsError, match=r"database.url.*postgresql\+psycopg://USER") as raised:
        settings.load()
    assert url not in str(raised.value)


@pytest.mark.parametrize("url", ["amqp://queue", "queue:6379", "valkey://queue:6379/0"])
def test_broker_that_is_no_redis_is_refused_with_what_to_write(monkeypatch, url: str) -> None:
    monkeypatch.setenv("MU2_QUEUE__URL", url)
    with pytest.raises(SettingsError, match=r"queue.url.*redis://:PASSWORD@HOST"):
        settings.load()


def test_file_of_settings_that_is_named_and_not_there_is_an_error(monkeypatch) -> None:
    monkeypatch.setenv("MU2_CONFIG", "elsewhere.toml")
    with pytest.raises(SettingsError, match="MU2_CONFIG names a file that is not there"):
        settings.load()


def test_list_that_is_no_json_is_an_error_that_names_it(monkeypatch) -> None:
    monkeypatch.setenv("MU2_DICOM__PEERS", "PACS@10.0.0.5")
    with pytest.raises(SettingsError, match=r"^peers is no JSON") as raised:
        settings.load()
    assert "10.0.0.5" not in str(raised.value)


def test_home_that_cannot_be_made_is_an_error_that_names_it(empty_folder: Path) -> None:
    (empty_folder / "file").touch()
    with pytest.raises(SettingsError, match=r"MU2_HOME \(file/home\) cannot be made"):
        settings.load(home=Path("file/home")).make_home()
