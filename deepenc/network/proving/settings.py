"""Find the attributes of modules that must follow a site's width: an attention head's width, its flags.

What a forward pass reads besides tensors cannot be traced. It is searched for: numbers that a module keeps
and that are multiples of the width are widened with it, and what makes the module's outputs agree stays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import nn

from deepenc.network.calling import Arguments
from deepenc.network.proving.probe import probe
from deepenc.network.proving.reference import reference
from deepenc.network.sites import Role, Setting, Site

Settings = tuple[Setting, ...]


class Completion:
    """Gives sites of heads the settings that they need.

    Args:
        model: The network, in eval mode; untouched.
        seen: What each home of a head was given when the network ran, once for each call.
    """

    def __init__(self, model: nn.Module, seen: Mapping[str, list[Arguments]]) -> None:
        self._model = model
        self._seen = seen
        self._recipes: dict[type, list[Settings]] = {}

    def guess(self, site: Site) -> Site | str:
        """The site with the settings that another of the same class needed, not probed; or as `of`."""
        home = home_of(site)
        if self._seen[home] and (known := self._recipes.get(type(self._model.get_submodule(home)))):
            return _outside(site, home, known[-1])
        return self.of(site)

    def of(self, site: Site) -> Site | str:
        """A site whose channels are contracted, with its settings, or why none make it neutral."""
        home = home_of(site)
        runs = self._seen[home]
        if not runs:
            return f"{home or 'the network'} is not called itself; its heads are left as they are"
        module = self._model.get_submodule(home)
        inner = replace(site, slots=tuple(replace(s, tensor=inside(home, s.tensor)) for s in site.slots))
        expected = [reference(module, run) for run in runs]

        def refused(settings: Settings) -> str | None:
            part = [replace(inner, settings=settings)]
            tried = (
                probe(module, run, part, {site.name: 1}, of) for run, of in zip(runs, expected, strict=True)
            )
            return next((reason for reason in tried if reason is not None), None)

        known = self._recipes.setdefault(type(module), [])
        for settings in known:
            if refused(settings) is None:
                return _outside(site, home, settings)
        reasons = []
        for settings in _proposals(module, inner):
            reason = refused(settings)
            if reason is None:
                for name in dict.fromkeys(setting.name for setting in settings):
                    fewer = tuple(setting for setting in settings if setting.name != name)
                    settings = fewer if refused(fewer) is None else settings
                known.append(settings)
                return _outside(site, home, settings)
            reasons.append(reason)
        return f"{reasons[0]}; no number that {home or 'the network'} keeps mends it"


def home_of(site: Site) -> str:
    """Path of the innermost module that holds all tensors of the site."""
    paths = [slot.tensor.split(".")[:-1] for slot in site.slots]
    common = paths[0]
    for path in paths[1:]:
        agree = [a == b for a, b in zip(common, path, strict=False)]
        common = common[: agree.index(False) if False in agree else len(agree)]
    return ".".join(common)


def inside(home: str, name: str) -> str:
    """A name inside a module, from its name in the whole."""
    return name[len(home) + 1 :] if home else name


def _outside(site: Site, home: str, settings: Settings) -> Site:
    """The site with settings whose modules were named from its home."""
    return replace(
        site,
        settings=tuple(
            replace(setting, module=".".join(part for part in (home, setting.module) if part))
            for setting in settings
        ),
    )


def _proposals(module: nn.Module, site: Site) -> Iterator[Settings]:
    """Sets of settings to try, the smallest first."""
    narrow = {1}  # a head's width; twice the site's where rotary embeddings pair the channels
    entries: Counter[tuple[str, int]] = Counter()
    for slot in site.slots:
        if slot.role in {Role.INCOMING, Role.OUTGOING}:
            entries[slot.tensor, slot.dim] += slot.block
    wide = set(entries.values())
    flags = tuple(
        Setting(path, name, True)
        for path, part in module.named_modules()
        for name, value in vars(part).items()
        if value is True and name.startswith("fused")
    )
    tried: set[Settings] = set()
    for off in (False, True) if flags else (False,):
        for steps in (set(), narrow, narrow | {2}, narrow | {2} | wide, wide):
            settings = _multiples(module, site.width, steps) + (flags if off else ())
            if settings not in tried:
                tried.add(settings)
                yield settings


def _multiples(module: nn.Module, width: int, steps: set[int]) -> Settings:
    return tuple(
        Setting(path, name, value, value // width)
        for path, part in module.named_modules()
        if list(part.children()) or not list(part.parameters())  # a layer's sizes follow its tensors anyway
        for name, value in vars(part).items()
        if type(value) is int and value % width == 0 and value // width in steps and not _counts(name)
    )


def _counts(name: str) -> bool:
    """Whether a number counts things."""
    return name.startswith(("num_", "n_")) or name.endswith(("heads", "groups"))
