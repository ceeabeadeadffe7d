"""A served teacher in a thread of this process."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from threading import Thread

from understudy.serve import Scorer, Settings
from understudy.serve.server import STOP_S, bind, serving

START_S = 30.0


@contextmanager
def serve_beside(scorer: Scorer, settings: Settings) -> Iterator[str]:
    """Its address; it answers for as long as the block runs. Raises RecipeError as `understudy.serve.run`."""
    settings.check()
    with closing(bind(settings)) as listening, serving(scorer, settings, listening) as (server, url, _):
        thread = Thread(target=server.run, kwargs={"sockets": [listening]}, name="understudy-serve", daemon=True)
        thread.start()
        try:
            deadline = time.monotonic() + START_S
            while not server.started:
                assert time.monotonic() < deadline, f"the server at {url} did not start within {START_S:.0f} s"
                assert thread.is_alive()
                time.sleep(0.005)
            yield url
        finally:
            server.should_exit = True
            thread.join(2 * STOP_S)
