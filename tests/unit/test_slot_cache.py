"""Passes over slots give what the whole text in one forward gives, however it is cut and whatever shares a pass.

In float64, where a difference is a mistake: rounding is 1e-15 there. Norms round to float32 whatever the dtype, and a
value whose rounding flips would show as 1e-8, once in about 1e8 values.
"""

import functools
from types import SimpleNamespace

import pytest
import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from pipeline.models.attention import SLOTS, AttentionError, attention_function
from pipeline.models.cache import SlotCache, SlotError, cache_bytes_per_token
from pipeline.models.families import FAMILIES
from pipeline.models.loading import WeightFormat, load_stage
from pipeline.models.model_config import load_model_config
from pipeline.models.stage import Stage
from pipeline.partition.passes import Row
from pipeline.partition.plan import default_plan
from tests.helpers.marks import slow_but
from tests.helpers.tiny_models import VOCAB_SIZE, save_tiny_model, skip_dropped_caps, tiny_model

CPU = torch.device("cpu")
NUM_TOKENS, MAX_LENGTH, NUM_SLOTS = 29, 32, 4
IDS = torch.randint(0, VOCAB_SIZE, (3, NUM_TOKENS), generator=torch.Generator().manual_seed(0))

# Windows shorter and longer than the text; Qwen's first layer sees everything.
_SLIDING = {
    **dict.fromkeys(("gemma2", "gemma3_text", "mistral", "mixtral", "phi3", "starcoder2"), {}),
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3_moe": {"use_sliding_window": True},
}
MODELS = [(name, window) for name in FAMILIES for window in ((6, 48) if name in _SLIDING else (None,))]
# In `make check`, those whose layers differ most.
UNLIKE_FAMILIES = [("llama", None), ("gpt_neox", None), ("gemma3_text", 6)]


def model_dir(model_type, window):
    skip_dropped_caps(model_type)
    fields = {} if window is None else _SLIDING[model_type] | {"sliding_window": window}
    return tiny_model(model_type, num_layers=4, **fields)


@functools.cache
def load_stages(folder, dtype=torch.float64):
    """Two stages, each with layers of both kinds."""
    config = load_model_config(folder, {})
    return [
        Stage(plan, load_stage(folder, config, plan, WeightFormat(dtype=dtype), device=CPU), CPU, config.vocab_size)
        for plan in default_plan(config.num_hidden_layers, 2, wrap=False).stages
    ]


def open_slots(stages):
    """Slots without a sequence, whose memory is not a number anywhere."""
    for stage in stages:
        stage.open_slots(NUM_SLOTS, MAX_LENGTH)
        fill_with_nan(stage.slots)


def fill_with_nan(cache):
    for keys, values in cache.layers:
        keys.fill_(torch.nan)
        values.fill_(torch.nan)


def run(stages, ids, rows=None):
    """Hidden states [B, T, H] of the last stage."""
    x = ids
    for stage in stages:
        x = stage.forward(x, rows=rows)
    return x


def run_in_chunks(stages, ids, size, *, slot=0, start=0):
    """Hidden states [1, T, H] of ids [1, T], whose first is at position `start`, by passes of up to `size` tokens."""
    parts = []
    for chunk in ids.split(size, dim=1):
        parts.append(run(stages, chunk, [Row(slot, start)]))
        start += chunk.shape[1]
    return torch.cat(parts, dim=1)


