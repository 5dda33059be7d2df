"""Plan: what a run will need, in memory, disk, tokens and hours, from the shapes of a model without weights.

    memory of a stage = weights + keys and values + logits + activations of its batch         bytes
    arithmetic        = 2 * (weights of the blocks + output head) * tokens                    a multiply and an add each
    time              = arithmetic / rate, but a decoded token reads all weights at least once

Needs torch only. The model is on the meta device: it has shapes and no numbers. Everything here is an estimate, made to
tell a run that fits from one that does not and an hour from a week; each line that is printed says what it assumes.

Known gaps: keys and values are counted for full attention in every block, too much where it slides or is linear; an
answer is counted at its longest; a token is taken to be four characters; what a step costs beside arithmetic (launching
its kernels), which is most of the time of a model of a few million parameters, is not counted.

References
  34 bytes of activations per token, block and unit of width: Korthikanti et al. 2022, arXiv:2205.05198, Eq. 2
"""
import math
import time

import torch
from torch import nn


def tokens_of(text: str) -> int:
    """Four characters to a token, and sixteen tokens of chat template."""
    return len(text) // 4 + 16


def sizes(model, blocks: nn.ModuleList) -> dict:
    """What the estimates need to know: counts of parameters, widths, all from shapes."""
    text = model.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    experts = sum(p.numel() for name, p in blocks.named_parameters() if ".experts." in name)
    n_experts = next((n for key in ("num_experts", "num_local_experts", "n_routed_experts") if (n := getattr(text, key, 0))), 1)
    idle = experts * (1 - (getattr(text, "num_experts_per_tok", 0) or 0) / n_experts)
    head = text.vocab_size * text.hidden_size
    return dict(n_blocks=len(blocks), width=text.hidden_size, vocab=text.vocab_size, head=head,
                total=sum(p.numel() for p in model.parameters()),
                inner=max((max(p.shape) for p in blocks[0].parameters() if p.dim() == 2), default=text.hidden_size),
                active=sum(p.numel() for p in blocks.parameters()) - idle + head,       # used for one token
                linear=sum(m.weight.numel() for m in blocks.modules() if isinstance(m, nn.Linear)),
                kv=2 * len(blocks) * heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads))


def memory(n: dict, n_trained: int, lora_blocks: int, *, bytes_each: int, quantized: bool, answer: int, prompt: int, frame: int,
           gen_rows: int, nll_rows: int, probe_rows: int, heal_rows: int) -> dict[str, float]:
    """Peak bytes of each stage: weights and adapters, and on top what one batch keeps.

    n: from `sizes`. answer, prompt, frame: longest length in tokens of an answer, of its prompt, of a probe's question with
    its think. *_rows: rows of a batch. lora_blocks: blocks from the first adapted one to the last of the model, which are
    the ones that keep activations for the backward pass.
    """
    weights = n["total"] * bytes_each - (n["linear"] * (bytes_each - 0.5625) if quantized else 0)  # nf4, a scale per 64
    held = weights + 4 * n_trained
    token, logit = n["kv"] * bytes_each, n["vocab"] * bytes_each
    wide = (4 * n["width"] + 3 * n["inner"]) * bytes_each                       # one block at work, per token
    heal_tokens = heal_rows * (prompt + answer)
    return {"weights": weights,
            "generation": held + gen_rows * ((prompt + answer) * token + prompt * wide + 3 * 4 * n["vocab"]),
            "filter": held + nll_rows * ((prompt + answer) * wide + (answer + 1) * logit) + 3 * 4 * answer * n["vocab"],
            "probe": held + probe_rows * (frame * (token + wide) + 3 * 4 * n["vocab"]),
            # gradient and two moments of Adam; logits of student and reference, whole and as five float32 copies of the answers'
            "heal": held + 12 * n_trained + heal_tokens * (17 * bytes_each * n["width"] * lora_blocks + 2 * logit)
            + 5 * 4 * heal_rows * answer * n["vocab"]}


def rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """What this machine does in a second, measured in about one: (multiplications and additions, bytes read)."""
    def best(run) -> float:
        times = []
        for _ in range(4):
            start = time.perf_counter()
            run().view(-1)[0].item()                            # waits for a GPU
            times.append(time.perf_counter() - start)
        return min(times)
    d = 4096 if device.type != "cpu" else 512
    a = torch.ones(d, d, device=device, dtype=dtype)
    once = best(lambda: a @ a)
    n = max(1, min(64, int(0.05 / once)))                       # long enough for the clock

    def product():
        for _ in range(n):
            b = a @ a
        return b
    x = torch.ones(2 ** 26 if device.type != "cpu" else 2 ** 24, device=device)
    return 2 * n * d ** 3 / best(product), 2 * 4 * x.numel() / best(x.clone)            # read once, written once


def hours(n: dict, weights: float, *, read: int, trained: int, decoded: int, rows: int, rate: float, bandwidth: float) -> float:
    """Time of a run. read: tokens of forward passes; trained: of training steps (student, reference and the gradient of
    the activations, three passes); decoded: tokens written one by one, `rows` at once."""
    step = max(rows * 2 * n["active"] / rate, weights / bandwidth)
    return ((read + 3 * trained) * 2 * n["active"] / rate + math.ceil(decoded / rows) * step) / 3600
