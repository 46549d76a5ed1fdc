"""Guard detectors: pure functions of the history of a run.

A detector takes the GuardHistory and returns evidence, or "" when all is well. To add one, write a
function and a line in DETECTORS. All thresholds are in THRESHOLDS and in docs/guides/guard.md.

Left out: measuring (probes.py), the level of a verdict (training_guard.py), rolling back
(guarded_loop.py)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Literal

from tunesmith.core.events import GenerationSample, Score, TrainStep
from tunesmith.evaluate.shortcuts import build_answer_items, find_constants
from tunesmith.evaluate.statistics import compute_robust_sd, is_shown_above

EMA_SPAN = 10  # steps of the exponential moving average of the loss
START_STEPS = 5  # steps whose mean is the loss at the start
MEDIAN_WINDOW = 50  # steps of the running medians


@dataclass
class GuardHistory:
    """Steps and probe scores so far, oldest first."""

    steps: list[TrainStep] = field(default_factory=list[TrainStep])
    loss_averages: list[float] = field(default_factory=list[float])  # after each step
    probe_scores: dict[str, list[Score]] = field(default_factory=dict[str, list[Score]])
    expected_scores: dict[str, float] = field(default_factory=dict[str, float])
    vocab_size: int = 0
    forgetting_margin: float = math.inf  # bits per byte
    planned_steps: int = 0
    eval_samples: list[GenerationSample] = field(default_factory=list[GenerationSample])

    def add_sample(self, sample: GenerationSample) -> None:
        """Append a complete answer to a row of eval_data; only those of the last step stay."""
        if self.eval_samples and self.eval_samples[0].step != sample.step:
            self.eval_samples = []
        self.eval_samples.append(sample)

    def add_step(self, step: TrainStep) -> None:
        """Append a step and the moving average of the loss after it."""
        previous = self.loss_averages[-1] if self.loss_averages else step.loss
        # The plain mean of the first steps: an EMA would follow its first value for too long.
        rate = max(2 / (EMA_SPAN + 1), 1 / (len(self.loss_averages) + 1))
        self.loss_averages.append(previous + rate * (step.loss - previous))
        self.steps.append(step)

    def get_latest(self, metric: str) -> float | None:
        """Return the metric's value in the last probe, None if it was never measured."""
        return self.probe_scores[metric][-1].value if metric in self.probe_scores else None

    def get_baseline(self, metric: str) -> float:
        """Return the metric's value before training."""
        return self.probe_scores[metric][0].value

    @property
    def start_loss(self) -> float:
        """Mean loss of the first steps."""
        first = self.steps[:START_STEPS]
        return sum(step.loss for step in first) / len(first)

    @property
    def lowest_step(self) -> int:
        """Step with the lowest loss average, not counting the first steps."""
        first = min(START_STEPS, len(self.loss_averages) - 1)
        indices = range(first, len(self.loss_averages))
        return self.steps[min(indices, key=self.loss_averages.__getitem__)].step

    @property
    def loss_noise(self) -> float:
        """Robust standard deviation of step losses around the moving average before them."""
        previous = self.loss_averages[-MEDIAN_WINDOW - 1 : -1]
        if not previous:
            return 0.0
        recent_steps = self.steps[-len(previous) :]
        deviations = [
            step.loss - average for step, average in zip(recent_steps, previous, strict=True)
        ]
        return compute_robust_sd(deviations)


# The recipe sets the level of collapse and forgetting; watch only warns.
Family = Literal["collapse", "forgetting", "watch"]

