"""Connections to Milvus: owned or borrowed, blocking and one per event loop, healed when lost."""

from __future__ import annotations

import asyncio
import re
import threading
import weakref
from base64 import b64encode
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol
from uuid import uuid4

from pydantic import SecretStr

from milvus_vllm_retrievers._core.deadline import NO_DEADLINE, Deadline
from milvus_vllm_retrievers._core.fork import forget_in_child
from milvus_vllm_retrievers._core.milvus_errors import (
    connecting_advice,
    explain_error,
    given_as_key_names,
)
from milvus_vllm_retrievers._core.per_loop import PerLoop
from milvus_vllm_retrievers._core.quiet import Quiet
from milvus_vllm_retrievers.errors import (
    ConfigurationError,
    MilvusVLLMError,
    SearchError,
    caused,
    excerpt,
    redacted,
)

if TYPE_CHECKING:
    from pymilvus import AsyncMilvusClient, MilvusClient

_FIRST_WITH_SAFE_CLOSE = (2, 6, 10)
DEFAULT_URI = "http://localhost:19530"
# gRPC refuses calls at once while it waits to connect anew, by default for up to two minutes:
# a Milvus that is back would go on being down for us.
_GRPC_OPTIONS = {"grpc.initial_reconnect_backoff_ms": 100, "grpc.max_reconnect_backoff_ms": 1000}
# Milvus Lite's server hangs up on clients that ping as often as pymilvus's do.
_GRPC_OPTIONS_OF_LITE = {"grpc.keepalive_time_ms": 3_600_000}
# The thread that drives all of gRPC's async connections does not live on in a forked process.
_parent_was_async = False


@dataclass(frozen=True, slots=True)
class ConnectionSettings:
    """Where Milvus is and how to log in.

    Args:
        uri: ``http(s)://host:port``, or the path of a Milvus Lite file (``./x.db``).
        token: ``user:password`` or an api key; empty for none.
        db_name: Database; empty for the default one.
        connection_args: Further arguments of pymilvus's client (TLS files, user, password).
    """

    uri: str = DEFAULT_URI
    token: str = field(default="", repr=False)
    db_name: str = ""
    connection_args: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if "/" in self._login:
            raise ConfigurationError(
                "the credentials in uri hold a '/', which ends the host there: pass token= instead"
            )

    @property
    def _login(self) -> str:
        return _login_in(self.uri)

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of pymilvus's clients."""
        given = {"uri": self.uri, "token": self.token, "db_name": self.db_name}
        return {**{k: v for k, v in given.items() if v}, **self.connection_args}

    @property
    def secrets(self) -> list[str]:
        """What logs in: the token, passwords, and credentials in the URI."""
        return [
            *_secrets_in({"uri": self.uri, "token": self.token}),
            *_secrets_in(self.connection_args),
        ]


def _login_in(uri: str) -> str:
    return uri.partition("://")[2].rpartition("@")[0]


def _secrets_in(arguments: Mapping[str, Any]) -> list[str]:
    """Return what logs in among a client's arguments, in every form in which it may be shown."""
    uri, token, user, password = (
        str(arguments.get(name) or "") for name in ("uri", "token", "user", "password")
    )
    logins = [_login_in(uri), token, f"{user}:{password}" if password else ""]
    # The password that Milvus comes with is no secret, and a word of every error.
    after_user = {login.partition(":")[2] for login in logins} - {"Milvus"}
    encoded = [b64encode(login.encode()).decode() for login in logins]  # as the header has it
    return [*logins, *after_user, *encoded]


class ConnectionArguments(Protocol):
    """What a front end's class holds to connect with."""

    uri: str
    token: SecretStr
    db_name: str
    connection_args: Mapping[str, Any]
    client: Any
    async_client: Any


