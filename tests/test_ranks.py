"""Tests of tools/ranks.py: two processes of torchrun against one. This file is also what torchrun starts.

    python -m torch.distributed.run --nproc-per-node 2 tests/test_ranks.py WORK [die]
"""
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent)]

import pytest                                                   # noqa: E402
import torch                                                    # noqa: E402
from common import ROOT, small_data, tiny_model, tiny_tokenizer         # noqa: E402

import heal                                                     # noqa: E402
import lora                                                     # noqa: E402
import loop                                                     # noqa: E402
import steer                                                    # noqa: E402
from tools import folder, ranks                                 # noqa: E402

SMALL = ("--rounds 1 --n-make 8 --n-text 4 --n-vignettes 4 --steer-band .76 .8 --coeff 0.3 --think-tokens 2 "
         "--max-new-tokens 12 --epochs 1 --lr 0.01 --no-gate").split()


def steps(across) -> tuple[list, list, dict]:
    """Two steps of heal in float64: the gradient of each, the adapter after them, the record."""
    model, grads = tiny_model(tiny_tokenizer(), dtype=torch.float64), []
    for name, norm in [(name, m) for name, m in model.named_modules() if name.endswith("norm")]:
        exact = torch.nn.RMSNorm(len(norm.weight), eps=model.config.rms_norm_eps, dtype=torch.float64)
        model.set_submodule(name, exact.requires_grad_(False))  # transformers' own rounds to float32
    stack, rng = lora.attach(model, r=4, alpha=8, layers=[1, 2]), torch.Generator().manual_seed(0)
    for p in stack.parameters():
        p.data = 0.1 * torch.randn(p.shape, generator=rng, dtype=torch.float64)
    samples = [heal.Sample(torch.randint(6, 262, (n_prompt + n,), generator=rng).tolist(), n_prompt, group)
               for group, (n_prompt, n) in enumerate([(3, 5), (1, 1), (6, 9), (2, 12), (4, 3), (5, 7)])]

    def watched(work, rows, params):
        found = across(work, rows, params)
        grads.extend([[p.grad.clone() for p in params]] if params[0].grad is not None else [])
        return found
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        record = heal.heal(model, stack.parameters(), samples, lambda: stack.gated(0, 0), heal.HealConfig(
            lr=1e-3, tau=0.01, epochs=1, heal_batch=3), across=watched)
    return grads, [p.detach() for p in stack.parameters()], record


def largest(a, b) -> float:
    return max(((x - y).abs().max() / y.abs().max()).item() for x, y in zip(a, b, strict=True))


def child(work: Path, mode: str) -> int:
    """What a rank does: a run in which rank 1 dies, or two steps against those of one process and its end."""
    vignettes = small_data(work / f"{mode}-{os.environ['RANK']}")
    if mode == "die":
        event = folder.Folder.event

        def dying_event(self, stage, *rest, **more):
            if stage == "made" and ranks.RANK == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return event(self, stage, *rest, **more)
        folder.Folder.event = dying_event
        return loop.main([*SMALL, "--vignettes", str(vignettes), "--out", str(work)])
    ranks.start()
    (grads, adapter, record), (g, a, r) = steps(ranks.spread), steps(lambda work, rows, params: work(rows))
    errors = dict(n_steps=len(grads), grad=max(map(largest, grads, g)), adapter=largest(adapter, a),
                  **{key: abs(record[key] - r[key]) for key in ("nll_last", "val_nll_after")})
    if not ranks.RANK:
        (work / "errors.json").write_text(json.dumps(errors))
    code = loop.main(["--resume", str(next(work.glob("*/run.json")).parent)])
    left = [Path(f"/proc/self/task/{task}/comm").read_text() for task in os.listdir("/proc/self/task")]
    assert not any("gloo" in name for name in left), left       # alive while Python ends, they may abort
    return code