def assert_same(stages, states, expected, tolerance=1e-12):
    """Hidden states, and the logits of them, differ by less than `tolerance` of the largest value."""
    for got, wanted in ((states, expected), (stages[-1].logits(states), stages[-1].logits(expected))):
        assert got.dtype == wanted.dtype and got.shape == wanted.shape
        assert (got - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.fixture(params=slow_but(UNLIKE_FAMILIES, MODELS), ids=lambda model: f"{model[0]}-{model[1]}")
def stages(request):
    stages = load_stages(model_dir(*request.param))
    with torch.inference_mode():
        open_slots(stages)
        yield stages
    for stage in stages:
        stage.close_slots()


@pytest.fixture
def expected(request):
    return whole_texts(model_dir(*request.node.callspec.params["stages"]))


@functools.cache
def whole_texts(folder):
    """Hidden states [3, T, H] of the texts, each in one pass of its own."""
    stages = load_stages(folder)
    with torch.inference_mode():
        open_slots(stages)
        states = torch.cat([run(stages, ids[None], [Row(0, 0)]) for ids in IDS])
        open_slots(stages)
    return states


def test_a_prefill_is_the_forward_without_cache(stages, expected):
    # Gemma 2 without a cache takes its softmax in float32, over a longer sum.
    tolerance = 1e-6 if stages[0].decoder.config.model_type == "gemma2" else 1e-12
    assert_same(stages, expected, run(stages, IDS), tolerance)


@pytest.mark.parametrize("size", [1, 3, 7])
def test_chunks(stages, expected, size):
    assert_same(stages, run_in_chunks(stages, IDS[:1], size, slot=2), expected[:1])
    assert [stage.slots.length(2) for stage in stages] == [NUM_TOKENS] * 2


@pytest.mark.parametrize("size", [1, 4])
def test_rows_of_unlike_length_share_passes(stages, expected, size):
    starts, slots, num_passes = (17, 0, 9), (3, 1, 0), 12 // size
    for ids, slot, start in zip(IDS, slots, starts, strict=True):
        if start:
            run(stages, ids[None, :start], [Row(slot, start=0)])
    for index in range(num_passes):
        now = [start + size * index for start in starts]
        ids = torch.stack([text[start : start + size] for text, start in zip(IDS, now, strict=True)])
        states = run(stages, ids, [Row(slot, start) for slot, start in zip(slots, now, strict=True)])
        wanted = torch.stack([text[start : start + size] for text, start in zip(expected, now, strict=True)])
        assert_same(stages, states, wanted)


def test_tokens_that_are_rolled_back_leave_nothing(stages, expected):
    run(stages, IDS[:1, :20], [Row(1, 0)])
    run(stages, IDS[1:2, :8], [Row(1, 20)])
    run(stages, IDS[1:2, :5], [Row(1, 11)])
    assert_same(stages, run_in_chunks(stages, IDS[:1, 11:], 5, slot=1, start=11), expected[:1, 11:])
    run(stages, IDS[1:2, :3], [Row(1, 0)])
    assert_same(stages, run_in_chunks(stages, IDS[:1], 20, slot=1), expected[:1])


def test_sequences_from_a_shared_prefix(stages, expected):
    run(stages, IDS[:1, :19], [Row(2, 0)])
    run(stages, IDS[1:2], [Row(0, 0)])
    rows = [Row(0, 12, from_slot=2), Row(3, 10, from_slot=2), Row(2, 12)]
    ids = torch.stack([IDS[0, 12:19], IDS[0, 10:17], IDS[0, 12:19]])
    states = run(stages, ids, rows)
    assert_same(stages, states, torch.stack([expected[0, 12:19], expected[0, 10:17], expected[0, 12:19]]))
    assert [stages[0].slots.length(slot) for slot in range(4)] == [19, 0, 19, 17]
    ids = torch.stack([IDS[0, 19:26], IDS[0, 17:24]])
    states = run(stages, ids, [Row(0, 19), Row(3, 17)])
    assert_same(stages, states, torch.stack([expected[0, 19:26], expected[0, 17:24]]))


@pytest.mark.parametrize("model", slow_but(UNLIKE_FAMILIES, MODELS), ids=str)
def test_float32_against_the_unsplit_model(model):
    folder = model_dir(*model)
    stages = load_stages(folder, torch.float32)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = whole(input_ids=IDS).logits
        open_slots(stages)
        run(stages, IDS[:, :11], [Row(slot, 0) for slot in (0, 1, 3)])
        rest = run(stages, IDS[:, 11:], [Row(slot, 11) for slot in (0, 1, 3)])
        torch.testing.assert_close(stages[-1].logits(rest), expected[:, 11:], rtol=1e-4, atol=1e-4)
        one_by_one = run_in_chunks(stages, IDS[2:, 11:], 1, slot=3, start=11)
        torch.testing.assert_close(stages[-1].logits(one_by_one), expected[2:, 11:], rtol=1e-4, atol=1e-4)


def test_a_pass_without_rows_is_the_same_beside_open_slots():
    stages = load_stages(tiny_model(num_layers=4), torch.float32)
    with torch.inference_mode():
        before = run(stages, IDS)
        open_slots(stages)
        run(stages, IDS[:1, :9], [Row(0, 0)])
        assert torch.equal(run(stages, IDS), before)
        assert [stage.slots.length(0) for stage in stages] == [9, 9]
        with pytest.raises(AttentionError, match="over slots cannot be read"):
            stages[0].forward(IDS, lambda *_: None, rows=[Row(slot, 0) for slot in range(3)])
        for stage in stages:
            stage.close_slots()
        assert torch.equal(run(stages, IDS), before)


def test_losses_of_a_float64_model():
    stages = load_stages(tiny_model(num_layers=4))
    rows, columns = torch.zeros(NUM_TOKENS - 1, dtype=torch.int64), torch.arange(NUM_TOKENS - 1)
    with torch.inference_mode():
        states = run(stages, IDS[:1])
        scores = stages[-1].score(states, rows, columns, IDS[0, 1:])
        logits = stages[-1].logits(states[0, :-1])
    losses = torch.nn.functional.cross_entropy(logits, IDS[0, 1:], reduction="none")
    assert losses.dtype == torch.float64 and not torch.equal(losses.float().double(), losses)
    assert torch.equal(scores.loss, losses.float())
    assert torch.equal(scores.top1, logits.argmax(-1).int())


# A cache on its own


def make_config(num_layers=3):
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
    return AutoConfig.for_model("llama", num_hidden_layers=num_layers, **sizes)


CONFIG = make_config()


def make_cache(config=CONFIG, dtype=torch.float32, lengths=()):
    cache = SlotCache(config, num_slots=NUM_SLOTS, max_length=MAX_LENGTH, dtype=dtype, device=CPU)
    for slot, length in enumerate(lengths):
        if length:
            fill(cache.begin([Row(slot, 0)], length))
    return cache


def fill(slots, num_heads=2, head_dim=8):
    shape = (len(slots.starts), num_heads, slots.num_tokens, head_dim)
    for layer in range(3):
        slots.write(layer, torch.randn(shape), torch.randn(shape))
    slots.commit()


@pytest.mark.parametrize(
    ("rows", "num_tokens", "words"),
    [
        ([Row(0, 11)], 1, "slot 0 is to go on at position 11, slot 0 holds 10"),
        ([Row(1, 1)], 1, "slot 1 is to go on at position 1, slot 1 holds 0"),
        ([Row(0, -1)], 1, "slot 0 is to go on at position -1"),
        ([Row(2, 11, from_slot=0)], 1, "slot 2 is to go on at position 11, slot 0 holds 10"),
        ([Row(0, 10)], 23, "slot 0 is to take positions 10 to 32, it has room for 32"),
        ([Row(0, 0)], 33, "slot 0 is to take positions 0 to 32"),
        ([Row(0, 4), Row(2, 0), Row(0, 4)], 1, r"slots \[0, 2, 0\] of one pass"),
        ([Row(4, 0)], 1, "slot 4 is not among the 4 slots, 0 to 3"),
        ([Row(-1, 0)], 1, "slot -1 is not among"),
        ([Row(1, 0, from_slot=4)], 1, "slot 4 is not among"),
        ([Row(1, 5, from_slot=0), Row(0, 4)], 1, "slot 1 is to begin with 5 positions of slot 0, which the same pass"),
        ([Row(0, 4), Row(1, 5, from_slot=0)], 1, "slot 1 is to begin with 5 positions of slot 0, which the same pass"),
        ([Row(0, 4, from_slot=3), Row(1, 4, from_slot=0)], 1, "slot 1 is to begin with 4 positions of slot 0"),
        ([], 1, "a pass of 0 rows of 1 tokens"),
        ([Row(0, 0)], 0, "a pass of 1 rows of 0 tokens"),
    ],
)
def test_passes_that_the_cache_cannot_take_change_nothing(rows, num_tokens, words):
    cache = make_cache(lengths=(10, 0, 0, 6))
    before = [part.clone() for layer in cache.layers for part in layer]
    with pytest.raises(SlotError, match=words):
        cache.begin(rows, num_tokens)
    assert [cache.length(slot) for slot in range(4)] == [10, 0, 0, 6]
    after = [part for layer in cache.layers for part in layer]
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(after, before, strict=True))


