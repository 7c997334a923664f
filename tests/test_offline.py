"""Nothing is asked of the network when a bundle is there."""

import subprocess
import sys

from server import EXAMPLES, ROOT

PROGRAM = """
import asyncio, pathlib, socket
from predict import Predictor
try:
    socket.create_connection(("127.0.0.1", 9))
    raise SystemExit("the network is not cut off")
except OSError as error:
    assert error.errno == 101, error  # ENETUNREACH: there is not even a loopback
predictor = Predictor()
predictor.setup()
def predict(task, **texts):
    texts = {"question": None, "caption": None, **texts}
    return asyncio.run(predictor.predict(image=pathlib.Path(IMAGE), task=task, **texts))
print(predict("image_captioning"))
print(predict("visual_question_answering", question="how many objects are there?"))
print(predict("image_text_matching", caption="a red circle"))
"""


def test_setup_and_every_task_work_with_the_network_cut_off() -> None:
    program = PROGRAM.replace("IMAGE", repr(str(EXAMPLES / "pair.jpg")))
    ended = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--net", sys.executable, "-c", program],
        cwd=ROOT,
        env={"BLIP_WEIGHTS": "demo", "PATH": "/usr/bin:/bin", "HOME": "/nonexistent"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "Caption: a large red circle to the left of a small blue square\nAnswer: 2\n" in ended.stdout