class MilvusConnection:
    """A blocking client and one async client per event loop, owned or borrowed.

    Clients that were passed in are used as they are and never closed; the others are made on
    first use and closed by `close` / `aclose`.

    A forked process makes connections of its own. One that was forked while async connections
    were open can make blocking calls only: gRPC's async side does not survive that.

    Args:
        settings: For the clients to make.
        client: A blocking client to borrow.
        async_client: An async client to borrow; it works in the event loop it first ran in.
    """

    def __init__(
        self,
        settings: ConnectionSettings,
        client: MilvusClient | None = None,
        async_client: AsyncMilvusClient | None = None,
    ) -> None:
        import pymilvus  # noqa: F401, PLC0415 - takes seconds, which no event loop should wait

        self._settings = settings
        self._lock = threading.Lock()
        self._connecting = threading.Lock()  # held for long; `_lock` never is
        self._borrowed = client
        self._borrowed_async = async_client
        self._hidden: set[str] = set()
        self._owned: MilvusClient | None = None
        self._finalizer: weakref.finalize[..., Any] | None = None
        self._owned_async = self._new_per_loop()
        forget_in_child(self)

    @classmethod
    def of(cls, arguments: ConnectionArguments) -> MilvusConnection:
        """Make the connection that a front end's arguments describe."""
        settings = ConnectionSettings(
            uri=arguments.uri,
            token=arguments.token.get_secret_value(),
            db_name=arguments.db_name,
            connection_args=arguments.connection_args,
        )
        return cls(settings, client=arguments.client, async_client=arguments.async_client)

    def client(self, deadline: Deadline = NO_DEADLINE) -> MilvusClient:
        """Return the blocking client.

        Args:
            deadline: When it must be connected.

        Raises:
            ConfigurationError: Only an async client was passed.
            SearchError: Milvus cannot be reached.
        """
        if self._borrowed is not None:
            return self._borrowed
        if self._borrowed_async is not None and self._settings == ConnectionSettings():
            raise ConfigurationError(
                "only an async_client was given: pass client= (or uri=) too for blocking calls"
            )
        left = deadline.remaining()
        if not self._connecting.acquire(timeout=-1 if left is None else left):
            raise SearchError(
                "connecting to Milvus took longer than the call's timeout", reason="timeout"
            )
        try:
            client = self._owned
            if client is None:
                from pymilvus import MilvusClient  # noqa: PLC0415 - seconds of import time

                arguments = self._settings.arguments()
                client = self._connect(MilvusClient, arguments, deadline.remaining())
                with self._lock:
                    self._owned = client
                    # Closed also where nobody calls close, as with most retrievers.
                    self._finalizer = weakref.finalize(self, client.close)
            return client
        finally:
            self._connecting.release()

    def async_client(self) -> AbstractAsyncContextManager[AsyncMilvusClient]:
        """Return a context manager that connects the running event loop's client and gives it.

        Within it, a client of ours stays open.

        Raises:
            ConfigurationError: Only a blocking client was passed and it does not tell where
                its server is.
            SearchError: Milvus cannot be reached.
        """
        if _parent_was_async:
            raise ConfigurationError(
                "this process was forked from one with open async connections to Milvus, which "
                "gRPC does not survive: make blocking calls here, fork before the first async "
                "call or after aclose(), or start the process by 'spawn'"
            )
        if self._borrowed_async is not None:
            return nullcontext(self._borrowed_async)
        return self._owned_async.using()

    def failure(self, error: BaseException, what: str, client: Any) -> MilvusVLLMError:
        """Return what a client's error means, without secrets and ready to be raised.

        A client of ours that turns out to be closed is let go, so that the next try makes another.

        Args:
            error: What the client raised.
            what: What was tried.
            client: The blocking or async client.
        """
        explained = explain_error(error, what, self._redacted)
        if client and isinstance(explained, SearchError) and explained.reason == "closed":
            if client in (self._borrowed, self._borrowed_async):
                explained = SearchError(f"{explained} (the client that was passed in is closed)")
            self._owned_async.discard(client)
            with self._lock:
                self._owned = None if self._owned is client else self._owned
        return caused(explained, error, self._redacted)

    def _redacted(self, text: str) -> str:
        """Take from a text what logs in, be it ours or the borrowed client's."""
        secrets = [*self._settings.secrets, *self._hidden, *given_as_key_names(text)]
        for borrowed in (self._borrowed, self._borrowed_async):
            if hasattr(borrowed, "_config"):
                secrets += _secrets_in(_arguments_of(borrowed))
        return redacted(text, secrets)

    def quiet(self) -> AbstractContextManager[None]:
        """Return a context manager for calls of a client: what pymilvus logs of them is ours."""
        return Quiet(self._redacted)

    def hide(self, *secrets: str) -> None:
        """Keep secrets that Milvus may hear of, or knows, out of every error."""
        self._hidden.update(secrets)

    def forget_connections(self) -> Sequence[object]:
        """Give up the clients of the parent process, without closing them."""
        global _parent_was_async  # noqa: PLW0603 - gRPC has one poller for the whole process
        was_open = getattr(self._borrowed_async, "_handler", None) is not None
        _parent_was_async |= was_open or self._owned_async.is_open
        inherited = (self._owned, self._owned_async)
        if self._finalizer is not None:
            self._finalizer.detach()
        self._lock = threading.Lock()
        self._connecting = threading.Lock()
        self._owned = None
        self._owned_async = self._new_per_loop()
        return inherited

    def close(self) -> None:
        """Close the blocking client, if it is ours."""
        with self._lock:
            client, self._owned = self._owned, None
            finalizer, self._finalizer = self._finalizer, None
        if finalizer is not None:
            finalizer.detach()
        if client is not None:
            client.close()

    async def aclose(self) -> None:
        """Close this event loop's client and the blocking one, as far as they are ours.

        Async calls under way finish, and the last of them closes the client; later ones connect
        anew. A blocking call under way connects anew and is repeated.
        """
        await self._owned_async.close()
        self.close()

    def _new_per_loop(self) -> PerLoop[AsyncMilvusClient]:
        return PerLoop(self._new_async_client, _close_async, _enter)

    def _new_async_client(self) -> AsyncMilvusClient:
        from pymilvus import AsyncMilvusClient  # noqa: PLC0415 - seconds of import time

        arguments = self._settings.arguments()
        if self._borrowed is not None and hasattr(self._borrowed, "_config"):
            arguments = _arguments_of(self._borrowed)
        elif self._borrowed is not None and self._settings == ConnectionSettings():
            raise ConfigurationError(
                "the blocking client that was passed does not tell its server: pass "
                "async_client= (or uri=) too for async calls"
            )
        return self._connect(AsyncMilvusClient, arguments)

    def _connect(
        self, make: Any, arguments: Mapping[str, Any], seconds: float | None = None
    ) -> Any:
        given = {**_connection_of_its_own(), **arguments}
        given["grpc_options"] = {**_grpc_options(given), **given.get("grpc_options", {})}
        limits = [limit for limit in (seconds, given.get("timeout")) if limit is not None]
        if limits:
            given["timeout"] = min(limits)
        try:
            with self.quiet():
                return make(**given)
        except Exception as error:  # noqa: BLE001 - pymilvus and grpc raise many kinds
            uri, shown = str(arguments["uri"]), excerpt(self._redacted(str(error)))
            failed = SearchError(
                f"cannot connect to Milvus at {self._redacted(uri)!r}: {shown} "
                f"({connecting_advice(uri, shown)})",
                reason="disconnected" if "://" in uri else None,
            )
            failed = caused(failed, error, self._redacted)
        raise failed


