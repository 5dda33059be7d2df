"""Student: the model with its folded rounds: what it answers, how the base scores that, a row of the table.

Every answer is scored under the untouched base, whatever is folded: coherence under the mixture of its two
prompts, bare and the persona's; the trait by how much likelier the persona is to say it than its opposite. A
stage's draws are seeded by (seed, round, stage), so an evaluation that is added changes no other's samples.
"""
import contextlib
import dataclasses
import math
import zlib

import torch

import evalmfv
import heal
import steer
from tools import freetext, ranks, search
from tools.files import inert, plain
from tools.foresee import foresee
from tools.screen import Screen

N_DIARY = 6                 # held-out prompts answered greedily for the diary: as many as a reader reads
N_TRIAL = 16                # answers that tell whether the base bears a temperature
N_FORESEE, N_TOKENS = 8, 24             # answers that the search of the band reads: exact means need few


def stage_seed(seed: int, rnd: int, stage: str) -> int:
    return zlib.crc32(f"{seed}/{rnd}/{stage}".encode())


def why_dropped(judged: list[dict]) -> str:
    """Which rule dropped how many, with a sample of each; "" if nothing was."""
    parts = []
    for rule in dict.fromkeys(e["verdict"]["rule"] for e in judged if not e["verdict"]["kept"]):
        hits = [e for e in judged if e["verdict"]["rule"] == rule]
        verdict, side = hits[0]["verdict"], "under" if rule == "words" else "over"
        parts.append(f"{rule} dropped {len(hits)}, such as \"{inert(hits[0]['text'])[:80]}\" with "
                     f"{verdict['value']:.3g} {side} a limit of {verdict['limit']:.3g}")
    return "; ".join(parts)


