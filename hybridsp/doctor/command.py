"""`hybridsp doctor`: the table on the screen, the findings as JSON, the exit code."""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from datetime import datetime
from functools import partial
from pathlib import Path

from hybridsp.doctor.diagnosis import diagnose
from hybridsp.doctor.finding import Finding, exit_status, render
from hybridsp.launch import rank_from_environment
from hybridsp.recipe import one_line


def run(args: argparse.Namespace) -> None:
    """Run `hybridsp doctor`.

    Raises:
        SystemExit: 1 if anything fails, on every rank.
        ValueError, OSError: the launcher's variables are not whole, or --json cannot be written.
    """
    if args.json is not None and rank_from_environment().rank == 0:
        _check_writable(args.json)  # now, and not after minutes of collectives
    diagnosis = diagnose(
        out=args.out,
        plan=args.plan,
        limit=float(args.time_limit),
        tell=partial(_tell, json_file=args.json),
    )
    if diagnosis.broken:
        # An ordinary exit waits for the thread that hangs, or for peers that are gone.
        try:
            if diagnosis.untold is not None:
                print(f"hybridsp doctor: error: {one_line(diagnosis.untold)}", file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(diagnosis.exit_status)
    if diagnosis.untold is not None:
        raise diagnosis.untold
    if diagnosis.exit_status:
        raise SystemExit(diagnosis.exit_status)


def _check_writable(file: Path) -> None:
    there = file.exists()
    with file.open("a", encoding="utf-8"):
        pass
    if not there:
        file.unlink()


def _tell(findings: list[Finding], json_file: Path | None) -> None:
    print(render(findings), flush=True)
    if json_file is None:
        return
    record = {
        "host": socket.gethostname(),
        "ranks": rank_from_environment().world_size,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "exit_status": exit_status(findings),
        "findings": [finding.as_json() for finding in findings],
    }
    json_file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


__all__ = ["run"]
