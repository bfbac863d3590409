"""The drafter `shortcut` against last layers that see all states at once, whatever passes have done to the slots.

In float64, on a model whose middle layers pass on what they get, so that the map that takes x_t for y_t is exact.
"""

import functools
import itertools
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressors.base import LinkInfo
from compressors.registry import make_compressor
from pipeline.analysis import shortcut_calibration
from pipeline.analysis.shortcut_calibration import LeastSquares, likely_ids
from pipeline.drafting.drafter import DrafterContext
from pipeline.drafting.shortcut import MAX_ESTIMATED, Shortcut, Trail
from pipeline.drafting.shortcut_file import FILE, ShortcutMap, read_shortcut, write_shortcut
from pipeline.models.loading import WeightFormat, load_stage
from pipeline.models.model_config import load_model_config
from pipeline.models.stage import Stage
from pipeline.partition.passes import Pass, PassKind, Row
from pipeline.partition.plan import default_plan, explicit_plan
from pipeline.runtime.engine import Entry
from pipeline.runtime.worker import EndCodecs, StageWorker
from tests.helpers.marks import slow_but
from tests.helpers.tiny_models import EOS_ID, VOCAB_SIZE, pass_on_unchanged, save_tiny_model, skip_dropped_caps

CPU = torch.device("cpu")
PLAN = default_plan(6, 2)  # [0, 1) and [4, 6) on node 0
MAX_LENGTH, NUM_SLOTS, HIDDEN_SIZE = 96, 3, 64
CHECKPOINT = "of the test"
EXACT = torch.cat([torch.eye(HIDDEN_SIZE), torch.zeros(2 * HIDDEN_SIZE, HIDDEN_SIZE)])
ALL_IDS = torch.arange(VOCAB_SIZE, dtype=torch.int32)
TEXT = torch.randint(0, 256, (80,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def passing_on(tmp_path_factory):
    """Folders, by model type, of models whose middle layers change nothing."""

    @functools.cache
    def make(model_type):
        skip_dropped_caps(model_type)
        caps = {"final_logit_softcapping": 2.0} if model_type == "gemma2" else {}
        folder = save_tiny_model(tmp_path_factory.mktemp(model_type), model_type, **caps)
        return pass_on_unchanged(folder, range(1, 4))

    return make


def random_map(seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(3 * HIDDEN_SIZE, HIDDEN_SIZE, generator=generator) / 8
    return weights, torch.randn(HIDDEN_SIZE, generator=generator)


def write_map(folder, weights=EXACT, bias=None, ids=ALL_IDS, plan=PLAN):
    bias = torch.zeros(HIDDEN_SIZE) if bias is None else bias
    content = ShortcutMap(weights=weights, bias=bias, likely_ids=ids)
    return write_shortcut(folder, content, plan, checkpoint=CHECKPOINT, text_sha256="0" * 64, num_tokens=9)


@functools.cache
def load_models(model_dir, dtype):
    config = load_model_config(model_dir, {})
    weights = WeightFormat(dtype=dtype)
    return config, {plan: load_stage(model_dir, config, plan, weights, device=CPU) for plan in PLAN.stages}


class Ring:
    """All stages in one process, on the run's own worker, with passes that wait between node 0's two stages."""

    def __init__(self, model_dir, dtype=torch.float64, codec="none"):
        self.dtype, self.in_flight = dtype, deque()
        self.config, models = load_models(model_dir, dtype)
        self.stages = {plan.stage_index: Stage(plan, models[plan], CPU, VOCAB_SIZE) for plan in PLAN.stages}
        # Gemma 2 takes its softmax in float32 where it has no cache, as `expected`.
        self.tolerance = 1e-6 if self.config.model_type == "gemma2" else 1e-9
        for stage in self.stages.values():
            stage.open_slots(NUM_SLOTS, MAX_LENGTH)
            for part in itertools.chain(*stage.slots.layers):
                part.fill_(torch.nan)
        self.first, self.last = self.stages[0], self.stages[2]
        head = SimpleNamespace(result_link=None, results=lambda *_: None)
        codecs = {
            link.index: make_compressor(
                codec, LinkInfo(name=link.name, hidden_size=HIDDEN_SIZE, max_tokens=3 * MAX_LENGTH, dtype=dtype)
            )
            for link in PLAN.links
        }
        self.worker = StageWorker(
            self.stages, EndCodecs(encoders=codecs, decoders=codecs), head, dtype=dtype
        )

    def context(self, plan=PLAN, **other):
        known = {"checkpoint_digest": CHECKPOINT, "model_config": self.config, "eos_ids": (EOS_ID,)}
        return DrafterContext(plan=plan, stages=self.stages, watch=self.worker.watch, **{**known, **other})

    def send(self, ids, *rows, kind=PassKind.DECODE):
        """A pass of rows (slot, start, from_slot) with the tokens that their sequences have from there on."""
        rows = [Row(*row) for row in rows]
        work = Pass(kind=kind, rows=tuple(rows), num_tokens=len(ids[0]))
        entry = Entry(work=work, token_ids=torch.tensor(ids))
        self.in_flight.append((entry, self.worker.enter(entry)))

    def come_back(self, *, is_void=False):
        """The oldest pass goes through the rest of the chain, up to where node 0 knows that it is of no use."""
        entry, departure = self.in_flight.popleft()
        for link_index in (0, 1):
            frame = SimpleNamespace(
                work=entry.work, payload=departure.payload, token_ids=None, note=b"", trail=departure.trail
            )
            if link_index == 1 and is_void:
                return
            inputs = self.worker.unpack(link_index, frame)
            departure = self.worker.step(link_index, frame, inputs, entry if link_index == 1 else None)

    def go_around(self, ids, *rows):
        self.send(ids, *rows)
        self.come_back()

    def lengths(self, slot=0):
        return self.first.slots.length(slot), self.last.slots.length(slot)

    @torch.inference_mode()
    def expected(self, ids, num_true, count, weights=EXACT, bias=None, head_ids=ALL_IDS):
        """Drafts and confidences by one forward over the whole sequence each, without slots."""
        ids, drafts = list(ids), []
        weights = weights.to(self.dtype)
        bias = 0 if bias is None else bias.to(self.dtype)
        for _ in range(count):
            tokens = torch.tensor([ids])
            e, x = self.first.embed(tokens)[0], self.first.forward(tokens)[0]
            y = list(self.stages[1].forward(x[None, :num_true])[0])
            for position in range(num_true, len(ids)):
                y.append(torch.cat([x[position], e[position], y[-1]]) @ weights + bias)
            logits = self.last.logits(self.last.forward(torch.stack(y)[None])[0, -1:])[0, head_ids.long()]
            confidence, place = logits.softmax(-1).max(-1)
            drafts.append((int(head_ids[place]), pytest.approx(confidence.item(), rel=self.tolerance)))
            ids.append(drafts[-1][0])
        return drafts

    @torch.inference_mode()
    def greedy(self, ids, count):
        """The model's own continuation."""
        ids = list(ids)
        for _ in range(count):
            x = torch.tensor([ids])
            for stage in self.stages.values():
                x = stage.forward(x)
            ids.append(int(self.last.logits(x[0, -1:]).argmax()))
        return ids[-count:]


@pytest.fixture(params=["llama", "gemma2"])
def ring(request, passing_on):
    return Ring(passing_on(request.param))


@pytest.fixture
def llama(passing_on):
    return Ring(passing_on("llama"))


def some(drafts, count):
    return list(itertools.islice(drafts, count))


def test_an_exact_map_drafts_what_the_model_chooses(ring, tmp_path):
    write_map(tmp_path)
    drafter = Shortcut(calibration=str(tmp_path), context=ring.context())
    ring.go_around([TEXT[:20]], (0, 0))
    certain = TEXT[:21]
    drafts = some(drafter.draft(0, certain), 8)
    wanted = ring.greedy(certain, 8)
    assert EOS_ID not in wanted
    assert [draft.token_id for draft in drafts] == wanted
    assert [tuple(draft) for draft in drafts] == ring.expected(certain, 20, 8)
    assert ring.lengths() == (20, 20)
    ring.go_around([[certain[20], *wanted]], (0, 20))
    certain += [*wanted, TEXT[0]]
    assert [draft.token_id for draft in some(drafter.draft(0, certain), 3)] == ring.greedy(certain, 3)


@pytest.fixture
def drafter(llama, tmp_path):
    """One whose map is wrong, and uses everything."""
    write_map(tmp_path, *random_map())
    return Shortcut(calibration=str(tmp_path), context=llama.context())


def check(ring, drafter, ids, num_true, *, slot=0, count=3):
    drafts = some(drafter.draft(slot, ids), count)
    assert [tuple(draft) for draft in drafts] == ring.expected(ids, num_true, count, *random_map())


def test_behind_and_ahead_of_passes_under_way(llama, drafter):
    llama.go_around([TEXT[:20]], (0, 0))
    check(llama, drafter, TEXT[:21], 20)
    assert llama.lengths() == (20, 20)
    llama.send([TEXT[20:23]], (0, 20))
    check(llama, drafter, TEXT[:23], 20)  # what is under way and no more
    assert llama.lengths() == (23, 20)
    check(llama, drafter, TEXT[:24], 20)
    llama.send([TEXT[23:25]], (0, 23))
    check(llama, drafter, TEXT[:25], 20)
    assert llama.lengths() == (25, 20)
    llama.come_back()
    check(llama, drafter, TEXT[:25], 23)
    assert llama.lengths() == (25, 23)
    llama.come_back()
    check(llama, drafter, TEXT[:26], 25)
    assert llama.lengths() == (25, 25)


def test_passes_after_drafts_compute_what_they_would_have(llama, drafter, passing_on):
    other = Ring(passing_on("llama"))
    for ring in (llama, other):
        ring.go_around([TEXT[:20]], (0, 0))
        for start in range(20, 30, 2):
            ring.send([TEXT[start : start + 2]], (0, start))
            if ring is llama:
                check(ring, drafter, TEXT[: start + 2], start)
                check(ring, drafter, TEXT[: start + 3], start)
            ring.come_back()
            if ring is llama:
                check(ring, drafter, TEXT[: start + 3], start + 2)
    for stage, untouched in ((llama.first, other.first), (llama.last, other.last)):
        for one, two in zip(stage.slots.layers, untouched.slots.layers, strict=True):
            for part, same in zip(one, two, strict=True):
                assert torch.equal(part[0, :, :30], same[0, :, :30])


def test_refused_drafts(llama, drafter):
    llama.go_around([TEXT[:20]], (0, 0))
    llama.go_around([[TEXT[20], 7, 8, 9]], (0, 20))  # of which 7 was right
    certain = [*TEXT[:21], 7, 50]
    check(llama, drafter, certain, 22)
    assert llama.lengths() == (22, 22)
    llama.send([[50, 51]], (0, 22))
    check(llama, drafter, [*certain, 51], 22)
    llama.come_back()
    check(llama, drafter, [*certain, 51, 52], 24)


def test_void_passes(llama, drafter):
    llama.go_around([TEXT[:20]], (0, 0))
    llama.send([[TEXT[20], 7]], (0, 20))
    llama.send([[8, 9, 10]], (0, 22))
    llama.send([[11, 12]], (0, 25))
    llama.come_back()  # 7 was wrong
    certain = [*TEXT[:21], 50]
    check(llama, drafter, certain, 21)
    assert llama.lengths() == (21, 21)
    llama.send([[50, 51]], (0, 21))
    check(llama, drafter, [*certain, 51], 21)
    llama.come_back(is_void=True)
    llama.come_back(is_void=True)
    check(llama, drafter, [*certain, 51], 21)
    llama.come_back()
    check(llama, drafter, [*certain, 51, 52], 23)
    assert llama.lengths() == (23, 23)


def test_slots_with_other_sequences(llama, drafter):
    other = TEXT[40:70]
    llama.go_around([TEXT[:20], other[:20]], (0, 0), (2, 0))
    llama.send([TEXT[20:22], other[20:22]], (0, 20), (2, 20))
    check(llama, drafter, other[:22], 20, slot=2)
    check(llama, drafter, TEXT[:22], 20)
    llama.come_back()
    check(llama, drafter, TEXT[:23], 22)
    llama.go_around([other[5:16]], (0, 5, 2))  # another sequence, that begins as slot 2 does
    check(llama, drafter, other[:17], 16)
    check(llama, drafter, other[:23], 22, slot=2)
    llama.go_around([TEXT[:9]], (2, 0))
    check(llama, drafter, TEXT[:10], 9, slot=2)
    check(llama, drafter, other[:17], 16)
    assert some(drafter.draft(0, [99, *other[1:17]]), 1) == []


def test_a_copy_sees_true_states_alone(llama, drafter):
    llama.go_around([TEXT[:20]], (0, 0))
    abandoned = drafter.draft(0, TEXT[:21])
    next(abandoned)
    abandoned.close()
    check(llama, drafter, TEXT[:21], 20)
    llama.go_around([TEXT[20:25]], (1, 20, 0))
    check(llama, drafter, TEXT[:26], 25, slot=1)
    with pytest.raises(ValueError, match="holds 20"):
        llama.send([TEXT[21:25]], (1, 21, 0))


def test_a_generator_that_lies_about_does_no_harm(llama, drafter):
    llama.go_around([TEXT[:20]], (0, 0))
    abandoned, later = drafter.draft(0, TEXT[:21]), drafter.draft(0, TEXT[:21])
    next(abandoned)
    next(later)
    assert list(abandoned) == []
    llama.go_around([TEXT[20:24]], (0, 20))
    assert list(later) == []
    assert llama.lengths() == (24, 24)
    check(llama, drafter, TEXT[:25], 24)
    failed, abandoned = Pass(kind=PassKind.DECODE, rows=(Row(0, 22),), num_tokens=2), drafter.draft(0, TEXT[:25])
    next(abandoned)
    llama.worker.drop(1, failed)
    abandoned.close()
    assert llama.lengths() == (24, 22)


@pytest.mark.parametrize("stage_index", [0, 2])
@pytest.mark.parametrize("after", [0, 2])
def test_a_stage_that_raises(llama, drafter, monkeypatch, stage_index, after):
    llama.go_around([TEXT[:20]], (0, 0))
    llama.send([TEXT[20:22]], (0, 20))
    layer = llama.stages[stage_index].decoder.layers[0]
    drafts = drafter.draft(0, TEXT[:23])
    some_drafts = some(drafts, after)
    assert len(some_drafts) == after

    def fail(*_, **__):
        raise RuntimeError("of the test")

    with monkeypatch.context() as patched:
        patched.setattr(layer, "forward", fail)
        with pytest.raises(RuntimeError, match="of the test"):
            next(drafts)
    assert llama.lengths() == (22, 20)
    check(llama, drafter, TEXT[:23], 20)


def test_a_pass_that_failed(llama, drafter):
    llama.go_around([TEXT[:20]], (0, 0))
    llama.send([TEXT[20:24]], (0, 20))
    entry, _ = llama.in_flight.popleft()
    llama.worker.drop(1, entry.work)
    check(llama, drafter, TEXT[:21], 20)
    llama.go_around([TEXT[20:21]], (0, 20))
    check(llama, drafter, TEXT[:22], 21)
    llama.go_around([TEXT[:22]], (2, 0))
    llama.send([TEXT[20:22]], (2, 20, 0))
    llama.worker.drop(1, llama.in_flight.popleft()[0].work)  # before the copy was made
    assert some(drafter.draft(2, TEXT[:23]), 1) == []
    llama.go_around([TEXT[:9]], (2, 0))
    check(llama, drafter, TEXT[:10], 9, slot=2)


def test_a_first_stage_that_lags_behind(llama, drafter):
    llama.go_around([TEXT[:20]], (0, 0))
    llama.worker.drop(None, Pass(kind=PassKind.DECODE, rows=(Row(0, 15),), num_tokens=2))
    check(llama, drafter, TEXT[:21], 20)
    assert llama.lengths() == (15, 20)


def test_states_that_were_given_up(llama, drafter):
    llama.go_around([TEXT[:5]], (0, 0))
    llama.send([TEXT[5:65]], (0, 5))
    assert len(some(drafter.draft(0, TEXT[:66]), 1)) == 1
    llama.send([[1] * 15], (0, 65))
    assert some(drafter.draft(0, TEXT[:66]), 1) == []
    assert llama.lengths() == (80, 5)


def test_where_there_is_nothing_to_stand_on(llama, drafter):
    assert some(drafter.draft(0, TEXT[:5]), 1) == []
    llama.go_around([TEXT[:1]], (0, 0))
    assert some(drafter.draft(0, TEXT[:2]), 1) == []  # from the state of position 0
    llama.go_around([TEXT[1:2]], (0, 1))
    check(llama, drafter, TEXT[:3], 2)
    assert some(drafter.draft(0, TEXT[:2]), 1) == []  # which has come back
    llama.send([TEXT[2 : 2 + MAX_ESTIMATED]], (0, 2))
    check(llama, drafter, TEXT[: 2 + MAX_ESTIMATED], 2)
    assert some(drafter.draft(0, TEXT[: 3 + MAX_ESTIMATED]), 1) == []
    assert llama.lengths() == (2 + MAX_ESTIMATED, 2)


def test_slots_end(llama, drafter):
    ids = (TEXT * 2)[:MAX_LENGTH]
    llama.go_around([ids[: MAX_LENGTH - 3]], (0, 0))
    assert len(list(drafter.draft(0, ids[: MAX_LENGTH - 2]))) == 3
    assert len(list(drafter.draft(0, ids))) == 1
    assert list(drafter.draft(0, [*ids, 1])) == []
    assert llama.lengths() == (MAX_LENGTH - 3,) * 2


def test_states_of_long_prompts_are_not_kept():
    trail = Trail()
    trail.extend(0, TEXT[:70], torch.arange(70.0)[:, None])
    trail.extend(70, TEXT[70:], torch.arange(70.0, 80.0)[:, None])
    assert {position: state.item() for position, state in trail.states.items()} == {p: p for p in range(16, 80)}
    assert len({state.untyped_storage().data_ptr() for state in trail.states.values()}) == 2
    assert max(state.untyped_storage().nbytes() for state in trail.states.values()) == 4 * MAX_ESTIMATED
    trail.extend(75, [1], torch.tensor([[5.0]]))
    assert trail.ids.tolist() == [*TEXT[:75], 1] and trail.states[75] == 5 and max(trail.states) == 75
    trail.extend(77, [1], torch.tensor([[5.0]]))  # behind what nobody has told of
    assert not trail.ids and not trail.states


def test_likely_tokens_alone_are_drafted(llama, tmp_path):
    ids = torch.tensor([3, 70, 200], dtype=torch.int32)
    write_map(tmp_path, *random_map(), ids=ids)
    drafter = Shortcut(calibration=str(tmp_path), context=llama.context())
    llama.go_around([TEXT[:20]], (0, 0))
    drafts = some(drafter.draft(0, TEXT[:21]), 4)
    with_eos = torch.tensor([3, 70, 200, EOS_ID])
    wanted = llama.expected(TEXT[:21], 20, 4, *random_map(), head_ids=with_eos)
    if EOS_ID in [token_id for token_id, _ in wanted]:
        wanted = wanted[: 1 + [token_id for token_id, _ in wanted].index(EOS_ID)]
    assert [tuple(draft) for draft in drafts] == wanted


def test_nothing_follows_an_end(llama, tmp_path):
    write_map(tmp_path, ids=torch.tensor([EOS_ID], dtype=torch.int32))
    drafter = Shortcut(calibration=str(tmp_path), context=llama.context())
    llama.go_around([TEXT[:20]], (0, 0))
    assert list(drafter.draft(0, TEXT[:21])) == [(EOS_ID, 1.0)]
    assert llama.lengths() == (20, 20)


def test_a_head_that_cannot_be_cut_serves_whole(llama, tmp_path, monkeypatch):
    write_map(tmp_path, *random_map(), ids=ALL_IDS[:7].clone())
    monkeypatch.setattr(llama.last, "cut_head", lambda ids: None)
    drafter = Shortcut(calibration=str(tmp_path), context=llama.context())
    llama.go_around([TEXT[:20]], (0, 0))
    check(llama, drafter, TEXT[:21], 20)


@pytest.mark.parametrize("dtype", slow_but([torch.bfloat16], [torch.float32, torch.bfloat16, torch.float16]))
def test_lossy_codecs_and_other_dtypes(passing_on, dtype, tmp_path):
    write_map(tmp_path)
    ring = Ring(passing_on("llama"), dtype, codec="int8")
    drafter = Shortcut(calibration=str(tmp_path), context=ring.context())
    ring.go_around([TEXT[:20]], (0, 0))
    drafts = some(drafter.draft(0, TEXT[:21]), 3)
    assert len(drafts) == 3 and all(0 < draft.confidence <= 1 for draft in drafts)
    assert drafts[0].token_id == Ring(passing_on("llama")).greedy(TEXT[:21], 1)[0]
    assert ring.lengths() == (20, 20)


def test_a_model_that_makes_no_numbers_is_not_drafted_for(passing_on, tmp_path):
    ring = Ring(passing_on("llama"), torch.float16)
    write_map(tmp_path, 1e6 * EXACT)
    with pytest.raises(ValueError, match="does not fit into torch.float16; take bf16"):
        Shortcut(calibration=str(tmp_path), context=ring.context())
    write_map(tmp_path, 6e4 * EXACT)
    drafter = Shortcut(calibration=str(tmp_path), context=ring.context())
    ring.go_around([TEXT[:20]], (0, 0))
    assert list(drafter.draft(0, TEXT[:21])) == []
    assert ring.lengths() == (20, 20)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (default_plan(6, 1), "one node has all layers"),
        (default_plan(6, 2, wrap=False), "last layers are on node 1"),
        (default_plan(6, 3), "skipped_layers '1-4', this run '1-5'"),
    ],
)
def test_plans_without_this_shortcut(llama, tmp_path, plan, message):
    write_map(tmp_path)
    with pytest.raises(ValueError, match=message):
        Shortcut(calibration=str(tmp_path), context=llama.context(plan))


def test_nodes_between_do_not_matter(llama, tmp_path):
    write_map(tmp_path, plan=explicit_plan(6, [[(0, 1), (4, 6)], [(1, 2)], [(2, 4)]]))
    Shortcut(calibration=str(tmp_path), context=llama.context())


def test_maps_of_other_models(llama, tmp_path):
    write_map(tmp_path)
    with pytest.raises(ValueError, match="has checkpoint 'of the test', this run 'another'"):
        Shortcut(calibration=str(tmp_path), context=llama.context(checkpoint_digest="another"))
    for sizes in ({"hidden_size": 32, "vocab_size": VOCAB_SIZE}, {"hidden_size": 64, "vocab_size": 200}):
        with pytest.raises(ValueError, match="no whole file"):
            read_shortcut(str(tmp_path), PLAN, checkpoint=CHECKPOINT, **sizes)


def test_damaged_files(tmp_path):
    def read():
        return read_shortcut(str(tmp_path), PLAN, checkpoint=CHECKPOINT, hidden_size=HIDDEN_SIZE, vocab_size=VOCAB_SIZE)

    with pytest.raises(ValueError, match=r"there is no file .*shortcut.safetensors; make it with"):
        read()
    path = write_map(tmp_path)
    content = read()
    assert torch.equal(content.weights, EXACT) and content.likely_ids.tolist() == list(range(VOCAB_SIZE))
    whole = path.read_bytes()
    for damaged in (whole[:-5], whole + b"12345", whole[:40], b"", b"\xff" * 100):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="no whole file"):
            read()
    path.write_bytes(whole.replace(b"thinwire shortcut 1", b"thinwire shortcut 0"))
    with pytest.raises(ValueError, match="has format 'thinwire shortcut 0'"):
        read()


