"""Where the command line prints: a terminal, or a plain file with room for the tables."""

from __future__ import annotations

import os

from rich.console import Console

WIDTH = 120
"""Columns of output that goes to no terminal, unless ``COLUMNS`` says otherwise."""


def out() -> Console:
    """Standard output."""
    console = Console(highlight=False)
    return (
        console if console.is_terminal or "COLUMNS" in os.environ else Console(highlight=False, width=WIDTH)
    )


def complain(text: str) -> None:
    """Print an error's text, in red on a terminal."""
    console = Console(stderr=True, highlight=False)
    console.print("error: ", style="bold red", end="")
    # Not wrapped: a path that is cut in two can neither be copied nor searched for.
    console.print(text, style="red", markup=False, soft_wrap=True)
