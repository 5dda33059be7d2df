"""Methods: how each row of the tables becomes a dial on a model, and what one seed of it is measured at.

    cell(method, seed) -> dose response of the target's questions, transfer to all items at the scale that the
                          odd questions choose, parity of the update, and for some the answers' own text

A cell is a dict of plain numbers, so that a long table can be a file that grows. Everything a cell needs of
the untouched model (its pairs, its rows at dose 0, the nll of its own answers) is read once and shared.
Needs torch, the concept files, tools and the rest of this folder.
"""
import contextlib
import copy
import dataclasses
import math
import time
import warnings
from typing import Callable, NamedTuple

import torch
from torch import Tensor

import evalmfv
import heal
import lora
import steer
from innerpissa import contrast, dilemmas, dose, extract, rivals, spin
from innerpissa.dial import Dialed, check_rank, linears
from innerpissa.pairs import Pair, make_pairs
from tools import freetext, search
from tools.student import Student

VECTORS = {"random": "random", "mean": "mean", "PCA": "pca_diff", "fisher dual": "fisher_reg2_dual",
           "fisher dual cov": "fisher_reg2_dual_cov"}
ADAPTERS = ("LoRA by nll", "LoRA", "IA3", "VeRA", "ROAD", "DeLoRA", "InnerPiSSA notes", "InnerPiSSA")
METHODS = ("random", "PCA", "mean", "prompted", *ADAPTERS, "healed loop")
NOTES = dict(against="pair", at="end", n_read=3, barrier="logp")
RATE = {"LoRA by nll": 1e-3, "LoRA": 1e-3, "DeLoRA": 1e-3}  # less than the rotation's, which is clamped
SPOKEN = ("random", "mean", "prompted", "LoRA", "InnerPiSSA", "healed loop")        # whose text is read
STEERED, MAKE, NIGHT = (0.25, 0.75), 48, (1.0, 0.7, 0.5)    # the loop's: depths, completions, doses to try

# what of it is changed, by the options of the command; the last is the default itself
ABLATIONS = {
    "free odd K": dict(rotate="free"), "no rotation": dict(rotate="none"),
    "no scaling": dict(scale="none"), "mult": dict(scale="mult"), "U and V": dict(rotate="UV"),
    "notes' barrier (log p)": dict(barrier="logp"), "no barrier": dict(barrier="none"),
    "pairs' difference": dict(against="pair"), "read at the end": dict(at="end", n_read=3),
    "notes' loss": NOTES, "log-sigmoid": dict(separation="sigmoid"),
    "activation space": dict(space="activation"),
    "o_proj": dict(modules="o_proj"), "down_proj": dict(modules="down_proj"), "all modules": dict(modules=""),
    "early blocks": dict(band=(0.0, 0.3)), "late blocks": dict(band=(0.5, 0.75)),
    "largest S": dict(select="top"), "by the difference": dict(select="difference"),
    "as it is": {}}
FLOOR = ("fisher dual", "fisher dual cov")                  # one formula in the notes: their tables' noise


class Dial(NamedTuple):
    """A method on the model: `dialed` takes a dose, or a Tensor with one a row, to a context manager."""
    dialed: Callable
    doses: tuple = dose.DOSES
    systems: dict | None = None
    adapter: Dialed | None = None
    record: dict | None = None


