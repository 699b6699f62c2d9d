"""Writing Milvus filter expressions, and joining them so that one can never widen another."""

from __future__ import annotations

import math
import re

from milvus_vllm_retrievers.errors import ConfigurationError, excerpt

_CLOSING = {"(": ")", "[": "]", "{": "}"}

# The only escapes that Milvus (Go's strconv.Unquote) and Milvus Lite both read in a
# double-quoted literal. Every other character stands for itself, control characters too.
_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"})

# A text in quotes, as both grammars read it: a backslash takes the next character along.
_STRING = re.compile(r""""(?:[^"\\\r\n]|\\[^\r\n])*"|'(?:[^'\\\r\n]|\\[^\r\n])*\'""")
_NOT_IN_EXPRESSIONS = re.compile(r"[\"'\\;#]|--|//|/\*|\*/|[^\S \t\r\n]|[\x00-\x08\x0e-\x1f\x7f]")
_TEMPLATE = re.compile(r"\{\s*([A-Za-z_]\w*)\s*\}")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# What the grammars (Milvus's Plan.g4, Lite's tokens.py) read as something else than a field.
_KEYWORD = re.compile(
    r"and|or|not|in|is|null|like|exists|true|false|iso|interval|threshold|minimum_should_match|"
    r"text_match\w*|phrase_match|match_\w+|random_sample|element_filter|array_length|"
    r"(array|json)_contains\w*|st_\w+|_seq|_partition",
    re.IGNORECASE,
)
# Those of them that are words of every Milvus, wherever they stand.
_RESERVED = re.compile(r"and|or|not|in|is|null|like|exists|true|false|iso|interval", re.IGNORECASE)
# Chinese characters that Milvus 2.6 reads as others: it keeps the last four digits of their code
# (planparserv2's convertHanToASCII), unless the expression holds an escape such as \U.
_MISREAD = re.compile("[\U00016fe0-\U00016fff\U00020000-\U0003ffff]")

# Milvus gives these the condition to their left, in place of one that they already have.
_TAKES_OVER = re.compile(r"(random_?sample|element_?filter)\s*\(", re.IGNORECASE)


def literal(value: object) -> str:
    """Write a value as an expression's literal.

    Args:
        value: A text, a bool, a number, or a list or tuple of them.

    Raises:
        ConfigurationError: Expressions cannot hold the value.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{_encodable(value).translate(_ESCAPES)}"'
    if isinstance(value, int):
        if not -(2**63) < value < 2**63:
            raise ConfigurationError("a filter's whole numbers must fit in 64 bits")
        return str(int(value))
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ConfigurationError(f"Milvus cannot filter by {value}; pass a finite number")
        return repr(float(value))
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(literal, value))}]"
    raise ConfigurationError(
        f"Milvus cannot filter by a {type(value).__name__}; pass a text, a number, a bool or a "
        "list of them"
    )


def dynamic_field(name: str) -> str:
    """Write the name of a dynamic field: as it is, or as ``$meta["any name"]``.

    Raises:
        ConfigurationError: Expressions cannot hold the name.
    """
    plain = _IDENTIFIER.fullmatch(name) and not _KEYWORD.fullmatch(name)
    return name if plain else json_path("$meta", name)


def is_reserved(name: str) -> bool:
    """Whether Milvus reads a field's name as a word of its filter language."""
    return bool(_RESERVED.fullmatch(name))


def for_milvus(expr: str) -> str:
    """Spell an expression so that a Milvus server reads every character of its texts as it is.

    Milvus Lite reads them as they are, and knows no such spelling.
    """
    return _STRING.sub(
        lambda text: _MISREAD.sub(lambda c: f"\\U{ord(c.group()):08x}", text.group()), expr
    )


def json_path(field: str, key: str) -> str:
    """Write the path of a key inside a JSON field.

    Milvus takes what is between a path's quotes as it is, without escapes.

    Raises:
        ConfigurationError: Expressions cannot hold the key.
    """
    quote = "'" if '"' in key else '"'
    unreadable = quote in key or "][" in key or any(c in key for c in "\\\r\n")
    if not key or unreadable or _MISREAD.search(key):
        raise ConfigurationError(
            f"Milvus cannot filter by the key {excerpt(key)!r}: a key is not empty and has no "
            "backslash, no line break, no '][', not both kinds of quotes and no Chinese character "
            "beyond U+FFFF"
        )
    return f"{field}[{quote}{_encodable(key)}{quote}]"


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigurationError(
            f"a filter's text must be valid Unicode: there is a lone surrogate at character "
            f"{error.start}"
        ) from error
    return text


def all_of(*expressions: str | None) -> str | None:
    """AND expressions together, each standing on its own; None and blank ones are left out.

    Raises:
        ConfigurationError: Milvus would drop a part of what is joined.
    """
    given = [expr for expr in expressions if expr and expr.strip()]
    if len(given) < 2:  # noqa: PLR2004 - nothing to join
        return given[0] if given else None
    for expr in given:
        if found := _TAKES_OVER.search(_STRING.sub(" ", expr)):
            raise ConfigurationError(
                f"a filter with {found.group(1)} cannot be joined with another, since Milvus may "
                "then drop a condition: write all of it into one, the retriever's or the call's: "
                f"{_shown(expr)}"
            )
    return " and ".join(f"({expr})" for expr in given)


def checked_expr(expr: str | None) -> None:
    """Check that an expression stands on its own: what `all_of` puts around it holds it in.

    Its quotes and brackets must close within it, and it may hold nothing on which two readers
    could differ: comments, statement ends, control characters, line breaks in a text.

    Raises:
        ConfigurationError: It does not stand on its own, by mistake or by intent.
    """
    if expr is None:
        return
    if not isinstance(expr, str):
        raise ConfigurationError(f"expr must be a text, not {type(expr).__name__}")
    bare = _STRING.sub(" ", expr)
    found = _NOT_IN_EXPRESSIONS.search(bare)
    if found and found.group() in {"'", '"'}:
        raise ConfigurationError(
            f"expr is not complete, a {found.group()!r} is missing: {_shown(expr)}"
        )
    if found:
        raise ConfigurationError(
            f"expr holds {found.group()!r}, which no Milvus expression has outside of a complete "
            f"text in quotes: {_shown(expr)}"
        )
    expected: list[str] = []
    for character in bare:
        if character in _CLOSING:
            expected.append(_CLOSING[character])
        elif character in ")]}" and (not expected or expected.pop() != character):
            raise ConfigurationError(f"expr closes a {character!r} it did not open: {_shown(expr)}")
    if expected:
        raise ConfigurationError(
            f"expr is not complete, a {expected[-1]!r} is missing: {_shown(expr)}"
        )


def template_names(*expressions: str) -> set[str]:
    """Return the names of the ``{templates}`` that expressions take values for."""
    return {name for expr in expressions for name in _TEMPLATE.findall(_STRING.sub(" ", expr))}


def _shown(expr: str) -> str:
    return repr(excerpt(expr))
