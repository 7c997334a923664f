"""The OpenAPI document: this project's name, and every answer that a client can get."""

import functools
from datetime import datetime
from enum import Enum
from typing import Any

from cog.schema import Status
from cog.server.http import Health
from fastapi import FastAPI
from pydantic import BaseModel, create_model

import blip
from blip.server.records import RETRY_AFTER
from blip.server.uploads import FIELDS, TYPE

DESCRIPTION = "Image captions, answers about images, and image-text match scores from three BLIP models."


class Refused(BaseModel):
    """Why a request was refused, in one sentence."""

    detail: str


class Setup(BaseModel):
    """How the start went."""

    started_at: datetime
    completed_at: datetime | None = None
    logs: str
    status: Status | None = None


#: The words of the health check.
HealthStatus = Enum("HealthStatus", {status.name: status.name for status in Health}, type=str)  # type: ignore[misc]


class HealthDocument(BaseModel):
    """How the server is; `setup` is empty until the start has come to an end."""

    status: HealthStatus
    setup: Setup | dict[str, Any]
    user_healthcheck_error: str | None = None
    version: str  # of this project


class Nothing(BaseModel):
    """An empty object."""


def kept(response: type[BaseModel]) -> type[BaseModel]:
    """The model of a prediction that was asked for by its id: a response whose input lacks the image."""
    return create_model("KeptPrediction", __base__=response, input=(dict[str, Any] | None, None))


COME_BACK = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "example": RETRY_AFTER}}}


def refused(description: str, *, again: bool = False) -> dict[str, Any]:
    """The description of an answer that refuses a request."""
    return {"model": Refused, "description": description, **({"headers": COME_BACK} if again else {})}


BUSY = refused(
    "All slots are taken, one with this id is running, or there is no room for the body or its webhook.", again=True
)
NOT_READY = refused("The server is starting, or its predictor has ended.", again=True)
UNKNOWN = refused("No prediction with this id is running or has ended within the hour.")


def predicting(response: Any) -> dict[int | str, dict[str, Any]]:
    """The answers to a request for a prediction, besides 200 and 422."""
    return {
        202: {"model": response, "description": "The prediction runs; ask for it by its id, or wait for its webhook."},
        400: refused("The request is not HTTP as it should be."),
        408: refused("The body did not come in time."),
        409: BUSY,
        503: NOT_READY,
    }


def describe(app: FastAPI) -> None:
    """Give the document this project's title and version, and references that generators of clients understand."""
    stock = app.openapi

    @functools.cache
    def openapi() -> dict[str, Any]:
        document = stock()
        _add_forms(document)
        document["info"] = {"title": "BLIP", "version": blip.__version__, "description": DESCRIPTION}
        _set_references_apart(document)
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _add_forms(document: dict[str, Any]) -> None:
    """Describe that a prediction can be asked for by a form as well, the image as a file."""
    schemas = document["components"]["schemas"]
    inputs, request = schemas["Input"], schemas["PredictionRequest"]["properties"]
    image = {"type": "string", "format": "binary", "description": "A file."}
    form = {
        "title": "Form",
        "type": "object",
        "properties": {**inputs["properties"], "image": image, **{name: request[name] for name in FIELDS}},
        "required": inputs.get("required", []),
    }
    for path, method in (("/predictions", "post"), ("/predictions/{prediction_id}", "put")):
        document["paths"][path][method]["requestBody"]["content"][TYPE.decode()] = {"schema": form}


def _set_references_apart(schema: Any) -> None:
    """Put references into an `allOf`: OpenAPI 3.0 ignores what stands beside one, as Cog's `nullable` does."""
    for inner in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        _set_references_apart(inner)
    if isinstance(schema, dict) and len(schema) > 1 and "$ref" in schema:
        schema["allOf"] = [{"$ref": schema.pop("$ref")}]
