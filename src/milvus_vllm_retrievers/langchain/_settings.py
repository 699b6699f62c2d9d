"""Attributes that can be set: checked, and without a change of connections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel
from typing_extensions import Self

from milvus_vllm_retrievers._core.adapter import Closing
from milvus_vllm_retrievers._core.arguments import other_names, remade
from milvus_vllm_retrievers.errors import ConfigurationError, refuse_unknown

_NO_SCOPE = "the scope of a retriever cannot be changed: use within()"


class Settable(Closing, BaseModel):
    """Gives a pydantic model attributes that are checked when they are set, or refused.

    The class says in `_settable` which of its fields can be set, in `_meant` what to write in
    place of arguments that it does not have, and takes in `_take_settings` what a checked copy has
    made of its settings.
    """

    _settable: ClassVar[frozenset[str]] = frozenset()
    _meant: ClassVar[Mapping[str, str]] = other_names("top_n")

    if not TYPE_CHECKING:  # a checker would take it for leave to set anything

        def __setattr__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                super().__setattr__(name, value)
                return
            cls = type(self)
            refuse_unknown(cls.__name__, [name], cls.model_fields, cls._meant)
            if name == "scope":
                raise ConfigurationError(_NO_SCOPE)
            if name not in cls._settable:
                raise ConfigurationError(
                    f"{cls.__name__}: {name!r} cannot be changed: make a new one, or a copy with "
                    f"another {name!r}: model_copy(update={{{name!r}: ...}})"
                )
            checked = self.model_copy(update={name: value})
            super().__setattr__(name, getattr(checked, name))
            self._take_settings(checked)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:  # noqa: ARG002
        """Make another one, with some arguments changed and checked."""
        if update and "scope" in update:
            raise ConfigurationError(_NO_SCOPE)
        return remade(self, update)

    def __copy__(self) -> Self:
        return self.model_copy()

    def _take_settings(self, checked: Self) -> None:
        """Take from a copy what it has made of its settings."""