class Bench:
    """A model, its texts and items, and how each method becomes a dial on it.

    Raises ValueError, before the model speaks, for a rank over the width or a target with too few items.
    """

    def __init__(self, cfg, scfg, ccfg, model, tok, given: dict, items, target: str, screen):
        self.model, self.tok, self.given, self.items, self.target = model, tok, given, items, target
        self.persona, self.screen, self.pad_id = given["persona"], screen, steer.pad_of(tok, model)
        self.cache, self.said = {}, {}
        self.set(cfg, scfg, ccfg)
        self.asked = [i for i, item in enumerate(items) if item.values.get(target)
                      and item.options == ("Yes", "No")]
        self.questions = [items[i].text for i in self.asked]
        self.signs = torch.tensor([[items[i].values[target]] for i in self.asked]).double()     # [n, 1]
        if len(self.questions) < 4:
            raise ValueError(f"--target {target!r}: {len(self.questions)} yes-or-no items have it, need 4")
        still = self.untouched
        self.base = dose.log_odds(model, tok, [i.text for i in items], still, (0.0,),
                                  options=[i.options for i in items])                           # [n, 1] each
        said = steer.generate(model, tok, given["held_out"], max_new_tokens=24, seed=cfg.seed)
        self.texts = list(zip(given["held_out"], said))     # the base's own answers, for the change of nll
        self.base_nll = dilemmas.nll(model, tok, self.texts, still, 0.0)

    def untouched(self, c):
        return steer.steered(self.model, {}, 0.0)

    def set(self, cfg, scfg, ccfg) -> None:
        n_blocks = len(steer.blocks(self.model))
        self.cfg, self.scfg, self.ccfg = cfg, scfg, ccfg
        self.block = contrast.block_of(self.model, ccfg.read)
        self.layers = search.band(n_blocks, *cfg.band)
        self.targets = [m.strip() for m in cfg.modules.split(",") if m.strip()] or None
        check_rank(linears(self.model, self.layers, self.targets), scfg.r)

    def changed(self, changes: dict) -> "Bench":
        """This bench with some options changed; what is read of the untouched model stays shared."""
        groups = [{k: v for k, v in changes.items() if k in c.__dataclass_fields__}
                  for c in (self.cfg, self.scfg, self.ccfg)]
        other = copy.copy(self)
        other.set(*[dataclasses.replace(c, **some)
                    for c, some in zip((self.cfg, self.scfg, self.ccfg), groups)])
        return other

    def pairs(self, seed: int) -> list[Pair]:
        key = self.cfg.n_pairs, self.ccfg.n_read, seed
        if key not in self.cache:
            self.cache[key] = make_pairs(
                self.model, self.tok, self.persona["pos"], self.persona["neg"], self.given["train"],
                n=self.cfg.n_pairs, n_read=self.ccfg.n_read, seed=seed)
        return self.cache[key]

    def reading(self, seed: int, *where) -> extract.Reading:
        key = self.cfg.n_pairs, self.ccfg.n_read, self.ccfg.at, self.block, where, seed
        if key not in self.cache:
            self.cache[key] = extract.read(self.model, self.pairs(seed), list(where), block=self.block,
                                           at=self.ccfg.at, pad_id=self.pad_id)
        return self.cache[key]

    # ---- a method as a dial

    @contextlib.contextmanager
    def dial_of(self, method: str, seed: int):
        """Inside the `with`, the method is on the model, dial at 0: yields its Dial."""
        if method == "prompted":
            k = seed % min(len(self.persona["pos"]), len(self.persona["neg"]))
            systems = {1.0: self.persona["pos"][k], 0.0: "", -1.0: self.persona["neg"][k]}
            yield Dial(self.untouched, (-1.0, 0.0, 1.0), systems)
        elif method in VECTORS:
            v = {self.block: extract.extract(self.reading(seed, self.block), self.block, VECTORS[method],
                                             seed=seed)}
            yield Dial(lambda c: steer.steered(self.model, v, c))
        else:
            tensors = self.healed(seed) if method == "healed loop" else None
            made = rivals.given(self.model, tensors) if tensors else self.adapter(method, seed)
            try:
                record = None if tensors else self.trained(made, method, seed)
                yield Dial(made.dialed, adapter=made, record=record)
            finally:
                made.remove()

    def adapter(self, method: str, seed: int) -> Dialed:
        how = dict(layers=self.layers, targets=self.targets, seed=seed)
        if not method.startswith("InnerPiSSA"):
            return rivals.rival(self.model, method.split()[0], r=self.scfg.r, **how)
        states = None
        if self.scfg.select != "top":
            reading = self.reading(seed, *linears(self.model, self.layers, self.targets))
            states = {name: tuple(h) for name, h in reading.h.items()}
        made = spin.spin(self.model, self.scfg, states=states, **how)
        odd, even = spin.sizes(made)
        self.screen.say(method, seed, f"before training |odd| {odd:.4f}  |even| {even:.4f}")
        return made

    def trained(self, made: Dialed, method: str, seed: int) -> dict:
        ccfg = dataclasses.replace(self.ccfg, lr=RATE.get(method, self.ccfg.lr))
        some, loss = self.pairs(seed), None
        if method.endswith("nll"):
            loss = rivals.nll_terms(made, pad_id=self.pad_id)
        n_steps = ccfg.epochs * math.ceil((1 - heal.VAL_SHARE) * len(some) / ccfg.batch)
        with self.screen.watch(method, seed, "training, steps", n_steps) as tick:
            return contrast.contrast(made, some, ccfg, seed=seed, pad_id=self.pad_id, r=self.scfg.r,
                                     loss=loss, log=tick)

    def healed(self, seed: int) -> dict[str, Tensor]:
        """One night and one day of the loop at a given place: its adapter, keys as in lora.py.

        The dose is the first of NIGHT whose answers pass the filter by half, as in the loop's search.
        """
        model, tok, persona, n_blocks = self.model, self.tok, self.persona, len(steer.blocks(self.model))
        lcfg = lora.LoraConfig()
        stack = lora.attach(model, r=lcfg.r, alpha=lcfg.alpha, layers=search.band(n_blocks, *lcfg.lora_band),
                            seed=seed)
        try:
            sampling = dict(max_new_tokens=24, temperature=1.0, top_p=0.95, batch_size=128)
            student = Student(model, tok, stack, self.screen, **self.given, seed=seed, sampling=sampling,
                              think_tokens=8, n_text=0)
            vectors = steer.fit_vectors(model, tok, persona["pos"], persona["neg"], self.given["contexts"],
                                        search.band(n_blocks, *STEERED))
            limits = student.calibrate(24, None)["limits"]
            for coeff in NIGHT:
                judged = student.judged(student.answers(student.spread(MAKE), "make", 0, vectors=vectors,
                                                        coeff=coeff), limits)
                if len(kept := student.kept(judged)) >= MAKE / 2:
                    break
            else:
                raise RuntimeError(f"healed loop: {len(kept)} of {MAKE} answers pass at dose {coeff:g}; "
                                   "give a clearer persona")
            tau = 1.5 * student.persona_distance(kept, "rmse", "kl_rev")
            width = model.config.get_text_config().hidden_size
            samples = [heal.Sample(c.prompt_ids + c.ids, len(c.prompt_ids), c.prompt) for c in kept]
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "the barrier")        # whether it fired is not asked here
                heal.heal(model, stack.parameters(), samples, lambda: stack.gated(0, 0),
                          heal.HealConfig(tau=tau, lr=0.2 / width), seed=seed, pad_id=self.pad_id)
            stack.fold()
            return stack.tensors([0])
        finally:
            stack.remove()

    # ---- one cell

    def cell(self, method: str, seed: int, changes: dict | None = None) -> tuple[dict, Dialed | None]:
        """What one seed of a method gives, in plain numbers, and its adapter, now off the model."""
        bench = self.changed((NOTES if method.endswith("notes") else {}) | (changes or {}))
        began = time.process_time()
        with bench.dial_of(method, seed) as dial:
            y, mass = dose.log_odds(self.model, self.tok, self.questions, dial.dialed, dial.doses,
                                    systems=dial.systems, base=[x[self.asked] for x in self.base])
            y = y * self.signs                                                                  # [n, k]
            scored, scale = dose.held_out(y, mass, dial.doses)
            moved = dilemmas.measure(self.model, self.tok, self.items, dial.dialed, scale, self.target,
                                     texts=self.texts, systems=dial.systems, base=self.base,
                                     base_nll=self.base_nll)
            record = dial.record
            found = dict(method=method, seed=seed, changes=changes or {}, scale=scale, score=scored._asdict(),
                         transfer=moved._asdict(), doses=dial.doses, y=y.mean(0).tolist(),
                         parity=rivals.parity(dial.adapter) if dial.adapter else None,
                         held=record and record["held"], flipped=bool(record and record["flipped"]))
            if method in SPOKEN and not changes and self.cfg.n_text:
                found["text"] = self.text(dial, scale, seed)
        return found | dict(cpu=round(time.process_time() - began, 1)), dial.adapter

    def speak(self, dial: Dial, c: float, seed: int) -> tuple[list, list, Tensor]:
        """(ids, nlls under the base's two prompts, persona_ratio [n]) of answers sampled at this dose."""
        held, P, n = self.given["held_out"], self.persona, self.cfg.n_text
        users, model, tok = [held[i % len(held)] for i in range(n)], self.model, self.tok
        with dial.dialed(c):
            made = steer.generate(model, tok, users, system=(dial.systems or {}).get(c, ""), seed=seed,
                                  max_new_tokens=24)

        def behind(system):                                 # as the base scores them behind this prompt
            fronts = steer.encode(tok, users, [system] * n)
            rows = [dataclasses.replace(a, prompt_ids=front) for a, front in zip(made, fronts)]
            return steer.token_nll(model, rows, pad_id=self.pad_id)
        with dial.dialed(0.0):
            nlls = steer.mixture_nll(behind(""), behind(P["pos"][0]))
            ratios = evalmfv.persona_ratio(model, tok, made, users, P["meter_pos"], P["meter_neg"])
        return [a.ids for a in made], nlls, ratios

    def text(self, dial: Dial, c: float, seed: int) -> dict:
        """Share of the persona prompt's trait (base 0, prompt 1), its error, and coherence, at dose c."""
        if seed not in self.said:
            with self.dial_of("prompted", 0) as prompt:
                self.said[seed] = self.speak(prompt, 0.0, seed), self.speak(prompt, 1.0, seed)
        base, prompted = self.said[seed]
        ids, nlls, ratios = self.speak(dial, c, seed)
        coherence = freetext.free_text(ids, nlls, base[0] + prompted[0], base[1] + prompted[1])["score"]
        try:
            share, se = freetext.persona_share(ratios, base[2], prompted[2])
        except ValueError:                                  # the prompt itself moves nothing: no scale
            share, se = math.nan, math.nan
        return dict(share=share, se=se, coherence=coherence)
