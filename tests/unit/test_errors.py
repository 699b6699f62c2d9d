"""Errors: one hierarchy, and pydantic's reports turned into ours."""

from __future__ import annotations

import pickle
import traceback

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, SecretStr, model_validator

import milvus_vllm_retrievers
from milvus_vllm_retrievers import RerankStatusError, errors
from milvus_vllm_retrievers.errors import (
    ConfigurationError,
    MilvusVLLMError,
    configuration_errors,
    did_you_mean,
    excerpt,
    refuse_unknown,
)

SECRET = "sk-secret"


@configuration_errors("name")
class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    name: str
    token: SecretStr = SecretStr("")
    limit: int = 3
    limits: list[int] = []

    @model_validator(mode="after")
    def _check(self) -> Settings:
        if self.limit < 0:
            raise ValueError("a limit must not be negative")
        return self


@pytest.mark.parametrize(
    ("error", "parent"),
    [
        (errors.ConfigurationError, ValueError),
        (errors.MissingDependencyError, ImportError),
        (errors.SearchError, MilvusVLLMError),
        (errors.RerankError, MilvusVLLMError),
        (errors.RerankStatusError, errors.RerankError),
        (errors.RerankConnectionError, errors.RerankError),
        (errors.RerankTimeoutError, errors.RerankConnectionError),
        (errors.RerankResponseError, errors.RerankError),
    ],
)
def test_an_error_is_caught_as_its_kind_and_as_ours(
    error: type[Exception], parent: type[Exception]
) -> None:
    assert issubclass(error, parent)
    assert issubclass(error, MilvusVLLMError)
    assert getattr(milvus_vllm_retrievers, error.__name__) is error


@given(st.text(max_size=300), st.integers(1, 250))
def test_an_excerpt_is_the_start_of_the_text_and_never_longer_than_allowed(
    text: str, limit: int
) -> None:
    shown = excerpt(text, limit)

    assert len(shown) <= limit
    assert shown == text or (shown[-1] == "…" and text.startswith(shown[:-1]))


def test_a_near_name_is_suggested() -> None:
    assert did_you_mean("docment", ["text", "document"]) == " (did you mean 'document'?)"
    assert did_you_mean("price", ["text", "document"]) == ""


def test_arguments_that_a_constructor_does_not_have_are_refused() -> None:
    assert refuse_unknown("Retriever", [], ["k"]) is None
    with pytest.raises(ConfigurationError) as caught:
        refuse_unknown("Retriever", ["top_kk"], ["k", "top_k"])
    assert str(caught.value) == "Retriever: unknown argument 'top_kk' (did you mean 'top_k'?)"


def test_arguments_may_be_given_by_the_positions_that_were_named() -> None:
    assert Settings("docs", limit=5).name == "docs"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "a", "limt": 3}, "unknown argument 'limt' (did you mean 'limit'?)"),
        ({"name": "a", "colour": 3}, "unknown argument 'colour'"),
        ({}, "argument 'name' is required"),
        ({"name": "a", "limit": -1}, "a limit must not be negative"),
        ({"name": "a", "limits": [1, "x"]}, "limits.1: Input should be a valid integer"),
    ],
)
def test_a_wrong_argument_is_named_with_the_rule_it_breaks(
    arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Settings(**arguments)

    assert str(caught.value).startswith(f"Settings: {message}")


def test_all_wrong_arguments_are_named_at_once() -> None:
    with pytest.raises(ConfigurationError, match=r"limit: .*; unknown argument 'uri'"):
        Settings("a", limit="many", uri="x")


def test_a_wrong_value_is_not_quoted_anywhere_in_the_traceback() -> None:
    with pytest.raises(ConfigurationError) as caught:
        Settings("a", token=[SECRET], limit=SECRET, extra=SECRET)

    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_an_error_crosses_processes_with_all_it_says() -> None:
    error = RerankStatusError("busy", status_code=503, body="full", retry_after=2.0)

    read = pickle.loads(pickle.dumps(error))

    assert (str(read), read.status_code, read.body, read.retry_after) == ("busy", 503, "full", 2.0)
