"""test_readme.py - the example of the package's README runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).resolve().parents[2] / "client" / "python" / "README.md"


def test_first_example(service, client, capsys):
    example = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL).group(1)
    assert "127.0.0.1:7411" in example
    exec(compile(example.replace("127.0.0.1:7411", service.address), "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "(5, 8, 64)" in printed
    assert "6 tokens" in printed and "rank 0" in printed
