"""Every refusal as one plain sentence that names the input and the fix."""

from typing import Any

from fastapi import HTTPException, Request
from fastapi.exception_handlers import http_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException as StarletteHTTPException

BUSY = "Already running a prediction"


def refusal(name: str, sentence: str) -> HTTPException:
    """A 422 in the shape of FastAPI's."""
    return HTTPException(422, [{"loc": ["body", name], "msg": sentence, "type": "value_error"}])


async def explain(request: Request, error: Exception) -> Response:
    """The answer to inputs that do not fit, in the shape of FastAPI's, without the values that were sent."""
    assert isinstance(error, RequestValidationError)
    sentences: dict[str, dict[str, Any]] = {}
    for item in error.errors():
        path = [str(step).encode(errors="replace").decode()[:100] for step in item["loc"]]
        name = path[2] if path[:2] == ["body", "input"] and len(path) > 2 else path[:2][-1]
        known = sentences.get(name)
        # An image has one error for each allowed type; the one with our sentence is the most useful.
        if known is None or item["type"] == "value_error":
            shown = name if name.isprintable() else ascii(name)  # a sentence is one line
            sentences[name] = {"loc": path[:3], "msg": _sentence(shown, item, request), "type": item["type"]}
    return JSONResponse({"detail": list(sentences.values())}, 422)


def _sentence(name: str, item: dict[str, Any], request: Request) -> str:
    """One sentence that names the input and the fix; `item` is pydantic's description of an error."""
    kind, context = item["type"], item.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    if kind == "json_invalid":
        return "the body is not valid JSON; send a JSON object."
    if item["loc"] == ("body",):
        return "the body must be a JSON object; send one with Content-Type: application/json."
    if kind == "missing":
        return f"{name} is missing; send it."
    if kind == "extra_forbidden":
        known = request.app.openapi()["components"]["schemas"]["Input"]["properties"]
        return f"{name} is not an input; the inputs are {', '.join(known)}."
    if kind == "enum":
        return f"{name} must be {context['expected']}."
    return f"{name} is not usable: {item['msg']}."


async def explain_body(request: Request, error: Exception) -> Response:
    """Answer 422 to a body that is not UTF-8, as to any wrong JSON; FastAPI would answer 400."""
    assert isinstance(error, StarletteHTTPException)
    if error.status_code == 400:
        error = refusal("json", "the body is not valid JSON; send a JSON object in UTF-8.")
    return await http_exception_handler(request, error)
