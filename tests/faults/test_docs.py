"""The page about faults says what the tests show."""

from __future__ import annotations

import pytest

from tests.faults import render
from tests.faults.table import MILVUS_ROWS, ROWS


def test_the_page_holds_the_tables_of_today() -> None:
    page = render.PAGE.read_text()

    assert page == render.rendered(page), "run `python -m tests.faults.render`"


@pytest.mark.parametrize("name", [*(row.name for row in ROWS), *MILVUS_ROWS])
def test_every_row_is_on_the_page(name: str) -> None:
    assert f"| {name}" in render.PAGE.read_text()