class Student:
    """Takes a model, its stack, a persona and the texts; sampling: the keywords of `steer.generate`."""

    def __init__(self, model, tok, stack, screen: Screen, *, persona: dict, train: list[str],
                 held_out: list[str], vignettes: list[dict], contexts: list[str], seed: int, sampling: dict,
                 think_tokens: int, n_text: int):
        self.model, self.tok, self.stack, self.screen, self.seed = model, tok, stack, screen, seed
        self.persona, self.train, self.held_out = persona, train, held_out
        self.vignettes, self.contexts = vignettes, contexts
        self.sampling, self.think_tokens, self.n_text = sampling, think_tokens, n_text
        self.pad_id = steer.pad_of(tok, model)
        self.fronts = steer.encode(tok, train, [""] * len(train))
        self.check_room()

    def check_room(self) -> None:
        """ValueError if the longest text that will be asked for does not fit into the model."""
        room = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or math.inf
        probe = evalmfv.question(max((v["text"] for v in self.vignettes), key=len), evalmfv.FOUNDATIONS)
        n_answer = self.sampling["max_new_tokens"]
        for option, asked, n_new in (("max-new-tokens", self.train + self.held_out, n_answer),
                                     ("think-tokens", [probe], self.think_tokens)):
            n_asked = max(map(len, steer.encode(self.tok, asked, [self.persona["pos"][0]] * len(asked))))
            if n_asked + n_new > room:
                raise ValueError(f"--{option} {n_new}: with the longest question of {n_asked} tokens it does "
                                 f"not fit into the model's {room}")

    # ---- answers and their scores

    def answers(self, prompts, stage, rnd, *, draws=None, system="", vectors=None, coeff=0.0, greedy=False):
        """One completion per prompt, by default from (stage, round)'s draws."""
        name, of = draws or (stage, rnd or 0)
        n_passes = math.ceil(len(prompts) / self.sampling["batch_size"]) * self.sampling["max_new_tokens"]
        with self.screen.watch(stage, rnd, f"{len(prompts)} answers, tokens", n_passes, self.model):
            return steer.generate(self.model, self.tok, prompts, system=system, greedy=greedy,
                                  vectors=vectors, coeffs=[coeff] * len(prompts) if vectors else None,
                                  seed=stage_seed(self.seed, of, name), **self.sampling)

    def spread(self, n: int) -> list[str]:
        """n training prompts, each as often as the next."""
        return [self.train[i % len(self.train)] for i in range(n)]

    def under(self, system: str, completions, prompts) -> list[steer.Completion]:
        """The same answers, to be scored as if they had been given under this system prompt."""
        fronts = steer.encode(self.tok, prompts, [system] * len(prompts))
        return [dataclasses.replace(c, prompt_ids=fronts[c.prompt % len(fronts)]) for c in completions]

    def yardstick(self, completions, prompts) -> list[torch.Tensor]:
        """Nats per token [n_i] under the mixture of the base's two prompts, bare and the persona's."""
        with self.stack.gated(0, 0):
            return steer.mixture_nll(*(steer.token_nll(self.model, self.under(system, completions, prompts),
                                                       pad_id=self.pad_id)
                                       for system in ("", self.persona["pos"][0])))

    def ratios(self, completions, prompts) -> torch.Tensor:
        """The label-free trait of each answer, [n] nats per token, by texts that did not fit the vector."""
        users, persona = [prompts[c.prompt % len(prompts)] for c in completions], self.persona
        with self.stack.gated(0, 0):
            return evalmfv.persona_ratio(self.model, self.tok, completions, users, persona["meter_pos"],
                                         persona["meter_neg"])

    def judged(self, completions, limits: steer.Limits, prompts=None) -> list[dict]:
        """Each completion with its verdict, as it stands in the journal."""
        found = steer.judge(completions, self.yardstick(completions, prompts or self.train), limits,
                            patterns=self.persona["patterns"])
        return [plain(dict(prompt=c.prompt % len(self.train), coeff=c.coeff, finished=c.finished, ids=c.ids,
                           text=c.text, verdict=v)) for c, v in zip(completions, found)]

    def kept(self, judged: list[dict]) -> list[steer.Completion]:
        """What the filter let through, as completions again."""
        return [steer.Completion(e["prompt"], self.fronts[e["prompt"]], e["ids"], e["coeff"], e["finished"],
                                 e["text"]) for e in judged if e["verdict"]["kept"]]

    def calibrate(self, n: int, temperature: float | None) -> dict:
        """The sampling temperature and the filter's limits, from n answers of the base to training prompts
        and n of the prompted base. `own_ids`, `own_nll`: both, what free text is held against."""
        for self.sampling["temperature"] in [temperature] if temperature else search.TEMPERATURES:
            trial = self.answers(self.spread(min(n, N_TRIAL)), "temperature", None)
            with self.stack.gated(0, 0):
                calm = torch.cat(steer.token_nll(self.model, trial, pad_id=self.pad_id)).mean().item()
            calm = ranks.lead(lambda: calm)             # what is decided by is rank 0's to the last digit
            if calm <= search.MAX_NLL:
                break
        own = self.answers(self.spread(n), "own", None)
        # the trait itself is no incoherence: what the prompted base says must pass the filter too
        voiced = self.answers(self.spread(n), "own", None, system=self.persona["pos"][0])
        nlls = self.yardstick(own + voiced, self.train)
        limits = search.calibrate_limits([steer.readings(c, nll) for c, nll in zip(own + voiced, nlls)])
        return dict(limits=limits, temperature=self.sampling["temperature"], nll=calm,
                    own=[c.text for c in own], voiced=[c.text for c in voiced],
                    own_ids=[c.ids for c in own + voiced], own_nll=nlls)

    def band(self, bands: list[list[int]], vectors: dict) -> dict:
        """Which blocks to steer, by what steering there would make the base say next: {steer, limit, trials}.

        What it may cost is a tenth more nats than the base's own, or the persona prompt's if that is more.
        """
        if len(bands) == 1:
            return dict(steer=bands[0], trials=[])
        users, persona = self.spread(N_FORESEE), self.persona
        answers = [dataclasses.replace(c, ids=c.ids[:N_TOKENS]) for c in self.answers(users, "band", None)]

        def try_cells(cells):
            def read(rows):                             # the first two are the base and the persona's prompt
                with self.stack.gated(0, 0):
                    found = foresee(self.model, self.tok, answers, users, persona["meter_pos"],
                                    persona["meter_neg"], vectors, [cells[i] for i in rows if i >= 0])
                return dict(zip((-2, -1, *(i for i in rows if i >= 0)), found))
            found = ranks.spread(read, list(range(-2, len(cells))))
            return [found[i] for i in range(-2, len(cells))]
        (_, own), (_, prompted) = try_cells([])
        limit = max(1.1 * own, prompted)
        chosen, ranked = search.find_band(lambda cells: try_cells(cells)[2:], bands, limit)
        return dict(steer=chosen, limit=limit,
                    trials=[dict(band=band, ratio=effect, coeff=dose) for band, effect, dose in ranked])

    def dose(self, rnd: int, limits: steer.Limits, vectors: dict, first: float, *, min_survive: float,
             system: str = "") -> dict:
        """The dose near `first` with the most trait of which enough answers pass the filter: {coeff, trials}.

        trials: {coeff, ratio, se, survive} of each dose tried, the mean trait of the answers that pass, its
        standard error and their share. All doses of a step are one batch with the same draws. RuntimeError if
        none survives.
        """
        rng = torch.Generator().manual_seed(stage_seed(self.seed, rnd, "probed prompts"))
        order = torch.randperm(len(self.train), generator=rng).tolist()
        probed = [self.train[i] for i in order[:search.N_PROBE]]
        n, seed, trials, last = len(probed), stage_seed(self.seed, rnd, "probe"), [], []

        def try_doses(coeffs):
            n_passes = self.sampling["max_new_tokens"]
            with self.screen.watch("dose", rnd, f"{len(coeffs)} doses, tokens", n_passes, self.model):
                tried = steer.generate(self.model, self.tok, probed * len(coeffs), system=system, n_draws=n,
                                       vectors=vectors, coeffs=[coeff for coeff in coeffs for _ in probed],
                                       seed=seed, **self.sampling)
            found, ratios = self.judged(tried, limits, probed), self.ratios(tried, probed)      # ratios [n]
            for i, coeff in enumerate(coeffs):
                last[:] = found[i * n:(i + 1) * n]
                passed = torch.tensor([e["verdict"]["kept"] for e in last])                         # [n] bool
                read = ratios[i * n:(i + 1) * n][passed]
                ratio = read.mean().item() if len(read) else -math.inf
                se = evalmfv.standard_error(read).nan_to_num().item() if len(read) else 0.0
                trials.append(dict(coeff=coeff, ratio=ratio, se=se, survive=passed.double().mean().item()))
            return ranks.lead(lambda: [(x["ratio"], x["se"], x["survive"]) for x in trials[-len(coeffs):]])
        try:
            coeff, _, bound = search.find_dose(try_doses, first, min_survive=min_survive)
        except RuntimeError as error:
            raise type(error)(f"{error}. {why_dropped(last)}") from error       # the same kind
        if bound:
            self.screen.say("dose", rnd, f"warning: the search ended on its bound, {bound}", "yellow")
        return dict(coeff=coeff, trials=trials)

    # ---- a row of the table

    def measured(self, kind, rnd, label, *, own, base, prompted, system="", vectors=None, coeff=0.0) -> dict:
        """What is measured on held-out items, the same for every row: the probe, free text, the diary.

        own: token ids and nats of the base's own answers. base, prompted: those rows, None before they exist.
        """
        sampler = dict(draws=("text", 0), system=system, vectors=vectors, coeff=coeff)
        batch_size = self.sampling["batch_size"]
        n_passes = math.ceil(2 * len(self.vignettes) / batch_size) * (self.think_tokens + 1)
        with (steer.steered(self.model, vectors, coeff) if vectors else contextlib.nullcontext(),
              self.screen.watch(kind, rnd, "probe, tokens", n_passes, self.model)):
            probe = evalmfv.evaluate(self.model, self.tok, self.vignettes, think_tokens=self.think_tokens,
                                     batch_size=batch_size, system=system)
        # the same draws for every row: rows differ by their model
        asked = [self.held_out[i % len(self.held_out)] for i in range(self.n_text)]
        texts = self.answers(asked, kind, rnd, **sampler)
        diary = self.answers(self.held_out[:N_DIARY], kind, rnd, greedy=True, **sampler)

        nlls, ratios = self.yardstick(texts + diary, self.held_out), self.ratios(texts, self.held_out)
        free, told = (freetext.free_text([c.ids for c in said], found, *own)
                      for said, found in ((texts, nlls[:len(texts)]), (diary, nlls[len(texts):])))
        row = dict(label=label, probe=probe, nats=probe["nats"], coherence=probe["coherence"], coeff=coeff,
                   text=free["score"], text_se=free["se"], texts=[c.text for c in texts],
                   windows=free["per_item"], nll=torch.cat(nlls[:len(texts)]).mean(), ratios=ratios,
                   persona_ratio=ratios.mean(), persona_ratio_se=evalmfv.standard_error(ratios),
                   **self.share(kind, ratios, base, prompted),
                   diary=[dict(prompt=self.held_out[c.prompt], text=c.text, coherence=share)
                          for c, share in zip(diary, told["per_item"])])
        moved = ratios - torch.tensor(base["ratios"]).double() if base else 0 * ratios  # [n_text]  paired
        row |= dict(moved=moved.mean(), moved_se=evalmfv.standard_error(moved))
        if self.persona["target"] is None:              # no foundation: the trait is the ratio's move
            return row | dict(trait=row["moved"], trait_se=row["moved_se"], shift=None)
        move = evalmfv.shift(probe, (base or row)["probe"], self.persona["target"], self.persona["direction"])
        return row | dict(trait=move["trait"] + 0.0, trait_se=move["se"], shift=move)   # -0.0 + 0.0 is 0.0

    def share(self, kind: str, ratios, base: dict | None, prompted: dict | None) -> dict:
        """Where a row lies between base, 0, and persona prompt, 1; None where the prompt moves nothing."""
        if kind == "base":
            return dict(share=0.0, share_se=0.0)
        ends = [ratios if row is None else torch.tensor(row["ratios"]).double() for row in (base, prompted)]
        try:
            share, se = freetext.persona_share(ratios, *ends)
        except ValueError as error:
            if kind == "prompted":                      # once: the later rows are on the same scale
                self.screen.say(kind, None, f"warning: {error}", "yellow")
            return dict(share=None, share_se=None)
        return dict(share=share, share_se=se)

    # ---- what surrounds the healing

    def persona_distance(self, kept, how: str, reg: str) -> float:
        """How far the persona prompt alone takes the base from itself, on the kept completions: mean D, nats.

        It makes tau a set point: a healed model may stand about as far from the base as the prompted one.
        Both readings are of the same completion tokens; only the system prompt in front of them differs.
        """
        def behind(front):
            read = self.under(front, kept, self.train)
            return [heal.Sample(c.prompt_ids + c.ids, len(c.prompt_ids), c.prompt) for c in read]
        with self.stack.gated(0, 0):
            prompted = behind(self.persona["pos"][0])
            kls = self.divergences(prompted, contextlib.nullcontext, ref_samples=behind(""), reg=reg)
        return sum(heal.aggregate(kl, how).item() for kl in kls) / len(kls)

    def divergences(self, samples, reference, *, pass_tokens: int = 2048, **how) -> list[torch.Tensor]:
        """KL at every completion position of the model as it is now: nats, one [n_i] per sample."""
        passes = heal.Passes(self.model, samples, reference, pad_id=self.pad_id, **how)
        found = ranks.spread(lambda rows: passes.measured(rows, pass_tokens), list(range(len(samples))))
        return [found[i][1].cpu() for i in range(len(samples))]

    def worst_kept(self, samples, reference, vectors: dict, coeff: float, *, reg: str, **how) -> dict:
        """The kept completion that the student leaves furthest from the reference (rmse), token by token.

        Returns {prompt, tokens, day, before, night}, the last three its KL [n] in nats: the student's, the
        one's as the round began, and that one's steered.
        """
        def before():
            return self.stack.gated(1, 0)

        @contextlib.contextmanager
        def dreaming():
            with before(), steer.steered(self.model, vectors, coeff):
                yield

        def kl(of, against, reg):
            return self.divergences(of, against, reg=reg, **how)
        kls = kl(samples, reference, reg)
        worst = max(range(len(kls)), key=lambda i: heal.aggregate(kls[i], "rmse").item())
        sample = samples[worst]
        with before():
            start = kl([sample], reference, reg)[0]                             # [n]
        with reference():                               # the other way round: only the dream is steered
            night = kl([sample], dreaming, "kl_rev" if reg == "kl_fwd" else "kl_fwd")[0]        # [n]
        ids = sample.ids[sample.n_prompt:]
        texts = [self.tok.decode(ids[:n]) for n in range(len(ids) + 1)]     # a token alone may lose its space
        return dict(prompt=sample.group, tokens=[b[len(a):] for a, b in zip(texts, texts[1:])],
                    day=kls[worst], before=start, night=night)
