"""Rules for one need each: facts, format and tone, cost, the language of a domain, skills. See
rubric.py."""

from __future__ import annotations

from tunesmith.advise.rules.questionnaire import Requirements
from tunesmith.advise.rules.reason import (
    AMPLE_TEXT_BYTES,
    BYTES_PER_TOKEN,
    MAX_PROMPT_BYTES,
    MIN_EXAMPLES,
    MIN_MONTHLY_REQUESTS,
    MIN_PARAPHRASES,
    MIN_TEXT_BYTES,
    PLATEAU_EXAMPLES,
    TRAINING_APPROACHES,
    Approach,
    RuleConfidence,
    RuleResult,
)

# ---------------------------------------------------------------- facts


def recommend_retrieval(requirements: Requirements) -> RuleResult | None:
    """Ovadia 2023 (2312.05934), events after training, Mistral-7B: base .481, fine-tuned .504,
    fine-tuned on paraphrases .588, retrieval .875. Tuned on plain text only."""
    explanation = "on events that a 7B model had not seen: .481 as it was, .504 fine-tuned, .875 with retrieval"
    if not requirements.raw_text:
        explanation += ". It needs the documents, and none are named: write them down first"
    return RuleResult(
        "recommend_retrieval",
        ("facts",),
        explanation,
        "Ovadia 2023",
        "published",
        recommended=("retrieval",),
    )


def recommend_facts_in_prompt(requirements: Requirements) -> RuleResult | None:
    """Most models read 32,000 tokens whole, small ones fewer; a server that caches prefixes pays
    for them once."""
    if not 0 < (requirements.raw_text or 0) <= MAX_PROMPT_BYTES:
        return None
    explanation = f"about {(requirements.raw_text or 0) // BYTES_PER_TOKEN:,} tokens: all of it fits into the prompt of most models"
    return RuleResult(
        "recommend_facts_in_prompt",
        ("facts",),
        explanation,
        "",
        "ours",
        recommended=("prompt",),
        ruled_out=("retrieval",),
    )


def reject_training_facts(requirements: Requirements) -> RuleResult | None:
    """Gekhman 2024 (2405.05904): trained on facts it did not know, a model falls from 37.5 (early
    stop) to 25.8 right answers at convergence. Not where each fact is said in many ways
    (`recommend_paraphrased_facts`)."""
    if _has_many_paraphrases(requirements):
        return None
    explanation = "from few wordings facts are learned late and badly, and learning them teaches to make things up: "
    explanation += "right answers fell from 37.5%, had training stopped early, to 25.8%"
    return RuleResult(
        "reject_training_facts",
        ("facts",),
        explanation,
        "Gekhman 2024",
        "published",
        ruled_out=TRAINING_APPROACHES,
    )


def recommend_paraphrased_facts(requirements: Requirements) -> RuleResult | None:
    """The exception. Ovadia 2023: accuracy rises with the number of paraphrases (.504 -> .588,
    retrieval .875). EntiGraph, Yang 2024 (2409.07431): 1.3M tokens rewritten into 455M: 39.5 ->
    56.2, retrieval 60.4, both 62.6."""
    if not _has_many_paraphrases(requirements):
        return None
    explanation = f"each fact is said in {requirements.paraphrases} ways: then weights do take facts, as an addition to retrieval. "
    explanation += (
        "Rewritten to 350 times its length, a corpus gave 56.2, retrieval 60.4, both 62.6"
    )
    common_advice = "facts belong into an index only"
    return RuleResult(
        "recommend_paraphrased_facts",
        ("facts",),
        explanation,
        "Ovadia 2023, Yang 2024",
        "extrapolated",
        recommended=("sft",),
        common_advice=common_advice,
    )


def _has_many_paraphrases(requirements: Requirements) -> bool:
    return (requirements.paraphrases or 0) >= MIN_PARAPHRASES and (
        requirements.examples or 0
    ) >= MIN_EXAMPLES


def reject_training_changing_facts(requirements: Requirements) -> RuleResult | None:
    """What is trained in today is wrong after the next change; an index takes a new document in
    seconds."""
    if requirements.facts_change in ("never", "yearly"):
        return None
    frequency_text = (
        "how often they change is not said"
        if requirements.facts_change is None
        else f"they change {requirements.facts_change}"
    )
    explanation = (
        f"{frequency_text}: an index is updated in seconds, weights by training and measuring again"
    )
    return RuleResult(
        "reject_training_changing_facts",
        ("facts",),
        explanation,
        "",
        "ours",
        ruled_out=TRAINING_APPROACHES,
    )


