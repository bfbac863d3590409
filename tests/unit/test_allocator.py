"""The allocator's settings, by their effects. In processes of their own, since they cannot be taken back."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")

FAULTS_OF_A_SECOND_BUFFER = """
import resource
from pipeline.runtime.memory import keep_freed_memory
{setting}
buffer = bytearray(64 << 20)
del buffer
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
buffer = bytearray(64 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

MIB_LEFT_BETWEEN_SMALL_BLOCKS = """
from pipeline.runtime.memory import return_freed_memory
{setting}
def resident_mib():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096 >> 20
bytearray(30 << 20)  # what glibc learns its threshold from
before = resident_mib()
kept = []
for _ in range(10):
    weight = bytearray(20 << 20)
    kept.append(bytearray(2 << 20))
    del weight
    kept.append(bytearray(6 << 20))
print(resident_mib() - before - 80)
"""


def measured(code, setting):
    command = [sys.executable, "-c", code.format(setting=setting)]
    return int(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout)


@needs_glibc
def test_kept_memory_is_used_again_without_page_faults():
    assert measured(FAULTS_OF_A_SECOND_BUFFER, "") >= 32  # with pages of 2 MiB
    assert measured(FAULTS_OF_A_SECOND_BUFFER, "assert keep_freed_memory()") <= 8


@needs_glibc
def test_returned_memory_leaves_no_holes():
    assert measured(MIB_LEFT_BETWEEN_SMALL_BLOCKS, "") >= 10
    assert measured(MIB_LEFT_BETWEEN_SMALL_BLOCKS, "assert return_freed_memory()") <= 2
