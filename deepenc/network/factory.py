"""How a network's structure is made again: from a library's name for it and plain arguments, not a pickle.

A factory is plain data, so that a file may hold it. What a file says is not trusted: it may choose among
the networks of known libraries, but neither import code, nor read a path, nor download anything.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import json
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import nullcontext
from functools import cache
from importlib.metadata import entry_points
from typing import Any, Literal, Self, get_args

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from torch import nn

from deepenc.errors import CheckpointError, ConfigError, near
from deepenc.network.guard import first_line
from deepenc.network.limits import Limits
from deepenc.plugins import explain

Library = Literal["torchvision", "timm", "transformers", "python"]

GROUP = "deepenc.networks"
"""Entry points of functions that any file may name: they make a network of their arguments and do no more."""
_EXTRAS = {"timm": "timm", "transformers": "text"}
_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)
_NAME = re.compile(r"\w+(\.\w+)*", re.ASCII)
_PREFIXES = ("pretrained", "use_pretrained", "weights", "checkpoint", "use_timm", "hf_hub", "_attn_impl")
_SUFFIXES = ("_path", "_file", "_dir", "_url", "_implementation")
_REFUSED = frozenset(
    {"auto_map", "backbone", "backbone_kwargs", "custom_pipelines", "feature_cls", "features_only", "file"}
    | {"kwargs_filter", "local_files_only", "path", "quantization_config", "revision", "token"}
    | {"trust_remote_code", "url", "use_kernels"}
)
_LABELS = frozenset({"id2label", "label2id"})


@cache
def trusted() -> frozenset[str]:
    """Functions (``"package.module:function"``) that installed packages declare under `GROUP`."""
    return frozenset(point.value for point in entry_points(group=GROUP))


class Factory(BaseModel):
    """Which code makes a network's structure.

    Without arguments it is written as one text: ``torchvision:resnet18``, ``timm:vit_tiny_patch16_224``,
    ``transformers:BertModel``, or ``package.module:function`` for a function of the user's own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    library: Library
    """Whose network it is; ``python`` for a function of the user's own."""
    name: str
    """The library's name of it: a model builder of torchvision, a model of timm, a class of transformers;
    ``package.module:function`` for ``python``."""
    arguments: dict[str, JsonValue] = Field(default_factory=dict)
    """Keyword arguments, as JSON; for transformers the configuration (``config.to_dict()``)."""

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, data: Any) -> Any:
        if not isinstance(data, str):
            return data
        library, colon, name = data.partition(":")
        if not colon:
            raise ValueError(
                "expected library:name, such as torchvision:resnet18, or package.module:function"
            )
        if library in get_args(Library):
            return {"library": library, "name": name}
        return {"library": "python", "name": data}

    @model_validator(mode="after")
    def _named(self) -> Self:
        form = _FUNCTION if self.library == "python" else _NAME
        if not form.fullmatch(self.name):
            wanted = "package.module:function" if self.library == "python" else f"a name of {self.library}"
            raise ValueError(f"expected {wanted}, got {self.name!r}")
        return self

    @model_serializer(mode="wrap")
    def _to_text(self, handler: SerializerFunctionWrapHandler) -> Any:
        return handler(self) if self.arguments else str(self)

    def __str__(self) -> str:
        return self.name if self.library == "python" else f"{self.library}:{self.name}"

    @classmethod
    def of(cls, spec: Factory | str | Mapping[str, Any]) -> Self:
        """The factory that a text or a mapping stands for.

        Raises:
            ConfigError: It is invalid.

        >>> Factory.of("torchvision:resnet18").name
        'resnet18'
        """
        try:
            return cls.model_validate(spec)
        except ValidationError as error:
            raise ConfigError(f"factory: {explain(error, list(cls.model_fields))}") from error

    @classmethod
    def of_transformer(cls, model: Any) -> Self:
        """The factory of a network of transformers: its class, and its configuration without its origin.

        Args:
            model: A ``PreTrainedModel``.

        Raises:
            ConfigError: It is none, or its configuration cannot be kept.
        """
        config: Any = getattr(model, "config", None)
        if not type(model).__module__.startswith("transformers.") or not hasattr(config, "to_dict"):
            raise ConfigError(
                f"expected a network of transformers, got {type(model).__name__}; give a factory "
                "by name: package.module:function"
            )
        plain = json.loads(config.to_json_string(use_diff=False))
        return cls.of(
            {"library": "transformers", "name": type(model).__name__, "arguments": without_origin(plain)}
        )

    def build(
        self,
        device: torch.device | str = "cpu",
        *,
        allow: Collection[str] = (),
        limits: Limits | None = None,
    ) -> nn.Module:
        """Make the network, randomly initialised and in eval mode; the same each time.

        Args:
            device: Where to; on ``"meta"`` it takes no memory.
            allow: Functions (``"package.module:function"``) that may be imported and called. A name that was
                read from a file imports nobody's code without it, but for that which is `trusted`.
            limits: For a factory that was read from a file; default: none.

        Raises:
            CheckpointError: It is a function that ``allow`` does not list, or the network exceeds the limits.
            ConfigError: The library or the network is unknown or not installed, or the arguments are invalid.
        """
        if problem := next(_unsafe(self.arguments), None):
            raise ConfigError(
                f"factory {self}: {problem}; a factory makes the structure alone, so leave it out"
            )
        if limits is not None:
            limits.check(self.arguments)
        make = {"torchvision": _torchvision, "timm": _timm, "transformers": _transformers}
        device = torch.device(device)
        arguments = copy.deepcopy(self.arguments)
        with torch.random.fork_rng(devices=[]), torch.device("meta" if device.type == "meta" else "cpu"):
            torch.default_generator.manual_seed(0)
            try:
                with nullcontext() if limits is None else limits.held():
                    if self.library == "python":
                        network = _python(self.name, arguments, allow)
                    else:
                        network = make[self.library](self.name, arguments)
            except (ConfigError, CheckpointError):
                raise
            except Exception as error:
                raise ConfigError(
                    f"factory {self} raised {type(error).__name__}: {first_line(error)}; repair its "
                    f"arguments ({', '.join(sorted(self.arguments)) or 'none are given'})"
                ) from error
        if not isinstance(network, nn.Module):
            raise ConfigError(f"factory {self}: expected a torch.nn.Module, got {type(network).__name__}")
        return network.eval() if device.type in {"meta", "cpu"} else network.to(device).eval()


