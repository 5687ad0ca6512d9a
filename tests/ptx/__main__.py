"""Run one part of ``ptx.cases`` in a process of its own: ``python -m ptx sm_90 part [part ...]``.

Prints a JSON a case. In ``tests/`` or with it in PYTHONPATH, and without ``TRITON_INTERPRET``.
"""

import argparse
import json

from ptx.cases import PARTS, Runner


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arch", choices=("sm_80", "sm_90"))
    parser.add_argument("parts", nargs="+", choices=PARTS)
    args = parser.parse_args()
    runner = Runner(args.arch)
    for part in args.parts:
        for row in PARTS[part](runner):
            print(json.dumps({"arch": args.arch, "part": part} | row), flush=True)


if __name__ == "__main__":
    main()
