"""The convolution and the recurrence of Gated DeltaNet and Mamba2, token by token along each path
of a forest of segments."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.core.types import PackLayout
from tunesmith.model.mixers.scan import ScanInputs, ScanShape, normalize_qk

NUM_TAPS = 4


def make_layout(segments: list[tuple[int, int]]) -> PackLayout:
    """Return a layout of segments with a parent (-1, or the index of an earlier one) and a
    length."""
    lengths = tuple(length for _, length in segments)
    starts = tuple(sum(lengths[:i]) for i in range(len(lengths)))
    parents = tuple(min(parent, i - 1) for i, (parent, _) in enumerate(segments))
    return PackLayout(starts, lengths, parents if max(parents) >= 0 else ())


def list_path(layout: PackLayout, segment: int) -> list[int]:
    tokens: list[int] = []
    for index in layout.get_path(segment):
        tokens += range(layout.starts[index], layout.starts[index] + layout.lengths[index])
    return tokens


def make_inputs(num_tokens: int, shape: ScanShape, seed: int = 0) -> ScanInputs:
    generator = torch.Generator().manual_seed(seed)
    channels = 2 * shape.num_groups * shape.key_size + shape.num_heads * shape.value_size

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    return ScanInputs(
        mixed_TC=draw(num_tokens, channels),
        weight_CK=draw(channels, NUM_TAPS),
        bias_C=draw(channels),
        decay_TH=-0.3 * draw(num_tokens, shape.num_heads).abs(),
        beta_TH=draw(num_tokens, shape.num_heads).sigmoid(),
        skip_H=draw(shape.num_heads),
    )


def convolve_path(inputs: ScanInputs, path: list[int]) -> Tensor:
    x = inputs.mixed_TC[path].t()[None]
    padded = F.pad(x, (NUM_TAPS - 1, 0))
    y = F.conv1d(padded, inputs.weight_CK[:, None], inputs.bias_C, groups=x.shape[1])
    return F.silu(y[0].t())


def run_path(inputs: ScanInputs, shape: ScanShape, path: list[int]) -> Tensor:
    """Return the outputs of the tokens of a path, one token after the other."""
    return run_recurrence(convolve_path(inputs, path), inputs, shape, path)


def run_recurrence(
    active_LC: Tensor, inputs: ScanInputs, shape: ScanShape, path: list[int]
) -> Tensor:
    """Return the outputs of the tokens of a path from their convolved channels."""
    q, k, v = shape.split_channels(active_LC)
    if shape.is_delta_rule:
        q, k = normalize_qk(q, k)
    g = shape.split_heads(inputs.decay_TH[path])
    beta = shape.split_heads(inputs.beta_TH[path])
    assert inputs.skip_H is not None
    skip = shape.split_heads(inputs.skip_H)
    state = q.new_zeros(*v.shape[1:3], shape.key_size, shape.value_size)
    outputs = []
    for t in range(len(path)):
        state = state * g[t].exp()[..., None, None]
        update = v[t]
        if shape.is_delta_rule:
            update = update - torch.einsum("gd,grde->gre", k[t], state)
        update = beta[t][..., None] * update
        state = state + torch.einsum("gd,gre->grde", k[t], update)
        outputs.append(torch.einsum("gd,grde->gre", q[t], state) + skip[..., None] * v[t])
    return torch.stack(outputs).flatten(1)


def run_reference(inputs: ScanInputs, shape: ScanShape, layout: PackLayout) -> Tensor:
    pieces = []
    for segment, length in enumerate(layout.lengths):
        pieces.append(run_path(inputs, shape, list_path(layout, segment))[-length:])
    return torch.cat(pieces)
