"""``trinity-megatron doctor``."""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from trinity_megatron.process.rank import quiet_megatron


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser of ``trinity-megatron``."""
    parser = commands.add_parser(
        "doctor",
        help="look at this machine, or at all ranks of a job, before a run",
        description="One screen of green, yellow and red lines: versions, GPU and links, what is "
        "replaced in Megatron, shared memory, limits, disk, clock, W&B; each that is not green "
        "with its remedy.  Under srun or torchrun the ranks are compared and the odd one is "
        "named.  gpu-check is its deep part.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--out", type=Path, default=Path("."), metavar="DIR", help="where runs are written (here)"
    )
    parser.set_defaults(command=run, takes_further_flags=False)


def run(args: argparse.Namespace, others: Sequence[str]) -> int:
    """Print what was found; return 0 if nothing is red."""
    quiet_megatron()
    from trinity_megatron.doctor.examination import examine
    from trinity_megatron.doctor.finding import worst
    from trinity_megatron.doctor.ranks import examine_world
    from trinity_megatron.process.world import join_world

    join_world()
    findings = examine(args.out)
    if int(os.environ["WORLD_SIZE"]) > 1:
        compared = examine_world(findings, os.environ)
        if compared is None:
            return 0
        findings += compared
    if args.json:
        result = {"worst": worst(findings), "findings": [each.as_json() for each in findings]}
        print(json.dumps(result, indent=1))
    else:
        print("\n".join(map(str, findings)))
    return int(worst(findings) == "red")
