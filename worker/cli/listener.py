"""`mu2 listener`: the DICOM listener as a service of its own."""


def listener() -> None:
    """Runs the DICOM listener until Ctrl-C or SIGTERM."""
    from dicom_listener.__main__ import main

    raise SystemExit(main())
