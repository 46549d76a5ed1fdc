"""Check whether the base model already knows the training answers.

    ArmRunner -> KnowledgeResult: how many answers are known highly, maybe, weakly, not at all

Each training question is asked NUM_SHOT_SETS times with other training rows as shots, greedily and
NUM_SAMPLES times at a temperature. An answer is known if the output contains it: always with greedy
decoding (highly), sometimes (maybe), only when sampled (weakly), never (unknown). The categories
are SliCK's (Gekhman 2024), with fewer prompts and samples; the same work found that learning
unknown facts encourages hallucination. Left out: answers that are not short facts.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tunesmith.advise.measured.prompting import add_shots, get_answer
from tunesmith.advise.measured.run_arm import ArmRunner, answer_requests, sample_examples
from tunesmith.core.types import Example, GenerationRequest
from tunesmith.evaluate.generate_until import build_prompts, compute_max_new_tokens
from tunesmith.evaluate.statistics import compute_wilson_interval
from tunesmith.evaluate.text_metrics import contains

MAX_ROWS = 40
NUM_SHOTS = 4
NUM_SHOT_SETS = 4
NUM_SAMPLES = 4
TEMPERATURE = 0.7
MAX_FACT_WORDS = 12  # median words of the answers
MIN_DISTINCT_FRACTION = 0.5  # of the answers
LEVELS = ("highly", "maybe", "weakly", "unknown")


@dataclass(frozen=True)
class KnowledgeResult:
    rows: int
    counts: dict[str, int]  # by level
    unknown_share: float  # fraction of the rows
    low: float  # its 95% interval
    high: float
    shot_sets: int = NUM_SHOT_SETS
    num_samples: int = NUM_SAMPLES


def explain_no_facts(runner: ArmRunner) -> str:
    """Return why the training answers are not short facts, or nothing if they are."""
    if runner.inputs.response_schema is not None:
        return "answers follow a schema"
    examples = sample_examples(runner.rows, 0, 4 * MAX_ROWS)
    answers = [get_answer(example).strip() for example in examples]
    if len(answers) <= NUM_SHOTS + 1:
        return f"only {len(answers)} training rows"
    if statistics.median(len(answer.split()) for answer in answers) > MAX_FACT_WORDS:
        return f"half of the answers have more than {MAX_FACT_WORDS} words"
    if len(set(answers)) < MIN_DISTINCT_FRACTION * len(answers):
        return "many answers repeat, like labels"
    return ""


def check_knowledge(runner: ArmRunner, num_rows: int = MAX_ROWS) -> KnowledgeResult:
    """Ask the untrained model about `num_rows` training rows."""
    pool = sample_examples(runner.rows, 0, num_rows + NUM_SHOT_SETS * NUM_SHOTS)
    tested = pool[:num_rows]
    shot_pool = pool[num_rows:]
    if len(shot_pool) < NUM_SHOTS:
        # with few rows the tested ones serve as shots for each other
        tested = pool
        shot_pool = pool
    greedy: Counter[int] = Counter()
    sampled: Counter[int] = Counter()
    for set_index in range(NUM_SHOT_SETS):
        for row, is_correct, is_sampled in _iter_answers(runner, tested, shot_pool, set_index):
            counts = sampled if is_sampled else greedy
            counts[row] += is_correct
    levels = Counter(_classify_knowledge(greedy[row], sampled[row]) for row in range(len(tested)))
    low, high = compute_wilson_interval(levels["unknown"], len(tested))
    return KnowledgeResult(
        rows=len(tested),
        counts={level: levels[level] for level in LEVELS},
        unknown_share=levels["unknown"] / len(tested),
        low=low,
        high=high,
    )


def _classify_knowledge(greedy: int, sampled: int) -> str:
    if greedy:
        return "highly" if greedy == NUM_SHOT_SETS else "maybe"
    return "weakly" if sampled else "unknown"


def _iter_answers(
    runner: ArmRunner, tested: Sequence[Example], shot_pool: Sequence[Example], set_index: int
) -> Iterator[tuple[int, bool, bool]]:
    """Yield the row, whether its answer is correct, and whether it was sampled."""
    prompts = [
        add_shots(example, _select_shots(shot_pool, set_index, example)) for example in tested
    ]
    questions = build_prompts(prompts, runner.inputs.renderer)
    max_answer_tokens = compute_max_new_tokens(questions, needs_end=True)
    requests = [GenerationRequest(question.prompt_ids, max_answer_tokens) for question in questions]
    for sample in range(NUM_SAMPLES):
        seed = 1000 * set_index + sample
        for question in questions:
            requests.append(
                GenerationRequest(
                    question.prompt_ids, max_answer_tokens, temperature=TEMPERATURE, seed=seed
                )
            )
    runner.model.network.eval()
    for index, output in enumerate(answer_requests(runner, requests)):
        row = index % len(questions)
        is_correct = bool(contains(output.text, questions[row].expected, None))
        yield row, is_correct, index >= len(questions)


def _select_shots(shot_pool: Sequence[Example], set_index: int, example: Example) -> list[Example]:
    """Return NUM_SHOTS examples of a set, without the example itself."""
    candidates: list[Example] = []
    for offset in range(NUM_SHOTS + 1):
        candidates.append(shot_pool[(set_index * NUM_SHOTS + offset) % len(shot_pool)])
    return [candidate for candidate in candidates if candidate.id != example.id][:NUM_SHOTS]
