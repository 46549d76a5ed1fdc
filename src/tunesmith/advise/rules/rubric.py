"""The rules of `tunesmith advise`: a function for each, with its source in the docstring.

In: Requirements. Out: a RuleResult, or None where the rule does not apply. A result recommends some
approaches and rules out others, for the needs that it names; nothing is weighed. A new rule is a
function and a line in RULES, whose order is the order of the printed reasons.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from tunesmith.advise.rules.facts import NEEDS, Need, Requirements

Approach = Literal["prompt", "constrained decoding", "retrieval", "cpt", "sft", "preference"]
APPROACHES: tuple[Approach, ...] = (
    "prompt",
    "constrained decoding",
    "retrieval",
    "cpt",
    "sft",
    "preference",
)
TRAINING_APPROACHES: tuple[Approach, ...] = ("cpt", "sft", "preference")
# published: in the sources named; extrapolated: from them to this case; ours: a judgment, or a
# measurement that the source names
RuleConfidence = Literal["published", "extrapolated", "ours"]

BYTES_PER_TOKEN = 4  # English; fewer in other languages and in code
MIN_EXAMPLES = 50
MIN_PAIRS = 500
MIN_TEXT_BYTES = 1_300_000 * BYTES_PER_TOKEN
AMPLE_TEXT_BYTES = 1_000_000_000 * BYTES_PER_TOKEN
MAX_PROMPT_BYTES = 32_000 * BYTES_PER_TOKEN
MIN_PARAPHRASES = 10
MIN_MONTHLY_REQUESTS = 1_000
PLATEAU_EXAMPLES = 1_000


@dataclass(frozen=True)
class RuleResult:
    """The conclusion of a rule for `needs`; `concerns` are the approaches that it comments on.

    A source marked unverified is cited from memory; the docstring of its rule has the title.
    """

    needs: tuple[Need, ...]
    explanation: str
    source: str
    confidence: RuleConfidence
    recommended: tuple[Approach, ...] = ()
    ruled_out: tuple[Approach, ...] = ()
    concerns: tuple[Approach, ...] = ()
    common_advice: str = ""
    rule: str = ""  # name of the function


# ---------------------------------------------------------------- prompts first


def recommend_good_prompt(requirements: Requirements) -> RuleResult | None:
    """A good prompt leaves nothing to gain but cost (recommend_prompt_distillation)."""
    if requirements.prompt != "good":
        return None
    explanation = "the prompt works well: anything else would add cost and a model to maintain"
    needs: tuple[Need, ...] = tuple(need for need in NEEDS if need != "latency")
    return RuleResult(
        needs, explanation, "", "ours", recommended=("prompt",), ruled_out=TRAINING_APPROACHES
    )


def reject_needless_retrieval(requirements: Requirements) -> RuleResult | None:
    """A prompt that works without documents needs no index."""
    if requirements.prompt != "good":
        return None
    explanation = "the prompt works well without documents"
    return RuleResult(("facts", "domain"), explanation, "", "ours", ruled_out=("retrieval",))


def recommend_trying_prompts(requirements: Requirements) -> RuleResult | None:
    """Sclar 2023 (2310.11324): prompt formatting alone moves accuracy by a median of 7.5 points
    and by up to 76."""
    if requirements.prompt not in (None, "untried"):
        return None
    explanation = (
        "no prompt has been tried: it takes an afternoon, and its score is what training has to "
        "beat. Try several: formatting alone moves accuracy by a median of 7.5 points, by up to 76"
    )
    needs: tuple[Need, ...] = ("format", "tone", "skill")
    return RuleResult(needs, explanation, "Sclar 2023", "published", recommended=("prompt",))


def reject_untested_training(requirements: Requirements) -> RuleResult | None:
    """Mosbach 2023 (2305.16938): at the same model size, fine-tuning and few-shot prompting
    generalize equally well, both with high variance. Not for tone, where training is known to win
    (recommend_sft_for_tone)."""
    if requirements.prompt not in (None, "untried"):
        return None
    explanation = (
        "it may not be needed: at the same model size, few-shot prompting and fine-tuning "
        "generalize equally well"
    )
    ruled_out: tuple[Approach, ...] = ("sft", "preference")
    return RuleResult(
        ("format", "skill"), explanation, "Mosbach 2023", "published", ruled_out=ruled_out
    )


def recommend_few_shot(requirements: Requirements) -> RuleResult | None:
    """Examples too few for training fit into the prompt, all of them or the nearest ones."""
    if not 0 < (requirements.examples or 0) < MIN_EXAMPLES or requirements.prompt == "good":
        return None
    explanation = (
        f"{requirements.examples} examples fit into the prompt: all of them, or those most similar "
        "to the question"
    )
    needs: tuple[Need, ...] = ("format", "tone", "skill")
    return RuleResult(needs, explanation, "", "ours", recommended=("prompt",))


# ---------------------------------------------------------------- facts


def recommend_retrieval(requirements: Requirements) -> RuleResult | None:
    """Ovadia 2023 (2312.05934), events after the training cutoff, Mistral-7B: base .481, fine-tuned
    on plain text .504, fine-tuned on paraphrases .588, retrieval .875."""
    explanation = (
        "accuracy of a 7B model on events after its cutoff: 0.481 as it is, 0.504 fine-tuned, "
        "0.875 with retrieval"
    )
    if not requirements.raw_text:
        explanation += ". Retrieval needs documents, but you have none yet: write them first"
    return RuleResult(
        ("facts",), explanation, "Ovadia 2023", "published", recommended=("retrieval",)
    )


def recommend_facts_in_prompt(requirements: Requirements) -> RuleResult | None:
    """Most models accept 32,000 tokens, small ones fewer; prefix caching pays for them once."""
    num_bytes = requirements.raw_text or 0
    if not 0 < num_bytes <= MAX_PROMPT_BYTES:
        return None
    explanation = f"about {num_bytes // BYTES_PER_TOKEN:,} tokens: all of it fits into a prompt"
    return RuleResult(
        ("facts",), explanation, "", "ours", recommended=("prompt",), ruled_out=("retrieval",)
    )


def reject_training_facts(requirements: Requirements) -> RuleResult | None:
    """Gekhman 2024 (2405.05904): fine-tuned on unknown facts, a model falls from 37.5% correct
    (early stopping) to 25.8% (convergence). Not when each fact has many paraphrases
    (recommend_paraphrased_facts).

    experiments/facts: trained facts were answered more often than retrieved ones. The rule stays:
    retrieval was limited by its passage, and what training does to other answers, which is the
    reason of the rule, was not measured."""
    if _has_many_paraphrases(requirements):
        return None
    explanation = (
        "learning new facts teaches hallucination: accuracy fell from 37.5% with early stopping to "
        "25.8% at convergence. Weights do learn them: a 135M model answered 58% of 60 questions "
        "after one wording of each fact and 63% after ten; retrieval answered 28%, since its "
        "passage held only 45% of the answers. What it then makes up elsewhere was not measured"
    )
    source = "Gekhman 2024, experiments/facts"
    return RuleResult(("facts",), explanation, source, "published", ruled_out=TRAINING_APPROACHES)


def recommend_paraphrased_facts(requirements: Requirements) -> RuleResult | None:
    """The exception. Ovadia 2023: accuracy rises with the number of paraphrases (.504 -> .588,
    retrieval .875). EntiGraph, Yang 2024 (2409.07431): 1.3M tokens rewritten into 455M: 39.5 ->
    56.2, retrieval 60.4, both 62.6."""
    if not _has_many_paraphrases(requirements):
        return None
    explanation = (
        f"with {requirements.paraphrases} wordings of each fact, weights do learn facts, in "
        "addition to retrieval: a corpus rewritten to 350 times its length gave 56.2, retrieval "
        "60.4, both 62.6"
    )
    return RuleResult(
        ("facts",),
        explanation,
        "Ovadia 2023, Yang 2024",
        "extrapolated",
        recommended=("sft",),
        common_advice="facts belong in an index only",
    )


def _has_many_paraphrases(requirements: Requirements) -> bool:
    paraphrases = requirements.paraphrases or 0
    return paraphrases >= MIN_PARAPHRASES and (requirements.examples or 0) >= MIN_EXAMPLES


def reject_training_changing_facts(requirements: Requirements) -> RuleResult | None:
    """A trained fact is wrong after the next change; an index takes a new document in seconds."""
    if requirements.facts_change in ("never", "yearly"):
        return None
    frequency = "it is unknown how often they change"
    if requirements.facts_change is not None:
        frequency = f"they change {requirements.facts_change}"
    explanation = f"{frequency}: an index updates in seconds, weights need training and evaluation"
    return RuleResult(("facts",), explanation, "", "ours", ruled_out=TRAINING_APPROACHES)


def reject_training_private_facts(requirements: Requirements) -> RuleResult | None:
    """Carlini 2021 (2012.07805, Extracting Training Data from Large Language Models; from memory,
    unverified): hundreds of training texts were extracted verbatim from GPT-2, some of which
    occurred in a single document. Retrieval can check permissions."""
    if not requirements.private:
        return None
    explanation = (
        "anyone who can query a model can extract training text verbatim; an index can check "
        "permissions"
    )
    source = "Carlini 2021, unverified"
    return RuleResult(("facts",), explanation, source, "published", ruled_out=TRAINING_APPROACHES)


# ---------------------------------------------------------------- format, tone


def recommend_constrained_decoding(_: Requirements) -> RuleResult | None:
    """Willard & Louf 2023 (2307.09702), Dong 2024 (2411.15100): tokens that the grammar forbids are
    never sampled, so every finished answer is valid. The values are still the model's."""
    explanation = (
        "a grammar or JSON schema in the server makes every finished answer valid without "
        "training; it does not make its content correct"
    )
    return RuleResult(
        ("format",),
        explanation,
        "Willard & Louf 2023, Dong 2024",
        "published",
        recommended=("constrained decoding",),
        common_advice="fine-tune for JSON without elaborate prompts",
    )


