"""check.py - the same prompt once more with local attention: are the token ids identical?"""

from __future__ import annotations

import numpy as np

from fovea.demo.attention import LocalAttention
from fovea.demo.generate import Answer, Sampling, generate
from fovea.demo.llama import Llama
from fovea.demo.weights import Weights


def check_answer(
    model: Llama, weights: Weights, prompt: list[int], sampling: Sampling, served: Answer
) -> tuple[bool, str]:
    """(identical, a sentence that says so and how far the logits are apart)."""
    attention = LocalAttention(weights.config, len(prompt) + sampling.max_tokens)
    local = generate(model, attention, prompt, weights.config.eos, sampling, keep_logits=True)
    same = 0
    while same < min(len(served.tokens), len(local.tokens)) and served.tokens[same] == local.tokens[same]:
        same += 1
    # after the first token that differs the two compute different things
    pairs = list(zip(served.logits[: same + 1], local.logits[: same + 1], strict=False))
    difference = max(float(np.abs(a - b).max()) for a, b in pairs)
    if served.tokens == local.tokens:
        return True, (
            f"check: {same} token ids identical to local attention; "
            f"largest difference of a logit {difference:.2g}"
        )
    top = np.sort(local.logits[same])[-2:]
    return False, (
        f"check: DIFFERENT from token {same} on: served {served.tokens[same : same + 4]}, "
        f"local {local.tokens[same : same + 4]}; largest difference of a logit up to there "
        f"{difference:.2g}, the two best were {top[1] - top[0]:.2g} apart"
    )