THRESHOLDS: dict[str, float] = {
    # loss average over its minimum; also a quarter of what was gained since the start
    "loss rise": 0.20,
    # loss average over the mean of the first steps, or over that of a uniform guess
    "loss above start": 0.20,
    # nats per token: no smaller rise of the training loss is a fault, however low the loss. One row
    # in eight that loses 2 nats; 0.079 after 0.009 was a spike by the factors alone
    "least rise": 0.25,
    # robust standard deviations over the median of the last steps; also twice that median
    "loss spike": 8.0,
    # times the running median
    "gradient spike": 10.0,
    # nats between recent training loss and the held-out loss of the previous probe; also a factor 2
    "train loss above eval loss": 0.5,
    # nats per token that expected answers lost since the start; also half of the loss at the start
    "answers unlearned": 1.0,
    # rise of the held-out loss over its minimum while the training loss falls
    "overfitting": 0.25,
    # seq-rep-4 over the base model's; also over MIN_REPETITION
    "repetition": 0.15,
    # times the lower distinct-2 of base model and expected answers
    "low distinct-2": 0.50,
    # share of equal answers over the higher share of base model and expected answers
    "identical answers": 0.50,
    # times the base model's loss of expected answers: below it the two detectors above are silent
    "learning": 0.50,
    # share of answers with EOS below the lower share of base model and expected answers
    "missing EOS": 0.50,
    # nats of EOS after an expected answer, over its minimum; also its interval above that
    "EOS likelihood drop": 1.0,
    # times the lower mean length of base model and expected answers
    "short answers": 0.25,
    # nats per token under the base model, over its own answers and the expected ones
    "gibberish": 1.50,
    # share of letters in scripts of neither prompts nor expected answers, over the base model's
    "unexpected language": 0.25,
    # share of answers in a language of neither prompts nor expected answers, over the base model's
    "unexpected language: answers": 0.50,
    # share of valid JSON below the best so far
    "invalid JSON": 0.50,
    # share of answers that violate a constraint, over the base model's
    "constraint": 0.25,
    # KL(base || tuned) on general text, in times the base model's entropy there, since what is far
    # depends on the text. On one of 3.3 nats: 0.33 at three times the rate of the rule, with all
    # answers learned, 0.9 and 1.5 in the two collapses at 30 times (docs/results/guard.md)
    "high KL": 0.60,
    # one step's change / weight norm
    "large update": 0.01,
    # share of the planned steps before which no answer is called constant: a label is learned by
    # answering its most frequent value first; the test is that of evaluate/shortcuts.py
    "constant answer": 0.33,
}
MIN_REPETITION = 0.20
# A loss average must move by so many standard deviations of the step losses around it.
NOISE_SDS = 2.0
MAX_NAMED_CONSTANTS = 3
MIN_STEPS = 8  # steps before the step detectors speak

DetectFn = Callable[[GuardHistory], str]


# ---------------------------------------------------------------- after each step


def loss_rise(history: GuardHistory) -> str:
    """Detect a loss average well above its minimum."""
    if len(history.steps) <= MIN_STEPS:
        return ""
    current = history.loss_averages[-1]
    lowest = min(history.loss_averages[START_STEPS:])
    min_rise = max(
        THRESHOLDS["loss rise"] * lowest,
        (history.start_loss - lowest) / 4,
        NOISE_SDS * history.loss_noise,
        THRESHOLDS["least rise"],
    )
    if current > lowest + min_rise:
        return f"the moving average of the loss rose from {lowest:.3f} to {current:.3f}"
    return ""


def loss_above_start(history: GuardHistory) -> str:
    """Detect a loss average well above the loss of the first steps, or above that of guessing."""
    current = history.loss_averages[-1]
    start = history.start_loss
    min_rise = max(
        THRESHOLDS["loss above start"] * start,
        NOISE_SDS * history.loss_noise,
        THRESHOLDS["least rise"],
    )
    guessing = (1 + THRESHOLDS["loss above start"]) * math.log(history.vocab_size or math.inf)
    limit = min(start + min_rise, max(guessing, history.steps[0].loss))
    if len(history.steps) > MIN_STEPS and current > limit:
        return f"the moving average of the loss is {current:.3f}, it started at {start:.3f}"
    return ""


def loss_spike(history: GuardHistory) -> str:
    """Detect a step whose loss is an outlier among recent steps."""
    *previous, current = [step.loss for step in history.steps[-MEDIAN_WINDOW:]]
    if len(previous) < MIN_STEPS:
        return ""
    median_loss = median(previous)
    noise = THRESHOLDS["loss spike"] * compute_robust_sd(previous)
    if current > median_loss + max(noise, median_loss, THRESHOLDS["least rise"]):
        return f"loss {current:.3f}; median of the last {len(previous)} steps: {median_loss:.3f}"
    return ""


