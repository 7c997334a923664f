"""Sets the predictor up and runs every task where there is no network at all: predict_offline IMAGE."""

import asyncio
import errno
import pathlib
import socket
import sys

from predict import Predictor


async def main(image: pathlib.Path) -> None:
    with socket.socket() as any_socket:
        refused = any_socket.connect_ex(("127.0.0.1", 9))
    if refused != errno.ENETUNREACH:  # there is not even a loopback
        sys.exit("the network is not cut off")
    predictor = Predictor()
    predictor.setup()
    for task, question, caption in (
        ("image_captioning", None, None),
        ("visual_question_answering", "how many objects are there?", None),
        ("image_text_matching", None, "a red circle"),
    ):
        print(await predictor.predict(image=image, task=task, question=question, caption=caption))


if __name__ == "__main__":
    asyncio.run(main(pathlib.Path(sys.argv[1])))
