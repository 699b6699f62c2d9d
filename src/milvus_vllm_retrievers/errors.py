"""One hierarchy of errors; each says what went wrong and what to do next."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NoReturn, TypeVar

from pydantic import ValidationError

_EXCERPT_CHARACTERS = 200
_EMPTY = inspect.Parameter.empty

_NOTHING: Mapping[str, str] = MappingProxyType({})

T = TypeVar("T")
E = TypeVar("E", bound=BaseException)


class MilvusVLLMError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigurationError(MilvusVLLMError, ValueError):
    """What was asked for cannot work; change the argument or the collection that it names."""


class MissingDependencyError(MilvusVLLMError, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""


SearchFailure = Literal[
    "not_loaded", "disconnected", "closed", "timeout", "rerank_timeout", "too_large"
]


class SearchError(MilvusVLLMError):
    """Milvus did not answer a search; look at the server, the collection or the filter.

    Attributes:
        reason: What kind of failure it was, where that is known: the collection is
            ``"not_loaded"``, Milvus is ``"disconnected"``, the client was ``"closed"``, the call's
            ``"timeout"`` is over, Milvus gave up waiting within itself, as it does for a rerank
            service (``"rerank_timeout"``), or the answer or request is ``"too_large"``.
    """

    def __init__(self, message: str, *, reason: SearchFailure | None = None) -> None:
        super().__init__(message)
        self.reason = reason

    @property
    def is_of_connection(self) -> bool:
        """Whether the connection failed, not the search: another try may work."""
        return self.reason in {"disconnected", "closed"}


class RerankError(MilvusVLLMError):
    """The candidates were found but could not be reranked; `on_error` decides what follows."""


class RerankStatusError(RerankError):
    """vLLM, or a gateway before it, answered with an HTTP error.

    Attributes:
        status_code: The HTTP status.
        body: The start of the answer's body, at most 200 characters.
        retry_after: Seconds the answer asks to wait before another try, where it does.
    """

    def __init__(
        self, message: str, *, status_code: int, body: str, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.status_code = status_code
        self.body = body
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[Any, ...]:
        make = functools.partial(
            type(self),
            status_code=self.status_code,
            body=self.body,
            retry_after=self.retry_after,
        )
        return make, self.args


class RerankConnectionError(RerankError):
    """vLLM could not be reached, or the connection broke before the answer was complete.

    Attributes:
        may_pass: Whether another try may reach it; a certificate or a proxy has to be mended first.
    """

    def __init__(self, message: str, *, may_pass: bool = True) -> None:
        super().__init__(message)
        self.may_pass = may_pass


class RerankTimeoutError(RerankConnectionError):
    """vLLM did not answer in time; raise `timeout` or rerank fewer or shorter candidates."""


class RerankResponseError(RerankError):
    """vLLM answered, but not with one finite score for every document."""


def excerpt(text: str, limit: int = _EXCERPT_CHARACTERS) -> str:
    """Shorten `text` to what may stand in an error message."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def redacted(text: str, secrets: Iterable[str]) -> str:
    """Replace secrets in a text by ``***``."""
    for secret in sorted(filter(None, secrets), key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


def caused(failed: E, error: BaseException, redact: Callable[[str], str]) -> E:
    """Chain an error to its cause, unless the cause, or what it is chained to, shows a secret.

    Raise what is returned outside of the ``except`` block: inside, Python would chain it again.

    Args:
        failed: The error that is to be raised.
        error: What it comes from.
        redact: Takes secrets from a text.
    """
    chain = [error]
    for each in chain:  # may be chained in a circle
        linked = (each.__cause__, each.__context__)
        chain += [one for one in linked if one is not None and one not in chain]
    if all(redact(text) == text for each in chain for text in (str(each), repr(each))):
        failed.__cause__ = error
    return failed


def did_you_mean(name: str, choices: list[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the nearest of `choices`, or an empty string."""
    near = difflib.get_close_matches(name, choices)
    near.sort(key=lambda choice: sorted(choice) != sorted(name))  # swapped letters go first
    return f" (did you mean {near[0]!r}?)" if near else ""


def unknown_argument(name: str, known: Iterable[str], meant: Mapping[str, str] = _NOTHING) -> str:
    """Say that there is no such argument, and which one was probably meant.

    Args:
        name: The unknown argument.
        known: The arguments that there are.
        meant: What to do in place of names that others use for the same thing.
    """
    hint = f": {meant[name]}" if name in meant else did_you_mean(name, list(known))
    return f"unknown argument {name!r}{hint}"


def refuse_unknown(
    name: str, unknown: Iterable[str], known: Iterable[str], meant: Mapping[str, str] = _NOTHING
) -> None:
    """Refuse arguments that a constructor or a method does not have; see `unknown_argument`.

    Raises:
        ConfigurationError: There is one.
    """
    for argument in unknown:
        if argument not in known:
            raise ConfigurationError(f"{name}: {unknown_argument(argument, known, meant)}")


def refuse_setting(
    name: str,
    attribute: str,
    known: Iterable[str],
    settable: Iterable[str],
    meant: Mapping[str, str] = _NOTHING,
) -> NoReturn:
    """Refuse to set an attribute of a living object.

    Args:
        name: The class's name.
        attribute: What was to be set.
        known: The arguments of the class.
        settable: Those that can be set.
        meant: What to do in place of names that others use for the same thing.

    Raises:
        ConfigurationError: Always; it says what to do.
    """
    can_be = f"only {', '.join(settable)} can be"
    if attribute in known:
        raise ConfigurationError(
            f"{name}.{attribute} cannot be set, {can_be}: make a new {name} with {attribute}=..."
        )
    if attribute in meant:
        raise ConfigurationError(f"{name}.{attribute} cannot be set: {meant[attribute]}")
    hint = did_you_mean(attribute, list(settable))
    raise ConfigurationError(f"{name}.{attribute} cannot be set, {can_be}{hint}")


def configuration_errors(
    *positional: str, meant: Mapping[str, str] = _NOTHING, settable: Collection[str] | None = None
) -> Callable[[type[T]], type[T]]:
    """Decorate a pydantic class so that it raises `ConfigurationError`, not pydantic's own error.

    Pydantic's report quotes the values it was given, which may be secrets; ours names the
    argument and the rule, and for an unknown argument the nearest known one.

    Args:
        *positional: Arguments that may be given by position, which pydantic models do not take.
        meant: What to do in place of arguments that others use for the same thing.
        settable: The only fields that can be set later; None leaves that to pydantic.
    """

    def decorate(cls: type[T]) -> type[T]:
        original, original_set = cls.__init__, cls.__setattr__
        parameters = inspect.signature(original).parameters
        required = [p for p in positional if p in parameters and parameters[p].default is _EMPTY]

        @functools.wraps(original)
        def checked_init(self: Any, *args: Any, **kwargs: Any) -> None:
            by_name = dict(zip(positional, args, strict=False))
            if missing := [name for name in required if name not in by_name | kwargs]:
                raise ConfigurationError(f"{cls.__name__}: argument {missing[0]!r} is required")
            try:
                original(self, *args[len(by_name) :], **by_name, **kwargs)
            except ValidationError as error:
                raise ConfigurationError(described(cls, error, meant)) from None

        def checked_set(self: Any, name: str, value: Any) -> None:
            if name in (known := _fields(cls)) and name not in (settable or ()):
                refuse_setting(cls.__name__, name, known, settable or ())
            try:
                original_set(self, name, value)
            except ValidationError as error:
                raise ConfigurationError(described(cls, error, meant)) from None

        cls.__init__ = checked_init  # type: ignore[method-assign]
        if settable is not None:
            cls.__setattr__ = checked_set  # type: ignore[method-assign]
        return cls

    return decorate


def _fields(cls: type[Any]) -> list[str]:
    return list(getattr(cls, "__pydantic_fields__", {}))


def described(cls: type[Any], error: ValidationError, meant: Mapping[str, str] = _NOTHING) -> str:
    """Say what pydantic found wrong, without the values, which may be secrets."""
    known = _fields(cls)
    lines = []
    for problem in error.errors(include_url=False, include_input=False, include_context=True):
        first, *rest = problem["loc"] or ("",)
        # Arguments given by position are numbered.
        first = known[first] if isinstance(first, int) and first < len(known) else first
        name = ".".join(str(part) for part in (first, *rest))
        if problem["type"] in {"extra_forbidden", "unexpected_keyword_argument"}:
            lines.append(unknown_argument(name, known, meant))
        elif problem["type"] == "no_such_attribute":
            lines.append(unknown_argument(name, known, meant).replace("argument", "attribute", 1))
        elif problem["type"] == "unexpected_positional_argument":
            lines.append(f"what follows {known[0]!r} must be given by name, such as model=...")
        elif problem["type"] in {"missing", "missing_argument"}:
            lines.append(f"argument {name!r} is required")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            lines.append(message if message.startswith(name) else f"{name}: {message}")
    return f"{cls.__name__}: " + "; ".join(lines)
