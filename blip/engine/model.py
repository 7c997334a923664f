"""One task's model with the settings from its bundle."""

from dataclasses import dataclass

from blip.engine.beam import Search
from blip.engine.decoder import DecoderShape
from blip.engine.encoders import Module
from blip.engine.graphs import GraphedDecoder


@dataclass(frozen=True)
class Model:
    """A LAVIS model in evaluation mode on its device.

    Attributes:
        net: BlipCaption, BlipVQA or BlipITM.
        image_size: pixels a side.
        search: for the tasks that generate text.
        decoder: on a GPU, for the tasks that generate text.
    """

    net: Module
    image_size: int
    search: Search | None = None
    decoder: GraphedDecoder | None = None

    def decoder_shape(self, max_batch: int) -> DecoderShape:
        """For batches of up to `max_batch`: captions attend to the image's states, answers to the question's."""
        assert self.search is not None
        answers = hasattr(self.net, "text_encoder")
        return DecoderShape(
            batch=max_batch,
            states=self.net.max_txt_len if answers else self.net.visual_encoder.pos_embed.shape[1],
            masked=answers,
            prompt=1 if answers else self.net.prompt_length,
            search=self.search,
        )