def recommend_sft_for_format(requirements: Requirements) -> RuleResult | None:
    """`tunesmith demo`, SmolLM2-135M-Instruct, 260 rows: schema-valid answers 0 -> .963 of 80
    held-out rows; .975 in other runs."""
    if requirements.prompt not in ("bad", "close"):
        return None
    explanation = (
        "prompts were not enough, and a grammar does not fill in the right values. A 135M model "
        "went from 0% to 96% schema-valid answers with 260 rows"
    )
    return RuleResult(("format",), explanation, "tunesmith demo", "ours", recommended=("sft",))


def recommend_sft_for_tone(_: Requirements) -> RuleResult | None:
    """Marquardt & Brule 2025 (2507.04889): above 90 to 95% on tone with 100 examples, 23 to 46%
    prompted; little more after about 1,000."""
    explanation = (
        "with 100 examples more than 90% of answers had the tone, against 23 to 46% with prompts; "
        "more than 1,000 examples added little"
    )
    source = "Marquardt & Brule 2025"
    return RuleResult(("tone",), explanation, source, "published", recommended=("sft",))


def suggest_thousand_rows(requirements: Requirements) -> RuleResult | None:
    """LIMA, Zhou 2023 (2305.11206): 2,000 filtered rows scored 3.83, unfiltered 3.33; no gain from
    2,000 to 32,000. Xia 2024 (2410.09335): at scale hardly any selection beats random choice."""
    if (requirements.examples or 0) < 2 * PLATEAU_EXAMPLES:
        return None
    explanation = (
        f"for format and tone, 1,000 good rows may do as well as all {requirements.examples:,}: "
        "2,000 filtered rows scored 3.83 of 6, unfiltered ones 3.33, and 32,000 no more. Compare "
        "any selection with a random 1,000, which few beat"
    )
    needs: tuple[Need, ...] = ("format", "tone")
    return RuleResult(needs, explanation, "Zhou 2023, Xia 2024", "published", concerns=("sft",))


