"""`python -m worker` is the `mu2` command."""

from worker.cli import main

main()
