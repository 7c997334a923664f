"""Cog's server for a public address: one line of sed replaces `Server` and `create_app` in Cog's main by these.

The classes here extend those of one release of Cog, and override methods that it does not call public.
"""

import functools
import multiprocessing
import os
import sys
from importlib.metadata import version

import structlog

from blip.config import Limits, check_cog_settings
from blip.errors import ConfigError
from blip.server.extending import COG, UnknownCogError
from blip.server.logs import Log, entry


def _make_log() -> Log | None:
    """The log of the server, if this process is one; others import the package too, and print to people."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    is_server = multiprocessing.parent_process() is None and spec is not None and spec.name == "cog.server.http"
    return Log() if is_server and os.environ.get("LOG_FORMAT") != "development" else None


log = _make_log()  # before anything can be printed
if version("cog") != COG:
    raise UnknownCogError(f"this is cog {version('cog')}")

sys.modules["coglet"] = None  # type: ignore[assignment] # Cog's main would start this server in Rust if it were installed
if multiprocessing.parent_process() is None:
    try:  # before Cog's main reads them
        check_cog_settings()
        Limits.from_environment()
    except ConfigError as error:
        sys.exit(entry("blip.server", "ERROR", str(error)).decode() if log else str(error))
    # Before Cog's main sets up its log, it logs only that the Rust server is missing.
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())

try:
    from blip.server import app
    from blip.server.process import Server
except UnknownCogError:
    raise
except (ImportError, AttributeError) as error:
    raise UnknownCogError(str(error)) from error

create_app = functools.partial(app.create_app, server_log=log)

__all__ = ["Server", "create_app"]
