import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressors import CorruptPayload
from compressors.bitpack import (
    concat_bytes,
    pack,
    pack_by_torch,
    pack_pairs,
    packed_nbytes,
    split_bytes,
    unpack,
    unpack_by_torch,
    unpack_pairs,
)


@settings(deadline=None, max_examples=60)
@given(nbits=st.integers(1, 7), length=st.integers(0, 70), num_rows=st.integers(0, 3), seed=st.integers(0, 999))
def test_round_trip_and_both_paths_agree(nbits, length, num_rows, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**nbits, (num_rows, length), dtype=torch.uint8, generator=generator)
    packed = pack(codes, nbits)
    assert packed.shape == (num_rows, packed_nbytes(length, nbits))
    assert torch.equal(unpack(packed, nbits, length), codes)
    by_torch, back = torch.zeros_like(packed), torch.zeros_like(codes)
    pack_by_torch(codes, nbits, by_torch)
    unpack_by_torch(packed, nbits, back)
    assert torch.equal(by_torch, packed) and torch.equal(back, codes)


def test_leading_dimensions_and_8_bits():
    codes = torch.arange(2 * 3 * 5, dtype=torch.uint8).view(2, 3, 5)
    assert torch.equal(pack(codes, 8), codes)
    assert torch.equal(unpack(pack(codes % 4, 2), 2, 5), codes % 4)
    assert torch.equal(unpack_pairs(pack_pairs(codes % 16), 5), codes % 16)
    with pytest.raises(ValueError, match="5 codes of 2 bits take 2 bytes, got 3"):
        unpack(torch.zeros(1, 3, dtype=torch.uint8), 2, 5)


@pytest.mark.parametrize("nbits", range(1, 9))
def test_dense_at_widths_divisible_by_8(nbits):
    assert packed_nbytes(5120, nbits) == 5120 * nbits // 8
    for length in range(1, 100):
        assert 0 <= packed_nbytes(length, nbits) - -(-length * nbits // 8) <= 2


@pytest.mark.parametrize("nbits", [0, 9])
def test_nbits_out_of_range(nbits):
    with pytest.raises(ValueError, match="1 to 8"):
        packed_nbytes(8, nbits)


def test_layout_is_a_format():
    codes = torch.tensor([1, 2, 3, 4, 5, 6, 7, 0, 1, 2], dtype=torch.uint8)
    assert bytes(pack(codes, 4)).hex() == "6172031425"  # code j low, code j + 5 high
    # 2-bit plane, 3 bytes: codes j, j + 3, j + 6, j + 9; 1-bit plane, 2 bytes: bit 2 of codes j, j + 2, ...
    assert bytes(pack(codes, 3)).hex() == "b1061b" + "0c06"


def test_typed_sections():
    tensors = [
        torch.tensor([1.5, -2.0]),
        torch.tensor([3], dtype=torch.bfloat16),
        torch.arange(5, dtype=torch.uint8),
    ]
    data = concat_bytes(*tensors)
    assert data.numel() == 15
    sections = [(t.dtype, t.shape) for t in tensors]
    for got, sent in zip(split_bytes(data, *sections), tensors, strict=True):
        assert torch.equal(got, sent)
    for got, sent in zip(split_bytes(torch.cat([data[:1], data])[1:], *sections), tensors, strict=True):
        assert torch.equal(got, sent)
    with pytest.raises(CorruptPayload, match="14 bytes, its shape needs 15"):
        split_bytes(data[:-1], *sections)
