"""Verify that a server gives the answers of a run: its own test rows, asked over HTTP.

    verify_run(path, client, model) -> LiveVerification

Each check says how many items it compared, and a check that compared too few says that instead of
ok. A greedy answer may differ where two tokens are as good as equal: other kernels round in another
way. Where a server gives log-probabilities, a difference counts if it prefers its own token by more
than MAX_TIE_NATS. Left out: the items (recorded_items.py), HTTP (server_client.py), and any
judgment of whether the run is good (run_verdict.py)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tunesmith.core.formatting import count_common
from tunesmith.core.progress_log import log_progress
from tunesmith.core.types import Comparison
from tunesmith.evaluate.metrics import grade_answer, parse_metric_arg
from tunesmith.evaluate.results import (
    MetricValues,
    compare_measurements,
    format_comparison,
    select_items,
)
from tunesmith.evaluate.statistics import (
    MIN_ITEMS,
    NO_DIFFERENCE,
    TOO_FEW_ITEMS,
    compute_wilson_interval,
    judge_comparisons,
)
from tunesmith.evaluate.verify.recorded_items import (
    TEST,
    RecordedItem,
    RecordedRun,
    load_recorded_run,
)
from tunesmith.evaluate.verify.server_client import LiveClient, open_request_pool
from tunesmith.evaluate.verify.server_requests import (
    LiveAnswer,
    RequestOptions,
    ask,
    find_options,
    score_documents,
)

Status = Literal["ok", "warning", "failed", "not measured"]

CONCURRENT_REQUESTS = 4
NUM_REPEATED = 8  # items that are asked again, while as many others run
MAX_TIE_NATS = 0.25  # by which rounding may prefer another token
MAX_CLEAR_SHARE = 0.05  # of the answers, with a difference that rounding does not explain
MAX_CHANGES_PER_TOKEN = 0.01  # first differences, of a server without log-probabilities
MAX_MEAN_NATS = 0.02  # difference of the loss of expected answers
MAX_ITEM_NATS = 0.05  # mean over items of its absolute difference
MAX_METRIC_FALL = 0.1  # that the interval of a metric's difference may leave open
MAX_SHOWN_ANSWERS = 3
ENDED = ("stop", "tool_calls")  # of finish_reason
TOO_FEW = f"too few items to tell: {{}} of at least {MIN_ITEMS}"


@dataclass(frozen=True)
class LiveCheck:
    """A check. `n` is how many items it compared; `message` the evidence, or why there is none."""

    name: str
    status: Status
    n: int
    message: str


@dataclass(frozen=True)
class AnswerPair:
    """A recorded answer and the one that the server gives."""

    id: str
    recorded: str
    served: str


@dataclass(frozen=True)
class LiveVerification:
    """`is_run`: whether the server was shown to be the run. `differences` are a few answers."""

    run: str
    url: str
    model: str
    items: int
    is_run: bool
    checks: tuple[LiveCheck, ...]
    comparisons: tuple[Comparison, ...] = ()
    differences: tuple[AnswerPair, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def problem(self) -> str:
        """The reason why the server was not shown to be the run; empty if it was."""
        if self.is_run:
            return ""
        if failed := [check.name for check in self.checks if check.status == "failed"]:
            return f"the server does not match the run: {', '.join(failed)} failed"
        open_checks = [check for check in self.checks if check.status != "ok"]
        states = ", ".join(f"{check.name} {check.status}" for check in open_checks)
        return f"cannot tell whether the server matches the run: {states}; ask more --items"


@dataclass(frozen=True)
class _Pair:
    """An item with the answer that the server gives."""

    item: RecordedItem
    answer: LiveAnswer

    @property
    def is_same(self) -> bool:
        return self.answer.text == self.item.after

    @property
    def tie_nats(self) -> float | None:
        """Nats by which the server prefers its token where the answers part; None if unknown."""
        return self.answer.measure_preference(self.item.after)


def verify_run(
    path: Path, client: LiveClient, model: str, *, num_items: int = 64
) -> LiveVerification:
    """Ask a server the test rows of a run, and compare its answers with those that it recorded.

    Raises InputError for a run without recorded answers and a server that does not speak the API,
    MachineError for one that fails."""
    run = load_recorded_run(path, num_items)
    options = find_options(client, model, run)
    answers = _ask_all(client, options, run.items)
    pairs = [_Pair(item, answer) for item, answer in zip(run.items, answers, strict=True)]
    losses = score_documents(client, options, run.items)
    comparisons = tuple(_compare_metrics(run, pairs))
    different = [pair for pair in pairs if not pair.is_same]
    checks = [
        _check_prompts(pairs),
        _check_applied(pairs, losses),
        _check_answers(pairs),
        *_check_metrics(comparisons, are_same=not different),
        _check_probability(run.items, losses),
        _check_ends(pairs),
        _check_stability(client, options, pairs),
    ]
    return LiveVerification(
        run=str(run.path),
        url=client.url,
        model=model,
        items=len(run.items),
        is_run=_is_run(checks),
        checks=tuple(checks),
        comparisons=comparisons,
        differences=tuple(
            AnswerPair(pair.item.id, pair.item.after, pair.answer.text)
            for pair in different[:MAX_SHOWN_ANSWERS]
        ),
        notes=run.notes,
    )


def _is_run(checks: Sequence[LiveCheck]) -> bool:
    """No check failed, the adapter is applied, and the answers or their probabilities agree."""
    statuses = {check.name: check.status for check in checks}
    agrees = "ok" in (statuses["answers"], statuses["probability"])
    return "failed" not in statuses.values() and statuses["applied"] == "ok" and agrees


def _ask_all(
    client: LiveClient, options: RequestOptions, items: Sequence[RecordedItem]
) -> list[LiveAnswer]:
    with open_request_pool(CONCURRENT_REQUESTS) as pool:
        answers = pool.map(lambda item: ask(client, options, item), items)
        return list(log_progress(answers, len(items), "answers"))


# ---------------------------------------------------------------- checks


def _check_prompts(pairs: Sequence[_Pair]) -> LiveCheck:
    """Compare the number of tokens of each prompt, and their ids where the server gives them."""
    name = "prompt"
    counted = [pair for pair in pairs if pair.answer.prompt_tokens is not None]
    if not counted:
        return LiveCheck(name, "not measured", 0, "the server sends no usage")
    with_ids = [pair for pair in pairs if pair.answer.prompt_ids]
    wrong = [pair for pair in counted if pair.answer.prompt_tokens != len(pair.item.prompt_ids)]
    if wrong:
        first = wrong[0]
        counts = f"{len(first.item.prompt_ids)} tokens here, {first.answer.prompt_tokens} there"
        message = (
            f"{len(wrong)} of {len(counted)} prompts have a different token count "
            f"({first.item.id}: {counts}): the chat template, BOS or tokenizer differs"
        )
        return LiveCheck(name, "failed", len(counted), message)
    other = [pair for pair in with_ids if pair.answer.prompt_ids != pair.item.prompt_ids]
    if other:
        message = f"{len(other)} of {len(with_ids)} prompts have other ids ({other[0].item.id})"
        return LiveCheck(
            name, "failed", len(counted), f"{message}: the chat template or tokenizer differs"
        )
    ids = f"; the same ids in {len(with_ids)}" if with_ids else "; no ids to compare"
    if len(counted) < len(pairs):
        message = f"the same number of tokens{ids}; no usage for {len(pairs) - len(counted)}"
        return LiveCheck(name, "warning", len(counted), message)
    return LiveCheck(name, "ok", len(counted), f"the same number of tokens in all{ids}")


def _check_applied(pairs: Sequence[_Pair], losses: dict[str, float]) -> LiveCheck:
    """Check that what is served is nearer to the run after training than before it.

    A greedy answer is nearer to the one that it follows for longer; where too few answers changed
    in training, the loss of the expected answer decides."""
    name = "applied"
    votes = list(_iter_answer_votes(pairs))
    subject = "answers that training changed"
    if len(votes) < MIN_ITEMS:
        votes = list(_iter_loss_votes(pairs, losses))
        subject = "expected answers"
    decided = [vote for vote in votes if vote]
    n = len(votes)
    if n < MIN_ITEMS:
        message = TOO_FEW.format(n) + ", where before and after differ in the record"
        return LiveCheck(name, "not measured", n, message)
    after = decided.count(1)
    message = f"of {n} {subject}, {after} as after training, {decided.count(-1)} as before"
    if len(decided) < MIN_ITEMS:
        return LiveCheck(name, "failed", n, f"{message}: neither the run nor its base")
    _, high = compute_wilson_interval(after, len(decided))
    if high < 0.5:
        return LiveCheck(name, "failed", n, f"{message}: the training is not applied")
    low, high = compute_wilson_interval(after, n)  # those that are neither count too
    if high < 0.5:
        return LiveCheck(name, "failed", n, f"{message}: most are neither the run nor its base")
    if low <= 0.5:
        return LiveCheck(name, "warning", n, f"{message}: too close to tell")
    return LiveCheck(name, "ok", n, message)


def _iter_answer_votes(pairs: Sequence[_Pair]) -> Iterator[int]:
    """Yield 1 for an answer nearer to the run, -1 for one nearer to its base, 0 for neither."""
    for pair in pairs:
        item = pair.item
        if item.before != item.after:
            served = pair.answer.text
            after = count_common(served, item.after) + (served == item.after)
            before = count_common(served, item.before) + (served == item.before)
            yield (after > before) - (after < before)


def _iter_loss_votes(pairs: Sequence[_Pair], losses: dict[str, float]) -> Iterator[int]:
    for pair in pairs:
        item = pair.item
        served = losses.get(item.id)
        if served is None or item.loss is None or item.loss_before is None:
            continue
        if abs(item.loss - item.loss_before) > 2 * MAX_ITEM_NATS:
            after = abs(served - item.loss)
            before = abs(served - item.loss_before)
            yield (after < before) - (after > before)


def _check_answers(pairs: Sequence[_Pair]) -> LiveCheck:
    """Compare greedy answers with the recorded ones."""
    name = "answers"
    n = len(pairs)
    different = [pair for pair in pairs if not pair.is_same]
    if n < MIN_ITEMS:
        return LiveCheck(name, "not measured", n, TOO_FEW.format(n))
    message = f"{n - len(different)} of {n} are the same"
    if not different:
        return LiveCheck(name, "ok", n, message)
    gaps = [gap for pair in different if (gap := pair.tie_nats) is not None]
    clear = sum(gap > MAX_TIE_NATS for gap in gaps)
    low, _ = compute_wilson_interval(clear, n)
    is_other = low > MAX_CLEAR_SHARE
    if len(gaps) < len(different) and not is_other:
        return _judge_changes(pairs, different, message)
    message += f"; {len(gaps) - clear} part at a tie, {clear} at a clear choice"
    if is_other:
        return LiveCheck(name, "failed", n, message)
    return LiveCheck(name, "ok" if clear <= MAX_CLEAR_SHARE * n else "warning", n, message)


def _judge_changes(pairs: Sequence[_Pair], different: Sequence[_Pair], message: str) -> LiveCheck:
    """Judge differences without log-probabilities, by how many tokens go by before the first."""
    name = "answers"
    num_tokens = round(sum(_count_common_tokens(pair) for pair in pairs))
    low, _ = compute_wilson_interval(len(different), max(num_tokens, len(different)))
    share = len(different) / max(1, num_tokens)
    message += f"; one in {1 / share:.0f} tokens differs, but the server does not say how clearly"
    status: Status = "ok" if share <= MAX_CHANGES_PER_TOKEN else "warning"
    if low > MAX_CHANGES_PER_TOKEN:
        status = "failed"
    return LiveCheck(name, status, len(pairs), message)


def _count_common_tokens(pair: _Pair) -> float:
    """Return about how many tokens the two answers share from the start, and the one after."""
    common = count_common(pair.answer.text, pair.item.after)
    longest = max(1, len(pair.answer.text))
    num_tokens = pair.answer.completion_tokens or longest / 4
    return min(1.0, common / longest) * num_tokens + 1


def _compare_metrics(run: RecordedRun, pairs: Sequence[_Pair]) -> Iterator[Comparison]:
    """Yield each graded metric of the record, paired with the server's answers to the same rows."""
    answers = {pair.item.id: pair.answer.text for pair in pairs}
    expected = {pair.item.id: pair.item.expected for pair in pairs}
    for measurement in run.measurements:
        indices = [i for i, item in enumerate(measurement.ids) if item in answers]
        if len(indices) < MIN_ITEMS:
            continue
        recorded = replace(select_items(measurement, indices), truncated=())
        arg = parse_metric_arg(measurement.metric, run.schema)
        values = tuple(
            grade_answer(measurement.metric, answers[item], expected[item], arg)
            for item in recorded.ids
        )
        yield compare_measurements(recorded, replace(recorded, values=values))


