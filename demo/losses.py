"""What training minimises: the losses of one batch."""

import random
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo import sentences
from demo.bundle import GRID
from demo.data import HEADS, UNSAID
from demo.scenes import Scene
from demo.tokens import Words

QUESTIONS = 3  # of each scene in a step
TEMPERATURE = 0.07  # of the contrastive loss
WEIGHTS = {
    "shape": 1.5,  # the hardest thing to see; without this weight it stays at chance for very long
    "looking": 1.75,
    "extent": 2.0,
    "caption": 1.0,
    "answer": 1.0,
    "decision": 1.0,
    "contrast": 0.5,
}
# Patch centres in patches; an object's centre is relative to these, its half sizes are absolute.
PATCH_PLACES = torch.tensor([[x + 0.5, y + 0.5, 0, 0] for y in range(GRID) for x in range(GRID)])


class Losses:
    """The losses of one batch, each on the picture features that were computed once."""

    def __init__(self, nets: dict[str, Any], heads: nn.Linear, words: Words) -> None:
        self.nets, self.heads, self.words = nets, heads, words

    def looking(self, features: Tensor, owners: Tensor, facts: Tensor, extents: Tensor) -> dict[str, Tensor]:
        """How well `features` (scenes, 1 + patches, width) tell what each patch shows and where it ends."""
        rows = torch.arange(len(owners))[:, None]
        wanted = facts[rows, owners.long()].long()  # (scenes, patches, heads)
        *outputs, extent = self.heads(features[:, 1:]).split([*HEADS.values(), 4], dim=-1)
        parts = []
        for k, logits in enumerate(outputs):
            weight = torch.ones(logits.shape[-1])
            if k < 3:
                weight[0] = 0.3  # most patches are empty
            target = wanted[:, :, k].flatten()
            parts.append(F.cross_entropy(logits.flatten(0, 1), target, weight, ignore_index=UNSAID))
        covered = owners > 0
        offsets = (extents[rows, owners.long()] - PATCH_PLACES)[covered]
        return {
            "shape": parts[0],
            "looking": torch.stack(parts[1:]).mean(),
            "extent": F.smooth_l1_loss(extent[covered], offsets),
        }

    def caption(self, features: Tensor, scenes: Sequence[Scene]) -> Tensor:
        """Next-word loss of the captions after the prompt."""
        net = self.nets["caption"]
        texts = [net.prompt + sentences.caption(scene) for scene in scenes]
        ids, mask = self.words.padded(texts, net.tokenizer.bos_token_id)
        labels = ids.masked_fill(mask == 0, UNSAID)
        labels[:, : net.prompt_length] = UNSAID
        loss: Tensor = net.text_decoder(ids, mask, encoder_hidden_states=features, labels=labels).loss
        return loss

    def answer(self, features: Tensor, scenes: Sequence[Scene], rng: random.Random) -> Tensor:
        """Next-word loss of the answers to a few questions on each scene."""
        net = self.nets["answer"]
        asked = [rng.sample(sentences.questions(scene, rng), QUESTIONS) for scene in scenes]
        packed = self.words.packed([[question[0] for question in group] for group in asked], net.tokenizer.enc_token_id)
        states = packed.encode(net.text_encoder, features)
        replies = [question[1] for group in asked for question in group]
        ids, reply_mask = self.words.padded(replies, net.tokenizer.bos_token_id)
        loss: Tensor = net.text_decoder(
            ids,
            reply_mask,
            encoder_hidden_states=states,
            encoder_attention_mask=packed.text_mask,
            labels=ids.masked_fill(reply_mask == 0, UNSAID),
        ).loss
        return loss

    def match(self, features: Tensor, scenes: Sequence[Scene], rng: random.Random) -> tuple[Tensor, Tensor]:
        """The decision's loss and the contrastive loss, both with hard negatives."""
        net = self.nets["match"]
        texts = [sentences.match_texts(scene, rng) for scene in scenes]
        packed = self.words.packed([[text[0] for text in group] for group in texts], net.tokenizer.enc_token_id)
        states = packed.encode(net.text_encoder, features)
        truth = torch.tensor([int(text[1]) for group in texts for text in group])
        decision = F.cross_entropy(net.itm_head(states[:, 0]), truth)

        # Columns: every scene's caption, then every scene's false caption.
        said = [group[k][0] for k in (0, 1) for group in texts]
        ids, mask = self.words.padded(said, net.tokenizer.cls_token_id)
        states = net.text_encoder(ids, mask, mode="text").last_hidden_state
        text_side = F.normalize(net.text_proj(states[:, 0]), dim=-1)
        image_side = F.normalize(net.vision_proj(features[:, 0]), dim=-1)
        likeness = image_side @ text_side.t() / TEMPERATURE
        count = len(scenes)
        # The same caption may fit several scenes of a batch; such a pair is no negative.
        same = torch.tensor([[a == b for b in said] for a in said[:count]])
        same &= ~torch.eye(count, 2 * count, dtype=torch.bool)
        likeness = likeness.masked_fill(same, -1e4)
        own = torch.arange(count)
        contrast = F.cross_entropy(likeness, own) + F.cross_entropy(likeness[:, :count].t(), own)
        return decision, contrast / 2
