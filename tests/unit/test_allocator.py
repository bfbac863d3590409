"""The allocator setting, by its effect on page faults. In a process of its own, since it cannot be taken back."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAULTS_OF_A_SECOND_BUFFER = """
import resource
from pipeline.allocator import keep_freed_memory

{setting}
buffer = bytearray(64 << 20)
del buffer
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
buffer = bytearray(64 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def num_faults(setting):
    code = FAULTS_OF_A_SECOND_BUFFER.format(setting=setting)
    return int(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True).stdout)


def test_freed_memory_is_used_again_without_page_faults():
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("only glibc has these settings")
    assert num_faults("") >= 32  # with pages of 2 MiB
    assert num_faults("assert keep_freed_memory()") <= 8