@pytest.mark.parametrize(
    "changed",
    [
        {"weights": EXACT[1:].clone()},
        {"weights": EXACT.double()},
        {"weights": EXACT * torch.nan},
        {"bias": torch.full((HIDDEN_SIZE,), torch.inf)},
        {"bias": torch.zeros(1, HIDDEN_SIZE)},
        {"likely_ids": torch.tensor([5, 5], dtype=torch.int32)},
        {"likely_ids": torch.tensor([5, VOCAB_SIZE], dtype=torch.int32)},
        {"likely_ids": torch.tensor([-1, 5], dtype=torch.int32)},
        {"likely_ids": torch.zeros(0, dtype=torch.int32)},
        {"likely_ids": torch.zeros((), dtype=torch.int32)},
        {"likely_ids": torch.arange(4)},
        {"more": torch.zeros(1)},
    ],
)
def test_files_with_other_content(tmp_path, changed):
    path = write_map(tmp_path)
    facts = {"format": "thinwire shortcut 1", "checkpoint": CHECKPOINT, "skipped_layers": "1-4"}
    save_file(load_file(path) | changed, path, facts)
    with pytest.raises(ValueError, match=r"no whole file of format 'thinwire shortcut 1'"):
        read_shortcut(str(tmp_path), PLAN, checkpoint=CHECKPOINT, hidden_size=HIDDEN_SIZE, vocab_size=VOCAB_SIZE)


