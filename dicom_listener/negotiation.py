"""Who may connect and what for: A-ASSOCIATE-RQ in, acceptance or refusal with its reason out; pynetdicom codes both.

Source: PS3.8 sections 7.1 and 9.3.2 to 9.3.4, PS3.7 annex D.3.
"""

import ipaddress
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from pydicom._uid_dict import UID_dictionary
from pydicom.uid import (
    AllTransferSyntaxes,
    CTImageStorage,
    EnhancedCTImageStorage,
    ImplicitVRLittleEndian,
    LegacyConvertedEnhancedCTImageStorage,
)
from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RJ, A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import (
    A_ASSOCIATE,
    ImplementationClassUIDNotification,
    ImplementationVersionNameNotification,
    MaximumLengthNotification,
)
from pynetdicom.presentation import PresentationContext, build_context, negotiate_as_acceptor

from dicom_listener.pdus import AbortReason, ProtocolError
from worker.core.settings import DicomSettings, Peer

IMPLEMENTATION_CLASS_UID = "2.25.278146087023947720371062153127094715201"
IMPLEMENTATION_VERSION_NAME = "MU2_LISTENER_1"
APPLICATION_CONTEXT = "1.2.840.10008.3.1.1.1"
CT_CLASSES = frozenset({CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage})
VERIFICATION_CLASS = "1.2.840.10008.1.1"
COMMITMENT_CLASS = "1.2.840.10008.1.20.1"
# Retired syntaxes too: storing needs no decoding, and what cannot be decoded is refused by `prepare` with its reason.
TRANSFER_SYNTAXES = frozenset(AllTransferSyntaxes) | {
    u for u, entry in UID_dictionary.items() if entry[1] == "Transfer Syntax"
}
_STORAGE_CLASSES = frozenset(
    u for u, entry in UID_dictionary.items() if entry[1] == "SOP Class" and "Storage" in entry[0]
)
_NEVER_STORED = ("Storage Commitment", "Media Storage Directory")

# What pynetdicom's decoders raise on bytes that are no A-ASSOCIATE-RQ; found by fuzzing them (tests/dicom_listener).
_DECODER_ERRORS = (
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    AssertionError,
    NotImplementedError,
    struct.error,
)
_CALLED, _CALLING = slice(10, 26), slice(26, 42)  # of an A-ASSOCIATE-RQ with its header (PS3.8 table 9-11)
_LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128"))


class Refusal(StrEnum):
    """Why an association was refused; stands in the log and in the audit."""

    CALLED_AE_TITLE = "called AE title is not ours"
    CALLING_AE_TITLE = "calling AE title is not a configured peer"
    ADDRESS = "the peer's address is not the configured one"
    TLS_REQUIRED = "the port speaks TLS and the peer does not"
    PEER_WITHOUT_TLS = "the peer is configured to speak TLS and came without"
    APPLICATION_CONTEXT = "application context is not DICOM"
    TOO_MANY = "all associations are in use"
    STOPPING = "the listener is stopping"


# Result, source and reason of the A-ASSOCIATE-RJ (PS3.8 table 9-21): 1 permanent, 2 transient.
_REJECTIONS = {
    Refusal.CALLED_AE_TITLE: (1, 1, 7),
    Refusal.CALLING_AE_TITLE: (1, 1, 3),
    Refusal.ADDRESS: (1, 1, 3),
    Refusal.TLS_REQUIRED: (1, 1, 1),
    Refusal.PEER_WITHOUT_TLS: (1, 1, 1),
    Refusal.APPLICATION_CONTEXT: (1, 1, 2),
    Refusal.TOO_MANY: (2, 3, 2),
    Refusal.STOPPING: (2, 3, 1),
}


@dataclass(frozen=True)
class Context:
    """An accepted presentation context."""

    abstract_syntax: str
    transfer_syntax: str


@dataclass(frozen=True)
class Accepted:
    """An association that may start: `reply` is the A-ASSOCIATE-AC to send."""

    calling_ae_title: str
    peer: Peer | None  # None when any peer may connect and none is configured under this title
    contexts: Mapping[int, Context]
    peer_max_pdu_bytes: int  # 0 when the peer sets no limit
    reply: bytes


@dataclass(frozen=True)
class Refused:
    """An association that may not start: `reply` is the A-ASSOCIATE-RJ to send."""

    calling_ae_title: str  # printable, at most 16 characters; a stranger's word
    reason: Refusal
    reply: bytes


def negotiate(
    request: bytes, settings: DicomSettings, address: str, *, tls: bool, tls_only: bool, refuse: Refusal | None
) -> Accepted | Refused:
    """Decides about an A-ASSOCIATE-RQ PDU from `address`; `refuse` is a reason of the caller's that comes last.

    `tls` says how it came, `tls_only` that its port takes nothing else.
    Raises `ProtocolError` when the bytes are no A-ASSOCIATE-RQ.
    """
    called, calling = (_title(request[field]) for field in (_CALLED, _CALLING))
    wanted = _decode(_with_titles(request, called, calling))
    reason, peer = _admit(wanted, called, calling, settings, address, tls=tls)
    reason = (Refusal.TLS_REQUIRED if tls_only and not tls else reason) or refuse
    if reason:
        return Refused(_printable(calling), reason, _reject(reason))
    results = [_answer(context, settings) for context in wanted.presentation_context_definition_list]
    contexts = {
        int(c.context_id or 0): Context(str(c.abstract_syntax), str(c.transfer_syntax[0]))
        for c in results
        if c.result == 0
    }
    peer_max = next(
        (i.maximum_length_received for i in wanted.user_information if isinstance(i, MaximumLengthNotification)), 0
    )
    if 0 < (peer_max or 0) < 128:
        raise ProtocolError("peer's maximum PDU length leaves no room for a response", AbortReason.INVALID_PARAMETER)
    return Accepted(
        calling if peer else _printable(calling),
        peer,
        contexts,
        peer_max or 0,
        _accept(wanted, results, settings.max_pdu_bytes),
    )