def reject_training_private_facts(requirements: Requirements) -> RuleResult | None:
    """Carlini 2021 (2012.07805, Extracting Training Data from Large Language Models; from memory,
    unverified): hundreds of training texts were pulled out of GPT-2 word for word, some that stood
    in one document only. Retrieval can look at who asks."""
    if not requirements.private:
        return None
    explanation = "who may use a model can pull its training text out word for word; an index can look at who asks"
    return RuleResult(
        "reject_training_private_facts",
        ("facts",),
        explanation,
        "Carlini 2021, unverified",
        "published",
        ruled_out=TRAINING_APPROACHES,
    )


# ---------------------------------------------------------------- format, tone


def recommend_constrained_decoding(_: Requirements) -> RuleResult | None:
    """Willard & Louf 2023 (2307.09702), Dong 2024 (2411.15100): tokens that the grammar does not
    allow are never sampled, so whatever is finished is valid. What stands in the fields is the
    model's."""
    explanation = "a grammar or JSON schema in the server makes every finished answer valid, without training; not its content"
    common_advice = "fine-tuning, for JSON without elaborate prompts"
    return RuleResult(
        "recommend_constrained_decoding",
        ("format",),
        explanation,
        "Willard & Louf 2023, Dong 2024",
        "published",
        recommended=("constrained decoding",),
        common_advice=common_advice,
    )


def recommend_sft_for_format(requirements: Requirements) -> RuleResult | None:
    """`tunesmith demo`, SmolLM2-135M-Instruct, 235 rows: answers valid against the schema 0 -> .963
    of 80 held-out."""
    if requirements.prompt not in ("bad", "close"):
        return None
    explanation = "prompts were not enough, and a grammar does not put the right values into the fields. A 135M model went from "
    explanation += "0 to 96% schema-valid answers on 235 rows"
    return RuleResult(
        "recommend_sft_for_format",
        ("format",),
        explanation,
        "tunesmith demo",
        "ours",
        recommended=("sft",),
    )


def recommend_sft_for_tone(_: Requirements) -> RuleResult | None:
    """Marquardt & Brule 2025 (2507.04889): above 90 to 95% on tone with 100 examples, 23 to 46%
    prompted; little more after about 1,000."""
    explanation = "with 100 examples more than 90% of answers had the tone, prompted 23 to 46%; little more came after 1,000"
    return RuleResult(
        "recommend_sft_for_tone",
        ("tone",),
        explanation,
        "Marquardt & Brule 2025",
        "published",
        recommended=("sft",),
    )


def suggest_thousand_rows(requirements: Requirements) -> RuleResult | None:
    """LIMA, Zhou 2023 (2305.11206): 2,000 filtered rows scored 3.83, unfiltered 3.33; no gain from
    2,000 to 32,000. Xia 2024 (2410.09335): at scale hardly any way of choosing beats chance."""
    if (requirements.examples or 0) < 2 * PLATEAU_EXAMPLES:
        return None
    explanation = f"for format and tone a thousand good rows may do as well as all {requirements.examples:,}: 2,000 filtered rows "
    explanation += "scored 3.83 of 6, unfiltered 3.33, and 32,000 no more. Keep a random thousand beside any choice: few beat it"
    return RuleResult(
        "suggest_thousand_rows",
        ("format", "tone"),
        explanation,
        "Zhou 2023, Xia 2024",
        "published",
        concerns=("sft",),
    )


# ---------------------------------------------------------------- cost


def recommend_prompt_distillation(requirements: Requirements) -> RuleResult | None:
    """Snell 2022 (2209.15189, Learning by Distilling Context): a prompt's instructions and examples
    can be trained into the weights. Hsieh 2023 (2305.02301, Distilling Step-by-Step): a 770M model
    tuned on a large one's answers and rationales did better than a prompted one of 540B. Both from
    memory, unverified."""
    if requirements.prompt not in ("good", "close"):
        return None
    explanation = "the good answers of the long prompt are the rows: train them with a short one, or into a smaller model. First "
    explanation += "see what a server that caches the common prefix leaves of the cost"
    source = "Snell 2022, Hsieh 2023, unverified"
    return RuleResult(
        "recommend_prompt_distillation",
        ("latency",),
        explanation,
        source,
        "published",
        recommended=("sft",),
    )


def reject_premature_distillation(requirements: Requirements) -> RuleResult | None:
    """A model is made cheaper after it is good: the answers to train on come from the prompt."""
    if requirements.prompt in ("good", "close"):
        return None
    explanation = "no prompt is known that answers well: there is nothing yet to make cheaper"
    return RuleResult(
        "reject_premature_distillation",
        ("latency",),
        explanation,
        "",
        "ours",
        recommended=("prompt",),
        ruled_out=("sft",),
    )