# ---------------------------------------------------------------- cost


def recommend_prompt_distillation(requirements: Requirements) -> RuleResult | None:
    """Snell 2022 (2209.15189, Learning by Distilling Context): instructions and examples of a
    prompt can be trained into the weights. Hsieh 2023 (2305.02301, Distilling Step-by-Step): a 770M
    model tuned on a large one's answers and rationales beat a prompted 540B model. Both from
    memory, unverified."""
    if requirements.prompt not in ("good", "close"):
        return None
    explanation = (
        "the good answers of the long prompt are training rows: train with a short prompt, or a "
        "smaller model. First check what prefix caching in the server already saves"
    )
    source = "Snell 2022, Hsieh 2023, unverified"
    return RuleResult(("latency",), explanation, source, "published", recommended=("sft",))


def reject_premature_distillation(requirements: Requirements) -> RuleResult | None:
    """First good, then cheap: the answers to train on come from a good prompt."""
    if requirements.prompt in ("good", "close"):
        return None
    explanation = "no prompt gives good answers yet: there is nothing to make cheaper"
    return RuleResult(
        ("latency",), explanation, "", "ours", recommended=("prompt",), ruled_out=("sft",)
    )


def reject_few_requests(requirements: Requirements) -> RuleResult | None:
    """1,000 requests a month are 33 a day, too few to pay for making and maintaining a model."""
    requests = requirements.requests_month
    if requests is None or requests >= MIN_MONTHLY_REQUESTS:
        return None
    explanation = f"{requests:,} requests a month save too little to pay for a model of your own"
    return RuleResult(
        ("latency",), explanation, "", "ours", recommended=("prompt",), ruled_out=("sft",)
    )