def test_the_folder_may_be_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_map(tmp_path)
    assert read_shortcut("~", PLAN, checkpoint=CHECKPOINT, hidden_size=HIDDEN_SIZE, vocab_size=VOCAB_SIZE)
    assert (Path(tmp_path) / FILE).stat().st_mode & 0o044  # others may read it


def test_least_squares_find_a_map():
    generator = torch.Generator().manual_seed(0)
    weights, bias = torch.randn(24, 8, generator=generator) / 5, torch.randn(8, generator=generator)
    sums = LeastSquares(8, CPU)
    for _ in range(40):
        x, e = torch.randn(2, 2, 30, 8, generator=generator, dtype=torch.float64)
        y = torch.zeros(2, 30, 8, dtype=torch.float64)
        y[:, 0] = 1e6  # as no other, and the state behind it is none of the map's
        y[:, 1] = 7
        for t in range(2, 30):
            y[:, t] = torch.cat([x[:, t], e[:, t], y[:, t - 1]], -1) @ weights.double() + bias
        e[0, 11, 3] = torch.nan
        sums.add(x, e, y)
    assert sums.num_tokens == 40 * (2 * 28 - 1)
    found_weights, found_bias = sums.solve()
    assert (found_weights - weights).abs().max() < 1e-2 and (found_bias - bias).abs().max() < 1e-2
    with pytest.raises(ValueError, match="no window of more than 2 tokens"):
        LeastSquares(8, CPU).solve()
    with pytest.raises(ValueError, match=r"twice 13\.4 GiB"):
        LeastSquares(14142, CPU)


def test_likely_ids(monkeypatch):
    monkeypatch.setattr(shortcut_calibration, "NUM_LIKELY", 3)
    counts = torch.tensor([0, 5, 1, 9, 1, 1, 0])
    assert likely_ids(counts, (6, 3)).tolist() == [1, 2, 3, 6]
    assert likely_ids(counts, ()).dtype == torch.int32
