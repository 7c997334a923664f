"""Forward passes of LAVIS's image encoder (vit.py) and text encoder (med.py) with scaled-dot-product attention.

The modules and weights are LAVIS's own, as in evaluation mode: dropout is left out.
Shapes: B samples, N image states, L text tokens, C channels, H heads of d channels.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip.engine import kernels
from blip.engine.absorbed import AbsorbedAttention

#: A LAVIS module or part of one; a type checker does not know the attributes of an nn.Module.
Module = Any
#: Keys and values: two of (B, H, S, d), or one of (2, B, H, S, d).
KeysValues = tuple[Tensor, Tensor] | Tensor
#: Attention of queries (B, H, T, d) to states that it knows -> (B, T, H*d).
AttendStates = Callable[[Tensor], Tensor]


def normalise(values: Tensor, pixels: Tensor) -> Tensor:
    """LAVIS's normalised pixels, looked up: values (3, 256), pixels (B, S, S, 3) uint8 -> (B, 3, S, S) like values."""
    assert pixels.ndim == 4 and pixels.shape[3] == 3 and pixels.dtype == torch.uint8, (pixels.shape, pixels.dtype)
    colours = pixels.flatten(1, 2).mT.long()  # (B, 3, S*S)
    normalised = values.expand(len(pixels), -1, -1).gather(2, colours)
    return normalised.view(len(pixels), 3, *pixels.shape[1:3])


def encode_image(vit: Module, pixels: Tensor) -> Tensor:
    """The states of `VisionTransformerEncoder.forward_features`.

    Args:
        vit: LAVIS's VisionTransformerEncoder. Its `attend`, if it has one, takes the place of `attend_image`; its
            `rows`, if it has them, are how many states at a time its linear layers are quick with.
        pixels: (B, 3, S, S), normalised as LAVIS's image processor does; any floating dtype.

    Returns:
        (B, 1 + patches, C); the first is the class token's.
    """
    assert pixels.ndim == 4 and pixels.shape[1] == 3, pixels.shape
    x = vit.patch_embed(pixels.to(vit.pos_embed))  # (B, patches, C)
    x = torch.cat([vit.cls_token.expand(len(x), -1, -1), x], dim=1) + vit.pos_embed  # (B, N, C)
    attend_states = getattr(vit, "attend", attend_image)
    parts = _multiple_and_rest(x, getattr(vit, "rows", 1))
    for block in vit.blocks:
        attention, mlp = block.attn, block.mlp
        qkv = [attention.qkv(block.norm1(x)).unflatten(-1, (3, attention.num_heads, -1)) for x in parts]
        parts = [x + attention.proj(y) for x, y in zip(parts, attend_states(qkv), strict=True)]
        parts = [x + mlp.fc2(mlp.act(mlp.fc1(block.norm2(x)))) for x in parts]
    return vit.norm(_together(parts))  # type: ignore[no-any-return]


def encode_text(bert: Module, ids: Tensor, mask: Tensor, image: Tensor) -> Tensor:
    """The `last_hidden_state` of LAVIS's BertModel as an encoder.

    Args:
        bert: LAVIS's BertModel (XBertEncoder).
        ids: (B, L) token ids.
        mask: (B, L) bool, False at padding.
        image: (I, N, C) states, which the first I texts attend to (LAVIS's mode "multimodal"); those after them attend
            to none (its mode "text").

    Returns:
        (B, L, C); ignore the rows at padding.
    """
    assert ids.ndim == 2 and mask.shape == ids.shape and len(image) <= len(ids), (ids.shape, mask.shape, image.shape)
    x = embed(bert, ids, torch.arange(ids.shape[1], device=ids.device))
    hidden = additive(mask[:, None, None, :], x.dtype)
    absorbed = getattr(bert.encoder.layer[0].crossattention.self, "absorbed", None)
    packed = None if absorbed is None else absorbed.pack(image)
    for layer in bert.encoder.layer:
        cross: KeysValues | AttendStates
        if packed is None:
            cross = keys_values(layer.crossattention, image)
        else:
            cross = partial(layer.crossattention.self.absorbed, states=packed)
        q, own = queries_keys_values(layer.attention, x)
        x = _attend_own(layer, x, q, own, hidden)
        seeing, blind = x.split([len(image), len(x) - len(image)])
        seeing = _attend_cross(layer, seeing, cross)
        x = _feed_forward(layer, torch.cat([seeing, blind]) if len(blind) else seeing)
    return x


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as what is added to scores: 0 where True, else -inf, in rows that begin at multiples of 8 entries.

    Attention on a GPU adds masks, and copies one whose rows begin elsewhere; once here is not once in every layer.
    """
    width = visible.shape[-1]
    rows = visible.new_full((*visible.shape[:-1], width + -width % 8), -torch.inf, dtype=dtype)[..., :width]
    return rows.masked_fill_(visible, 0)


def padded_length(bert: Module, tokens: int) -> int:
    """The length to pad texts to: the next multiple of 16, or as many as there are positions."""
    positions: int = bert.embeddings.position_embeddings.num_embeddings
    return min(tokens + -tokens % 16, positions)


def embed(bert: Module, ids: Tensor, positions: Tensor) -> Tensor:
    """Token plus position embeddings: ids (..., L), positions (L,) or broadcastable -> (..., L, C)."""
    embeddings = bert.embeddings
    x = embeddings.word_embeddings(ids) + embeddings.position_embeddings(positions)
    return embeddings.LayerNorm(x)  # type: ignore[no-any-return]


def keys_values(attention: Module, states: Tensor) -> tuple[Tensor, Tensor]:
    """The keys and values that a BertAttention computes from `states` (B, S, C)."""
    states = states.to(attention.output.LayerNorm.weight.dtype)
    joined = getattr(attention.self, "joined", None)
    if joined is not None:
        key, value = split_heads(attention, joined(states), 2)
        return key, value
    key, value = attention.self.key(states), attention.self.value(states)
    return split_heads(attention, key)[0], split_heads(attention, value)[0]


def queries_keys_values(attention: Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The queries (B, H, T, d), and the keys and values (2, B, H, T, d), of x (B, T, C) among itself."""
    joined = getattr(attention.self, "joined", None)
    if joined is None:
        return _queries(attention, x), torch.stack(keys_values(attention, x))
    parts = split_heads(attention, joined(x), 3)
    return parts[0], parts[1:]