def _title(field: bytes) -> str:
    """An AE title without its padding, which is NUL with some senders; what no title may hold becomes `?`."""
    text = field.rstrip(b"\0 ").decode("latin-1").strip()
    return re.sub(r"[^ -\[\]-~]", "?", text)


def _with_titles(request: bytes, called: str, calling: str) -> bytes:
    """The request with titles that pynetdicom decodes; it raises on others, and a refusal with its reason says more."""
    if len(request) < _CALLING.stop:
        return request
    titles = (called or "?").ljust(16) + (calling or "?").ljust(16)
    return request[: _CALLED.start] + titles.encode("ascii") + request[_CALLING.stop :]


def _decode(request: bytes) -> A_ASSOCIATE:
    pdu = A_ASSOCIATE_RQ()
    try:
        pdu.decode(request)
        primitive = pdu.to_primitive()
        primitive.user_information = primitive.user_information or []
    except _DECODER_ERRORS as error:
        raise ProtocolError("A-ASSOCIATE-RQ cannot be decoded", AbortReason.INVALID_PARAMETER) from error
    contexts = primitive.presentation_context_definition_list
    if not all(c.abstract_syntax and c.transfer_syntax for c in contexts):
        raise ProtocolError("a presentation context lacks its syntaxes", AbortReason.INVALID_PARAMETER)
    return primitive


def _admit(
    wanted: A_ASSOCIATE, called: str, calling: str, settings: DicomSettings, address: str, *, tls: bool
) -> tuple[Refusal | None, Peer | None]:
    """The reason to refuse, or None and the configured peer that calls."""
    if wanted.application_context_name != APPLICATION_CONTEXT:
        return Refusal.APPLICATION_CONTEXT, None
    if called != settings.ae_title.strip():
        return Refusal.CALLED_AE_TITLE, None
    if not calling:
        return Refusal.CALLING_AE_TITLE, None
    named = [p for p in settings.peers if p.ae_title.strip() == calling]
    if not named:
        if settings.any_peer or (not settings.peers and _inside(address, _LOOPBACK)):
            return None, None
        return (Refusal.CALLING_AE_TITLE if settings.peers else Refusal.ADDRESS), None
    here = [p for p in named if not p.address or _inside(address, [_network(p.address)])]
    if not here:
        return Refusal.ADDRESS, None
    peer = next((p for p in here if tls or not p.tls), None)
    return (None, peer) if peer else (Refusal.PEER_WITHOUT_TLS, None)


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    return ipaddress.ip_network(text, strict=False)


def _inside(address: str, networks: Iterable[ipaddress.IPv4Network | ipaddress.IPv6Network]) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped:
        ip = ip.ipv4_mapped
    return any(ip in network for network in networks)


def _answer(proposed: PresentationContext, settings: DicomSettings) -> PresentationContext:
    """Accepts the first transfer syntax the sender names that we know: its own choice needs least conversion there."""
    known = [str(s) for s in proposed.transfer_syntax if s in TRANSFER_SYNTAXES]
    supported = []
    if _offered(str(proposed.abstract_syntax), settings):
        supported.append(build_context(str(proposed.abstract_syntax), known[0] if known else ImplicitVRLittleEndian))
    results, _ = negotiate_as_acceptor([proposed], supported)
    return results[0]


def _offered(abstract_syntax: str, settings: DicomSettings) -> bool:
    if abstract_syntax == VERIFICATION_CLASS or abstract_syntax in CT_CLASSES:
        return True
    if abstract_syntax == COMMITMENT_CLASS:
        return settings.storage_commitment
    if not settings.keep_other_objects:
        return False
    if abstract_syntax in _STORAGE_CLASSES:
        return not UID_dictionary[abstract_syntax][0].startswith(_NEVER_STORED)
    return abstract_syntax not in UID_dictionary  # a private storage class, or one younger than the dictionary


def _accept(wanted: A_ASSOCIATE, results: list[PresentationContext], max_pdu_bytes: int) -> bytes:
    answer = A_ASSOCIATE()
    answer.application_context_name = APPLICATION_CONTEXT
    answer.calling_ae_title = wanted.calling_ae_title
    answer.called_ae_title = wanted.called_ae_title
    answer.result = 0
    answer.result_source = 1
    answer.presentation_context_definition_results_list = results
    length = MaximumLengthNotification()
    length.maximum_length_received = max_pdu_bytes
    implementation = ImplementationClassUIDNotification()
    implementation.implementation_class_uid = IMPLEMENTATION_CLASS_UID
    version = ImplementationVersionNameNotification()
    version.implementation_version_name = IMPLEMENTATION_VERSION_NAME
    answer.user_information = [length, implementation, version]
    return A_ASSOCIATE_AC(answer).encode()


def _reject(reason: Refusal) -> bytes:
    answer = A_ASSOCIATE()
    answer.result, answer.result_source, answer.diagnostic = _REJECTIONS[reason]
    return A_ASSOCIATE_RJ(answer).encode()


def _printable(title: str) -> str:
    """A stranger's AE title, fit for a log: letters, digits and `_-. `, everything else `?`."""
    return re.sub(r"[^A-Za-z0-9_\-. ]", "?", title)[:16]
