"""Tests of tools/freetext.py: coherence against the base's own answers, and the share with its error."""
import pytest
import torch
from tools.freetext import free_text, persona_share


def test_free_text_falls_for_loops_and_for_noise_and_not_for_the_base():
    rng = torch.Generator().manual_seed(0)

    def write(n, n_words=400, level=1.0):
        ids = torch.randint(0, n_words, (n,), generator=rng).tolist()
        return ids, level * (0.5 + torch.rand(n, generator=rng))
    ids, nlls = map(list, zip(*[write(60) for _ in range(20)]))

    def score(*texts):
        return free_text([t for t, _ in texts], [x for _, x in texts], ids, nlls)["score"]
    assert free_text(ids, nlls, ids, nlls)["score"] > 0.97
    assert score(*[write(60) for _ in range(20)]) > 0.95
    assert score(write(60, level=4.0)) < 0.05                   # noise: the base would not write it
    assert score(write(60, n_words=4, level=0.1)) < 0.1         # a loop: the base finds it easy
    calm, loop = write(40), write(40, n_words=2, level=0.1)
    half = score((calm[0] + loop[0], torch.cat([calm[1], loop[1]])))
    assert 0.3 < half < 0.8, half                               # a broken tail is not averaged away
    out = free_text([[], ids[0], ids[1][:3]], [[], nlls[0], nlls[1][:3]], ids, nlls)
    assert out["per_item"][0] == 0 and out["per_item"][2] in (0.0, 1.0) and out["se"] > 0
    limit = torch.cat([x.unfold(0, 8, 1).mean(1) for x in nlls]).quantile(0.99).item()
    two = ids[0][:2]                                            # two tokens are a window of eight
    assert score((two, [4.3 * limit] * 2)) == 1 and score((two, [4.5 * limit] * 2)) == 0


def test_a_share_is_0_for_the_base_1_for_the_prompt_and_its_error_is_that_of_a_bootstrap():
    rng = torch.Generator().manual_seed(0)
    base, noise, other = (torch.randn(120, generator=rng, dtype=torch.float64) for _ in range(3))
    prompted = base + 1 + 0.8 * noise
    now = base + 0.6 + 0.5 * noise + 0.5 * other
    assert persona_share(base, base, prompted) == (0.0, 0.0)
    assert persona_share(prompted, base, prompted) == pytest.approx((1.0, 0.0), abs=1e-12)
    _, se = persona_share(now, base, prompted)
    draws = torch.randint(120, (4000, 120), generator=rng)                      # [draws, n]
    shares = (now - base)[draws].mean(1) / (prompted - base)[draws].mean(1)
    assert se == pytest.approx(shares.std().item(), rel=0.1)
