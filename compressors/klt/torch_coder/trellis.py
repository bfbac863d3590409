"""The search for levels, and what they stand for: `kernels.trellis` in PyTorch."""

from __future__ import annotations

import torch

from compressors.kernels.trellis import LARGEST_COMPONENT, MAX_LEVEL, UNREACHED
from compressors.klt.torch_coder.models import component_mask, in_lanes

__all__ = ["quantize", "reconstruct"]


def quantize(
    y: torch.Tensor,
    predicted: torch.Tensor,
    steps: torch.Tensor,
    finer: torch.Tensor,
    classes: torch.Tensor,
    rates: torch.Tensor,
    is_raw: torch.Tensor,
) -> torch.Tensor:
    """Levels int32 [N, H] of what `predicted` leaves of components `y`, both float32 [N, H].

    `steps` float32 [N] are the tokens' steps, `finer` int32 [N] the quarter octaves by which they are finer; `classes`
    int32 [H] and `rates` float32 [C, 2, S] as in `kernels.trellis.Prices`. A token with a level out of range is marked
    in `is_raw` bool [N]; raw tokens have levels 0.
    """
    target = (y - predicted) * (1 / (0.5 * steps))[:, None]
    is_raw |= ~(target.abs() < MAX_LEVEL - 4).all(1)
    target = in_lanes(torch.where(is_raw[:, None], 0, target))
    rows = in_lanes((classes.long() + 2 * finer.long()[:, None]).clamp(0, len(rates) - 1)) * (2 * rates.shape[2])
    costs = _errors(target.abs(), rows, rates) * component_mask(y.shape[1], y.device)[:, None]
    paths = torch.full_like(costs[:, 0], float(UNREACHED))
    paths[:, 0] = 0
    # Costs are those of an even and an odd index in the first quantiser, then in the second. States 0 and 2 are reached
    # from 0 and 1, states 1 and 3 from 2 and 3.
    states, other_states, orders, other_orders = torch.tensor(
        [[0, 2, 0, 2], [1, 3, 1, 3], [0, 2, 1, 3], [1, 3, 0, 2]], device=y.device
    )
    decisions = []
    for stripe in costs.unbind(1):
        others = paths[:, other_states] + stripe[:, other_orders]
        paths = paths[:, states] + stripe[:, orders]
        decisions.append(others < paths)
        paths = torch.minimum(others, paths)
        paths = paths - paths.amin(1, keepdim=True)
    second, odd = _walk_back(paths, decisions)
    size, add = target.abs(), (2 + second - 2 * odd).to(target.dtype)
    levels = 4 * torch.floor(0.25 * (size + add)) + (2 - add)
    levels = torch.where((add == 3) & (size < 1.5), 0, levels)
    levels = torch.where(target >= 0, levels, -levels).int().flatten(1)[:, : y.shape[1]]
    return torch.where(is_raw[:, None], 0, levels)


def _errors(size: torch.Tensor, rows: torch.Tensor, rates: torch.Tensor) -> torch.Tensor:
    """Cost [N, S, 4, LANES] of the nearest level of each parity and quantiser to magnitudes [N, S, LANES].

    Places in `rates` begin at `rows`."""
    levels = torch.stack(
        [
            4 * torch.floor(0.25 * size + 0.5),
            4 * torch.floor(0.25 * size) + 2,
            torch.where(size >= 1.5, 4 * torch.floor(0.25 * (size + 3)) - 1, 0),
            4 * torch.floor(0.25 * (size + 1)) + 1,
        ],
        2,
    )
    second = torch.tensor([0, 0, 1, 1], device=size.device)[:, None]
    indices = ((levels.long() + second) >> 1).clamp_max(rates.shape[2] - 1)
    difference = size[:, :, None] - levels
    return difference * difference + rates.flatten()[rows[:, :, None] + rates.shape[2] * second + indices]


def _walk_back(paths: torch.Tensor, decisions: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether each level of the cheapest path is of the second quantiser and has an odd index, 0 or 1 [N, S, LANES].

    `paths` [N, 4, LANES] is what the states at the end cost; of decisions [N, 4, LANES], state s's says that it is
    reached from the second of its two predecessors.
    """
    state = (paths == 0).long().mul(torch.tensor([4, 3, 2, 1], device=paths.device)[:, None]).argmax(1, keepdim=True)
    seconds, odds = [], []
    for decision in reversed(decisions):
        from_second = decision.gather(1, state).long()
        seconds.append(state & 1)
        odds.append(from_second ^ (state >> 1))
        state = 2 * seconds[-1] + from_second
    return torch.cat(seconds[::-1], 1), torch.cat(odds[::-1], 1)


def reconstruct(
    levels: torch.Tensor, steps: torch.Tensor, predicted: torch.Tensor, is_raw: torch.Tensor
) -> torch.Tensor:
    """Components float32 [N, H] that the levels stand for; arguments as in `quantize`. Of raw tokens, `predicted`."""
    half = torch.where(is_raw, 0, 0.5 * steps)
    limit = float(LARGEST_COMPONENT)
    return (predicted + levels * half[:, None]).clamp(-limit, limit)
