"""Every status the listener answers with, by name.

Success is sent only after the instance is durable: file and folder fsynced, row committed. All others leave the
association open; one bad instance never ends it.

Source: PS3.4 table B.2-1 (storage), PS3.7 annex C (general), PS3.4 annex J (storage commitment).
"""

from enum import IntEnum


class Status(IntEnum):
    """Value of Status (0000,0900) in a response."""

    SUCCESS = 0x0000  # durable: a crash of this machine no longer loses the instance
    PROCESSING_FAILURE = 0x0110  # a fault of ours that is logged; the sender may try again
    INVALID_ATTRIBUTE_VALUE = 0x0106  # N-ACTION names a SOP instance that is no UID
    NO_SUCH_OBJECT_INSTANCE = 0x0112  # storage commitment: the instance is not in the store
    NO_SUCH_ARGUMENT = 0x0114  # N-ACTION without the references it must carry
    INVALID_SOP_INSTANCE = 0x0117  # the SOP Instance UID of the request is no UID; nothing was written
    NO_SUCH_SOP_CLASS = 0x0118  # N-ACTION on another class than Storage Commitment Push Model
    CLASS_INSTANCE_CONFLICT = 0x0119  # storage commitment: stored with another class, or with two contents
    SOP_CLASS_NOT_SUPPORTED = 0x0122  # the request's class is not the one its presentation context was accepted for
    NO_SUCH_ACTION = 0x0123  # N-ACTION of another type than "request storage commitment"
    UNRECOGNIZED_OPERATION = 0x0211  # a DIMSE service that this listener does not offer
    OUT_OF_RESOURCES = 0xA700  # disk below its floor, a write failed, or the row could not be committed; send it again
    DATA_SET_DOES_NOT_MATCH = 0xA900  # SOP class or instance of the data set differ from those of the request
    CANNOT_UNDERSTAND = 0xC210  # the data set breaks off or breaks its transfer syntax before what must be read
    MISSING_STUDY_OR_SERIES_UID = 0xC211  # the data set names no study or no series
    INVALID_STUDY_OR_SERIES_UID = 0xC212  # what stands there is no UID (`../../etc/passwd`); nothing was written
    EMPTY_DATA_SET = 0xC213  # the request promises a data set and brings none


# Error Comment (0000,0902), at most 64 characters, sent beside a status that is not success. Fixed text: never the sender's.
COMMENTS = {
    Status.PROCESSING_FAILURE: "internal fault, logged; send again",
    Status.INVALID_SOP_INSTANCE: "Affected SOP Instance UID is not a UID",
    Status.SOP_CLASS_NOT_SUPPORTED: "SOP class is not that of the presentation context",
    Status.UNRECOGNIZED_OPERATION: "service not offered",
    Status.OUT_OF_RESOURCES: "not stored: out of resources; send again later",
    Status.DATA_SET_DOES_NOT_MATCH: "data set has another SOP class or instance than request",
    Status.CANNOT_UNDERSTAND: "data set cannot be read",
    Status.MISSING_STUDY_OR_SERIES_UID: "Study or Series Instance UID is missing",
    Status.INVALID_STUDY_OR_SERIES_UID: "Study or Series Instance UID is not a UID",
    Status.EMPTY_DATA_SET: "no data set was sent",
}
