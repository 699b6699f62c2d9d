"""How Milvus reads the texts of a filter, where Milvus Lite reads them otherwise."""

from __future__ import annotations

import re

# Unless an expression holds some other escape than these, Milvus writes every Chinese character
# as \uXXXX before it parses, with the last four digits of its code (convertHanToASCII).
_HARMLESS = {*"\\ntrf\"'"}
_LONG_HAN = re.compile("[\U00016ff0\U00020000-\U0002fa1f\U00030000-\U000323af]")
_ESCAPE = re.compile(r"\\(?:U([0-9a-fA-F]{8})|.)", re.DOTALL)


def as_milvus_reads(expr: str) -> str:
    """Rewrite an expression so that Milvus Lite reads it as Milvus 2.6 does."""
    escapes = {match[0][1] for match in _ESCAPE.finditer(expr)}
    if escapes <= _HARMLESS:
        expr = _LONG_HAN.sub(lambda han: _last_four_digits(ord(han[0])), expr)
    return _ESCAPE.sub(lambda match: chr(int(match[1], 16)) if match[1] else match[0], expr)


def _last_four_digits(code: int) -> str:
    rest = code & 0xFFFF
    # Go's Unquote refuses a half of a surrogate pair, as Lite refuses every \u.
    return f"\\u{rest:04x}" if 0xD800 <= rest <= 0xDFFF else chr(rest)
