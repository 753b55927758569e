"""schemathesis against the OpenAPI document: whatever it sends, no answer is a failure of the server, and every answer
is one that the document promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.conftest import Serve

pytestmark = pytest.mark.slow

CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
    "response_headers_conformance", "unsupported_method", "allow_header_conformance",
)  # fmt: skip
SEED = 1


@pytest.mark.parametrize("examples", [5, pytest.param(30, marks=pytest.mark.soak)])
def test_no_request_makes_the_server_fail_or_answer_otherwise_than_documented(
    serve: Serve, tmp_path: Path, examples: int
) -> None:
    with serve("gru", "--max-completion-tokens", "300", "--log-prompts", key="k") as server:
        done = subprocess.run(
            [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json",
             "--checks", ",".join(CHECKS),
             "--max-examples", str(examples), "--seed", str(SEED), "--continue-on-failure", "--warnings", "off",
             "-H", "Authorization: Bearer k"],
            cwd=tmp_path, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-8000:]
        assert "12 passed" in done.stdout
        assert server.request("GET", "/health")[0] == 200
        server.wait_idle()
        assert not [line for line in server.log() if line["level"] == "error"]


def test_every_answer_has_a_model_and_every_error_the_form_of_openai(server) -> None:
    document = server.request("GET", "/openapi.json")[2]
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert operation["description"], path
            for status, answer in operation["responses"].items():
                if status != "200" and not path.startswith("/health"):
                    assert answer["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorBody"), (
                        path,
                        status,
                    )