def torchrun(work: Path, mode: str) -> tuple[int, str]:
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
             "--rdzv-endpoint", "localhost:0", __file__, work, mode]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=500, cwd=ROOT,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The record of the small run in one process, which knows nothing of torchrun."""
    work = tmp_path_factory.mktemp("one")
    words = [sys.executable, __file__, str(work), "one"]
    subprocess.run(words, check=True, capture_output=True, timeout=500, cwd=ROOT,
                   env=os.environ | {"OMP_NUM_THREADS": "1", "RANK": "0", "WORLD_SIZE": "1"})
    return folder.read(next(work.glob("*/run.json")).parent)


def test_with_one_process_nothing_is_dealt_exchanged_or_computed_otherwise():
    plain, dealt = steps(lambda work, rows, params: work(rows)), steps(ranks.spread)
    assert all(map(torch.equal, sum(plain[0], []), sum(dealt[0], []))) and plain[2] == dealt[2]
    rows, made, seen = [3, 1, 2], {3: object()}, []
    assert ranks.spread(lambda x: seen.append(x) or made, rows) is made and seen[0] is rows
    assert ranks.lead(lambda x: x, made) is made and ranks.shared(lambda: made) is made
    assert steer.across(lambda x: x, rows) is rows and not torch.distributed.is_initialized()
    with pytest.raises(KeyError):                               # as it is: told to nobody
        ranks.shared({}.__getitem__, "x")


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_rows_are_dealt_once_each_and_evenly(world, monkeypatch):
    """Sorted by length, no rank gets much more than another; what each finds is merged."""
    lengths, shares = sorted((n * n for n in range(40)), reverse=True), {}
    monkeypatch.setattr(ranks, "WORLD", world)
    for rank in range(world):
        monkeypatch.setattr(ranks, "RANK", rank)
        monkeypatch.setattr(ranks, "exchange", lambda mine, error=None: [mine])
        shares[rank] = ranks.spread(lambda mine: dict.fromkeys(mine), list(range(40)))
    assert sorted(row for share in shares.values() for row in share) == list(range(40))
    loads = [sum(lengths[row] for row in share) for share in shares.values()]
    assert max(loads) <= 1.1 * sum(lengths) / world


def test_an_error_of_one_rank_is_raised_at_all_and_ranks_that_came_apart_are_named(monkeypatch):
    monkeypatch.setattr(ranks, "WORLD", 2)
    told, here = (None, (torch.OutOfMemoryError, "full"), ("made", 4)), []

    def gather(found, mine):
        here.append(mine)
        found[:] = [mine, told]
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    with pytest.raises(torch.OutOfMemoryError, match="full") as raised:
        ranks.exchange(torch.ones(2))
    with pytest.raises(torch.OutOfMemoryError):                 # it is not told a second time
        ranks.shared(lambda: (_ for _ in ()).throw(raised.value))
    assert len(here) == 1
    told = None, None, ("made of round 7", 1)
    with pytest.raises(ranks.RankLost, match="made of round 7"):
        ranks.exchange(None)


def test_what_rank_0_alone_made_goes_to_the_others_once(monkeypatch):
    """A gather makes WORLD copies of it on every rank: of adapters, tens of GB."""
    made, gathered = {"A": torch.ones(3)[:2]}, []
    monkeypatch.setattr(ranks, "WORLD", 2)

    def gather(found, mine):
        gathered.append(mine[0])
        found[:] = [mine, (None, None, mine[2])]
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda box, src: sent.append((src, *box)))
    sent = []
    assert torch.equal(ranks.lead(lambda: made)["A"], made["A"]) and gathered == [None]
    (src, box), = sent
    assert src == 0 and box["A"].untyped_storage().nbytes() == 8        # not what the view was cut from
    monkeypatch.setattr(ranks, "RANK", 1)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda box, src: box.__setitem__(0, made))
    assert ranks.lead(lambda: pytest.fail("rank 1 did it too")) is made


def test_two_processes_and_a_rank_that_dies_give_the_run_of_one(one_process, tmp_path):
    code, said = torchrun(tmp_path, "die")
    sentences = "lost another rank in made of round 0", "loop.py: interrupted"      # torchrun may be first
    assert code == 1 and any(sentence in said for sentence in sentences), said
    path = next(tmp_path.glob("*/run.json")).parent
    assert folder.read(path).of("vector", 0) and not folder.read(path).run.get("accepted")
    code, said = torchrun(tmp_path, "resume")
    assert code == 0, said
    two, one = folder.read(path), one_process
    assert [e["stage"] for e in two.events] == [e["stage"] for e in one.events]
    assert [e["ids"] for e in two.completions(0)] == [e["ids"] for e in one.completions(0)]
    assert two.accepted == one.accepted == [0] and two.run["machine"]["ranks"] == 2
    for a, b in zip(two.rows(), one.rows()):
        for key in ("persona_ratio", "trait", "coherence", "text", "share"):
            assert a[key] == pytest.approx(b[key], abs=1e-3), (a["kind"], key)
    errors = json.loads((tmp_path / "errors.json").read_text())
    assert errors.pop("n_steps") == 2 and max(errors.values()) < 1e-12, errors


if __name__ == "__main__":
    work, mode = Path(sys.argv[1]), sys.argv[2]
    if mode != "one":
        sys.exit(child(work, mode))
    sys.exit(loop.main([*SMALL, "--vignettes", str(small_data(work / "data")), "--out", str(work)]))
