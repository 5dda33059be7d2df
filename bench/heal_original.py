"""The structure of the system that this project re-implements, as far as the benchmarks run it: one thing at
a time.

Written by us from a description; only the structure is theirs. The optimiser steps are those of heal.heal, so
that the two end at the same loss.
"""
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import heal  # noqa: E402


def last_states(model, ids: list[int], layers: list[int]) -> dict:
    """The state of the last token after each of `layers`, from all hidden states of the model: {layer:
    [d]}."""
    out = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    return {layer: out.hidden_states[layer + 1][0, -1].float() for layer in layers}             # [d] each


def original_round(model, params, samples, reference, cfg, tau: float, whole_sequence: bool = True) -> float:
    """One sample per pass, the reference every time; returns the last step's loss.

    whole_sequence: logits and log_softmax of every position, then the mask; False: completion rows, float32
    softmax.
    """
    optimizer = torch.optim.AdamW(params, lr=cfg.lr, betas=(0.9, 0.95), weight_decay=cfg.weight_decay)
    rng, loss = torch.Generator().manual_seed(0), 0.0
    train, _ = heal.split(samples, heal.VAL_SHARE, rng)     # the same draws as heal.heal, so the same batches
    samples, per_epoch = [samples[i] for i in train], len(train) // cfg.heal_batch
    n_steps = cfg.epochs * per_epoch
    for step in range(n_steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(samples), generator=rng).tolist()
        optimizer.param_groups[0]["lr"] = cfg.lr * heal.lr_factor(step, n_steps)
        at = step % per_epoch * cfg.heal_batch
        batch, loss = [samples[i] for i in order[at:at + cfg.heal_batch]], 0.0
        n_tokens = sum(len(s.ids) - s.n_prompt for s in batch)
        for s in batch:
            ids, targets = torch.tensor([s.ids]), torch.tensor(s.ids[s.n_prompt:])              # [1, T], [n]
            with torch.no_grad(), reference():
                ref = model(input_ids=ids).logits[0, :-1]                       # [T - 1, V]
            logits = model(input_ids=ids).logits[0, :-1]                        # [T - 1, V]
            if whole_sequence:
                logp, logq = logits.log_softmax(-1), ref.log_softmax(-1)        # [T - 1, V]
                kl = (logp.exp() * (logp - logq)).sum(-1)[s.n_prompt - 1:]      # [n]
                nll = -logp[s.n_prompt - 1:].gather(1, targets[:, None])[:, 0]  # [n]
            else:
                nll, kl = heal.naive_losses(logits[s.n_prompt - 1:], ref[s.n_prompt - 1:], targets)
            barrier = torch.relu(heal.aggregate(kl, cfg.kl_agg) - tau)
            part = len(targets) / n_tokens * (nll.mean() + cfg.lam * barrier)
            part.backward()
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(params, heal.CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return loss