def test_lengths():
    cache = make_cache(lengths=(10, 0, 0, 6))
    slots = cache.begin([Row(0, 7), Row(1, 6, from_slot=3)], 2)
    assert [cache.length(slot) for slot in range(4)] == [7, 6, 0, 6]  # until the pass is committed
    fill(slots)
    assert [cache.length(slot) for slot in range(4)] == [9, 8, 0, 6]
    cache.crop(0, 4)
    assert cache.length(0) == 4
    for length in (5, -1):
        with pytest.raises(SlotError, match=f"slot 0 holds 4 positions and cannot be cropped to {length}"):
            cache.crop(0, length)
    with pytest.raises(SlotError, match="slot 9 is not among"):
        cache.length(9)
    fill(cache.begin([Row(0, 4)], MAX_LENGTH - 4))
    assert cache.length(0) == MAX_LENGTH


def test_a_layer_that_writes_nothing_or_something_else_is_an_error():
    cache = make_cache()
    keys = torch.zeros(1, 2, 3, 8)
    slots = cache.begin([Row(0, 0)], 3)
    slots.write(0, keys, keys)
    with pytest.raises(SlotError, match="1 of the stage's 3 layers have written"):
        slots.commit()
    with pytest.raises(SlotError, match="layer 2 of the stage writes its keys where layer 1 is due"):
        slots.write(2, keys, keys)
    for bad in (keys[:, :1], keys[:, :, :2], keys[..., :4], keys.double()):
        with pytest.raises(SlotError, match="layer 1 of the stage makes keys"):
            slots.write(1, bad, keys)
        with pytest.raises(SlotError, match="layer 1 of the stage makes values"):
            slots.write(1, keys, bad)
    assert cache.length(0) == 0


