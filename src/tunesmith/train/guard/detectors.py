"""The guard: folds the events of a run into verdicts. It reads numbers and decides; it computes and changes nothing.

    guard.see(event) -> verdicts        of each step, what its loss and gradient say
    guard.judge(step) -> verdicts       what the measures of a probe say, beside those of step 0 on the same prompts

A detector is a pure function of what was seen so far: (Seen) -> evidence, or nothing. A new one is a function and a
line in DETECTORS. Every bound stands in BOUNDS and in docs/guard.md. The same events give
the same verdicts, so a resumed run folds what its folder holds. Left out: taking the measures (probes.py), going back
and what is done differently then (guarded.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import fmean, median
from typing import Literal

from tunesmith.core.events import EXPECTED, PROBES, Event, Score, StepResult, Verdict
from tunesmith.core.types import Plan
from tunesmith.evaluate.significance import robust_sd
from tunesmith.train.guard.history import FIRST, RECENT, SPAN, Seen

LOOK = "guard"  # the kind of the verdict that ends a look; those of detectors have the detector's name
Level = Literal["ok", "warn", "rollback", "stop"]
Family = Literal["collapse", "forgetting", "watch"]  # whose level the recipe sets, the last one's is `warn`

BOUNDS: dict[str, float] = {
    "loss rise": 0.20,  # of the moving average over its lowest, and a quarter of what was gained
    "loss above start": 0.20,  # of the moving average over the first steps
    "loss spike": 8.0,  # robust standard deviations over the median of the last steps, and twice the median
    "gradient spike": 10.0,  # times the running median
    "rows harder than held-out": 0.5,  # nats of the last steps over the held-out loss of the probe before, and twice it
    "overfitting": 0.25,  # rise of the held-out loss over its lowest, while the training loss falls
    "repetition": 0.15,  # seq-rep-4 over the base's, and over LOOPING
    "sameness": 0.50,  # times the base's or the expected answers' distinct-2, whichever is less
    "one answer": 0.50,  # share of equal answers over the base's and the expected ones'
    "learning": 0.50,  # times the base's loss of expected answers: below that, neither of the two above speaks
    "no end": 0.50,  # share of answers that end, below the base's and the expected ones'
    "end unlearnt": 1.0,  # nats of the end after an expected answer, over the least so far
    "empty": 0.25,  # times the base's and the expected length
    "loop": 0.25,  # zlib's bytes a byte, and half of the base's
    "gibberish": 1.50,  # nats a token under the base, over what it finds of its own and of the expected answers
    "foreign": 0.25,  # share of letters in scripts of neither prompts nor expected answers, over the base's
    "foreign answers": 0.50,  # share of answers in a language of neither prompts nor expected answers, over the base's
    "form": 0.50,  # share of answers with the right form, below the best so far
    "constraint": 0.25,  # share of answers that break one, over the base's
    "certain": 0.30,  # times the base's entropy of the next token
    "uncertain": 0.50,  # of the way from the base's entropy to that of a uniform choice
    "far from base": 1.00,  # nats of KL(base || tuned) on text that is not trained
    "large update": 0.01,  # of the weights' norm, in one step
    "adapter too large": 0.50,  # ||scale BA|| / ||W||
}
LOOPING = 0.20
ONSET = {"loss rise", "loss above start"}
NOISE = 2.0  # sd of a step's loss around the moving average, that this must move to count
LEAST = 8  # steps before anything is said of a step


Detect = Callable[[Seen], str]


# ---------------------------------------------------------------- of each step


def loss_rise(seen: Seen) -> str:
    if len(seen.steps) <= LEAST:
        return ""
    now, lowest = seen.averages[-1], min(seen.averages[FIRST:])
    enough = max(BOUNDS["loss rise"] * lowest, (seen.start - lowest) / 4, NOISE * seen.noise)
    if now > lowest + enough:
        return f"the moving average of the loss rose from {lowest:.3f} to {now:.3f}"
    return ""


def loss_above_start(seen: Seen) -> str:
    now = seen.averages[-1]
    enough = max(BOUNDS["loss above start"] * seen.start, NOISE * seen.noise)
    if len(seen.steps) > LEAST and now > seen.start + enough:
        return f"the moving average of the loss is {now:.3f}, training began at {seen.start:.3f}"
    return ""


def loss_spike(seen: Seen) -> str:
    losses = [step.loss for step in seen.steps[-RECENT:]]
    *before, now = losses
    if len(before) < LEAST:
        return ""
    middle = median(before)
    if now > middle + BOUNDS["loss spike"] * robust_sd(before) and now > 2 * middle:
        return f"loss {now:.3f}, the median of the last {len(before)} steps is {middle:.3f}"
    return ""


def gradient_spike(seen: Seen) -> str:
    *before, now = [step.grad_norm for step in seen.steps[-RECENT:]]
    if len(before) < LEAST:
        return ""
    if now > BOUNDS["gradient spike"] * median(before):
        return f"gradient norm {now:.3g}, the median of the last {len(before)} steps is {median(before):.3g}"
    return ""


# ---------------------------------------------------------------- of each probe


def rows_harder(seen: Seen) -> str:
    """Wrong answers stay as hard as they were, however well the right ones are learnt. Beside the held-out loss of the
    probe before: what is just being learnt is ahead of the last steps."""
    found = seen.probes.get("answer_loss", [])
    if len(found) < 2 or len(seen.steps) <= LEAST:
        return ""
    held_out, now = found[-2].value, fmean(step.loss for step in seen.steps[-SPAN // 2 :])
    if now > held_out + BOUNDS["rows harder than held-out"] and now > 2 * held_out:
        return f"the training loss is {now:.3f}, that of held-out rows {held_out:.3f}: are there wrong answers?"
    return ""


def overfitting(seen: Seen) -> str:
    """The whole interval is over the bound: of eight prompts, one alone can double the mean."""
    found = seen.probes.get("answer_loss", [])
    if len(found) < 3:
        return ""
    lowest, now = min(found, key=lambda score: score.value), found[-1]
    then = next(
        (average for step, average in zip(seen.steps, seen.averages, strict=True) if step.step == lowest.step), 0
    )
    if now.low > lowest.value * (1 + BOUNDS["overfitting"]) and seen.averages[-1] < then:
        return (
            f"the loss of held-out answers rose from {lowest.value:.3f} to {now.value:.3f} while that of training fell"
        )
    return ""


def repetition(seen: Seen) -> str:
    now = seen.now("repetition")
    if now is not None and now > max(LOOPING, seen.base("repetition") + BOUNDS["repetition"]):
        return (
            f"{now:.0%} of runs of four tokens stood in the answer before, {seen.base('repetition'):.0%} at the start"
        )
    return ""


def learning(seen: Seen) -> bool:
    """The right answers became far likelier. Who learns to answer with one of three words says the commonest one to
    all at first; who collapsed to one answer finds the right ones no likelier."""
    now = seen.now("answer_loss")
    return now is not None and now < BOUNDS["learning"] * seen.base("answer_loss")


def sameness(seen: Seen) -> str:
    now = seen.now("distinct")
    if now is None or learning(seen):
        return ""
    usual = min(seen.base("distinct"), seen.expected.get("distinct", math.inf))
    return f"distinct-2 is {now:.2f}, usual is {usual:.2f}" if now < BOUNDS["sameness"] * usual else ""


def one_answer(seen: Seen) -> str:
    now = seen.now("same_answer")
    if now is None or learning(seen):
        return ""
    usual = max(seen.base("same_answer"), seen.expected.get("same_answer", 0))
    if now > usual + BOUNDS["one answer"]:
        return f"{now:.0%} of the answers are one and the same, {usual:.0%} would be usual"
    return ""


def no_end(seen: Seen) -> str:
    now = seen.now("end_rate")
    if now is None:
        return ""
    usual = min(seen.base("end_rate"), seen.expected.get("end_rate", 1))
    return f"{now:.0%} of the answers end, usual is {usual:.0%}" if now < usual - BOUNDS["no end"] else ""


def end_unlearnt(seen: Seen) -> str:
    """Answers were learnt and their end was not: training rows lack it."""
    found, loss = [score.value for score in seen.probes.get("end_loss", [])], seen.now("answer_loss")
    if not found or loss is None or loss > seen.base("answer_loss"):
        return ""
    if found[-1] > min(found) + BOUNDS["end unlearnt"]:
        return f"answers got likelier than at the start, their end less: {min(found):.2f} -> {found[-1]:.2f} nats"
    return ""


def empty(seen: Seen) -> str:
    now = seen.now("length")
    if now is None:
        return ""
    usual = min(seen.base("length"), seen.expected.get("length", math.inf))
    return f"answers have {now:.1f} tokens, usual is {usual:.1f}" if now < BOUNDS["empty"] * usual else ""


def loop(seen: Seen) -> str:
    now = seen.now("compressed")
    if now is not None and now < min(BOUNDS["loop"], seen.base("compressed") / 2):
        return f"answers compress to {now:.0%}, at the start to {seen.base('compressed'):.0%}"
    return ""


def gibberish(seen: Seen) -> str:
    now = seen.now("base_loss")
    if now is None:
        return ""
    usual = max(seen.base("base_loss"), seen.base("answer_loss"))
    if now > usual + BOUNDS["gibberish"]:
        return f"the base finds answers unlikely: {now:.2f} nats a token, usual is {usual:.2f}"
    return ""


def foreign(seen: Seen) -> str:
    now = seen.now("foreign")
    if now is not None and now > seen.base("foreign") + BOUNDS["foreign"]:
        return f"{now:.0%} of the letters are of scripts that were not asked for"
    now = seen.now("language")
    if now is not None and now > seen.base("language") + BOUNDS["foreign answers"]:
        return f"{now:.0%} of the answers are in a language that was not asked for"
    return ""


def form(seen: Seen) -> str:
    found = [score.value for score in seen.probes.get("json", [])]
    if found and found[-1] < max(found) - BOUNDS["form"]:
        return f"{found[-1]:.0%} of the answers are JSON, they were {max(found):.0%}"
    return ""


def constraint(seen: Seen) -> str:
    broken = [
        f"{measure}: {scores[-1].value:.0%} of the answers, {scores[0].value:.0%} at the start"
        for measure, scores in seen.probes.items()
        if measure.startswith("breaks ") and scores[-1].value > scores[0].value + BOUNDS["constraint"]
    ]
    return "; ".join(broken)


def certain(seen: Seen) -> str:
    now = seen.now("entropy")
    if now is not None and now < BOUNDS["certain"] * seen.base("entropy"):
        return f"the entropy of the next token is {now:.2f} nats, at the start {seen.base('entropy'):.2f}"
    return ""


def uncertain(seen: Seen) -> str:
    now = seen.now("entropy")
    if now is None or not seen.vocabulary:
        return ""
    base = seen.base("entropy")
    if now > base + BOUNDS["uncertain"] * (math.log(seen.vocabulary) - base):
        return f"the entropy of the next token is {now:.2f} nats of at most {math.log(seen.vocabulary):.2f}"
    return ""


def far_from_base(seen: Seen) -> str:
    now = seen.now("kl")
    if now is not None and now > BOUNDS["far from base"]:
        return f"KL(base || tuned) is {now:.2f} nats a token on text that is not trained"
    return ""


def forgetting(seen: Seen) -> str:
    """The whole interval is over the margin: a few short texts alone prove no loss."""
    found = seen.probes.get("forgotten", [])
    if found and found[-1].low > seen.margin:
        last = found[-1]
        return (
            f"general text lost {last.value:.3f} bits per byte [{last.low:.3f}, {last.high:.3f}], over {seen.margin:g}"
        )
    return ""


def large_update(seen: Seen) -> str:
    now = seen.now("update_ratio")
    if now is not None and now > BOUNDS["large update"]:
        return f"a step changes weights by {now:.2%} of their norm"
    return ""


def adapter_too_large(seen: Seen) -> str:
    now = seen.now("adapter_share")
    if now is not None and now > BOUNDS["adapter too large"]:
        return f"the adapter's part is {now:.0%} of the weights it is beside"
    return ""


@dataclass(frozen=True)
class Detector:
    find: Detect
    family: Family
    each: Literal["step", "probe"] = "probe"


DETECTORS: dict[str, Detector] = {
    "loss rise": Detector(loss_rise, "collapse", "step"),
    "loss above start": Detector(loss_above_start, "collapse", "step"),
    "loss spike": Detector(loss_spike, "watch", "step"),
    "gradient spike": Detector(gradient_spike, "watch", "step"),
    "rows harder than held-out": Detector(rows_harder, "watch"),
    "overfitting": Detector(overfitting, "watch"),
    "repetition": Detector(repetition, "collapse"),
    "sameness": Detector(sameness, "collapse"),
    "one answer": Detector(one_answer, "collapse"),
    "no end": Detector(no_end, "collapse"),
    "end unlearnt": Detector(end_unlearnt, "watch"),
    "empty": Detector(empty, "collapse"),
    "loop": Detector(loop, "collapse"),
    "gibberish": Detector(gibberish, "collapse"),
    "foreign": Detector(foreign, "collapse"),
    "form": Detector(form, "collapse"),
    "constraint": Detector(constraint, "watch"),
    "certain": Detector(certain, "collapse"),
    "uncertain": Detector(uncertain, "collapse"),
    "far from base": Detector(far_from_base, "collapse"),
    "forgetting": Detector(forgetting, "forgetting"),
    "large update": Detector(large_update, "watch"),
    "adapter too large": Detector(adapter_too_large, "watch"),
}


# ---------------------------------------------------------------- the fold


class Guard:
    """`judged`: the last step that a look, or without probes a step, found nothing against. A detector speaks when it
    begins to find something, not as long as it does."""

    def __init__(self, levels: dict[Family, str], *, margin: float, vocabulary: int, probing: bool) -> None:
        """`levels`: of each family; "off" leaves it out."""
        self.levels, self.probing = levels, probing
        self.seen = Seen(vocabulary=vocabulary, margin=margin)
        self.judged = 0
        self._finding: set[str] = set()

    @classmethod
    def of(cls, plan: Plan, *, probing: bool) -> Guard:
        collapse, forgetting = plan["guard_collapse"], plan["guard_forgetting"]
        levels: dict[Family, str] = {"collapse": collapse, "forgetting": forgetting}
        levels["watch"] = "off" if collapse == forgetting == "off" else "warn"
        return cls(levels, margin=plan["forgetting_margin"], vocabulary=plan.model.vocab_size, probing=probing)

    def see(self, event: Event) -> list[Verdict]:
        """Takes an event in; a step is judged at once."""
        if isinstance(event, Score):
            if event.task == PROBES:
                self.seen.probes.setdefault(event.metric, []).append(event)
            elif event.task == EXPECTED:
                self.seen.expected[event.metric] = event.value
        elif isinstance(event, StepResult) and event.supervised_tokens:  # else all of its rows were left out
            self.seen.add_step(event)
            return self._verdicts("step", event.step, judging=not self.probing)
        return []

    @property
    def safe(self) -> int:
        """A step that stays good whatever is found next: an average is late, it began to rise where it was lowest."""
        return min(self.judged, self.seen.lowest_step) if self.seen.steps else self.judged

    @property
    def finding(self) -> list[str]:
        """Which detectors find something now."""
        return [name for name in DETECTORS if name in self._finding]

    def judge(self, step: int) -> list[Verdict]:
        """What the probe of this step says, once its measures were seen."""
        return self._verdicts("probe", step, judging=True)

    def _verdicts(self, each: str, step: int, *, judging: bool) -> list[Verdict]:
        found: list[Verdict] = []
        for name, detector in DETECTORS.items():
            if detector.each != each or self.levels[detector.family] == "off":
                continue
            evidence = detector.find(self.seen)
            if evidence and name not in self._finding:
                found.append(Verdict(name, self.levels[detector.family], evidence, step))  # type: ignore[arg-type]
            (self._finding.add if evidence else self._finding.discard)(name)
        if self._finding & ONSET:
            self.judged = self.safe
        elif judging and not any(self.levels[DETECTORS[name].family] != "warn" for name in self._finding):
            self.judged = step
        return found


def worst(verdicts: Iterable[Verdict]) -> Verdict | None:
    """The one that decides: a stop, else a rollback."""
    for level in ("stop", "rollback"):
        for verdict in verdicts:
            if verdict.level == level:
                return verdict
    return None
