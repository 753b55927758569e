"""A local Ray cluster with the application on it, until stdin closes: run by test_ray.py as a program of its own.

    python ray_cluster.py FOLDER PORT RUNS_DIR DEADLY

Its engines die of a request for DEADLY tokens: nothing that comes from outside should kill one, so it is helped along.
"""

import sys
from collections.abc import Sequence
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve as ray_serve

import serve.ray_app
from lm.generation.request import Request

DEADLY = int(sys.argv[4])
MEMORY_BYTES = 100 << 20
"""For Ray's objects, of which there are hardly any."""


class Fragile(serve.ray_app.Replica):
    """A replica whose engine can be made to fail."""

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = super().__serve_build_asgi_app__()
        (model,) = app.state.models.loaded.values()
        worker = model.worker
        start = worker.start

        def fail() -> bool:
            raise RuntimeError("broken on purpose")

        def start_or_break(requests: Sequence[Request], **how: Any) -> Any:
            if requests[0].options.max_tokens == DEADLY:
                worker.engine.step = fail
            return start(requests, **how)

        worker.start = start_or_break
        return app


def main(folder: str, port: str, runs_dir: str) -> None:
    for last in (False, True):
        try:
            # Two cores in Ray's books, whatever there are; its sockets lie in a folder whose path has to be short.
            ray.init(
                address="local", num_cpus=2, include_dashboard=False, object_store_memory=MEMORY_BYTES,
                _temp_dir=folder,
            )  # fmt: skip
            break
        except Exception:
            # Ray gives its own processes 30 seconds to start, which a busy machine may exceed.
            ray.shutdown()
            if last:
                raise
    ray_serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
    serve.ray_app.Replica = Fragile
    arguments = {"runs": "shakespeare-gru", "runs_dir": runs_dir, "min_replicas": "2", "max_replicas": "2", "cpus": "1"}
    ray_serve.run(serve.ray_app.application(arguments))
    print("two replicas are ready", flush=True)  # noqa: T201
    sys.stdin.read()
    ray_serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:4])
