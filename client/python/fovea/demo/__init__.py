"""A real language model whose attention is served by Fovea: `python -m fovea.demo --help`."""
