"""Whether the base knows already what it would be taught.

    Subject -> Knowledge: of training answers, the share that is known highly, maybe, weakly, not at all

A training question is asked with other training rows as examples, SETS times, greedily and SAMPLED
times at a temperature. Known is what is contained in the answer: always under greedy choice
(highly), sometimes (maybe), only when sampled (weakly), never (unknown). The categories are SliCK's
(Gekhman 2024), with fewer sets and samples; the same work found that learning unknown facts teaches
to make things up. Left out: answers that are no short facts."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith.advise.measured.prompting import add_shots, get_answer
from tunesmith.advise.measured.run_arm import ArmRunner, answer_requests, sample_examples
from tunesmith.core.types import Example, GenerationRequest
from tunesmith.evaluate.generate_until import build_prompts, compute_max_new_tokens
from tunesmith.evaluate.intervals import compute_wilson_interval
from tunesmith.evaluate.text_metrics import contains

MAX_ROWS, NUM_SHOTS, NUM_SHOT_SETS, NUM_SAMPLES, TEMPERATURE = 40, 4, 4, 4, 0.7
MAX_FACT_WORDS, MIN_DISTINCT_SHARE = (
    12,
    0.5,
)  # words of an answer; share of answers that differ from all others
LEVELS = ("highly", "maybe", "weakly", "unknown")


@dataclass(frozen=True)
class KnowledgeResult:
    """`counts`: rows of each level; `share`: of rows whose answer is unknown, with its interval."""

    rows: int
    counts: dict[str, int]
    unknown_share: float
    low: float
    high: float
    shot_sets: int = NUM_SHOT_SETS
    num_samples: int = NUM_SAMPLES


def explain_no_facts(runner: ArmRunner) -> str:
    """Why the training answers are no short facts; nothing if they are."""
    if runner.inputs.response_schema is not None:
        return "answers follow a schema"
    answers = [
        get_answer(example).strip() for example in sample_examples(runner.rows, 0, 4 * MAX_ROWS)
    ]
    if len(answers) <= NUM_SHOTS + 1:
        return f"{len(answers)} training rows"
    if statistics.median(len(answer.split()) for answer in answers) > MAX_FACT_WORDS:
        return f"half of the answers have more than {MAX_FACT_WORDS} words"
    if len(set(answers)) < MIN_DISTINCT_SHARE * len(answers):
        return "many answers are alike, as labels are"
    return ""


def check_knowledge(runner: ArmRunner, num_rows: int = MAX_ROWS) -> KnowledgeResult:
    """Of the first `rows` training rows; the model is as it was before any training."""
    pool = sample_examples(runner.rows, 0, num_rows + NUM_SHOT_SETS * NUM_SHOTS)
    tested, shot_pool = pool[:num_rows], pool[num_rows:]
    if len(shot_pool) < NUM_SHOTS:  # few rows: the others that are asked are shown
        tested, shot_pool = pool, pool
    greedy: Counter[int] = Counter()
    sampled: Counter[int] = Counter()
    for set_index in range(NUM_SHOT_SETS):
        for index, is_correct, is_sampled in _iter_answers(runner, tested, shot_pool, set_index):
            (sampled if is_sampled else greedy)[index] += is_correct
    levels = Counter(
        _classify_knowledge(greedy[index], sampled[index]) for index in range(len(tested))
    )
    low, high = compute_wilson_interval(levels["unknown"], len(tested))
    counts = {level: levels[level] for level in LEVELS}
    return KnowledgeResult(len(tested), counts, levels["unknown"] / len(tested), low, high)


def _classify_knowledge(greedy: int, sampled: int) -> str:
    if greedy:
        return "highly" if greedy == NUM_SHOT_SETS else "maybe"
    return "weakly" if sampled else "unknown"


def _iter_answers(
    runner: ArmRunner, tested: Sequence[Example], shot_pool: Sequence[Example], set_index: int
):
    """(place of the row, whether its answer is right, whether it was drawn by chance)."""
    prompts = [
        add_shots(example, _select_shots(shot_pool, set_index, example)) for example in tested
    ]
    questions = build_prompts(prompts, runner.inputs.renderer)
    max_answer_tokens = compute_max_new_tokens(questions)
    requests = [GenerationRequest(question.prompt_ids, max_answer_tokens) for question in questions]
    for seed in range(NUM_SAMPLES):
        sampling = {"temperature": TEMPERATURE, "seed": 1000 * set_index + seed}
        requests += [
            GenerationRequest(question.prompt_ids, max_answer_tokens, **sampling)
            for question in questions
        ]
    runner.model.network.eval()
    for index, generation in enumerate(answer_requests(runner, requests)):
        row_index = index % len(questions)
        is_correct = contains(generation.text, questions[row_index].expected, None)
        yield row_index, int(is_correct), index >= len(questions)


def _select_shots(shot_pool: Sequence[Example], set_index: int, example: Example) -> list[Example]:
    """SHOTS of the others, never the row itself."""
    candidates = [
        shot_pool[(set_index * NUM_SHOTS + offset) % len(shot_pool)]
        for offset in range(NUM_SHOTS + 1)
    ]
    return [candidate for candidate in candidates if candidate.id != example.id][:NUM_SHOTS]