def bert_layer(
    layer: Module,
    x: Tensor,
    q: Tensor,
    own: KeysValues,
    cross: KeysValues,
    *,
    mask: Tensor | None = None,
    cross_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """One BertLayer on x (B, T, C): attention of q to `own`, then to `cross`, then the feed-forward part.

    It may write to x. The masks are added to the scores and broadcast to (B, H, T, S); see `additive`.
    """
    x = _attend_own(layer, x, q, own, mask, is_causal)
    return _feed_forward(layer, _attend_cross(layer, x, cross, cross_mask))


def split_heads(attention: Module, x: Tensor, parts: int = 1) -> Tensor:
    """(B, T, parts*H*d) -> (parts, B, H, T, d)."""
    batch, length, _ = x.shape
    return x.view(batch, length, parts, attention.self.num_attention_heads, -1).permute(2, 0, 3, 1, 4)


def join_projections(model: Module) -> None:
    """Let each BertAttention compute its keys and values, and the queries of what attends to itself, in one product.

    Few large products are quicker than many small ones.
    """
    for layer in model.modules():
        if hasattr(layer, "crossattention"):
            own, cross = layer.attention.self, layer.crossattention.self
            own.joined = _joined(own.query, own.key, own.value)
            del own.query, own.key, own.value
            if not hasattr(cross, "absorbed"):
                cross.joined = _joined(cross.key, cross.value)
                del cross.key, cross.value


def absorb_projections(bert: Module, dtype: torch.dtype) -> None:
    """Let the text encoder attend to the states of an image without keys and values of them, in `dtype`."""
    for layer in bert.encoder.layer:
        cross = layer.crossattention.self
        cross.absorbed = AbsorbedAttention(cross, dtype)
        del cross.key, cross.value


def fold_biases(bert: Module) -> None:
    """Let each sum of a decoder's BertModel with `join_projections` be a part of the product before it.

    That can add one thing: what went into the block, not its own bias as well. So the norm before the block adds the
    bias, and what reads the norm takes it off again.
    """
    norm = bert.embeddings.LayerNorm
    for layer in bert.encoder.layer:
        own, cross = layer.attention, layer.crossattention
        for output, reader in (
            (own.output, own.self.joined),
            (cross.output, cross.self.query),
            (layer.output, layer.intermediate.dense),
        ):
            bias = output.dense.bias.float()
            norm.bias.data = (norm.bias.float() + bias).to(norm.bias.dtype)
            reader.bias.data = (reader.bias.float() - reader.weight.float() @ bias).to(reader.bias.dtype)
            output.dense.bias = None
            norm = output.LayerNorm


def _joined(*linears: nn.Linear) -> nn.Linear:
    first = linears[0]
    joined = nn.Linear(first.in_features, sum(linear.out_features for linear in linears), device="meta")
    joined.weight = nn.Parameter(torch.cat([linear.weight for linear in linears]), requires_grad=False)
    joined.bias = nn.Parameter(torch.cat([linear.bias for linear in linears]), requires_grad=False)
    return joined


def attend(q: Tensor, kv: KeysValues, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v with the heads joined again: q (B, H, T, d) -> (B, T, H*d), in k's dtype or finer.

    For few queries torch's fused kernel is slower on a CPU, and in float32 its results depend on the batch. So do plain
    products of what is not contiguous (only in a batch it is copied) or not aligned, and very small ones in bfloat16.
    """
    k, v = kv
    assert q.ndim == 4 and k.shape == v.shape and q.shape[:2] == k.shape[:2], (q.shape, k.shape)
    if q.device.type != "cpu":
        return _joined_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal))
    if kernels.keeps_aligned(q[0]) and kernels.keeps_aligned(k[0]):
        return _plain_attention(q, k, v, mask, is_causal)
    masks = [None] * len(q) if mask is None else mask.expand(len(q), -1, -1, -1).split(1)
    samples = zip(q.split(1), kernels.apart(k), kernels.apart(v), masks, strict=True)
    return torch.cat([_plain_attention(*sample, is_causal) for sample in samples])


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """`attend` in plain products."""
    dtype = torch.float32 if q[0].numel() * k.shape[2] <= kernels.FEW_PRODUCTS else k.dtype
    k, v = k.to(dtype).contiguous(), v.to(dtype).contiguous()
    scores = (q.to(dtype) * q.shape[-1] ** -0.5).contiguous() @ k.mT  # (B, H, T, S)
    if is_causal:
        mask = additive(torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), dtype)
    if mask is not None:
        scores += mask
    return _joined_heads(scores.softmax(-1) @ v).to(q.dtype)


def attend_image(qkv: Sequence[Tensor]) -> list[Tensor]:
    """`attend` among all states of an image by torch's fused kernel.

    Args:
        qkv: the queries, keys and values of some of the states, and of the others: each (B, n, 3, H, d).

    Returns:
        A part (B, n, H*d) for each.
    """
    states = _together(qkv)
    if states.device.type != "cpu" or kernels.keeps_aligned(states[0, 0, 0, 0]):
        out = _fused_attention(states)
    else:  # of such heads the results depend on the batch
        out = torch.cat([_fused_attention(sample) for sample in kernels.apart(states)])
    return list(out.split([part.shape[1] for part in qkv], dim=1))


def _fused_attention(qkv: Tensor) -> Tensor:
    """(B, N, 3, H, d) -> (B, N, H*d)."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, N, d)
    return _joined_heads(F.scaled_dot_product_attention(q, k, v))


def attend_image_by_heads(qkv: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """`attend_image` through oneDNN one head at a time, whose N x N weights stay in the cache; computed in `dtype`.

    Torch's fused kernel multiplies through MKL (see kernels.py) and can take twice as long.
    """
    lengths = [part.shape[1] for part in qkv]
    batch, _, _, heads, width = qkv[0].shape
    q, k = qkv[0].new_empty(2, batch, heads, sum(lengths), width, dtype=dtype)
    v = qkv[0].new_empty(batch, heads, width, sum(lengths), dtype=dtype)
    for part, *place in zip(qkv, q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 3), strict=True):
        queries, keys, values = part.permute(2, 0, 3, 1, 4)  # (B, H, n, d)
        torch.mul(queries, width**-0.5, out=place[0])
        place[1].copy_(keys)
        place[2].copy_(values.mT)
    out = [part.new_empty(batch, part.shape[1], heads, width) for part in qkv]
    for sample in range(batch):
        for head in range(heads):
            found = kernels.attend(q[sample, head], k[sample, head], v[sample, head])  # (N, d)
            for part, rows in zip(out, found.split(lengths), strict=True):
                part[sample, :, head] = rows
    return [part.flatten(2) for part in out]


def _multiple_and_rest(x: Tensor, rows: int) -> list[Tensor]:
    """The states (B, N, C) in two parts, the first of the most that are a multiple of `rows`; in one if it has all."""
    rest = x.shape[1] % rows
    return [part.contiguous() for part in x.split([x.shape[1] - rest, rest], dim=1) if part.shape[1]]


def _together(parts: Sequence[Tensor]) -> Tensor:
    """All states of parts (B, n, ...) -> (B, N, ...)."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


def _joined_heads(x: Tensor) -> Tensor:
    """(B, H, T, d) -> (B, T, H*d)."""
    return x.transpose(1, 2).flatten(2)


def _attend_own(
    layer: Module, x: Tensor, q: Tensor, own: KeysValues, mask: Tensor | None, is_causal: bool = False
) -> Tensor:
    return _add(layer.attention.output, attend(q, own, mask, is_causal), x)


def _attend_cross(
    layer: Module, x: Tensor, cross: KeysValues | AttendStates, cross_mask: Tensor | None = None
) -> Tensor:
    q = _queries(layer.crossattention, x)
    return _add(layer.crossattention.output, cross(q) if callable(cross) else attend(q, cross, cross_mask), x)


def _feed_forward(layer: Module, x: Tensor) -> Tensor:
    return _add(layer.output, layer.intermediate.intermediate_act_fn(layer.intermediate.dense(x)), x)


def _queries(attention: Module, x: Tensor) -> Tensor:
    return split_heads(attention, attention.self.query(x))[0]


def _add(output: Module, y: Tensor, x: Tensor) -> Tensor:
    """A BertSelfOutput or BertOutput: y (B, T, D) projected and added to x (B, T, C), then normalised."""
    if output.dense.bias is None:  # see `fold_biases`
        x.flatten(0, 1).addmm_(y.flatten(0, 1), output.dense.weight.t())
        return output.LayerNorm(x)  # type: ignore[no-any-return]
    return output.LayerNorm(output.dense(y) + x)  # type: ignore[no-any-return]
