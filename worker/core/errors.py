"""The error tree: whether to try again is a class, never a guess at the call site.

    Mu2Error
    ├── RetryableError            the same work may succeed later
    │   ├── DatabaseUnavailableError
    │   │   └── DatabaseFullError     its disk is full
    │   ├── BrokerUnavailableError
    │   ├── StoreUnavailableError     share gone, no permission
    │   │   └── StoreFullError        its disk is full
    │   ├── InsufficientMemoryError   a volume larger than this host's free memory
    │   ├── ModelBusyError            out of memory, deadline passed
    │   ├── DeliveryUnavailableError  no answer in time, AE or CE
    │   │   └── DeliveryUnreachableError  no connection
    │   └── LeaseLostError            another worker took the work over
    └── FinalError                the same work fails again until something is changed
        ├── SettingsError
        ├── InvalidObjectError        not a DICOM object that can be stored or read
        ├── StudyError
        │   ├── NothingToReportError  no CT series to report; the study is skipped
        │   ├── PatientMismatchError  one study, two patients
        │   ├── GeometryError         slices that make no trustworthy volume
        │   └── PixelDataError        pixels that cannot be decoded
        ├── ModelError                a checkpoint that does not load, an input it refuses
        ├── ReportError               a report that cannot be written as asked
        ├── StateError                a change that the present state does not allow
        ├── SignatureError            final text without a matching signature
        ├── DeliveryRefusedError      AR or CR, or an answer that breaks the protocol for good
        ├── AccessError               a person who may not do this, or did not prove who they are
        ├── NotFoundError             no such study, message or user
        └── AuditError                the audit chain is broken

Messages say what happened and what to do, and never hold a patient's name, id, accession number or a sender's string.
"""

import errno


class Mu2Error(Exception):
    """Base of every error this project raises on purpose."""


class RetryableError(Mu2Error):
    """The same work may succeed later without anyone changing anything."""


class FinalError(Mu2Error):
    """The same work fails again until a person or another input changes something."""


class DatabaseUnavailableError(RetryableError):
    """The database cannot be reached or is locked."""


class DatabaseFullError(DatabaseUnavailableError):
    """The disk of the database is full."""


class BrokerUnavailableError(RetryableError):
    """The broker cannot be reached; the rows keep what is due and the sweeper rings later."""


class StoreUnavailableError(RetryableError):
    """The instance store cannot be read or written: disk full, share gone, no permission."""

    @classmethod
    def of(cls, what: str, error: OSError) -> "StoreUnavailableError":
        """The error for a write that failed, `StoreFullError` when there was no room; `what` is the sentence's start."""
        sentence = f"{what}: {error.strerror or 'output error'}"
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            return StoreFullError(f"{sentence}; make room, the study waits")
        return cls(sentence)


class StoreFullError(StoreUnavailableError):
    """The disk of the instance store is full. No study's fault, so it costs no study an attempt."""


class InsufficientMemoryError(RetryableError):
    """The host has no memory for the volume now."""


class ModelBusyError(RetryableError):
    """The model ran out of memory or past its deadline for this batch."""


class DeliveryUnavailableError(RetryableError):
    """The destination did not accept the message now: no connection, no answer in time, AE or CE.

    `code` is MSA-1 when there was an answer. `answer_text` is what the receiver said: it may quote the patient, so it
    goes to the database and never into the message of the error.
    """

    def __init__(self, message: str, code: str = "", answer_text: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.answer_text = answer_text


class LeaseLostError(RetryableError):
    """The lease of this work ran out and another worker may hold it."""


class SettingsError(FinalError):
    """A setting is missing, unknown or contradicts another."""


class InvalidObjectError(FinalError):
    """The bytes are not a DICOM object that can be stored or read."""


class StudyError(FinalError):
    """The study cannot be drafted as it was received."""


class NothingToReportError(StudyError):
    """The study holds no CT series to report."""


class PatientMismatchError(StudyError):
    """Objects of one study carry the ids of two patients."""


class GeometryError(StudyError):
    """The slices do not make a volume whose geometry can be trusted."""


class PixelDataError(StudyError):
    """The pixel data of a slice cannot be decoded."""


class ModelError(FinalError):
    """The checkpoint does not load or the model refuses the input."""


class ReportError(FinalError):
    """The report cannot be written in the form that was asked for."""


class StateError(FinalError):
    """The present state does not allow this change."""


class TextClosedError(StateError):
    """The text under work was signed, rejected or put aside before this change reached it."""


class SignatureError(FinalError):
    """A final text has no signature, or its hash differs from the signed one."""


class DeliveryUnreachableError(DeliveryUnavailableError):
    """No connection could be opened to the destination, so not a byte of the message left."""


class DeliveryRefusedError(FinalError):
    """The destination refused the message for good (AR or CR); `code` and `answer_text` as in `DeliveryUnavailableError`."""

    def __init__(self, message: str, code: str = "", answer_text: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.answer_text = answer_text


class AccessError(FinalError):
    """A person may not do this, or did not prove who they are."""


class NotFoundError(FinalError):
    """No study, message or user answers to this id."""


class AuditError(FinalError):
    """The audit chain does not verify: a row was changed, removed or reordered."""
