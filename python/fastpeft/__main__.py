"""``python -m fastpeft`` is the command line."""

from .apps.cli import main

main()
