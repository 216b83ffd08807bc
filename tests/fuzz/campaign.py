"""campaign.py - runs every fuzz target of this folder under libFuzzer, ASan and UBSan, and says how far it got.

python tests/fuzz/campaign.py [--millions 10] [--targets wire,config] [--build DIR] [--corpus DIR] [--json FILE]

Builds with clang, grows a corpus for each target from the committed one, and prints a line each: executions, time,
coverage, corpus. What is found stops that target and is left beside its corpus. Exit code 0 only if nothing was found. A found
input that is mended goes into tests/fuzz/corpus_*: CI replays those with every build.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# Shares of the executions: those of cheap targets are larger.
SHARES = {
    "wire": 0.40, "journal": 0.25, "token": 0.20, "link": 0.06, "config": 0.05, "control": 0.02, "disklog": 0.01, "store": 0.01,
}  # fmt: skip


def build(folder: Path, targets: list[str]) -> None:
    options = ["-DCMAKE_BUILD_TYPE=RelWithDebInfo", "-DFV_FUZZ=ON"]
    sanitizers = "-DFV_SANITIZE=fuzzer-no-link,address,undefined"
    environment = {**os.environ, "CC": "clang"}
    subprocess.run(["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *options, sanitizers], env=environment,
                   check=True, stdout=subprocess.DEVNULL)  # fmt: skip
    subprocess.run(["cmake", "--build", folder, "--", *(f"fuzz_{t}" for t in targets)], check=True,
                   stdout=subprocess.DEVNULL)  # fmt: skip


def run(target: str, binary: Path, corpus: Path, n_runs: int) -> dict[str, object]:
    corpus.mkdir(parents=True, exist_ok=True)
    for seed in sorted((HERE / f"corpus_{target}").iterdir()):
        shutil.copy(seed, corpus / seed.name)
    begin = time.monotonic()
    words = [
        binary,
        f"-runs={n_runs}",
        "-rss_limit_mb=3000",
        "-print_final_stats=1",
        f"-artifact_prefix={corpus}-",
    ]
    done = subprocess.run([*words, corpus], capture_output=True, text=True, errors="replace")
    text = done.stderr

    def last(pattern: str) -> int:
        found = re.findall(pattern, text)
        return int(found[-1]) if found else 0

    row = {
        "target": target,
        "executions": last(r"number_of_executed_units: (\d+)"),
        "seconds": round(time.monotonic() - begin),
        "edges": last(r"cov: (\d+)"),
        "features": last(r"ft: (\d+)"),
        "corpus": last(r"corp: (\d+)/"),
        "rss_mb": last(r"peak_rss_mb: (\d+)"),
        "found": done.returncode != 0,
    }
    if row["found"]:
        print(text[-3000:], file=sys.stderr)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    there = sorted(f.stem.removeprefix("fuzz_") for f in HERE.glob("fuzz_*.c"))
    parser.add_argument("--millions", type=float, default=10.0, help="executions of all targets together")
    parser.add_argument("--targets", default=",".join(there))
    parser.add_argument("--build", type=Path, default=ROOT / "build/fuzz")
    parser.add_argument("--corpus", type=Path, default=ROOT / "build/fuzz-corpus")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    targets = options.targets.split(",")
    missing = set(targets) - set(SHARES)
    if missing:
        parser.error(f"no share for {', '.join(sorted(missing))}: add it to SHARES")
    build(options.build, targets)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    whole = sum(SHARES[t] for t in targets)
    rows = []
    for target in targets:
        n_runs = round(options.millions * 1e6 * SHARES[target] / whole)
        row = run(target, options.build / f"bin/fuzz_{target}", options.corpus / target, n_runs)
        rows.append(row)
        print(json.dumps(row), flush=True)
    n = sum(int(row["executions"]) for row in rows)
    n_found = sum(bool(row["found"]) for row in rows)
    print(f"{n} executions of {len(rows)} targets at {commit.stdout.strip()}, {n_found} with a finding")
    if options.json is not None:
        options.json.write_text(json.dumps({"commit": commit.stdout.strip(), "rows": rows}, indent=1) + "\n")
    return 1 if n_found else 0


if __name__ == "__main__":
    sys.exit(main())
