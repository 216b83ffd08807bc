"""policy.py - `--policy` of the demo: which layers read only a part of the context."""

from __future__ import annotations

import fovea

_NUMBERS = {
    "block": "block_tokens",
    "local": "local_blocks",
    "stride": "vert_stride",
    "step": "head_sliding_step",
    "offset": "head_sliding_offset",
    "dense": "num_dense_heads",
}


def parse_policy(text: str, n_layers: int) -> fovea.LayerPolicy:
    """ "s2:s2-16", "s2:block=16,local=4,stride=4,per=q@odd", "window:256,4@0-9": KIND:PATTERN[@LAYERS]."""
    kind, _, rest = text.partition(":")
    pattern, _, layers = rest.partition("@")
    if kind == "s2":
        policy: fovea.S2 | fovea.Window = _s2(pattern)
    elif kind == "window":
        window, _, sinks = pattern.partition(",")
        policy = fovea.Window(_number("window", window), _number("window", sinks or "0"))
    else:
        raise ValueError(f'--policy: given "{text}", expected s2:PATTERN or window:TOKENS[,SINKS]')
    return fovea.LayerPolicy(policy, parse_layers(layers, n_layers))


def parse_layers(text: str, n_layers: int) -> list[int]:
    """ "odd", "even", "0-8:2,29"; "" = all."""
    if text in ("", "even", "odd"):
        return list(range(1 if text == "odd" else 0, n_layers, 2 if text else 1))
    layers: list[int] = []
    for part in text.split(","):
        span, _, step = part.partition(":")
        first, _, last = span.partition("-")
        begin, end = _number("layers", first), _number("layers", last or first)
        layers += range(begin, end + 1, _number("layers", step or "1") or 1)
    if not layers or max(layers) >= n_layers:
        raise ValueError(f'--policy: layers: given "{text}", expected some of 0..{n_layers - 1}')
    return layers


def _s2(pattern: str) -> fovea.S2:
    if "=" not in pattern:
        return fovea.S2(preset=pattern)
    fields: dict[str, int | bool | str] = {}
    for item in pattern.split(","):
        key, _, value = item.partition("=")
        if key in _NUMBERS:
            fields[_NUMBERS[key]] = _number(key, value)
        elif key == "homo":
            fields["homo_head"] = True
        elif key == "per" and value in ("kv", "q"):
            fields["pattern_per"] = f"{value}_head"
        else:
            raise ValueError(
                f'--policy: given "{item}", expected {", ".join(f"{k}=N" for k in _NUMBERS)}, homo or per=kv|q'
            )
    return fovea.S2(**fields)  # type: ignore[arg-type]


def _number(field: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f'--policy: {field}: given "{text}", expected a number') from None
