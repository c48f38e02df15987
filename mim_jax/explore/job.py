# SPDX-License-Identifier: Apache-2.0
"""Job "explore": serves a page on which a person tries one or two runs."""

import contextlib
import signal
import threading
from collections.abc import Iterator

from mim_jax import config as configs
from mim_jax.run import files, loading, notes, rundir


def run(config: configs.Tree, workdir: files.Place) -> None:
    """Load `config.runs` and serve the page until Ctrl-C or SIGTERM.

    Only config.json and summary.txt are written to the work directory, and nothing of
    what people upload.

    Raises:
        ConfigError: the config cannot work, a run cannot be read, the runs cannot be
            shown side by side, or the extra `explore` is not installed.
    """
    settings = configs.build(config)
    try:
        from mim_jax.explore import server  # the only module that needs the extra
    except ModuleNotFoundError as error:
        raise configs.ConfigError(
            f"job explore needs {error.name}: pip install 'mim_jax[explore]'"
        ) from error
    images = config.data.source
    runs = loading.load_all(settings.runs, settings.step, source=images)
    with rundir.claim(workdir, "explore"):
        rundir.write_config(workdir, config)
        names = [f"of          {title}: {one.folder}" for title, one in runs.items()]
        notes.begin(workdir, "\n".join(["explore", *names]))
        print("features of training images ...", flush=True)
        try:
            app = server.App(
                runs, settings.bank, settings.neighbours, settings.upload_bytes
            )
        except ValueError as error:
            raise configs.ConfigError(f"config: {error}") from error
        with _until_asked() as asked, server.serving(app.asgi, settings.port) as where:
            print(f"open {where} in a browser; Ctrl-C ends", flush=True)
            # With a timeout, or the handler would not run on every platform.
            while not asked.wait(0.5):
                pass
        notes.end(workdir, "ended; nothing of what was uploaded is kept")
    print("ended", flush=True)


@contextlib.contextmanager
def _until_asked() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set, instead of ending the process."""
    asked = threading.Event()
    names = (signal.SIGINT, signal.SIGTERM)
    before = {name: signal.signal(name, lambda *_: asked.set()) for name in names}
    try:
        yield asked
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
