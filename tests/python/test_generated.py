"""test_generated.py - the committed messages are those of proto/attention.proto."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "client" / "python"


def test_generated_code_is_current(tmp_path):
    pytest.importorskip("grpc_tools")
    tool = PACKAGE / "tools" / "generate_proto.py"
    spec = importlib.util.spec_from_file_location("generate_proto", tool)
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    generator.generate(tmp_path)
    for name in ("attention_pb2.py", "attention_pb2.pyi"):
        fresh = (tmp_path / "fovea" / "_pb" / name).read_text()
        committed = (PACKAGE / "fovea" / "_pb" / name).read_text()
        assert fresh == committed, "run client/python/tools/generate_proto.py"
