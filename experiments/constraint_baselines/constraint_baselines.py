"""Compare a run's constraint violations with two training-free baselines.

    python experiments/constraint_baselines/constraint_baselines.py RUN [--allow-code]

    base      the model before training
    prompted  the same model with the rules in its system message
    banned    the same model with the bad token sequences banned during decoding

Both baselines are as strong as they can easily be: the rules quote what was actually said, and the
bans cover the strings of the held-out bad rows and of the base model's own bad answers.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tunesmith.core.errors import InputError
from tunesmith.core.types import Comparison, Example, GenerationOutput
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.evaluate.constraint_violations import find_matches
from tunesmith.evaluate.generate_until import EvalPrompt, build_prompts
from tunesmith.evaluate.items import build_eval_items, load_test_prompts
from tunesmith.evaluate.measure import generate_answers, grade_answers
from tunesmith.evaluate.results import EvalResults, compare_results, format_comparison
from tunesmith.model.adapters import scaled_adapter
from tunesmith.recipe.fields import Constraint
from tunesmith.session.reopen import load_trained_session
from tunesmith.session.session import Session

MAX_QUOTES = 3  # per rule
MAX_BANS = 1000  # per constraint, the most frequent strings
# Enough to identify the string; a longer one is hardly ever repeated verbatim.
MAX_BAN_TOKENS = 4


def compare_baselines(
    run_dir: Path, *, allow_code: bool = False
) -> dict[str, tuple[Comparison, ...]]:
    """Return, per baseline, how the trained model differs from it on the same items.

    Raises InputError for a run without constraints or without prompts.
    """
    session = load_trained_session(run_dir)
    items = build_eval_items(session.plan, session.inputs, allow_code=allow_code)
    if not session.inputs.recipe.never or not items.prompts:
        message = "constraint baselines need constraints and prompts in `test_data`"
        fix = "add `never` and `test_data` to the recipe and train again"
        raise InputError(message, where=str(run_dir), fix=fix)
    session.model.network.eval()
    prompts = (*items.prompts, *items.eliciting_prompts)
    trained = _grade(session, prompts, generate_answers(session, prompts))
    with scaled_adapter(session.model.network, 0):  # the base
        session.model.network.eval()
        answers = _generate_baselines(session, prompts, items.eliciting_prompts)
        baselines = {name: _grade(session, prompts, outputs) for name, outputs in answers.items()}
    step = session.plan.steps
    return {
        name: compare_results(results, trained, step=step) for name, results in baselines.items()
    }


def _grade(
    session: Session, prompts: Sequence[EvalPrompt], outputs: Sequence[GenerationOutput]
) -> EvalResults:
    return EvalResults(tuple(grade_answers(session, prompts, outputs)))


def _generate_baselines(
    session: Session, prompts: Sequence[EvalPrompt], eliciting_prompts: Sequence[EvalPrompt]
) -> dict[str, list[GenerationOutput]]:
    """Return the answers of each baseline to the same prompts."""
    constraints = session.inputs.recipe.never
    renderer = session.renderer
    base_answers = generate_answers(session, prompts)
    row_answers = [(prompt.id, prompt.expected) for prompt in eliciting_prompts]
    for prompt, answer in zip(prompts, base_answers, strict=True):
        # Answers to rightful prompts are supposed to match.
        if prompt.negative is not False:
            row_answers.append((prompt.id, answer.text))
    bad_strings = collect_bad_strings(constraints, row_answers)
    rules = format_rules(constraints, bad_strings)
    examples = [add_rules(example, rules) for example in load_test_prompts(session.inputs)]
    rule_prompts = build_prompts(examples, renderer)[: len(prompts)]
    return {
        "base": base_answers,
        "prompted": generate_answers(session, rule_prompts),
        "banned": generate_answers(session, prompts, tokenize_bans(bad_strings, renderer)),
    }


def collect_bad_strings(
    constraints: Sequence[Constraint], row_answers: Iterable[tuple[str, str]]
) -> dict[str, list[str]]:
    """Return constraint name -> what it matches in (row id, answer) pairs, most frequent first."""
    counts = {constraint.name: Counter[str]() for constraint in constraints}
    for row, answer in row_answers:
        for constraint in constraints:
            counts[constraint.name].update(find_matches(constraint, answer, row))
    return {
        name: [text for text, _ in count.most_common(MAX_BANS)] for name, count in counts.items()
    }


def format_rules(
    constraints: Sequence[Constraint], bad_strings: Mapping[str, Sequence[str]]
) -> str:
    """Return the constraints as a system message; a pattern is described by what it matches."""
    lines = ["Rules for every answer:"]
    for constraint in constraints:
        quotes = [f'"{text}"' for text in bad_strings[constraint.name][:MAX_QUOTES]]
        is_described = constraint.check or constraint.text or not quotes
        rule = constraint.instruction if is_described else f"write {' or '.join(quotes)}"
        lines.append(f"- Never {rule}.")
    return "\n".join(lines)


def add_rules(example: Example, rules: str) -> Example:
    """Return the example with the rules at the end of its system message, in a new one, or before
    a plain prompt."""
    if not example.messages:
        return dataclasses.replace(example, prompt=f"{rules}\n\n{example.prompt}")
    first, *rest = example.messages
    if first["role"] == "system":
        messages = ({**first, "content": f"{first['content']}\n\n{rules}"}, *rest)
        return dataclasses.replace(example, messages=messages)
    messages = ({"role": "system", "content": rules}, *example.messages)
    turn_weights = (0.0, *example.turn_weights)
    return dataclasses.replace(example, messages=messages, turn_weights=turn_weights)


def tokenize_bans(
    bad_strings: Mapping[str, Sequence[str]], renderer: Renderer
) -> tuple[tuple[int, ...], ...]:
    """Return the first tokens of each bad string, at the start of a text and after a space."""
    bans: dict[tuple[int, ...], None] = {}
    for texts in bad_strings.values():
        for text in texts:
            for prefix in ("", " "):
                bans[tuple(renderer.encode_text(prefix + text)[:MAX_BAN_TOKENS])] = None
    return tuple(bans)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="Folder of a finished run with constraints.")
    parser.add_argument("--allow-code", action="store_true", help="Run the recipe's own metrics.")
    args = parser.parse_args()
    for name, comparisons in compare_baselines(args.run, allow_code=args.allow_code).items():
        print(f"{name} -> trained")
        for comparison in comparisons:
            print(f"  {format_comparison(comparison)}")


if __name__ == "__main__":
    main()