def gradient_spike(history: GuardHistory) -> str:
    """Detect a step whose gradient norm is an outlier among recent steps, and whose loss is not
    close to zero, where all rows are known by heart."""
    *previous, current = [step.grad_norm for step in history.steps[-MEDIAN_WINDOW:]]
    if len(previous) < MIN_STEPS:
        return ""
    median_norm = median(previous)
    is_learned = history.steps[-1].loss < THRESHOLDS["least rise"]
    if current > THRESHOLDS["gradient spike"] * median_norm and not is_learned:
        return (
            f"gradient norm {current:.3g}; "
            f"median of the last {len(previous)} steps: {median_norm:.3g}"
        )
    return ""


# ---------------------------------------------------------------- after each probe


def train_loss_above_eval(history: GuardHistory) -> str:
    """Detect training rows that stay hard while held-out answers are learned: wrong labels.

    The comparison uses the held-out loss of the previous probe, because what is being learned right
    now is ahead of the last steps."""
    eval_losses = history.probe_scores.get("answer_loss", [])
    if len(eval_losses) < 2 or len(history.steps) <= MIN_STEPS:
        return ""
    held_out = eval_losses[-2].value
    current = fmean(step.loss for step in history.steps[-EMA_SPAN // 2 :])
    if current > held_out + THRESHOLDS["train loss above eval loss"] and current > 2 * held_out:
        return f"training loss {current:.3f}, held-out loss {held_out:.3f}: check for wrong answers"
    return ""


def overfitting(history: GuardHistory) -> str:
    """Detect a held-out loss that rises while the training loss falls.

    The lower end of its interval counts: with eight prompts, a single one can double the mean."""
    eval_losses = history.probe_scores.get("answer_loss", [])
    if len(eval_losses) < 3:
        return ""
    lowest = min(eval_losses, key=lambda score: score.value)
    current = eval_losses[-1]
    train_loss_then = 0.0
    for step, average in zip(history.steps, history.loss_averages, strict=True):
        if step.step == lowest.step:
            train_loss_then = average
            break
    limit = lowest.value * (1 + THRESHOLDS["overfitting"])
    if is_shown_above(current, limit) and history.loss_averages[-1] < train_loss_then:
        return (
            f"held-out loss rose from {lowest.value:.3f} to {current.value:.3f} "
            "while the training loss fell"
        )
    return ""


def answers_unlearned(history: GuardHistory) -> str:
    """Detect expected answers far less likely than before training while the training loss is high.

    A run may collapse within the steps that other detectors take for its start. A model that knows
    its rows by heart loses held-out answers, too, but its training loss is low."""
    rises = history.probe_scores.get("answer_loss_rise", [])
    if not rises or not history.steps:
        return ""
    rise = rises[-1]
    start = min(history.steps[0].loss, history.start_loss)
    current = history.loss_averages[-1]
    limit = max(THRESHOLDS["answers unlearned"], start / 2)
    if is_shown_above(rise, limit) and current > start:
        lost = f"{rise.value:.2f} [{rise.low:.2f}, {rise.high:.2f}] nats per token since the start"
        return f"expected answers lost {lost}; training loss {current:.3f}, at first {start:.3f}"
    return ""


def repetition(history: GuardHistory) -> str:
    """Detect repeated 4-grams within answers (seq-rep-4)."""
    current = history.get_latest("repetition")
    if current is None:
        return ""
    base = history.get_baseline("repetition")
    if current > max(MIN_REPETITION, base + THRESHOLDS["repetition"]):
        return f"{current:.0%} of 4-grams repeat within their answer, base model {base:.0%}"
    return ""


def is_learning(history: GuardHistory) -> bool:
    """Return whether expected answers became far likelier.

    A model that learns a three-way label predicts the majority class first; a model that collapsed
    to one answer finds the expected ones no likelier."""
    current = history.get_latest("answer_loss")
    if current is None:
        return False
    return current < THRESHOLDS["learning"] * history.get_baseline("answer_loss")


def low_distinct_2(history: GuardHistory) -> str:
    """Detect answers that share most of their bigrams."""
    current = history.get_latest("distinct")
    if current is None or is_learning(history):
        return ""
    expected = history.expected_scores.get("distinct", math.inf)
    reference = min(history.get_baseline("distinct"), expected)
    if current < THRESHOLDS["low distinct-2"] * reference:
        return f"distinct-2 {current:.2f}, reference {reference:.2f}"
    return ""


def identical_answers(history: GuardHistory) -> str:
    """Detect the same answer to many prompts."""
    current = history.get_latest("same_answer")
    if current is None or is_learning(history):
        return ""
    expected = history.expected_scores.get("same_answer", 0)
    reference = max(history.get_baseline("same_answer"), expected)
    if current > reference + THRESHOLDS["identical answers"]:
        return f"{current:.0%} of answers are identical, reference {reference:.0%}"
    return ""


def missing_eos(history: GuardHistory) -> str:
    """Detect answers that no longer end."""
    current = history.get_latest("end_rate")
    if current is None:
        return ""
    expected = history.expected_scores.get("end_rate", 1)
    reference = min(history.get_baseline("end_rate"), expected)
    if current < reference - THRESHOLDS["missing EOS"]:
        return f"{current:.0%} of answers end with EOS, reference {reference:.0%}"
    return ""


def eos_likelihood_drop(history: GuardHistory) -> str:
    """Detect that answers are learned without their EOS: training rows lack it.

    One prompt of eight can raise the mean, so the whole interval must be above the lowest mean."""
    scores = history.probe_scores.get("end_loss", [])
    answer_loss = history.get_latest("answer_loss")
    if not scores or answer_loss is None or answer_loss > history.get_baseline("answer_loss"):
        return ""
    current = scores[-1]
    lowest = min(score.value for score in scores)
    is_far = current.value > lowest + THRESHOLDS["EOS likelihood drop"]
    if is_far and is_shown_above(current, lowest):
        return (
            "expected answers became likelier and their EOS less likely: "
            f"{lowest:.2f} -> {current.value:.2f} nats"
        )
    return ""


def short_answers(history: GuardHistory) -> str:
    """Detect answers that became far shorter."""
    current = history.get_latest("length")
    if current is None:
        return ""
    expected = history.expected_scores.get("length", math.inf)
    reference = min(history.get_baseline("length"), expected)
    if current < THRESHOLDS["short answers"] * reference:
        return f"mean answer length {current:.1f} tokens, reference {reference:.1f}"
    return ""


def gibberish(history: GuardHistory) -> str:
    """Detect answers that are unlikely under the base model."""
    current = history.get_latest("base_loss")
    if current is None:
        return ""
    reference = max(history.get_baseline("base_loss"), history.get_baseline("answer_loss"))
    if current > reference + THRESHOLDS["gibberish"]:
        return (
            f"answers have {current:.2f} nats per token under the base model, "
            f"reference {reference:.2f}"
        )
    return ""


def unexpected_language(history: GuardHistory) -> str:
    """Detect scripts and languages of neither prompts nor expected answers."""
    letters = history.get_latest("foreign")
    if letters is not None:
        limit = history.get_baseline("foreign") + THRESHOLDS["unexpected language"]
        if letters > limit:
            return f"{letters:.0%} of letters are in scripts that no prompt or expected answer uses"
    answers = history.get_latest("language")
    if answers is not None:
        limit = history.get_baseline("language") + THRESHOLDS["unexpected language: answers"]
        if answers > limit:
            return f"{answers:.0%} of answers are in a language of no prompt or expected answer"
    return ""


def invalid_json(history: GuardHistory) -> str:
    """Detect a drop in the share of valid JSON."""
    valid_rates = [score.value for score in history.probe_scores.get("json", [])]
    if valid_rates and valid_rates[-1] < max(valid_rates) - THRESHOLDS["invalid JSON"]:
        return (
            f"{valid_rates[-1]:.0%} of answers are valid JSON, best so far {max(valid_rates):.0%}"
        )
    return ""


def constraint_violations(history: GuardHistory) -> str:
    """Detect constraints that answers violate more often than the base model's."""
    violations: list[str] = []
    for metric, scores in history.probe_scores.items():
        base = scores[0].value
        current = scores[-1].value
        if metric.startswith("breaks ") and current > base + THRESHOLDS["constraint"]:
            violations.append(f"{metric}: {current:.0%} of answers, base model {base:.0%}")
    return "; ".join(violations)


def high_kl(history: GuardHistory) -> str:
    """Detect a model far from its base on general text."""
    current = history.get_latest("kl")
    if current is None:
        return ""
    base = history.get_baseline("entropy")
    if current > THRESHOLDS["high KL"] * base:
        return (
            f"KL(base || tuned) is {current:.2f} nats per token of general text, where the base "
            f"model's entropy is {base:.2f}"
        )
    return ""


def forgetting(history: GuardHistory) -> str:
    """Detect general text that became less likely by more than the recipe's margin.

    The lower end of its interval counts: a few short texts alone prove no loss."""
    scores = history.probe_scores.get("forgotten", [])
    if not scores:
        return ""
    current = scores[-1]
    margin = history.forgetting_margin
    if is_shown_above(current, margin):
        interval = f"[{current.low:.3f}, {current.high:.3f}]"
        return f"general text lost {current.value:.3f} {interval} bits per byte, margin {margin:g}"
    return ""


def large_update(history: GuardHistory) -> str:
    """Detect a step that changes weights by too much of their norm."""
    current = history.get_latest("update_ratio")
    if current is not None and current > THRESHOLDS["large update"]:
        return f"one step changes weights by {current:.2%} of their norm"
    return ""


# ---------------------------------------------------------------- after answers to eval_data


def constant_answers(history: GuardHistory) -> str:
    """Detect fields, or answers, that hardly vary although the expected ones do."""
    samples = history.eval_samples
    if not samples or not can_judge_answers(history, samples[0].step):
        return ""
    constants = find_constants(build_answer_items(samples))
    more = len(constants) - MAX_NAMED_CONSTANTS
    texts = [constant.description for constant in constants[:MAX_NAMED_CONSTANTS]]
    return "; ".join(texts + [f"and {more} more fields"] * (more > 0))


def can_judge_answers(history: GuardHistory, step: int) -> bool:
    """Return whether the run is far enough for answers to vary."""
    return step >= THRESHOLDS["constant answer"] * history.planned_steps


@dataclass(frozen=True)
class Detector:
    detect: DetectFn
    family: Family
    trigger: Literal["step", "probe", "answers"] = "probe"


DETECTORS: dict[str, Detector] = {
    "loss rise": Detector(loss_rise, "collapse", "step"),
    "loss above start": Detector(loss_above_start, "collapse", "step"),
    "loss spike": Detector(loss_spike, "watch", "step"),
    "gradient spike": Detector(gradient_spike, "watch", "step"),
    "train loss above eval loss": Detector(train_loss_above_eval, "watch"),
    "overfitting": Detector(overfitting, "watch"),
    "answers unlearned": Detector(answers_unlearned, "collapse"),
    "repetition": Detector(repetition, "collapse"),
    "low distinct-2": Detector(low_distinct_2, "collapse"),
    "identical answers": Detector(identical_answers, "collapse"),
    "missing EOS": Detector(missing_eos, "collapse"),
    "EOS likelihood drop": Detector(eos_likelihood_drop, "watch"),
    "short answers": Detector(short_answers, "collapse"),
    "gibberish": Detector(gibberish, "collapse"),
    "unexpected language": Detector(unexpected_language, "collapse"),
    "invalid JSON": Detector(invalid_json, "collapse"),
    "constraint": Detector(constraint_violations, "watch"),
    "high KL": Detector(high_kl, "collapse"),
    "forgetting": Detector(forgetting, "forgetting"),
    "large update": Detector(large_update, "watch"),
    "constant answer": Detector(constant_answers, "watch", "answers"),
}
