"""Regenerates fovea/_pb from proto/attention.proto.

    python client/python/tools/generate_proto.py [OUT_DIR]

Needs the grpcio-tools pinned in requirements-test.txt: the generated code asks for a protobuf runtime
at least as new as the compiler. tests/python/test_generated.py fails when the result is stale.
"""

from __future__ import annotations

import importlib.resources
import shutil
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

PACKAGE = Path(__file__).resolve().parents[1]
PROTO = PACKAGE.parents[1] / "proto" / "attention.proto"


def generate(out_dir: Path) -> None:
    """Writes OUT_DIR/fovea/_pb/attention_pb2.{py,pyi}."""
    with tempfile.TemporaryDirectory() as tmp:
        # protoc derives the Python module's name from the file's path under -I
        staged = Path(tmp) / "fovea" / "_pb" / PROTO.name
        staged.parent.mkdir(parents=True)
        shutil.copy(PROTO, staged)
        out_dir.mkdir(parents=True, exist_ok=True)
        include = importlib.resources.files("grpc_tools") / "_proto"
        code = protoc.main(
            [
                "protoc",
                f"-I{tmp}",
                f"-I{include}",
                f"--python_out={out_dir}",
                f"--pyi_out={out_dir}",
                str(staged),
            ]
        )
    if code != 0:
        raise SystemExit(f"protoc failed with code {code}")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else PACKAGE)
