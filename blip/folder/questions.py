"""What is asked about pictures, and what a server's answer says. Standard library only."""

import json
import re
from dataclasses import dataclass

from blip.errors import UserError
from blip.folder.outputs import Row

BUSY = (409, 503)  # statuses of an answer that says when to come back


@dataclass(frozen=True)
class Question:
    """What is asked about every picture.

    Attributes:
        task: as the server names it.
        text: of the question or of the match; "" for a caption.
        prefix: of a caption.
        postfix: of a caption.
    """

    task: str
    text: str = ""
    prefix: str = ""
    postfix: str = ""

    @property
    def columns(self) -> tuple[str, ...]:
        """Of a result."""
        if self.task == "image_text_matching":
            return ("probability", "similarity")
        return ("answer",) if self.task == "visual_question_answering" else ("caption",)

    @property
    def inputs(self) -> dict[str, str]:
        """Of a prediction, beside the image."""
        name = {"visual_question_answering": "question", "image_text_matching": "caption"}.get(self.task)
        return {"task": self.task, **({name: self.text} if name else {})}

    def row(self, output: str) -> Row:
        """The result that an output string has."""
        if self.task == "image_text_matching":
            probability, similarity = map(float, re.findall(r"-?\d+\.\d+", output))
            return {"probability": round(probability / 100, 6), "similarity": similarity}
        text = output.partition(": ")[2]
        return {"answer": text} if self.task == "visual_question_answering" else {"caption": self._around(text)}

    def _around(self, text: str) -> str:
        return f"{self.prefix}{text}{self.postfix}"


def output_of(status: int, text: str) -> str:
    """The output string of an answer of `status`; a gateway's may not be JSON.

    Raises:
        UserError: there is none; the message is what the answer says.
    """
    try:
        body = json.loads(text)
        if status == 200:
            if body["status"] == "succeeded":
                return "".join(body["output"])
            raise UserError(body["error"] or f"the prediction {body['status']}")
        detail = body["detail"]
        raise UserError(detail if isinstance(detail, str) else " ".join(item["msg"] for item in detail))
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"the server answered {status}: {text[:200]}") from error