@pytest.mark.parametrize("model", slow_but(UNLIKE_FAMILIES, MODELS), ids=str)
def test_memory_is_what_the_formula_says(model):
    folder = model_dir(*model)
    config = load_model_config(folder, {})
    for stage in load_stages(folder, torch.float64):
        stage.open_slots(3, 17)
        per_token = cache_bytes_per_token(config, stage.plan.num_layers, torch.float64)
        assert stage.slots.nbytes == 3 * 17 * per_token
        storages = [part.untyped_storage() for layer in stage.slots.layers for part in layer]
        assert sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()) == stage.slots.nbytes
        stage.close_slots()
        assert stage.slots is None


def test_a_cache_without_room():
    for sizes in ({"num_slots": 0, "max_length": 4}, {"num_slots": 4, "max_length": 0}):
        with pytest.raises(SlotError, match="is 0; a cache needs at least 1"):
            SlotCache(CONFIG, **sizes, dtype=torch.float32, device=CPU)


# A stage over slots


def test_a_forward_that_raises_leaves_the_slot_cropped():
    (stage, _) = load_stages(tiny_model(num_layers=4))
    open_slots([stage])

    def fail(*_):
        raise RuntimeError("out of memory, say")

    with torch.inference_mode():
        stage.forward(IDS[:1, :9], rows=[Row(0, 0)])
        hook = stage.decoder.layers[1].register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            stage.forward(IDS[:1, 5:9], rows=[Row(0, 5)])
        hook.remove()
        assert stage.slots.length(0) == 5
        assert stage.decoder.config._attn_implementation == "sdpa"
        with pytest.raises(SlotError, match="at position 6, slot 0 holds 5"):
            stage.forward(IDS[:1, 6:9], rows=[Row(0, 6)])
    stage.close_slots()


def test_rows_need_slots_and_inputs_of_as_many_rows():
    (stage, _) = load_stages(tiny_model(num_layers=4))
    with pytest.raises(SlotError, match="no slots open"):
        stage.forward(IDS[:1], rows=[Row(0, 0)])
    stage.open_slots(2, MAX_LENGTH)
    with pytest.raises(SlotError, match="2 rows has inputs for 1"):
        stage.forward(IDS[:1], rows=[Row(0, 0), Row(1, 0)])
    stage.close_slots()


