"""A run on the Hugging Face Hub: an export in a temporary folder, uploaded as one commit.

The token comes from the usual places of huggingface_hub: HF_TOKEN, or the file that `hf auth login` writes.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lm.errors import ConfigError, ServerError
from lm.interop.exported import Exported
from lm.interop.formats import export
from lm.runs.run import Run

PREFIX = "hf:"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
FORMATS = "hf", "gguf", "onnx"
"""Formats that are folders with a README.md, which becomes the model card."""


@dataclass(frozen=True)
class Pushed:
    """Where a run was uploaded, and what was."""

    url: str
    """Of the repository."""
    commit: str
    """Its hash."""
    exported: Exported
    """The export; its path was temporary."""

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        content = asdict(self)
        del content["exported"]["path"]
        return content


def push(
    run: Run,
    repository: str,
    to: str = "hf",
    precision: str | None = None,
    *,
    private: bool = False,
    data_dir: Path | None = None,
) -> Pushed:
    """Export a run and upload it.

    Args:
        run: that is uploaded.
        repository: "hf:USER/NAME"; it is made if there is none.
        to: one of FORMATS.
        precision: of the weights in the file; None: the format's default.
        private: make a new repository private.
        data_dir: folder of the named corpora, for the text of the proof.

    Raises:
        ConfigError: the name is none of a repository, there is no token, or `private` is asked of a repository that is
            there and public.
        ServerError: the hub cannot be reached, or refuses. A repository that was made for this is deleted again.
        LMError: see `lm.interop.formats.export`.
    """
    from huggingface_hub import HfApi, get_token

    name = repository_name(repository)
    if get_token() is None:
        raise ConfigError(
            "There is no token for the Hugging Face Hub: make one with the right to write, and run hf auth login or "
            "set HF_TOKEN."
        )
    api = HfApi(library_name="inkling")
    with tempfile.TemporaryDirectory(prefix="inkling-push-") as temporary:
        folder = Path(temporary) / to
        done = export(run, folder, to, precision, data_dir=data_dir)
        card = folder / "README.md"
        card.write_text(_card(card.read_text("utf-8"), name), "utf-8")
        with _hub_errors(api.endpoint, name):
            is_new = not api.repo_exists(name)
            if private and not is_new and not api.model_info(name).private:
                raise ConfigError(
                    f"{name} exists and is public, so nothing was uploaded: make it private on the hub, or leave "
                    "--private out."
                )
            url = api.create_repo(name, private=private, exist_ok=True)
            try:
                commit = api.upload_folder(
                    repo_id=name, folder_path=folder, commit_message=f"Run {run.name} as {to}, {done.precision}"
                )
            except BaseException:
                if is_new:
                    with contextlib.suppress(Exception):
                        api.delete_repo(name, missing_ok=True)
                raise
    return Pushed(str(url), commit.oid, done)


def repository_name(repository: str) -> str:
    """USER/NAME of "hf:USER/NAME".

    Raises:
        ConfigError: it is none.
    """
    name = repository.removeprefix(PREFIX)
    if repository.startswith(PREFIX) and _NAME.fullmatch(name):
        return name
    raise ConfigError(f"{repository!r} is no repository of the Hugging Face Hub: write hf:USER/NAME.")


def _card(text: str, name: str) -> str:
    """The README.md of an export as a model card, with a tag and the name of the repository in its example."""
    return text.replace("---\n", "---\ntags:\n- inkling\n", 1).replace('"PATH"', f'"{name}"')


@contextlib.contextmanager
def _hub_errors(endpoint: str, name: str) -> Iterator[None]:
    """Errors of the hub as one sentence each."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    # The base class of errors of whatever HTTP library it uses.
    HTTPError: Any = importlib.import_module("huggingface_hub.errors").HTTPError  # noqa: N806

    host = urlsplit(endpoint).netloc
    try:
        yield
    except (HTTPError, ConnectionError, RuntimeError) as raised:
        # What happens during the upload of a large file comes as the cause of a RuntimeError.
        error = raised.__cause__ if type(raised) is RuntimeError else raised
        if isinstance(error, HfHubHTTPError):
            sentence = _refusal(host, name, error.response.status_code, error.server_message)
        elif isinstance(error, OfflineModeIsEnabled):
            sentence = f"{host} was not called, as HF_HUB_OFFLINE is set: unset it."
        elif isinstance(error, HTTPError | ConnectionError):
            sentence = f"{host} cannot be reached ({error}): nothing was uploaded."
        else:
            raise
        raise ServerError(sentence) from None


def _refusal(host: str, name: str, status: int, message: str | None) -> str:
    if status == 401:
        return f"{host} does not know the token: make another one, and run hf auth login."
    if status == 403:
        return (
            f"{host} refuses to write to {name}: the token has no right to. Use one with the right to write, of a "
            "member of that user or organisation."
        )
    return f"{host} refuses to take {name}: {message or f'status {status}'}."
