"""What a prediction holds after its end."""

import gc
import weakref
from collections.abc import Iterator
from concurrent.futures import Future

import pytest
from cog.schema import PredictionRequest, Status
from cog.server.eventtypes import Done

from blip.server.runner import Prediction


@pytest.fixture
def uncollected() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("uncollected")
def test_an_ended_prediction_is_let_go_without_the_garbage_collector() -> None:
    """Its request has an image of many megabytes, which is counted only until the end."""
    prediction, future, ended = (
        Prediction(PredictionRequest(input={}), is_train=False),
        Future[Done](),
        list[Status | None](),
    )
    prediction.track(future)
    prediction.add_done_callback(lambda response: ended.append(response.status))
    prediction.handle_event(Done())
    future.set_result(Done())
    prediction.add_done_callback(lambda response: ended.append(response.status))  # also after its end
    assert (prediction.done(), ended) == (True, [Status.SUCCEEDED] * 2)
    gone = weakref.ref(prediction)
    del prediction, future
    assert gone() is None
