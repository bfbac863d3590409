"""Kernels where numba's cache cannot be had: they run, and one line says what to do. Their errors name the codec."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from compressors import make_compressor
from pipeline.runtime.codecs import CodecError, cause_in_words, naming

ROOT = Path(__file__).parents[2]
ENCODE = """
import errno, logging, os
logging.basicConfig(level=logging.WARNING)
import torch
from numba.core import caching
{damage}
from compressors import make_compressor
codec = make_compressor("int8")
payload = codec.compress(torch.arange(64.0).view(1, 2, 32))
print(codec.decompress(payload, torch.device("cpu"), torch.float32).sum().item())
"""
NO_PLACE = """
def no_place(self, function):
    raise RuntimeError("cannot cache function 'encode': no locator available for file 'affine.py'")
getattr(caching, "CacheImpl", getattr(caching, "_CacheImpl", None)).__init__ = no_place
"""
FULL = """
def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
caching.IndexDataCacheFile.save = full
"""
DAMAGED = """
def damaged(*_):
    raise EOFError("Ran out of input")
caching.IndexDataCacheFile.load = damaged
"""


def encode(tmp_path, damage="", **variables):
    return subprocess.run(
        [sys.executable, "-c", ENCODE.format(damage=damage)],
        cwd=ROOT,
        env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), **variables},
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """With a cache of its own."""
    return encode(tmp_path_factory.mktemp("cache"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "cause"),
    [(NO_PLACE, "no locator available"), (FULL, "No space left on device"), (DAMAGED, "Ran out of input")],
    ids=["no place", "full disk", "damaged"],
)
def test_kernels_run_without_a_cache(damage, cause, whole, tmp_path):
    ended = encode(tmp_path, damage)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == whole.stdout and whole.stderr == ""
    (line,) = ended.stderr.splitlines()
    assert "compiled kernels cannot be kept on disk" in line and cause in line and "NUMBA_CACHE_DIR" in line


@pytest.mark.slow
def test_numba_that_compiles_nothing_is_named(tmp_path):
    ended = encode(tmp_path, NUMBA_DISABLE_JIT="1")
    assert ended.returncode != 0
    assert "NUMBA_DISABLE_JIT is set, and codecs on the CPU need compiled kernels: unset it" in ended.stderr


def test_what_a_kernel_raises_names_the_codec():
    with pytest.raises(CodecError) as raised, naming(make_compressor("int8")):
        raise TypeError("No implementation of function\n\n" + "of many lines\n" * 500)
    told = cause_in_words(raised.value)
    assert told.startswith("codec int8: TypeError: No implementation of function of many lines") and len(told) < 500
    assert cause_in_words(KeyError("x")) == "KeyError: 'x'"
