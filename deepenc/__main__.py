"""``python -m deepenc`` is the ``deepenc`` command."""

from deepenc.cli import main

main()
