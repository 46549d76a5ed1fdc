"""The rules: one function a rule, what it says and the source of it in the docstring.

In: the Situation. Out: a Reason, or None where the rule has nothing to say. A reason speaks for some answers and rules
out others, for the needs that it names; nothing is weighed. `usual` is what common guides say where this differs.
Confidence: published (in the sources named), extrapolated (from them to here), ours (a judgement, or a
measurement of ours that the source names).
"""

from __future__ import annotations

from collections.abc import Callable

from tunesmith.advise.rules.by_need import (
    domain_pretrained,
    domain_too_small,
    facts_change,
    facts_fit_the_prompt,
    facts_in_weights,
    facts_looked_up,
    facts_said_many_ways,
    format_constrained,
    format_trained,
    nothing_to_shorten,
    private_facts,
    shorter_prompt,
    skill_trained,
    tasks_after_the_language,
    thousand_will_do,
    tone_trained,
    too_few_requests,
)
from tunesmith.advise.rules.general import (
    few_examples_go_in_the_prompt,
    pairs_rank_answers,
    private_rows,
    prompt_has_the_facts,
    prompt_is_enough,
    safety,
    small_models_are_prompted_badly,
    too_few_examples,
    too_few_pairs,
    trained_with_retrieval,
    try_a_prompt,
    untried_prompt,
)
from tunesmith.advise.rules.questionnaire import Situation
from tunesmith.advise.rules.reason import Reason

RULES: tuple[Callable[[Situation], Reason | None], ...] = (
    prompt_is_enough,
    prompt_has_the_facts,
    try_a_prompt,
    untried_prompt,
    few_examples_go_in_the_prompt,
    facts_looked_up,
    facts_fit_the_prompt,
    facts_in_weights,
    facts_said_many_ways,
    facts_change,
    private_facts,
    format_constrained,
    format_trained,
    tone_trained,
    thousand_will_do,
    shorter_prompt,
    nothing_to_shorten,
    too_few_requests,
    domain_pretrained,
    domain_too_small,
    tasks_after_the_language,
    skill_trained,
    too_few_examples,
    pairs_rank_answers,
    too_few_pairs,
    trained_with_retrieval,
    small_models_are_prompted_badly,
    private_rows,
    safety,
)
