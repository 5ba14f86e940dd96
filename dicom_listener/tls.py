"""TLS of the port, and of the associations that this listener opens itself (PS3.15 annex B)."""

import ssl

from worker.core.errors import SettingsError
from worker.core.settings import DicomSettings


def server_context(settings: DicomSettings) -> ssl.SSLContext | None:
    """The context of the port that speaks TLS, None without a certificate; raises `SettingsError` for half-made settings."""
    if settings.tls_certificate is None:
        half = settings.tls_key or settings.tls_ca or settings.tls_port is not None
        if half or any(peer.tls for peer in settings.peers):
            raise SettingsError("TLS is asked for without MU2_DICOM__TLS_CERTIFICATE; set it and MU2_DICOM__TLS_KEY")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _load(context, settings)
    if settings.tls_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(settings: DicomSettings) -> ssl.SSLContext:
    """The context for calling a peer: shows our certificate, and asks for one of the site's CA.

    Peers are called by address, which certificates rarely bear; so their names are compared only where the system's many
    CAs are believed because no CA of the site is set. Raises `SettingsError`.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if settings.tls_ca is None:
        context.load_default_certs()
    else:
        context.check_hostname = False
    _load(context, settings)
    return context


def _load(context: ssl.SSLContext, settings: DicomSettings) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        if settings.tls_certificate is not None:
            context.load_cert_chain(settings.tls_certificate, settings.tls_key)
        if settings.tls_ca is not None:
            context.load_verify_locations(settings.tls_ca)
    except (OSError, ssl.SSLError) as error:
        raise SettingsError(f"a TLS file cannot be read ({type(error).__name__}); look at MU2_DICOM__TLS_*") from error