def reject_few_requests(requirements: Requirements) -> RuleResult | None:
    """1,000 requests a month are 33 a day: what they save does not pay for making a model and
    keeping it."""
    if requirements.requests_month is None or requirements.requests_month >= MIN_MONTHLY_REQUESTS:
        return None
    explanation = f"{requirements.requests_month:,} requests a month: what they could save does not pay for a model of your own"
    return RuleResult(
        "reject_few_requests",
        ("latency",),
        explanation,
        "",
        "ours",
        recommended=("prompt",),
        ruled_out=("sft",),
    )


# ---------------------------------------------------------------- language of a domain


def recommend_continued_pretraining(requirements: Requirements) -> RuleResult | None:
    """Gururangan 2020 (2004.10964, Don't Stop Pretraining; from memory, unverified): a second
    pretraining on 2 to 8 billion tokens of a domain helped in all four."""
    if (requirements.raw_text or 0) < MIN_TEXT_BYTES:
        return None
    explanation = f"about {_format_million_tokens(requirements)} million tokens of raw text: a language is learned from text, not from questions. "
    explanation += "It helped in all four domains tried, with 2 to 8 billion tokens"
    confidence: RuleConfidence = (
        "published" if (requirements.raw_text or 0) >= AMPLE_TEXT_BYTES else "extrapolated"
    )
    source = "Gururangan 2020, unverified"
    return RuleResult(
        "recommend_continued_pretraining",
        ("domain",),
        explanation,
        source,
        confidence,
        recommended=("cpt",),
    )


def reject_small_corpus(requirements: Requirements) -> RuleResult | None:
    """Yang 2024 (2409.07431), Llama-3-8B on 1.3M raw tokens: 39.49 -> 38.15; with retrieval
    60.35."""
    if (requirements.raw_text or 0) >= MIN_TEXT_BYTES:
        return None
    amount_text = (
        f"about {_format_million_tokens(requirements)} million tokens"
        if requirements.raw_text
        else "no raw text is named"
    )
    explanation = f"{amount_text}: 1.3 million made an 8B model worse (39.5 to 38.2), the same text looked up made it better (60.4)"
    recommended: tuple[Approach, ...] = ("retrieval",) if requirements.raw_text else ()
    common_advice = "continued pretraining for private domain language"
    return RuleResult(
        "reject_small_corpus",
        ("domain",),
        explanation,
        "Yang 2024",
        "published",
        recommended=recommended,
        ruled_out=("cpt",),
        common_advice=common_advice,
    )


def _format_million_tokens(requirements: Requirements) -> str:
    return f"{(requirements.raw_text or 0) / BYTES_PER_TOKEN / 1e6:,.1f}"


def recommend_sft_after_cpt(requirements: Requirements) -> RuleResult | None:
    """Cheng 2023 (2309.09530, Adapting Large Language Models via Reading Comprehension; from
    memory, unverified): pretraining on a domain's raw text adds knowledge and costs the ability to
    answer questions. Their remedy is questions within the text; that a small SFT set does the same
    is the usual practice."""
    if (requirements.raw_text or 0) < MIN_TEXT_BYTES:
        return None
    explanation = "plain text teaches the language and costs some of the ability to answer: a small set of questions and answers "
    explanation += "comes after it"
    source = "Cheng 2023, unverified"
    return RuleResult(
        "recommend_sft_after_cpt",
        ("domain",),
        explanation,
        source,
        "extrapolated",
        recommended=("sft",),
    )


# ---------------------------------------------------------------- skills


def recommend_sft_for_skill(requirements: Requirements) -> RuleResult | None:
    """Raghavendra 2024 (2410.03717): skills follow a power law in the number of examples. Dong 2023
    (2310.05492): chat is flat after about 1,000, mathematics and code are not."""
    if requirements.prompt not in ("bad", "close"):
        return None
    explanation = "prompts were not enough, and skills grow with the examples by a power law: mathematics and code did not "
    explanation += "flatten where chat did, at 1,000"
    confidence: RuleConfidence = (
        "published" if (requirements.examples or 0) >= PLATEAU_EXAMPLES else "extrapolated"
    )
    common_advice = "1,000 perfect examples against 1,000,000 noisy ones; true of tone and format"
    return RuleResult(
        "recommend_sft_for_skill",
        ("skill",),
        explanation,
        "Raghavendra 2024, Dong 2023",
        confidence,
        recommended=("sft",),
        common_advice=common_advice,
    )
