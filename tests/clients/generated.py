"""A client that openapi-python-client made from the OpenAPI document asks this server: generated.py URL PICTURE."""

import base64
import sys
from pathlib import Path

from blip_client import Client
from blip_client.api.default import (
    get_prediction_predictions_prediction_id_get as get_prediction,
)
from blip_client.api.default import healthcheck_health_check_get as healthcheck
from blip_client.api.default import predict_predictions_post as predict
from blip_client.models import HealthDocument, HealthStatus, Input, PredictionRequest, PredictionResponse, Status, Task

url, picture = sys.argv[1:]
image = f"data:image/jpeg;base64,{base64.b64encode(Path(picture).read_bytes()).decode()}"
with Client(base_url=url, raise_on_unexpected_status=True) as client:
    health = healthcheck.sync(client=client)
    assert isinstance(health, HealthDocument)
    assert health.status is HealthStatus.READY
    asked = Input(image=image, task=Task.VISUAL_QUESTION_ANSWERING, question="what color is the circle?")
    made = predict.sync(client=client, body=PredictionRequest(id="generated", input_=asked))
    assert isinstance(made, PredictionResponse)
    assert (made.status, str(made.output)[:8]) == (Status.SUCCEEDED, "Answer: ")
    kept = get_prediction.sync("generated", client=client)
    assert kept.output == made.output
