"""The table of token ids: what is unpacked is what was packed, bits go where errors cost, hostile files are refused."""

import dataclasses

import pytest
import torch

from compressors import LinkInfo
from compressors.bitpack import pack, packed_nbytes
from compressors.klt.bit_allocation import allocate
from compressors.klt.calibration_file import Origin, read_calibration, write_calibration, write_token_table
from compressors.klt.token_table import TokenTable, make_token_table, narrow_token_table
from tests.compressors.klt_cases import LINK, calibrate

NUM_IDS, WIDTH = 400, 48


@pytest.fixture(scope="module")
def embedding():
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(WIDTH, WIDTH, generator=generator) * torch.logspace(0, -1, WIDTH)
    return torch.randn(NUM_IDS, WIDTH, generator=generator) @ mix + 3


@pytest.fixture(scope="module")
def counts():
    order = torch.randperm(NUM_IDS, generator=torch.Generator().manual_seed(1))
    return (1000 / torch.arange(1, NUM_IDS + 1)).long()[order]


@pytest.fixture(scope="module")
def wide(embedding, counts):
    return make_token_table(lambda: embedding.split(100), counts)


def test_features_of_every_width():
    generator = torch.Generator().manual_seed(0)
    sizes = [[3, 5, 1, 9, 2, 7, 11, 13], [0, 0, 2, 0, 0, 17, 4, 1]]
    steps, num_rows = torch.rand(2, 51, generator=generator), (6, 20)
    expected, tables = torch.zeros(26, 51), []
    for tier, first_row in enumerate((0, 6)):
        parts, first = [], 0
        for nbits, size in zip(range(8, 0, -1), sizes[tier], strict=True):
            codes = torch.randint(0, 2**nbits, (num_rows[tier], size), generator=generator, dtype=torch.uint8)
            own = steps[tier, first : first + size]
            values = (codes + 0.5 - 2 ** (nbits - 1)) * own
            expected[first_row : first_row + num_rows[tier], first : first + size] = values
            parts += [pack(codes, nbits)] if size else []
            first += size
        tables.append(torch.cat(parts, 1))
    rows = torch.randperm(26, generator=generator)
    table = TokenTable(
        frequent=tables[0], rare=tables[1], rows=rows.int(), group_sizes=torch.tensor(sizes), steps=steps
    )
    assert table.fault() is None
    ids = torch.tensor([25, 0, 3, 3, 17])
    assert torch.equal(table.features(ids), expected[rows[ids]])
    assert table.features(ids[:0]).shape == (0, 51)


@pytest.mark.parametrize("ids", [[-1], [0, NUM_IDS], [2**40]])
def test_ids_that_the_table_does_not_have(wide, ids):
    with pytest.raises(ValueError, match=f"has {NUM_IDS} token ids, got"):
        wide.features(torch.tensor(ids))


def test_the_wide_table_keeps_the_embedding(embedding, wide):
    """Principal components are a rotation: distances stay."""
    features = wide.features(torch.arange(NUM_IDS))
    assert torch.allclose(torch.cdist(features, features), torch.cdist(embedding, embedding), rtol=0.05, atol=0.3)


def test_chunks_of_any_size_make_the_same_table(embedding, counts, wide):
    other = make_token_table(lambda: [embedding[:7], embedding[7:]], counts)
    everything = torch.arange(NUM_IDS)
    difference = other.features(everything).abs() - wide.features(everything).abs()
    assert difference.abs().max() < 0.02 * wide.features(everything).abs().max()


def test_an_embedding_of_other_ids(embedding, counts):
    with pytest.raises(ValueError, match="an embedding of 399 rows for 400 token ids"):
        make_token_table(lambda: [embedding[1:]], counts)


def test_the_narrow_table_is_small_and_says_what_it_lost(counts, wide):
    narrow = narrow_token_table(wide, counts, torch.eye(WIDTH, dtype=torch.float64))
    nbytes = narrow.table.frequent.numel() + narrow.table.rare.numel()
    assert nbytes <= NUM_IDS * (WIDTH * 2 / 8 + 8)
    assert narrow.table.frequent.shape[1] > narrow.table.rare.shape[1]
    everything = torch.arange(NUM_IDS)
    missed = wide.features(everything) - (narrow.table.features(everything).double() @ narrow.back + narrow.mean)
    weights = counts.double() + 0.1
    measured = weights @ missed.square().sum(1) / weights.sum()
    assert measured == pytest.approx(float(narrow.errors.trace()), rel=0.02)
    variance = weights @ (wide.features(everything) - narrow.mean).square().sum(1) / weights.sum()
    assert measured < 0.1 * variance


def test_bits_go_where_errors_cost(counts, wide):
    """One direction that all the links use, against all directions alike."""
    direction = torch.randn(WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    costly = torch.outer(direction, direction)
    losses = [
        direction @ narrow_token_table(wide, counts, importance).errors @ direction
        for importance in (torch.eye(WIDTH, dtype=torch.float64), costly)
    ]
    assert losses[1] < 0.2 * losses[0]


def test_dearer_bits_are_fewer():
    sizes, costs = torch.ones(2), torch.tensor([1, 10])
    assert allocate(sizes, 4).tolist() == [2, 2]
    cheap, dear = allocate(sizes, 22, costs).tolist()
    assert cheap > dear > 0 and cheap + 10 * dear <= 22


def damage(table, what):
    """`table` with something that the kernel would follow out of bounds."""
    sizes, rows = table.group_sizes.clone(), table.rows.clone()
    if what == "a row too far":
        rows[3] = table.num_ids
    elif what == "a negative row":
        rows[3] = -1
    elif what == "a missing row":
        return dataclasses.replace(table, rare=table.rare[:-1])
    elif what == "shorter rows":
        return dataclasses.replace(table, frequent=table.frequent[:, :-1])
    elif what == "wider codes":
        sizes[1] = sizes[1].roll(-1)
    elif what == "more features":
        sizes[0, 7] += 8
        wider = packed_nbytes(int(sizes[0, 7]), 1) - packed_nbytes(int(sizes[0, 7]) - 8, 1)
        return dataclasses.replace(
            table, group_sizes=sizes, frequent=torch.nn.functional.pad(table.frequent, (0, wider))
        )
    elif what == "a negative group":
        sizes[0, 0], sizes[0, 1] = -(2**62), 2**62
    return dataclasses.replace(table, group_sizes=sizes, rows=rows)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("a row too far", "rows 0 to 64 of 64"),
        ("a negative row", "rows -1 to"),
        ("a missing row", "rows of 64 ids"),
        ("shorter rows", "rows of .* bytes for"),
        ("wider codes", "rows of .* bytes for|groups"),
        ("more features", "groups .* of .* features"),
        ("a negative group", "groups .* of .* features"),
    ],
)
def test_a_table_that_leads_out_of_bounds_is_refused(what, message, tmp_path):
    calibration, tokens = calibrate(64, True)
    origin = Origin(checkpoint="some model", text_sha256="0")
    write_calibration(tmp_path, calibration, origin, link_name=LINK, num_tokens=1)
    link = LinkInfo(name=LINK, hidden_size=64, max_tokens=64)
    write_token_table(tmp_path, tokens, origin)
    read_calibration("klt", str(tmp_path), link)
    write_token_table(tmp_path, damage(tokens, what), origin)
    with pytest.raises(ValueError, match=f"a whole file of format .*{message}"):
        read_calibration("klt", str(tmp_path), link)
