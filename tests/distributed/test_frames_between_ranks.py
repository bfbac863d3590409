"""Frames between two ranks: whole over Gloo, and with bodies apart as over NCCL, for which Gloo stands in here."""

import datetime
import threading

import pytest
import torch
import torch.distributed as dist

from compressors.base import Payload
from pipeline.comm.link import FrameReceiver, FrameSender, HiddenSpec
from pipeline.comm.mailbox import (
    Arrivals,
    BodyChannel,
    FrameMemory,
    LinkError,
    PeerAddress,
    PeerInbox,
    PeerOutbox,
)
from pipeline.comm.wire import BadFrame, WireFormat
from pipeline.partition.passes import Pass, PassKind, Row
from pipeline.records.store import read_per_token, read_record
from tests.helpers.launch import call_on_ranks, run_ranks
from tests.helpers.mailboxes import num_free
from tests.helpers.tiny_models import tiny_arguments

SHAPES = [(1, 64)] * 7 + [(1, 5)]
BOUNDS = [64 * tokens for _, tokens in SHAPES]
SPEC = HiddenSpec(
    name="layer:0:node0->node1",
    wire=WireFormat(link_index=0, num_trail=0, codec_ids=(5,), dtype=torch.float32),
    hidden_size=16,
    bound=lambda kind, shape: 4 * shape[0] * shape[1] * shape[2],
    microbatch_shapes=SHAPES,
    max_rows=2,
    max_tokens=4,
)
TAG = 3


def score(i):
    return Pass(kind=PassKind.SCORE, microbatch_index=i)


def make_payload(i, nbytes):
    return Payload((torch.arange(nbytes) * (i + 3) % 251).to(torch.uint8), (*SHAPES[i], 16))


class Ends:
    """A rank's end of the link: 0 sends, 1 receives."""

    def __init__(self, rank, apart, depth):
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
            Ends.channel = BodyChannel(dist.new_group([0, 1]), torch.device("cpu"), timeout_s=30) if apart else None
        memory = FrameMemory(SPEC.max_body_nbytes, SPEC.max_tail_nbytes, channel=Ends.channel)
        address = PeerAddress(SPEC.name, 1 - rank, TAG)
        self.num_inboxes = sum(thread.name.startswith("inbox") for thread in threading.enumerate())
        if rank == 0:
            self.outbox = PeerOutbox(address, memory, depth=2)
            self.sender = FrameSender(SPEC, self.outbox, apart=apart, receives_ahead=depth)
        else:
            self.arrivals = Arrivals()
            self.inbox = PeerInbox(0, address, memory, self.arrivals, depth=depth)
            self.receiver = FrameReceiver(SPEC, self.inbox, apart=apart)

    def take(self):
        """(frame, buffer)."""
        _, buffer = self.arrivals.take()
        return self.receiver.open(buffer), buffer

    def end(self):
        """On both ranks: the stream ends, and leaves nothing behind."""
        if hasattr(self, "sender"):
            self.sender.end()
            self.sender.flush()
            assert num_free(self.outbox) == 2
        else:
            assert self.take()[0] is None
            self.receiver.close()
            assert self.arrivals.is_empty() and self.inbox.num_posted == 0
            inboxes = [thread.name for thread in threading.enumerate() if thread.name.startswith("inbox")]
            assert len(inboxes) == self.num_inboxes == 0, inboxes


def leave():
    dist.barrier()
    dist.destroy_process_group()


