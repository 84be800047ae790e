"""What a forged header may not do to whoever reads it: take his memory or his time."""

from __future__ import annotations

import json
from typing import Any

from pydantic import TypeAdapter, ValidationError

from deepenc.network.sites import Setting, Slot

MAX_HEADER = 2**24
"""Bytes of a header; a mixture of hundreds of experts needs half of it."""

MAX_VALUES = 2**19
"""Values in a header: parsed, each may take 200 bytes."""

MAX_CHANNELS = 2**22
"""Confusion channels of a whole network; in the largest language models, 5 % are a fifth of it."""

_PARTS: dict[str, TypeAdapter[Any]] = {"slots": TypeAdapter(Slot), "settings": TypeAdapter(Setting)}


def first_fault(document: dict[str, Any], fields: set[str]) -> str | None:
    """What is wrong with the parts of a header, if anything.

    pydantic collects every fault: of a header of 4 MiB full of them, 2 million in 3 GiB. This stops at the
    first, and leaves few that pydantic could still find.

    Args:
        document: The header, parsed.
        fields: Names that it may have.
    """
    if strangers := set(document) - fields:
        return f"unknown field {min(strangers)[:40]!r}"
    sites, configuration = document.get("sites", []), document.get("configuration", {})
    if not isinstance(configuration, dict) or not all(type(n) is int for n in configuration.values()):
        return "the configuration does not map names to counts"
    if not isinstance(sites, list):
        return "the sites are no list"
    for site in sites:
        if not isinstance(site, dict) or type(site.get("name")) is not str:
            return "a site has no name"
        for field, adapter in _PARTS.items():
            if fault := _first(site.get(field, []), adapter):
                return f"a site's {field}: {fault}"
    return None


def _first(parts: Any, adapter: TypeAdapter[Any]) -> str | None:
    if not isinstance(parts, list):
        return "no list"
    for part in parts:
        try:
            adapter.validate_json(json.dumps(part), strict=True)
        except ValidationError as error:
            return brief(error)
    return None


def brief(error: ValidationError) -> str:
    """The first fault that pydantic found, in a line; without the value, which may be of any size."""
    fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(step)[:40] for step in fault["loc"][:6]) or "it"
    return f"{where}: {fault['msg'][:200]}"
