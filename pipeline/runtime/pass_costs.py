"""What passes of several tokens of one sequence cost on this ring: each rank's stages and codecs timed, in turn.

Framing and the network are left out: what a lap takes beside its work, rank 0 learns while passes go around.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch

from pipeline.comm.control import Control
from pipeline.models.stage import Stage
from pipeline.partition.passes import PassKind
from pipeline.planner.pass_costs import PassCosts
from pipeline.runtime.codecs import naming
from pipeline.runtime.deployment import Deployment
from pipeline.runtime.devices import available_cores
from pipeline.runtime.timing import (
    MAX_S,
    payload_from_json,
    payload_to_json,
    time_compress,
    time_decompress,
    time_tokens,
)
from pipeline.runtime.together import failing_alike, from_all_ranks
from pipeline.runtime.worker import EndCodecs

__all__ = ["measure_pass_costs", "ranks_at_once"]


def ranks_at_once(deployment: Deployment) -> dict[str, int]:
    """By host, how many of its ranks can compute at the same time: a GPU each, or as many threads as it has cores.

    Every rank calls it.
    """
    is_gpu = any(device.type == "cuda" for device in deployment.devices.values())
    told = deployment.control.gather([deployment.control.host, available_cores() // deployment.threads, is_gpu])
    num_ranks = Counter(host for host, _, _ in told)
    limits = {host: at_once for host, at_once, on_gpu in told if not on_gpu}
    return {host: max(1, min(count, limits.get(host, count))) for host, count in num_ranks.items()}


def measure_pass_costs(
    stages: Mapping[int, Stage],
    codecs: EndCodecs,
    control: Control,
    *,
    at_once: Mapping[str, int],
    depth: int,
    slowdown: float,
) -> PassCosts:
    """Costs of passes of 1 to 1 + `depth` tokens, or what a slot has room for. Every rank calls it, with slots open,
    which are as they were before that they were filled: slot 0 is empty afterwards.

    Args:
        stages, codecs: this rank's, by index in the chain.
        at_once: `ranks_at_once`.
        slowdown: of this rank, where it plays a weaker device (`StageTimes`).

    A codec or stage that raises is a StageError on all ranks.
    """
    widths = _widths(1 + depth, stages, control)
    model_config = next(iter(stages.values())).decoder.config
    hidden_size, dtype = model_config.hidden_size, model_config.dtype
    ends = codecs.of(PassKind.DECODE)
    own_s = [0.0] * len(widths)
    written = {}

    def time_stages() -> None:
        for place, num_tokens in enumerate(widths):
            for index, stage in stages.items():
                own_s[place] += time_tokens(stage, num_tokens, hidden_size, dtype, max_s=MAX_S / len(widths))
                if (encoder := ends.encoders.get(index)) is not None:
                    x = torch.ones((1, num_tokens, hidden_size), dtype=dtype, device=stage.device)
                    with naming(encoder):
                        seconds, payload = time_compress(encoder, x)
                    own_s[place] += seconds
                    written[f"{index} {num_tokens}"] = payload_to_json(payload)

    def time_decoders() -> None:
        for place, num_tokens in enumerate(widths):
            for index, decoder in ends.decoders.items():
                device = stages[index + 1].device
                with naming(decoder):
                    payload = payload_from_json(frames[f"{index} {num_tokens}"], device)
                    own_s[place] += time_decompress(decoder, payload, device, dtype)

    with failing_alike(control):
        control.in_turn(time_stages)
    frames = from_all_ranks(control, written)
    with failing_alike(control):
        control.in_turn(time_decoders)
    told = control.gather([control.host, own_s, slowdown])
    return PassCosts(
        num_tokens=tuple(widths),
        lap_s=tuple(sum(slow * seconds[place] for _, seconds, slow in told) for place in range(len(widths))),
        busy_s=tuple(_busy_s(told, at_once, place) for place in range(len(widths))),
    )


def _widths(most: int, stages: Mapping[int, Stage], control: Control) -> list[int]:
    """1, 2, 4, ... and the most tokens that a pass may have."""
    room = min(stage.slots.max_length for stage in stages.values() if stage.slots is not None)
    most = min(most, *control.gather(room))
    powers = [1]
    while 2 * powers[-1] < most:
        powers.append(2 * powers[-1])
    return [*powers, most] if most > 1 else powers


def _busy_s(told: list[list], at_once: Mapping[str, int], place: int) -> float:
    """How long passes are apart that follow each other. A rank that plays a slower one leaves its core meanwhile."""
    of_host: Counter[str] = Counter()
    for host, seconds, _ in told:
        of_host[host] += seconds[place]
    slowest_s = max(slow * seconds[place] for _, seconds, slow in told)
    return max(slowest_s, *(seconds / at_once[host] for host, seconds in of_host.items()))
