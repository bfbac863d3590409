"""Frames between two ranks: whole over Gloo, and with bodies apart as over NCCL, for which Gloo stands in here."""

import pytest
import torch
import torch.distributed as dist

from compressors.base import Payload
from pipeline.comm.link import FrameReceiver, FrameSender
from pipeline.comm.mailbox import BodyChannel, FrameMemory, FrameSpec, LinkError, PeerInbox, PeerOutbox
from pipeline.records.store import read_per_token, read_record
from pipeline.comm.wire import RemoteError
from tests.helpers.launch import call_on_ranks, run_ranks
from tests.helpers.tiny_models import tiny_arguments

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


def join(apart, bounds):
    """The ranks' group, and where frames of at most `bounds` bytes lie."""
    dist.init_process_group("gloo")
    channel = BodyChannel(dist.new_group([0, 1]), torch.device("cpu"), timeout_s=30) if apart else None
    return FrameMemory(spec(bounds), channel=channel)


def exchange(rank, apart, depth, error_at=None):
    """Rank 0 sends eight payloads to rank 1, which checks each."""
    bounds = [4 * t * 16 for _, t, _ in SHAPES]
    sizes = [max(1, bound // (i + 1)) for i, bound in enumerate(bounds)]
    memory, place = join(apart, bounds), {"tag": 3, "depth": depth}
    if rank == 0:
        sender = FrameSender(spec(bounds), PeerOutbox(spec(bounds), memory, peer=1, **place), receives_ahead=depth)
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
        receiver = FrameReceiver(spec(bounds), PeerInbox(spec(bounds), memory, peer=0, **place))
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


@pytest.mark.parametrize("apart", [False, True], ids=["whole", "bodies apart"])
@pytest.mark.parametrize("depth", [1, 3, 20])
def test_every_depth(apart, depth):
    check(call_on_ranks(2, exchange, apart, depth, timeout_s=60))


@pytest.mark.parametrize("apart", [False, True], ids=["whole", "bodies apart"])
@pytest.mark.parametrize("error_at", [0, 4, 7])
def test_an_error_takes_the_place_of_any_frame(apart, error_at):
    check(call_on_ranks(2, exchange, apart, 2, error_at, timeout_s=60))


def fail_then_exchange(rank, apart, depth, failing, at):
    """A stream that one of its ends breaks off at micro-batch `at`, then a whole one with the same tag."""
    bounds = [4 * t * 16 for _, t, _ in SHAPES]
    memory, place = join(apart, bounds), {"tag": 3, "depth": depth}
    for breaks_off in (True, False):
        if rank == 0:
            outbox = PeerOutbox(spec(bounds), memory, peer=1, **place)
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
        receiver = FrameReceiver(spec(bounds), PeerInbox(spec(bounds), memory, peer=0, **place))
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


@pytest.mark.parametrize("apart", [False, True], ids=["whole", "bodies apart"])
@pytest.mark.parametrize("depth", [2, 20])
@pytest.mark.parametrize("failing", ["sender", "receiver"])
@pytest.mark.parametrize("at", [0, 5])
def test_a_stream_that_is_broken_off_leaves_nothing_behind(apart, depth, failing, at):
    check(call_on_ranks(2, fail_then_exchange, apart, depth, failing, at, timeout_s=60))


def peer_gone(rank):
    dist.init_process_group("gloo")
    if rank == 0:
        dist.barrier()
        return
    bounds = [4096] * len(SHAPES)
    inbox = PeerInbox(spec(bounds), FrameMemory(spec(bounds)), peer=0, tag=0, depth=2)
    dist.barrier()
    with pytest.raises(LinkError, match="layer:0:node0->node1: receiving from rank 0, frame of micro-batch 0: "):
        FrameReceiver(spec(bounds), inbox).receive(0)


def test_a_peer_that_leaves_is_named():
    check(call_on_ranks(2, peer_gone, timeout_s=60))


def run_with_bodies_apart(rank, arguments):
    """A run as with NCCL, whose place Gloo takes."""
    import run_pipeline
    from pipeline.runtime import deployment

    new_group = dist.new_group
    deployment.link_backend = lambda *_: "nccl"
    dist.new_group = lambda ranks, backend, timeout: new_group(ranks, backend="gloo", timeout=timeout)
    return run_pipeline.main(arguments)


def test_a_whole_run_with_bodies_apart(tmp_path):
    records = []
    codecs = ("--compressor", "int8", "--set", "compressor_per_link={'layer:1:node1->node2': zstd}")
    for folder in (tmp_path / "whole", tmp_path / "apart"):
        arguments = tiny_arguments(folder, *codecs)
        if folder.name == "whole":
            check(run_ranks([arguments] * 4, timeout_s=120))
        else:
            check(call_on_ranks(4, run_with_bodies_apart, arguments, timeout_s=120))
        (path,) = folder.glob("*.json")
        records.append((read_record(path), read_per_token(path)["loss"]))
    (whole, losses), (apart, others) = records
    assert (whole["backend"], apart["backend"]) == ("gloo", "nccl")
    assert (losses == others).all() and whole["traffic_per_link"] == apart["traffic_per_link"]


def test_a_failure_with_bodies_apart_reaches_every_rank(tmp_path):
    arguments = tiny_arguments(tmp_path, "--compressor", "tests.helpers.bad_codecs:Raising(rank=2)")
    ended = call_on_ranks(4, run_with_bodies_apart, arguments, timeout_s=120)
    assert all(one.returncode == 1 and "rank 2, stage 2" in one.stderr for one in ended)


class Work:
    """A transfer on a GPU that is done after so many questions; its `wait` returns at once, as NCCL's does."""

    def __init__(self, questions):
        self.questions, self.ordered = questions, False

    def is_completed(self):
        self.questions -= 1
        return self.questions < 0

    def wait(self):
        self.ordered = True


def test_a_body_on_a_gpu_is_polled_for():
    channel, work = BodyChannel(None, torch.device("cuda:0"), timeout_s=30), Work(3)
    channel.wait(work)
    assert work.questions < 0 and work.ordered
    with pytest.raises(RuntimeError, match=r"nothing moved within 0.01 s \(runtime.timeout_s\)"):
        BodyChannel(None, torch.device("cuda:0"), timeout_s=0.01).wait(Work(10**9))
