"""Who talks to us and whom we talk to: the listener's port, the HL7 receivers and what a draft is to them."""

import ssl
from collections.abc import Iterator

from pynetdicom import AE
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]

from worker.core.errors import DeliveryUnavailableError, SettingsError
from worker.core.settings import Destination, DicomSettings, Settings
from worker.delivery import mllp
from worker.doctor import Check, fail, ok, warn
from worker.supervisor import EVERY_INTERFACE

ECHO_SECONDS = 5.0
CALLING_AE = "MU2DOCTOR"

_DRAFTS = {
    "R": "some receivers take R as 'delete what you had', others drop it: watch one test report arrive",
    "P": "P means a verified early result to most receivers; agree with the site that an unread draft may look so",
}


def listener(settings: Settings) -> Iterator[Check]:
    """The listener answers a C-ECHO, or refuses it for a reason that is a rule of its own."""
    dicom = settings.dicom
    if dicom.tls_port is None:
        yield _port(dicom, dicom.port, tls=dicom.tls_certificate is not None)
    else:
        yield _port(dicom, dicom.port, tls=False)
        yield _port(dicom, dicom.tls_port, tls=True)
    if dicom.any_peer:
        yield warn("peers", "any AE title from any address may send", "list the peers and unset MU2_DICOM__ANY_PEER")
    elif not dicom.peers:
        yield warn("peers", "none is set: only this machine may send", "list the PACS in MU2_DICOM__PEERS")


def _port(dicom: DicomSettings, port: int, *, tls: bool) -> Check:
    where = f"{dicom.ae_title} on {dicom.host}:{port}" + (" by TLS" if tls else "")
    if port == 0:
        setting = "MU2_DICOM__TLS_PORT" if dicom.tls_port == 0 and tls else "MU2_DICOM__PORT"
        return warn("listener", "its port is chosen at each start", f"set {setting}, so that the PACS finds it")
    try:
        answer = _echo(dicom, port, tls=tls)
    except (OSError, ssl.SSLError) as error:
        return fail("listener", f"{where}: TLS failed ({type(error).__name__})", "look at MU2_DICOM__TLS_*")
    if answer == "echo":
        return ok("listener", f"{where} answers C-ECHO")
    if answer == "rejected":
        return ok("listener", f"{where} is up and refuses callers that are no peers, as it should")
    return fail("listener", f"{where} does not answer", "start `mu2 up` or `mu2 listener`; see its log")


def destinations(settings: Settings) -> Iterator[Check]:
    """Every HL7 receiver takes a connection; no message is sent. Each says what a draft is to it."""
    if not settings.hl7.destinations:
        yield warn(
            "destinations", "none is set: reports go nowhere", "set MU2_HL7__DESTINATIONS or [[hl7.destinations]]"
        )
    for destination in settings.hl7.destinations:
        name = f"hl7 {destination.name}"
        yield _reachable(name, destination)
        if destination.drafts in _DRAFTS:
            yield warn(name, f"drafts leave as {destination.drafts}", _DRAFTS[destination.drafts])
        if destination.processing_id != "P":
            finding = f"messages are marked {destination.processing_id}, not for production (MSH-11)"
            yield warn(name, finding, 'set processing_id = "P" when the site goes live')


def _echo(dicom: DicomSettings, port: int, *, tls: bool) -> str:
    entity = AE(ae_title=dicom.peers[0].ae_title if dicom.peers else CALLING_AE)
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = entity.connection_timeout = ECHO_SECONDS
    entity.add_requested_context(Verification)
    host = EVERY_INTERFACE.get(dicom.host, dicom.host)
    association = entity.associate(host, port, ae_title=dicom.ae_title, tls_args=(_tls(dicom), host) if tls else None)
    if association.is_established:
        association.send_c_echo()
        association.release()
        return "echo"
    return "rejected" if association.is_rejected else "silent"


def _tls(dicom: DicomSettings) -> ssl.SSLContext:
    """A client's context that trusts exactly the listener's own certificate and shows the same one."""
    context = ssl.create_default_context(cafile=dicom.tls_certificate)
    # The certificate itself is what is trusted, whatever name it bears and whoever issued it.
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    if dicom.tls_certificate is not None:
        context.load_cert_chain(dicom.tls_certificate, dicom.tls_key)
    return context


def _reachable(name: str, destination: Destination) -> Check:
    where = f"{destination.host}:{destination.port}"
    try:
        mllp.probe(destination)
    except DeliveryUnavailableError as error:
        return fail(name, str(error), "start the receiver, or mend its host, port and the firewall between")
    except SettingsError as error:
        return fail(name, str(error), "mend the destination's tls_* settings")
    return ok(name, f"{where} takes a {'TLS ' if destination.tls else ''}connection")
