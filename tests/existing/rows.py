"""What the stores are filled with: texts of different lengths, metadata of every kind."""

from __future__ import annotations

from typing import Any

TEXTS = [
    "The cat sat on the warm windowsill and slept all day.",
    "A dog barked at the postman.",
    "Whales are the largest animals in the ocean.",
]
LONGEST_FIRST = sorted(TEXTS, key=len, reverse=True)

KEYS = ["key-a", "key-b", "key-c"]

FLAT_METADATA: list[dict[str, Any]] = [
    {"source": "cats.txt", "page": 1, "fresh": True, "weight": 0.5},
    {"source": "dogs.txt", "page": 2, "fresh": False, "weight": 1.25},
    {"source": "größe ✓.txt", "page": -3, "fresh": True, "weight": 0.0},
]

METADATA: list[dict[str, Any]] = [
    {**FLAT_METADATA[0], "tags": ["a", "b"], "origin": {"site": {"id": 7}}},
    {**FLAT_METADATA[1], "tags": [], "origin": {"site": {}}},
    {**FLAT_METADATA[2], "tags": ["ü"], "origin": {"site": {"id": None}}},
]
