"""What the tests of trust share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def _no_root_certificates(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Spare every new HTTP client the reading of all root certificates: no server here has TLS."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_DIR", str(tmp_path_factory.mktemp("no_certificates")))
        patch.delenv("SSL_CERT_FILE", raising=False)
        yield
