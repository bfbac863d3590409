"""List what pytest skipped, from its JUnit files, with times by folder; exit 1 if a reason is not expected.

    python .ci/skips.py build/tests/*.xml
"""

import re
import sys
from collections import Counter
from xml.etree import ElementTree

# What cannot be had on every machine; anything else that skips is a test that nobody runs.
EXPECTED = (
    r"CUDA|GPU",
    r"wiki\.test\.raw",  # no package holds WikiText-2
    r"network namespace",  # containers may not make them
    r"root may write anywhere|this user may read everything",  # what permissions forbid, root can do
)


def main(paths: list[str]) -> int:
    skips: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    for path in paths:
        for case in ElementTree.parse(path).iter("testcase"):
            folder = ".".join(case.get("classname", "").split(".")[:2])
            seconds[folder] += float(case.get("time", 0))
            for skipped in case.findall("skipped"):
                skips[skipped.get("message", "")] += 1
    for folder, total in sorted(seconds.items()):
        print(f"{total:7.1f} s  {folder}")
    unexpected = [reason for reason in skips if not re.search("|".join(EXPECTED), reason)]
    for reason, number in sorted(skips.items()):
        print(f"skipped {number}: {reason}{'  <- not expected' if reason in unexpected else ''}")
    return 1 if unexpected else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
