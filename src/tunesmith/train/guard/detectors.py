"""The guard: folds the events of a run into verdicts. It reads numbers and decides; it computes and
changes nothing.

    guard.see(event) -> verdicts        of each step, what its loss and gradient say
    guard.judge(step) -> verdicts       what the measures of a probe say, beside those of step 0 on the same prompts

A detector is a pure function of what was seen so far: (Seen) -> evidence, or nothing. A new one is
a function and a line in DETECTORS. Every bound stands in BOUNDS and in docs/guides/guard.md. The
same events give the same verdicts, so a resumed run folds what its folder holds. Left out: taking
the measures (probes.py), going back and what is done differently then (guarded.py)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import fmean, median
from typing import Literal

from tunesmith.core.events import EXPECTED_TASK, PROBE_TASK, CheckResult, Event, Score, TrainStep
from tunesmith.core.types import Plan
from tunesmith.evaluate.significance import compute_robust_sd
from tunesmith.train.guard.history import EMA_SPAN, MEDIAN_WINDOW, START_STEPS, GuardHistory

# the kind of the verdict that ends a look; those of detectors have the detector's name
GUARD_KIND = "guard"
Level = Literal["ok", "warn", "rollback", "stop"]
Family = Literal[
    "collapse", "forgetting", "watch"
]  # whose level the recipe sets, the last one's is `warn`

THRESHOLDS: dict[str, float] = {
    "loss rise": 0.20,  # of the moving average over its lowest, and a quarter of what was gained
    "loss above start": 0.20,  # of the moving average over the first steps
    # robust standard deviations over the median of the last steps, and twice the median
    "loss spike": 8.0,
    "gradient spike": 10.0,  # times the running median
    # nats of the last steps over the held-out loss of the probe before, and twice it
    "rows harder than held-out": 0.5,
    "overfitting": 0.25,  # rise of the held-out loss over its lowest, while the training loss falls
    "repetition": 0.15,  # seq-rep-4 over the base's, and over LOOPING
    "sameness": 0.50,  # times the base's or the expected answers' distinct-2, whichever is less
    "one answer": 0.50,  # share of equal answers over the base's and the expected ones'
    # times the base's loss of expected answers: below that, neither of the two above speaks
    "learning": 0.50,
    "no end": 0.50,  # share of answers that end, below the base's and the expected ones'
    "end unlearnt": 1.0,  # nats of the end after an expected answer, over the least so far
    "empty": 0.25,  # times the base's and the expected length
    "loop": 0.25,  # zlib's bytes a byte, and half of the base's
    # nats a token under the base, over what it finds of its own and of the expected answers
    "gibberish": 1.50,
    # share of letters in scripts of neither prompts nor expected answers, over the base's
    "foreign": 0.25,
    # share of answers in a language of neither prompts nor expected answers, over the base's
    "foreign answers": 0.50,
    "form": 0.50,  # share of answers with the right form, below the best so far
    "constraint": 0.25,  # share of answers that break one, over the base's
    "certain": 0.30,  # times the base's entropy of the next token
    "uncertain": 0.50,  # of the way from the base's entropy to that of a uniform choice
    "far from base": 1.00,  # nats of KL(base || tuned) on text that is not trained
    "large update": 0.01,  # of the weights' norm, in one step
    "adapter too large": 0.50,  # ||scale BA|| / ||W||
}
MIN_REPETITION = 0.20
ONSET_DETECTORS = {"loss rise", "loss above start"}
NOISE_SDS = 2.0  # sd of a step's loss around the moving average, that this must move to count
MIN_STEPS = 8  # steps before anything is said of a step


DetectFn = Callable[[GuardHistory], str]


# ---------------------------------------------------------------- of each step


def loss_rise(history: GuardHistory) -> str:
    if len(history.steps) <= MIN_STEPS:
        return ""
    current, lowest = history.loss_averages[-1], min(history.loss_averages[START_STEPS:])
    min_rise = max(
        THRESHOLDS["loss rise"] * lowest,
        (history.start_loss - lowest) / 4,
        NOISE_SDS * history.loss_noise,
    )
    if current > lowest + min_rise:
        return f"the moving average of the loss rose from {lowest:.3f} to {current:.3f}"
    return ""


def loss_above_start(history: GuardHistory) -> str:
    current = history.loss_averages[-1]
    min_rise = max(
        THRESHOLDS["loss above start"] * history.start_loss, NOISE_SDS * history.loss_noise
    )
    if len(history.steps) > MIN_STEPS and current > history.start_loss + min_rise:
        return f"the moving average of the loss is {current:.3f}, training began at {history.start_loss:.3f}"
    return ""


def loss_spike(history: GuardHistory) -> str:
    losses = [step.loss for step in history.steps[-MEDIAN_WINDOW:]]
    *previous, current = losses
    if len(previous) < MIN_STEPS:
        return ""
    median_loss = median(previous)
    if (
        current > median_loss + THRESHOLDS["loss spike"] * compute_robust_sd(previous)
        and current > 2 * median_loss
    ):
        return (
            f"loss {current:.3f}, the median of the last {len(previous)} steps is {median_loss:.3f}"
        )
    return ""


def gradient_spike(history: GuardHistory) -> str:
    *previous, current = [step.grad_norm for step in history.steps[-MEDIAN_WINDOW:]]
    if len(previous) < MIN_STEPS:
        return ""
    if current > THRESHOLDS["gradient spike"] * median(previous):
        return f"gradient norm {current:.3g}, the median of the last {len(previous)} steps is {median(previous):.3g}"
    return ""


# ---------------------------------------------------------------- of each probe


def train_loss_above_eval(history: GuardHistory) -> str:
    """Wrong answers stay as hard as they were, however well the right ones are learnt. Beside the
    held-out loss of the probe before: what is just being learnt is ahead of the last steps."""
    eval_losses = history.probe_scores.get("answer_loss", [])
    if len(eval_losses) < 2 or len(history.steps) <= MIN_STEPS:
        return ""
    held_out, current = (
        eval_losses[-2].value,
        fmean(step.loss for step in history.steps[-EMA_SPAN // 2 :]),
    )
    if current > held_out + THRESHOLDS["rows harder than held-out"] and current > 2 * held_out:
        return f"the training loss is {current:.3f}, that of held-out rows {held_out:.3f}: are there wrong answers?"
    return ""


def overfitting(history: GuardHistory) -> str:
    """The whole interval is over the bound: of eight prompts, one alone can double the mean."""
    eval_losses = history.probe_scores.get("answer_loss", [])
    if len(eval_losses) < 3:
        return ""
    lowest, current = min(eval_losses, key=lambda score: score.value), eval_losses[-1]
    train_loss_then = next(
        (
            average
            for step, average in zip(history.steps, history.loss_averages, strict=True)
            if step.step == lowest.step
        ),
        0,
    )
    if (
        current.low > lowest.value * (1 + THRESHOLDS["overfitting"])
        and history.loss_averages[-1] < train_loss_then
    ):
        return f"the loss of held-out answers rose from {lowest.value:.3f} to {current.value:.3f} while that of training fell"
    return ""


def repetition(history: GuardHistory) -> str:
    current = history.get_latest("repetition")
    if current is not None and current > max(
        MIN_REPETITION, history.get_baseline("repetition") + THRESHOLDS["repetition"]
    ):
        return f"{current:.0%} of runs of four tokens stood in the answer before, {history.get_baseline('repetition'):.0%} at the start"
    return ""


def is_learning(history: GuardHistory) -> bool:
    """The right answers became far likelier. Who learns to answer with one of three words says the
    commonest one to all at first; who collapsed to one answer finds the right ones no likelier."""
    current = history.get_latest("answer_loss")
    return current is not None and current < THRESHOLDS["learning"] * history.get_baseline(
        "answer_loss"
    )


def low_distinct_2(history: GuardHistory) -> str:
    current = history.get_latest("distinct")
    if current is None or is_learning(history):
        return ""
    reference = min(
        history.get_baseline("distinct"), history.expected_scores.get("distinct", math.inf)
    )
    return (
        f"distinct-2 is {current:.2f}, usual is {reference:.2f}"
        if current < THRESHOLDS["sameness"] * reference
        else ""
    )


def identical_answers(history: GuardHistory) -> str:
    current = history.get_latest("same_answer")
    if current is None or is_learning(history):
        return ""
    reference = max(
        history.get_baseline("same_answer"), history.expected_scores.get("same_answer", 0)
    )
    if current > reference + THRESHOLDS["one answer"]:
        return f"{current:.0%} of the answers are one and the same, {reference:.0%} would be usual"
    return ""


def missing_eos(history: GuardHistory) -> str:
    current = history.get_latest("end_rate")
    if current is None:
        return ""
    reference = min(history.get_baseline("end_rate"), history.expected_scores.get("end_rate", 1))
    return (
        f"{current:.0%} of the answers end, usual is {reference:.0%}"
        if current < reference - THRESHOLDS["no end"]
        else ""
    )


def eos_likelihood_drop(history: GuardHistory) -> str:
    """Answers were learnt and their end was not: training rows lack it."""
    end_losses, loss = (
        [score.value for score in history.probe_scores.get("end_loss", [])],
        history.get_latest("answer_loss"),
    )
    if not end_losses or loss is None or loss > history.get_baseline("answer_loss"):
        return ""
    if end_losses[-1] > min(end_losses) + THRESHOLDS["end unlearnt"]:
        return f"answers got likelier than at the start, their end less: {min(end_losses):.2f} -> {end_losses[-1]:.2f} nats"
    return ""


def short_answers(history: GuardHistory) -> str:
    current = history.get_latest("length")
    if current is None:
        return ""
    reference = min(history.get_baseline("length"), history.expected_scores.get("length", math.inf))
    return (
        f"answers have {current:.1f} tokens, usual is {reference:.1f}"
        if current < THRESHOLDS["empty"] * reference
        else ""
    )


def zlib_repetition(history: GuardHistory) -> str:
    current = history.get_latest("compressed")
    if current is not None and current < min(
        THRESHOLDS["loop"], history.get_baseline("compressed") / 2
    ):
        return f"answers compress to {current:.0%}, at the start to {history.get_baseline('compressed'):.0%}"
    return ""


def gibberish(history: GuardHistory) -> str:
    current = history.get_latest("base_loss")
    if current is None:
        return ""
    reference = max(history.get_baseline("base_loss"), history.get_baseline("answer_loss"))
    if current > reference + THRESHOLDS["gibberish"]:
        return (
            f"the base finds answers unlikely: {current:.2f} nats a token, usual is {reference:.2f}"
        )
    return ""


def foreign_script(history: GuardHistory) -> str:
    current = history.get_latest("foreign")
    if current is not None and current > history.get_baseline("foreign") + THRESHOLDS["foreign"]:
        return f"{current:.0%} of the letters are of scripts that were not asked for"
    current = history.get_latest("language")
    if (
        current is not None
        and current > history.get_baseline("language") + THRESHOLDS["foreign answers"]
    ):
        return f"{current:.0%} of the answers are in a language that was not asked for"
    return ""


def invalid_json(history: GuardHistory) -> str:
    valid_rates = [score.value for score in history.probe_scores.get("json", [])]
    if valid_rates and valid_rates[-1] < max(valid_rates) - THRESHOLDS["form"]:
        return f"{valid_rates[-1]:.0%} of the answers are JSON, they were {max(valid_rates):.0%}"
    return ""


def constraint_violations(history: GuardHistory) -> str:
    violations = [
        f"{measure}: {scores[-1].value:.0%} of the answers, {scores[0].value:.0%} at the start"
        for measure, scores in history.probe_scores.items()
        if measure.startswith("breaks ")
        and scores[-1].value > scores[0].value + THRESHOLDS["constraint"]
    ]
    return "; ".join(violations)


def entropy_collapse(history: GuardHistory) -> str:
    current = history.get_latest("entropy")
    if current is not None and current < THRESHOLDS["certain"] * history.get_baseline("entropy"):
        return f"the entropy of the next token is {current:.2f} nats, at the start {history.get_baseline('entropy'):.2f}"
    return ""


def entropy_blowup(history: GuardHistory) -> str:
    current = history.get_latest("entropy")
    if current is None or not history.vocab_size:
        return ""
    base = history.get_baseline("entropy")
    if current > base + THRESHOLDS["uncertain"] * (math.log(history.vocab_size) - base):
        return f"the entropy of the next token is {current:.2f} nats of at most {math.log(history.vocab_size):.2f}"
    return ""


def high_kl(history: GuardHistory) -> str:
    current = history.get_latest("kl")
    if current is not None and current > THRESHOLDS["far from base"]:
        return f"KL(base || tuned) is {current:.2f} nats a token on text that is not trained"
    return ""


def forgetting(history: GuardHistory) -> str:
    """The whole interval is over the margin: a few short texts alone prove no loss."""
    scores = history.probe_scores.get("forgotten", [])
    if scores and scores[-1].low > history.forgetting_margin:
        last = scores[-1]
        return f"general text lost {last.value:.3f} bits per byte [{last.low:.3f}, {last.high:.3f}], over {history.forgetting_margin:g}"
    return ""


def large_update(history: GuardHistory) -> str:
    current = history.get_latest("update_ratio")
    if current is not None and current > THRESHOLDS["large update"]:
        return f"a step changes weights by {current:.2%} of their norm"
    return ""


def adapter_too_large(history: GuardHistory) -> str:
    current = history.get_latest("adapter_share")
    if current is not None and current > THRESHOLDS["adapter too large"]:
        return f"the adapter's part is {current:.0%} of the weights it is beside"
    return ""


@dataclass(frozen=True)
class Detector:
    detect: DetectFn
    family: Family
    trigger: Literal["step", "probe"] = "probe"


DETECTORS: dict[str, Detector] = {
    "loss rise": Detector(loss_rise, "collapse", "step"),
    "loss above start": Detector(loss_above_start, "collapse", "step"),
    "loss spike": Detector(loss_spike, "watch", "step"),
    "gradient spike": Detector(gradient_spike, "watch", "step"),
    "rows harder than held-out": Detector(train_loss_above_eval, "watch"),
    "overfitting": Detector(overfitting, "watch"),
    "repetition": Detector(repetition, "collapse"),
    "sameness": Detector(low_distinct_2, "collapse"),
    "one answer": Detector(identical_answers, "collapse"),
    "no end": Detector(missing_eos, "collapse"),
    "end unlearnt": Detector(eos_likelihood_drop, "watch"),
    "empty": Detector(short_answers, "collapse"),
    "loop": Detector(zlib_repetition, "collapse"),
    "gibberish": Detector(gibberish, "collapse"),
    "foreign": Detector(foreign_script, "collapse"),
    "form": Detector(invalid_json, "collapse"),
    "constraint": Detector(constraint_violations, "watch"),
    "certain": Detector(entropy_collapse, "collapse"),
    "uncertain": Detector(entropy_blowup, "collapse"),
    "far from base": Detector(high_kl, "collapse"),
    "forgetting": Detector(forgetting, "forgetting"),
    "large update": Detector(large_update, "watch"),
    "adapter too large": Detector(adapter_too_large, "watch"),
}


# ---------------------------------------------------------------- the fold


class TrainingGuard:
    """`judged`: the last step that a look, or without probes a step, found nothing against. A
    detector speaks when it begins to find something, not as long as it does."""

    def __init__(
        self,
        levels: dict[Family, str],
        *,
        forgetting_margin: float,
        vocab_size: int,
        is_probing: bool,
    ) -> None:
        """`levels`: of each family; "off" leaves it out."""
        self.levels, self.is_probing = levels, is_probing
        self.history = GuardHistory(vocab_size=vocab_size, forgetting_margin=forgetting_margin)
        self.last_good_step = 0
        self._active: set[str] = set()

    @classmethod
    def from_plan(cls, plan: Plan, *, is_probing: bool) -> TrainingGuard:
        collapse, forgetting = plan["guard_collapse"], plan["guard_forgetting"]
        levels: dict[Family, str] = {"collapse": collapse, "forgetting": forgetting}
        levels["watch"] = "off" if collapse == forgetting == "off" else "warn"
        return cls(
            levels,
            forgetting_margin=plan["forgetting_margin"],
            vocab_size=plan.model.vocab_size,
            is_probing=is_probing,
        )

    def observe_event(self, event: Event) -> list[CheckResult]:
        """Takes an event in; a step is judged at once."""
        if isinstance(event, Score):
            if event.task == PROBE_TASK:
                self.history.probe_scores.setdefault(event.metric, []).append(event)
            elif event.task == EXPECTED_TASK:
                self.history.expected_scores[event.metric] = event.value
        elif (
            isinstance(event, TrainStep) and event.supervised_tokens
        ):  # else all of its rows were left out
            self.history.add_step(event)
            return self._run_detectors("step", event.step, can_mark_good=not self.is_probing)
        return []

    @property
    def safe_step(self) -> int:
        """A step that stays good whatever is found next: an average is late, it began to rise where
        it was lowest."""
        return (
            min(self.last_good_step, self.history.lowest_step)
            if self.history.steps
            else self.last_good_step
        )

    @property
    def active_detectors(self) -> list[str]:
        """Which detectors find something now."""
        return [name for name in DETECTORS if name in self._active]

    def judge_probe(self, step: int) -> list[CheckResult]:
        """What the probe of this step says, once its measures were seen."""
        return self._run_detectors("probe", step, can_mark_good=True)

    def _run_detectors(self, trigger: str, step: int, *, can_mark_good: bool) -> list[CheckResult]:
        verdicts: list[CheckResult] = []
        for name, detector in DETECTORS.items():
            if detector.trigger != trigger or self.levels[detector.family] == "off":
                continue
            evidence = detector.detect(self.history)
            if evidence and name not in self._active:
                verdicts.append(CheckResult(name, self.levels[detector.family], evidence, step))  # type: ignore[arg-type]
            (self._active.add if evidence else self._active.discard)(name)
        if self._active & ONSET_DETECTORS:
            self.last_good_step = self.safe_step
        elif can_mark_good and not any(
            self.levels[DETECTORS[name].family] != "warn" for name in self._active
        ):
            self.last_good_step = step
        return verdicts


def select_worst(verdicts: Iterable[CheckResult]) -> CheckResult | None:
    """The one that decides: a stop, else a rollback."""
    for level in ("stop", "rollback"):
        for verdict in verdicts:
            if verdict.level == level:
                return verdict
    return None