def _check_metrics(comparisons: Sequence[Comparison], *, are_same: bool) -> Iterator[LiveCheck]:
    """Judge each metric by what its interval excludes: no difference shown is not yet none.

    are_same: whether every answer is the recorded one, so that no grade can differ."""
    verdicts = judge_comparisons(comparisons)
    for comparison, verdict in zip(comparisons, verdicts, strict=True):
        name = f"metric: {comparison.task} {comparison.metric}"
        message = format_comparison(comparison).partition(": ")[2]
        fall = -comparison.low if comparison.higher_is_better else comparison.high
        # One that does not survive Holm's correction is no verdict.
        status: Status = "failed" if verdict == "worse" else "warning"
        if verdict == NO_DIFFERENCE and are_same:
            status = "ok"
            message = message.replace(NO_DIFFERENCE, "the same answers")
        elif verdict == NO_DIFFERENCE and fall <= MAX_METRIC_FALL:
            status = "ok"
        elif verdict == NO_DIFFERENCE:
            reason = f"{TOO_FEW_ITEMS} it from a fall of {MAX_METRIC_FALL:g}"
            message = message.replace(NO_DIFFERENCE, reason)
        yield LiveCheck(name, status, comparison.after.n, message)


def _check_probability(items: Sequence[RecordedItem], losses: dict[str, float]) -> LiveCheck:
    """Compare the loss of the expected answers with the recorded one."""
    name = "probability"
    scored = [item for item in items if item.id in losses and item.loss is not None]
    if not losses:
        reason = "the server gives no log-probabilities of a text that it is sent"
        if all(item.loss is None for item in items):
            reason = "the run recorded no loss of its expected answers"
        return LiveCheck(name, "not measured", 0, reason)
    n = len(scored)
    if n < MIN_ITEMS:
        return LiveCheck(name, "not measured", n, TOO_FEW.format(n))
    changes = [losses[item.id] - (item.loss or 0.0) for item in scored]
    mean = sum(changes) / n
    spread = sum(map(abs, changes)) / n
    message = (
        f"loss of expected answers {mean:+.4f} nats/token, {spread:.4f} per item regardless of sign"
    )
    is_far = abs(mean) > MAX_MEAN_NATS or spread > MAX_ITEM_NATS
    num_silent = sum(item.loss is not None and bool(item.documents) for item in items) - n
    if num_silent:
        message += f"; {num_silent} more without finite log-probabilities"
    unfailed: Status = "warning" if num_silent else "ok"
    return LiveCheck(name, "failed" if is_far else unfailed, n, message)


