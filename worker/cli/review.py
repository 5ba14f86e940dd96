"""`mu2 review`: the review page as a service of its own."""


def review() -> None:
    """Serves the review page until Ctrl-C or SIGTERM."""
    from worker.core import settings
    from worker.review.server import serve

    serve(settings.current())