def is_cancelled() -> bool:
    """Tell whether someone cancelled the running task; gRPC raises CancelledError by itself too.

    Python 3.10 cannot tell: there, someone always did.
    """
    cancelling = getattr(asyncio.current_task(), "cancelling", None)
    return cancelling is None or cancelling() > 0


def _grpc_options(arguments: Mapping[str, Any]) -> dict[str, Any]:
    is_remote = "://" in str(arguments["uri"])
    return _GRPC_OPTIONS if is_remote else {**_GRPC_OPTIONS, **_GRPC_OPTIONS_OF_LITE}


def _connection_of_its_own() -> dict[str, Any]:
    """Return the argument that keeps a client from sharing its connection with others.

    All clients of a server share one by default. Before pymilvus 2.6.10 the first of them that is
    closed takes it from the others, the user's own among them; later ones keep it open as long
    as the process runs, one for each event loop, and after a fork (measured).
    """
    from pymilvus import __version__  # noqa: PLC0415 - seconds of import time

    version = tuple(int(number) for number in re.findall(r"\d+", __version__)[:3])
    if version < _FIRST_WITH_SAFE_CLOSE:
        return {"alias": f"milvus-vllm-{uuid4()}"}
    return {"dedicated": True}


def _arguments_of(client: Any) -> dict[str, Any]:
    """Read from a blocking client how to connect an async one to the same server."""
    config = client._config
    return {
        "uri": config.uri,
        "token": config.token,
        "db_name": config.db_name,
        **dict(config.handler_kwargs),
    }


async def _enter(client: AsyncMilvusClient) -> None:
    """Connect, where this version of pymilvus has a way to ask for it.

    It connects with a client's first call; of several at once each would, and all of these
    connections but one would stay open for good.
    """
    enter = getattr(client, "__aenter__", None)
    if enter is not None:
        await enter()


async def _close_async(client: AsyncMilvusClient) -> None:
    await client.close()
