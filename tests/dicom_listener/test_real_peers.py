"""dcmtk's programs and Orthanc as senders."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pydicom import dcmread

from tests.dicom_listener.conftest import Certificates, Running
from tests.dicom_listener.process import ROOT
from tests.dicom_listener.sending import ct, data_set_bytes

ENVIRONMENT = {**os.environ, "TCP_NODELAY": "1"}


def run(program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    if not shutil.which(program):
        pytest.skip(f"{program} is not installed (Debian package dcmtk)")
    return subprocess.run(
        [program, *map(str, arguments)], env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False
    )


def test_echoscu_is_answered(running: Running) -> None:
    assert run("echoscu", "-aec", "MU2", "127.0.0.1", str(running.port)).returncode == 0


def test_storescu_sends_a_real_series(running: Running, real_series: list[Path]) -> None:
    done = run("storescu", "-aec", "MU2", "127.0.0.1", str(running.port), *real_series)
    assert done.returncode == 0, done.stderr
    assert {data_set_bytes(f) for f in running.sent.files()} == {data_set_bytes(f) for f in real_series}


def test_dcmsend_sends_compressed_and_plain_objects(running: Running, odd: Path) -> None:
    files = [odd / "ct1_j2k_lossless_signed.dcm", odd / "sr_basic_text_no_pixel_data.dcm", odd / "dx_not_ct.dcm"]
    done = run("dcmsend", "-aec", "MU2", "127.0.0.1", str(running.port), "--decompress-never", *files)
    assert done.returncode == 0, done.stderr
    # dcmtk writes lengths and padding of its own, so neither bytes nor elements can be compared.
    arrived, sent = ({f: dcmread(f) for f in found} for found in (running.sent.files(), files))
    described = [
        {(d.SOPInstanceUID, d.file_meta.TransferSyntaxUID, str(d.PatientName), len(d)) for d in data.values()}
        for data in (arrived, sent)
    ]
    assert described[0] == described[1]


@pytest.mark.parametrize("syntax", ["-xe", "-xb", "-xi", "-xd"], ids=["explicit", "big endian", "implicit", "deflated"])
def test_storescu_sends_every_uncompressed_syntax(running: Running, odd: Path, syntax: str) -> None:
    source = odd / "transfer_syntax" / "ctimage_1.2.840.10008.1.2.1.dcm"
    done = run("storescu", syntax, "-aec", "MU2", "127.0.0.1", str(running.port), source)
    assert done.returncode == 0, done.stderr
    assert len(running.sent.instances()) == 1


def test_storescu_is_refused_under_another_title(running: Running, tmp_path: Path) -> None:
    ct().save_as(tmp_path / "one.dcm", enforce_file_format=True)
    assert run("storescu", "-aec", "OTHER", "127.0.0.1", str(running.port), tmp_path / "one.dcm").returncode != 0
    assert not running.sent.files()


def test_dcmtk_sends_by_tls_with_certificates_on_both_sides(
    start: Callable[..., Running], certificates: Certificates, tmp_path: Path
) -> None:
    running = start(**certificates.settings, tls_ca=certificates.ca)
    ct().save_as(tmp_path / "one.dcm", enforce_file_format=True)
    tls = ["+tls", certificates.client_key, certificates.client, "+cf", certificates.ca]
    target = ["-aec", "MU2", "127.0.0.1", str(running.port)]
    assert run("echoscu", *tls, *target).returncode == 0
    assert run("storescu", *tls, *target, tmp_path / "one.dcm").returncode == 0
    assert run("echoscu", *target).returncode != 0
    assert len(running.sent.instances()) == 1


@pytest.mark.parametrize("processes", [1, 2])
def test_storescu_sends_to_a_plain_and_a_tls_port_of_one_listener(
    start: Callable[..., Running], certificates: Certificates, tmp_path: Path, processes: int
) -> None:
    running = start(**certificates.settings, tls_ca=certificates.ca, tls_port=0, processes=processes)
    for name in ("plain.dcm", "secured.dcm"):
        ct().save_as(tmp_path / name, enforce_file_format=True)
    tls = ["+tls", certificates.client_key, certificates.client, "+cf", certificates.ca]
    plain_target = ["-aec", "MU2", "127.0.0.1", str(running.port)]
    tls_target = ["-aec", "MU2", "127.0.0.1", str(running.listener.tls_port)]
    assert run("storescu", *plain_target, tmp_path / "plain.dcm").returncode == 0
    assert run("storescu", *tls, *tls_target, tmp_path / "secured.dcm").returncode == 0
    assert run("storescu", *tls_target, tmp_path / "plain.dcm").returncode != 0
    assert run("storescu", *tls, *plain_target, tmp_path / "secured.dcm").returncode != 0
    assert len(running.sent.instances()) == 2


def test_orthanc_forwards_a_study_as_the_pacs(real_series: list[Path], sqlite_template: Path, tmp_path: Path) -> None:
    """Orthanc's DICOM port cannot bind to the loopback alone, so both run in a network of their own."""
    if not shutil.which("Orthanc") or not shutil.which("unshare"):
        pytest.skip("Orthanc is not installed (Debian package orthanc), or unshare is missing")
    rights = [] if os.geteuid() == 0 else ["-r"]
    script = ROOT / "tests" / "dicom_listener" / "orthanc_forwards.py"
    inside = f'ip link set lo up && exec "{sys.executable}" "{script}" "$@"'
    done = subprocess.run(
        ["unshare", *rights, "-n", "sh", "-c", inside, "sh", tmp_path, sqlite_template, *real_series],
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    if "Operation not permitted" in done.stderr:
        pytest.skip("no right to make a network namespace")
    assert done.returncode == 0, done.stderr[-2000:]
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert outcome == {"instances": len(real_series), "studies": 1, "identical": True}
