"""Products with matrices kept as GGUF's blocks, and their rows, against the gguf package and float64."""

import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from pipeline.models.blocks.layouts import LAYOUTS
from pipeline.models.blocks.products import TILE_FROM_ROWS, BlockMatrix
from tests.helpers.blocks import draw_blocks, weights_of

ROOT = Path(__file__).resolve().parents[2]
# Of a product, over the sum of its terms' magnitudes. Measured: 6e-8 with few rows, 2.5e-7 with torch.mm's.
TOLERANCE = 1e-6
ROWS = (1, 2, 3, 5, 8, 9, 16, 31, 32, 33)
every_type = pytest.mark.parametrize("name", LAYOUTS)


def make(name, num_outputs=37, num_blocks=3, halves="ordinary", seed=0):
    """A matrix and its weights as float32."""
    blocks = draw_blocks(name, num_outputs, num_blocks, halves, seed)
    return BlockMatrix(blocks, name), weights_of(blocks, name)


def draw_rows(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_product(product, x, weights):
    exact, magnitude = x.double() @ weights.double().T, x.double().abs() @ weights.double().abs().T
    assert product.dtype == torch.float32 and product.shape == exact.shape
    assert bool(((product.double() - exact).abs() <= TOLERANCE * magnitude).all())


def same_bits(left, right):
    return torch.equal(left.view(torch.int32), right.view(torch.int32))


@pytest.fixture
def threads():
    """torch.set_num_threads, undone at the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


class TestRows:
    @every_type
    @pytest.mark.parametrize("halves", ["ordinary", "subnormal", "zero"])
    @pytest.mark.parametrize("shape", [(1, 1), (7, 1), (1, 5), (37, 3)], ids=str)
    def test_are_the_gguf_packages_bit_for_bit(self, name, halves, shape):
        matrix, weights = make(name, *shape, halves=halves)
        assert matrix.shape == tuple(weights.shape) and matrix.nbytes < weights.nbytes
        assert same_bits(matrix.rows(torch.arange(shape[0])), weights)

    @every_type
    def test_of_any_indices(self, name):
        matrix, weights = make(name)
        indices = torch.tensor([[36, 0, 5], [5, 5, 1]])
        assert same_bits(matrix.rows(indices), weights[indices])
        assert matrix.rows(torch.empty(2, 0, dtype=torch.int64)).shape == (2, 0, matrix.shape[1])
        with pytest.raises(IndexError):
            matrix.rows(torch.tensor([37]))

    @every_type
    def test_keep_subnormal_scales_where_float32_flushes_its_own(self, name):
        torch.set_flush_denormal(True)
        try:
            matrix, weights = make(name, halves="ordinary" if name == "BF16" else "subnormal")
            rows = matrix.rows(torch.arange(37))
        finally:
            torch.set_flush_denormal(False)
        assert same_bits(rows, weights)

    def test_blocks_may_be_anywhere(self):
        """A file's tensors begin at any byte, and are parts of larger memory."""
        blocks = draw_blocks("Q6_K", 5, 2)
        memory = torch.zeros(blocks.numel() + 64, dtype=torch.uint8)
        for first in (1, 3, 7):
            part = memory[first : first + blocks.numel()].view(blocks.shape)
            part.copy_(blocks)
            assert same_bits(BlockMatrix(part, "Q6_K").rows(torch.arange(5)), weights_of(blocks, "Q6_K"))


class TestProducts:
    @every_type
    @pytest.mark.parametrize("num_rows", ROWS)
    def test_are_close_to_exact(self, name, num_rows):
        matrix, weights = make(name)
        x = draw_rows(num_rows, matrix.shape[1])
        assert_product(matrix @ x, x, weights)

    @every_type
    @pytest.mark.parametrize("shape", [(1, 1), (1, 7), (300, 1)], ids=str)
    def test_of_odd_sizes(self, name, shape):
        matrix, weights = make(name, *shape)
        for num_rows in (1, 9, TILE_FROM_ROWS):
            x = draw_rows(num_rows, matrix.shape[1])
            assert_product(matrix @ x, x, weights)

    @every_type
    @pytest.mark.parametrize("num_rows", [4, TILE_FROM_ROWS])
    def test_keep_their_digits_where_inputs_have_one_sign(self, name, num_rows):
        """What a type takes off its codes is much of a product then, or leaves little of it."""
        matrix, weights = make(name, num_blocks=4096 // LAYOUTS[name].num_weights)
        x = 1 + draw_rows(num_rows, 4096) / 10
        exact = x.double() @ weights.double().T
        errors = [float((p.double() - exact).abs().max()) for p in (matrix @ x, x @ weights.T)]
        assert errors[0] < max(4 * errors[1], 1e-6 * float(exact.abs().max()))

    @pytest.mark.parametrize("num_rows", [4, TILE_FROM_ROWS])
    def test_with_several_tiles(self, num_rows):
        matrix, weights = make("Q4_1", 1500, 32)  # 6 MB of float32
        x = draw_rows(num_rows, matrix.shape[1])
        assert_product(matrix @ x, x, weights)

    @pytest.mark.parametrize("kept", [(), (4,), (2, 3), (40, 2)], ids=str)
    def test_of_any_dimensions(self, kept):
        matrix, weights = make("Q5_K")
        x = draw_rows(*kept, matrix.shape[1])
        product = matrix @ x
        assert_product(product.reshape(-1, 37), x.reshape(-1, x.shape[-1]), weights)
        assert product.shape == (*kept, 37)

    @pytest.mark.parametrize("kept", [(0,), (2, 0), (0, 3)], ids=str)
    @every_type
    def test_of_no_rows(self, name, kept):
        matrix, _ = make(name)
        x = torch.empty(*kept, matrix.shape[1])
        assert (matrix @ x).shape == (*kept, 37)
        x.requires_grad_()
        (matrix @ x).sum().backward()
        assert x.grad.shape == x.shape

    @pytest.mark.parametrize("num_rows", [3, 40])
    def test_of_rows_that_are_not_contiguous(self, num_rows):
        matrix, _ = make("Q4_K")
        width = matrix.shape[1]
        wide = draw_rows(num_rows, 2 * width)
        for x in (
            wide[:, ::2],
            wide[:, 1 : width + 1],
            draw_rows(width, num_rows).T,
            draw_rows(1, width).expand(num_rows, -1),
            draw_rows(2, num_rows, width).transpose(0, 1),
        ):
            assert same_bits(matrix @ x, matrix @ x.clone(memory_format=torch.contiguous_format))

    @every_type
    def test_of_a_row_are_the_same_whatever_shares_its_pass(self, name):
        matrix, _ = make(name)
        x = draw_rows(TILE_FROM_ROWS - 1, matrix.shape[1])
        alone = torch.cat([matrix @ row[None] for row in x])
        for num_rows in (*range(2, 10), 16, TILE_FROM_ROWS - 1):
            assert same_bits(matrix @ x[:num_rows], alone[:num_rows])
        others = x.clone()
        others[1:] = torch.nan
        assert same_bits((matrix @ others)[0], alone[0])

    @every_type
    def test_are_the_same_with_any_number_of_threads(self, name, threads):
        matrix, weights = make(name, 1001, 512 // LAYOUTS[name].num_weights)
        x = draw_rows(9, 512)
        products = []
        for num_threads in (1, 2, 5):
            threads(num_threads)
            products.append(matrix @ x)
        assert_product(products[0], x, weights)
        assert same_bits(products[0], products[1]) and same_bits(products[0], products[2])

    @pytest.mark.parametrize("num_rows", [1, 9, 40])
    @pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
    @every_type
    def test_of_values_that_are_not_finite(self, name, value, num_rows):
        matrix, _ = make(name)
        x = draw_rows(num_rows, matrix.shape[1])
        x[-1, -1] = value
        product = matrix @ x
        assert not product[-1].isfinite().any() and product[:-1].isfinite().all()

    def test_in_many_python_threads_at_once(self, threads):
        """The first ones compile, of which no other test has asked for all."""
        threads(2)
        matrices = {name: make(name, 500, 1024 // LAYOUTS[name].num_weights) for name in LAYOUTS}
        inputs = [draw_rows(num_rows, 1024) for num_rows in (6, 7, 40)]
        start, faults = threading.Barrier(6), []

        def multiply():
            start.wait()
            for matrix, weights in matrices.values():
                for x in inputs:
                    try:
                        assert_product(matrix @ x, x, weights)
                    except BaseException as fault:
                        faults.append(fault)

        several = [threading.Thread(target=multiply) for _ in range(6)]
        for thread in several:
            thread.start()
        for thread in several:
            thread.join()
        assert not faults

    @pytest.mark.parametrize("num_rows", [3, 40])
    def test_are_float32_on_the_cpu_whatever_torchs_defaults_are(self, num_rows):
        matrix, weights = make("Q4_1")
        x = draw_rows(num_rows, matrix.shape[1])
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device("meta"):
                product, rows = matrix @ x, matrix.rows(torch.arange(37, device="cpu"))
        finally:
            torch.set_default_dtype(before)
        assert_product(product, x, weights)
        assert same_bits(rows, weights)

    def test_refuse_what_they_would_misread(self):
        matrix, _ = make("Q8_0")
        for x in (torch.ones(1, 96, dtype=torch.bfloat16), torch.ones(1, 96).double(), torch.ones(1, 96).to("meta")):
            with pytest.raises(AssertionError):
                matrix @ x
        with pytest.raises(AssertionError):
            matrix @ torch.ones(2, 48)
        for shape in ((0, 34), (4, 0), (4, 35)):
            with pytest.raises(AssertionError):
                BlockMatrix(torch.zeros(shape, dtype=torch.uint8), "Q8_0")


class TestGradients:
    @every_type
    @pytest.mark.parametrize("num_rows", [1, 8, 9, 33])
    def test_are_those_of_the_float32_product(self, name, num_rows):
        matrix, weights = make(name)
        x, by_product = draw_rows(num_rows, matrix.shape[1]).requires_grad_(), draw_rows(num_rows, 37, seed=2)
        product = matrix @ x
        assert_product(product.detach(), x.detach(), weights)
        product.backward(by_product)
        assert_product(x.grad, by_product, weights.T)

    def test_over_several_tiles_of_expanded_rows(self, threads):
        threads(2)
        matrix, weights = make("Q4_1", 1500, 32)
        x = draw_rows(1, 1, matrix.shape[1]).requires_grad_()
        (matrix @ x.expand(2, 5, -1)).sum().backward()
        assert_product(x.grad[0], torch.full((1, 1500), 10.0), weights.T)

    @pytest.mark.parametrize("num_rows", [3, 40])
    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_none_where_none_are_recorded(self, mode, num_rows):
        matrix, weights = make("Q5_0")
        x = draw_rows(num_rows, matrix.shape[1]).requires_grad_()
        with mode():
            product, of_inference = matrix @ x, matrix @ x.detach().clone()
        assert not product.requires_grad and same_bits(product, of_inference)
        assert same_bits(matrix @ of_inference.new_tensor(x.tolist()), product)
        assert_product(product.clone(), x.detach(), weights)
        assert not (matrix @ x.detach()).requires_grad

    def test_have_no_gradients_themselves(self):
        matrix, _ = make("Q8_0")
        x, by_product = draw_rows(2, 96).requires_grad_(), torch.ones(2, 37, requires_grad=True)
        (gradient,) = torch.autograd.grad(matrix @ x, x, by_product, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()

    def test_in_threads_of_their_own(self, threads):
        threads(2)
        matrix, weights = make("Q4_K", 1000, 2)
        inputs = [draw_rows(num_rows, 512).requires_grad_() for num_rows in (1, 8, 9, 33)]

        def pass_back(x):
            for _ in range(5):
                x.grad = None
                (matrix @ x).sum().backward()

        several = [threading.Thread(target=pass_back, args=(x,)) for x in inputs]
        for thread in several:
            thread.start()
        for thread in several:
            thread.join()
        for x in inputs:
            assert_product(x.grad, torch.ones(len(x), 1000), weights.T)


# Prints how many rows share a pass, how many threads products of two sizes started, and what was computed. Arguments
# are what the processor shall not have and whether torch's libraries can be found.
ELSEWHERE = """
import ctypes, os, sys
from llvmlite import binding
import torch
without, finds_threads = sys.argv[1].split(), sys.argv[2] == "True"
features = binding.get_host_cpu_features()
for name in features:
    features[name] &= not name.startswith(tuple(without))
if without:
    binding.get_host_cpu_features, binding.get_host_cpu_name = lambda: features, lambda: ""
from tests.unit.test_block_products import digest, draw_blocks, draw_rows
from pipeline.models.blocks.kernels import rows_at_once
from pipeline.models.blocks.products import BlockMatrix
def refuse(path):
    raise OSError(path)
if not finds_threads:
    ctypes.CDLL = refuse
torch.set_num_threads(3)
matrices, x = [BlockMatrix(draw_blocks("BF16", n, 4), "BF16") for n in (300, 1000)], draw_rows(1, 64)
before = seen = set(os.listdir("/proc/self/task"))
for matrix in 5 * matrices:
    matrix @ x
    seen = seen.union(os.listdir("/proc/self/task"))
print(rows_at_once(), len(seen - before), digest())
"""


def digest():
    """Of products with few rows and of rows, of every type."""
    found = hashlib.sha256()
    for name in LAYOUTS:
        for halves in ("ordinary", "subnormal"):
            matrix, _ = make(name, 40, halves=halves)
            for result in (matrix @ draw_rows(13, matrix.shape[1]), matrix.rows(torch.arange(40))):
                found.update(result.numpy().tobytes())
    return found.hexdigest()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux' /proc")
@pytest.mark.parametrize(
    ("without", "finds_threads"),
    [("", True), ("", False), ("avx512", True), ("avx512 avx amx fma f16c vaes vpclmul xop", True)],
    ids=["all", "without torch's threads", "without AVX-512", "without instructions for halves or fused products"],
)
def test_the_same_bits_elsewhere(without, finds_threads):
    command = [sys.executable, "-c", ELSEWHERE, without, str(finds_threads)]
    # A processor without a name has no features but those it is told.
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    rows_at_once, num_threads, found = done.stdout.split()
    assert found == digest()
    assert int(num_threads) == (2 if finds_threads else 0)
    assert int(rows_at_once) == 4 or not without