# ---------------------------------------------------------------- language of a domain


def recommend_continued_pretraining(requirements: Requirements) -> RuleResult | None:
    """Gururangan 2020 (2004.10964, Don't Stop Pretraining; from memory, unverified): continued
    pretraining on 2 to 8 billion tokens of a domain helped in all four domains."""
    num_bytes = requirements.raw_text or 0
    if num_bytes < MIN_TEXT_BYTES:
        return None
    explanation = (
        f"about {_format_million_tokens(num_bytes)} million tokens of raw text: a language is "
        "learned from text, not from questions. It helped in all four domains tried, with 2 to 8 "
        "billion tokens"
    )
    confidence: RuleConfidence = "published" if num_bytes >= AMPLE_TEXT_BYTES else "extrapolated"
    source = "Gururangan 2020, unverified"
    return RuleResult(("domain",), explanation, source, confidence, recommended=("cpt",))


def reject_small_corpus(requirements: Requirements) -> RuleResult | None:
    """Yang 2024 (2409.07431), Llama-3-8B on 1.3M raw tokens: 39.49 -> 38.15; with retrieval
    60.35."""
    num_bytes = requirements.raw_text or 0
    if num_bytes >= MIN_TEXT_BYTES:
        return None
    amount = f"about {_format_million_tokens(num_bytes)} million tokens"
    recommended: tuple[Approach, ...] = ("retrieval",)
    if not num_bytes:
        amount = "there is no raw text"
        recommended = ()
    explanation = (
        f"{amount}: training on 1.3 million made an 8B model worse (39.5 to 38.2), retrieval from "
        "the same text made it better (60.4)"
    )
    return RuleResult(
        ("domain",),
        explanation,
        "Yang 2024",
        "published",
        recommended=recommended,
        ruled_out=("cpt",),
        common_advice="continued pretraining for private domain language",
    )


def _format_million_tokens(num_bytes: int) -> str:
    return f"{num_bytes / BYTES_PER_TOKEN / 1e6:,.1f}"


def recommend_sft_after_cpt(requirements: Requirements) -> RuleResult | None:
    """Cheng 2023 (2309.09530, Adapting Large Language Models via Reading Comprehension; from
    memory, unverified): pretraining on raw domain text adds knowledge and costs the ability to
    answer questions. Their remedy is questions within the text; that a small SFT set does the same
    is common practice."""
    if (requirements.raw_text or 0) < MIN_TEXT_BYTES:
        return None
    explanation = (
        "raw text teaches the language and costs some of the ability to answer: follow it with a "
        "small set of questions and answers"
    )
    source = "Cheng 2023, unverified"
    return RuleResult(("domain",), explanation, source, "extrapolated", recommended=("sft",))


# ---------------------------------------------------------------- skills


def recommend_sft_for_skill(requirements: Requirements) -> RuleResult | None:
    """Raghavendra 2024 (2410.03717): skills follow a power law in the number of examples. Dong 2023
    (2310.05492): chat is flat after about 1,000, mathematics and code are not."""
    if requirements.prompt not in ("bad", "close"):
        return None
    explanation = (
        "prompts were not enough, and skills grow with the number of examples by a power law: "
        "mathematics and code kept improving where chat was flat after 1,000"
    )
    confidence: RuleConfidence = "extrapolated"
    if (requirements.examples or 0) >= PLATEAU_EXAMPLES:
        confidence = "published"
    return RuleResult(
        ("skill",),
        explanation,
        "Raghavendra 2024, Dong 2023",
        confidence,
        recommended=("sft",),
        common_advice="prefer 1,000 clean rows to 1,000,000 noisy ones; true of tone and format",
    )


