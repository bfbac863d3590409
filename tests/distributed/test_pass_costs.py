"""What passes of several tokens cost is measured alike on all ranks, and leaves nothing behind."""

import json

import pytest

from pipeline.comm.watchdog import tell
from pipeline.config.reading import load_config
from pipeline.runtime.launch import on_deployment
from pipeline.runtime.pass_costs import measure_pass_costs, ranks_at_once
from pipeline.runtime.worker import EndCodecs
from tests.helpers.launch import call_on_ranks
from tests.helpers.tiny_models import tiny_model
from tests.unit.test_slot_cache import load_stages

HIDDEN_SIZE = 64
SLOW = 1000


def measure(rank, folder, num_nodes, depth, max_length):
    """Prints the costs without and with a slow last rank, and how long slot 0 is before and after."""
    given = {"model.name": str(tiny_model()), "partition.num_nodes": num_nodes, "runtime.threads": 1}
    config = load_config(None, [*given.items(), ("compressor", "nf4"), ("compressor_decode", "int8")])

    def work(deployment):
        from pipeline.runtime.codecs import make_decode_codecs

        codecs = make_decode_codecs(
            config, deployment.plan, deployment.control, deployment.codecs, hidden_size=HIDDEN_SIZE, max_tokens=256,
            checkpoint=deployment.model.checkpoint_digest,
        )  # fmt: skip
        for stage in deployment.stages.values():
            stage.open_slots(2, max_length)
        at_once = ranks_at_once(deployment)
        told = {"at_once": sum(at_once.values())}
        is_last = rank == deployment.control.world.world_size - 1
        for name, slowdown in (("plain", 1.0), ("slow", SLOW if is_last else 1.0)):
            costs = measure_pass_costs(
                deployment.stages, EndCodecs.make(deployment.plan, deployment.codecs, codecs), deployment.control,
                at_once=at_once, depth=depth, slowdown=slowdown,
            )  # fmt: skip
            told[name] = [costs.num_tokens, costs.lap_s, costs.busy_s]
        told["held"] = [stage.slots.length(0) for stage in deployment.stages.values()]
        tell(f"told {json.dumps(told)}\n")

    on_deployment(config, folder, work, with_text=False)


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_all_ranks_know_the_same_costs(num_ranks, tmp_path):
    ranks = call_on_ranks(num_ranks, measure, tmp_path, 3, 8, 64, distributed=num_ranks > 1)
    told = [
        json.loads(line.removeprefix("told "))
        for rank in ranks
        for line in (rank.check().stdout + rank.stderr).splitlines()
        if line.startswith("told ")
    ]
    assert len(told) == num_ranks
    assert not any(length for one in told for length in one.pop("held"))
    assert told == [told[0]] * num_ranks
    for name in ("plain", "slow"):
        num_tokens, lap_s, busy_s = told[0][name]
        assert num_tokens == [1, 2, 4, 8, 9]
        assert all(0 < busy <= lap for lap, busy in zip(lap_s, busy_s, strict=True))
    # A third of the work or so takes a thousand times as long, and passes are apart by that.
    plain_lap_s, slow_lap_s, slow_busy_s = told[0]["plain"][1], told[0]["slow"][1], told[0]["slow"][2]
    assert all(slow > 20 * plain for plain, slow in zip(plain_lap_s, slow_lap_s, strict=True))
    assert all(busy > 0.9 * lap for busy, lap in zip(slow_busy_s, slow_lap_s, strict=True))


def test_a_short_slot_bounds_the_passes(tmp_path):
    (rank,) = call_on_ranks(1, measure, tmp_path, 3, 64, 6, distributed=False)
    assert '"plain": [[1, 2, 4, 6]' in rank.check().stdout + rank.stderr


class Ranks:
    """This rank's control, where two more on another host have told what they take."""

    host = "here"

    def in_turn(self, work):
        return work()

    def gather(self, value):
        others = [["there", [0.3], 1.0], ["there", [0.5], 4.0]]
        return [value, *others] if isinstance(value, list) else [value]


@pytest.mark.parametrize("at_once, busy_s", [({"here": 1, "there": 2}, 2.0), ({"here": 1, "there": 0.25}, 3.2)])
def test_passes_are_apart_by_the_slowest_rank_or_by_what_a_host_can_do(at_once, busy_s):
    """A rank that plays a slower one does not keep others from the cores meanwhile."""
    stages = dict(enumerate(load_stages(tiny_model(num_layers=4))[:1]))
    stages[0].open_slots(1, 1)  # so a pass has one token
    costs = measure_pass_costs(
        stages, EndCodecs(encoders={}, decoders={}), Ranks(), at_once=at_once, depth=8, slowdown=1.0,
    )  # fmt: skip
    own_s = costs.lap_s[0] - 0.3 - 4 * 0.5
    assert costs.num_tokens == (1,) and 0 < own_s < 1
    assert costs.busy_s == pytest.approx((busy_s,))