def test_attention_that_is_not_understood_is_refused():
    (stage, _) = load_stages(tiny_model(num_layers=4))
    open_slots([stage])
    attention = stage.decoder.layers[0].self_attn
    given = {"position_bias": torch.zeros(1), "s_aux": torch.zeros(4), "is_causal": False}
    for name, value in given.items():
        slots = stage.slots.begin([Row(0, 0)], 2)
        arguments = {"position_ids": slots.position_ids, "slots": slots, "use_cache": False}
        handle = attention.register_forward_pre_hook(
            lambda module, args, kwargs, name=name, value=value: (args, kwargs | {name: value}), with_kwargs=True
        )
        with torch.inference_mode(), attention_function(stage.decoder, SLOTS):
            with pytest.raises(AttentionError, match=f"LlamaAttention asks for {name}, unknown to"):
                stage.decoder(input_ids=IDS[:1, :2], **arguments)
        handle.remove()
    with torch.inference_mode(), attention_function(stage.decoder, SLOTS):
        with pytest.raises(AttentionError, match="asks for attention_mask, unknown to"):
            stage.decoder(input_ids=IDS[:1, :2], attention_mask=torch.zeros(1, 1, 2, 2), **arguments)
    stage.close_slots()


@pytest.mark.parametrize(
    ("rope", "max_length", "words"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, 65, "beyond 64 positions .rope_type 'dynamic'.*slots of at most 64"),
        ({"rope_type": "dynamic", "factor": 2.0}, 64, None),
        ({"rope_type": "linear", "factor": 2.0}, 65, None),
        ({"rope_type": "longrope"}, 33, "beyond 32 positions .rope_type 'longrope'.*slots of at most 32"),
        ({"rope_type": "longrope"}, 32, None),
    ],
)
def test_rotary_angles_that_depend_on_the_length_are_refused(rope, max_length, words, tmp_path):
    """All keys change when a sequence outgrows them; and one long row would turn the others'."""
    if rope["rope_type"] == "longrope":
        factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 32}
        rope = rope | factors
    fields = {"max_position_embeddings": 64, "rope_parameters": {"rope_theta": 10000.0, **rope}}
    folder = save_tiny_model(tmp_path, "llama", num_layers=2, **fields)
    config = load_model_config(folder, {})
    plan = default_plan(2, 1).stages[0]
    part = load_stage(folder, config, plan, WeightFormat(dtype=torch.float64), device=CPU)
    stage = Stage(plan, part, CPU, VOCAB_SIZE)
    stage.open_slots(1, 8)
    if words is None:
        stage.open_slots(1, max_length)
        ids = torch.cat([IDS[:1], IDS[1:2], IDS[2:]], dim=1)[:, :max_length]
        with torch.inference_mode():
            assert_same([stage], run_in_chunks([stage], ids, 10), run([stage], ids))
        return
    with pytest.raises(AttentionError, match=f"LlamaModel.*{words}"):
        stage.open_slots(1, max_length)
    assert stage.slots.max_length == 8


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("num_tokens", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_shares_a_pass_changes_no_bit_of_attention(dtype, num_tokens, softcap):
    generator = torch.Generator().manual_seed(0)
    module = SimpleNamespace(layer_idx=0, is_causal=True)
    one_layer = make_config(num_layers=1)
    starts = (9, 0, 20, 9)
    history = [torch.randn(2, 1, 2, max(start, 1), 8, generator=generator).to(dtype) for start in starts]
    query, key, value = (
        torch.randn(4, num_heads, num_tokens, 8, generator=generator).to(dtype) for num_heads in (4, 2, 2)
    )

    def attend(chosen):
        cache = make_cache(one_layer, dtype)
        fill_with_nan(cache)
        for row in chosen:
            if starts[row]:
                slots = cache.begin([Row(row, 0)], starts[row])
                slots.write(0, *history[row])
                slots.commit()
        slots = cache.begin([Row(row, starts[row]) for row in chosen], num_tokens)
        inputs = (part[chosen] for part in (query, key, value))
        return AttentionInterface()[SLOTS](module, *inputs, None, slots=slots, softcap=softcap, sliding_window=12)[0]

    together = attend([0, 1, 2, 3])
    assert together.isfinite().all()
    for row in range(4):
        assert torch.equal(attend([row])[0], together[row])
    assert torch.equal(attend([2, 0]), together[[2, 0]])
