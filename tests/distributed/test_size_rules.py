"""The three ways in which a receiver learns a frame's size, two of which exist for NCCL, over Gloo."""

import pytest
import torch
import torch.distributed as dist

from compressors.base import Payload
from pipeline.comm.link import FrameReceiver, FrameSender
from pipeline.comm.mailbox import FrameSpec, LinkError, PeerInbox, PeerOutbox, SizeRule
from pipeline.comm.wire import RemoteError
from tests.helpers.launch import call_on_ranks

SHAPES = [(1, 64, 16)] * 7 + [(1, 5, 16)]


def spec(sizes):
    return FrameSpec(
        name="layer:0:node0->node1",
        stage_index=0,
        num_trail=0,
        codec_id=5,
        dtype=torch.float32,
        shapes=SHAPES,
        max_nbytes=sizes,
    )


def make_payload(i, nbytes):
    return Payload((torch.arange(nbytes) * (i + 3) % 251).to(torch.uint8), SHAPES[i])


def exchange(rank, rule_name, depth, error_at=None):
    """Rank 0 sends eight payloads to rank 1, which checks each."""
    rule = SizeRule[rule_name]
    bounds = [4 * t * 16 for _, t, _ in SHAPES]
    sizes = bounds if rule is SizeRule.EXACT else [max(1, bound // (i + 1)) for i, bound in enumerate(bounds)]
    dist.init_process_group("gloo")
    place = {"tag": 3, "group": None, "size_rule": rule, "depth": depth}
    memory = {"device": torch.device("cpu"), "pin_memory": False}
    if rank == 0:
        sender = FrameSender(spec(bounds), PeerOutbox(spec(bounds), peer=1, **place, **memory))
        for i, nbytes in enumerate(sizes):
            if i == error_at:
                sender.send_error(f"stage 0, micro-batch {i}: out of luck")
                sender.flush()
                break
            sender.send(i, make_payload(i, nbytes), trail=())
        else:
            sender.end()
            sender.flush()
            assert sender.traffic.payload_bytes == sum(sizes)
    else:
        receiver = FrameReceiver(spec(bounds), PeerInbox(spec(bounds), peer=0, **place, **memory))
        for i, nbytes in enumerate(sizes):
            if i == error_at:
                with pytest.raises(RemoteError, match=f"stage 0, micro-batch {i}: out of luck"):
                    receiver.receive(i)
                break
            _, payload = receiver.receive(i)
            assert torch.equal(payload.data, make_payload(i, nbytes).data)
            receiver.release()
        else:
            receiver.finish()
    dist.barrier()
    dist.destroy_process_group()


def check(outcomes):
    assert [o.returncode for o in outcomes] == [0] * len(outcomes), "\n".join(o.stderr for o in outcomes)


@pytest.mark.parametrize("rule", [rule.name for rule in SizeRule])
@pytest.mark.parametrize("depth", [1, 3, 20])
def test_every_rule_and_depth(rule, depth):
    check(call_on_ranks(2, exchange, rule, depth, timeout_s=60))


@pytest.mark.parametrize("rule", [rule.name for rule in SizeRule])
@pytest.mark.parametrize("error_at", [0, 4, 7])
def test_an_error_takes_the_place_of_any_frame(rule, error_at):
    check(call_on_ranks(2, exchange, rule, 2, error_at, timeout_s=60))


def fail_then_exchange(rank, rule_name, depth, failing, at):
    """A stream that one of its ends breaks off at micro-batch `at`, then a whole one with the same tag."""
    rule, bounds = SizeRule[rule_name], [4 * t * 16 for _, t, _ in SHAPES]
    dist.init_process_group("gloo")
    place = {"tag": 3, "group": None, "size_rule": rule, "depth": depth}
    memory = {"device": torch.device("cpu"), "pin_memory": False}
    for breaks_off in (True, False):
        if rank == 0:
            outbox = PeerOutbox(spec(bounds), peer=1, **place, **memory)
            sender = FrameSender(spec(bounds), outbox, receives_ahead=depth)
            for i, nbytes in enumerate(bounds):
                if breaks_off and failing == "sender" and i == at:
                    break
                sender.send(i, make_payload(i, nbytes), trail=())
            if breaks_off and failing == "sender":
                sender.send_error("out of luck")
            else:
                sender.end()
            sender.send_error("too late")  # the stream has ended: nothing happens
            sender.flush()
            continue
        receiver = FrameReceiver(spec(bounds), PeerInbox(spec(bounds), peer=0, **place, **memory))
        for i, nbytes in enumerate(bounds):
            if breaks_off and failing == "sender" and i == at:
                with pytest.raises(RemoteError, match="^out of luck$"):
                    receiver.receive(i)
            if breaks_off and i == at:
                receiver.drain()
                break
            _, payload = receiver.receive(i)
            assert torch.equal(payload.data, make_payload(i, nbytes).data)
            if not (breaks_off and failing == "receiver" and i + 1 == at):  # a decoder that raises keeps its frame
                receiver.release()
        else:
            receiver.finish()
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("rule", [rule.name for rule in SizeRule])
@pytest.mark.parametrize("depth", [2, 20])
@pytest.mark.parametrize("failing", ["sender", "receiver"])
@pytest.mark.parametrize("at", [0, 5])
def test_a_stream_that_is_broken_off_leaves_nothing_behind(rule, depth, failing, at):
    check(call_on_ranks(2, fail_then_exchange, rule, depth, failing, at, timeout_s=60))


def peer_gone(rank):
    dist.init_process_group("gloo")
    if rank == 0:
        return
    bounds = [4096] * len(SHAPES)
    memory = {"device": torch.device("cpu"), "pin_memory": False}
    inbox = PeerInbox(spec(bounds), peer=0, tag=0, group=None, size_rule=SizeRule.SHORTER_ALLOWED, depth=2, **memory)
    with pytest.raises(LinkError, match="layer:0:node0->node1: receiving from rank 0, frame of micro-batch 0: "):
        FrameReceiver(spec(bounds), inbox).receive(0)


def test_a_peer_that_leaves_is_named():
    check(call_on_ranks(2, peer_gone, timeout_s=60))