def _unsafe(value: JsonValue, key: str = "") -> Iterator[str]:
    """Say what of some arguments could make a library read a path, download, or run other code."""
    if isinstance(value, dict):
        for name, item in value.items():
            refused = name in _REFUSED or name.startswith(_PREFIXES) or name.endswith(_SUFFIXES)
            if refused and item:
                yield f"the argument {name!r} is refused"
            elif name not in _LABELS:
                yield from _unsafe(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from _unsafe(item, key)
    elif isinstance(value, str) and (value.startswith((".", "~")) or any(sign in value for sign in "/\\:")):
        yield f"the argument {key!r} looks like a path or an address ({value[:60]!r})"


def without_origin(value: Any) -> Any:
    """A configuration without the names of where it was downloaded from."""
    if isinstance(value, dict):
        origin = {"_name_or_path", "name_or_path", "_commit_hash"}
        return {name: without_origin(item) for name, item in value.items() if name not in origin}
    return [without_origin(item) for item in value] if isinstance(value, list) else value


def _imported(library: str) -> Any:
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] != library:
            raise
        raise ConfigError(
            f'the networks of {library} need {library}: pip install "deepenc[{_EXTRAS[library]}]"'
        ) from error


def _unknown(library: str, name: str, known: Collection[str]) -> ConfigError:
    close = difflib.get_close_matches(name, known, n=8, cutoff=0.5)
    hint = near(name, close) if close else f"{library} has {len(known)} others, none with a name like it"
    return ConfigError(f"{library} has no network {name!r}: {hint}")


def _torchvision(name: str, arguments: dict[str, Any]) -> Any:
    from torchvision import models

    known = models.list_models()
    if name not in known:
        raise _unknown("torchvision", name, known)
    builder = models.get_model_builder(name)
    nothing: dict[str, Any] = {"weights": None}
    if name in models.list_models(module=models.detection) + models.list_models(module=models.segmentation):
        nothing["weights_backbone"] = None
    with warnings.catch_warnings():  # two models say that their random initialisation is slow
        warnings.simplefilter("ignore", FutureWarning)
        return builder(**nothing, **arguments)


def _timm(name: str, arguments: dict[str, Any]) -> Any:
    timm = _imported("timm")
    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    return timm.create_model(name, pretrained=False, **arguments)


def _transformers(name: str, arguments: dict[str, Any]) -> Any:
    library = _imported("transformers")
    cls: Any = getattr(library, name, None)
    base = library.PreTrainedModel
    if not (isinstance(cls, type) and issubclass(cls, base) and getattr(cls, "config_class", None)):
        known = [n for n in dir(library) if re.fullmatch(r"(?!Auto)[A-Z]\w*(?<!PreTrained)(Model|For\w+)", n)]
        raise _unknown("transformers", name, known)
    config = getattr(cls, "config_class").from_dict(arguments)  # noqa: B009
    if problem := next(_unsafe(json.loads(config.to_json_string(use_diff=False))), None):
        raise ConfigError(f"factory transformers:{name}: in the configuration, {problem}; give another value")
    return cls(config)


def _python(name: str, arguments: dict[str, Any], allow: Collection[str]) -> Any:
    if name not in allow and name not in trusted():
        raise CheckpointError(
            f"the network is made by the Python function {name}, which is not of a known library; "
            f"if you trust that code, allow it by name: allow=({name!r},)"
        )
    module, _, function = name.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"cannot import {name}: {error}; is its folder on the Python path?") from error
    return make(**arguments)