# ---------------------------------------------------------------- training data


def reject_few_examples(requirements: Requirements) -> RuleResult | None:
    """OpenAI's fine-tuning guide as of 2024 (from memory, unverified): clear improvements usually
    come with 50 to 100 examples. Facts have their own rules."""
    if (requirements.examples or 0) >= MIN_EXAMPLES:
        return None
    count = f"{requirements.examples or 'no'} examples"
    explanation = f"{count}: clear gains need 50 to 100, plus some to measure with"
    needs: tuple[Need, ...] = tuple(need for need in NEEDS if need != "facts")
    source = "OpenAI's fine-tuning guide, unverified"
    return RuleResult(needs, explanation, source, "published", ruled_out=("sft",))


def recommend_preference_training(requirements: Requirements) -> RuleResult | None:
    """Rafailov 2023 (2305.18290), and Castricato 2024 (2402.07896): told to avoid a topic, a 7B
    model mentioned it as often (.33 -> .36); a 13B model trained on pairs did as well as GPT-4. The
    minimum is ours."""
    if (requirements.pairs or 0) < MIN_PAIRS:
        return None
    explanation = (
        f"{requirements.pairs:,} pairs teach what not to do, which small models do not learn from "
        "prompts: told to avoid a topic, a 7B model mentioned it in 36% of answers instead of 33%. "
        "Comes after SFT, or on an instruct model"
    )
    source = "Rafailov 2023, Castricato 2024"
    return RuleResult(
        ("tone", "skill"), explanation, source, "published", recommended=("preference",)
    )


def reject_few_pairs(requirements: Requirements) -> RuleResult | None:
    """Published runs use thousands of pairs; with fewer, the chosen answers serve as SFT rows."""
    if requirements.pairs is None or requirements.pairs >= MIN_PAIRS:
        return None
    explanation = (
        f"{requirements.pairs} pairs; published runs use thousands. The chosen answers alone are "
        "rows for SFT"
    )
    return RuleResult(("tone", "skill"), explanation, "", "ours", ruled_out=("preference",))


# ---------------------------------------------------------------- notes


def suggest_raft_training(requirements: Requirements) -> RuleResult | None:
    """RAFT, Zhang 2024 (2403.10131): a model tuned on a domain and then given documents fell from
    61.1 to 42.6 on one set; trained with right and wrong documents in the prompt, it did not."""
    if "facts" not in requirements.need or len(requirements.need) == 1:
        return None
    explanation = (
        "if you do both, train with retrieved documents in the prompt, wrong ones included: a "
        "model tuned without them got worse at reading them (61.1 to 42.6)"
    )
    concerns: tuple[Approach, ...] = ("retrieval", "sft")
    return RuleResult(NEEDS, explanation, "Zhang 2024 (RAFT)", "published", concerns=concerns)


def warn_small_model_prompting(requirements: Requirements) -> RuleResult | None:
    """Mosbach 2023: few-shot prompting needs a large model, fine-tuning works on small ones."""
    if not requirements.private:
        return None
    explanation = (
        "small models that you can host follow prompts poorly, and fine-tuning works on them"
    )
    needs: tuple[Need, ...] = ("format", "tone", "skill")
    return RuleResult(needs, explanation, "Mosbach 2023", "published", concerns=("prompt",))


def warn_training_data_extraction(requirements: Requirements) -> RuleResult | None:
    """Carlini 2021 again (unverified): a model is as confidential as its training text."""
    if not requirements.private:
        return None
    explanation = (
        "keep the trained model as confidential as its training text, which can be extracted from "
        "it verbatim"
    )
    source = "Carlini 2021, unverified"
    return RuleResult(NEEDS, explanation, source, "published", concerns=TRAINING_APPROACHES)


def warn_safety_loss(_: Requirements) -> RuleResult | None:
    """Qi 2023 (2310.03693): benign rows raised a chat model's harmful answers from .3% to 16.1%,
    with LoRA 25.2%."""
    explanation = (
        "benign rows raised the harmful answers of a chat model from 0.3% to 16%, with LoRA to "
        "25%: test with harmful questions before and after"
    )
    return RuleResult(NEEDS, explanation, "Qi 2023", "published", concerns=("sft",))


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
