"""How Cog is extended: if something to replace or override is missing, the server does not start and says why."""

from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.routing import Route

COG = "0.16.12"

Kind = TypeVar("Kind")
RouteKind = TypeVar("RouteKind", bound=Route)


class UnknownCogError(ImportError):
    """The installed Cog is not the release that is extended here."""

    def __init__(self, missing: str) -> None:
        super().__init__(f"blip.server extends cog {COG}, and {missing}; install the lock.")


def overrides(kind: type[Kind]) -> type[Kind]:
    """Decorate a class that extends one of Cog's: each method marked `@override` must override one.

    Raises:
        UnknownCogError: there is none.
    """
    for name, member in vars(kind).items():
        if getattr(member, "__override__", False) and not any(hasattr(base, name) for base in kind.__bases__):
            raise UnknownCogError(f"{kind.__bases__[0].__qualname__} has no {name}")
    return kind


def rebind(owner: Any, name: str, value: Any) -> None:
    """Set `name` of a module or a class of Cog to `value`.

    Raises:
        UnknownCogError: it has nothing of that name.
    """
    if not hasattr(owner, name):
        raise UnknownCogError(f"{owner.__name__} has no {name}")
    setattr(owner, name, value)


def route(app: FastAPI, path: str) -> APIRoute:
    """The one route of `app` at `path` that is a part of its API.

    Raises:
        UnknownCogError: there is none, or more than one.
    """
    return _the_one(app, path, APIRoute)


def document(app: FastAPI, path: str) -> Route:
    """The one route of `app` at `path` that is no part of its API, but documents it.

    Raises:
        UnknownCogError: there is none, or more than one.
    """
    return _the_one(app, path, Route)


def _the_one(app: FastAPI, path: str, kind: type[RouteKind]) -> RouteKind:
    found = [route for route in app.routes if type(route) is kind and route.path == path]
    if len(found) != 1:
        raise UnknownCogError(f"its app has {len(found)} routes {path}")
    return found[0]
