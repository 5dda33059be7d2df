"""Ranks: one run on several devices, a whole replica on each; plain torch.distributed under torchrun.

    torchrun --nproc-per-node 8 loop.py MODEL ...

Every rank runs the same program. Rows of work are dealt out and all get everybody's results (`spread`), so
all go on from the same numbers; what decides, or touches files, is rank 0's, and the others get its result
(`lead`). An error of one is raised at all. With one process each of these is the plain call. Rows have draws
of their own, so who computes them changes no sample; sums run in another order: the last digits of float32.

Objects go from rank to rank as pickles, which can run code, over sockets without a password: the ranks must
be on a network of their own. What a file or a model says is in them as plain data and cannot.

Every wait ends: after WAIT seconds, or as soon as a rank is gone, with an error that names rank and stage.
"""
import contextlib
import functools
import os
import re
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

import steer

WAIT = 600                  # seconds for the slowest rank, of work dealt out evenly or of reading weights
KINDS = SystemExit, torch.OutOfMemoryError, ValueError, OSError, RuntimeError   # errors told to the others

RANK, WORLD = 0, 1
stage, n_waits = "the beginning", 0                     # where this rank is: all must be at the same place


class RankLost(ConnectionError):
    """Another rank is gone, silent or elsewhere: no fault of a round; the run ends and can be continued."""


def start() -> None:
    """Join the processes of torchrun; without it, nothing. Only rank 0 is heard from here on."""
    global RANK, WORLD
    RANK, WORLD = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    if WORLD == 1 or dist.is_initialized():
        return
    local, n_gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if 0 < n_gpus <= local:
        raise ValueError(f"rank {RANK} has no GPU: there are {n_gpus} here; take --nproc-per-node {n_gpus}, "
                         "or CUDA_VISIBLE_DEVICES= for the CPU")
    if n_gpus:
        torch.cuda.set_device(local)                    # from here on "cuda" is this one
    from torch.distributed import nn                    # noqa: F401   keeps the group it finds when AdamW
    # imports it: were it ours, gloo's threads would outlive destroy_process_group, and can abort at the exit
    dist.init_process_group("cpu:gloo,cuda:nccl" if n_gpus else "gloo", timeout=timedelta(seconds=WAIT))
    steer.across = spread
    if RANK:
        sys.stdout = sys.stderr = open(os.devnull, "w")


def end(code: int) -> int:
    """All are done: the exit code of rank 0; of another it would make torchrun end rank 0 too early."""
    if WORLD > 1:
        exchange(None)
        dist.destroy_process_group()
    return 0 if RANK else code


def complain(text: str) -> None:
    """The sentence on stderr that ends a run: of the rank that fails first, who knows best."""
    if WORLD > 1 and dist.is_initialized():
        with contextlib.suppress(RuntimeError):         # the store may be gone, with torchrun
            if dist.distributed_c10d._get_default_store().add("complaints", 1) > 1:
                return
    print(text, file=sys.__stderr__ if RANK else sys.stderr, flush=True)


def at(name: str, rnd: int | None) -> None:
    """The stage that errors name."""
    global stage
    stage = name if rnd is None else f"{name} of round {rnd}"


# ---- one exchange, which everything else is made of --------------------------------------------------------


def packed(x):
    """The same on the CPU, without the storage that a view would bring along."""
    if isinstance(x, torch.Tensor):
        return x.detach().cpu().clone()
    if isinstance(x, dict):
        return {k: packed(v) for k, v in x.items()}
    return type(x)(map(packed, x)) if type(x) in (list, tuple) else x


def waited(collective, *args) -> None:
    try:
        collective(*args)
    except RuntimeError as error:
        why = re.search("Timed out[^.]*|Connection [^.]*|$", str(error))[0] or str(error).split("\n")[0][:100]
        raise RankLost(f"rank {RANK} of {WORLD} lost another rank in {stage}: it is gone, or was silent for "
                       f"{WAIT} s ({why})") from None


def exchange(mine, error=None) -> list:
    """What every rank brings, in their order. An error of one is raised at all of them."""
    global n_waits
    n_waits, found = n_waits + 1, [None] * WORLD
    kind = next((k for k in KINDS if isinstance(error, k)), None)
    told = error and (kind, error.code if kind is SystemExit else str(error))
    waited(dist.all_gather_object, found, (packed(mine), told, (stage, n_waits)))
    for rank, (_, told, _) in enumerate(found):
        if told:
            error = error if rank == RANK else told[0](told[1])
            error.is_shared = True
            raise error
    if len({place for *_, place in found}) > 1:
        places = ", ".join(f"{name} ({n})" for *_, (name, n) in found)
        raise RankLost(f"the ranks have come apart, they wait in {places}: the machines differ, or it is an "
                       "error of this code")
    return [x for x, *_ in found]


def shared(work, *args, **kw):
    """What work gives, and an error of it that the others, wherever they wait, raise too."""
    try:
        return work(*args, **kw)
    except KINDS as error:
        if WORLD > 1 and not getattr(error, "is_shared", False) and not isinstance(error, RankLost):
            exchange(None, error)
        raise


@contextlib.contextmanager
def alone():
    """Inside, this rank asks nobody."""
    global WORLD
    before, WORLD = WORLD, 1
    try:
        yield
    finally:
        WORLD = before


# ---- what the rooms use ------------------------------------------------------------------------------------


def lead(work, *args, **kw):
    """What work gives on rank 0, who alone does it."""
    if WORLD == 1:
        return work(*args, **kw)

    def mine():
        with alone():
            return work(*args, **kw)
    box = [None if RANK else packed(shared(mine))]
    exchange(None)                                      # all are here, and nobody has an error
    waited(dist.broadcast_object_list, box, 0)          # a gather would make WORLD copies of it everywhere
    return box[0]


def leads(function):
    """A function that writes or decides: rank 0 runs it, all get what it returns."""
    @functools.wraps(function)
    def led(*args, **kw):
        return lead(function, *args, **kw)
    return led


def spread(work, rows: list, params=()) -> dict:
    """{row: result} of all rows, on the CPU: work(my rows) gives mine. Gradients of params are summed.

    rows are dealt like cards, back and forth: sorted by length, all get as much. RankLost if params differ.
    """
    if WORLD == 1:
        return work(rows)
    mine = [row for i, row in enumerate(rows) if i % (2 * WORLD) in (RANK, 2 * WORLD - 1 - RANK)]
    found = shared(work, mine) if mine else {}
    flat = shared(flattened, params) if params else None                    # memory may end here, so before
    bits = sum(p.detach().view(torch.int32).sum() for p in params)          # [] the same to the last bit
    found, sums, has_grad = zip(*exchange((found, int(bits), any(p.grad is not None for p in params))))
    if len(set(sums)) > 1:
        raise RankLost(f"the adapters of the ranks differ in {stage}, checksums {sums}: a device is wrong")
    if any(has_grad):                                   # one all-reduce of one flat tensor
        waited(dist.all_reduce, flat)
        for p, grad in zip(params, flat.split([p.numel() for p in params])):
            p.grad = grad.view_as(p)
    return {row: x for part in found for row, x in part.items()}


def flattened(params) -> torch.Tensor:
    """The gradients of a step as one tensor, in the parameters' own float32; 0 where there is none."""
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in params])


def agree(what: str, x) -> None:
    """ValueError if x is not the same on all ranks."""
    if WORLD > 1 and (differ := [rank for rank, other in enumerate(exchange(x)) if other != x]):
        raise ValueError(f"{what} of ranks {differ} differ from rank {RANK}'s: give all nodes the same files")
