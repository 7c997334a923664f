"""One task's model with the settings from its bundle."""

from dataclasses import dataclass, replace
from functools import partial

import torch

from blip.engine.beam import Search
from blip.engine.decoder import DecoderShape
from blip.engine.encoders import Module, padded_length
from blip.engine.generate import answer_prompt, caption_prompt
from blip.engine.graphs import Graphs, Inputs, MatchGraphs, Recorder, TextGraphs, for_as_many

LONGEST_TEXT = 48  # tokens that graphs have room for: all of LAVIS's texts; a longer one runs without


@dataclass(frozen=True)
class Model:
    """A LAVIS model in evaluation mode on its device.

    Attributes:
        net: BlipCaption, BlipVQA or BlipITM.
        device: where it is.
        image_size: pixels a side.
        search: for the tasks that generate text.
        library: whose results it gives, "lavis" or "transformers"; they treat texts and pictures differently.
        texts: on a GPU, for the tasks that generate text.
        matches: on a GPU, for the task that does not.
    """

    net: Module
    device: torch.device
    image_size: int
    search: Search | None = None
    library: str = "lavis"
    texts: TextGraphs | None = None
    matches: MatchGraphs | None = None

    @property
    def graphs(self) -> Graphs | None:
        """The graphs of its task."""
        return self.texts or self.matches

    def with_graphs(self, max_batch: int, record: Recorder) -> "Model":
        """The same model, with works recorded for batches of up to `max_batch`, or of as many as memory allows."""
        return for_as_many(partial(self._recorded, record), max_batch) or self

    @torch.inference_mode()
    def _recorded(self, record: Recorder, max_batch: int) -> "Model":
        answers = hasattr(self.net, "text_encoder")
        # Of the texts that come with the images.
        length = padded_length(self.net.text_encoder, min(self.net.max_txt_len, LONGEST_TEXT)) if answers else 1
        inputs = Inputs.zeros(max_batch, self.image_size, length, self.device)
        if self.search is None:
            return replace(self, matches=MatchGraphs(self.net, inputs, record))
        prompt = (answer_prompt if answers else caption_prompt)(self.net).to(self.device)
        states = length if answers else self.net.visual_encoder.pos_embed.shape[1]
        shape = DecoderShape(max_batch, states, answers, len(prompt), self.search)
        return replace(self, texts=TextGraphs(self.net, shape, prompt, inputs, record))