def _check_ends(pairs: Sequence[_Pair]) -> LiveCheck:
    """Compare how many answers end by themselves."""
    name = "end"
    answered = [pair for pair in pairs if pair.answer.finish_reason]
    n = len(answered)
    if n < MIN_ITEMS:
        reason = TOO_FEW.format(n) if n else "the server gives no finish_reason"
        return LiveCheck(name, "not measured", n, reason)
    ids = tuple(pair.item.id for pair in answered)
    ended = tuple(float(not pair.item.is_cut) for pair in answered)
    recorded = MetricValues(TEST, "ended", ids, ended)
    served = tuple(float(pair.answer.finish_reason in ENDED) for pair in answered)
    comparison = compare_measurements(recorded, replace(recorded, values=served))
    message = f"{sum(ended):.0f} recorded and {sum(served):.0f} served answers ended"
    (verdict,) = judge_comparisons([comparison])
    if verdict in ("better", "worse"):
        return LiveCheck(name, "failed", n, f"{message}: other end tokens")
    status: Status = "ok" if served == ended else "warning"
    return LiveCheck(name, status, n, message)


def _check_stability(
    client: LiveClient, options: RequestOptions, pairs: Sequence[_Pair]
) -> LiveCheck:
    """Ask some items again while others run: a greedy answer stays the same, but for ties."""
    name = "stable"
    repeated = pairs[:NUM_REPEATED]
    others = [pair.item for pair in pairs[NUM_REPEATED : 2 * NUM_REPEATED]]
    n = len(repeated)
    if n < MIN_ITEMS:
        return LiveCheck(name, "not measured", n, TOO_FEW.format(n))
    items = [pair.item for pair in repeated] + others
    with open_request_pool(len(items)) as pool:
        answers = list(pool.map(lambda item: ask(client, options, item), items))[:n]
    gaps: list[float | None] = []
    for pair, answer in zip(repeated, answers, strict=True):
        if answer.text != pair.answer.text:
            gaps.append(answer.measure_preference(pair.answer.text))
    message = f"{n - len(gaps)} of {n} are the same when {len(items)} are asked at once"
    unclear = gaps.count(None)
    clear = sum(gap is not None and gap > MAX_TIE_NATS for gap in gaps)
    if clear or unclear > n / 2:
        return LiveCheck(name, "failed", n, f"{message}: the answers are not greedy")
    return LiveCheck(name, "warning" if unclear else "ok", n, message)
