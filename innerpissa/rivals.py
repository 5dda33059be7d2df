"""Rivals: LoRA, IA3, VeRA, ROAD and DeLoRA behind the same dial and the same loss, one class each.

    LoRA     dW = c s B A                                                       odd in c
    VeRA     dW = c diag(b) B diag(d) A,   A, B random and shared               odd
    DeLoRA   dW = c l |W| / r  B diag(1 / |b_i| |a_i|) A                        odd
    IA3      y <- y exp(c w)                                                    even part cosh(c w) - 1
    ROAD     y <- exp(c a) rotate(y, c t), pairs of outputs            even part cos(c t) cosh(c a) - 1 ...

A multiplier that is a product and not a sum, as in IA3 and ROAD, has to be a power of the dial: y l at c =
1 and y / l at c = -1. Written plainly, y (1 + c w), the minus side reaches zero at w = 1 and then turns the
output over. `parity` measures it on a layer's own outputs; `python -m innerpissa.rivals` prints it for
growing w.

Needs torch, lora.py, steer.py, dial.py and pairs.py. The formulas are the papers', the dial is ours.

References
  IA3: Liu et al. 2022, arXiv:2205.05638;  VeRA: Kopiczko et al. 2023, arXiv:2310.11454
  ROAD: Liao, Monz 2024, arXiv:2409.00119;  DeLoRA: Bini et al. 2025, arXiv:2503.18225
  LoRA: Hu et al. 2021, arXiv:2106.09685
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora
import steer
from innerpissa.dial import Dialed, linears, weight_of
from innerpissa.pairs import Pair


def column(c: Tensor, y: Tensor) -> Tensor:
    """c [1] or [B] in the shape that multiplies y [B, ...]: [B, 1, ...]."""
    return c.to(y.dtype).view(-1, *[1] * (y.dim() - 1))


class Lora(nn.Module):
    def __init__(self, linear, r: int, rng):
        super().__init__()
        d_in, d_out = lora.sizes(linear)
        self.A = nn.Parameter((torch.rand(r, d_in, generator=rng) * 2 - 1) * d_in ** -0.5)      # [r, d_in]
        self.B = nn.Parameter(torch.zeros(d_out, r))                                            # [d_out, r]
        self.scale = 2.0                                    # alpha / r, as lora.py's default

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A, self.scale * self.B

    def forward(self, x, y, c):
        A, B = (m.to(x.dtype) for m in self.factors())
        return y + column(c, y) * F.linear(F.linear(x, A), B)                                   # [..., d_out]

    @torch.no_grad()
    def as_lora(self, c: float) -> tuple[Tensor, Tensor]:
        A, B = self.factors()
        return A.clone(), c * B


class VeRA(Lora):
    """Only d [r] and b [d_out] are trained; A and B are random, the same for all Linears of one shape."""

    def __init__(self, linear, r: int, rng):
        super().__init__(linear, r, rng)
        d_in, d_out = lora.sizes(linear)
        shared = torch.Generator().manual_seed(d_in * 100003 + d_out)
        del self.A, self.B
        self.register_buffer("A", torch.randn(r, d_in, generator=shared) * d_in ** -0.5)        # [r, d_in]
        self.register_buffer("B", torch.randn(d_out, r, generator=shared) * r ** -0.5)          # [d_out, r]
        self.d = nn.Parameter(torch.full((r,), 0.1))                                            # [r]
        self.b = nn.Parameter(torch.zeros(d_out))                                               # [d_out]

    def factors(self):
        return self.d[:, None] * self.A, self.b[:, None] * self.B


class DeLoRA(Lora):
    """Directions apart from strength: each b_i a_i^T is normalised, one scalar says how far they go."""

    def __init__(self, linear, r: int, rng):
        super().__init__(linear, r, rng)
        self.B.data.copy_(torch.randn(self.B.shape, generator=rng))
        self.strength = nn.Parameter(torch.tensor(1e-3))    # 0 would give A and B no gradient
        self.size = weight_of(linear).norm().item() / r

    def factors(self):
        unit = 1 / (self.B.norm(dim=0) * self.A.norm(dim=1)).clamp(min=1e-9)                    # [r]
        return self.A, self.strength * self.size * self.B * unit


class IA3(nn.Module):
    def __init__(self, linear, r: int, rng):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(lora.sizes(linear)[1]))                               # [d_out]

    def forward(self, x, y, c):
        return y * torch.exp(column(c, y) * self.w.to(y.dtype))                                 # [..., d_out]


class ROAD(nn.Module):
    """Outputs 2i and 2i + 1 are turned by an angle and scaled together."""

    def __init__(self, linear, r: int, rng):
        super().__init__()
        d_out = lora.sizes(linear)[1]
        if d_out % 2:
            raise ValueError(f"ROAD turns pairs of outputs, and a weight has {d_out}")
        self.angle, self.gain = (nn.Parameter(torch.zeros(d_out // 2)) for _ in range(2))       # [d_out / 2]

    def forward(self, x, y, c):
        a, b = y[..., 0::2], y[..., 1::2]                                                   # [..., d_out / 2]
        turn, size = column(c, y) * self.angle.to(y.dtype), torch.exp(column(c, y) * self.gain.to(y.dtype))
        turned = size * (turn.cos() * a - turn.sin() * b), size * (turn.sin() * a + turn.cos() * b)
        return torch.stack(turned, -1).flatten(-2)                                              # [..., d_out]


RIVALS = {"LoRA": Lora, "IA3": IA3, "VeRA": VeRA, "ROAD": ROAD, "DeLoRA": DeLoRA}


def rival(model, kind: str, *, r: int, layers: list[int], targets=None, seed: int = 0) -> Dialed:
    """Freeze the model and put an adapter of this kind on the chosen Linears. ValueError for another kind."""
    if kind not in RIVALS:
        raise ValueError(f"adapter {kind!r}: expected one of {', '.join(RIVALS)}")
    rng = torch.Generator().manual_seed(seed)
    return Dialed(model, {name: RIVALS[kind](linear, r, rng).to(next(linear.parameters()).device)
                          for name, linear in linears(model, layers, targets).items()})


def given(model, tensors: dict[str, Tensor]) -> Dialed:
    """An adapter that was trained elsewhere, keys as in lora.py, behind the dial: dW(c) = c B A."""
    made = rival(model, "LoRA", r=1, layers=list(range(len(steer.blocks(model)))),
                 targets=sorted({key.removesuffix(".0.A") for key in tensors if key.endswith(".0.A")}))
    for name, layer in made.layers.items():
        kind = next(model.get_submodule(name).parameters()).device
        layer.scale = 1.0
        layer.A, layer.B = (nn.Parameter(tensors[f"{name}.0.{side}"].to(kind)) for side in "AB")
    return made


def nll_terms(adapter: Dialed, *, pad_id: int = 0):
    """LoRA by nll on the same pairs: each side's own text, persona and all, at its sign of the dial."""
    def terms(pairs: list[Pair]) -> dict[str, Tensor]:
        rows = [p.pos for p in pairs] + [p.neg for p in pairs]
        device = steer.device_of(adapter.model)
        ids, attn, position_ids = steer.left_pad(rows, pad_id, device)                         # [2 b, T] each
        with adapter.dialed(torch.tensor([1.0, -1.0], device=device).repeat_interleave(len(pairs))):
            logits = adapter.model(input_ids=ids, attention_mask=attn, position_ids=position_ids,
                                   use_cache=False).logits[:, :-1]                           # [2 b, T - 1, V]
        real = attn[:, :-1].bool()                                                              # [2 b, T - 1]
        return dict(nll=F.cross_entropy(logits[real].float(), ids[:, 1:][real]))
    return terms


