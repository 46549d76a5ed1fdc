"""The rules: one function a rule, what it says and the source of it in the docstring.

In: the Situation. Out: a Reason, or None where the rule has nothing to say. A reason speaks for
some answers and rules out others, for the needs that it names; nothing is weighed. `usual` is what
common guides say where this differs. Confidence: published (in the sources named), extrapolated
(from them to here), ours (a judgement, or a measurement of ours that the source names)."""

from __future__ import annotations

from collections.abc import Callable

from tunesmith.advise.rules.by_need import (
    recommend_constrained_decoding,
    recommend_continued_pretraining,
    recommend_facts_in_prompt,
    recommend_paraphrased_facts,
    recommend_prompt_distillation,
    recommend_retrieval,
    recommend_sft_after_cpt,
    recommend_sft_for_format,
    recommend_sft_for_skill,
    recommend_sft_for_tone,
    reject_few_requests,
    reject_premature_distillation,
    reject_small_corpus,
    reject_training_changing_facts,
    reject_training_facts,
    reject_training_private_facts,
    suggest_thousand_rows,
)
from tunesmith.advise.rules.general import (
    recommend_few_shot,
    recommend_good_prompt,
    recommend_preference_training,
    recommend_trying_prompts,
    reject_few_examples,
    reject_few_pairs,
    reject_needless_retrieval,
    reject_untested_training,
    suggest_raft_training,
    warn_safety_loss,
    warn_small_model_prompting,
    warn_training_data_extraction,
)
from tunesmith.advise.rules.questionnaire import Requirements
from tunesmith.advise.rules.reason import RuleResult

RULES: tuple[Callable[[Requirements], RuleResult | None], ...] = (
    recommend_good_prompt,
    reject_needless_retrieval,
    recommend_trying_prompts,
    reject_untested_training,
    recommend_few_shot,
    recommend_retrieval,
    recommend_facts_in_prompt,
    reject_training_facts,
    recommend_paraphrased_facts,
    reject_training_changing_facts,
    reject_training_private_facts,
    recommend_constrained_decoding,
    recommend_sft_for_format,
    recommend_sft_for_tone,
    suggest_thousand_rows,
    recommend_prompt_distillation,
    reject_premature_distillation,
    reject_few_requests,
    recommend_continued_pretraining,
    reject_small_corpus,
    recommend_sft_after_cpt,
    recommend_sft_for_skill,
    reject_few_examples,
    recommend_preference_training,
    reject_few_pairs,
    suggest_raft_training,
    warn_small_model_prompting,
    warn_training_data_extraction,
    warn_safety_loss,
)
