"""The null defense, reference of every table."""

from __future__ import annotations

from deepenc.encryption.defense import Defense

null = Defense(name="null", summary="The stolen original: nothing is inserted.")