def exchange(rank, apart, depth, failing):
    """Rank 0 sends eight payloads of all sizes, or failures in place of those in `failing`; rank 1 checks each."""
    sizes = [max(1, bound // (i + 1)) for i, bound in enumerate(BOUNDS)]
    ends = Ends(rank, apart, depth)
    for i, nbytes in enumerate(sizes):
        if rank == 0 and i in failing:
            ends.sender.fail(score(i), f"stage 0, micro-batch {i}: out of luck")
        elif rank == 0:
            ends.sender.send(score(i), make_payload(i, nbytes), ())
        else:
            frame, buffer = ends.take()
            assert frame.work == score(i)
            if i in failing:
                assert frame.failure == f"stage 0, micro-batch {i}: out of luck" and frame.payload is None
            else:
                assert torch.equal(frame.payload.data, make_payload(i, nbytes).data) and frame.trail == (nbytes,)
            ends.receiver.release(buffer)
    ends.end()
    if rank == 0:
        assert ends.sender.traffic.payload_bytes == sum(n for i, n in enumerate(sizes) if i not in failing)
    leave()


def check(outcomes):
    assert [o.returncode for o in outcomes] == [0] * len(outcomes), "\n".join(o.stderr for o in outcomes)


APART = pytest.mark.parametrize("apart", [False, True], ids=["whole", "bodies apart"])


@APART
@pytest.mark.parametrize("depth", [1, 3, 20])
def test_every_depth(apart, depth):
    check(call_on_ranks(2, exchange, apart, depth, (), timeout_s=60))


@APART
@pytest.mark.parametrize("failing", [(0,), (3, 4), (7,), tuple(range(8))])
def test_a_failure_takes_the_place_of_any_frame(apart, failing):
    check(call_on_ranks(2, exchange, apart, 2, failing, timeout_s=60))


def exchange_rows(rank, apart):
    """What generation sends: rows, token ids, a note, meta; bodies of a few bytes, and of none."""
    ends = Ends(rank, apart, 2)
    ids = torch.tensor([[5, 70_000]] * 2)
    work = Pass(kind=PassKind.DECODE, rows=(Row(4, 10), Row(5, 0, from_slot=4)), num_tokens=2, samples=True)
    for nbytes in (7, 0, 256):
        data = (torch.arange(nbytes) % 251).to(torch.uint8)
        if rank == 0:
            payload = Payload(data, (2, 2, 16), {} if nbytes == 256 else {"step": 0.25})
            ends.sender.send(work, payload, (), token_ids=ids.numpy(), note=b"seed")
            continue
        frame, buffer = ends.take()
        assert frame.work == work and frame.note == b"seed" and frame.token_ids.tolist() == ids.tolist()
        assert torch.equal(frame.payload.data, data)
        assert frame.payload.meta == ({} if nbytes == 256 else {"step": 0.25})
        ends.receiver.release(buffer)
    ends.end()
    leave()


@APART
def test_rows_ids_notes_and_meta(apart):
    check(call_on_ranks(2, exchange_rows, apart, timeout_s=60))


def one_after_the_other(rank, apart, depth, lengths):
    """Streams of so many frames on the same tag."""
    for length in lengths:
        ends = Ends(rank, apart, depth)
        for i in range(length):
            if rank == 0:
                ends.sender.send(score(i), make_payload(i, BOUNDS[i]), ())
                continue
            frame, buffer = ends.take()
            assert torch.equal(frame.payload.data, make_payload(i, BOUNDS[i]).data)
            ends.receiver.release(buffer)
        ends.end()
    leave()


@APART
@pytest.mark.parametrize("depth", [1, 2, 20])
def test_a_stream_that_has_ended_leaves_nothing_behind(apart, depth):
    """Neither frames nor posted receives, which the next stream on the same tags would meet."""
    check(call_on_ranks(2, one_after_the_other, apart, depth, (0, 8, 1, 0, 5, 8), timeout_s=60))


def peer_gone(rank, apart):
    ends = Ends(rank, apart, 2)
    if rank == 0:
        ends.sender.send(score(0), make_payload(0, 9), ())
        ends.sender.flush()
        dist.barrier()
        return
    frame, _ = ends.take()
    assert frame.work == score(0)
    dist.barrier()
    with pytest.raises(LinkError, match="link layer:0:node0->node1: receiving from rank 0: .") as raised:
        ends.take()
    assert raised.value.peer == 0 and raised.value.is_symptom
    with pytest.raises(LinkError):
        ends.receiver.close()  # waits for the inbox's thread
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("inbox")]


@APART
def test_a_peer_that_leaves_is_named(apart):
    check(call_on_ranks(2, peer_gone, apart, timeout_s=60))


def damage_the_second_end(rank):
    ends = Ends(rank, False, 3)
    if rank == 0:
        post, posted = ends.outbox.post, []

        def damaging_post(buffer, nbytes, device_nbytes):
            posted.append(nbytes)
            if len(posted) == 2:
                buffer.host[8] ^= 2
            post(buffer, nbytes, device_nbytes)

        ends.outbox.post = damaging_post
        ends.sender.end()
        ends.sender.flush()
    else:
        assert ends.take()[0] is None
        with pytest.raises(BadFrame, match="layer:0:node0->node1: something else than END has come behind END"):
            ends.receiver.close()
    leave()


def test_an_end_that_is_damaged_does_not_hang_the_receiver():
    check(call_on_ranks(2, damage_the_second_end, timeout_s=60))


def receiver_gone(rank):
    ends = Ends(rank, False, 1)
    dist.barrier()
    if rank == 1:
        return
    with pytest.raises(LinkError, match="link layer:0:node0->node1: sending to rank 1: .") as raised:
        for i in (0, 1, 2, 3, 4, 5, 6):
            ends.sender.send(score(i), make_payload(i, BOUNDS[i]), ())
        ends.sender.flush()
    assert raised.value.peer == 1


def test_a_receiver_that_leaves_is_named():
    check(call_on_ranks(2, receiver_gone, timeout_s=60))


def wait_longer_than_the_groups_timeout(rank, apart):
    """An idle link is a normal link: nobody waits with the group's timeout."""
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=1))
    bodies = dist.new_group([0, 1], timeout=datetime.timedelta(days=1)) if apart else None
    Ends.channel = BodyChannel(bodies, torch.device("cpu"), timeout_s=30) if apart else None
    ends = Ends(rank, apart, 1)
    if rank == 0:
        threading.Event().wait(3)
        for i in range(4):
            ends.sender.send(score(i), make_payload(i, 9), ())
    else:
        for i in range(4):
            frame, buffer = ends.take()
            assert frame.work == score(i)
            if i == 0:
                threading.Event().wait(3)
            ends.receiver.release(buffer)
    ends.end()


@APART
def test_an_idle_link_is_a_normal_link(apart):
    check(call_on_ranks(2, wait_longer_than_the_groups_timeout, apart, timeout_s=60))


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
    assert (whole.backend, apart.backend) == ("gloo", "nccl")
    assert (losses == others).all() and whole.traffic_per_link == apart.traffic_per_link


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