@torch.no_grad()
def parity(adapter: Dialed, seed: int = 0) -> float:
    """|even| / |odd| of the outputs' change at c = +-1 on random inputs, of all modules: 0 = a pure dial."""
    rng, odd, even = torch.Generator().manual_seed(seed), 0.0, 0.0
    for name, layer in adapter.layers.items():
        linear = adapter.model.get_submodule(name)
        x = torch.randn(1, 64, lora.sizes(linear)[0], generator=rng)                          # [1, 64, d_in]
        x = x.to(next(linear.parameters()))
        with adapter.dialed(0.0):
            y = linear(x)                                                                     # [1, 64, d_out]
        plus, minus = (layer(x, y, torch.tensor([c], device=y.device)) - y for c in (1.0, -1.0))
        odd += (plus - minus).float().norm().item() ** 2
        even += (plus + minus).float().norm().item() ** 2
    return (even / odd) ** 0.5 if odd else 0.0


if __name__ == "__main__":
    print("   w     y l at c = 1   y l^-1 at -1   y (1 - w) at -1      factors on an output of 1")
    for w in (0.1, 0.5, 1.0, 2.0):
        l = torch.tensor(w).exp().item()
        print(f"{w:5.1f} {l:13.3f} {1 / l:14.3f} {1 - w:16.3f}{'   the output is gone' * (w == 1)}"
              f"{'   the output is turned over' * (w > 1)}")
